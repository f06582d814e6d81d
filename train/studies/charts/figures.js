"use strict";
// What every page of charts draws with: numbers and times as text, elements, colours of the look, and figures. A figure is
// built once and drawn when it comes into view. Strings among an element's children become text, never HTML.

// 1234567 -> "1.23 M"; seconds -> "2 d 4 h", "1:02:05".
function amount(value) {
  for (const [scale, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= scale) return Number((value / scale).toPrecision(3)) + " " + letter;
  return String(Number(value.toPrecision(3)));
}

function clock(seconds) {
  const s = Math.round(seconds), two = n => String(n).padStart(2, "0");
  if (s >= 86400) return `${Math.floor(s / 86400)} d ${Math.floor(s % 86400 / 3600)} h`;
  return `${Math.floor(s / 3600)}:${two(Math.floor(s % 3600 / 60))}:${two(s % 60)}`;
}

const by = id => document.getElementById(id);

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// A cell's column, for a table that is drawn as cards.
const labelled = (label, cell) => { cell.dataset.label = label; return cell; };

const root = document.documentElement;
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
const css = name => getComputedStyle(root).getPropertyValue("--" + name).trim();
const escapeText = text => text.replace(/[&<>]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);

const axisTitle = (text, standoff = 8) => ({ text, standoff, font: { size: 12, color: css("soft") } });
const axisLayout = extra => ({
  automargin: true, gridcolor: css("grid"), linecolor: css("line"), zeroline: false, separatethousands: true,
  tickfont: { size: 12, color: css("soft") }, ...extra,
});
const baseLayout = extra => ({
  margin: { l: 56, r: 14, t: 12, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
  font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: css("ink") }, dragmode: "zoom",
  hoverlabel: { bgcolor: css("card"), bordercolor: css("line"), font: { color: css("ink"), size: 12.5 } },
  modebar: { bgcolor: "rgba(0,0,0,0)", color: css("soft"), activecolor: css("ink") }, ...extra,
});

function select(label, options, value, choose) {
  const made = element("select", "", ...options.map(([key, text]) => new Option(text, key, false, String(key) === String(value))));
  made.onchange = () => choose(made.value);
  return element("label", "select", label + " ", made);
}

const figures = [];
const watcher = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const figure = figures.find(one => one.place === entry.target);
    figure.inView = entry.isIntersecting;
    if (figure.inView) drawIfDue(figure);
  }
}, { rootMargin: "300px" });

// A card with a title, a hint, room for controls, and one plot or more; `opened` gets each plot once it is drawn.
function makeFigure({ id, title, hint, about, wide, draws, opened }) {
  const text = element("p", "", hint || ""), badges = element("span", "badges"), controls = element("span", "tools");
  const plots = draws.map(draw => ({ plot: element("div", "plot"), draw: () => draw(figure) }));
  const caption = element("figcaption", "", element("h3", "", title), text, badges, controls);
  const place = element("figure", wide ? "wide" : "", caption, element("div", "plots", ...plots.map(part => part.plot)));
  place.id = id;
  caption.title = about || "";
  const figure = { id, place, controls, opened, dirty: true, inView: false, plots, hint: value => { text.textContent = value; } };
  figure.badges = (list, meaning) => {
    badges.replaceChildren(...list.map(badge => { const one = element("span", "badge " + (badge.good ? "good" : "bad"), badge.text); one.title = meaning; return one; }));
    if (list.length) badges.prepend(element("span", "soft", meaning));
  };
  figures.push(figure);
  watcher.observe(place);
  return figure;
}

// Of one value plotly makes an axis from itself - 1 to + 1. Here it begins at 0, so that the value shows how far a run is
// or how large it is; a map of one column names that column.
function widenSingle(traces, layout) {
  const curves = traces.filter(trace => trace.type === "scatter" && trace.visible !== false);
  for (const name of ["x", "y"]) {
    let only;
    const single = curves.every(trace => trace[name].every(value => !Number.isFinite(value) || value === (only ??= value)));
    if (single && only !== undefined) layout[name + "axis"].rangemode = "tozero";
  }
  for (const trace of traces) if (trace.type === "heatmap" && trace.x?.length === 1) layout.xaxis.tickvals = trace.x;
}

function drawIfDue(figure) {
  if (!figure.dirty) return;
  figure.dirty = false;
  for (const { plot, draw } of figure.plots) {
    const first = !plot.classList.contains("js-plotly-plot"), drawn = draw();
    // Where there is nothing to draw, the hint says why.
    plot.style.display = drawn ? "" : "none";
    if (!drawn) continue;
    const [traces, layout] = drawn;
    widenSingle(traces, layout);
    Plotly.react(plot, traces, layout, CONFIG);
    if (first) figure.opened?.(plot);
  }
}

function redraw(some = figures) {
  for (const figure of some) figure.dirty = true;
  for (const figure of some) if (figure.inView) drawIfDue(figure);
}


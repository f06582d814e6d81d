"use strict";
// Curves: one chart a metric, the relative gap, the bars of held-out scores. What is drawn follows `state` and `data`
// (page.js). Charts are built once and drawn when they come into view; a zoom along x is shared by all of them.

const root = document.documentElement;
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
const SYMBOL = { checkpoint: "circle-open", resume: "triangle-right", skip: "x", stop: "square", replay_differs: "diamond", dead_experts: "cross", start: "circle" };
const EVENT_TEXT = { checkpoint: "checkpoint", resume: "resumed", skip: "step skipped", stop: "end", replay_differs: "replay differs", dead_experts: "dead expert" };
const DASH = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const NUM_COLORS = 8;
// Beyond this many runs, a label for each at the pointer would cover the chart.
const MANY_RUNS = 10;
// Checkpoints are routine: more than this many on one curve say nothing.
const MAX_CHECKPOINTS = 24;

const css = name => getComputedStyle(root).getPropertyValue("--" + name).trim();
const color = run => css("run-" + run % NUM_COLORS);
const dash = run => DASH[Math.floor(run / NUM_COLORS) % DASH.length];
// Of two or three runs the earlier are drawn wider, so that they show beneath a later one that covers them.
const lineWidth = run => 1.8 + (data.runs.length < 4 ? 2.2 * (data.runs.length - 1 - run) : 0);
const escapeText = text => text.replace(/[&<>]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const shown = run => !state.hidden.has(run.key);
const AXIS_TITLE = { step: "step", tokens: "tokens", hours: "hours since the first step" };

function axisLayout(extra) {
  return {
    automargin: true, gridcolor: css("grid"), linecolor: css("line"), zeroline: false, separatethousands: true,
    tickfont: { size: 12, color: css("soft") }, ...extra,
  };
}

function xAxis() {
  const axis = axisLayout({
    type: state.logX ? "log" : "linear", title: { text: AXIS_TITLE[state.axis], standoff: 6, font: { size: 12, color: css("soft") } },
    nticks: 9, exponentformat: "SI",
    // A range that another chart chose wins over what was zoomed here before.
    uirevision: [state.axis, state.logX, state.zooms].join(),
  });
  if (state.range) { axis.range = state.range.slice(); axis.autorange = false; } else axis.autorange = true;
  return axis;
}

function layoutOf(extra) {
  return {
    margin: { l: 56, r: 14, t: 12, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: css("ink") }, dragmode: "zoom",
    hovermode: data.runs.length > MANY_RUNS ? "closest" : "x unified",
    hoverlabel: { bgcolor: css("card"), bordercolor: css("line"), font: { color: css("ink"), size: 12.5 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("soft"), activecolor: css("ink") },
    // What a person zoomed stays while new points arrive, until the axis itself changes.
    uirevision: [state.axis, state.logX, state.logY, state.resets].join(), xaxis: xAxis(), yaxis: axisLayout(), ...extra,
  };
}

// --- curves ---

function curveTraces(chart, run) {
  const series = unpackSeries(run.series[chart.metric]), factor = chart.percent ? 100 : 1, last = run.status.step;
  const scaled = values => factor === 1 ? values : values.map(value => value * factor);
  const raw = rawPoints(series), smoothed = chart.smooth && state.span > 1, traces = [];
  const base = { type: "scatter", name: escapeText(run.name), meta: run.key, visible: shown(run) };
  const line = { color: color(run.key), width: lineWidth(run.key), dash: dash(run.key) };
  const number = chart.percent ? "%{y:.2f} %" : "%{y:.5g}";
  if (smoothed && state.raw) traces.push({
    ...base, x: along(run, state.axis, raw.steps), y: scaled(raw.values), mode: "lines", hoverinfo: "skip",
    opacity: data.runs.length < 5 ? .3 : .14, line: { color: color(run.key), width: 1 },
  });
  const steps = smoothed ? endSteps(series, last) : raw.steps;
  const values = scaled(smoothed ? smooth(series.mean, state.span, series.width) : raw.values);
  const sparse = steps.length < 60 && steps.length * 4 < run.records;
  traces.push({
    ...base, x: along(run, state.axis, steps), y: values, mode: sparse || steps.length < 2 ? "lines+markers" : "lines", connectgaps: sparse,
    line, marker: { size: 5, color: color(run.key) }, customdata: steps,
    hovertemplate: (data.runs.length > MANY_RUNS ? "<b>%{fullData.name}</b> " : "") + number + (state.axis === "step" && data.runs.length <= MANY_RUNS ? "" : " · step %{customdata:,}") + (data.runs.length > MANY_RUNS ? "<extra></extra>" : ""),
  });
  return [...traces, ...markerTraces(chart, run, steps, values)];
}

// Events stand on the curve; checkpoints on the loss only, and only while there are few.
function markerTraces(chart, run, steps, values) {
  const kinds = Object.keys(run.events).filter(kind => kind !== "start" && kind in SYMBOL);
  const marks = kinds.flatMap(kind => {
    const log = run.events[kind], routine = kind === "checkpoint" || kind === "stop";
    if (routine && (!chart.marks || log.total > MAX_CHECKPOINTS || data.runs.length > MANY_RUNS)) return [];
    return log.steps.map(step => [step, kind]);
  }).filter(([step]) => steps.length && step >= steps[0] && step <= steps[steps.length - 1]);
  if (!marks.length) return [];
  const known = values.map((value, i) => [steps[i], value]).filter(([, value]) => Number.isFinite(value));
  if (!known.length) return [];
  const at = marks.map(([step]) => step);
  return [{
    type: "scatter", mode: "markers", name: escapeText(run.name), meta: run.key, visible: shown(run), x: along(run, state.axis, at),
    y: interpolate(known.map(pair => pair[0]), known.map(pair => pair[1]), at), text: marks.map(([step, kind]) => `${EVENT_TEXT[kind]} at step ${step.toLocaleString("en")}`),
    hovertemplate: "%{text}<extra></extra>",
    marker: {
      symbol: marks.map(([, kind]) => SYMBOL[kind]), size: marks.map(([, kind]) => kind === "checkpoint" ? 7 : 10), color: marks.map(([, kind]) => kind === "checkpoint" || kind === "stop" ? color(run.key) : css("incident")),
      line: { width: 1.5, color: marks.map(([, kind]) => kind === "checkpoint" ? color(run.key) : css("card")) },
    },
  }];
}

function drawCurves(chart) {
  const traces = data.runs.filter(run => run.series[chart.metric]).flatMap(run => curveTraces(chart, run));
  const yaxis = axisLayout({ type: chart.logarithmic && state.logY ? "log" : "linear", tickformat: chart.ticks, ticksuffix: chart.percent ? " %" : "" });
  if (chart.from_zero) yaxis.rangemode = "tozero";
  return [traces, layoutOf({ yaxis })];
}

// --- relative gap ---

// The run that others are compared with: chosen, else the first that is not FP8 if any run is, else the first.
function referenceRun() {
  const chosen = data.runs.find(run => run.key === state.reference);
  const plain = data.runs.some(run => run.precision === "fp8") && data.runs.find(run => run.precision && run.precision !== "fp8");
  return chosen || plain || data.runs[0];
}

function gapsOf() {
  const reference = referenceRun();
  if (!reference || !reference.series["loss/main"]) return [];
  const base = unpackSeries(reference.series["loss/main"]);
  return data.runs.filter(run => run !== reference && run.series["loss/main"]).map(run => ({ run, ...relativeGap(unpackSeries(run.series["loss/main"]), base, data.smoothing_steps) })).filter(gap => gap.gaps.length);
}

function drawGap(chart) {
  const reference = referenceRun(), gaps = gapsOf(), visible = gaps.filter(gap => shown(gap.run)), band = data.band_percent;
  const settled = visible.flatMap(gap => gap.gaps.slice(Math.floor(gap.gaps.length / 10))).map(Math.abs).filter(Number.isFinite).sort((a, b) => a - b);
  // A spike may leave the picture; zooming out shows it.
  const limit = Math.max(3 * band, 1.15 * (settled[Math.floor(.998 * settled.length)] || 0));
  const flat = (y, style) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: css("good"), width: 1, dash: style } });
  const bandShape = { type: "rect", xref: "paper", x0: 0, x1: 1, y0: -band, y1: band, fillcolor: css("band"), line: { width: 0 }, layer: "below" };
  const traces = gaps.map(gap => ({
    type: "scatter", mode: "lines", x: along(gap.run, state.axis, gap.steps.map(step => Math.min(step, gap.run.status.step))), y: gap.gaps, name: escapeText(gap.run.name), meta: gap.run.key, visible: shown(gap.run),
    line: { color: color(gap.run.key), width: 1.8, dash: dash(gap.run.key) }, hovertemplate: (gaps.length > MANY_RUNS ? "%{fullData.name} " : "") + "%{y:+.3f} %" + (gaps.length > MANY_RUNS ? "<extra></extra>" : ""),
  }));
  chart.badges(visible.slice(0, 4).map(gap => ({ text: (visible.length > 1 ? gap.run.name + " " : "") + (gap.mean >= 0 ? "+" : "−") + Math.abs(gap.mean).toFixed(3) + " %", good: Math.abs(gap.mean) <= band })), "mean over the second half");
  chart.hint(`against ${reference.name}; band: ±${band} %; smoothed over ${data.smoothing_steps} steps as in the report`);
  return [traces, layoutOf({
    shapes: [bandShape, flat(band, "dot"), flat(-band, "dot"), { ...flat(0, "solid"), line: { color: css("soft"), width: 1 } }],
    yaxis: axisLayout({ range: [-limit, limit], ticksuffix: " %" }),
  })];
}

// --- held-out scores beside simpler models ---

function scores() {
  const bars = data.runs.filter(run => run.bits_per_byte !== null).map(run => ({ run, label: run.name, value: run.bits_per_byte }));
  const baselines = Object.assign({}, ...data.runs.map(run => run.baselines));
  if (!bars.length || !Object.keys(baselines).length) return [];
  return [...bars, ...Object.entries(baselines).map(([label, value]) => ({ run: null, label, value }))].sort((a, b) => b.value - a.value);
}

function drawScores() {
  const bars = scores().filter(bar => !bar.run || shown(bar.run));
  return [[{
    type: "bar", orientation: "h", x: bars.map(bar => bar.value), y: bars.map(bar => escapeText(bar.label).replace(" (", "<br>(")), width: .62,
    text: bars.map(bar => bar.value.toFixed(3)), textposition: "outside", cliponaxis: false, hoverinfo: "skip",
    marker: { color: bars.map(bar => bar.run ? color(bar.run.key) : css("baseline")), cornerradius: 4 },
  }], layoutOf({
    hovermode: false, dragmode: false, margin: { l: 12, r: 48, t: 6, b: 12 },
    xaxis: axisLayout({ rangemode: "tozero", showgrid: false, showticklabels: false, fixedrange: true }),
    yaxis: axisLayout({ showgrid: false, tickfont: { size: 12.5, color: css("ink") }, ticksuffix: "  ", fixedrange: true }),
  })];
}

// --- figures: built once, drawn in view ---

const figures = [];
const watcher = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const figure = figures.find(one => one.place === entry.target);
    figure.inView = entry.isIntersecting;
    if (figure.inView) drawIfDue(figure);
  }
}, { rootMargin: "300px" });

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// A card with a title, a hint, room for controls, and one plot or more.
function makeFigure({ id, title, hint, about, wide, shared = true, draws }) {
  const place = element("figure", wide ? "wide" : ""), caption = element("figcaption"), text = element("p", "", hint || "");
  const badges = element("span", "badges"), controls = element("span", "tools"), plots = element("div", "plots");
  place.id = id;
  caption.title = about || "";
  caption.append(element("h3", "", title), text, badges, controls);
  place.append(caption, plots);
  const figure = { id, place, controls, shared, dirty: true, inView: false, plots: [], hint: value => { text.textContent = value; } };
  figure.badges = (list, meaning) => {
    badges.replaceChildren(...list.map(badge => { const one = element("span", "badge " + (badge.good ? "good" : "bad"), badge.text); one.title = meaning; return one; }));
    if (list.length) badges.prepend(element("span", "soft", meaning));
  };
  for (const draw of draws) {
    const plot = element("div", "plot");
    plots.append(plot);
    figure.plots.push({ plot, draw: () => draw(figure) });
  }
  figures.push(figure);
  watcher.observe(place);
  return figure;
}

function drawIfDue(figure) {
  if (!figure.dirty) return;
  figure.dirty = false;
  for (const { plot, draw } of figure.plots) {
    const first = !plot.classList.contains("js-plotly-plot");
    Plotly.react(plot, ...draw(), CONFIG);
    if (first && figure.shared) shareZoom(plot);
  }
}

function redraw(some = figures) {
  for (const figure of some) figure.dirty = true;
  for (const figure of some) if (figure.inView) drawIfDue(figure);
}

function shareZoom(plot) {
  plot.on("plotly_relayout", change => {
    const low = change["xaxis.range[0]"], auto = change["xaxis.autorange"];
    if (low === undefined && !auto) return;
    const range = auto ? null : [low, change["xaxis.range[1]"]];
    if (String(range) === String(state.range)) return;
    state.range = range;
    state.zooms++;
    redraw(figures.filter(figure => figure.shared && !figure.plots.some(part => part.plot === plot)));
  });
}

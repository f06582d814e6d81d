"use strict";
// Headline, words, charts and tables of a plan. Every text of the document is set as text, never as HTML.

const { run, gpu, candidate, memory, cost, search } = plan;
const GB = 1e9;
// A number and its unit stay on one line.
const united = (number, unit) => `${number}\u00a0${unit}`;
const gb = bytes => united((bytes / GB).toFixed(1), "GB");
const percent = (ratio, digits = 0) => united((100 * ratio).toFixed(digits), "%");
const signed = ratio => (ratio >= 0 ? "+" : "−") + percent(Math.abs(ratio));
const whole = value => Math.round(value).toLocaleString("en");
const seconds = value => united(value.toPrecision(3), "s");
const narrow = () => innerWidth < 640;
// Lines of at most so many characters, for labels beside bars.
const wrapped = (text, length) => escapeText(text.split(" ").reduce((lines, word) => lines.slice(lines.lastIndexOf("\n") + 1).length + word.length < length ? `${lines} ${word}` : `${lines}\n${word}`)).replaceAll("\n", "<br>");
const spaced = name => name.replaceAll("_", " ");
const yes = value => value ? "yes" : "–";
const fullest = memory.ranks.reduce((most, row) => row.total_bytes > most.total_bytes ? row : most);
const SCHEDULES = [...new Set(search.rows.map(row => row.schedule))].sort();
// What an unknown component of memory is drawn in.
const partColor = name => css("part-" + name) || css("soft");

const number = (value, label) => element("span", "number", element("b", "", value), element("span", "", label));
const tile = (title, badge, numbers, ...rest) => element("div", "tile card", element("h2", "", title, ...badge), element("div", "numbers", ...numbers), ...rest);
// Two totals, always: as modelled, and times the stated bias.
const pair = show => [number(show(cost.modelled), "modelled"), number(show(cost.corrected), `corrected × ${cost.bias.toFixed(2)}`)];

function fillHeadline() {
  const left = gpu.memory_bytes - fullest.total_bytes, fill = element("span"), gauge = element("div", left < 0 ? "gauge over" : "gauge", fill);
  fill.style.width = `${Math.min(100, 100 * fullest.total_bytes / gpu.memory_bytes)}%`;
  const fits = element("span", "badge " + (left < 0 ? "bad" : "good"), left < 0 ? "does not fit" : "fits"), { step } = plan;
  const errors = cost.held_out.map(one => signed(one.error)).join(", ");
  by("headline").replaceChildren(
    tile("Memory", [fits], [number(gb(Math.abs(left)), left < 0 ? "too much on the fullest rank" : "left on the fullest rank")], gauge,
      element("p", "", `pipeline rank ${fullest.pp_rank}: ${gb(fullest.total_bytes)} of ${gb(gpu.memory_bytes)}, ${gb(gpu.reserved_bytes)} of it reserved`)),
    tile("Step", [], pair(total => seconds(step.time_s * total.gpu_hours_per_trillion / cost.modelled.gpu_hours_per_trillion)),
      element("p", "", `modelled: ${amount(step.tokens_per_s)} tokens/s; ${whole(step.tokens_per_s_per_gpu)} tokens/s and ${whole(step.tflop_per_s)} TFLOP/s a GPU`)),
    tile("GPU-hours per trillion tokens", [], pair(total => amount(total.gpu_hours_per_trillion)),
      element("p", "", `bias: ${cost.bias_source}${errors && `; held-out errors ${errors}`}`)),
    tile("Whole run", [], pair(total => `${total.days.toFixed(1)} d`),
      element("p", "", `$ ${amount(cost.modelled.dollars)} modelled, $ ${amount(cost.corrected.dollars)} corrected, at $ ${cost.dollars_per_gpu_hour.toFixed(2)} a GPU-hour and ${percent(cost.effective_training_time)} effective training time`)),
  );
  by("words").replaceChildren(element("h2", "", "The search in words"), ...plan.words.map(text => element("p", "", text)));
  by("subtitle").textContent = [`${whole(run.world)} × ${gpu.name}`, `${candidate.schedule}, pp ${candidate.pp} × dp ${candidate.dp}, ep ${candidate.ep}`, `${run.micro_batches} micro-batches`, `${whole(run.batch_sequences)} × ${whole(run.sequence_length)} tokens`, run.precision, plan.date].join(" · ");
  if (!plan.runs_today) by("notes").replaceChildren(element("p", "note", element("b", "", "Not yet"), `The trainer cannot run this today${plan.why_not ? `: ${plan.why_not}` : ""}.`));
  by("footer").textContent = `Nothing here was run: times are modelled from the rows under Sources. Both totals stand everywhere: as modelled, and times ${cost.bias.toFixed(2)} (${cost.bias_source}).`;
}

// Bars that lie, each with its text.
function bars(names, values, texts, colors) {
  return [[{
    type: "bar", orientation: "h", x: values, y: names.map(escapeText), width: .62, text: texts, textposition: "outside", cliponaxis: false, hoverinfo: "skip",
    marker: { color: colors, cornerradius: 4 },
  }], baseLayout({
    hovermode: false, dragmode: false, margin: { l: 12, r: 96, t: 6, b: 12 }, xaxis: axisLayout({ rangemode: "tozero", showgrid: false, showticklabels: false, fixedrange: true }),
    yaxis: axisLayout({ autorange: "reversed", showgrid: false, fixedrange: true, tickfont: { size: 12.5, color: css("ink") }, ticksuffix: "  " }),
  })];
}

const PHASE_COLOR = { "1F": "f", "1B": "b", "1W": "w", "1F1B": "pair", bubble: "busy", update: "run-4" };
function drawPhases() {
  const phases = Object.entries(plan.step.phases_s), all = phases.reduce((sum, [, s]) => sum + s, 0);
  return bars(phases.map(([name]) => name), phases.map(([, s]) => s), phases.map(([, s]) => `${s.toFixed(2)} s · ${percent(s / all)}`), phases.map(([name]) => css(PHASE_COLOR[name] || "soft")));
}

const limit = () => gpu.memory_bytes / GB;
const flat = y => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: css("bad"), width: 1.5 } });
const upright = (x, color, dash) => ({ type: "line", yref: "paper", y0: 0, y1: 1, x0: x, x1: x, line: { color: css(color), width: 1.5, dash } });
const note = (text, color, extra) => ({ text, yanchor: "bottom", showarrow: false, font: { size: 12, color: css(color) }, ...extra });
const limitNote = text => note(text, "bad", { xref: "paper", x: 1, xanchor: "right", y: limit() });

// What CUDA and NCCL take is at the foot of every bar.
function drawMemory() {
  const names = [...new Set(["reserved", ...memory.ranks.flatMap(row => Object.keys(row.components))])], ranks = memory.ranks.map(row => row.pp_rank);
  const traces = names.map(name => ({
    type: "bar", name: spaced(escapeText(name)), x: ranks, y: memory.ranks.map(row => (row.components[name] || 0) / GB),
    marker: name === "reserved" ? { color: css("card"), pattern: { shape: "/", size: 5, fgcolor: partColor(name) } } : { color: partColor(name) }, hovertemplate: "%{y:.1f} GB",
  }));
  const used = memory.ranks.map(row => row.total_bytes / GB), top = Math.max(limit(), ...used);
  traces.push({ type: "scatter", mode: "text", name: "in all", x: ranks, y: used, text: narrow() ? [] : used.map(one => one.toFixed(0)), textposition: "top center", textfont: { size: 11.5, color: css("soft") }, customdata: memory.ranks.map(row => [escapeText(row.holds), row.rank]), hovertemplate: "%{y:.1f} GB<br>%{customdata[0]}<br>rank %{customdata[1]:,}", showlegend: false });
  return [traces, baseLayout({
    barmode: "stack", bargap: .28, hovermode: "x unified", showlegend: true, legend: { orientation: "h", y: -.16, yanchor: "top", x: 0, traceorder: "normal", font: { size: 12, color: css("soft") } },
    shapes: [flat(limit())],
    annotations: [limitNote(`${escapeText(gpu.name)}: ${gb(gpu.memory_bytes)}`)],
    xaxis: axisLayout({ title: axisTitle("pipeline rank", 6), unifiedhovertitle: { text: "pipeline rank %{x}" }, showgrid: false, dtick: ranks.length > 24 ? undefined : narrow() ? 3 : 1, tickangle: 0 }), yaxis: axisLayout({ range: [0, 1.09 * top], ticksuffix: " GB" }),
  })];
}

const curve = (y, color, unit) => ({ type: "scatter", mode: "lines+markers", x: memory.imbalance.map(one => one.imbalance), y, line: { color: css(color), width: 2 }, marker: { size: 8 }, hovertemplate: `imbalance %{x}: %{y:.1f} ${unit}<extra></extra>` });
const imbalanceAxis = () => axisLayout({ title: axisTitle("tokens of the fullest rank over the mean", 6), dtick: .2 });
function drawImbalanceMemory() {
  const at = memory.breaks_at, shapes = [flat(limit())], annotations = [limitNote("limit")];
  if (at !== null) {
    shapes.push(upright(at, "bad", "dot"));
    annotations.push(note(` out of memory at ${at.toFixed(2)}`, "bad", { x: at, yref: "paper", y: 0, xanchor: "left" }));
  }
  return [[curve(memory.imbalance.map(one => one.fullest_bytes / GB), "part-activations", "GB")], baseLayout({ hovermode: "closest", shapes, annotations, xaxis: imbalanceAxis(), yaxis: axisLayout({ ticksuffix: " GB" }) })];
}
const drawImbalanceStep = () => [[curve(memory.imbalance.map(one => one.step_s), "f", "s")], baseLayout({ hovermode: "closest", xaxis: imbalanceAxis(), yaxis: axisLayout({ ticksuffix: " s", rangemode: "tozero" }) })];

function drawChanges() {
  const names = plan.changes.map(one => wrapped(one.what, narrow() ? 20 : 44)), [, layout] = bars([], [], [], []);
  const series = (key, color) => ({ type: "bar", orientation: "h", name: key, x: plan.changes.map(one => one[key]), y: names, text: plan.changes.map(one => amount(one[key])), textposition: "outside", cliponaxis: false, hoverinfo: "skip", marker: { color: css(color), cornerradius: 4 } });
  const { bound } = plan;
  return [[series("modelled", "f"), series("corrected", "f-2")], {
    ...layout, showlegend: true, bargap: .3, bargroupgap: .06, margin: { l: 12, r: 60, t: 34, b: 26 }, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 12, color: css("soft") } },
    shapes: [upright(bound.modelled, "good", "dot")], annotations: [note(`${escapeText(bound.what)}: ${amount(bound.modelled)}`, "good", { x: bound.modelled, yref: "paper", y: 0, yanchor: "top" })],
  }];
}

const isChosen = row => row.fits && ["pp", "ep", "dp", "schedule", "chunks", "micro_batch_sequences", "recompute", "dispatch", "overlap"].every(key => row[key] === candidate[key]);
const inShort = row => escapeText(`${row.schedule} pp ${row.pp} ep ${row.ep} dp ${row.dp}, ${row.dispatch}${row.recompute ? ", recompute" : ""}${row.overlap ? ", overlap" : ""}`);
function drawFound() {
  const trace = (name, chosen, marker) => ({
    type: "scatter", mode: "markers", name, x: chosen.map(row => row.memory_bytes / GB), y: chosen.map(row => row.modelled), marker, customdata: chosen.map(row => [search.rows.indexOf(row), inShort(row), amount(row.modelled), amount(row.corrected)]),
    hovertemplate: "%{customdata[1]}<br><b>%{customdata[2]}</b> modelled, <b>%{customdata[3]}</b> corrected<br>%{x:.1f} GB<extra></extra>",
  });
  const traces = [trace("does not fit", search.rows.filter(row => !row.fits), { size: 7, color: css("soft"), opacity: .35 })];
  SCHEDULES.forEach((name, i) => traces.push(trace(escapeText(name), search.rows.filter(row => row.fits && row.schedule === name), { size: 10, color: css("run-" + i % 8), line: { width: 1, color: css("card") } })));
  traces.push(trace("this plan", search.rows.filter(isChosen), { size: 18, symbol: "circle-open", color: css("ink"), line: { width: 2.5 } }));
  const sizes = search.rows.filter(row => row.fits).map(row => row.memory_bytes / GB), costs = search.rows.filter(row => row.fits).map(row => row.modelled);
  // What is far beyond the limit or the costs of those that fit may leave the picture; zooming out shows it.
  return [traces.filter(one => one.x.length), baseLayout({
    hovermode: "closest", showlegend: true, legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0, font: { size: 12, color: css("soft") } }, margin: { l: 56, r: 14, t: 30, b: 44 },
    shapes: [upright(limit(), "bad")],
    xaxis: axisLayout({ title: axisTitle("memory of the fullest rank", 6), ticksuffix: " GB", ...(sizes.length && { range: [Math.min(...sizes) - 3, 1.6 * limit()] }) }),
    yaxis: axisLayout({ title: axisTitle("GPU-hours per trillion tokens, modelled"), tickformat: "~s", ...(costs.length && { range: [.93 * Math.min(...costs), 1.12 * Math.max(...costs)] }) }),
  })];
}

// Columns: label, value of a row to sort by, its text or element (the value where absent), and whether it is prose.
function makeTable(columns, list, { sortable = false, mark = () => "" } = {}) {
  const heads = columns.map(({ label, prose }) => {
    const head = element("th", prose ? "text" : "", sortable ? element("button", "", label) : label);
    if (sortable) head.firstChild.onclick = () => sort(heads.indexOf(head), head.getAttribute("aria-sort") !== "ascending");
    return head;
  });
  const lines = list.map(row => [row, element("tr", mark(row), ...columns.map(({ label, of, show, prose }, i) => labelled(label, element(i ? "td" : "th", prose ? "text" : "", show ? show(row) : String(of(row))))))]);
  const body = element("tbody");
  const fill = () => body.replaceChildren(...lines.map(line => line[1]));
  function sort(column, up) {
    const { of } = columns[column];
    lines.sort(([a], [b]) => (up ? 1 : -1) * (typeof of(a) === "string" && typeof of(b) === "string" ? of(a).localeCompare(of(b)) : of(a) - of(b)));
    heads.forEach((head, i) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
    fill();
  }
  fill();
  const place = element("div", sortable ? "table sorted" : "table", element("table", "", element("thead", "", element("tr", "", ...heads)), body));
  return Object.assign(place, { sort, lines });
}

const block = (title, hint, ...rest) => element("div", "block", element("header", "", element("h3", "", title), element("p", "", hint)), ...rest);
const field = (label, key, show) => ({ label, of: row => row[key], show: show && (row => show(row[key])) });
const text = (label, key) => ({ ...field(label, key), prose: true });

const changesTable = () => makeTable([text("Change, one after the other", "what"), field("Step", "step_s", seconds), field("Modelled", "modelled", amount), field("Corrected", "corrected", amount), field("Bubble", "bubble", ratio => percent(ratio))], plan.changes);
function partsTable() {
  const all = { what: "whole recipe", tokens: 0, modelled_gpu_hours: 0, corrected_gpu_hours: 0 };
  for (const part of cost.parts) for (const key of ["tokens", "modelled_gpu_hours", "corrected_gpu_hours"]) all[key] += part[key];
  return makeTable([text("Part", "what"), field("Tokens", "tokens", amount), field("Modelled", "modelled_gpu_hours", amount), field("Corrected", "corrected_gpu_hours", amount)], [...cost.parts, all], { mark: row => row === all ? "best" : "" });
}
const heldOutTable = () => makeTable([text("System", "name"), field("Published", "published", whole), field("Modelled", "modelled", whole), field("Error", "error", signed), text("Source", "source")], cost.held_out);
const layoutsTable = () => makeTable([
  text("Schedule", "schedule"), field("pp", "pp"), field("ep", "ep"), field("dp", "dp"), field("Modelled", "modelled", amount), field("Corrected", "corrected", amount), field("Step", "step_s", seconds), field("Bubble", "bubble", ratio => percent(ratio, 1)), field("Memory", "memory_bytes", gb), field("Fits", "fits", yes),
  field("Chunks", "chunks"), field("Micro-batch", "micro_batch_sequences"), field("Recompute", "recompute", yes), text("Dispatch", "dispatch"), field("Overlap", "overlap", yes), field("Runs today", "runs_today", yes),
], search.rows, { sortable: true, mark: row => isChosen(row) ? "chosen" : row.fits ? "" : "misfit" });
const sourcesTable = () => makeTable([text("What", "what"), { ...field("Value", "value"), show: row => typeof row.value === "number" ? Number(row.value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 }) : row.value }, text("Unit", "unit"), { ...text("Label", "label"), show: row => element("span", "label " + row.label, row.label) }, text("Source", "source"), text("Date", "date")], plan.sources, { sortable: true });

function section(id, title, ...rest) {
  const made = element("section", "section", element("h2", "", title), ...rest), link = element("a", "", title);
  made.id = id;
  link.href = "#" + id;
  by("sections").append(link);
  by("charts").append(made);
}
const chart = spec => makeFigure(spec).place;

function fillSections() {
  const layouts = layoutsTable();
  layouts.sort(4, true);
  const pick = plot => plot.on("plotly_click", event => {
    const wanted = search.rows[event.points[0].customdata[0]];
    for (const [row, line] of layouts.lines) line.classList.toggle("picked", row === wanted);
    layouts.scrollTop = layouts.querySelector(".picked").offsetTop - layouts.clientHeight / 2;
  });
  const tall = Math.max(260, 70 + (narrow() ? 66 : 46) * plan.changes.length), changes = chart({ id: "changes-chart", title: "What each change buys", hint: "GPU-hours per trillion tokens, each change on top of those above", draws: [drawChanges] });
  changes.style.setProperty("--plot-height", tall + "px");
  section("step", "Step", element("div", "figures", makeTimeline(), chart({ id: "phases", title: "Where the step goes", hint: "mean over pipeline ranks; 1F1B is an overlapped pair", wide: true, draws: [drawPhases] })));
  section("memory-section", "Memory", element("div", "figures",
    chart({ id: "memory", title: "Memory of each pipeline rank", hint: "its fullest data rank, by component", wide: true, draws: [drawMemory] }),
    chart({ id: "imbalance", title: "If experts are not balanced", hint: memory.breaks_at === null ? "memory of the fullest rank, and the step" : `memory of the fullest rank, and the step; out of memory at ${memory.breaks_at.toFixed(2)}`, wide: true, draws: [drawImbalanceMemory, drawImbalanceStep] })));
  section("cost", "Cost", element("div", "figures", changes), block("Changes", "GPU-hours per trillion tokens", changesTable()), element("div", "columns",
    block("The whole recipe", `GPU-hours; ${amount(cost.modelled.gpu_hours)} modelled, ${amount(cost.corrected.gpu_hours)} corrected at ${percent(cost.effective_training_time)} effective training time`, partsTable()),
    block("Systems that others measured", "their inputs untouched, tokens per second and GPU", heldOutTable())));
  const fits = element("button", "", "Only what fits");
  fits.onclick = () => fits.setAttribute("aria-pressed", layouts.classList.toggle("fitting"));
  const found = block("All of them", "a click on a column sorts", layouts);
  found.firstChild.append(element("span", "choice", fits));
  section("layouts", "Layouts", element("div", "figures", chart({ id: "found", title: "Memory against cost", hint: `${whole(search.tried)} layouts tried in ${seconds(search.seconds)}, ${whole(search.fit)} fit; a click finds the row below`, wide: true, draws: [drawFound], opened: pick })), found);
  section("sources", "Sources", sourcesTable());
}

function paint() {
  by("theme").textContent = root.dataset.theme === "dark" ? "Light" : "Dark";
  redraw();
  drawTimeline();
}

root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
by("theme").onclick = () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; paint(); };
fillHeadline();
fillSections();
show(0, usual());
paint();
new ResizeObserver(drawTimeline).observe(timeline.canvas.parentElement);

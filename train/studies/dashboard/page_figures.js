"use strict";
// Every figure of the dashboard. First the arrays that it is drawn from: unpacking, x axes, smoothing, the relative gap.
// Then curves, one chart a metric; the gap and the held-out scores. Last tables over time: expert load and bias
// (layers x experts), FP8 statistics (layers x operands). What is drawn follows `state` and `data` (page.js).

// A series is buckets of equal width in steps (series.py): key (bucket number), mean, and with width above 1
// low and high with the steps at which they were reached. NaN is a hole.

const bytesOf = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const ARRAYS = { f4: Float32Array, f8: Float64Array, u4: Uint32Array, u2: Uint16Array };
const unpack = (text, kind) => new ARRAYS[kind](bytesOf(text).buffer);

function unpackSeries(packed) {
  if (packed.mean instanceof Float32Array) return packed;
  for (const name of ["mean", "low", "high"]) if (name in packed) packed[name] = unpack(packed[name], "f4");
  for (const name of ["key", "at_low", "at_high"]) if (name in packed) packed[name] = unpack(packed[name], "u4");
  return packed;
}

// BF16 cells of all columns: the upper half of an FP32.
function unpackTable(table) {
  if (table.cells instanceof Float32Array) return table;
  const half = unpack(table.cells, "u2"), words = new Uint32Array(half.length);
  for (let i = 0; i < half.length; i++) words[i] = half[i] << 16;
  table.cells = new Float32Array(words.buffer);
  table.size = table.shape.reduce((sum, cells) => sum + cells, 0);
  return table;
}

// The last step of each bucket; the newest bucket ends where the run does.
function endSteps(series, lastStep) {
  const ends = Array.from(series.key, key => key * series.width + series.width - 1);
  if (ends.length) ends[ends.length - 1] = Math.min(ends[ends.length - 1], lastStep);
  return ends;
}

// As logged: every value, or the lowest and highest of each bucket in the order they came.
function rawPoints(series) {
  if (series.width === 1) return { steps: Array.from(series.key), values: Array.from(series.mean) };
  const steps = [], values = [];
  for (let i = 0; i < series.key.length; i++) {
    const low = [series.at_low[i], series.low[i]], high = [series.at_high[i], series.high[i]];
    const pair = low[0] === high[0] ? [low] : low[0] < high[0] ? [low, high] : [high, low];
    for (const [step, value] of pair) { steps.push(step); values.push(value); }
  }
  return { steps, values };
}

// Bias-corrected exponential moving average over about `span` steps (compare.py); a bucket of w steps counts as
// w steps of its mean. Holes leave the average where it was; they are kept where the series has single steps.
function smooth(values, span, width = 1) {
  if (span <= 1) return Array.from(values);
  const decay = Math.pow(1 - 1 / span, width), out = new Array(values.length);
  let total = 0, weight = 0;
  for (let i = 0; i < values.length; i++) {
    if (Number.isFinite(values[i])) {
      total = decay * total + (1 - decay) * values[i];
      weight = decay * weight + (1 - decay);
    }
    out[i] = weight ? total / weight : NaN;
  }
  return out;
}

// Bucket number -> mean, in buckets of `width` steps, which the series' own width divides.
function coarseMeans(series, width) {
  const factor = width / series.width, sums = new Map();
  for (let i = 0; i < series.key.length; i++) {
    if (!Number.isFinite(series.mean[i])) continue;
    const key = Math.floor(series.key[i] / factor), sum = sums.get(key) || [0, 0];
    sums.set(key, [sum[0] + series.mean[i], sum[1] + 1]);
  }
  return new Map([...sums].map(([key, [sum, count]]) => [key, sum / count]));
}

// (tested - reference) / reference of the smoothed values, in %, over the buckets that both have.
function relativeGap(tested, reference, span) {
  const width = Math.max(tested.width, reference.width);
  const a = coarseMeans(tested, width), b = coarseMeans(reference, width);
  const keys = [...a.keys()].filter(key => b.has(key)).sort((left, right) => left - right);
  const smoothA = smooth(keys.map(key => a.get(key)), span, width), smoothB = smooth(keys.map(key => b.get(key)), span, width);
  const gaps = smoothA.map((value, i) => 100 * (value - smoothB[i]) / smoothB[i]);
  const half = gaps.slice(Math.floor(gaps.length / 2));
  return { width, steps: keys.map(key => key * width + width - 1), gaps, mean: half.reduce((sum, gap) => sum + gap, 0) / half.length };
}

// Linear between knots (ascending steps), flat outside.
function interpolate(knots, value, steps) {
  let at = 0;
  return steps.map(step => {
    if (at && knots[at] > step) at = 0;
    while (at < knots.length - 1 && knots[at + 1] <= step) at++;
    if (at === knots.length - 1 || step <= knots[at]) return value[at];
    return value[at] + (value[at + 1] - value[at]) * (step - knots[at]) / (knots[at + 1] - knots[at]);
  });
}

// Steps of a run on the chosen axis.
function along(run, axis, steps) {
  if (axis === "step") return steps;
  const packed = run.axes[axis === "tokens" ? "tokens_seen" : "time/trained_s"];
  if (!packed) return steps;
  if (typeof packed.step === "string") { packed.step = unpack(packed.step, "u4"); packed.value = unpack(packed.value, "f8"); }
  const values = interpolate(packed.step, packed.value, steps);
  return axis === "tokens" ? values : values.map(value => value / 3600);
}

// --- charts: built once, drawn when they come into view; a zoom along x is shared by all ---

const SYMBOL = { checkpoint: "circle-open", resume: "triangle-right", skip: "x", spike: "triangle-up", stop: "square", replay_differs: "diamond", dead_experts: "cross", straggler: "triangle-down-open", start: "circle" };
const EVENT_TEXT = { checkpoint: "checkpoint", resume: "resumed", skip: "step skipped", spike: "spike skipped", stop: "end", replay_differs: "replay differs", dead_experts: "dead expert", straggler: "slow rank", low_speed: "low speed", stale_checkpoint: "old checkpoint" };
const DASH = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const NUM_COLORS = 8;
// Beyond this many runs, a label for each at the pointer would cover the chart.
const MANY_RUNS = 10;
// Checkpoints are routine: more than this many on one curve say nothing.
const MAX_CHECKPOINTS = 24;

const color = run => css("run-" + run % NUM_COLORS);
const dash = run => DASH[Math.floor(run / NUM_COLORS) % DASH.length];
// Of two or three runs the earlier are drawn wider, so that they show beneath a later one that covers them.
const lineWidth = run => 1.8 + (data.runs.length < 4 ? 2.2 * (data.runs.length - 1 - run) : 0);
const shown = run => !state.hidden.has(run.key);
const AXIS_TITLE = { step: "step", tokens: "tokens", hours: "hours of training, pauses left out" };

const xAxis = () => axisLayout({
  type: state.logX ? "log" : "linear", title: axisTitle(AXIS_TITLE[state.axis], 6), nticks: 9, exponentformat: "SI",
  // A range that another chart chose wins over what was zoomed here before.
  uirevision: [state.axis, state.logX, state.zooms].join(), autorange: !state.range, ...(state.range && { range: state.range.slice() }),
});
const layoutOf = extra => baseLayout({
  hovermode: data.runs.length > MANY_RUNS ? "closest" : "x unified",
  // What a person zoomed stays while new points arrive, until the axis itself changes.
  uirevision: [state.axis, state.logX, state.logY, state.resets].join(), xaxis: xAxis(), yaxis: axisLayout(), ...extra,
});

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

// Events are marked on the curve; checkpoints on the loss only, and only while there are few.
function markerTraces(chart, run, steps, values) {
  const marks = Object.keys(run.events).filter(kind => kind !== "start" && kind in SYMBOL).flatMap(kind => {
    const log = run.events[kind], routine = kind === "checkpoint" || kind === "stop";
    if (routine && (!chart.marks || log.total > MAX_CHECKPOINTS || data.runs.length > MANY_RUNS)) return [];
    return log.steps.map(step => [step, kind]);
  }).filter(([step]) => steps.length && step >= steps[0] && step <= steps[steps.length - 1]);
  const known = values.map((value, i) => [steps[i], value]).filter(([, value]) => Number.isFinite(value));
  if (!marks.length || !known.length) return [];
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
  const range = chart.from_zero && { rangemode: "tozero" };
  return [traces, layoutOf({ yaxis: axisLayout({ type: chart.logarithmic && state.logY ? "log" : "linear", tickformat: chart.ticks, ticksuffix: chart.percent ? " %" : "", ...range }) })];
}

// Why the losses of two runs cannot be compared: the first thing that both name and that differs; "" where none does.
function whyNoGap(run, reference) {
  const name = Object.keys(run.identity).find(key => key in reference.identity && run.identity[key] !== reference.identity[key]);
  if (!name) return "";
  return name === "text" || name === "tokeniser" ? `another ${name}` : `${name} is ${run.identity[name]}, not ${reference.identity[name]}`;
}

const withLoss = () => data.runs.filter(run => run.series["loss/main"]);
// The run that others are compared with: chosen, else of those that can be compared with another the first that is not
// FP8 if any run is, else the first.
function referenceRun() {
  const able = withLoss(), paired = able.filter(run => able.some(other => other !== run && !whyNoGap(other, run)));
  const plain = data.runs.some(run => run.precision === "fp8") && paired.find(run => run.precision && run.precision !== "fp8");
  return able.find(run => run.key === state.reference) || plain || paired[0] || able[0];
}

function gapsOf() {
  const reference = referenceRun();
  if (!reference) return [];
  const base = unpackSeries(reference.series["loss/main"]);
  return withLoss().filter(run => run !== reference && !whyNoGap(run, reference)).map(run => ({ run, ...relativeGap(unpackSeries(run.series["loss/main"]), base, data.smoothing_steps) })).filter(gap => gap.gaps.length);
}

// Of runs that are no match for the reference: the first by name and reason, the others counted.
function noGapText() {
  const reference = referenceRun(), others = withLoss().map(run => [run, whyNoGap(run, reference)]).filter(([, why]) => why);
  if (!others.length) return "";
  const [run, why] = others[0], more = others.length > 1 ? ` (and of ${others.length - 1} more)` : "";
  return `no gap of ${run.name}${more}, it is no run of one model and text with ${reference.name}: ${why}`;
}

function drawGap(chart) {
  const reference = referenceRun(), gaps = gapsOf(), visible = gaps.filter(gap => shown(gap.run)), band = data.band_percent;
  if (!gaps.length) {
    chart.badges([], "");
    chart.hint(noGapText());
    return null;
  }
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
  chart.hint(`against ${reference.name}; band: ±${band} %; smoothed over ${data.smoothing_steps} steps as in the report` + (noGapText() && `; ${noGapText()}`));
  return [traces, layoutOf({
    shapes: [bandShape, flat(band, "dot"), flat(-band, "dot"), { ...flat(0, "solid"), line: { color: css("soft"), width: 1 } }],
    yaxis: axisLayout({ range: [-limit, limit], ticksuffix: " %" }),
  })];
}

// Held-out scores beside those of simpler models.
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

function shareZoom(plot) {
  plot.on("plotly_relayout", change => {
    const low = change["xaxis.range[0]"], auto = change["xaxis.autorange"];
    if (low === undefined && !auto) return;
    const range = auto ? null : [low, change["xaxis.range[1]"]];
    if (String(range) === String(state.range)) return;
    state.range = range;
    state.zooms++;
    redraw(figures.filter(figure => figure.opened && !figure.plots.some(part => part.plot === plot)));
  });
}

// One run is inspected at a time: every layer at one moment on the left, one layer over time on the right. A click left
// chooses the layer, a click right the moment. A column is several steps where a run is long, joined by `reduction`.

const JOINED = { mean: "mean", last: "last", max: "highest", min: "lowest" };
// Statistics of the FP8 figure: what they mean, and whether many or few are bad.
const STATISTICS = {
  "fp8/amax": { label: "amax", about: "largest magnitude", log: true, tint: "idle" },
  "fp8/scale_spread_ratio": { label: "scale spread", about: "largest block scale over the smallest", log: true, tint: "busy" },
  "fp8/saturated_ratio": { label: "saturation", about: "share of values at the largest FP8 number", percent: true, tint: "busy" },
  "fp8/underflow_ratio": { label: "underflow", about: "share of non-zero values that became zero", percent: true, tint: "busy" },
  "fp8/snr_db": { label: "SNR", about: "signal to quantisation noise, dB; low is bad", unit: " dB", tint: "busy", reversed: true },
};
// Numbers of so many characters in each cell of a picture, where they have room.
function fitsText(figure, rows, cells, characters) {
  const plot = figure.plots[0].plot;
  return (plot.clientWidth - 70) / cells >= 7 * characters + 6 && (plot.clientHeight - 74) / rows >= 15;
}

const hasTables = (run, prefix) => run.table_names.some(name => name.startsWith(prefix));
// The run whose tables of one kind ("moe/", "fp8/", "step/") are shown: the chosen one if it has any, else one with an alarm.
function inspected(prefix) {
  const able = data.runs.filter(run => hasTables(run, prefix));
  return able.find(run => run.key === state.inspect) || able.find(run => run.dead && run.dead.level === "alarm") || able[0];
}

const runOf = name => inspected(name.split("/")[0] + "/");

// The inspected run's table, fetched first where a server has it; null when there is none (yet).
function tableOf(name) {
  const run = runOf(name);
  if (!run || !run.table_names.includes(name)) return null;
  if (!run.tables) { fetchTables(run); return null; }
  return run.tables[name] ? unpackTable(run.tables[name]) : null;
}

const columnsOf = table => table.first.length;
// The column of the chosen moment: the newest unless a person chose an older one.
function columnAt(table) {
  if (state.moment === null) return columnsOf(table) - 1;
  let column = 0;
  while (column < columnsOf(table) - 1 && table.first[column + 1] <= state.moment) column++;
  return column;
}
const spanText = (table, column) => {
  const [first, last] = [table.first[column], table.last[column]].map(step => step.toLocaleString("en"));
  return first === last ? `step ${first}` : `steps ${first} to ${last} (${JOINED[table.reduction]})`;
};
const rowStart = (table, layer) => table.shape.slice(0, layer).reduce((sum, cells) => sum + cells, 0);
const cell = (table, column, index) => { const value = table.cells[column * table.size + index]; return Number.isNaN(value) ? null : value; };
// rows x columns of one layer over time, or of all layers at one column; missing cells are null.
const layerOverTime = (table, layer) => Array.from({ length: table.shape[layer] }, (_, i) => table.first.map((_, column) => cell(table, column, rowStart(table, layer) + i)));
const layersAt = (table, column) => table.shape.map((cells, layer) => Array.from({ length: cells }, (_, i) => cell(table, column, rowStart(table, layer) + i)));
// Of the expert figures, the layer of a dead expert until a person chooses another.
function chosenLayer(table, name) {
  const dead = name === "layer" && runOf("moe/expert_load")?.dead?.pairs?.[0];
  return Math.min(state[name] ?? (dead ? dead[0] : 0), table.shape.length - 1);
}
// Middle of each column on the chosen axis.
const columnTimes = (run, table) => along(run, state.axis, table.first.map((first, i) => (first + table.last[i]) / 2));

const empty = message => [[], layoutOf({ xaxis: { visible: false }, yaxis: { visible: false }, dragmode: false, annotations: [{ text: message, showarrow: false, font: { size: 13.5, color: css("soft") } }] })];
const nothing = run => run && !run.tables ? "Reading …" : "Not logged in this run: choose another one";
const loadScale = () => ({ zmin: 0, zmid: 1, zmax: 2, colorscale: [[0, css("idle")], [.5, css("even")], [1, css("busy")]] });
const panelLayout = (title, extra) => layoutOf({
  hovermode: "closest", margin: { l: 56, r: 14, t: 30, b: 44 },
  title: { text: title, font: { size: 12.5, color: css("soft") }, x: 0, xref: "paper", xanchor: "left", y: 1, yref: "container", yanchor: "top", pad: { t: 6 } }, ...extra,
});
// A panel with a row for each layer; the chosen one is framed.
const layersLayout = (layers, chosen, title, nameOf, xaxis) => panelLayout("All layers at this moment", {
  shapes: [{ type: "rect", xref: "paper", x0: 0, x1: 1, y0: chosen - .5, y1: chosen + .5, line: { color: css("ink"), width: 1.5 } }], xaxis,
  yaxis: axisLayout({ showgrid: false, range: [layers - .5, -.5], tickvals: tickRows(layers), ticktext: tickRows(layers).map(nameOf), title: axisTitle(title) }),
});
const markMoment = x => ({ type: "line", yref: "paper", y0: 0, y1: 1, x0: x, x1: x, line: { color: css("ink"), width: 1.5, dash: "dot" } });
const tickRows = count => Array.from({ length: count }, (_, i) => i).filter(i => i % Math.ceil(count / 16) === 0);
// A row of a moe table is a MoE layer; its number in the model is known to runs whose card says where these begin.
const moeLayerName = (run, row) => String(run.moe_layer_ids[row] ?? row);
const integerTicks = count => count <= 16 ? { tickvals: Array.from({ length: count }, (_, i) => i) } : { nticks: 12 };

function drawLoadNow(figure) {
  const table = tableOf("moe/expert_load");
  if (!table) return empty(nothing(runOf("moe/expert_load")));
  const run = runOf("moe/expert_load"), column = columnAt(table), z = layersAt(table, column), layers = table.shape.length, experts = Math.max(...table.shape);
  figure.hint(`load over the layer's mean: 1 is balanced, 0 no token · ${spanText(table, column)}`);
  const dead = z.flatMap((row, layer) => row.flatMap((value, expert) => value === 0 ? [[layer, expert]] : []));
  return [[
    { type: "heatmap", z, ...loadScale(), xgap: experts > 64 ? 0 : 1, ygap: layers > 32 ? 0 : 1, hoverongaps: false, showscale: false, customdata: z.map((row, layer) => row.map(() => moeLayerName(run, layer))), hovertemplate: "MoE layer %{customdata}, expert %{x}<br><b>%{z:.2f}</b> × mean<extra></extra>", texttemplate: fitsText(figure, layers, experts, 4) ? "%{z:.2f}" : "", textfont: { size: 12 } },
    { type: "scatter", mode: "markers", x: dead.map(pair => pair[1]), y: dead.map(pair => pair[0]), marker: { symbol: "x-thin", size: 10, line: { width: 2, color: css("bad") } }, hovertemplate: "no token<extra></extra>" },
  ], layersLayout(layers, chosenLayer(table, "layer"), "MoE layer", row => moeLayerName(run, row), axisLayout({ title: axisTitle("expert", 6), showgrid: false, ...integerTicks(experts), range: [-.5, experts - .5] }))];
}

function drawLoadTime() {
  const table = tableOf("moe/expert_load"), run = runOf("moe/expert_load");
  if (!table) return empty("");
  const layer = chosenLayer(table, "layer"), x = columnTimes(run, table), z = layerOverTime(table, layer);
  return [[{
    type: "heatmap", x, z, ...loadScale(), hoverongaps: false, text: z.map(row => row.map((_, column) => spanText(table, column))),
    hovertemplate: "expert %{y}, %{text}<br><b>%{z:.2f}</b> × mean<extra></extra>",
    colorbar: { thickness: 9, outlinewidth: 0, xpad: 6, tickfont: { size: 11.5, color: css("soft") }, tickvals: [0, .5, 1, 1.5, 2], ticktext: ["0", "0.5", "1", "1.5", "≥2"] },
  }], panelLayout(`MoE layer ${moeLayerName(run, layer)} over time`, {
    shapes: [markMoment(x[columnAt(table)])],
    yaxis: axisLayout({ showgrid: false, range: [table.shape[layer] - .5, -.5], ...integerTicks(table.shape[layer]), title: axisTitle("expert") }),
  })];
}

// Bias trajectories: the experts with the highest and the lowest bias at the end are named.
function drawBias(figure) {
  const table = tableOf("moe/expert_bias"), run = runOf("moe/expert_bias");
  if (!table) return empty(nothing(run));
  const layer = chosenLayer(table, "layer"), x = columnTimes(run, table), rows = layerOverTime(table, layer);
  const order = rows.map((row, expert) => [row[row.length - 1] ?? 0, expert]).sort((a, b) => a[0] - b[0]).map(pair => pair[1]);
  const low = new Set(order.slice(0, Math.min(3, order.length >> 1))), high = new Set(order.slice(-Math.min(3, order.length >> 1)));
  figure.hint(`routing bias of each expert of MoE layer ${moeLayerName(run, layer)}, orange above 0 and blue below; the highest and the lowest are named`);
  const last = expert => rows[expert][x.length - 1] ?? 0, largest = Math.max(...order.map(expert => Math.abs(last(expert))));
  const tint = expert => mixed(css("soft"), css(last(expert) > 0 ? "busy" : "idle"), largest ? Math.sqrt(Math.abs(last(expert)) / largest) : 0);
  return [
    rows.map((y, expert) => {
      const named = low.has(expert) || high.has(expert);
      return { type: "scatter", mode: "lines", x, y, name: `expert ${expert}`, opacity: named ? 1 : .35, line: { color: tint(expert), width: named ? 2 : 1 }, hovertemplate: `expert ${expert}: %{y:.4g}<extra></extra>` };
    }),
    layoutOf({ hovermode: "closest", margin: { l: 56, r: 66, t: 12, b: 44 }, yaxis: axisLayout({ zeroline: true, zerolinecolor: css("soft"), zerolinewidth: 1 }), annotations: spread([...low, ...high].map(expert => ({ expert, y: last(expert) })), rows).map(label => ({ xref: "paper", x: 1, xanchor: "left", y: label.y, text: ` expert ${label.expert}`, showarrow: false, font: { size: 11.5, color: tint(label.expert) } })) }),
  ];
}

// The largest logit of every head at the last logged step; the darkest cells are the largest.
function drawLogits(figure) {
  const table = tableOf("attention/head_max_logit"), run = runOf("attention/head_max_logit");
  if (!table) return empty(nothing(run));
  const column = columnsOf(table) - 1, z = layersAt(table, column), layers = z.length, heads = Math.max(...table.shape);
  figure.hint(`largest logit before softmax · ${spanText(table, column)}`);
  return [[{
    type: "heatmap", z, zmin: 0, colorscale: [[0, css("even")], [1, css("busy")]], xgap: heads > 64 ? 0 : 1, ygap: layers > 32 ? 0 : 1, customdata: z.map((row, layer) => row.map(() => layerName(run, layer))),
    hovertemplate: "layer %{customdata}, head %{x}<br><b>%{z:.4g}</b><extra></extra>", colorbar: { thickness: 9, outlinewidth: 0, xpad: 6, tickfont: { size: 11.5, color: css("soft") } },
  }], panelLayout("All layers and heads", {
    xaxis: axisLayout({ title: axisTitle("head", 6), showgrid: false, ...integerTicks(heads), range: [-.5, heads - .5] }),
    yaxis: axisLayout({ showgrid: false, range: [layers - .5, -.5], tickvals: tickRows(layers), ticktext: tickRows(layers).map(row => layerName(run, row)), title: axisTitle("layer") }),
  })];
}

// Between two colours such as #1b2430.
function mixed(from, to, share) {
  const parts = text => text.match(/[0-9a-f]{2}/gi).map(part => parseInt(part, 16)), end = parts(to);
  return "#" + parts(from).map((part, i) => Math.round(part + share * (end[i] - part)).toString(16).padStart(2, "0")).join("");
}

// Labels moved apart so that none covers another.
function spread(labels, rows) {
  const all = rows.flat().filter(Number.isFinite), gap = .075 * (Math.max(...all) - Math.min(...all) || 1);
  labels.sort((a, b) => a.y - b.y);
  for (let i = 1; i < labels.length; i++) labels[i].y = Math.max(labels[i].y, labels[i - 1].y + gap);
  return labels;
}

const PHASES = { "step/data_ms": "data", "step/gradients_ms": "forward and backward", "step/update_ms": "update" };
// The slow ones of a stage stand out; in a stage of one rank, the slow moments.
function drawBusy(figure) {
  const table = tableOf("step/busy_ms");
  if (!table) return empty(nothing(runOf("step/busy_ms")));
  const phases = Object.entries(PHASES).map(([name, label]) => [label, tableOf(name)]).filter(([, one]) => one);
  const run = runOf("step/busy_ms"), z = [], text = [], medianOf = row => [...row].sort((a, b) => a - b)[(row.length - 1) >> 1] || 1;
  table.shape.forEach((ranks, stage) => {
    const rows = layerOverTime(table, stage), parts = phases.map(([label, one]) => [label, layerOverTime(one, stage)]);
    for (let i = 0; i < ranks; i++) {
      z.push(rows[i].map((ms, column) => ms / medianOf(ranks > 1 ? rows.map(row => row[column]) : rows[i])));
      text.push(rows[i].map((ms, column) => `pipeline rank ${stage}, data rank ${i}, ${spanText(table, column)}<br><b>${shownValue({}, ms)} ms</b>${parts.map(([label, one]) => `<br>${label} ${shownValue({}, one[i]?.[column] ?? null)} ms`).join("")}`));
    }
  });
  figure.hint("work over the median of the pipeline stage, over the rank's own where a stage is one rank: 1 is usual");
  return [[{
    type: "heatmap", x: columnTimes(run, table), z, text, ...loadScale(), hoverongaps: false, showscale: false, hovertemplate: "rank %{y}, %{text}, %{z:.2f} × usual<extra></extra>",
  }], layoutOf({ hovermode: "closest", margin: { l: 56, r: 14, t: 12, b: 44 }, yaxis: axisLayout({ showgrid: false, range: [z.length - .5, -.5], ...integerTicks(z.length), title: axisTitle("rank") }) })];
}

const layerName = (run, row) => run.layer_ids.length > row ? String(run.layer_ids[row]) : String(row);
const shownValue = (statistic, value) => value === null ? "" : statistic.percent ? (100 * value).toPrecision(2) + " %" : Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(1) : String(Number(value.toPrecision(3)));

function drawHealthNow(figure) {
  const run = runOf(state.statistic), table = tableOf(state.statistic), statistic = STATISTICS[state.statistic];
  if (!table) return empty(nothing(run));
  const column = columnAt(table), values = layersAt(table, column), height = value => value === null ? null : statistic.log ? value > 0 ? Math.log10(value) : null : value;
  const z = values.map(row => row.map(height)), ramp = [[0, css("even")], [1, css("tint-" + statistic.tint)]];
  const text = values.map(row => row.map(value => shownValue(statistic, value) + (statistic.unit || "")));
  figure.hint(`${statistic.about} · ${spanText(table, column)}`);
  return [[{
    type: "heatmap", z, x: data.fp8_operands, y: values.map((_, i) => i), text, colorscale: ramp, reversescale: !!statistic.reversed, xgap: 2, ygap: values.length > 32 ? 0 : 2,
    showscale: false, hovertemplate: "layer %{customdata}, %{x}<br><b>%{text}</b><extra></extra>", customdata: values.map((row, i) => row.map(() => layerName(run, i))), texttemplate: fitsText(figure, values.length, data.fp8_operands.length, Math.max(...text.flat().map(one => one.length))) ? "%{text}" : "", textfont: { size: 12, color: css("ink") },
  }], layersLayout(values.length, chosenLayer(table, "fp8Layer"), "layer", row => layerName(run, row), axisLayout({ showgrid: false }))];
}

function drawHealthTime() {
  const run = runOf(state.statistic), table = tableOf(state.statistic), statistic = STATISTICS[state.statistic];
  if (!table) return empty("");
  const layer = chosenLayer(table, "fp8Layer"), x = columnTimes(run, table), factor = statistic.percent ? 100 : 1;
  const unit = statistic.percent ? " %" : statistic.unit || "";
  return [
    layerOverTime(table, layer).map((row, operand) => {
      // One colour an operand; of its two GEMMs the earlier is wide and faint, so that both show where they agree.
      const name = data.fp8_operands[operand] || String(operand), kind = name.split(" ")[0];
      const kinds = [...new Set(data.fp8_operands.map(one => one.split(" ")[0]))], again = data.fp8_operands.findIndex(one => one.split(" ")[0] === kind) !== operand;
      return {
        type: "scatter", mode: "lines", x, y: row.map(value => value === null ? null : factor * value), name, showlegend: true, opacity: again ? 1 : .45,
        line: { color: color(Math.max(0, kinds.indexOf(kind))), width: again ? 1.6 : 5, dash: again ? "dash" : "solid" }, hovertemplate: `%{y:.4g}${unit}`,
      };
    }),
    panelLayout(`Layer ${layerName(run, layer)} over time`, {
      hovermode: "x unified", shapes: [markMoment(x[columnAt(table)])], showlegend: true,
      legend: { orientation: "h", y: -.24, yanchor: "top", x: 0, font: { size: 12, color: css("soft") } }, yaxis: axisLayout({ type: statistic.log ? "log" : "linear", dtick: statistic.log ? "D2" : undefined, tickformat: statistic.log ? "~g" : undefined, ticksuffix: unit }),
    }),
  ];
}

// The newest column is no fixed moment: it moves on with the run.
const chooseMoment = (table, column) => { state.moment = column === columnsOf(table) - 1 ? null : table.first[column]; };

function momentSlider(table) {
  const slider = element("input"), text = element("output", "", spanText(table, columnAt(table)).replace(/ \(.*/, ""));
  Object.assign(slider, { type: "range", min: 0, max: columnsOf(table) - 1, value: columnAt(table) });
  slider.oninput = () => {
    chooseMoment(table, Number(slider.value));
    text.textContent = spanText(table, Number(slider.value)).replace(/ \(.*/, "");
    redraw(tableFigures());
  };
  return element("label", "slider", "Moment ", slider, text);
}

const tableFigures = () => figures.filter(figure => ["expert-load", "expert-bias", "fp8-health", "rank-busy", "head-logits"].includes(figure.id));

// Filled again whenever the inspected run, its tables or the choice change.
function fillTableControls() {
  for (const figure of tableFigures()) {
    // A control that is being used stays.
    if (figure.controls.contains(document.activeElement)) continue;
    const prefixOfRun = { "rank-busy": "step/", "head-logits": "attention/" }[figure.id];
    if (prefixOfRun) { fillRunControl(figure, prefixOfRun); continue; }
    const isFp8 = figure.id === "fp8-health", name = isFp8 ? state.statistic : figure.id === "expert-bias" ? "moe/expert_bias" : "moe/expert_load";
    const prefix = isFp8 ? "fp8/" : "moe/", able = data.runs.filter(run => hasTables(run, prefix)), parts = [];
    const again = () => { redraw(tableFigures()); document.activeElement.blur(); fillTableControls(); };
    if (able.length > 1) parts.push(select("Run", able.map(run => [run.key, run.name]), inspected(prefix).key, value => { state.inspect = Number(value); again(); }));
    const table = tableOf(name);
    if (isFp8) parts.push(select("Statistic", Object.entries(STATISTICS).map(([key, one]) => [key, one.label]), state.statistic, value => { state.statistic = value; again(); }));
    if (table) {
      const key = isFp8 ? "fp8Layer" : "layer", run = inspected(prefix);
      parts.push(select("Layer", table.shape.map((_, row) => [row, (isFp8 ? layerName : moeLayerName)(run, row)]), chosenLayer(table, key), value => { state[key] = Number(value); again(); }));
      if (figure.id !== "expert-bias" && columnsOf(table) > 1) parts.push(momentSlider(table));
      const rows = isFp8 ? table.shape.length : Math.max(table.shape.length, table.shape[chosenLayer(table, key)]);
      if (figure.id !== "expert-bias") figure.place.style.setProperty("--plot-height", Math.min(560, Math.max(280, 96 + 20 * rows)) + "px");
    }
    figure.controls.replaceChildren(...parts);
  }
}

function fillRunControl(figure, prefix) {
  const able = data.runs.filter(run => hasTables(run, prefix)), again = value => { state.inspect = Number(value); redraw(tableFigures()); document.activeElement.blur(); fillTableControls(); };
  figure.controls.replaceChildren(...(able.length > 1 ? [select("Run", able.map(run => [run.key, run.name]), inspected(prefix).key, again)] : []));
}

// Clicks: a row left chooses the layer, a column right the moment.
function linkClicks(figure, key, name) {
  const [now, time] = figure.plots.map(part => part.plot);
  if (figure.linked || !now.on || !time.on) return;
  figure.linked = true;
  now.on("plotly_click", event => { state[key] = Math.round(Number(event.points[0].y)); redraw(tableFigures()); fillTableControls(); });
  time.on("plotly_click", event => {
    const index = event.points[0].pointIndex;
    chooseMoment(tableOf(name()), index.length ? index[1] : index);
    redraw(tableFigures()); fillTableControls();
  });
}

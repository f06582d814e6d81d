"use strict";
// Tables over time: expert load and bias (layers x experts), FP8 statistics (layers x operands). One run is inspected
// at a time; left stands every layer at one moment, right one layer over time. A click left chooses the layer, a click
// right the moment. Columns stand for several steps where a run is long: `reduction` says how they were joined.

const JOINED = { mean: "mean", last: "last", max: "highest", min: "lowest" };
// Statistics of the FP8 figure: what they mean, and whether many or few are bad.
const STATISTICS = {
  "fp8/amax": { label: "amax", about: "largest magnitude", log: true, tint: "idle" },
  "fp8/scale_spread_ratio": { label: "scale spread", about: "largest block scale over the smallest", log: true, tint: "busy" },
  "fp8/saturated_ratio": { label: "saturation", about: "share of values at the largest FP8 number", percent: true, tint: "busy" },
  "fp8/underflow_ratio": { label: "underflow", about: "share of non-zero values that became zero", percent: true, tint: "busy" },
  "fp8/snr_db": { label: "SNR", about: "signal to quantisation noise, dB; low is bad", unit: " dB", tint: "busy", reversed: true },
};
// More cells in a row, or rows in a picture, leave no room for legible numbers.
const fitsText = (rows, cells) => rows <= 20 && cells <= 14;

const hasTables = (run, prefix) => run.table_names.some(name => name.startsWith(prefix));
// The run whose tables of one kind ("moe/", "fp8/") are shown: the chosen one if it has any, else one with an alarm.
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
const cell = (table, column, index) => table.cells[column * table.size + index];
// rows x columns of one layer over time, or of all layers at one column; missing cells are null.
const known = value => Number.isNaN(value) ? null : value;
const layerOverTime = (table, layer) => Array.from({ length: table.shape[layer] }, (_, i) => table.first.map((_, column) => known(cell(table, column, rowStart(table, layer) + i))));
const layersAt = (table, column) => table.shape.map((cells, layer) => Array.from({ length: cells }, (_, i) => known(cell(table, column, rowStart(table, layer) + i))));
// Of the expert figures, the layer of a dead expert until a person chooses another.
function chosenLayer(table, name) {
  const dead = name === "layer" && runOf("moe/expert_load")?.dead?.pairs?.[0];
  return Math.min(state[name] ?? (dead ? dead[0] : 0), table.shape.length - 1);
}
// Middle of each column on the chosen axis.
const columnTimes = (run, table) => along(run, state.axis, table.first.map((first, i) => (first + table.last[i]) / 2));

function empty(message) {
  return [[], layoutOf({ xaxis: { visible: false }, yaxis: { visible: false }, dragmode: false, annotations: [{ text: message, showarrow: false, font: { size: 13.5, color: css("soft") } }] })];
}

const nothing = run => run && !run.tables ? "Reading …" : "Not logged in this run: choose another one";
const panelTitle = text => ({ text, font: { size: 12.5, color: css("soft") }, x: 0, xref: "paper", xanchor: "left", y: 1, yref: "container", yanchor: "top", pad: { t: 6 } });
const colorbar = extra => ({ thickness: 9, outlinewidth: 0, xpad: 6, tickfont: { size: 11.5, color: css("soft") }, ...extra });
const LOAD_BAR = { tickvals: [0, .5, 1, 1.5, 2], ticktext: ["0", "0.5", "1", "1.5", "≥2"] };
const loadScale = () => ({ zmin: 0, zmid: 1, zmax: 2, colorscale: [[0, css("idle")], [.5, css("even")], [1, css("busy")]] });
const markLayer = layer => ({ type: "rect", xref: "paper", x0: 0, x1: 1, y0: layer - .5, y1: layer + .5, line: { color: css("ink"), width: 1.5 } });
const markMoment = x => ({ type: "line", yref: "paper", y0: 0, y1: 1, x0: x, x1: x, line: { color: css("ink"), width: 1.5, dash: "dot" } });
const tickRows = count => Array.from({ length: count }, (_, i) => i).filter(i => i % Math.ceil(count / 16) === 0);
// A row of a moe table is a MoE layer; its number in the model is known to runs whose card says where these begin.
const moeLayerName = (run, row) => String(run.moe_layer_ids[row] ?? row);
const integerTicks = count => count <= 16 ? { tickvals: Array.from({ length: count }, (_, i) => i) } : { nticks: 12 };

// --- expert load ---

function drawLoadNow(figure) {
  const table = tableOf("moe/expert_load");
  if (!table) return empty(nothing(runOf("moe/expert_load")));
  const run = runOf("moe/expert_load"), column = columnAt(table), z = layersAt(table, column), layers = table.shape.length, experts = Math.max(...table.shape);
  figure.hint(`load over the layer's mean: 1 is balanced, 0 no token · ${spanText(table, column)}`);
  const dead = z.flatMap((row, layer) => row.flatMap((value, expert) => value === 0 ? [[layer, expert]] : []));
  return [[
    { type: "heatmap", z, ...loadScale(), xgap: experts > 64 ? 0 : 1, ygap: layers > 32 ? 0 : 1, hoverongaps: false, showscale: false, customdata: z.map((row, layer) => row.map(() => moeLayerName(run, layer))), hovertemplate: "MoE layer %{customdata}, expert %{x}<br><b>%{z:.2f}</b> × mean<extra></extra>", texttemplate: fitsText(layers, experts) ? "%{z:.2f}" : "", textfont: { size: 12 } },
    { type: "scatter", mode: "markers", x: dead.map(pair => pair[1]), y: dead.map(pair => pair[0]), marker: { symbol: "x-thin", size: 10, line: { width: 2, color: css("bad") } }, hovertemplate: "no token<extra></extra>" },
  ], layoutOf({
    hovermode: "closest", dragmode: "zoom", margin: { l: 56, r: 14, t: 30, b: 44 }, title: panelTitle("All layers at this moment"), shapes: [markLayer(chosenLayer(table, "layer"))],
    xaxis: axisLayout({ title: { text: "expert", standoff: 6, font: { size: 12, color: css("soft") } }, showgrid: false, ...integerTicks(experts), range: [-.5, experts - .5] }),
    yaxis: axisLayout({ showgrid: false, range: [layers - .5, -.5], tickvals: tickRows(layers), ticktext: tickRows(layers).map(row => moeLayerName(run, row)), title: { text: "MoE layer", standoff: 8, font: { size: 12, color: css("soft") } } }),
  })];
}

function drawLoadTime() {
  const table = tableOf("moe/expert_load"), run = runOf("moe/expert_load");
  if (!table) return empty("");
  const layer = chosenLayer(table, "layer"), x = columnTimes(run, table);
  return [[{
    type: "heatmap", x, z: layerOverTime(table, layer), ...loadScale(), hoverongaps: false, text: layerOverTime(table, layer).map(row => row.map((_, column) => spanText(table, column))),
    hovertemplate: "expert %{y}, %{text}<br><b>%{z:.2f}</b> × mean<extra></extra>", colorbar: colorbar(LOAD_BAR),
  }], layoutOf({
    hovermode: "closest", margin: { l: 56, r: 14, t: 30, b: 44 }, title: panelTitle(`MoE layer ${moeLayerName(run, layer)} over time`), shapes: [markMoment(x[columnAt(table)])],
    yaxis: axisLayout({ showgrid: false, range: [table.shape[layer] - .5, -.5], ...integerTicks(table.shape[layer]), title: { text: "expert", standoff: 8, font: { size: 12, color: css("soft") } } }),
  })];
}

// --- bias trajectories: the experts with the highest and the lowest bias at the end are named ---

function drawBias(figure) {
  const table = tableOf("moe/expert_bias"), run = runOf("moe/expert_bias");
  if (!table) return empty(nothing(run));
  const layer = chosenLayer(table, "layer"), x = columnTimes(run, table), rows = layerOverTime(table, layer);
  const order = rows.map((row, expert) => [row[row.length - 1] ?? 0, expert]).sort((a, b) => a[0] - b[0]).map(pair => pair[1]);
  const low = new Set(order.slice(0, Math.min(3, order.length >> 1))), high = new Set(order.slice(-Math.min(3, order.length >> 1)));
  figure.hint(`routing bias of each expert of MoE layer ${moeLayerName(run, layer)}; the raised and the lowered most are named`);
  const tint = expert => high.has(expert) ? css("busy") : low.has(expert) ? css("idle") : css("soft");
  return [
    rows.map((y, expert) => {
      const named = low.has(expert) || high.has(expert);
      return { type: "scatter", mode: "lines", x, y, name: `expert ${expert}`, opacity: named ? 1 : .35, line: { color: tint(expert), width: named ? 2 : 1 }, hovertemplate: `expert ${expert}: %{y:.4g}<extra></extra>` };
    }),
    layoutOf({ hovermode: "closest", margin: { l: 56, r: 66, t: 12, b: 44 }, annotations: spread([...low, ...high].map(expert => ({ expert, y: rows[expert][x.length - 1] ?? 0 })), rows).map(label => ({ xref: "paper", x: 1, xanchor: "left", y: label.y, text: ` expert ${label.expert}`, showarrow: false, font: { size: 11.5, color: tint(label.expert) } })) }),
  ];
}

// Labels moved apart so that none covers another.
function spread(labels, rows) {
  const all = rows.flat().filter(Number.isFinite), gap = .075 * (Math.max(...all) - Math.min(...all) || 1);
  labels.sort((a, b) => a.y - b.y);
  for (let i = 1; i < labels.length; i++) labels[i].y = Math.max(labels[i].y, labels[i - 1].y + gap);
  return labels;
}

// --- FP8 health ---

const layerName = (run, row) => run.layer_ids.length > row ? String(run.layer_ids[row]) : String(row);
const shownValue = (statistic, value) => value === null ? "" : statistic.percent ? (100 * value).toPrecision(2) + " %" : Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(1) : String(Number(value.toPrecision(3)));

function drawHealthNow(figure) {
  const run = runOf(state.statistic), table = tableOf(state.statistic), statistic = STATISTICS[state.statistic];
  if (!table) return empty(nothing(run));
  const column = columnAt(table), values = layersAt(table, column), height = value => value === null ? null : statistic.log ? value > 0 ? Math.log10(value) : null : value;
  const z = values.map(row => row.map(height)), ramp = [[0, css("even")], [1, css("tint-" + statistic.tint)]];
  figure.hint(`${statistic.about} · ${spanText(table, column)}`);
  return [[{
    type: "heatmap", z, x: data.fp8_operands, y: values.map((_, i) => i), text: values.map(row => row.map(value => shownValue(statistic, value) + (statistic.unit || ""))), colorscale: ramp, reversescale: !!statistic.reversed, xgap: 2, ygap: values.length > 32 ? 0 : 2,
    showscale: false, hovertemplate: "layer %{customdata}, %{x}<br><b>%{text}</b><extra></extra>", customdata: values.map((row, i) => row.map(() => layerName(run, i))), texttemplate: fitsText(values.length, 6) ? "%{text}" : "", textfont: { size: 12, color: css("ink") },
  }], layoutOf({
    hovermode: "closest", margin: { l: 56, r: 14, t: 30, b: 44 }, title: panelTitle("All layers at this moment"), shapes: [markLayer(chosenLayer(table, "fp8Layer"))],
    xaxis: axisLayout({ showgrid: false }),
    yaxis: axisLayout({ showgrid: false, range: [values.length - .5, -.5], tickvals: tickRows(values.length), ticktext: tickRows(values.length).map(row => layerName(run, row)), title: { text: "layer", standoff: 8, font: { size: 12, color: css("soft") } } }),
  })];
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
    layoutOf({
      hovermode: "x unified", margin: { l: 56, r: 14, t: 30, b: 44 }, title: panelTitle(`Layer ${layerName(run, layer)} over time`), shapes: [markMoment(x[columnAt(table)])], showlegend: true,
      legend: { orientation: "h", y: -.24, yanchor: "top", x: 0, font: { size: 12, color: css("soft") } }, yaxis: axisLayout({ type: statistic.log ? "log" : "linear", dtick: statistic.log ? "D2" : undefined, tickformat: statistic.log ? "~g" : undefined, ticksuffix: unit }),
    }),
  ];
}

// --- controls: run, layer, statistic, moment ---

function select(label, options, value, choose) {
  const wrap = element("label", "select", label + " "), made = element("select");
  for (const [key, text] of options) made.append(new Option(text, key, false, String(key) === String(value)));
  made.onchange = () => choose(made.value);
  wrap.append(made);
  return wrap;
}

function momentSlider(table, figures) {
  const wrap = element("label", "slider", "Moment "), slider = element("input"), text = element("output", "", spanText(table, columnAt(table)).replace(/ \(.*/, ""));
  Object.assign(slider, { type: "range", min: 0, max: columnsOf(table) - 1, value: columnAt(table) });
  slider.oninput = () => {
    const column = Number(slider.value);
    state.moment = column === columnsOf(table) - 1 ? null : table.first[column];
    text.textContent = spanText(table, column).replace(/ \(.*/, "");
    redraw(figures);
  };
  wrap.append(slider, text);
  return wrap;
}

const tableFigures = () => figures.filter(figure => ["expert-load", "expert-bias", "fp8-health"].includes(figure.id));

// Filled again whenever the inspected run, its tables or the choice change.
function fillTableControls() {
  for (const figure of tableFigures()) {
    // A control that is being used stays.
    if (figure.controls.contains(document.activeElement)) continue;
    const isFp8 = figure.id === "fp8-health", name = isFp8 ? state.statistic : figure.id === "expert-bias" ? "moe/expert_bias" : "moe/expert_load";
    const prefix = isFp8 ? "fp8/" : "moe/", able = data.runs.filter(run => hasTables(run, prefix)), parts = [];
    const again = () => { redraw(tableFigures()); document.activeElement.blur(); fillTableControls(); };
    if (able.length > 1) parts.push(select("Run", able.map(run => [run.key, run.name]), inspected(prefix).key, value => { state.inspect = Number(value); again(); }));
    const table = tableOf(name);
    if (isFp8) parts.push(select("Statistic", Object.entries(STATISTICS).map(([key, one]) => [key, one.label]), state.statistic, value => { state.statistic = value; again(); }));
    if (table) {
      const key = isFp8 ? "fp8Layer" : "layer", run = inspected(prefix);
      parts.push(select("Layer", table.shape.map((_, row) => [row, (isFp8 ? layerName : moeLayerName)(run, row)]), chosenLayer(table, key), value => { state[key] = Number(value); again(); }));
      if (figure.id !== "expert-bias" && columnsOf(table) > 1) parts.push(momentSlider(table, tableFigures()));
      sizeRows(figure, isFp8 ? table.shape.length : Math.max(table.shape.length, table.shape[chosenLayer(table, key)]));
    }
    figure.controls.replaceChildren(...parts);
  }
}

function sizeRows(figure, rows) {
  if (figure.id !== "expert-bias") figure.place.style.setProperty("--plot-height", Math.min(560, Math.max(280, 96 + 20 * rows)) + "px");
}

// Clicks: a row left chooses the layer, a column right the moment.
function linkClicks(figure, key, name) {
  const [now, time] = figure.plots.map(part => part.plot);
  if (figure.linked || !now.on || !time.on) return;
  figure.linked = true;
  now.on("plotly_click", event => { state[key] = Math.round(Number(event.points[0].y)); redraw(tableFigures()); fillTableControls(); });
  time.on("plotly_click", event => {
    const table = tableOf(name());
    const column = event.points[0].pointIndex.length ? event.points[0].pointIndex[1] : event.points[0].pointIndex;
    state.moment = column === columnsOf(table) - 1 ? null : table.first[column];
    redraw(tableFigures()); fillTableControls();
  });
}

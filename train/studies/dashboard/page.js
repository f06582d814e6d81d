"use strict";
// The page: state, controls, notes, table, cards, and following a server. Every text of a run is set as text, never
// as HTML. The data is in the document (offline) or comes from /api (served); both have the same form.

const data = JSON.parse(document.getElementById("data").textContent);
const SPANS = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000];
const POLL_MS = 2000;
const state = {
  axis: "step", logX: false, logY: false, raw: true, span: data.smoothing_steps, range: null, zooms: 0, resets: 0, hidden: new Set(),
  reference: null, inspect: null, layer: null, fp8Layer: null, moment: null, statistic: "fp8/amax", live: data.live ? "connecting" : "",
};
const STATE_TEXT = { running: "running", finished: "finished", stopped: "stopped", silent: "silent", empty: "no steps yet" };
// More runs than this get no card each: the table has their numbers.
const MAX_CARDS = 6;
const MAX_DIFFERENCES = 60;
// Notes above the page; further ones are folded away.
const MAX_ALARMS = 5, MAX_NOTES = 2;

const tinted = (made, run) => { made.style.setProperty("--run", `var(--run-${run.key % NUM_COLORS})`); return made; };
const dot = run => tinted(element("i"), run);

function fillSubtitle() {
  const count = data.runs.length, tokens = data.runs.reduce((sum, run) => sum + run.status.tokens, 0);
  const parts = [count === 1 ? "1 run" : `${count} runs`, `${amount(tokens)} tokens`];
  if (!data.live) parts.push(`drawn ${new Date(1000 * data.drawn_unix_s).toLocaleString("sv").slice(0, 16)}`);
  by("subtitle").replaceChildren(parts.join(" · "));
  if (data.live) by("subtitle").append(element("span", "live " + state.live, { connecting: "connecting", live: "live", lost: "server gone: numbers stand still" }[state.live]));
  if (data.live && data.bytes && data.bytes_read < .999 * data.bytes) by("subtitle").append(element("span", "", ` reading ${Math.floor(100 * data.bytes_read / data.bytes)} % of ${amount(data.bytes)}B`));
}

function deadNote(run) {
  const dead = run.dead;
  if (dead.level === "past") return ["warn", `${run.name}: an expert was dead, the last time in step ${dead.last.toLocaleString("en")}; all get tokens again.`];
  const got = dead.count === 1 ? "1 expert got" : `${dead.count} experts got`;
  const pairs = dead.pairs.map(([layer, expert]) => `MoE layer ${moeLayerName(run, layer)} expert ${expert}`).join(", ") + (dead.count > dead.pairs.length && dead.pairs.length ? ", …" : "");
  if (dead.level === "idle") return ["warn", `${run.name}: ${got} no token in the last step${pairs && ` (${pairs})`}.${dead.steps ? ` After ${dead.steps} steps in a row this becomes an alarm.` : ""}`];
  return ["alarm", `Dead experts in ${run.name}: ${got} no token since step ${dead.since.toLocaleString("en")}, ${dead.streak.toLocaleString("en")} logged steps in a row${pairs && `: ${pairs}`}.`];
}

// Of a run that has ended, what it is like now asks for nothing: only what its numbers suffered is noted.
function notesOf(run) {
  const ended = run.status.state === "stopped" || run.status.state === "finished";
  const notes = run.dead && !ended ? [deadNote(run)] : [], count = kind => run.events[kind] ? run.events[kind].total : 0;
  if (count("replay_differs")) notes.push(["alarm", `${run.name}: ${count("replay_differs")} steps repeated after a resume did not give the logged numbers.`]);
  if (count("skip")) notes.push(["warn", `${run.name}: ${count("skip") === 1 ? "1 step was" : count("skip") + " steps were"} skipped: loss or gradient not finite (✕ on the curves).`]);
  if (count("spike")) notes.push(["warn", `${run.name}: ${count("spike") === 1 ? "1 step was" : count("spike") + " steps were"} skipped: the loss left its band (▲ on the curves).`]);
  if (count("straggler") && !ended) notes.push(["warn", `${run.name}: a slow rank was reported ${count("straggler") === 1 ? "once" : count("straggler") + " times"} (▽ on the curves; Work of each rank shows which).`]);
  if (data.live && run.status.state === "silent") notes.push(["warn", `${run.name}: no step for ${clock(run.status.age_s)}. Is it still running?`]);
  return notes;
}

function fillNotes() {
  const notes = [...(data.problems || []).map(text => ["warn", text]), ...data.runs.flatMap(notesOf)];
  const alarms = notes.filter(note => note[0] === "alarm"), others = notes.filter(note => note[0] !== "alarm");
  const line = ([level, text]) => element("p", "note " + level, element("b", "", level === "alarm" ? "Alarm" : "Note"), text);
  const shownFirst = [...alarms.slice(0, MAX_ALARMS), ...others.slice(0, MAX_NOTES)], rest = [...alarms.slice(MAX_ALARMS), ...others.slice(MAX_NOTES)];
  const more = element("details", "more", element("summary", "", `${rest.length} more`), ...rest.map(line));
  more.open = !!by("notes").querySelector("details")?.open;
  by("notes").replaceChildren(...shownFirst.map(line), ...(rest.length ? [more] : []));
}

function toggle(keys, hide) {
  for (const key of keys) if (hide === undefined ? !state.hidden.delete(key) : hide) state.hidden.add(key); else state.hidden.delete(key);
  fillChips();
  redraw();
}

function fillChips() {
  const wanted = by("filter").value.toLowerCase();
  by("chips").replaceChildren(...data.runs.filter(run => run.name.toLowerCase().includes(wanted)).map(run => {
    const chip = element("button", "chip", dot(run), run.name);
    chip.dataset.run = run.key;
    chip.title = "Click hides and shows, double-click shows this run alone";
    chip.setAttribute("aria-pressed", shown(run));
    chip.onclick = () => toggle([run.key]);
    chip.ondblclick = () => { toggle(data.runs.map(one => one.key), true); toggle([run.key], false); };
    return chip;
  }));
  for (const id of ["filter", "all", "none"]) by(id).hidden = data.runs.length < 8;
}

function progressCell(run) {
  const status = run.status, label = STATE_TEXT[status.state], fill = element("span");
  fill.style.width = `${100 * (status.progress ?? (status.state === "empty" ? 0 : 1))}%`;
  const bar = element("span", "meter " + status.state, tinted(fill, run));
  const cell = element("td", "progress", bar, element("span", "eta", status.eta_s !== null ? `ETA ${clock(status.eta_s)}` : label));
  cell.title = [label, status.progress !== null ? `${(100 * status.progress).toFixed(1)} % of the tokens` : "", status.reason || "", status.tokens_per_s ? `${amount(status.tokens_per_s)} tokens/s lately` : ""].filter(Boolean).join(" · ");
  return cell;
}

function fillTable() {
  if (!data.runs.length) return by("table").replaceChildren(element("p", "blank", data.live ? "No run here yet. Start one, and it appears: torchrun launch/pretrain.py experiment=tiny run.name=mine" : "No runs."));
  const labels = data.runs[0].row.map(pair => pair[0]), used = labels.filter((_, i) => data.runs.some(run => run.row[i][1] !== "–"));
  const scoresOf = data.runs.map(run => run.bits_per_byte).filter(score => score !== null), best = scoresOf.length > 1 ? Math.min(...scoresOf) : null;
  const head = element("tr", "", ...["Run", "Progress", ...used].map(label => element("th", "", label)));
  const lines = data.runs.map(run => {
    const name = element("th", "", dot(run), run.name);
    name.scope = "row";
    const cells = run.row.filter(pair => used.includes(pair[0])).map(([label, text]) => labelled(label, element("td", label === "Bits per byte" && run.bits_per_byte !== null && run.bits_per_byte === best ? "best" : "", text)));
    return element("tr", "", name, labelled("Progress", progressCell(run)), ...cells);
  });
  const baselines = Object.entries(Object.assign({}, ...data.runs.map(run => run.baselines)));
  lines.push(...baselines.map(([label, value]) => element("tr", "baseline", element("th", "", label), element("td"), ...used.map(column => labelled(column, element("td", "", column === "Bits per byte" ? value.toFixed(4) : ""))))));
  by("table").replaceChildren(element("table", "", element("thead", "", head), element("tbody", "", ...lines)));
}

const definitions = pairs => element("dl", "", ...pairs.flatMap(([label, text]) => [element("dt", "", label), element("dd", "", text)]));

function cardOf(run) {
  const head = element("header", "", dot(run), element("h3", "", run.name), run.precision ? element("span", "precision", run.precision) : "");
  const more = element("details", "", element("summary", "", "Whole run card and configuration"), definitions(Object.entries(run.fields)));
  return tinted(element("article", "card", head, definitions([...run.facts, ["Directory", run.directory]]), more), run);
}

// Fields in which runs differ, one column a run.
function differences() {
  const names = [...new Set(data.runs.flatMap(run => Object.keys(run.fields)))];
  const differing = names.filter(name => !/(^|\.)name$/.test(name) && new Set(data.runs.map(run => run.fields[name])).size > 1);
  const head = element("tr", "", element("th", "", "Field"), ...data.runs.map(run => element("th", "", dot(run), run.name)));
  const lines = differing.slice(0, MAX_DIFFERENCES).map(name => element("tr", "", element("th", "", name), ...data.runs.map(run => labelled(run.name, element("td", "", run.fields[name] ?? "–")))));
  const wrap = element("div", "table differences", differing.length ? element("table", "", head, ...lines) : element("p", "blank", "The runs have the same card and configuration, but for their names."));
  if (differing.length > MAX_DIFFERENCES) wrap.append(element("p", "blank", `${differing.length - MAX_DIFFERENCES} more fields differ.`));
  return wrap;
}

function fillCards() {
  const open = [...by("cards").querySelectorAll("details")].map(one => one.open);
  const parts = [element("h2", "", "Runs"), element("div", "cards", ...data.runs.slice(0, MAX_CARDS).map(cardOf))];
  if (data.runs.length > MAX_CARDS) parts.push(element("p", "soft", `Cards of the first ${MAX_CARDS} of ${data.runs.length} runs; the differences of all stand below.`));
  if (data.runs.length > 1) parts.push(element("h3", "", "Where the runs differ"), differences());
  by("cards").replaceChildren(...(data.runs.length ? parts : []));
  by("cards").querySelectorAll("details").forEach((one, i) => { one.open = !!open[i]; });
}

function fillFooter() {
  const drawn = data.runs.reduce((sum, run) => sum + Object.values(run.series).reduce((all, series) => all + (typeof series.mean === "string" ? Math.floor(series.mean.length * 3 / 16) : series.mean.length) * (series.width > 1 ? 2 : 1), 0), 0);
  const logged = data.runs.reduce((sum, run) => sum + run.records, 0), width = Math.max(1, ...data.runs.flatMap(run => Object.values(run.series).map(series => series.width)));
  const thin = width === 1 ? "every logged step is drawn" : `long runs are thinned to buckets of up to ${width.toLocaleString("en")} steps that keep each bucket's lowest and highest value at its own step; smoothing goes over bucket means`;
  by("footer").textContent = `${drawn.toLocaleString("en")} points for ${logged.toLocaleString("en")} steps: ${thin}. Of each kind of event the first and last ${data.kept_events} are marked. Drag over a curve to zoom all curves, double-click to go back. Rest the pointer on a title for what the numbers are.`;
}

const TABLE_FIGURES = {
  optimizer: [{ id: "head-logits", title: "Largest logit of each head", about: "attention/head_max_logit: before softmax, with optim.qk_clip", wide: true, shared: false, needs: ["attention/head_max_logit"], draws: [drawLogits] }],
  speed: [{ id: "rank-busy", title: "Work of each rank", about: "step/busy_ms: time of the step that a rank did not wait for others, over the median of its pipeline stage", wide: true, needs: ["step/busy_ms"], draws: [drawBusy] }],
  experts: [
    { id: "expert-load", title: "Expert load", about: "moe/expert_load: load over the layer's mean load", wide: true, shared: false, needs: ["moe/expert_load"], draws: [drawLoadNow, drawLoadTime] },
    { id: "expert-bias", title: "Routing bias", about: "moe/expert_bias: what is added to the score when experts are chosen", wide: true, needs: ["moe/expert_bias"], draws: [drawBias] },
  ],
  fp8: [{ id: "fp8-health", title: "FP8 operands", about: "amax, scale spread, saturation, underflow and SNR of x, w and dy in fprop, dgrad and wgrad, on sampled steps", wide: true, shared: false, needs: Object.keys(STATISTICS), draws: [drawHealthNow, drawHealthTime] }],
};

function wantedFigures(section) {
  const wanted = data.charts.filter(chart => chart.section === section && data.runs.some(run => run.series[chart.metric] && run.series[chart.metric].mean.length && run.records >= chart.least_values))
    .map(chart => ({ id: chart.metric.replaceAll("/", "-"), title: chart.title, hint: chart.hint, about: chart.about, wide: chart.wide, draws: [() => drawCurves(chart)] }));
  if (section === "loss") {
    if (gapsOf().length || noGapText()) wanted.splice(1, 0, { id: "gap", title: "Relative gap of the smoothed loss", about: "(loss − reference loss) / reference loss, both smoothed", wide: true, draws: [drawGap] });
    if (scores().length) wanted.push({ id: "bits-per-byte", title: "Held-out bits per byte", hint: "beside simpler models of the same text; shorter is better", shared: false, draws: [drawScores] });
  }
  for (const figure of TABLE_FIGURES[section] || []) if (figure.needs.some(name => data.runs.some(run => run.table_names.includes(name)))) wanted.push(figure);
  return wanted;
}

const BLANK = { fp8: "No FP8 statistics logged: runs with precision=fp8 log them every observe.fp8_health_every_steps steps (0: never).", experts: "No expert statistics logged: they come from models with MoE layers." };

// Sections get the figures they lack, in order; a figure that is there stays as it is.
function fillSections() {
  if (!data.runs.some(run => run.records)) { if (!figures.length) by("charts").replaceChildren(element("p", "blank", "No steps yet.")); return; }
  by("charts").querySelector(":scope > .blank")?.remove();
  for (const [key, title] of Object.entries(data.sections)) {
    const wanted = wantedFigures(key);
    if (!wanted.length && !BLANK[key]) continue;
    let section = by("section-" + key);
    if (!section) {
      section = element("section", "section", element("h2", "", title), element("div", "figures"));
      section.id = "section-" + key;
      by("charts").append(section);
    }
    const grid = section.querySelector(".figures");
    section.querySelector(".blank")?.remove();
    if (!wanted.length) grid.append(element("p", "blank", BLANK[key]));
    wanted.forEach((spec, i) => {
      const figure = figures.find(one => one.id === spec.id) || makeFigure({ ...spec, opened: spec.shared === false ? null : shareZoom });
      if (grid.children[i] !== figure.place) grid.insertBefore(figure.place, grid.children[i] || null);
      if (spec.id === "gap") fillReference(figure);
    });
  }
  by("sections").replaceChildren(...[...document.querySelectorAll("#charts > section"), ...(data.runs.length ? [by("cards")] : [])].map(section => { const link = element("a", "", section.querySelector("h2").textContent); link.href = "#" + section.id; return link; }));
}

function fillReference(figure) {
  const able = withLoss();
  if (able.length > 1 && !figure.controls.contains(document.activeElement)) figure.controls.replaceChildren(select("Reference", able.map(run => [run.key, run.name]), referenceRun().key, value => { state.reference = Number(value); document.activeElement.blur(); redraw([figure]); }));
}

function fillAll() {
  fillSubtitle(); fillNotes(); fillTable(); fillChips(); fillCards(); fillSections(); fillTableControls(); fillFooter(); redraw();
}

function fillControls() {
  document.querySelectorAll("#axis button").forEach(button => button.setAttribute("aria-pressed", button.dataset.axis === state.axis));
  for (const [id, on] of [["log-x", state.logX], ["log-y", state.logY], ["raw", state.raw]]) by(id).setAttribute("aria-pressed", on);
  by("smoothing").value = SPANS.indexOf(state.span);
  by("smoothing-text").textContent = state.span === 1 ? "off" : `${state.span.toLocaleString("en")} steps`;
  by("theme").textContent = root.dataset.theme === "dark" ? "Light" : "Dark";
}

function change(values) { Object.assign(state, values); fillControls(); redraw(); }

function listen() {
  document.querySelectorAll("#axis button").forEach(button => { button.onclick = () => change({ axis: button.dataset.axis, range: null }); });
  by("log-x").onclick = () => change({ logX: !state.logX, range: null });
  by("log-y").onclick = () => change({ logY: !state.logY });
  by("raw").onclick = () => change({ raw: !state.raw });
  by("smoothing").oninput = event => change({ span: SPANS[Number(event.target.value)] });
  by("theme").onclick = () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; fillControls(); redraw(); };
  by("menu").onclick = () => by("menu").setAttribute("aria-expanded", by("bar").classList.toggle("open"));
  // Whether numbers fit into the cells of a map depends on its width.
  addEventListener("resize", () => redraw(tableFigures()));
  by("reset").onclick = () => { state.range = null; state.zooms++; state.resets++; redraw(); };
  by("filter").oninput = fillChips;
  by("all").onclick = () => toggle(data.runs.map(run => run.key), false);
  by("none").onclick = () => toggle(data.runs.map(run => run.key), true);
  by("charts").addEventListener("pointerover", () => {
    for (const [id, key, name] of [["expert-load", "layer", () => "moe/expert_load"], ["fp8-health", "fp8Layer", () => state.statistic]]) {
      const figure = figures.find(one => one.id === id);
      if (figure) linkClicks(figure, key, name);
    }
  });
}

async function fetchTables(run) {
  if (run.fetching) return;
  run.fetching = true;
  const answer = await fetch(`/api/tables?run=${run.key}`).catch(() => null);
  run.fetching = false;
  if (!answer || !answer.ok) return;
  run.tables = await answer.json();
  fillTableControls();
  redraw(tableFigures());
}

function take(news) {
  if (news.server !== data.server) data.runs = [];
  for (const run of news.runs) {
    const tables = data.runs[run.key]?.tables;
    data.runs[run.key] = run;
    // Tables that are shown stay until the new ones are here.
    if (tables && ["moe/", "fp8/", "step/"].some(prefix => run === inspected(prefix))) { run.tables = tables; fetchTables(run); }
  }
  const states = news.states.map(status => status.state).join() !== data.runs.map(run => run.status.state).join();
  news.states.forEach((status, key) => { if (data.runs[key]) data.runs[key].status = status; });
  for (const name of ["server", "epoch", "charts", "bytes", "bytes_read", "problems"]) data[name] = news[name];
  if (news.runs.length || states || state.live !== "live") { state.live = "live"; fillAll(); } else fillTable();
}

async function follow() {
  const query = new URLSearchParams({ since: data.epoch || 0, server: data.server || "" });
  const news = await fetch(`/api/runs?${query}`).then(answer => answer.ok ? answer.json() : null).catch(() => null);
  // What this page does wrong with an answer is no lost server: it shows in the console, and the next answer is asked for.
  try {
    if (news) take(news); else { state.live = "lost"; fillSubtitle(); }
  } finally {
    setTimeout(follow, data.bytes_read < data.bytes ? POLL_MS / 2 : POLL_MS);
  }
}

root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
listen();
fillControls();
fillAll();
if (data.live) follow();

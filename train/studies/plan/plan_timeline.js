"use strict";
// One step on a canvas: one row a pipeline rank, a window of it large and the whole step small below. Only the boxes
// of the window are drawn, of those thinner than half a pixel only as many as show, whatever the size of the step. Times are microseconds.
// A box is [start, length, kind, stage, micro-batch] and, of an overlapped pair, kind, stage, micro-batch of the other.

const data = JSON.parse(document.getElementById("data").textContent);
const plan = data.plan;
const GUTTER = 34, AXIS = 24, GAP = 3, OVERVIEW_ROW = 4;
const timeline = { low: 0, high: 1, end: 1, drawn: 0, hover: null, due: false };

const rows = plan.timeline.ranks;
// Stages of a rank in order: the second one is drawn lighter.
const chunks = rows.map(boxes => [...new Set(boxes.flatMap(box => box.length > 5 ? [box[3], box[6]] : [box[3]]))].sort((a, b) => a - b));
const micros = us => us >= 1e6 ? `${(us / 1e6).toFixed(3)} s` : us >= 1e3 ? `${(us / 1e3).toFixed(2)} ms` : `${us} µs`;
const actionsOf = box => box.length > 5 ? [box.slice(2, 5), box.slice(5, 8)] : [box.slice(2, 5)];

// The first box of a rank that ends after `time`.
function firstAfter(boxes, time) {
  let low = 0, high = boxes.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (boxes[middle][0] + boxes[middle][1] > time) high = middle; else low = middle + 1;
  }
  return low;
}

function sized(canvas, height) {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  return [pen, width];
}

const palette = () => Object.fromEntries("FBIW".split("").flatMap(kind => [0, 1].map(light => [kind + light, css(kind.toLowerCase() + (light ? "-2" : ""))])));

// Boxes of one rank between two times, from x to x + width; returns how many were drawn.
function drawRow(pen, colors, rank, { low, high, x, width, y, height, each }) {
  const boxes = rows[rank], scale = width / (high - low);
  let drawn = 0, free = -1;
  for (let i = firstAfter(boxes, low); i < boxes.length && boxes[i][0] < high; i++) {
    const box = boxes[i], left = Math.max(0, (box[0] - low) * scale), right = Math.min(width, (box[0] + box[1] - low) * scale);
    if (right < free) continue;
    free = right + .5;
    const actions = actionsOf(box), part = height / actions.length, wide = Math.max(.5, right - left - (right - left > 4 ? 1 : 0));
    actions.forEach((action, half) => {
      const light = chunks[rank].indexOf(action[1]) % 2;
      pen.fillStyle = colors[action[0] + light];
      pen.fillRect(x + left, y + half * part, wide, part - (actions.length > 1 && !half && height > 12 ? .5 : 0));
      each?.(action, light, x + left, y + half * part, wide, part);
    });
    drawn++;
  }
  return drawn;
}

function drawAxis(pen, width, y) {
  const span = timeline.high - timeline.low, rough = span / (width / 90), power = Math.pow(10, Math.floor(Math.log10(rough)));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(one => one >= rough), digits = Math.max(0, Math.ceil(-Math.log10(step / 1e6) - 1e-9));
  pen.fillStyle = css("soft");
  pen.textAlign = "center";
  for (let at = Math.ceil(timeline.low / step) * step; at <= timeline.high; at += step) {
    const x = GUTTER + (at - timeline.low) * width / span;
    pen.fillRect(x, y, 1, 4);
    if (x > GUTTER + 12 && x < GUTTER + width - 16) pen.fillText(`${(at / 1e6).toFixed(digits)} s`, x, y + 14);
  }
}

function drawWindow() {
  timeline.due = false;
  const { canvas, hover, low, high } = timeline, rowHeight = canvas.clientWidth < 640 ? 20 : 27;
  const [pen, whole] = sized(canvas, rows.length * rowHeight + AXIS), width = whole - GUTTER, colors = palette(), ink = css("ink"), card = css("card");
  const text = [css("on-box"), css("on-box-2")];
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  pen.textBaseline = "middle";
  timeline.drawn = 0;
  rows.forEach((_, rank) => {
    const y = rank * rowHeight, height = rowHeight - GAP, outlines = [];
    pen.fillStyle = css("soft");
    pen.textAlign = "right";
    pen.fillText(String(rank), GUTTER - 8, y + height / 2);
    pen.fillStyle = css("even");
    pen.fillRect(GUTTER, y, width, height);
    pen.textAlign = "center";
    timeline.drawn += drawRow(pen, colors, rank, {
      low, high, x: GUTTER, width, y, height,
      each: (action, light, left, top, wide, tall) => {
        if (wide > 24 && tall > 9) { pen.fillStyle = text[light]; pen.fillText(String(action[2]), left + wide / 2, top + tall / 2 + .5); }
        if (hover && action[2] === hover.microBatch) outlines.push([left, top, wide, tall]);
      },
    });
    pen.lineWidth = 2;
    for (const [left, top, wide, tall] of outlines) {
      pen.strokeStyle = card; pen.strokeRect(left, top, wide, tall);
      pen.strokeStyle = ink; pen.strokeRect(left + .5, top + .5, Math.max(.5, wide - 1), tall - 1);
    }
  });
  pen.fillStyle = css("soft");
  pen.textAlign = "right";
  pen.fillText("rank", GUTTER - 8, rows.length * rowHeight + 13);
  drawAxis(pen, width, rows.length * rowHeight);
  Object.assign(timeline.frame.style, { left: `${100 * low / timeline.end}%`, width: `${100 * (high - low) / timeline.end}%` });
  timeline.hint.textContent = `${(low / 1e6).toFixed(2)} to ${(high / 1e6).toFixed(2)} of ${(timeline.end / 1e6).toFixed(2)} s`;
}

function drawOverview() {
  const row = Math.max(1, Math.min(OVERVIEW_ROW, 96 / rows.length)), [pen, width] = sized(timeline.small, row * rows.length), colors = palette();
  pen.fillStyle = css("even");
  pen.fillRect(0, 0, width, row * rows.length);
  rows.forEach((_, rank) => drawRow(pen, colors, rank, { low: 0, high: timeline.end, x: 0, width, y: rank * row, height: row }));
}

function drawTimeline() { drawOverview(); drawWindow(); }

// At most one drawing a frame, however fast the pointer moves.
function drawSoon() {
  if (timeline.due) return;
  timeline.due = true;
  requestAnimationFrame(drawWindow);
}

// A window inside the step; the shortest one shows a fifth of a millisecond.
function show(low, high) {
  const length = Math.min(timeline.end, Math.max(200, high - low));
  timeline.low = Math.max(0, Math.min(timeline.end - length, low));
  timeline.high = timeline.low + length;
  drawSoon();
}

const span = () => timeline.high - timeline.low;
function zoom(factor, at = (timeline.low + timeline.high) / 2) { show(at - (at - timeline.low) * factor, at + (timeline.high - at) * factor); }
const pan = part => show(timeline.low + part * span(), timeline.high + part * span());
// So long that the number of a micro-batch has room in a usual box.
function usual() {
  const lengths = rows.flatMap(boxes => boxes.map(box => box[1])).sort((a, b) => a - b);
  return (lengths[lengths.length >> 1] || timeline.end) * Math.max(200, timeline.canvas.clientWidth - GUTTER) / 34;
}

function under(event) {
  const { canvas } = timeline, place = canvas.getBoundingClientRect(), x = event.clientX - place.left - GUTTER, height = (place.height - AXIS) / rows.length;
  const time = timeline.low + x * span() / (place.width - GUTTER), rank = Math.floor((event.clientY - place.top) / height);
  if (x < 0 || !rows[rank]) return null;
  const next = firstAfter(rows[rank], time), box = rows[rank][next], before = rows[rank][next - 1];
  if (!box || box[0] > time) return { rank, time, box: null, idle: (box ? box[0] : timeline.end) - (before ? before[0] + before[1] : 0) };
  const actions = actionsOf(box), half = (event.clientY - place.top - rank * height) / (height - GAP) < .5 ? 0 : actions.length - 1;
  return { rank, time, box, microBatch: actions[half][2] };
}

function tell(event) {
  const found = under(event), { tip, canvas } = timeline, before = timeline.hover;
  timeline.hover = found?.box ? found : null;
  tip.hidden = !found;
  if (timeline.hover?.microBatch !== before?.microBatch) drawSoon();
  if (tip.hidden) return;
  const lines = !found.box ? [element("b", "", `Idle for ${micros(found.idle)}`)] : actionsOf(found.box).map(([kind, stage, microBatch]) => element("b", "", `${data.kinds[kind][0].toUpperCase()}${data.kinds[kind].slice(1)} · stage ${stage} · micro-batch ${microBatch}`));
  tip.replaceChildren(...lines, `pipeline rank ${found.rank}` + (found.box ? ` · starts ${micros(found.box[0])} · takes ${micros(found.box[1])}` : ""));
  const place = canvas.getBoundingClientRect(), x = event.clientX - place.left, y = event.clientY - place.top;
  tip.style.left = `${Math.max(0, Math.min(place.width - tip.offsetWidth, x - tip.offsetWidth / 2))}px`;
  tip.style.top = `${y > tip.offsetHeight + 24 ? y - tip.offsetHeight - 14 : y + 20}px`;
}

function listenWindow(canvas) {
  let from = null;
  canvas.onpointerdown = event => { from = { x: event.clientX, low: timeline.low, high: timeline.high }; canvas.setPointerCapture(event.pointerId); };
  canvas.onpointermove = event => {
    if (!from) return tell(event);
    const moved = (from.x - event.clientX) * (from.high - from.low) / (canvas.clientWidth - GUTTER);
    timeline.tip.hidden = true;
    show(from.low + moved, from.high + moved);
  };
  canvas.onpointerup = canvas.onpointercancel = event => { from = null; tell(event); };
  canvas.onpointerleave = () => { timeline.hover = null; timeline.tip.hidden = true; drawSoon(); };
  canvas.ondblclick = () => show(0, timeline.end);
  canvas.addEventListener("wheel", event => {
    if (event.ctrlKey || event.metaKey) zoom(Math.exp(event.deltaY / 300), under(event)?.time);
    else if (Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey) pan((event.deltaX || event.deltaY) / canvas.clientWidth);
    else return;
    event.preventDefault();
  }, { passive: false });
  const keys = { ArrowLeft: () => pan(-.2), ArrowRight: () => pan(.2), "+": () => zoom(.6), "-": () => zoom(1 / .6), Home: () => show(0, span()), End: () => show(timeline.end - span(), timeline.end), 0: () => show(0, timeline.end) };
  canvas.onkeydown = event => { if (keys[event.key]) { event.preventDefault(); keys[event.key](); } };
}

// A drag over the whole step chooses a window, a click moves it.
function listenOverview(strip) {
  let from = null;
  const at = event => { const place = strip.getBoundingClientRect(); return (event.clientX - place.left) / place.width * timeline.end; };
  strip.onpointerdown = event => { from = at(event); strip.setPointerCapture(event.pointerId); };
  strip.onpointermove = event => { if (from !== null && Math.abs(at(event) - from) > timeline.end / 200) show(Math.min(from, at(event)), Math.max(from, at(event))); };
  strip.onpointerup = event => {
    if (Math.abs(at(event) - from) <= timeline.end / 200) show(from - span() / 2, from + span() / 2);
    from = null;
  };
}

function makeTimeline() {
  const figure = makeFigure({ id: "timeline", title: "One step", about: "As simulated: a row a pipeline rank, time to the right; what is empty is idle", wide: true, draws: [] });
  const canvas = element("canvas"), small = element("canvas"), tip = element("div", "tip"), frame = element("div", "window"), hint = element("span", "soft");
  const strip = element("div", "overview", small, frame), lanes = element("div", "lanes", canvas, tip);
  Object.assign(timeline, { canvas, small, tip, frame, hint, end: Math.max(1, Math.round(1e6 * plan.timeline.step_s)) });
  tip.hidden = true;
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Timeline of ${rows.length} pipeline ranks over one step. Arrows move, plus and minus zoom, 0 shows the whole step.`);
  const legend = element("span", "legend", ...[...Object.entries(data.kinds), ["pair", "overlapped pair"]].map(([kind, label]) => element("span", "", element("span", "swatch " + kind), label)));
  const buttons = [["−", () => zoom(1 / .6), "Zoom out"], ["+", () => zoom(.6), "Zoom in"], ["Start", () => show(0, usual())], ["Middle", () => show((timeline.end - usual()) / 2, (timeline.end + usual()) / 2)], ["End", () => show(timeline.end - usual(), timeline.end)], ["Whole", () => show(0, timeline.end)]];
  figure.controls.append(hint, element("span", "choice", ...buttons.map(([label, act, title]) => { const button = element("button", "", label); button.onclick = act; button.title = title || ""; return button; })));
  figure.place.append(legend, lanes, strip, element("p", "soft", "Drag moves, Ctrl and the wheel zoom, double-click shows the whole step; a drag below chooses a window. Rest the pointer on a box: its micro-batch is framed on every rank."));
  listenWindow(canvas);
  listenOverview(strip);
  return figure.place;
}

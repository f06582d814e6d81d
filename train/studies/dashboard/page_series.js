"use strict";
// Arrays of the page: unpacking, x axes, smoothing, the relative gap. No drawing, no document.
// A series is buckets of equal width in steps (series.py): key (bucket number), mean, and with width above 1
// low and high with the steps at which they were reached. NaN is a hole.

const bytesOf = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const ARRAYS = { f4: Float32Array, f8: Float64Array, u4: Uint32Array, u2: Uint16Array };
const unpack = (text, kind) => new ARRAYS[kind](bytesOf(text).buffer);

function unpackSeries(packed) {
  if (packed.mean instanceof Float32Array) return packed;
  packed.key = unpack(packed.key, "u4");
  for (const name of ["mean", "low", "high"]) if (packed[name]) packed[name] = unpack(packed[name], "f4");
  for (const name of ["at_low", "at_high"]) if (packed[name]) packed[name] = unpack(packed[name], "u4");
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

// Where steps of a run stand on the chosen axis.
function along(run, axis, steps) {
  if (axis === "step") return steps;
  const packed = run.axes[axis === "tokens" ? "tokens_seen" : "time_unix_s"];
  if (!packed) return steps;
  if (typeof packed.step === "string") { packed.step = unpack(packed.step, "u4"); packed.value = unpack(packed.value, "f8"); }
  const values = interpolate(packed.step, packed.value, steps);
  return axis === "tokens" ? values : values.map(value => (value - packed.value[0]) / 3600);
}

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

"use strict";
// One page for a finished report and for a run that is going on: both are a list of runs that grow by chunks.
// Text only ever enters through textContent. A run's values are float32, (steps, layers, descriptors + eigenvalues).

const data = JSON.parse(document.getElementById("data").textContent);
const find = id => document.getElementById(id);
const MEAN = -1; // in place of a layer: the mean over all of them
const FLOOR = 1e-6; // of the largest eigenvalue: the rounding of a float32 Gram matrix, and the end of the scale
const RAMP = ["#2b1055", "#472f7d", "#2c728e", "#28ae80", "#addc30", "#fdf3a0"].map(
  hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16)));
const runs = [];
let run = null, layer = MEAN, measure = data.measures.indexOf("entropy"), current = -1;
let going = data.live ? " · generating …" : ""; // and then how it ended

// Runs

function begin(heading) {
  runs.push({ ...heading, steps: [], ranges: {} });
  find("run").append(new Option(`${runs.length}: ${(heading.prompt ?? "text").slice(0, 50)}`, runs.length - 1));
  find("run-choice").hidden = runs.length < 2;
  extend(heading);
  if (runs.length === 1 || data.live) show(runs.length - 1);
}

function extend(chunk) {
  const grown = runs.at(-1), bytes = Uint8Array.from(atob(chunk.values), c => c.charCodeAt(0));
  const values = new Float32Array(bytes.buffer), width = grown.layers.length * (data.measures.length + grown.window);
  chunk.tokens.forEach((text, i) => grown.steps.push({
    text, risk: chunk.risk ? chunk.risk[i] : null, values: values.subarray(i * width, (i + 1) * width) }));
  grown.ranges = {};
  if (grown === run) redraw();
}

const at = (step, l, column) => step.values[l * (data.measures.length + run.window) + column];
function descriptor(step, l, column) {
  if (l !== MEAN) return at(step, l, column);
  return run.layers.reduce((sum, _, each) => sum + at(step, each, column), 0) / run.layers.length;
}
const layerName = l => l === MEAN ? "mean of the layers" : run.layers[l];
const measureName = () => data.measures[measure] + (data.measures[measure] === "entropy" ? " (nats)" : "");
const gateOf = r => r.threshold === null ? -1 : r.steps.findIndex(step => step.risk > r.threshold);
const short = x => x === null || Number.isNaN(x) ? "–" : x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5)
  ? x.toExponential(2) : String(Number(x.toPrecision(4)));
const reveal = c => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

/** Lowest and highest of what is finite; [0, 1] where nothing is. */
function range(values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (Number.isFinite(v)) { low = Math.min(low, v); high = Math.max(high, v); }
  return low > high ? [0, 1] : low === high ? [low - 0.5, high + 0.5] : [low, high];
}

// The text

// What would steer the page instead of being read on it: controls, and marks that turn the direction of text around.
const CONTROL = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff])/u;

function write(node, text) {
  node.textContent = "";
  text.split(CONTROL).forEach((part, odd) => {
    if (odd % 2 === 0) return node.append(part.replaceAll("\n", "↵\n"));
    const box = document.createElement("span");
    box.className = "control";
    box.textContent = reveal(part);
    node.append(box);
  });
  if (!text) node.append("◌");
}

const readable = text => text.trim() ? text.split(CONTROL).map((part, odd) => odd % 2 ? reveal(part) : part).join("")
  : text.includes("\n") ? "line break" : text ? "space" : "no text of its own";

function drawText() {
  const answer = find("answer"), gate = gateOf(run);
  const values = run.steps.map(step => run.risk ? step.risk : descriptor(step, layer, measure));
  const [low, high] = run.risk ? [0, 1] : range(values);
  const known = v => v !== null && Number.isFinite(v);
  while (answer.children.length > run.steps.length) answer.lastChild.remove();
  const fresh = document.createDocumentFragment();
  run.steps.forEach((step, i) => {
    let token = answer.children[i];
    if (!token) {
      token = document.createElement("span");
      token.setAttribute("role", "option");
      token.setAttribute("aria-selected", "false");
      token.id = `t${i}`;
      write(token, step.text);
      fresh.append(token);
    }
    const value = values[i], over = run.threshold !== null && step.risk > run.threshold;
    token.style.setProperty("--level", known(value) ? ((value - low) / (high - low)).toFixed(3) : 0);
    token.classList.toggle("unknown", !known(value));
    token.classList.toggle("over", over && i !== gate);
    token.classList.toggle("gate", i === gate);
    token.classList.toggle("late", gate >= 0 && i > gate + 1);
    token.setAttribute("aria-label", `${readable(step.text)}, step ${i}, ${run.risk ? "risk" : measureName()} ${short(value)}` +
      (i === gate ? ", above the threshold: the gate fires here" : over ? ", above the threshold" : ""));
  });
  answer.append(fresh);
  drawLegend(low, high);
  drawVerdict(gate);
}

function drawLegend(low, high) {
  const what = run.risk ? "Risk" : `No detector, so no risk. ${measureName()}, ${layerName(layer)}`;
  const legend = find("legend");
  legend.textContent = `${what}: deeper tint and thicker rule for more. `;
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const sample = document.createElement("span");
    sample.className = "sample";
    sample.style.setProperty("--level", part);
    sample.textContent = short(low + part * (high - low));
    legend.append(sample);
  }
  if (run.threshold !== null) legend.append(`▲ above the threshold ${short(run.threshold)}`);
}

function drawVerdict(gate) {
  find("verdict").textContent = !run.risk ? "" : run.threshold === null
    ? "The detector has no threshold, so there is no gate."
    : gate < 0 ? `The gate (risk above ${short(run.threshold)}) ${going.endsWith("…") ? "has not fired so far" : "would not have fired"}.`
    : `The gate would have fired at step ${gate} (risk ${short(run.steps[gate].risk)}, threshold ${short(run.threshold)}): ` +
      "one more token had been chosen by then, and what follows it, in italics, would not have been written.";
}

// The token that is looked at

function select(index, follow) {
  if (index < 0 || index >= run.steps.length) return;
  const answer = find("answer"), before = answer.children[current], token = answer.children[index];
  before?.classList.remove("current");
  before?.setAttribute("aria-selected", "false");
  current = index;
  token.classList.add("current");
  token.setAttribute("aria-selected", "true");
  answer.setAttribute("aria-activedescendant", token.id);
  if (follow === "page") token.scrollIntoView({ block: "nearest" });
  if (follow === "box") { // whoever points at a picture wants the page to stay where it is
    const [inner, outer] = [token, answer].map(node => node.getBoundingClientRect());
    if (inner.top < outer.top || inner.bottom > outer.bottom) answer.scrollTop += inner.top - outer.top - outer.height / 2;
  }
  write(find("token"), run.steps[index].text);
  find("token").append(` · step ${index}` + (run.risk ? ` · risk ${short(run.steps[index].risk)}` : ""));
  drawDetails();
  drawCursors();
}

/** Of one descriptor over the run; kept until the run has grown. */
function rangeOf(column) {
  const key = `${layer} ${column}`;
  return run.ranges[key] ??= range(run.steps.map(step => descriptor(step, layer, column)));
}

function drawDetails() {
  const step = run.steps[current], body = find("details").tBodies[0];
  find("details").hidden = !step;
  body.textContent = "";
  if (!step) return;
  find("details").caption.textContent = layerName(layer);
  data.measures.forEach((name, column) => {
    const value = descriptor(step, layer, column), row = body.insertRow(), head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    row.insertCell().textContent = short(value);
    const place = row.insertCell(), [low, high] = rangeOf(column);
    place.className = "place";
    place.title = `from ${short(low)} to ${short(high)} in this answer`;
    const track = document.createElement("span");
    track.className = "track";
    if (Number.isFinite(value)) track.append(mark((value - low) / (high - low)));
    place.append(track);
  });
}

function mark(place) {
  const i = document.createElement("i");
  i.style.setProperty("--place", place);
  return i;
}

// Charts

function svg(parent, name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

const LEFT = 68, TOP = 8, BOTTOM = 34; // LEFT is the strips' too, so that a step is at one place in all pictures

/** Lines over steps. `lines` are {values, strong}; `say` is the chart in words. */
function chart(box, lines, [low, high], say, threshold) {
  box.textContent = "";
  const width = Math.max(260, box.clientWidth), height = 190, count = Math.max(1, run.steps.length);
  const x = i => LEFT + (width - LEFT) * (i + 0.5) / count;
  const y = v => height - BOTTOM - (height - BOTTOM - TOP) * (v - low) / (high - low);
  const root = svg(box, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": say });
  for (const part of [0, 0.5, 1]) {
    const value = low + part * (high - low);
    svg(root, "line", { class: "axis", x1: LEFT, x2: width, y1: y(value), y2: y(value) });
    svg(root, "text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(Number(value.toPrecision(3))));
  }
  const every = Math.ceil(count / (width < 500 ? 5 : 10));
  for (let i = 0; i < count; i += every) svg(root, "text", { x: x(i), y: height - BOTTOM + 16, "text-anchor": "middle" }, i);
  svg(root, "text", { x: (LEFT + width) / 2, y: height - 2, "text-anchor": "middle" }, "generated token (step)");
  for (const { values, strong } of lines) {
    let pen = "M", path = "";
    values.forEach((v, i) => {
      if (v === null || !Number.isFinite(v)) return void (pen = "M");
      path += `${pen}${x(i).toFixed(1)} ${y(v).toFixed(1)}`;
      pen = "L";
    });
    if (values.length === 1) path += "h2"; // a single point would not be seen
    svg(root, "path", { class: strong ? "line strong" : "line", d: path });
  }
  if (threshold !== null) {
    const gate = gateOf(run);
    svg(root, "line", { class: "threshold", x1: LEFT, x2: width, y1: y(threshold), y2: y(threshold) });
    svg(root, "text", { x: width, y: y(threshold) - 4, "text-anchor": "end" }, `threshold ${short(threshold)}`);
    if (gate >= 0) {
      svg(root, "line", { class: "fired", x1: x(gate), x2: x(gate), y1: TOP, y2: height - BOTTOM });
      const right = x(gate) > width / 2;
      svg(root, "text", { class: "loud", x: x(gate) + (right ? -5 : 5), y: TOP + 10, "text-anchor": right ? "end" : "start" }, "▲ gate");
    }
  }
  const cursor = svg(root, "line", { class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
  box.cursor = i => {
    cursor.setAttribute("visibility", i < 0 ? "hidden" : "visible");
    cursor.setAttribute("x1", x(i));
    cursor.setAttribute("x2", x(i));
  };
  box.onpointermove = box.onpointerdown = event => {
    const bounds = root.getBoundingClientRect(), px = (event.clientX - bounds.left) * width / bounds.width;
    select(Math.min(run.steps.length - 1, Math.max(0, Math.floor((px - LEFT) / (width - LEFT) * count))), "box");
  };
}

function drawCharts() {
  const risks = run.steps.map(step => step.risk), figure = find("risk-figure");
  figure.hidden = !run.risk;
  if (run.risk) {
    const top = range(risks)[1];
    figure.querySelector("figcaption").textContent = "Risk over time";
    chart(find("risk-chart"), [{ values: risks, strong: true }], [0, 1],
      `Risk over ${risks.length} steps, at most ${short(top)} behind step ${risks.indexOf(Math.max(...risks.map(r => r ?? -1)))}. ${find("verdict").textContent}`,
      run.threshold);
  }
  const each = run.layers.map((_, l) => ({ values: run.steps.map(step => descriptor(step, l, measure)), strong: l === layer }));
  if (layer === MEAN && run.layers.length > 1) each.push({ values: run.steps.map(step => descriptor(step, MEAN, measure)), strong: true });
  const bounds = range(each.flatMap(line => line.values)), box = find("measure-chart");
  each.sort((a, b) => a.strong - b.strong);
  if (run.layers.length === 1) each[0].strong = true;
  box.parentNode.querySelector("figcaption").textContent = `${measureName()} over time, layer by layer`;
  chart(box, each, bounds, `${measureName()} over time for ${run.layers.join(", ")}: from ${short(bounds[0])} to ${short(bounds[1])}`, null);
  find("layers-key").textContent = run.layers.length > 1 ? `Thick: ${layerName(layer)}. Thin: the others.` : "";
}

const colour = part => {
  const place = Math.min(1, Math.max(0, part)) * (RAMP.length - 1), low = Math.min(RAMP.length - 2, Math.floor(place));
  return RAMP[low].map((c, i) => c + (RAMP[low + 1][i] - c) * (place - low));
};

/** One strip per layer: a column per step, the largest eigenvalue on top, the colour its logarithm. */
function drawWaterfalls() {
  const holder = find("waterfalls"), F = data.measures.length, n = run.window;
  const all = [];
  run.steps.forEach(step => run.layers.forEach((_, l) => all.push(at(step, l, F))));
  const high = Math.max(range(all)[1], Number.MIN_VALUE), span = -Math.log(FLOOR);
  holder.textContent = "";
  holder.parentNode.querySelector("figcaption").textContent = "Eigenvalues over time, layer by layer (largest on top; of G / D, logarithmic colour)";
  const columns = Math.min(run.steps.length, 4096) || 1; // a browser's limit for pictures; beyond it, every k-th step
  run.layers.forEach((name, l) => {
    const strip = document.createElement("div"), label = document.createElement("span"), frame = document.createElement("div");
    strip.className = l === layer ? "strip chosen" : "strip";
    label.textContent = name;
    frame.setAttribute("role", "img");
    frame.setAttribute("aria-label", `eigenvalues of ${name} over ${run.steps.length} steps, ${n} at most in each`);
    frame.append(painted(columns, n, (column, row) => {
      const value = run.steps.length ? at(run.steps[Math.floor(column * run.steps.length / columns)], l, F + row) : 0;
      return value > 0 ? 1 + Math.log(value / high) / span : NaN;
    }));
    frame.onpointermove = event => {
      const bounds = frame.getBoundingClientRect();
      select(Math.floor((event.clientX - bounds.left) / bounds.width * run.steps.length), "box");
    };
    strip.onclick = () => { find("layer").value = l; layer = l; redraw(); };
    strip.append(label, frame);
    holder.append(strip);
  });
  const scale = find("scale");
  scale.textContent = "";
  scale.append(`≤ ${short(high * FLOOR)}`, painted(64, 1, column => column / 63), `${short(high)} · grey: none yet`);
}

function painted(width, height, part) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let row = 0; row < height; row++) for (let column = 0; column < width; column++) {
    const p = part(column, row);
    if (Number.isFinite(p)) image.data.set([...colour(p), 255], 4 * (row * width + column));
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function drawCursors() {
  for (const id of ["risk-chart", "measure-chart"]) find(id).cursor?.(current);
  document.querySelectorAll(".strip div").forEach(frame => {
    frame.querySelector("i")?.remove();
    if (current >= 0) frame.append(mark((current + 0.5) / run.steps.length));
  });
}

// All of it

function drawHeader() {
  const count = `${run.steps.length} token${run.steps.length === 1 ? "" : "s"} watched`;
  find("status").textContent = `${run.model}, ${count}${going}`;
  find("about").textContent = `Layers ${run.layers.join(", ")} · window ${run.window} · ${run.versions}. A step belongs to the token ` +
    "that was fed; the last token of an answer is chosen but never fed, and is not on this page. " +
    (run.risk ? "A risk is the detector's probability for answers like those that it was calibrated on, not that this token is false." : "");
}

let scheduled = false;
function redraw() { // once per frame, however fast tokens come
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    drawHeader();
    drawText();
    drawDetails();
    drawCharts();
    drawWaterfalls();
    drawCursors();
  });
}

function show(index) {
  run = runs[index];
  current = -1;
  find("run").value = index;
  find("token").textContent = "Choose a token to see its spectrum in numbers.";
  find("answer").textContent = "";
  document.body.classList.toggle("by-risk", run.risk !== null);
  find("prompt").parentNode.querySelector("h2").hidden = find("prompt").hidden = run.prompt === null;
  write(find("prompt"), run.prompt ?? "");
  const choice = find("layer");
  choice.textContent = "";
  if (run.layers.length > 1) choice.append(new Option("mean of the layers", MEAN));
  run.layers.forEach((name, l) => choice.append(new Option(name, l)));
  layer = Number(choice.value);
  redraw();
}

find("run").onchange = event => show(Number(event.target.value));
find("layer").onchange = event => { layer = Number(event.target.value); redraw(); };
find("measure").onchange = event => { measure = Number(event.target.value); redraw(); };
data.measures.forEach((name, i) => find("measure").append(new Option(name, i, false, i === measure)));
find("answer").addEventListener("keydown", event => {
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, PageDown: 50, PageUp: -50, Home: -Infinity, End: Infinity };
  if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(Math.min(run.steps.length - 1, Math.max(0, current + moves[event.key])), "page");
});
find("answer").addEventListener("focus", () => { if (current < 0) select(0); });
for (const kind of ["pointerover", "click"]) find("answer").addEventListener(kind, event => {
  const token = event.target.closest("#answer > span");
  if (token) select(Number(token.id.slice(1)));
});
let drawnWidth = 0;
new ResizeObserver(([entry]) => { // our own drawing changes the height
  if (run && entry.contentRect.width !== drawnWidth) redraw();
  drawnWidth = entry.contentRect.width;
}).observe(find("charts"));

function watchLive() {
  find("status").textContent = "Waiting for the model …";
  const source = new EventSource("events"), hear = (name, act) => source.addEventListener(name, e => act(JSON.parse(e.data)));
  const end = text => {
    source.close();
    going = text;
    if (run) redraw();
    else find("status").textContent = `Nothing was generated${text}`;
  };
  hear("run", begin);
  hear("steps", extend);
  hear("end", () => end(" · finished; the page may be kept"));
  source.onerror = () => { if (source.readyState === EventSource.CLOSED) end(" · the run has gone"); };
}

data.runs.forEach(begin);
if (data.live) watchLive();

"use strict";
// Draws what the page holds as JSON: charts, and the map of the experts. Lays tables out that are wider than the page.

const dark = matchMedia("(prefers-color-scheme: dark)");
let printing = false;

function said(value) {
  if (value === null || value === undefined) return "no figure";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

function bytes(value) {
  const power = Math.min(5, Math.max(0, Math.floor(Math.log10(Math.max(value, 1)) / 3)));
  return `${Number((value / 1000 ** power).toPrecision(3))} ${["B", "kB", "MB", "GB", "TB", "PB"][power]}`;
}

function element(name, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// Charts ------------------------------------------------------------------------------------------------------------

const DASHES = ["", "7 4", "2 3", "9 3 2 3", "1 5", "12 4"];
const SHAPES = [
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-4-4h8v8h-8z", "M0-5 5 0 0 5-5 0z", "M0-5 5 4-5 4z", "M-5-4h10l-5 9z", "M-5-1.5h10v3h-10z",
];

/** Every series has its own colour, shape, and dash or hatching. */
function drawSeries(svg, one, place, x, y, width, bars) {
  const colour = `var(--c${place % 6})`;
  const tell = (at, made) => element("title", {}, made, `${one.name}${at[2] === undefined ? "" : `, ${at[2]}`}`);
  if (one.kind === "bars") {
    for (const [at, value] of one.points) {
      const left = x(at) - width * 0.4 + (bars.indexOf(one) * width * 0.8) / bars.length;
      const box = { x: left, y: y(value), width: Math.max(0.5, (width * 0.8) / bars.length - 1), height: y(0) - y(value) };
      const made = element("rect", { ...box, fill: bars.indexOf(one) % 2 ? "none" : colour, stroke: colour }, svg);
      tell([0, 0, said(value)], made);
    }
    return;
  }
  if (one.kind === "band") {
    for (const [at, low, high] of one.points) {
      const path = `M${x(at) - 9} ${y(low)}h18M${x(at) - 9} ${y(high)}h18M${x(at)} ${y(low)}V${y(high)}`;
      tell([0, 0, `${said(low)} to ${said(high)}`], element("path", { d: path, stroke: colour, "stroke-width": 2, fill: "none" }, svg));
    }
    return;
  }
  if (one.kind === "line") {
    const joined = one.points.map(([at, value]) => `${x(at)},${y(value)}`).join(" ");
    element("polyline", { points: joined, fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": DASHES[place % 6] }, svg);
  }
  if (one.kind === "line" && one.points.length > 40) return;
  for (const [at, value, name] of one.points) {
    const shape = { d: SHAPES[place % 6], transform: `translate(${x(at)} ${y(value)})`, fill: colour };
    tell([0, 0, `${name ? `${name}: ` : ""}${said(value)}`], element("path", shape, svg));
  }
}

function swatch(one, place, bars) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const colour = `var(--c${place % 6})`;
  for (const [key, value] of Object.entries({ viewBox: "0 0 30 14", width: 30, height: 14, "aria-hidden": true })) svg.setAttribute(key, value);
  if (one.kind === "bars") element("rect", { x: 9, y: 1, width: 12, height: 12, stroke: colour, fill: bars.indexOf(one) % 2 ? "none" : colour }, svg);
  else if (one.kind === "band") element("path", { d: "M8 1h14M8 13h14M15 1v12", stroke: colour, "stroke-width": 2 }, svg);
  else {
    if (one.kind === "line") element("path", { d: "M0 7h30", stroke: colour, "stroke-width": 2, "stroke-dasharray": DASHES[place % 6] }, svg);
    element("path", { d: SHAPES[place % 6], transform: "translate(15 7)", fill: colour }, svg);
  }
  return svg;
}

/** The next of 1, 2, 4, 5, 8 times a power of ten. */
function roundedUp(value) {
  if (!(value > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * ([1, 2, 4, 5, 8].find((step) => value <= step * unit * (1 + 1e-9)) || 10);
}

function drawChart(figure) {
  const spec = JSON.parse(figure.dataset.chart);
  figure.querySelectorAll("svg, ul").forEach((old) => old.remove());
  const width = printing ? 640 : figure.clientWidth, height = printing ? 220 : 280, left = 56, right = 14, top = 12, bottom = 42;
  const seen = (point) => !spec.log || point[1] > 0; // nothing else has a logarithm
  const shown = spec.series.filter((one) => one.kind !== "mark").map((one) => ({ ...one, points: one.points.filter(seen) }));
  const all = shown.flatMap((one) => one.points);
  const values = all.flatMap((point) => [point[1], ...(typeof point[2] === "number" ? [point[2]] : [])]);
  const xs = spec.series.flatMap((one) => one.points.map((point) => point[0]));
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${spec.title}: ${shown.map((one) => one.name).join("; ")}` }, figure);
  const low = spec.log ? Math.floor(Math.log10(Math.min(...values))) : 0;
  const high = spec.log ? Math.floor(Math.log10(Math.max(...values))) + 1 : roundedUp(Math.max(...values));
  const y = (value) => top + ((height - top - bottom) * (high - (spec.log ? Math.log10(value) : value))) / (high - low);
  const slot = (width - left - right) / Math.max(1, spec.names.length);
  const first = spec.x === "bytes" ? 0 : Math.min(...xs), last = Math.max(...xs), spread = (last - first) * 0.04 || 1;
  const from = first === 0 ? 0 : first - spread, to = last + spread, step = roundedUp((to - from) / 6);
  const x = (value) => left + (spec.names.length ? slot * (value + 0.5) : ((width - left - right) * (value - from)) / (to - from));
  const steps = high - low <= 2 ? [1, 2, 5] : [1], decades = Array.from({ length: high - low + 1 }, (_, step) => low + step);
  const marks = spec.log ? decades.flatMap((power) => steps.map((step) => step * 10 ** power)).filter((mark) => mark <= 10 ** high * 1.01) : [0, 1, 2, 3, 4].map((step) => (high * step) / 4);
  for (const mark of marks) {
    element("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }, svg);
    element("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, svg, said(mark));
  }
  const every = Math.max(1, Math.ceil(spec.names.length / Math.floor((width - left) / 34)));
  const below = spec.names.length
    ? spec.names.map((name, number) => [number, name]).filter(([number]) => number % every === 0)
    : Array.from({ length: 7 }, (_, number) => (Math.ceil(from / step) + number) * step).filter((mark) => mark <= to).map((mark) => [mark, spec.x === "bytes" ? bytes(mark) : said(mark)]);
  for (const [at, name] of below) element("text", { x: x(at), y: height - bottom + 17, "text-anchor": "middle" }, svg, name);
  element("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, svg, [spec.y && `${spec.y}, by`, spec.x].filter(Boolean).join(" "));
  for (const one of spec.series.filter((one) => one.kind === "mark")) {
    for (const [at, , name] of one.points) {
      element("line", { class: "grid", x1: x(at), x2: x(at), y1: top, y2: height - bottom }, svg);
      element("text", { x: x(at) - 4, y: top + 10, "text-anchor": "end" }, svg, name);
    }
  }
  const bars = shown.filter((one) => one.kind === "bars");
  shown.forEach((one, place) => drawSeries(svg, one, place, x, y, slot, bars));
  const labels = []; // where each begins and ends, and how far down it stands: a letter is 7 wide, a line 13 high
  const named = spec.x === "bytes" ? shown.filter((one) => one.kind !== "band") : [];
  for (const [at, value, name] of named.flatMap((one) => one.points)) {
    const long = 7 * name.length, start = Math.min(x(at) + 8, width - long);
    let label = y(value) - 6;
    for (const [first, last, other] of labels.sort((one, two) => two[2] - one[2]))
      if (first < start + long && start < last && Math.abs(other - label) < 13) label = other - 13;
    labels.push([start, start + long, label]);
    element("text", { x: start, y: label }, svg, name);
  }
  const legend = document.createElement("ul");
  legend.className = "legend";
  shown.forEach((one, place) => {
    const item = document.createElement("li");
    item.append(swatch(one, place, bars), ` ${one.name}`);
    legend.append(item);
  });
  figure.append(legend);
}

// The map of the experts --------------------------------------------------------------------------------------------

const SMALLEST = 6, LARGEST = 30;

function mapOf(figure) {
  const map = JSON.parse(figure.querySelector("script").textContent);
  const canvas = figure.querySelector("canvas"), told = figure.querySelector(".told");
  const most = Math.max(...map.states.map((state) => state.length));
  const peaks = map.measures.map((one) => one.values.map((of) => of.reduce((high, value) => Math.max(high, value ?? 0), 0)));
  let cell = 0, across = 0, lines = 0, left = 0, at = null, shown = -1;

  const light = (share) => {
    const [cold, hot] = dark.matches && !printing ? [[32, 40, 50], [150, 200, 255]] : [[233, 239, 247], [20, 66, 140]];
    return `rgb(${cold.map((value, channel) => Math.round(value + (hot[channel] - value) * share)).join()})`;
  };
  const corner = (layer, expert) => [left + (expert % across) * cell, 16 + layer * (lines * cell + 3) + Math.floor(expert / across) * cell];

  function square(pen, layer, expert) {
    const state = map.states[layer][expert], stays = state === "k" || state === "s";
    const value = shown < 0 ? null : map.measures[shown].values[layer][expert] ?? null;
    const share = value === null ? (stays ? 0.75 : 0) : Math.max(0, value) / (peaks[shown][layer] || 1);
    const [x, y] = corner(layer, expert), size = cell - 1, edge = Math.max(1, size * 0.18);
    const night = dark.matches && !printing;
    const ink = share > (night ? 0.495 : 0.695) === night ? "#000" : "#fff"; // where both are as far from the shade, 4.5
    pen.fillStyle = light(share);
    pen.fillRect(x, y, size, size);
    pen.strokeStyle = pen.fillStyle = ink;
    pen.lineWidth = Math.max(1, size / 12);
    pen.beginPath();
    if (state === "d") {
      pen.moveTo(x + edge, y + edge); pen.lineTo(x + size - edge, y + size - edge);
      pen.moveTo(x + size - edge, y + edge); pen.lineTo(x + edge, y + size - edge);
    } else if (state === "m") {
      pen.moveTo(x + edge, y + size / 2); pen.lineTo(x + size - edge, y + size / 2);
      pen.moveTo(x + size / 2, y + edge); pen.lineTo(x + size / 2, y + size - edge);
    } else if (state === "n") {
      pen.moveTo(x + edge, y + size / 2); pen.lineTo(x + size - edge, y + size / 2);
    } else if (state === "s") {
      pen.moveTo(x + edge, y + size - edge); pen.lineTo(x + size - edge, y + edge);
    } else if (state === "c") {
      pen.arc(x + size / 2, y + size / 2, Math.max(1.2, size / 5), 0, 7); pen.fill();
    }
    pen.stroke();
  }

  function draw() {
    const room = printing ? 640 : figure.clientWidth;
    left = 14 + 7 * Math.max(...map.layers.map((name) => Math.min(24, name.length)));
    const fit = Math.floor((room - left) / (printing ? 4.5 : SMALLEST));
    across = most <= fit ? most : Math.min(fit, Math.ceil(most / Math.ceil(most / fit) / 8) * 8);
    lines = Math.ceil(most / across);
    cell = Math.min(LARGEST, Math.floor(((room - left) / across) * (printing ? 2 : 1)) / (printing ? 2 : 1));
    const height = 16 + map.states.length * (lines * cell + 3) + 2, width = left + across * cell + 2, scale = printing ? 3 : devicePixelRatio || 1;
    Object.assign(canvas, { width: width * scale, height: height * scale });
    canvas.style.width = `${printing ? Math.min(1, 900 / height) * width : width}px`;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = "12px system-ui, sans-serif";
    pen.textAlign = "right";
    const muted = dark.matches && !printing ? "#a7b0b9" : "#565d66";
    pen.fillStyle = muted;
    for (let one = 0; one < across; one += 2 ** Math.ceil(Math.log2(34 / cell) - 0.2)) pen.fillText(one, corner(0, one)[0] + Math.min(cell, 14), 11);
    map.states.forEach((state, layer) => {
      pen.fillStyle = muted;
      const named = lines * cell >= 12 || layer % Math.ceil(12 / (lines * cell)) === 0;
      if (named) pen.fillText(map.layers[layer].slice(-24), left - 7, corner(layer, 0)[1] + Math.min(lines * cell, 24) / 2 + 4);
      for (let expert = 0; expert < state.length; expert += 1) square(pen, layer, expert);
    });
    if (at && !printing) {
      const [x, y] = corner(...at);
      pen.lineWidth = 2;
      pen.strokeStyle = dark.matches ? "#f0a070" : "#b1501c";
      pen.strokeRect(x - 1, y - 1, cell + 1, cell + 1);
    }
  }

  function sentence(layer, expert) {
    const figures = map.measures.map((one) => `${one.name} ${said(one.values[layer][expert])}`);
    return `layer ${map.layers[layer]}, expert ${expert}: ${[map.words[map.states[layer][expert]], ...figures].join("; ")}`;
  }

  function show(place) {
    at = place;
    told.textContent = sentence(...place);
    draw();
  }

  function under(event) {
    const box = canvas.getBoundingClientRect(), y = event.clientY - box.top - 16, row = lines * cell + 3;
    const layer = Math.floor(y / row), column = Math.floor((event.clientX - box.left - left) / cell);
    const expert = Math.floor((y - layer * row) / cell) * across + column;
    return column >= 0 && column < across && map.states[layer]?.[expert] ? [layer, expert] : null;
  }

  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  figure.append(tip);
  canvas.addEventListener("pointermove", (event) => {
    const place = under(event), box = figure.getBoundingClientRect();
    tip.hidden = place === null;
    if (place === null) return;
    tip.textContent = sentence(...place);
    tip.style.left = `${Math.max(0, Math.min(event.clientX - box.left + 12, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${event.clientY - box.top + 16}px`;
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("pointerdown", (event) => { const place = under(event); if (place) show(place); });
  canvas.addEventListener("focus", () => { if (!at) show([0, 0]); });
  canvas.addEventListener("keydown", (event) => {
    const [layer, expert] = at || [0, 0];
    const to = {
      ArrowLeft: [layer, expert - 1], ArrowRight: [layer, expert + 1], ArrowUp: [layer - 1, expert], ArrowDown: [layer + 1, expert],
      Home: [layer, 0], End: [layer, map.states[layer].length - 1],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    if (map.states[to[0]]?.[to[1]]) show(to);
  });
  const choice = () => Number(figure.querySelector("input:checked")?.value ?? -1);
  figure.addEventListener("change", () => { shown = choice(); draw(); });
  shown = choice();
  return draw;
}

// Tables that are wider than the page: one row below the other -------------------------------------------------------

function layTable(box) {
  box.classList.remove("rows");
  if (box.scrollWidth > box.clientWidth + 1) box.classList.add("rows");
}

const tables = [...document.querySelectorAll(".scroll")];
for (const box of tables) {
  const headings = [...box.querySelectorAll("th[scope=col]")].map((one) => one.textContent);
  for (const row of box.querySelectorAll("tr")) [...row.querySelectorAll("td")].forEach((one, number) => { one.dataset.heading = headings[number + 1]; });
}
const maps = [...document.querySelectorAll(".map")].map(mapOf);
const charts = [...document.querySelectorAll(".chart")];

function drawAll() {
  tables.forEach(layTable);
  charts.forEach(drawChart);
  maps.forEach((draw) => draw());
}

drawAll();
let waits = 0;
addEventListener("resize", () => { cancelAnimationFrame(waits); waits = requestAnimationFrame(drawAll); });
document.querySelectorAll("details").forEach((one) => one.addEventListener("toggle", () => one.querySelectorAll(".scroll").forEach(layTable)));
dark.addEventListener("change", drawAll);
addEventListener("beforeprint", () => { printing = true; drawAll(); });
addEventListener("afterprint", () => { printing = false; drawAll(); });

"use strict";
// The page: one state (job, layer, head), and functions that draw a section from it. No library, no network.

const DATA = JSON.parse(document.getElementById("data").textContent);
const state = { job: 0, layer: null, head: null };
const dark = matchMedia("(prefers-color-scheme: dark)");
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const RED_BLUE = { light: ["#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b"], dark: ["#5aa9f0", "#2b5f94", "#23272d", "#a04632", "#ff7b5a"] };
const SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#b07aff", "#7a9a01", "#c44"];

const byId = (id) => document.getElementById(id);
const job = () => DATA.jobs[state.job];
const finite = (values) => values.filter((value) => value !== null);
const median = (values) => { const s = finite(values).sort((x, y) => x - y), n = s.length; return n ? (s[(n - 1) >> 1] + s[n >> 1]) / 2 : null; };
const between = (low, high) => low === null || low === undefined || high === null || high === undefined ? "" : ` [${show(low)}, ${show(high)}]`;
const show = (value) => value === null || value === undefined ? "undefined" : Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
const sum = (one, name, kind) => one.maps.find((map) => map.analysis === "position_geometry" && map.name === name && map.kind === (kind ?? null));

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function choices(select, values, chosen) {
  select.replaceChildren(...values.map((value) => make("option", { value }, String(value))));
  if (values.map(String).includes(String(chosen))) select.value = chosen;
}

// Colours.

function mix(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
  const channel = (hex, place) => parseInt(hex.slice(1 + 2 * place, 3 + 2 * place), 16);
  const parts = [0, 1, 2].map((place) => Math.round(channel(stops[low], place) * (low + 1 - at) + channel(stops[low + 1], place) * (at - low)));
  return `rgb(${parts.join(",")})`;
}

function scaleOf(values) {
  const all = finite(values.flat());
  let low = Math.min(...all), high = Math.max(...all);
  if (!all.length) return { low: 0, high: 1, stops: VIRIDIS };
  const signed = low < 0 && high > 0;
  if (signed) { high = Math.max(-low, high); low = -high; }
  return { low, high, stops: signed ? RED_BLUE[dark.matches ? "dark" : "light"] : VIRIDIS };
}

const colour = (scale, value) => value === null ? getComputedStyle(document.body).getPropertyValue("--empty") : mix(scale.stops, scale.high > scale.low ? (value - scale.low) / (scale.high - scale.low) : 0.5);

// The tip beside the pointer.

function tip(event, text) {
  const box = byId("tip");
  if (text === null) { box.hidden = true; return; }
  box.textContent = text;
  box.hidden = false;
  const x = Math.min(event.clientX + 12, innerWidth - box.offsetWidth - 8), y = event.clientY + 18;
  box.style.left = `${Math.max(4, x)}px`;
  box.style.top = `${y + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 10 : y}px`;
}

function pointed(node, text, click) {
  for (const name of ["pointermove", "pointerdown"]) node.addEventListener(name, (event) => tip(event, text(event)));
  node.addEventListener("pointerleave", (event) => tip(event, null));
  if (click) node.addEventListener("click", click);
}

// A matrix as coloured cells; rows upwards.

// Of a map with so few rows or columns, each is labelled.
const ROWS = 10, COLUMNS = 12;

function heatMap(rows, columns, values, names, click, mark, sure = {}) {
  const scale = names.limit ? { low: -names.limit, high: names.limit, stops: RED_BLUE[dark.matches ? "dark" : "light"] } : scaleOf(values);
  const cell = { w: Math.max(4, Math.floor(720 / columns.length)), h: Math.max(6, Math.min(24, Math.floor(480 / rows.length))) };
  const canvas = make("canvas", { width: cell.w * columns.length, height: cell.h * rows.length, role: "img", "aria-label": `${names.value}: ${rows.length} ${names.row}s by ${columns.length} ${names.column}s` });
  // Room for a label beside each of few rows.
  if (rows.length <= ROWS) canvas.style.minHeight = `${15 * rows.length}px`;
  const pen = canvas.getContext("2d");
  values.forEach((line, row) => line.forEach((value, column) => {
    pen.fillStyle = colour(scale, value);
    pen.fillRect(column * cell.w, (rows.length - 1 - row) * cell.h, cell.w, cell.h);
  }));
  if (mark && rows.indexOf(mark.row) >= 0 && columns.indexOf(mark.column) >= 0) {
    pen.strokeStyle = getComputedStyle(document.body).getPropertyValue("--ink");
    pen.lineWidth = 3;
    pen.strokeRect(columns.indexOf(mark.column) * cell.w + 1.5, (rows.length - 1 - rows.indexOf(mark.row)) * cell.h + 1.5, cell.w - 3, cell.h - 3);
  }
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const limit = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    return { row: rows.length - 1 - limit((event.clientY - box.top) / box.height, rows.length), column: limit((event.clientX - box.left) / box.width, columns.length) };
  };
  const text = (event) => {
    const at = place(event), end = (side) => sure[side]?.[at.row]?.[at.column];
    return `${names.row} ${rows[at.row]}, ${names.column} ${columns[at.column]}: ${show(values[at.row][at.column])}${between(end("low"), end("high"))}${names.about ? `\n${names.about}` : ""}`;
  };
  pointed(canvas, text, click && ((event) => { const at = place(event); click(rows[at.row], columns[at.column]); }));
  const bar = make("span");
  bar.style.background = `linear-gradient(to right, ${scale.stops.join(",")})`;
  const few = (all, most) => all.length <= most;
  const words = (all, name, most) => few(all, most) ? all : [all[0], name, ...(all.length > 1 ? [all.at(-1)] : [])];
  const axis = (kind, all, name, most) => make("div", { class: few(all, most) ? `${kind} each` : kind }, ...(kind === "rows" ? words(all, name, most).toReversed() : words(all, name, most)).map((word) => make("span", {}, String(word))));
  const title = (kind, all, name, most) => few(all, most) ? [make("div", { class: `${kind}-name` }, name)] : [];
  const map = make("div", { class: "map" }, ...title("rows", rows, names.row, ROWS), axis("rows", rows, names.row, ROWS), canvas, axis("columns", columns, names.column, COLUMNS), ...title("columns", columns, names.column, COLUMNS));
  return [map, make("div", { class: "scale" }, show(scale.low), bar, show(scale.high))];
}

// Round numbers along an axis that runs from low to high; logarithms of them where `log`.

const short = (value) => String(Number(value.toPrecision(3)));

function ticks(low, high, log) {
  const step = (span) => { const ten = 10 ** Math.floor(Math.log10(span)); return [1, 2, 5, 10].map((n) => n * ten).find((size) => span / size <= 1); };
  if (log) {
    const powers = Array.from({ length: Math.ceil(high) - Math.floor(low) + 1 }, (_, n) => 10 ** (Math.floor(low) + n));
    return powers.flatMap((ten) => [1, 2, 5].map((n) => n * ten)).filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
  }
  const size = step((high - low) / 5), first = Math.ceil(low / size);
  return Array.from({ length: Math.floor(high / size) - first + 1 }, (_, n) => (first + n) * size);
}

// A chart of points and lines in data coordinates.

function chart({ x, y, xLabel, yLabel, log = false, whole = false }) {
  const W = 460, H = 320, L = 52, B = 40, T = 12, R = 14;
  const f = (value) => log ? Math.log10(value) : value;
  const widen = ([low, high]) => low === high ? [low - 0.5, high + 0.5] : [low - (high - low) * 0.04, high + (high - low) * 0.04];
  const [x0, x1] = widen(x.map(f)), [y0, y1] = widen(y.map(f));
  const px = (value) => L + (f(value) - x0) / (x1 - x0) * (W - L - R), py = (value) => H - B - (f(value) - y0) / (y1 - y0) * (H - B - T);
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${yLabel} against ${xLabel}` });
  // Runs are counted: there is none between two of them.
  for (const value of ticks(x0, x1, log).filter((value) => !whole || Number.isInteger(value))) svg.append(draw("line", { x1: px(value), x2: px(value), y1: T, y2: H - B, class: "axis" }), draw("text", { x: px(value), y: H - B + 14, "text-anchor": "middle" }, short(value)));
  for (const value of ticks(y0, y1, log)) svg.append(draw("line", { x1: L, x2: W - R, y1: py(value), y2: py(value), class: "axis" }), draw("text", { x: L - 5, y: py(value) + 4, "text-anchor": "end" }, short(value)));
  svg.append(draw("text", { x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, xLabel), draw("text", { x: 12, y: (T + H - B) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(T + H - B) / 2})` }, yLabel));
  const dot = (vx, vy, attributes, text, click) => {
    const node = draw("circle", { cx: px(vx), cy: py(vy), r: 4, ...attributes });
    if (text) pointed(node, () => text, click);
    svg.append(node);
  };
  const line = (points, attributes) => svg.append(draw("polyline", { points: points.map(([vx, vy]) => `${px(vx)},${py(vy)}`).join(" "), fill: "none", ...attributes }));
  return { svg, dot, line };
}

const range = (values) => [Math.min(...values), Math.max(...values)];
const none = (text) => make("p", { class: "none" }, text);

// Sections.

function drawFindings() {
  byId("finding-list").replaceChildren(...job().findings.flatMap((one) => [
    make("h3", {}, one.analysis.replaceAll("_", " ")),
    ...(one.source === null ? [] : [make("p", { class: "stale" }, one.source === job().name ? "The run has other rows by now: run this analysis again." : `Measured on another run, ${one.source}.`)]),
    make("ul", {}, ...one.sentences.map((sentence) => make("li", {}, sentence))),
    ...(one.basis ? [make("p", { class: "basis" }, one.basis)] : []),
    ...medians(one),
  ]));
}

const explained = (map) => make("td", { class: "explained" }, map.label, make("small", {}, map.about));

// The main numbers of an analysis, each with what it means and how sure its median is.

function medians(one) {
  const maps = one.main.map((key) => job().maps.find((map) => map.analysis === one.analysis && `${map.name}|${map.kind ?? ""}` === key)).filter(Boolean);
  if (!maps.length) return [];
  const lines = maps.map((map) => make("tr", {}, explained(map), make("td", {}, middle(map)), make("td", {}, String(finite(map.values.flat()).length))));
  return [make("div", { class: "wide" }, make("table", { class: "medians" }, make("tr", {}, ...["statistic", "median over heads", "heads"].map((name) => make("th", {}, name))), ...lines))];
}

function drawFacts() {
  const overrides = Object.entries(job().overrides).map(([key, value]) => `${key}=${value}`).join(", ");
  const lines = overrides ? [["job", `${job().name}: ${overrides}`], ...job().facts] : job().facts;
  byId("facts").replaceChildren(...lines.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function drawCoverage() {
  const { layers, buckets, kinds } = job().coverage;
  byId("coverage-map").replaceChildren(...heatMap(layers, buckets, kinds[byId("coverage-kind").value], { row: "layer", column: "bucket", value: "rows per head" }));
}

function drawSections() {
  const sections = job().sections;
  byId("coverage-sections").hidden = sections === null;
  if (sections === null) return;
  const lines = sections.lines.map((line) => make("tr", {}, ...line.map((value) => make("td", {}, typeof value === "number" ? value.toLocaleString("en") : value))));
  byId("section-table").replaceChildren(make("tr", {}, ...sections.titles.map((title) => make("th", {}, title))), ...lines);
}

function drawCompare() {
  const [analysis, label] = byId("compare-statistic").value.split("|");
  const rows = DATA.jobs.map((one) => {
    const map = one.maps.find((each) => each.analysis === analysis && each.label === label);
    return { one, map, values: map ? finite(map.values.flat()) : [] };
  });
  const keys = [...new Set(DATA.jobs.flatMap((one) => Object.keys(one.overrides)))];
  const largest = Math.max(...rows.map(({ map }) => Math.abs(map?.median ?? 0)), 1e-300);
  byId("compare-about").textContent = rows.find(({ map }) => map)?.map.about ?? "";
  const head = make("tr", {}, ...["job", ...keys, "median", "least", "most", "heads", ""].map((name) => make("th", {}, name)));
  byId("compare-table").replaceChildren(head, ...rows.map(({ one, map, values }) => {
    const bar = make("span", { class: "bar" });
    bar.style.width = `${Math.abs(map?.median ?? 0) / largest * 8}rem`;
    const cells = [one.name, ...keys.map((key) => one.overrides[key] ?? ""), middle(map), ...(values.length ? range(values).map(show) : ["", ""]), values.length, bar];
    return make("tr", {}, ...cells.map((content) => make("td", {}, typeof content === "number" ? String(content) : content)));
  }));
}

function drawPlane() {
  const points = job().plane[state.layer]?.[state.head];
  if (!points) return byId("plane").replaceChildren(none("run position_geometry to see it"));
  const all = Object.values(points).flat(), last = Math.max(1, ...all.map((point) => point[0]));
  const { svg, dot } = chart({ x: range(all.map((point) => point[1])), y: range(all.map((point) => point[2])), xLabel: "a: drift with position", yLabel: "b: queries against keys" });
  for (const [kind, some] of Object.entries(points)) {
    for (const [position, a, b] of some) dot(a, b, { r: 3.5, fill: `var(--${kind === "q" ? "query" : "key"})`, "fill-opacity": 0.2 + 0.8 * position / last }, `${kind} at position ${position}: ${show(a)}, ${show(b)}`);
  }
  byId("plane").replaceChildren(svg);
}

function drawProfile() {
  const heads = job().profile, curve = heads[state.layer]?.[state.head];
  if (!curve) return byId("profile").replaceChildren(none("run attention_plasticity to see it"));
  const all = Object.values(heads).flatMap((layer) => Object.values(layer));
  const { svg, dot, line } = chart({ x: range(all.flat().map((point) => point[0])), y: [0, 1], xLabel: "position of the query", yLabel: "plasticity" });
  for (const other of all.slice(0, 600)) line(other, { stroke: "var(--soft)", "stroke-opacity": 0.12 });
  // Of each bucket that most heads have: layers were sampled at other positions of it.
  const buckets = new Map();
  for (const point of all.flat()) if (point[1] !== null) buckets.set(point[2], [...(buckets.get(point[2]) ?? []), point]);
  const common = [...buckets].filter(([, points]) => points.length > all.length / 2).sort((one, other) => one[0] - other[0]).map(([, points]) => [0, 1].map((side) => median(points.map((point) => point[side]))));
  line(curve, { stroke: "var(--accent)", "stroke-width": 2.5 });
  // Above the head's own line, which is thicker: both show where they meet.
  line(common, { stroke: "var(--ink)", "stroke-dasharray": "5 4", "stroke-width": 1.5, class: "median" });
  for (const [t, value] of curve) dot(t, value, { fill: "var(--accent)" }, `position ${Math.round(t)}: ${show(value)}`);
  byId("profile").replaceChildren(svg);
}

function drawHeadValues() {
  const rows = job().maps.filter((map) => map.of_queries).map((map) => {
    const value = map.values[map.layers.indexOf(state.layer)]?.[map.heads.indexOf(state.head)];
    const end = (side) => map[side]?.[map.layers.indexOf(state.layer)]?.[map.heads.indexOf(state.head)];
    return make("tr", {}, explained(map), ...[show(value) + between(end("low"), end("high")), middle(map), map.analysis.replaceAll("_", " ")].map((content) => make("td", {}, content)));
  });
  byId("head-values").replaceChildren(make("tr", {}, ...["statistic", "this head", "median", "analysis"].map((name) => make("th", {}, name))), ...rows);
}

const middle = (map) => !map || map.median === null ? "" : show(map.median) + between(...(map.median_from ?? []));

const AXES = { "drift axis": ["r_q", "r_k"], "leading component": ["pc1_r_q", "pc1_r_k"] };

function drawScatter() {
  const [q, k] = AXES[byId("scatter-axis").value].map((name) => sum(job(), name));
  const { svg, dot } = chart({ x: [-1, 1], y: [-1, 1], xLabel: "r of queries", yLabel: "r of keys" });
  const last = Math.max(1, q.layers.length - 1);
  const chosen = [];
  q.layers.forEach((layer, row) => q.heads.forEach((head, column) => {
    const [x, y] = [q.values[row][column], k.values[row][column]];
    if (x === null || y === null) return;
    const add = (more) => dot(x, y, { class: "dot", fill: mix(VIRIDIS, row / last), ...more }, `layer ${layer}, head ${head}: r of q ${show(x)}, r of k ${show(y)}`, () => choose(layer, head));
    if (layer === state.layer && head === state.head) chosen.push(() => add({ class: "dot chosen", r: 7 })); else add({});
  }));
  chosen.forEach((add) => add());
  byId("scatter").replaceChildren(svg);
}

function drawSampling() {
  const curves = job().sampling.filter((curve) => curve.case === byId("sampling-case").value).map((curve) => ({ ...curve, points: curve.points.filter((point) => point[1] > 0) })).filter((curve) => curve.points.length);
  if (!curves.length) return byId("sampling-chart").replaceChildren(none("too few rows were kept to say anything"));
  const all = curves.flatMap((curve) => curve.points);
  const { svg, dot, line } = chart({ x: range(all.map((point) => point[0])), y: range(all.map((point) => point[1])), xLabel: "base_rate", yLabel: "relative error", log: true });
  const legend = make("div", { class: "scale" });
  legend.style.flexWrap = "wrap";
  curves.forEach(({ statistic, points }, place) => {
    const stroke = SERIES[place % SERIES.length];
    // Each line is thinner than those it may lie over, every second dashed with rings for dots: all show where they meet.
    const second = place % 2 === 1, width = 5 - 3.5 * place / Math.max(1, curves.length - 1);
    line(points, { stroke, "stroke-width": width, ...(second ? { "stroke-dasharray": "6 5" } : {}) });
    for (const [rate, error] of points) dot(rate, error, second ? { fill: "var(--card)", stroke, "stroke-width": 2, r: 3 } : { fill: stroke, r: 5 }, `${statistic} at base_rate ${rate}: ${show(error)}`);
    const name = make("b", {}, statistic);
    name.style.color = stroke;
    legend.append(name);
  });
  byId("sampling-chart").replaceChildren(svg, legend);
}

function drawMaps() {
  const analysis = byId("analysis").value;
  byId("map-grid").replaceChildren(...job().maps.filter((map) => map.analysis === analysis).map((map) => {
    const names = { row: "layer", column: map.of_queries ? "head" : "key head", value: map.label, about: map.about };
    const mark = map.of_queries ? { row: state.layer, column: state.head } : null;
    const about = make("small", {}, map.about), sure = map.median === null ? [] : [make("small", {}, `median ${middle(map)}, ${finite(map.values.flat()).length} heads`)];
    return make("figure", { "data-statistic": map.label }, make("figcaption", {}, map.label, about, ...sure), ...heatMap(map.layers, map.heads, map.values, names, map.of_queries && choose, mark, map));
  }));
}

// What `compare` left: averages of runs with intervals, and differences head by head.

const compared = () => DATA.comparison.statistics[Number(byId("compared-statistic").value)];

function drawCompared() {
  const one = compared();
  byId("compared-about").textContent = one.about;
  const known = one.runs.filter((run) => run.value !== null), ends = known.flatMap((run) => [run.value, run.low ?? run.value, run.high ?? run.value]);
  if (!known.length) byId("compared-chart").replaceChildren(none("defined in no run"));
  else {
    const { svg, dot, line } = chart({ x: [-0.5, one.runs.length - 0.5], y: range(ends), xLabel: "run, in the order of the table", yLabel: one.label, whole: true });
    one.runs.forEach((run, place) => {
      if (run.value === null) return;
      if (run.low !== null) line([[place, run.low], [place, run.high]], { stroke: "var(--accent)", "stroke-width": 2 });
      dot(place, run.value, { fill: "var(--accent)", r: 5 }, `${run.run}: ${show(run.value)}${between(run.low, run.high)}\n${one.about}`);
    });
    byId("compared-chart").replaceChildren(svg);
  }
  const lines = one.runs.map((run, place) => make("tr", {}, ...[`${place}: ${run.run}`, String(run.heads), show(run.value) + between(run.low, run.high), run.difference === null ? "" : show(run.difference) + between(run.difference_low, run.difference_high)].map((content) => make("td", {}, content))));
  byId("compared-table").replaceChildren(make("tr", {}, ...["run", "heads", "average", "minus the baseline"].map((name) => make("th", {}, name))), ...lines);
  // One scale, with nothing in the middle, for all maps.
  const limit = Math.max(0, ...finite(Object.values(one.maps).flatMap((map) => map.values.flat())).map(Math.abs)) || 1;
  byId("compared-maps").replaceChildren(...Object.entries(one.maps).map(([run, map]) => {
    const names = { row: "layer", column: ["k", "k_pre", "v"].includes(one.kind) ? "key head" : "head", value: `${one.label} of ${run} minus the baseline`, about: one.about, limit };
    return make("figure", { "data-run": run }, make("figcaption", {}, run, make("small", {}, `${one.label} minus the baseline's`)), ...heatMap(map.layers, map.heads, map.values, names, null, null, map));
  }));
}

function startCompared() {
  const there = DATA.comparison;
  byId("compared").hidden = !there;
  if (!there) return;
  byId("compared-list").replaceChildren(...(there.stale ? [make("li", { class: "stale" }, "A run has other rows by now: compare again.")] : []), ...there.sentences.map((sentence) => make("li", {}, sentence)));
  byId("compared-statistic").replaceChildren(...there.statistics.map((one, place) => make("option", { value: place }, `${one.analysis.replaceAll("_", " ")}: ${one.label}`)));
  byId("compared-pictures").hidden = !there.statistics.length;
  if (there.statistics.length) drawCompared();
}

function drawTables() {
  const rows = job().tables.map((table) => {
    const links = ["csv", "parquet"].filter((kind) => table[kind]).map((kind) => make("a", { href: table[kind], download: `${job().name}_${table.name}.${kind}` }, kind));
    return make("tr", {}, make("td", {}, table.name.replaceAll("_", " ")), make("td", {}, table.rows.toLocaleString("en")), make("td", {}, ...(links.length ? links : ["in the run's folder"])));
  });
  byId("table-list").replaceChildren(make("tr", {}, ...["table", "rows", ""].map((name) => make("th", {}, name))), ...rows);
}

// The state and what follows from it.

function choose(layer, head) {
  state.layer = layer;
  state.head = head;
  byId("layer").value = layer;
  byId("head-number").value = head;
  for (const section of [drawPlane, drawProfile, drawHeadValues, drawMaps]) section();
  if (!byId("scatter-section").hidden) drawScatter();
}

function drawJob() {
  const one = job(), first = one.maps.find((map) => map.of_queries);
  byId("head").hidden = !first;
  byId("maps").hidden = !one.maps.length;
  byId("scatter-section").hidden = !sum(one, "r_q");
  byId("sampling").hidden = !one.sampling.length;
  choices(byId("coverage-kind"), Object.keys(one.coverage.kinds), byId("coverage-kind").value);
  choices(byId("scatter-axis"), Object.keys(AXES), byId("scatter-axis").value);
  choices(byId("sampling-case"), [...new Set(one.sampling.map((curve) => curve.case))], byId("sampling-case").value);
  choices(byId("analysis"), [...new Set(one.maps.map((map) => map.analysis))], byId("analysis").value);
  drawFindings();
  drawFacts();
  drawCoverage();
  drawSections();
  drawTables();
  if (!byId("sampling").hidden) drawSampling();
  if (first) {
    const bias = sum(one, "bias_strength") ?? first;
    const cells = bias.layers.flatMap((layer, row) => bias.heads.map((head, column) => ({ layer, head, value: Math.abs(bias.values[row][column] ?? 0) })));
    const strongest = cells.reduce((best, cell) => cell.value > best.value ? cell : best);
    choices(byId("layer"), bias.layers, state.layer);
    choices(byId("head-number"), bias.heads, state.head);
    const known = bias.layers.includes(state.layer) && bias.heads.includes(state.head);
    choose(known ? state.layer : strongest.layer, known ? state.head : strongest.head);
  } else if (one.maps.length) drawMaps();
  const links = [...document.querySelectorAll("main > section")].filter((section) => !section.hidden);
  document.querySelector("nav").replaceChildren(...links.map((section) => make("a", { href: `#${section.id}` }, section.querySelector("h2").textContent)));
}

function start() {
  document.title = `${DATA.title}: QK-Sniffer report`;
  byId("title").textContent = DATA.title;
  const sweep = DATA.jobs.length > 1;
  byId("job-label").hidden = byId("compare").hidden = !sweep;
  byId("job").replaceChildren(...DATA.jobs.map((one, place) => make("option", { value: place }, [one.name, ...Object.entries(one.overrides).map(([key, value]) => `${key}=${value}`)].join(" "))));
  const statistics = [...new Set(DATA.jobs.flatMap((one) => one.maps.map((map) => `${map.analysis}|${map.label}`)))];
  byId("compare-statistic").replaceChildren(...statistics.map((value) => make("option", { value }, value.replaceAll("_", " ").replace("|", ": "))));
  if (sweep && statistics.length) drawCompare();
  const redraw = { "coverage-kind": drawCoverage, "compare-statistic": drawCompare, "scatter-axis": drawScatter, "sampling-case": drawSampling, analysis: drawMaps };
  for (const [id, section] of Object.entries(redraw)) byId(id).addEventListener("change", section);
  byId("job").addEventListener("change", (event) => { state.job = Number(event.target.value); drawJob(); });
  for (const id of ["layer", "head-number"]) byId(id).addEventListener("change", () => choose(Number(byId("layer").value), Number(byId("head-number").value)));
  byId("compared-statistic").addEventListener("change", drawCompared);
  dark.addEventListener("change", () => { drawJob(); if (DATA.comparison?.statistics.length) drawCompared(); });
  startCompared();
  drawJob();
}

start();

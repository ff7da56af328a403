// The page of checkpoints or models.

const rows = data.matrices;
const shape = { sources: data.sources.length, matrices: rows.length };
const positions = data.steps ?? data.sources.map((_, i) => i);
const chosen = () => ({ metric: byId("metric").value, mode: byId("mode").value, by: byId("by").value, at: Number(byId("at").value) });
const MOST = 12; // matrices that are drawn one by one
const DEPTHS = 8; // colours of the blocks of a role
const SIZE = data.steps ? "|change|" : "range"; // heading of what matrices are ranked by
const BEYOND = "in σ"; // of α, that is first
const DASHES = ["solid", "dash", "dot", "dashdot"];
const HUES = {
  light: ["#0072b2", "#d55e00", "#00805d", "#9b4f96", "#8a6d00", "#4b5563", "#c2185b", "#0097a7"],
  dark: ["#5db2ee", "#ff9a4d", "#3fd1a0", "#d993d4", "#e6c84c", "#a9b4c2", "#ff7aa8", "#4fd8e8"],
};
const VIRIDIS = {
  light: [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [202, 190, 30]],
  dark: [[136, 84, 208], [92, 128, 208], [53, 173, 168], [94, 201, 98], [253, 231, 37]],
};

const known = new Map();

function kept(key, make) {
  if (!known.has(key)) known.set(key, make());
  return known.get(key);
}

// Measured: one list a matrix, with gaps. Shown: numbers or changes; of steps of one run, what was last measured by then.
const measured = (metric) => kept(metric, () => seriesOf(data.places, data.values[metric] ?? [], shape));
const shownLine = (line, mode) => (mode === "change" ? changeOf(line) : line);
const shownSeries = (metric, mode) => kept(`${metric} ${mode}`, () => (
  measured(metric).map((line) => shownLine(data.steps ? latest(line) : line, mode))
));

const titled = (metric, mode) => (mode === "change" ? `Δ ${label(metric)}` : label(metric));

function depthColour(share) {
  const stops = VIRIDIS[theme()];
  const at = share * (stops.length - 1);
  const [low, part] = [Math.min(Math.floor(at), stops.length - 2), at - Math.min(Math.floor(at), stops.length - 2)];
  return `rgb(${stops[low].map((value, i) => Math.round(value + part * (stops[low + 1][i] - value))).join(", ")})`;
}

// The means of some matrices, at each source where one of them was measured.
function groupLine(members, metric, mode) {
  const series = shownSeries(metric, mode);
  const own = measured(metric);
  return meansOf(members.map((index) => series[index]))
    .map((point, source) => ({ ...point, source }))
    .filter(({ source }) => members.some((index) => own[index][source] !== undefined));
}

// ---- axes -------------------------------------------------------------------------------------------------------

function sourceAxis(more = {}) {
  const ticks = data.steps ? {} : { tickvals: positions, ticktext: data.sources.map(inPlot), tickangle: shape.sources > 6 ? -40 : 0 };
  const title = data.steps ? { title: { text: "step" } } : {};
  return { gridcolor: colour("line"), zeroline: false, automargin: true, ...title, ...ticks, ...more };
}

function here() {
  const x = positions[chosen().at];
  return [{ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: colour("muted"), width: 1, dash: "dot" } }];
}

const valueAxis = (title) => ({ title: { text: title }, gridcolor: colour("line"), zerolinecolor: colour("line"), automargin: true });
const mode = () => (shape.sources > 60 ? "lines" : "lines+markers");

// ---- lines ------------------------------------------------------------------------------------------------------

function groupsBy(by, metric) {
  if (by === "matrix") return mostMoved(metric).map((index) => [rows[index].name, [index]]);
  const groups = new Map();
  for (const [index, row] of rows.entries()) {
    const name = by === "role" ? row.role : row.block;
    groups.set(name, [...(groups.get(name) ?? []), index]);
  }
  const found = [...groups];
  if (by === "role") return found;
  return found.sort(([a], [b]) => (a ?? -1) - (b ?? -1)).map(([block, members]) => (
    [block == null ? "no block" : `block ${block}`, members]
  ));
}

function drawLines() {
  const { metric, mode: shown, by } = chosen();
  const groups = groupsBy(by, metric);
  const traces = groups.map(([name, members], i) => {
    const line = groupLine(members, metric, shown);
    const hue = HUES[theme()];
    const color = by === "block" ? depthColour(i / Math.max(groups.length - 1, 1)) : hue[i % hue.length];
    return {
      x: line.map(({ source }) => positions[source]), y: line.map((point) => point.mean), name: inPlot(name), mode: mode(),
      line: { color, width: 1.8, dash: by === "block" ? "solid" : DASHES[Math.floor(i / hue.length) % DASHES.length] },
      marker: { color, size: 5 },
      customdata: line.map(({ count, source }) => (
        [inPlot(data.sources[source]), members.length > 1 ? `<br>mean of ${count} of ${members.length}` : ""]
      )),
      hovertemplate: "%{customdata[0]}: <b>%{y:.4~g}</b>%{customdata[1]}<extra>%{fullData.name}</extra>",
    };
  });
  const beside = innerWidth > 800;
  Plotly.react("lines", traces, layout({
    margin: { l: 60, r: 10, t: 10, b: 50 }, hovermode: "closest", shapes: here(),
    xaxis: sourceAxis(), yaxis: valueAxis(titled(metric, shown)), showlegend: beside || groups.length <= MOST,
    legend: beside ? {} : { orientation: "h", y: -0.25 },
  }), { ...CONFIG, displayModeBar: false });
}

const around = ([low, high], margin = 0.03 * (high - low || 1)) => [low - margin, high + margin];

// ---- one plot a role --------------------------------------------------------------------------------------------

function drawSmall() {
  const { metric, mode: shown } = chosen();
  const { roles, blocks, members } = data.heat;
  const across = innerWidth > 1100 ? 4 : innerWidth > 700 ? 3 : innerWidth > 480 ? 2 : 1;
  const down = Math.ceil(roles.length / across);
  const traces = [];
  const more = {};
  const titles = [];
  roles.forEach((role, r) => {
    const suffix = r ? String(r + 1) : "";
    const [column, line] = [r % across, Math.floor(r / across)];
    const domain = { x: [(column + 0.12) / across, (column + 0.97) / across], y: [1 - (line + 0.86) / down, 1 - (line + 0.12) / down] };
    more[`xaxis${suffix}`] = sourceAxis({ domain: domain.x, anchor: `y${suffix}`, title: { text: "" }, nticks: 4, automargin: false, range: around(extent(positions)), ...(data.steps ? {} : { showticklabels: false }) });
    more[`yaxis${suffix}`] = { ...valueAxis(""), domain: domain.y, anchor: `x${suffix}`, nticks: 4, automargin: false };
    titles.push({ text: `<b>${inPlot(role)}</b>`, showarrow: false, xref: "paper", yref: "paper", x: domain.x[0], y: domain.y[1], xanchor: "left", yanchor: "bottom" });
    traces.push(...roleTraces(members[r], blocks, metric, shown).map((trace) => ({ ...trace, xaxis: `x${suffix}`, yaxis: `y${suffix}` })));
  });
  byId("small").style.height = `${down * 210 + 20}px`;
  Plotly.react("small", traces, layout({
    margin: { l: 20, r: 10, t: 0, b: 10 }, showlegend: false, hovermode: "closest", annotations: titles, ...more,
  }), { ...CONFIG, displayModeBar: false });
}

// One line a block, those of like depth in one trace, and their mean.
function roleTraces(cells, blocks, metric, shown) {
  const depths = Array.from({ length: DEPTHS }, () => ({ x: [], y: [], text: [] }));
  cells.forEach((cell, b) => {
    const line = groupLine(cell, metric, shown);
    const depth = depths[Math.floor((b / blocks.length) * DEPTHS)];
    depth.x.push(...line.map(({ source }) => positions[source]), null);
    depth.y.push(...line.map((point) => point.mean), null);
    depth.text.push(...line.map(({ source }) => `block ${blocks[b]}, ${inPlot(data.sources[source])}`), "");
  });
  const present = depths.map((depth, i) => ({
    ...depth, mode: "lines", hovertemplate: "%{text}: <b>%{y:.4~g}</b><extra></extra>",
    line: { color: depthColour(i / (DEPTHS - 1)), width: 1 },
  })).filter(({ x }) => x.length);
  const all = groupLine(cells.flat(), metric, shown);
  const middle = {
    x: all.map(({ source }) => positions[source]), y: all.map((point) => point.mean), mode: "lines",
    line: { color: colour("ink"), width: 2.5 }, hovertemplate: "mean: <b>%{y:.4~g}</b><extra></extra>",
  };
  return [...present, middle];
}

// ---- heat map of one source -------------------------------------------------------------------------------------

function heatValues(metric) {
  const { mode: shown, at } = chosen();
  const series = shownSeries(metric, shown);
  const cell = (members) => meanOf(members.map((index) => series[index][at]).filter((value) => value != null));
  return { ...data.scales[metric][shown], values: data.heat.members.map((line) => line.map(cell)) };
}

const heatValue = (index, metric) => shownSeries(metric, chosen().mode)[index][chosen().at];

// ---- one matrix -------------------------------------------------------------------------------------------------

function drawMatrix(index) {
  const { metric, mode: shown, at } = chosen();
  const { name, role, block } = rows[index];
  const fields = data.heat.metrics.filter((field) => field in data.labels);
  const numbers = fields.map((field) => {
    const [first, now] = [firstOf(measured(field)[index]), shownSeries(field, "value")[index][at]];
    return { name: label(field), value: `${text(first) || "–"} → ${text(now) || "–"}`, about: data.about[field] };
  }).filter(({ value }) => value !== "– → –");
  describe(name, [role, block == null ? "" : `block ${block}`, measuredWhen(index)].filter(Boolean).join(" · "), numbers);
  const line = measured(metric)[index];
  const taken = [...line.keys()].filter((source) => line[source] !== undefined);
  const values = shownLine(line, shown);
  const color = colour("esd");
  const traces = [...bandTraces(index, metric, shown, taken), {
    x: taken.map((source) => positions[source]), y: taken.map((source) => values[source]), mode: mode(),
    line: { color, width: 2 }, marker: { color, size: 6 }, text: taken.map((source) => inPlot(data.sources[source])),
    hovertemplate: "%{text}: <b>%{y:.5~g}</b><extra></extra>",
  }];
  Plotly.react("plot", traces, layout({
    margin: { l: 60, r: 10, t: 10, b: 50 }, showlegend: false, hovermode: "closest", shapes: here(),
    xaxis: sourceAxis(), yaxis: valueAxis(titled(metric, shown)),
  }), CONFIG);
}

// α and its standard error.
function bandTraces(index, metric, shown, taken) {
  if (metric !== "alpha" || shown !== "value" || !data.values.sigma) return [];
  const [alpha, sigma] = [measured("alpha")[index], measured("sigma")[index]];
  const found = taken.filter((source) => alpha[source] != null && sigma[source] != null);
  const edge = (sign) => found.map((source) => alpha[source] + sign * sigma[source]);
  const style = { x: found.map((source) => positions[source]), mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
  return [{ ...style, y: edge(-1) }, { ...style, y: edge(1), fill: "tonexty", fillcolor: faded(colour("esd"), 0.18) }];
}

// When a number that is shown was measured, where that is not its own source.
function measuredWhen(index) {
  const { metric, at } = chosen();
  const line = measured(metric)[index].slice(0, at + 1);
  if (line.at(-1) !== undefined) return "";
  if (!data.steps) return "not in this model";
  const last = line.findLastIndex((value) => value !== undefined);
  return last < 0 ? "not measured by then" : `measured last at ${data.sources[last]}`;
}

// ---- what moved -------------------------------------------------------------------------------------------------

// Of steps, the first and the last number; of models, the lowest and the highest.
function endsOf(line) {
  const found = line.filter((value) => value != null);
  if (!found.length) return [null, null];
  return data.steps ? [found[0], found.at(-1)] : extent(found);
}

function moveOf(line) {
  const [first, last] = endsOf(line);
  return first == null ? null : last - first;
}

const sizeOf = (move) => (move == null ? null : Math.abs(move));

// How far a change of α lies beyond the standard errors of both ends; null where there are none.
function beyondErrors(metric) {
  if (metric !== "alpha" || !data.steps || !data.values.sigma) return null;
  const sigma = measured("sigma");
  return measured(metric).map((line, index) => {
    const move = moveOf(line);
    const error = Math.hypot(firstOf(sigma[index]) ?? NaN, lastOf(sigma[index]) ?? NaN);
    return move == null || !(error > 0) ? null : Math.abs(move) / error;
  });
}

function mostMoved(metric) {
  const scores = beyondErrors(metric) ?? measured(metric).map((line) => sizeOf(moveOf(line)));
  return [...rows.keys()].sort((i, j) => (scores[j] ?? -1) - (scores[i] ?? -1)).slice(0, MOST);
}

function movedColumns() {
  const { metric } = chosen();
  const series = measured(metric);
  const [moves, ends] = [series.map(moveOf), series.map(endsOf)];
  const column = (header, keys, about = "") => ({ header, keys, cells: keys.map(text), numeric: true, about });
  const words = (header, cells) => ({ header, cells, keys: cells, numeric: false });
  const path = { header: "path", keys: moves, cells: rows.map(() => ""), numeric: true, element: (index) => pathOf(series[index]) };
  const place = [words("role", rows.map(({ role }) => role)), column("block", rows.map(({ block }) => block))];
  const names = data.steps ? ["first", "last"] : ["lowest", "highest"];
  return [
    words("matrix", rows.map(({ name }) => name)),
    { ...path, about: "Sort by the change" },
    ...names.map((name, end) => column(name, ends.map((pair) => pair[end]))),
    ...(data.steps ? [column("change", moves)] : []),
    column(SIZE, moves.map(sizeOf), data.steps ? "Size of the change from the first to the last" : "Highest minus lowest"),
    ...sigmaColumn(beyondErrors(metric)),
    ...place,
  ];
}

function sigmaColumn(keys) {
  if (!keys) return [];
  const cells = keys.map((value) => (value == null ? "" : value.toFixed(1)));
  return [{ header: BEYOND, keys, cells, numeric: true, about: "Size of the change over √(σ² of the first + σ² of the last)" }];
}

const SVG = "http://www.w3.org/2000/svg";

// A line without axes.
function pathOf(line) {
  const drawn = line.map((value, s) => [positions[s], value]).filter(([, value]) => value != null);
  const picture = document.createElementNS(SVG, "svg");
  const looks = { class: "path", viewBox: "0 0 100 20", preserveAspectRatio: "none", "aria-hidden": "true" };
  Object.entries(looks).forEach(([name, value]) => picture.setAttribute(name, value));
  if (!drawn.length) return picture;
  const [left, right] = extent(positions);
  const [low, high] = extent(drawn.map(([, value]) => value));
  const place = ([x, y]) => [100 * (x - left) / (right - left || 1), high > low ? 18 - 16 * (y - low) / (high - low) : 10];
  const curve = document.createElementNS(SVG, "polyline");
  curve.setAttribute("points", drawn.map((point) => place(point).map((value) => value.toFixed(2)).join(",")).join(" "));
  picture.append(curve);
  return picture;
}

// ---- the sources ------------------------------------------------------------------------------------------------

function prepareSources() {
  const lines = [...byId("sources").tBodies[0].rows];
  const cells = lines.map((line) => [...line.cells].map((cell) => cell.textContent));
  const numeric = (c) => cells.every((line) => Number.isFinite(Number(line[c])));
  let descending = false;
  [...byId("sources").tHead.rows[0].cells].forEach((head, c) => {
    const button = make("button", head.textContent, { type: "button" });
    head.replaceChildren(button);
    const column = { keys: cells.map((line) => (numeric(c) && line[c] ? Number(line[c]) : line[c])), numeric: numeric(c) };
    button.addEventListener("click", () => {
      descending = head.getAttribute("aria-sort") === "ascending";
      head.parentElement.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const order = [...lines.keys()].sort((i, j) => compare(column, descending, i, j));
      byId("sources").tBodies[0].replaceChildren(...order.map((i) => lines[i]));
    });
  });
  lines.forEach((line, source) => {
    line.cells[0].replaceChildren(make("button", line.cells[0].textContent, { type: "button" }));
    line.addEventListener("click", () => goTo(source));
  });
  return (at) => lines.forEach((line, source) => {
    if (source === at) line.setAttribute("aria-current", "true");
    else line.removeAttribute("aria-current");
  });
}

// ---- beginning --------------------------------------------------------------------------------------------------

function goTo(source) {
  byId("at").value = source;
  drawSource();
}

function drawSource() {
  const { at } = chosen();
  byId("at-name").textContent = data.sources[at] ?? "";
  byId("at").setAttribute("aria-valuetext", data.sources[at] ?? "");
  byId("heat-source").textContent = `${data.sources[at] ?? ""} · colours mean the same at every ${data.kind}`;
  heat.draw();
  matrix.draw();
  Plotly.relayout("lines", { shapes: here() });
  markSource(at);
}

function drawMetric() {
  drawLines();
  drawSmall();
  drawSource();
}

const open = (index) => matrix.open(index, true);
const heat = heatMap({ grid: data.heat, rows, values: heatValues, value: heatValue, open });
const table = matrixTable({ content: { styles: [] }, rows, open, columns: movedColumns, largest: [BEYOND, SIZE] });
const matrix = matrixSection({
  rows,
  order: table.order,
  draw: drawMatrix,
  opened: (index) => { table.mark(index); heat.mark(index); },
});
const markSource = prepareSources();
byId("all").parentElement.hidden = true;
byId("table-title").firstChild.data = data.steps ? "Moved most " : "Differ most ";
byId("metric").addEventListener("change", () => { drawMetric(); table.build(); });
byId("mode").addEventListener("change", drawMetric);
byId("by").addEventListener("change", drawLines);
let drawing = 0;
byId("at").addEventListener("input", () => { // of a slider that is drawn along, what the screen can show
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(drawSource);
});
onTheme(drawMetric);
drawLines();
drawSmall();
byId("lines").on("plotly_click", ({ points: [{ x }] }) => goTo(positions.indexOf(x)));
matrix.begin(table.order()[0] ?? 0);
drawSource();

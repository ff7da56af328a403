// The page of checkpoints or models.

const rows = data.matrices;
const shape = { sources: data.sources.length, matrices: rows.length };
const positions = data.steps ?? data.sources.map((_, i) => i);
const chosen = () => ({ metric: byId("metric").value, mode: byId("mode").value, by: byId("by").value, at: Number(byId("at").value) });

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

// The means of some matrices, at each source where one of them was measured.
function groupLine(members, metric, mode) {
  const series = shownSeries(metric, mode);
  const own = measured(metric);
  return meansOf(members.map((index) => series[index]))
    .map((point, source) => ({ ...point, source }))
    .filter(({ source }) => members.some((index) => own[index][source] !== undefined));
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

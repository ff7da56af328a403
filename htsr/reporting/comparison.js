// The page of two models.

const rows = readRows(data.table);
const spectra = (index) => [data.spectra.curves[index], data.spectra.curves[rows.length + index]];
const lines = (index) => [data.lines[index], data.lines[rows.length + index]];
const TONES = ["esd", "fit"];

// ---- one pair ---------------------------------------------------------------------------------------------------

function drawPair(index, view) {
  const row = rows[index];
  describe(row.name, noteOf(row), numbersOf(row));
  drawSpectra(byId("plot"), view, [0, 1].map((side) => ({
    spectrum: spectra(index)[side],
    name: data.models[side],
    tone: TONES[side],
    line: lines(index)[side],
    alpha: row[side ? "alpha_b" : "alpha_a"],
    lineTone: TONES[side],
  })));
  drawDirections(index);
}

function noteOf(row) {
  const { name, name_b: other, role, block, note } = row;
  const place = [role, block == null ? "" : `block ${block}`, other && other !== name ? `${other} in b` : ""];
  const status = ["a", "b"].map((side) => {
    const found = row[`status_${side}`];
    return found && found !== "ok" ? `${side}: ${found}` : "";
  });
  return [...place, ...status, note].filter(Boolean).join(" · ");
}

function numbersOf(row) {
  const distances = data.distances.filter((field) => row[field] != null).map((field) => (
    { name: label(field), value: text(row[field]), about: data.about[field] }
  ));
  const both = data.metrics.map((metric) => [metric, row[`${metric}_a`], row[`${metric}_b`]]);
  const metrics = both.filter(([, a, b]) => a != null || b != null).map(([metric, a, b]) => ({
    name: label(`${metric}_a`).replace(/ of a$/, ""),
    value: `${text(a) || "–"} → ${text(b) || "–"}`,
    about: data.about[`${metric}_a`],
  }));
  return [...distances, ...metrics];
}

// ---- directions -------------------------------------------------------------------------------------------------

function drawDirections(index) {
  const [found, heads] = [data.cosines[index], data.heads[index]];
  byId("directions").hidden = !found && !heads;
  byId("directions-matrix").textContent = rows[index].name;
  byId("cosines").hidden = byId("epsilon-label").hidden = !found;
  byId("directions-note").textContent = "";
  if (found) drawCosines(found);
  drawShares(rows[index]);
  drawHeads(heads);
}

// Each number of directions beside that of a Gaussian change of the same norm.
function drawShares(row) {
  const fields = data.directions.filter((field) => row[field] != null);
  byId("shares").hidden = !fields.length;
  byId("shares").tBodies[0].replaceChildren(...fields.map((field) => {
    const line = make("tr", "", { title: data.about[field] ?? "" });
    const cells = [row[field], row[`${field}_null`]].map((value) => make("td", text(value)));
    line.append(make("th", label(field), { scope: "row" }), ...cells);
    return line;
  }));
}

function drawCosines({ k, cosines, a, b, nearest }) {
  const epsilon = Number(byId("epsilon").value);
  const intruders = [...nearest.keys()].filter((j) => nearest[j] < epsilon);
  const roomy = cosines.length <= 12 && byId("cosines").clientWidth > 440; // for the numbers
  const many = k > cosines.length ? ` The first ${cosines.length} of ${k} are shown.` : "";
  const named = intruders.map((j) => `${j + 1} (σ = ${text(b[j])}, nearest ${nearest[j]})`).join(", ");
  byId("directions-note").textContent = "|cosine| of the leading left singular vectors, those of a in rows, of b in "
    + `columns.${many} ` + (named ? `Intruders: ${named}.` : `No direction of b is an intruder below ${epsilon}.`);
  const ranks = (count) => [...Array(count).keys()].map((i) => i + 1);
  const hover = cosines.map((line, i) => line.map((value, j) => (
    `|cosine| <b>${value}</b><br>a ${i + 1}: σ = ${text(a[i])}<br>b ${j + 1}: σ = ${text(b[j])}, nearest ${nearest[j]}`
  )));
  const squares = {
    type: "heatmap", x: ranks(b.length), y: ranks(a.length), z: cosines, zmin: 0, zmax: 1, xgap: 1, ygap: 1,
    text: cosines.map((line) => line.map((value) => (roomy ? value.toFixed(2) : ""))), texttemplate: "%{text}",
    hovertext: hover, hovertemplate: "%{hovertext}<extra></extra>",
    colorscale: "Viridis", colorbar: { thickness: 14, outlinewidth: 0, title: { text: "|cosine|", side: "right" } },
  };
  const frames = intruders.map((j) => ({
    type: "rect", x0: j + 0.5, x1: j + 1.5, y0: 0.5, y1: a.length + 0.5, line: { color: colour("fit"), width: 2.5 },
  }));
  const signs = intruders.map((j) => ({
    x: j + 1, y: 0.5, text: "▼", showarrow: false, yanchor: "bottom", font: { color: colour("fit"), size: 14 },
  }));
  const axis = { showgrid: false, zeroline: false, fixedrange: true, dtick: cosines.length > 20 ? 5 : 1, automargin: true };
  Plotly.react("cosines", [squares], layout({
    margin: { l: 10, r: 10, t: 24, b: 10 },
    xaxis: { ...axis, title: { text: "rank in b" } },
    yaxis: { ...axis, title: { text: "rank in a" }, autorange: "reversed" },
    shapes: frames,
    annotations: signs,
  }), { ...CONFIG, displayModeBar: false });
}

function drawHeads(heads) {
  const box = byId("heads");
  box.hidden = !heads;
  if (!heads) return;
  const table = box.querySelector("table");
  table.tHead.rows[0].replaceChildren(...heads.fields.map((field) => make("th", label(field), {
    scope: "col", title: data.about[field] ?? "",
  })));
  table.tBodies[0].replaceChildren(...heads.values.map((values) => {
    const line = make("tr");
    line.append(...values.map((value, i) => make(i ? "td" : "th", text(value), i ? {} : { scope: "row" })));
    return line;
  }));
}

// ---- moved most -------------------------------------------------------------------------------------------------

function drawMoved() {
  const measure = byId("measure").value;
  const nothing = make("li", "No number of any matrix differs.", { class: "hint" });
  byId("moved").replaceChildren(...(data.moved[measure]?.map((index) => {
    const expected = rows[index][`${measure}_null`];
    const link = make("a", "", { href: addressOf(rows[index].name), "data-index": index });
    link.append(
      make("span", rows[index].name, { class: "name" }),
      make("span", text(rows[index][measure]), { class: "value" }),
      make("span", expected == null ? rows[index].role : `null ${text(expected)}`, { class: "beside" }),
    );
    link.addEventListener("click", (event) => byLink(event, open, index));
    const item = make("li");
    item.append(link);
    return item;
  }) ?? [nothing]));
}

function markMoved(index) {
  byId("moved").querySelectorAll("a").forEach((link) => {
    if (Number(link.dataset.index) === index) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  });
}

// ---- beginning --------------------------------------------------------------------------------------------------

const measures = Object.keys(data.moved);
byId("measure").append(...measures.map((measure) => make("option", label(measure), { value: measure })));
byId("measure").addEventListener("change", drawMoved);
byId("measure").parentElement.hidden = !measures.length;
drawMoved();

const open = (index) => matrix.open(index, true);
const heat = heatMap({ grid: data.heat, rows, open });
const table = matrixTable({ content: data.table, rows, open });
const matrix = matrixSection({
  rows,
  order: table.order,
  draw: drawPair,
  opened: (index) => { table.mark(index); heat.mark(index); markMoved(index); },
});
byId("epsilon").addEventListener("change", matrix.draw);
onTheme(() => { heat.draw(); matrix.draw(); });
matrix.begin(data.moved[measures[0]]?.[0] ?? 0);

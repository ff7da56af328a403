// A heat map by role and block: `heat.html` holds it, `heat_data` computes what it draws.
//
// const heat = heatMap({ grid, rows, values, open });
//   grid      what `heat_data` made
//   rows      the records of the matrices
//   values    (metric) => what `heat_values` made; those of `grid` unless given
//   value     (index, metric) => the number of a matrix; that of its record unless given
//   open      (index) => shows a matrix
// heat.draw() draws anew; heat.mark(index) frames the cell of a matrix.

const NAMED = 6; // matrices that the hover over a crowded cell names
const WRITTEN = 40; // columns up to which cells have room for their value

function heatMap({
  grid, rows, open, values = (metric) => grid.values[metric], value = (index, metric) => rows[index][metric],
}) {
  const { roles, blocks, members, metrics } = grid;
  let current = -1;

  function cellHover(cell, metric) {
    const lines = cell.slice(0, NAMED).map((i) => `${inPlot(rows[i].name)}: <b>${text(value(i, metric)) || "–"}</b>`);
    if (cell.length > NAMED) lines.push(`… and ${cell.length - NAMED} more`);
    return lines.join("<br>");
  }

  function frame() {
    const { role, block } = rows[current] ?? {};
    const [x, y] = [blocks.indexOf(block == null ? "–" : String(block)), roles.indexOf(role)];
    const corners = { x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5 };
    return y < 0 ? [] : [{ type: "rect", ...corners, line: { color: colour("ink"), width: 2 } }];
  }

  function draw() {
    if (!metrics.length) return;
    const metric = byId("metric").value;
    const { values: cells, low, high, centre } = values(metric);
    const trace = {
      type: "heatmap", x: blocks, y: roles.map(inPlot), z: cells, zmin: low, zmax: high, xgap: 2, ygap: 2,
      text: blocks.length > WRITTEN ? cells.map((line) => line.map(() => "")) : written(cells, low, high),
      texttemplate: "%{text}",
      hovertext: members.map((line) => line.map((cell) => cellHover(cell, metric))),
      hovertemplate: "%{hovertext}<extra>block %{x}, %{y}</extra>", hoverongaps: false,
      colorscale: centre == null ? "Viridis" : diverging(),
      colorbar: { thickness: 14, outlinewidth: 0, title: { text: label(metric), side: "right" } },
    };
    const axis = { type: "category", automargin: true, showgrid: false, fixedrange: true };
    byId("heat").style.height = `${Math.max(roles.length, 4) * 30 + 80}px`;
    Plotly.react("heat", [trace], layout({
      margin: { l: 10, r: 10, t: 10, b: 46 },
      xaxis: { ...axis, title: { text: "block" }, nticks: blocks.length > WRITTEN ? WRITTEN : 0 },
      yaxis: { ...axis, autorange: "reversed" },
      shapes: frame(),
    }), { ...CONFIG, displayModeBar: false });
    byId("metric-about").textContent = [metric, data.about[metric]].filter(Boolean).join(": ");
  }

  function mark(index) {
    current = index;
    if (metrics.length) Plotly.relayout("heat", { shapes: frame() });
  }

  if (metrics.length) {
    const common = make("optgroup", "", { label: "common" });
    const others = make("optgroup", "", { label: "all others" });
    for (const metric of metrics) {
      const known = metric in data.labels;
      const name = known ? `${label(metric)} (${metric})` : metric;
      (known ? common : others).append(make("option", name, { value: metric }));
    }
    byId("metric").append(...[common, others].filter((group) => group.children.length));
    byId("metric").addEventListener("change", draw);
    draw();
    byId("heat").on("plotly_click", ({ points: [{ pointIndex: [y, x] }] }) => {
      if (members[y][x].length) open(members[y][x][0]);
    });
  }
  return { draw, mark };
}

// The numbers of a heat map, with the digits that tell its cells apart.
function written(cells, low, high) {
  const whole = cells.flat().every(Number.isInteger);
  const digits = whole ? 0 : Math.max(0, 1 - Math.floor(Math.log10(high - low)));
  const cell = (value) => (digits > 5 ? value.toPrecision(2) : value.toFixed(digits));
  return cells.map((line) => line.map((value) => (value == null ? "" : cell(value))));
}

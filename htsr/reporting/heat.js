// A heat map by role and block: `heat.html` holds it, `heat_data` computes what it draws.
//
// const heat = heatMap({ grid, rows, values, open });
//   grid      what `heat_data` made
//   rows      the records of the matrices
//   values    (metric) => what `heat_values` made; those of `grid` unless given
//   value     (index, metric) => the number of a matrix; that of its record unless given
//   open      (index) => shows a matrix
// heat.draw() draws anew; heat.mark(index) frames the cell of a matrix. Arrow keys, Home and End move a cursor over the
// cells, Enter opens the matrix there; where a cell holds several, each click or Enter opens the next.

const NAMED = 6; // matrices that the hover over a crowded cell names
const CELL_WIDTH = 30; // pixels from which on a cell has room for its value
const ROLES_WIDTH = 170; // pixels beside the cells, for roles and colours

function heatMap({
  grid, rows, open, values = (metric) => grid.values[metric], value = (index, metric) => rows[index][metric],
}) {
  const { roles, blocks, members, metrics } = grid;
  const box = byId("heat");
  let current = -1;
  let drawnWidth = 0;
  let cursor = null; // [role, block] of the cell that the keyboard is at, by their positions

  function cellHover(cell, metric) {
    const lines = cell.slice(0, NAMED).map((i) => `${inPlot(rows[i].name)}: <b>${text(value(i, metric)) || "–"}</b>`);
    if (cell.length > NAMED) lines.push(`… and ${cell.length - NAMED} more`);
    return lines.join("<br>");
  }

  // The cell of the open matrix, [role, block]; [-1, -1] for none.
  function place() {
    const { role, block } = rows[current] ?? {};
    return [roles.indexOf(role), blocks.indexOf(block == null ? "–" : String(block))];
  }

  function frame([y, x], line) {
    const corners = { x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5 };
    return y < 0 ? [] : [{ type: "rect", ...corners, line }];
  }

  function frames() {
    const opened = frame(place(), { color: colour("ink"), width: 2 });
    return cursor ? [...opened, ...frame(cursor, { color: colour("accent"), width: 4 })] : opened;
  }

  function openCell([y, x]) {
    const cell = members[y][x];
    if (cell.length) open(cell[(cell.indexOf(current) + 1) % cell.length]);
  }

  const start = () => place().map((position) => Math.max(position, 0));

  function moved([y, x], key) {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key] ?? [0, 0];
    const column = { Home: 0, End: blocks.length - 1 }[key] ?? Math.min(Math.max(x + right, 0), blocks.length - 1);
    return [Math.min(Math.max(y + down, 0), roles.length - 1), column];
  }

  // What the keyboard is at, for the eye and for a screen reader.
  function say() {
    const [y, x] = cursor;
    const metric = byId("metric").value;
    const names = members[y][x].slice(0, NAMED).map((i) => `${rows[i].name}: ${text(value(i, metric)) || "no number"}`);
    const more = members[y][x].length > NAMED ? [`and ${members[y][x].length - NAMED} more`] : [];
    const where = blocks[x] === "–" ? roles[y] : `${roles[y]}, block ${blocks[x]}`;
    byId("cell").textContent = `${where}. ${[...names, ...more].join(", ") || "No matrix"}`;
  }

  function onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const opens = ["Enter", " "].includes(event.key);
    if (!opens && !/^Arrow|^Home$|^End$/.test(event.key)) return;
    event.preventDefault();
    if (opens) openCell(cursor ?? start());
    else showCursor(moved(cursor ?? start(), event.key));
  }

  function showCursor(cell) {
    cursor = cell;
    say();
    Plotly.relayout(box, { shapes: frames() });
  }

  function onBlur() {
    cursor = null;
    byId("cell").textContent = "";
    Plotly.relayout(box, { shapes: frames() });
  }

  function draw() {
    if (!metrics.length) return;
    const metric = byId("metric").value;
    const { values: cells, low, high, centre } = values(metric);
    drawnWidth = box.clientWidth;
    const roomy = (drawnWidth - ROLES_WIDTH) / blocks.length >= CELL_WIDTH;
    const trace = {
      type: "heatmap", x: blocks, y: roles.map(inPlot), z: cells, zmin: low, zmax: high, xgap: 2, ygap: 2,
      text: roomy ? written(cells, low, high) : cells.map((line) => line.map(() => "")),
      texttemplate: "%{text}",
      hovertext: members.map((line) => line.map((cell) => cellHover(cell, metric))),
      hovertemplate: "%{hovertext}<extra>block %{x}, %{y}</extra>", hoverongaps: false,
      colorscale: centre == null ? "Viridis" : diverging(),
      colorbar: { thickness: 14, outlinewidth: 0, title: { text: label(metric), side: "right" } },
    };
    const axis = { type: "category", automargin: true, showgrid: false, fixedrange: true };
    box.style.height = `${Math.max(roles.length, 4) * 30 + 80}px`;
    Plotly.react(box, [trace], layout({
      margin: { l: 10, r: 10, t: 10, b: 46 },
      xaxis: { ...axis, title: { text: "block" }, nticks: roomy ? 0 : Math.round(drawnWidth / CELL_WIDTH) },
      yaxis: { ...axis, autorange: "reversed" },
      shapes: frames(),
    }), { ...CONFIG, displayModeBar: false });
    byId("metric-about").textContent = [metric, data.about[metric]].filter(Boolean).join(": ");
  }

  function mark(index) {
    current = index;
    if (metrics.length) Plotly.relayout(box, { shapes: frames() });
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
    addEventListener("resize", () => { if (box.clientWidth !== drawnWidth) draw(); });
    draw();
    box.on("plotly_click", ({ points: [{ pointIndex }] }) => openCell(pointIndex));
    box.addEventListener("keydown", onKey);
    box.addEventListener("focus", () => { if (box.matches(":focus-visible")) showCursor(start()); });
    box.addEventListener("blur", onBlur);
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

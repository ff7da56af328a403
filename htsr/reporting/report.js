"use strict";
// Draws what htsr/reporting/html.py computed. Text from the data only ever becomes textContent.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const rows = data.rows.map((values) => Object.fromEntries(data.fields.map((field, i) => [field, values[i]])));
const label = (field) => data.labels[field] ?? field;
const number = (value) => (Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4))));
const text = (value) => (value == null ? "" : typeof value === "number" ? number(value) : String(value));
const inPlot = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;"); // plotly reads some HTML in its texts

let current = -1; // the matrix that is open
let view = "density";

function make(tag, content = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = content;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// ---- colours: the style sheet has them, for both themes ---------------------------------------------------------

const DIVERGING = {
  light: ["#542788", "#8073ac", "#b2abd2", "#e4e2ee", "#f7f5f2", "#fbe3c3", "#fdb863", "#e08214", "#a34e05"],
  dark: ["#c9b3ff", "#9c84e0", "#6c5aa8", "#433d66", "#2b2f38", "#5a452c", "#96652a", "#d98f33", "#ffc37d"],
};
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light");
const faded = (rgb, opacity) => rgb.replace("rgb(", "rgba(").replace(")", `, ${opacity})`);

function colour(name) {
  const probe = make("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

const CONFIG = {
  displaylogo: false,
  responsive: true,
  modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
};

function layout(more) {
  const clear = "rgba(0, 0, 0, 0)";
  return {
    paper_bgcolor: clear,
    plot_bgcolor: clear,
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("ink") },
    modebar: { orientation: "v", bgcolor: clear, color: colour("muted"), activecolor: colour("accent") },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("muted"), font: { color: colour("ink") }, namelength: -1 },
    ...more,
  };
}

// ---- heat map ---------------------------------------------------------------------------------------------------

const { roles, blocks, members } = data.grid;
const NAMED = 6; // matrices that the hover over a crowded cell names
const WRITTEN = 40; // columns up to which cells have room for their value

function cellHover(cell, metric) {
  const lines = cell.slice(0, NAMED).map((i) => `${inPlot(rows[i].name)}: <b>${text(rows[i][metric]) || "–"}</b>`);
  if (cell.length > NAMED) lines.push(`… and ${cell.length - NAMED} more`);
  return lines.join("<br>");
}

function cellText(values, { low, high }) {
  if (blocks.length > WRITTEN) return values.map((line) => line.map(() => ""));
  const whole = values.flat().every(Number.isInteger);
  const digits = whole ? 0 : Math.max(0, 1 - Math.floor(Math.log10(high - low)));
  const written = (value) => (digits > 5 ? value.toPrecision(2) : value.toFixed(digits));
  return values.map((line) => line.map((value) => (value == null ? "" : written(value))));
}

function openCell() {
  const { role, block } = rows[current] ?? {};
  const [x, y] = [blocks.indexOf(block == null ? "–" : String(block)), roles.indexOf(role)];
  const corners = { x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5 };
  return y < 0 ? [] : [{ type: "rect", ...corners, line: { color: colour("ink"), width: 2 } }];
}

function drawHeatMap() {
  const metric = byId("metric").value;
  const { values, low, high, centre } = data.heat[metric];
  const stops = DIVERGING[theme()];
  const trace = {
    type: "heatmap", x: blocks, y: roles.map(inPlot), z: values, zmin: low, zmax: high, xgap: 2, ygap: 2,
    text: cellText(values, data.heat[metric]), texttemplate: "%{text}",
    hovertext: members.map((line) => line.map((cell) => cellHover(cell, metric))),
    hovertemplate: "%{hovertext}<extra>block %{x}, %{y}</extra>", hoverongaps: false,
    colorscale: centre == null ? "Viridis" : stops.map((stop, i) => [i / (stops.length - 1), stop]),
    colorbar: { thickness: 14, outlinewidth: 0, title: { text: label(metric), side: "right" } },
  };
  const axis = { type: "category", automargin: true, showgrid: false, fixedrange: true };
  byId("heat").style.height = `${Math.max(roles.length, 4) * 30 + 80}px`;
  Plotly.react("heat", [trace], layout({
    margin: { l: 10, r: 10, t: 10, b: 46 },
    xaxis: { ...axis, title: { text: "block" }, nticks: blocks.length > WRITTEN ? WRITTEN : 0 },
    yaxis: { ...axis, autorange: "reversed" },
    shapes: openCell(),
  }), { ...CONFIG, displayModeBar: false });
  byId("metric-about").textContent = [metric, data.about[metric]].filter(Boolean).join(": ");
}

function prepareHeatMap() {
  if (!data.metrics.length) return;
  const common = make("optgroup", "", { label: "common" });
  const others = make("optgroup", "", { label: "all others" });
  for (const metric of data.metrics) {
    const known = metric in data.labels;
    (known ? common : others).append(make("option", known ? `${label(metric)} (${metric})` : metric, { value: metric }));
  }
  byId("metric").append(...[common, others].filter((group) => group.children.length));
  byId("metric").addEventListener("change", drawHeatMap);
  drawHeatMap();
  byId("heat").on("plotly_click", ({ points: [{ pointIndex: [y, x] }] }) => open(members[y][x][0], true));
}

// ---- one matrix -------------------------------------------------------------------------------------------------

const MARKS = {
  lambda_min: ["λ<sub>min</sub>", "fit", "dash"],
  lambda_erg: ["λ<sub>ERG</sub>", "erg", "dashdot"],
  bulk_edge: ["bulk edge", "edge", "dot"],
};

// A histogram is an outline that stands on the floor of the axis, with a point to hover over in each bin.
function histogramTraces({ edges, density }, style, floor) {
  const outline = density.flatMap((value, i) => [[edges[i], value || floor], [edges[i + 1], value || floor]]);
  const closed = [[edges[0], floor], ...outline, [edges.at(-1), floor]];
  const centres = density.flatMap((value, i) => (value ? [[Math.sqrt(edges[i] * edges[i + 1]), value]] : []));
  const area = { fill: "toself", fillcolor: faded(style.line.color, 0.22), hoverinfo: "skip" };
  const bins = { mode: "markers", showlegend: false };
  return [trace(closed, { ...style, ...area, mode: "lines" }), trace(centres, { ...style, ...bins })];
}

function survivalTraces({ values, positive, size }, style) {
  const ranks = data.ranks[positive];
  return [trace(values.map((value, i) => [value, ranks[i] / size]), { ...style, mode: "lines+markers" })];
}

const trace = (points, style) => ({ x: points.map(([x]) => x), y: points.map(([, y]) => y), ...style });

function spectrumTraces(spectrum, name, tone, floor) {
  const color = colour(tone);
  const hovertemplate = `%{y:.3~g} at λ = %{x:.4~g}<extra>${name}</extra>`;
  const style = { name, line: { color, width: 1.2 }, marker: { color, size: 3 }, hovertemplate };
  return view === "density" ? histogramTraces(spectrum, style, floor) : survivalTraces(spectrum, style);
}

function lineTraces(index, range) {
  const fit = data.lines[index];
  const line = (x, y, name, tone, style) => (
    { x, y, name, mode: "lines", hoverinfo: "name", line: { color: colour(tone), ...style } }
  );
  const power = fit && line(fit.x, fit[view], `power law, α = ${rows[index].alpha.toFixed(2)}`, "fit", { width: 3 });
  const marks = Object.entries(data.marks[index]).map(([key, value]) => {
    const [name, tone, dash] = MARKS[key];
    return line([value, value], range, `${name} = ${number(value)}`, tone, { dash, width: 1.5 });
  });
  return power ? [power, ...marks] : marks;
}

function axis(title, [low, high], margin) {
  const [from, to] = [Math.log10(low), Math.log10(high)];
  const pad = margin * (to - from || 1);
  return {
    type: "log", title: { text: title }, range: [from - pad, to + pad], exponentformat: "power", ticks: "outside",
    gridcolor: colour("line"), linecolor: colour("muted"),
    ...(to - from > 3 ? { dtick: Math.ceil((to - from) / 10) } : {}), // powers of ten, if there are enough of them
  };
}

const extent = (values) => [Math.min(...values), Math.max(...values)];

function drawPlot() {
  const box = byId("plot");
  const spectra = [[data.spectra[current], "eigenvalues", "esd"], [data.permuted[current], "permuted", "permuted"]];
  const present = spectra.filter(([spectrum]) => spectrum);
  if (!data.spectra[current]) {
    Plotly.purge(box);
    box.replaceChildren(make("p", "This matrix has no eigenvalues to show.", { class: "hint" }));
    return;
  }
  if (!box.classList.contains("js-plotly-plot")) box.replaceChildren();
  const heights = present.flatMap(([s]) => (view === "density" ? s.density.filter(Boolean) : [1 / s.size, 1]));
  const [lowest, highest] = extent(heights);
  const end = data.lines[current]?.[view][1] ?? lowest; // the fitted line may leave through the floor, but not early
  const range = [Math.max(Math.min(lowest / 2, end / 1.5), lowest / 20), highest * 1.6];
  const places = present.flatMap(([{ edges }]) => [edges[1], edges.at(-1)]).concat(Object.values(data.marks[current]));
  const traces = present.flatMap(([spectrum, name, tone]) => spectrumTraces(spectrum, name, tone, range[0]));
  Plotly.react(box, [...traces, ...lineTraces(current, range)], layout({
    margin: { l: 70, r: 40, t: 10, b: 50 },
    xaxis: axis("eigenvalue λ", extent(places), 0.03),
    yaxis: axis(view === "density" ? "density" : "share of eigenvalues ≥ λ", range, 0),
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    hovermode: "closest",
  }), CONFIG);
}

function drawNumbers() {
  const row = rows[current];
  const { name, role, block, kind, stored, status, warning, sigma } = row;
  const place = [role, block == null ? "" : `block ${block}`, kind, `${row.rows} × ${row.columns}`, stored];
  byId("matrix-title").textContent = name;
  byId("matrix-note").textContent = [...place, status === "ok" ? "" : status, warning].filter(Boolean).join(" · ");
  const shown = Object.keys(data.labels).filter((field) => field !== "sigma" && row[field] != null);
  byId("numbers").replaceChildren(...shown.map((field) => {
    let value = text(row[field]);
    if (field === "alpha" && sigma != null) value = `${row.alpha.toFixed(2)} ± ${sigma.toFixed(2)}`;
    if (["num_pl_tail", "matrix_rank"].includes(field)) value += ` of ${row.num_eigenvalues}`;
    const line = make("div", "", { title: data.about[field] });
    line.append(make("dt", label(field)), make("dd", value));
    return line;
  }));
}

function open(index, scroll = false) {
  if (!(index in rows)) return;
  current = index;
  drawNumbers();
  drawPlot();
  drawRows(true);
  if (data.metrics.length) Plotly.relayout("heat", { shapes: openCell() });
  if (!scroll) return;
  byId("matrix").focus({ preventScroll: true });
  byId("matrix").scrollIntoView();
}

// Neighbours are those of the table, as sorted and filtered.
const step = (by) => open(order[Math.min(Math.max(order.indexOf(current) + by, 0), order.length - 1)]);

// ---- table: only the rows in sight are in the document ----------------------------------------------------------

const AROUND = 10; // rows kept above and below those in sight
const ROW_REM = 1.9; // --row
const WIDEST = 52; // of a column, in characters; a name, which leads to all the rest, and a note have less
const NARROWER = { matrix: 40, note: 26 };
const COLOURED = new Set(["α", "note", "alpha", "status", "warning"]);
let columns = [];
let order = [];
let sorted = { column: null, descending: false };
let drawn = "";

function shortColumns() {
  return data.short.headers.map((header, c) => {
    const cells = data.short.cells.map((line) => line[c]);
    const numeric = cells.every((cell) => Number.isFinite(Number(cell)));
    return { header, cells, numeric, keys: numeric ? cells.map((cell) => (cell ? Number(cell) : null)) : cells };
  });
}

function allColumns() {
  return data.fields.map((header) => {
    const keys = rows.map((row) => row[header]);
    return { header, cells: keys.map(text), numeric: data.numeric.includes(header), keys, about: data.about[header] };
  });
}

function buildTable() {
  columns = byId("all").checked ? allColumns() : shortColumns();
  sorted = { column: null, descending: false };
  const widths = columns.map(({ header, cells, numeric }) => {
    const longest = cells.reduce((most, cell) => Math.max(most, cell.length), 0) + (numeric ? 0 : 1);
    const column = make("col");
    const most = NARROWER[header] ?? WIDEST;
    column.style.width = `calc(${Math.min(Math.max(longest, 0.85 * header.length + 1.6), most)}ch + 1.6rem)`;
    return column;
  });
  const heads = columns.map((column) => {
    const head = make("th", "", { scope: "col", class: column.numeric ? "" : "words" });
    const button = make("button", column.header, { type: "button", title: column.about || `Sort by ${column.header}` });
    button.addEventListener("click", () => {
      sorted = { column, descending: sorted.column === column && !sorted.descending };
      arrange();
    });
    head.append(button);
    return head;
  });
  byId("table").querySelector("colgroup").replaceChildren(...widths);
  byId("table").tHead.rows[0].replaceChildren(...heads);
  arrange();
}

function compare(column, i, j) {
  const [a, b] = [column.keys[i], column.keys[j]];
  const [noA, noB] = [a == null || a === "", b == null || b === ""];
  if (noA || noB) return noA - noB; // at the end either way
  const before = column.numeric ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return sorted.descending ? -before : before;
}

function arrange() {
  const wanted = byId("filter").value.trim().toLowerCase();
  const [role, status] = [byId("role").value, byId("status").value];
  const { column, descending } = sorted;
  order = [...rows.keys()].filter((i) => {
    const row = rows[i];
    const searched = [row.name, row.role, row.status, row.warning].join(" ").toLowerCase();
    return (!role || row.role === role) && (!status || row.status === status) && searched.includes(wanted);
  });
  if (column) order.sort((i, j) => compare(column, i, j));
  [...byId("table").tHead.rows[0].cells].forEach((head, c) => {
    if (columns[c] === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
  byId("table").setAttribute("aria-rowcount", order.length + 1);
  byId("count").textContent = order.length === rows.length ? `${rows.length}` : `${order.length} of ${rows.length}`;
  byId("scroller").scrollTop = 0;
  drawRows(true);
}

function drawRows(anew = false) {
  const { scrollTop, clientHeight } = byId("scroller");
  const height = ROW_REM * parseFloat(getComputedStyle(document.documentElement).fontSize);
  const first = Math.max(0, Math.floor(scrollTop / height) - AROUND);
  const last = Math.min(order.length, Math.ceil((scrollTop + Math.max(clientHeight, innerHeight)) / height) + AROUND);
  if (!anew && drawn === `${first} ${last}`) return;
  drawn = `${first} ${last}`;
  const space = (count) => {
    const line = make("tr", "", { "aria-hidden": "true", class: "space" });
    line.style.height = `${count * height}px`;
    return line;
  };
  const lines = order.slice(first, last).map((i, at) => tableRow(i, first + at + 2));
  byId("table").tBodies[0].replaceChildren(space(first), ...lines, space(order.length - last));
}

function tableRow(index, position) {
  const line = make("tr", "", { "data-index": index, "aria-rowindex": position });
  if (index === current) line.setAttribute("aria-current", "true");
  line.append(...columns.map(({ header, cells, numeric }, c) => {
    const tone = COLOURED.has(header) ? data.styles[index] : "";
    const cell = make(c ? "td" : "th", c ? cells[index] : "", { class: `${numeric ? "" : "words"} ${tone}` });
    if (!numeric) cell.title = cells[index];
    if (!c) cell.append(make("button", cells[index], { type: "button" }));
    return cell;
  }));
  return line;
}

function prepareTable() {
  for (const field of ["role", "status"]) {
    const values = [...new Set(rows.map((row) => row[field]))];
    byId(field).append(...values.map((value) => make("option", value, { value })));
    byId(field).addEventListener("change", arrange);
  }
  byId("filter").addEventListener("input", arrange);
  byId("all").addEventListener("change", buildTable);
  byId("scroller").addEventListener("scroll", () => drawRows(), { passive: true });
  byId("table").tBodies[0].addEventListener("click", ({ target }) => {
    open(Number(target.closest("tr").dataset.index), true);
  });
  document.querySelectorAll(".chip").forEach((chip) => chip.addEventListener("click", () => {
    byId("filter").value = chip.dataset.filter;
    arrange();
    byId("table-title").scrollIntoView();
  }));
  buildTable();
}

// ---- beginning --------------------------------------------------------------------------------------------------

function redraw() {
  if (data.metrics.length) drawHeatMap();
  if (current >= 0) drawPlot();
}

byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
  redraw();
});
prefersDark.addEventListener("change", redraw);
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
const views = document.querySelectorAll("[data-view]");
views.forEach((button) => button.addEventListener("click", () => {
  view = button.dataset.view;
  views.forEach((other) => other.setAttribute("aria-pressed", other === button));
  drawPlot();
}));
document.addEventListener("keydown", ({ key, target, altKey, ctrlKey, metaKey }) => {
  if (target.closest("input, select, #scroller") || altKey || ctrlKey || metaKey) return;
  if (key === "ArrowLeft") step(-1);
  if (key === "ArrowRight") step(1);
});
prepareHeatMap();
prepareTable();
open(Math.max(0, data.spectra.findIndex(Boolean)));

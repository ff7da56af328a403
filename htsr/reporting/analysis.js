// The report of an analysis.

const rows = readRows(data.table);
const spectrumOf = (index) => data.spectra.curves[index];
const permutedOf = (index) => data.spectra.curves[rows.length + index];

function drawMatrix(index, view) {
  drawNumbers(rows[index]);
  const own = { spectrum: spectrumOf(index), name: "eigenvalues", tone: "esd" };
  const fit = { line: data.lines[index], alpha: rows[index].alpha, marks: data.marks[index] };
  const permuted = { spectrum: own.spectrum && permutedOf(index), name: "permuted", tone: "permuted" };
  drawSpectra(byId("plot"), view, [{ ...own, ...fit }, permuted]);
}

function drawNumbers(row) {
  const { name, role, block, kind, stored, status, warning, sigma } = row;
  const place = [role, block == null ? "" : `block ${block}`, kind, `${row.rows} × ${row.columns}`, stored];
  const note = [...place, status === "ok" ? "" : status, warning].filter(Boolean).join(" · ");
  const shown = Object.keys(data.labels).filter((field) => field !== "sigma" && row[field] != null);
  describe(name, note, shown.map((field) => {
    let value = text(row[field]);
    if (field === "alpha" && sigma != null) value = `${row.alpha.toFixed(2)} ± ${sigma.toFixed(2)}`;
    if (["num_pl_tail", "matrix_rank"].includes(field)) value += ` of ${row.num_eigenvalues}`;
    return { name: label(field), value, about: data.about[field] };
  }));
}

const open = (index) => matrix.open(index, true);
const heat = heatMap({ grid: data.heat, rows, open });
const table = matrixTable({ content: data.table, rows, open });
const matrix = matrixSection({
  rows,
  order: table.order,
  draw: drawMatrix,
  opened: (index) => { table.mark(index); heat.mark(index); },
});
onTheme(() => { heat.draw(); matrix.draw(); });
matrix.open(Math.max(0, rows.findIndex((_, index) => spectrumOf(index))));

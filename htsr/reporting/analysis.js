// The report of an analysis.

const rows = readRows(data.table);
const spectrumOf = (index) => data.spectra.curves[index];
const permutedOf = (index) => data.spectra.curves[rows.length + index];

// ---- one matrix, and another beside it --------------------------------------------------------------------------

function drawMatrix(index, view) {
  drawNumbers(rows[index]);
  const second = byId("beside").value;
  drawSpectra(byId("plot"), view, second ? beside(index, Number(second)) : alone(index));
}

function alone(index) {
  const own = { spectrum: spectrumOf(index), name: "eigenvalues", tone: "esd" };
  const permuted = { spectrum: own.spectrum && permutedOf(index), name: "permuted", tone: "permuted" };
  return [{ ...own, ...fitOf(index), marks: data.marks[index] }, permuted];
}

function beside(...indices) {
  return indices.map((index, i) => {
    const tone = ["esd", "second"][i];
    return { spectrum: spectrumOf(index), name: rows[index].name, tone, ...fitOf(index), lineTone: ["fit", "edge"][i] };
  });
}

const fitOf = (index) => ({ line: data.lines[index], alpha: rows[index].alpha });

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

// The matrices that have a spectrum, by role.
function offerBeside() {
  for (const role of data.heat.roles) {
    const group = make("optgroup", "", { label: role });
    rows.forEach((row, index) => {
      if (row.role === role && spectrumOf(index)) group.append(make("option", row.name, { value: index }));
    });
    if (group.children.length) byId("beside").append(group);
  }
  byId("beside").addEventListener("change", () => matrix.draw());
}

// ---- beginning --------------------------------------------------------------------------------------------------

const open = (index) => matrix.open(index, true);
const heat = heatMap({ grid: data.heat, rows, open });
const table = matrixTable({ content: data.table, rows, open });
const matrix = matrixSection({
  rows,
  order: table.order,
  draw: drawMatrix,
  opened: (index) => { table.mark(index); heat.mark(index); },
});
offerBeside();
document.querySelectorAll(".standouts a").forEach((link) => {
  link.addEventListener("click", (event) => byLink(event, open, Number(link.dataset.index)));
});
onTheme(() => { heat.draw(); matrix.draw(); });
const telling = [...data.standouts, ...rows.keys()].find((index) => spectrumOf(index));
matrix.begin(telling ?? 0);

// The matrix that is open: `matrix.html` holds it.
//
// const matrix = matrixSection({ rows, order, draw, opened });
//   rows      the records of the matrices
//   order     () => positions of the matrices in the table, as sorted and filtered
//   draw      (index, view) => shows a matrix
//   opened    (index) => marks it elsewhere
// matrix.open(index, scroll) opens one, and moves there; matrix.draw() draws it anew.

function matrixSection({ rows, order, draw, opened }) {
  let current = -1;
  let view = "density";

  function open(index, scroll = false) {
    if (!(index in rows)) return;
    current = index;
    draw(current, view);
    opened(current);
    if (!scroll) return;
    byId("matrix").focus({ preventScroll: true });
    byId("matrix").scrollIntoView();
  }

  function step(by) {
    const neighbours = order();
    open(neighbours[Math.min(Math.max(neighbours.indexOf(current) + by, 0), neighbours.length - 1)]);
  }

  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  const views = document.querySelectorAll("[data-view]");
  views.forEach((button) => button.addEventListener("click", () => {
    view = button.dataset.view;
    views.forEach((other) => other.setAttribute("aria-pressed", other === button));
    draw(current, view);
  }));
  document.addEventListener("keydown", ({ key, target, altKey, ctrlKey, metaKey }) => {
    if (target.closest("input, select, #scroller") || altKey || ctrlKey || metaKey) return;
    if (key === "ArrowLeft") step(-1);
    if (key === "ArrowRight") step(1);
  });
  return { open, draw: () => { if (current >= 0) draw(current, view); } };
}

// Title, line below it, and numbers beside the plot: [{ name, value, about }].
function describe(title, note, numbers) {
  byId("matrix-title").textContent = title;
  byId("matrix-note").textContent = note;
  byId("numbers").replaceChildren(...numbers.map(({ name, value, about = "" }) => {
    const line = make("div", "", { title: about });
    line.append(make("dt", name), make("dd", value));
    return line;
  }));
}

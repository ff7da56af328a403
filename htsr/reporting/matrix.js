// The matrix that is open: `matrix.html` holds it. The address holds its name, so that it can be linked to, and the back
// button leads to the one before.
//
// const matrix = matrixSection({ rows, order, draw, opened });
//   rows      the records of the matrices
//   order     () => positions of the matrices in the table, as sorted and filtered
//   draw      (index, view) => shows a matrix
//   opened    (index) => marks it elsewhere
// matrix.begin(index) opens the matrix of the address, or else this one; matrix.open(index, true) opens one and moves
// there; matrix.draw() draws it anew.

function matrixSection({ rows, order, draw, opened }) {
  const indices = new Map(rows.map(({ name }, index) => [name, index]));
  let current = -1;
  let view = "density";

  function show(index) {
    current = index;
    draw(current, view);
    byId("matrix-link").setAttribute("href", addressOf(rows[current].name));
    opened(current);
  }

  function moveThere() {
    byId("matrix").focus({ preventScroll: true });
    byId("matrix").scrollIntoView();
  }

  function remember(method, index) {
    try {
      history[method]({ index }, "", addressOf(rows[index].name));
    } catch { /* a page inside of another, which has no address of its own */ }
  }

  function open(index, scroll = false) {
    if (!(index in rows)) return;
    if (index !== current) remember(scroll ? "pushState" : "replaceState", index);
    show(index);
    if (scroll) moveThere();
  }

  function byAddress() {
    const name = nameIn(location.hash);
    byId("matrix-missing").textContent = !name || indices.has(name) ? "" : `There is no matrix ${name} here.`;
    return indices.get(name);
  }

  function begin(index) {
    const named = byAddress();
    if (!((named ?? index) in rows)) return;
    show(named ?? index);
    if (named == null) history.replaceState({ index }, ""); // the address stays as it is
    else moveThere();
  }

  function step(by) {
    const neighbours = order();
    open(neighbours[Math.min(Math.max(neighbours.indexOf(current) + by, 0), neighbours.length - 1)]);
  }

  addEventListener("popstate", ({ state }) => {
    const index = byAddress() ?? state?.index;
    if (!(index in rows)) return;
    show(index);
    if (state) return; // where the browser was before: it scrolls by itself
    history.replaceState({ index }, "");
    moveThere();
  });
  byId("matrix-link").addEventListener("click", (event) => byLink(event, (index) => open(index, true), current));
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  const views = document.querySelectorAll("[data-view]");
  views.forEach((button) => button.addEventListener("click", () => {
    view = button.dataset.view;
    views.forEach((other) => other.setAttribute("aria-pressed", other === button));
    draw(current, view);
  }));
  document.addEventListener("keydown", ({ key, target, altKey, ctrlKey, metaKey }) => {
    if (target.closest("input, select, #scroller, #heat") || altKey || ctrlKey || metaKey) return;
    if (key === "ArrowLeft") step(-1);
    if (key === "ArrowRight") step(1);
  });
  return { begin, open, draw: () => { if (current >= 0) draw(current, view); } };
}

// Title, line below it, and numbers beside the plot: [{ name, value, about }].
function describe(title, note, numbers) {
  byId("matrix-name").textContent = title;
  byId("matrix-note").textContent = note;
  byId("numbers").replaceChildren(...numbers.map(({ name, value, about = "" }) => {
    const line = make("div", "", { title: about });
    line.append(make("dt", name), make("dd", value));
    return line;
  }));
}

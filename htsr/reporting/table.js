// A table that sorts and filters: `table.html` holds it, `table_data` computes what it shows. Only the rows in sight are
// in the document.
//
// const table = matrixTable({ content, rows, open });
//   content   what `table_data` made
//   rows      its rows, read by `readRows`
//   open      (index) => shows a matrix
//   columns   () => [{ header, cells, numeric, keys, about, element }]; those of `content` unless given. A cell is the
//             text in `cells`, or what `element` makes of the position of the row
//   largest   headers; in the beginning the rows go by the first of these that there is, the largest number first
// table.build() takes the columns anew; table.order() are the positions of its rows, as sorted and filtered;
// table.mark(index) marks the row of a matrix.

const AROUND = 10; // rows kept above and below those in sight
const ROW_REM = 1.9; // --row
const WIDEST = 52; // of a column, in characters; a name, which leads to all the rest, and a note have less
const NARROWER = { matrix: 40, note: 26 };
const COLOURED = new Set(["α", "note", "alpha", "status", "warning"]);
const FILTERED = ["role", "status"]; // fields with a select box, where the rows have them
const NUMBERS = "such as >6, <=2, 2..4, or 3.9 for all that round to it";
const WORDS = 0.85; // width of a letter beside that of a digit, on average: of few it may be more
const FEW = 20;
const narrow = matchMedia("(max-width: 1000px)"); // as in the style sheet

function matrixTable({ content, rows, open, columns: given = () => columnsOf(content, rows), largest = [] }) {
  let current = -1;
  let columns = [];
  let filters = new Map(); // by header, what the field above the column holds
  let order = [];
  let sorted = { column: null, descending: false };
  let drawn = "";

  function build() {
    columns = narrow.matches ? tellingFirst(given()) : given();
    filters = new Map(columns.flatMap(({ header }) => (filters.has(header) ? [[header, filters.get(header)]] : [])));
    const by = largest.map((name) => columns.find(({ header }) => header === name)).find(Boolean);
    sorted = { column: by, descending: true };
    byId("table").querySelector("colgroup").replaceChildren(...columns.map(columnWidth));
    byId("table").tHead.rows[0].replaceChildren(...columns.map(head));
    byId("table").tHead.rows[1].replaceChildren(...columns.map(filterField));
    arrange();
  }

  function head(column) {
    const cell = make("th", "", { scope: "col", class: column.numeric ? "" : "words" });
    const button = make("button", column.header, { type: "button", title: column.about || `Sort by ${column.header}` });
    button.addEventListener("click", () => {
      sorted = { column, descending: sorted.column === column && !sorted.descending };
      arrange();
    });
    cell.append(button);
    return cell;
  }

  function filterField({ header, numeric, keys }) {
    const cell = make("td", "", { class: numeric ? "" : "words" });
    if (!keys) return cell;
    const field = make("input", "", {
      type: "text", "aria-label": `Filter by ${header}`, placeholder: numeric ? ">, <, .." : "contains",
      title: numeric ? `Numbers ${NUMBERS}` : "Words that the column holds", autocomplete: "off", spellcheck: "false",
    });
    field.value = filters.get(header) ?? "";
    field.addEventListener("input", () => {
      filters.set(header, field.value);
      field.setAttribute("aria-invalid", numeric && !numberFilter(field.value));
      arrange();
    });
    cell.append(field);
    return cell;
  }

  // Whether the fields above the columns let a row through; one that is not understood lets all.
  function passing() {
    const tests = columns.filter(({ header }) => filters.get(header)).map(({ header, numeric, keys }) => {
      const test = (numeric ? numberFilter : wordFilter)(filters.get(header)) ?? (() => true);
      return (i) => test(keys[i]);
    });
    return (i) => tests.every((test) => test(i));
  }

  function arrange() {
    const anywhere = wordFilter(byId("filter").value);
    const chosen = FILTERED.map((field) => [field, byId(field).value]);
    const passes = passing();
    const { column, descending } = sorted;
    order = [...rows.keys()].filter((i) => {
      const { name, role, status, warning } = rows[i];
      const found = chosen.every(([field, value]) => !value || rows[i][field] === value);
      return found && anywhere([name, role, status, warning].join(" ")) && passes(i);
    });
    if (column) order.sort((i, j) => compare(column, descending, i, j));
    [...byId("table").tHead.rows[0].cells].forEach((cell, c) => {
      if (columns[c] === column) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    byId("table").setAttribute("aria-rowcount", order.length + 1);
    byId("count").textContent = order.length === rows.length ? `${rows.length}` : `${order.length} of ${rows.length}`;
    const fields = [byId("filter").value, ...chosen.map(([, value]) => value), ...filters.values()];
    byId("clear").hidden = !fields.some(Boolean);
    byId("scroller").scrollTop = 0;
    draw(true);
  }

  function draw(anew = false, whole = false) {
    const { scrollTop, clientHeight } = byId("scroller");
    const height = ROW_REM * parseFloat(getComputedStyle(document.documentElement).fontSize);
    const [top, bottom] = whole ? [0, Infinity] : [scrollTop, scrollTop + Math.max(clientHeight, innerHeight)];
    const first = Math.max(0, Math.floor(top / height) - AROUND);
    const last = Math.min(order.length, Math.ceil(bottom / height) + AROUND);
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
    line.append(...columns.map(({ header, cells, numeric, element }, c) => {
      const tone = COLOURED.has(header) ? content.styles[index] ?? "" : "";
      const cell = make(c ? "td" : "th", c ? cells[index] : "", { class: `${numeric ? "" : "words"} ${tone}` });
      if (!numeric) cell.title = cells[index];
      if (element) cell.append(element(index));
      if (!c) cell.append(linkTo(index, cells[index]));
      return cell;
    }));
    return line;
  }

  // The end of a name tells more than its beginning: that is what a narrow column leaves out.
  function linkTo(index, name) {
    const link = make("a", "", { href: addressOf(rows[index].name) });
    link.append(make("bdi", name, { dir: "ltr" }));
    return link;
  }

  function clear() {
    for (const id of ["filter", ...FILTERED]) byId(id).value = "";
    filters.clear();
    build();
  }

  function mark(index) {
    current = index;
    draw(true);
  }

  for (const field of FILTERED) {
    const values = [...new Set(rows.map((row) => row[field]))].filter(Boolean);
    byId(field).hidden = !values.length;
    byId(field).append(...values.map((value) => make("option", value, { value })));
    byId(field).addEventListener("change", arrange);
  }
  byId("filter").addEventListener("input", arrange);
  byId("all").addEventListener("change", build);
  byId("clear").addEventListener("click", clear);
  narrow.addEventListener("change", build);
  addEventListener("beforeprint", () => draw(true, true));
  addEventListener("afterprint", () => draw(true));
  byId("scroller").addEventListener("scroll", () => draw(), { passive: true });
  byId("table").tBodies[0].addEventListener("click", (event) => {
    const { index } = event.target.closest("tr").dataset;
    if (index) byLink(event, open, Number(index));
  });
  document.querySelectorAll(".chip").forEach((chip) => chip.addEventListener("click", () => {
    byId("filter").value = chip.dataset.filter;
    arrange();
    byId("table-title").scrollIntoView();
  }));
  build();
  return { build, order: () => order, mark };
}

const columnsOf = (content, rows) => (byId("all").checked ? allColumns(content, rows) : shortColumns(content));

// On a narrow screen: the name, then what is coloured, then the rest.
function tellingFirst([first, ...others]) {
  const telling = others.filter(({ header }) => COLOURED.has(header)).reverse();
  return [first, ...telling, ...others.filter((column) => !telling.includes(column))];
}

function shortColumns({ short: { headers, cells: lines } }) {
  return headers.map((header, c) => {
    const cells = lines.map((line) => line[c]);
    const numeric = cells.every((cell) => Number.isFinite(Number(cell)));
    return { header, cells, numeric, keys: numeric ? cells.map((cell) => (cell ? Number(cell) : null)) : cells };
  });
}

function allColumns({ fields, numeric }, rows) {
  return fields.map((header) => {
    const keys = rows.map((row) => row[header]);
    return { header, cells: keys.map(text), numeric: numeric.includes(header), keys, about: data.about[header] };
  });
}

function columnWidth({ header, cells, numeric }) {
  const letters = cells.reduce((most, cell) => Math.max(most, cell.length), 0);
  const longest = numeric ? letters : letters < FEW ? letters + 0.5 : letters * WORDS;
  const column = make("col");
  const most = NARROWER[header] ?? WIDEST;
  column.style.width = `calc(${Math.min(Math.max(longest, 0.85 * header.length + 1.6), most)}ch + 1.6rem)`;
  return column;
}

function compare(column, descending, i, j) {
  const [a, b] = [column.keys[i], column.keys[j]];
  const [noA, noB] = [a == null || a === "", b == null || b === ""];
  if (noA || noB) return noA - noB; // at the end either way
  const before = column.numeric ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return descending ? -before : before;
}

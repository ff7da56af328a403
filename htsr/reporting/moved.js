// What moved most, of the page of a trajectory: the columns of its table, and the matrices that are drawn one by one.

const MOST = 12; // matrices that are drawn one by one
const SIZE = data.steps ? "|change|" : "range"; // heading of what matrices are ranked by
const BEYOND = "in σ"; // of α, that is first

// Of steps, the first and the last number; of models, the lowest and the highest.
function endsOf(line) {
  const found = line.filter((value) => value != null);
  if (!found.length) return [null, null];
  return data.steps ? [found[0], found.at(-1)] : extent(found);
}

function moveOf(line) {
  const [first, last] = endsOf(line);
  return first == null ? null : last - first;
}

const sizeOf = (move) => (move == null ? null : Math.abs(move));

// How far a change of α lies beyond the standard errors of both ends; null where there are none.
function beyondErrors(metric) {
  if (metric !== "alpha" || !data.steps || !data.values.sigma) return null;
  const sigma = measured("sigma");
  return measured(metric).map((line, index) => {
    const move = moveOf(line);
    const error = Math.hypot(firstOf(sigma[index]) ?? NaN, lastOf(sigma[index]) ?? NaN);
    return move == null || !(error > 0) ? null : Math.abs(move) / error;
  });
}

function mostMoved(metric) {
  const scores = beyondErrors(metric) ?? measured(metric).map((line) => sizeOf(moveOf(line)));
  return [...rows.keys()].sort((i, j) => (scores[j] ?? -1) - (scores[i] ?? -1)).slice(0, MOST);
}

function movedColumns() {
  const { metric } = chosen();
  const series = measured(metric);
  const [moves, ends] = [series.map(moveOf), series.map(endsOf)];
  const column = (header, keys, about = "") => ({ header, keys, cells: keys.map(text), numeric: true, about });
  const words = (header, cells) => ({ header, cells, keys: cells, numeric: false });
  const path = { header: "path", keys: moves, cells: rows.map(() => ""), numeric: true, element: (index) => pathOf(series[index]) };
  const place = [words("role", rows.map(({ role }) => role)), column("block", rows.map(({ block }) => block))];
  const names = data.steps ? ["first", "last"] : ["lowest", "highest"];
  return [
    words("matrix", rows.map(({ name }) => name)),
    { ...path, about: "Sort by the change" },
    ...names.map((name, end) => column(name, ends.map((pair) => pair[end]))),
    ...(data.steps ? [column("change", moves)] : []),
    column(SIZE, moves.map(sizeOf), data.steps ? "Size of the change from the first to the last" : "Highest minus lowest"),
    ...sigmaColumn(beyondErrors(metric)),
    ...place,
  ];
}

function sigmaColumn(keys) {
  if (!keys) return [];
  const cells = keys.map((value) => (value == null ? "" : value.toFixed(1)));
  return [{ header: BEYOND, keys, cells, numeric: true, about: "Size of the change over √(σ² of the first + σ² of the last); from 2 on it counts as moved" }];
}

const SVG = "http://www.w3.org/2000/svg";

// A line without axes.
function pathOf(line) {
  const drawn = line.map((value, s) => [positions[s], value]).filter(([, value]) => value != null);
  const picture = document.createElementNS(SVG, "svg");
  const looks = { class: "path", viewBox: "0 0 100 20", preserveAspectRatio: "none", "aria-hidden": "true" };
  Object.entries(looks).forEach(([name, value]) => picture.setAttribute(name, value));
  if (!drawn.length) return picture;
  const [left, right] = extent(positions);
  const [low, high] = extent(drawn.map(([, value]) => value));
  const place = ([x, y]) => [100 * (x - left) / (right - left || 1), high > low ? 18 - 16 * (y - low) / (high - low) : 10];
  const curve = document.createElementNS(SVG, "polyline");
  curve.setAttribute("points", drawn.map((point) => place(point).map((value) => value.toFixed(2)).join(",")).join(" "));
  picture.append(curve);
  return picture;
}

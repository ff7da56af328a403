// The numbers of matrices from source to source.

// places: [sources, matrices] of the points; values: their numbers, null for none. For each matrix one list over the
// sources, undefined where it was not measured.
function seriesOf([sources, matrices], values, shape) {
  const series = Array.from({ length: shape.matrices }, () => Array(shape.sources).fill(undefined));
  sources.forEach((source, point) => { series[matrices[point]][source] = values[point]; });
  return series;
}

// What was last measured by each source, null for nothing.
function latest(line) {
  let last = null;
  return line.map((value) => (last = value === undefined ? last : value));
}

const firstOf = (line) => line.find((value) => value != null) ?? null;
const lastOf = (line) => line.findLast((value) => value != null) ?? null;

// Differences from the first number.
function changeOf(line) {
  const first = firstOf(line);
  return line.map((value) => (value == null ? value : value - first));
}

const meanOf = (values) => (values.length ? values.reduce((a, b) => a + b) / values.length : null);

// The mean of some lines at each source, and of how many it is.
function meansOf(lines) {
  return (lines[0] ?? []).map((_, source) => {
    const found = lines.map((line) => line[source]).filter((value) => value != null);
    return { mean: meanOf(found), count: found.length };
  });
}

// Spectra on logarithmic axes, one or several laid over each other: `spectra_data` computes their curves.
//
// drawSpectra(box, view, curves)
//   view      "density" or "survival"
//   curves    [{ spectrum, name, tone, line, alpha, marks }]: what `spectra_data` made, the name and the colour (of the
//             style sheet) that it is drawn with; and, where there are, the ends of its fitted line (`line_data`) with
//             its exponent, and its vertical lines (`marks_data`). `lineTone` is the colour of the line.

const NUMBER_WIDTH = 60; // pixels that a number at the axis takes
const MARKS = {
  lambda_min: ["λ<sub>min</sub>", "fit", "dash"],
  lambda_erg: ["λ<sub>ERG</sub>", "erg", "dashdot"],
  bulk_edge: ["bulk edge", "edge", "dot"],
};

function drawSpectra(box, view, curves) {
  const present = curves.filter(({ spectrum }) => spectrum);
  if (!present.length) {
    Plotly.purge(box);
    box.replaceChildren(make("p", "This matrix has no eigenvalues to show.", { class: "hint" }));
    return;
  }
  box.querySelector(".hint")?.remove();
  const heights = present.flatMap(({ spectrum: s }) => (view === "density" ? s.density.filter(Boolean) : [1 / s.size, 1]));
  const [lowest, highest] = extent(heights);
  const ends = present.map(({ line }) => line?.[view][1] ?? lowest);
  const end = Math.min(...ends); // the fitted line may leave through the floor, but not early
  const range = [Math.max(Math.min(lowest / 2, end / 1.5), lowest / 20), highest * 1.6];
  const places = present.flatMap(({ spectrum: { edges }, marks }) => [edges[1], edges.at(-1), ...Object.values(marks ?? {})]);
  const traces = present.flatMap((curve) => spectrumTraces(curve, view, range[0]));
  Plotly.react(box, [...traces, ...present.flatMap((curve) => lineTraces(curve, view, range))], layout({
    margin: { l: 70, r: 40, t: 10, b: 50 },
    xaxis: logAxis("eigenvalue λ", extent(places), 0.03, Math.max(2, Math.floor(box.clientWidth / NUMBER_WIDTH))),
    yaxis: logAxis(view === "density" ? "density" : "share of eigenvalues ≥ λ", range, 0, 10),
    legend: { orientation: "h", x: 0, y: 1, yref: "container", yanchor: "top" },
    hovermode: "closest",
  }), CONFIG);
}

const points = (pairs, style) => ({ x: pairs.map(([x]) => x), y: pairs.map(([, y]) => y), ...style });

function spectrumTraces({ spectrum, name, tone }, view, floor) {
  const color = colour(tone);
  const hovertemplate = `%{y:.3~g} at λ = %{x:.4~g}<extra>${inPlot(name)}</extra>`;
  const style = { name: inPlot(name), line: { color, width: 1.2 }, marker: { color, size: 3 }, hovertemplate };
  return view === "density" ? histogramTraces(spectrum, style, floor) : survivalTraces(spectrum, style);
}

// A histogram is an outline that stands on the floor of the axis, with a point to hover over in each bin.
function histogramTraces({ edges, density }, style, floor) {
  const outline = density.flatMap((value, i) => [[edges[i], value || floor], [edges[i + 1], value || floor]]);
  const closed = [[edges[0], floor], ...outline, [edges.at(-1), floor]];
  const centres = density.flatMap((value, i) => (value ? [[Math.sqrt(edges[i] * edges[i + 1]), value]] : []));
  const area = { fill: "toself", fillcolor: faded(style.line.color, 0.22), hoverinfo: "skip" };
  const bins = { mode: "markers", showlegend: false };
  return [points(closed, { ...style, ...area, mode: "lines" }), points(centres, { ...style, ...bins })];
}

function survivalTraces({ values, positive, size }, style) {
  const ranks = data.spectra.ranks[positive];
  return [points(values.map((value, i) => [value, ranks[i] / size]), { ...style, mode: "lines+markers" })];
}

function lineTraces({ line, alpha, marks = {}, lineTone = "fit" }, view, range) {
  const straight = (x, y, name, tone, style) => (
    { x, y, name, mode: "lines", hoverinfo: "name", line: { color: colour(tone), ...style } }
  );
  const power = line ? [straight(line.x, line[view], `power law, α = ${alpha.toFixed(2)}`, lineTone, { width: 3 })] : [];
  return [...power, ...Object.entries(marks).map(([key, value]) => {
    const [name, tone, dash] = MARKS[key];
    return straight([value, value], range, `${name} = ${number(value)}`, tone, { dash, width: 1.5 });
  })];
}

// `ticks`: how many numbers there is room for.
function logAxis(title, [low, high], margin, ticks) {
  const [from, to] = [Math.log10(low), Math.log10(high)];
  const decades = to - from;
  const pad = margin * (decades || 1);
  const between = { dtick: 9 * decades <= ticks ? "D1" : "D2", tickformat: "~g" }; // numbers between powers of ten
  const powers = { dtick: Math.ceil(decades / ticks), exponentformat: "power" };
  return {
    type: "log", title: { text: title }, range: [from - pad, to + pad], ticks: "outside",
    gridcolor: colour("line"), linecolor: colour("muted"), ...(decades <= 3 && 3 * decades <= ticks ? between : powers),
  };
}

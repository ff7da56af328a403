// Lines from source to source, of the page of a trajectory: one line a group, and one plot a role.

const DEPTHS = 8; // colours of the blocks of a role
const DASHES = ["solid", "dash", "dot", "dashdot"];
const HUES = {
  light: ["#0072b2", "#d55e00", "#00805d", "#9b4f96", "#8a6d00", "#4b5563", "#c2185b", "#0097a7"],
  dark: ["#5db2ee", "#ff9a4d", "#3fd1a0", "#d993d4", "#e6c84c", "#a9b4c2", "#ff7aa8", "#4fd8e8"],
};
const VIRIDIS = {
  light: [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [202, 190, 30]],
  dark: [[136, 84, 208], [92, 128, 208], [53, 173, 168], [94, 201, 98], [253, 231, 37]],
};

function depthColour(share) {
  const stops = VIRIDIS[theme()];
  const at = share * (stops.length - 1);
  const [low, part] = [Math.min(Math.floor(at), stops.length - 2), at - Math.min(Math.floor(at), stops.length - 2)];
  return `rgb(${stops[low].map((value, i) => Math.round(value + part * (stops[low + 1][i] - value))).join(", ")})`;
}

// ---- axes -------------------------------------------------------------------------------------------------------

const ROOM = 24; // letters below an axis: longer names would cover each other, or be hidden as they leave the plot

// Of long names what is about the first letter in which they differ.
function shortened(names) {
  const all = names.map((name) => [...name]);
  const differ = all[0]?.findIndex((letter, i) => all.some((other) => other[i] !== letter));
  return all.map((letters) => {
    if (letters.length <= ROOM) return letters.join("");
    const start = Math.max(0, Math.min(differ - ROOM / 3, letters.length - ROOM));
    const end = start + ROOM;
    return `${start ? "…" : ""}${letters.slice(start, end).join("")}${end < letters.length ? "…" : ""}`;
  });
}

function sourceAxis(more = {}) {
  const names = data.steps ? [] : shortened(data.sources);
  const narrow = Math.max(...names.map((name) => name.length)) * names.length > 60;
  const ticks = data.steps ? {} : {
    tickvals: positions, ticktext: names.map(inPlot), tickangle: narrow ? -40 : 0, ticklabeloverflow: "allow",
  };
  const title = data.steps ? { title: { text: "step" } } : {};
  const whole = data.steps && Math.max(...positions) - Math.min(...positions) < 6 ? { tick0: 0, dtick: 1 } : {};
  return { gridcolor: colour("line"), zeroline: false, automargin: true, ...title, ...ticks, ...whole, ...more };
}

function here() {
  const x = positions[chosen().at];
  return [{ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: colour("muted"), width: 1, dash: "dot" } }];
}

const valueAxis = (title) => ({ title: { text: title }, gridcolor: colour("line"), zerolinecolor: colour("line"), automargin: true });
const mode = () => (shape.sources > 60 ? "lines" : "lines+markers");

// ---- lines ------------------------------------------------------------------------------------------------------

function groupsBy(by, metric) {
  if (by === "matrix") return mostMoved(metric).map((index) => [rows[index].name, [index]]);
  const groups = new Map();
  for (const [index, row] of rows.entries()) {
    const name = by === "role" ? row.role : row.block;
    groups.set(name, [...(groups.get(name) ?? []), index]);
  }
  const found = [...groups];
  if (by === "role") return found;
  return found.sort(([a], [b]) => (a ?? -1) - (b ?? -1)).map(([block, members]) => (
    [block == null ? "no block" : `block ${block}`, members]
  ));
}

function drawLines() {
  const { metric, mode: shown, by } = chosen();
  const groups = groupsBy(by, metric);
  const traces = groups.map(([name, members], i) => {
    const line = groupLine(members, metric, shown);
    const hue = HUES[theme()];
    const color = by === "block" ? depthColour(i / Math.max(groups.length - 1, 1)) : hue[i % hue.length];
    return {
      x: line.map(({ source }) => positions[source]), y: line.map((point) => point.mean), name: inPlot(name), mode: mode(),
      line: { color, width: 1.8, dash: by === "block" ? "solid" : DASHES[Math.floor(i / hue.length) % DASHES.length] },
      marker: { color, size: 5 },
      customdata: line.map(({ count, source }) => (
        [inPlot(data.sources[source]), members.length > 1 ? `<br>mean of ${count} of ${members.length}` : ""]
      )),
      hovertemplate: "%{customdata[0]}: <b>%{y:.4~g}</b>%{customdata[1]}<extra>%{fullData.name}</extra>",
    };
  });
  const beside = innerWidth > 800;
  Plotly.react("lines", traces, layout({
    margin: { l: 60, r: 10, t: 10, b: 50 }, hovermode: "closest", shapes: here(),
    xaxis: sourceAxis(), yaxis: valueAxis(titled(metric, shown)), showlegend: beside || groups.length <= MOST,
    legend: beside ? {} : { orientation: "h", y: -0.25 },
  }), { ...CONFIG, displayModeBar: false });
}

const around = ([low, high], margin = 0.03 * (high - low || 1)) => [low - margin, high + margin];

// ---- one plot a role --------------------------------------------------------------------------------------------

function drawSmall() {
  const { metric, mode: shown } = chosen();
  const { roles, blocks, members } = data.heat;
  const across = innerWidth > 1100 ? 4 : innerWidth > 700 ? 3 : innerWidth > 480 ? 2 : 1;
  const down = Math.ceil(roles.length / across);
  const traces = [];
  const more = {};
  const titles = [];
  roles.forEach((role, r) => {
    const suffix = r ? String(r + 1) : "";
    const [column, line] = [r % across, Math.floor(r / across)];
    const domain = { x: [(column + 0.12) / across, (column + 0.97) / across], y: [1 - (line + 0.86) / down, 1 - (line + 0.12) / down] };
    more[`xaxis${suffix}`] = sourceAxis({ domain: domain.x, anchor: `y${suffix}`, title: { text: "" }, nticks: 4, automargin: false, range: around(extent(positions)), ...(data.steps ? {} : { showticklabels: false }) });
    more[`yaxis${suffix}`] = { ...valueAxis(""), domain: domain.y, anchor: `x${suffix}`, nticks: 4, automargin: false };
    titles.push({ text: `<b>${inPlot(role)}</b>`, showarrow: false, xref: "paper", yref: "paper", x: domain.x[0], y: domain.y[1], xanchor: "left", yanchor: "bottom" });
    traces.push(...roleTraces(members[r], blocks, metric, shown).map((trace) => ({ ...trace, xaxis: `x${suffix}`, yaxis: `y${suffix}` })));
  });
  byId("small").style.height = `${down * 210 + 20}px`;
  Plotly.react("small", traces, layout({
    margin: { l: 20, r: 10, t: 0, b: 10 }, showlegend: false, hovermode: "closest", annotations: titles, ...more,
  }), { ...CONFIG, displayModeBar: false });
}

// One line a block, those of like depth in one trace, and their mean.
function roleTraces(cells, blocks, metric, shown) {
  const depths = Array.from({ length: DEPTHS }, () => ({ x: [], y: [], text: [] }));
  cells.forEach((cell, b) => {
    const line = groupLine(cell, metric, shown);
    const depth = depths[Math.floor((b / blocks.length) * DEPTHS)];
    depth.x.push(...line.map(({ source }) => positions[source]), null);
    depth.y.push(...line.map((point) => point.mean), null);
    depth.text.push(...line.map(({ source }) => `block ${blocks[b]}, ${inPlot(data.sources[source])}`), "");
  });
  const present = depths.map((depth, i) => ({
    ...depth, mode: "lines", hovertemplate: "%{text}: <b>%{y:.4~g}</b><extra></extra>",
    line: { color: depthColour(i / (DEPTHS - 1)), width: 1 },
  })).filter(({ x }) => x.length);
  const all = groupLine(cells.flat(), metric, shown);
  const middle = {
    x: all.map(({ source }) => positions[source]), y: all.map((point) => point.mean), mode: "lines",
    line: { color: colour("ink"), width: 2.5 }, hovertemplate: "mean: <b>%{y:.4~g}</b><extra></extra>",
  };
  return [...present, middle];
}

"use strict";
// What all pages share: the data, elements, colours and plots. Draws what Python computed; text from the data only ever
// becomes textContent. The scripts of a page follow each other in one scope.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const label = (field) => data.labels[field] ?? field;
const number = (value) => (Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4))));
const text = (value) => (value == null ? "" : typeof value === "number" ? number(value) : String(value));
const inPlot = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;"); // plotly reads some HTML in its texts
const extent = (values) => [Math.min(...values), Math.max(...values)];

// The rows of `table_data` as objects.
const readRows = ({ fields, rows }) => rows.map((values) => Object.fromEntries(fields.map((field, i) => [field, values[i]])));

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
const diverging = () => DIVERGING[theme()].map((stop, i, { length }) => [i / (length - 1), stop]);

function colour(name) {
  const probe = make("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

// Calls `redraw` when the colours change.
function onTheme(redraw) {
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
    redraw();
  });
  prefersDark.addEventListener("change", redraw);
}

// ---- plots ------------------------------------------------------------------------------------------------------

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

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

// ---- addresses: that of a matrix is its name --------------------------------------------------------------------

const addressOf = (name) => `#${encodeURIComponent(name)}`;

function nameIn(address) {
  try {
    return decodeURIComponent(address.slice(1));
  } catch {
    return address.slice(1); // no address of ours
  }
}

// Opens a matrix by a click on a link, unless it is to open in a tab of its own.
function byLink(event, open, index) {
  if (event.button || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  open(index);
}

// ---- colours: the style sheet has them, for both themes ---------------------------------------------------------

const DIVERGING = {
  light: ["#542788", "#8073ac", "#b2abd2", "#e4e2ee", "#f7f5f2", "#fbe3c3", "#fdb863", "#e08214", "#a34e05"],
  dark: ["#c9b3ff", "#9c84e0", "#6c5aa8", "#433d66", "#2b2f38", "#5a452c", "#96652a", "#d98f33", "#ffc37d"],
};
const PAPER = 1000; // pixels that a page is wide in print
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

// Calls `redraw` when the colours change, which are light on paper; there, plots are as wide as the paper at most.
function onTheme(redraw) {
  const { dataset } = document.documentElement;
  let chosen;
  const wear = (name) => {
    if (name) dataset.theme = name;
    else delete dataset.theme;
    redraw();
  };
  byId("theme").addEventListener("click", () => wear(theme() === "dark" ? "light" : "dark"));
  prefersDark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    chosen = dataset.theme;
    wear("light");
    document.querySelectorAll(".js-plotly-plot").forEach((box) => {
      Plotly.relayout(box, { width: Math.min(box.clientWidth, PAPER) });
    });
  });
  addEventListener("afterprint", () => wear(chosen));
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

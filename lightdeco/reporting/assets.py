"""The style and the script of the pages. The script draws what lies in the page as JSON, and makes no markup."""

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --ink: #1c2430; --soft: #667085; --line: #e3e6eb;
  --accent: #2f6fd0; --good: #1d7f45; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #12151a; --card: #1a1f27; --ink: #e6e9ee; --soft: #98a2b3;
  --line: #2c333d; --accent: #7db0ff; --good: #5dc98a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 10px; }
h3 { font-size: 14px; margin: 0 0 6px; overflow-wrap: anywhere; }
p { margin: 0 0 6px; }
.soft { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.finished { color: var(--good); } .killed, .failed, .interrupted { color: var(--bad); white-space: pre-wrap;
  overflow-wrap: anywhere; } .running { color: var(--accent); }
.tiles, .panels { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); margin-top: 16px; }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; min-width: 0; }
.tile b { display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.plot { height: 270px; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; }
.keys button { all: unset; cursor: pointer; font-size: 12.5px; color: var(--soft); overflow-wrap: anywhere;
  max-width: 100%; }
.keys button:focus-visible { outline: 2px solid var(--accent); border-radius: 3px; }
.keys button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
.keys i { display: inline-block; width: 16px; border-top: 3px solid; margin-right: 6px; vertical-align: middle; }
.keys i.dash { border-top-style: dashed; border-top-width: 2px; }
#runs { position: sticky; top: 0; z-index: 5; background: var(--back); padding: 8px 0; }
#runs button { font-size: 14px; color: var(--ink); }
.bar { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 10px; font-size: 13px; color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 3em; }
td.n { text-align: right; white-space: nowrap; }
th.n { text-align: right; }
td.best { white-space: nowrap; color: var(--good); font-weight: 600; }
.rows td { white-space: nowrap; }
.compare td { min-width: 7em; max-width: 14em; overflow-wrap: break-word; }
.compare th:first-child { position: sticky; left: 0; background: var(--card); white-space: normal;
  min-width: 8.5em; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 12px; }
pre { margin: 0; overflow-x: auto; font-size: 12px; line-height: 1.4; max-height: 480px; }
details summary { cursor: pointer; color: var(--soft); font-size: 13px; }
@media (max-width: 600px) { main { padding: 16px 12px 40px; } .plot { height: 230px; } .card { padding: 10px; }
  .tiles { grid-template-columns: 1fr 1fr; } }
"""

SCRIPT: Final = """
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const touch = matchMedia("(pointer: coarse)").matches;
let logs = figures.map(figure => figure.log);
function axis(more) {
  const line = colour("--line"), soft = colour("--soft");
  return Object.assign({gridcolor: line, linecolor: line, zerolinecolor: line, tickfont: {color: soft, size: 11},
    automargin: true, exponentformat: "power"}, more);
}
function layout(i) {
  const shapes = figures[i].line === null ? [] : [{type: "line", xref: "x", yref: "paper", x0: figures[i].line,
    x1: figures[i].line, y0: 0, y1: 1, line: {color: colour("--soft"), width: 1, dash: "dot"}}];
  return {margin: {l: 44, r: 8, t: 6, b: 34}, showlegend: false, hovermode: "x unified", shapes: shapes,
    dragmode: touch ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: colour("--ink"), family: "inherit"},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--ink")},
    hoverlabel: {bgcolor: colour("--card"), bordercolor: colour("--line"), font: {color: colour("--ink"), size: 12}},
    xaxis: axis({title: {text: "step", font: {color: colour("--soft"), size: 11}, standoff: 4}, nticks: 7,
      unifiedhovertitle: {text: "step %{x}"}}),
    yaxis: axis(logs[i] ? {type: "log", nticks: 6, dtick: null} : {nticks: 6})};
}
const plots = [...document.querySelectorAll(".plot")], drawn = new Set(), hidden = new Set();
const config = {responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"]};
function draw(i) {
  if (drawn.has(i)) return;
  drawn.add(i);
  Plotly.newPlot(plots[i], figures[i].traces, layout(i), config);
  figures[i].keys.forEach(key => { if (hidden.has(key.label)) show(i, key, false); });
}
function show(i, key, visible) { if (drawn.has(i)) Plotly.restyle(plots[i], {visible: visible}, key.traces); }
const seen = new IntersectionObserver(entries => entries.forEach(entry => {
  if (entry.isIntersecting) { draw(plots.indexOf(entry.target)); seen.unobserve(entry.target); }
}), {rootMargin: "800px"});
plots.forEach(plot => seen.observe(plot));
addEventListener("beforeprint", () => plots.forEach((plot, i) => draw(i)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change",
  () => drawn.forEach(i => Plotly.relayout(plots[i], layout(i))));
document.querySelectorAll(".keys button").forEach(button => button.addEventListener("click", () => {
  const visible = button.getAttribute("aria-pressed") === "false";
  button.setAttribute("aria-pressed", String(visible));
  if (button.dataset.run === undefined) {
    const i = Number(button.dataset.figure);
    show(i, figures[i].keys[Number(button.dataset.key)], visible);
    return;
  }
  const run = button.dataset.run;
  if (visible) hidden.delete(run); else hidden.add(run);
  figures.forEach((figure, i) => figure.keys.filter(key => key.label === run).forEach(key => show(i, key, visible)));
}));
const box = document.getElementById("log");
box.addEventListener("change", () => {
  logs = figures.map(figure => box.checked || figure.log);
  drawn.forEach(i => Plotly.relayout(plots[i], layout(i)));
});
"""

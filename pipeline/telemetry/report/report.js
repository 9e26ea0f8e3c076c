"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const base = {
  margin: { l: 55, r: 15, t: 35, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  font: { color: dark ? "#e8e8e8" : "#1c1c1c", size: 12 }, hovermode: "x unified", legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
  colorway: ["#3b7dd8", "#e0863a", "#3aa66f", "#b05cc6", "#d3504e", "#7a8896", "#c2a83e", "#38a5b8"],
};
const grid = { gridcolor: dark ? "#3a3a3d" : "#e4e4e4", zerolinecolor: dark ? "#555" : "#ccc" };
function draw(id, chart) {
  const layout = { ...base, ...chart.layout };
  for (const axis of ["xaxis", "yaxis", "yaxis2"])
    if (axis !== "yaxis2" || chart.layout.yaxis2) layout[axis] = { ...grid, automargin: true, ...chart.layout[axis] };
  return Plotly.newPlot(id, chart.data, layout, { responsive: true, displaylogo: false });
}
const drawn = Object.entries(data.charts).map(([id, chart]) => draw(id, chart));
const metric = document.getElementById("metric");
if (metric) {
  for (const name of Object.keys(data.scalars)) metric.add(new Option(name, name));
  const show = () => draw("any-metric", {
    data: [{ x: data.steps, y: data.scalars[metric.value], name: metric.value, type: data.steps.length < 60 ? "bar" : "scatter" }],
    layout: { xaxis: { type: typeof data.steps[0] === "string" ? "category" : "linear" } },
  });
  metric.addEventListener("change", show);
  drawn.push(show());
}
const chosen = document.getElementById("sample-step");
if (chosen) {
  const cards = [...document.querySelectorAll(".sample")];
  for (const step of new Set(cards.map((card) => card.dataset.step))) chosen.add(new Option(`step ${step}`, step));
  const filter = () => cards.forEach((card) => { card.hidden = card.dataset.step !== chosen.value; });
  chosen.value = cards[cards.length - 1].dataset.step;
  chosen.addEventListener("change", filter);
  filter();
}
Promise.all(drawn).then(() => { document.body.dataset.ready = "1"; });

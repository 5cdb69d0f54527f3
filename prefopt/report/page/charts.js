"use strict";
(function () {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const short = (value, digits) => {
    const size = Math.abs(value);
    return size && (size < 1e-3 || size >= 1e6) ? value.toExponential(digits - 2) : String(Number(value.toPrecision(digits)));
  };
  const shown = (u, value) => (value == null ? "" : short(value, 4));
  const plots = new Map();

  function seriesOf(entry) {
    const stroke = color("c" + (entry.color % 8));
    return {
      label: entry.label, stroke: entry.faint ? stroke + "66" : stroke, width: entry.faint ? 1 : 1.75, spanGaps: true,
      dash: entry.heldOut ? [6, 4] : undefined, value: shown,
      paths: entry.dots ? () => null : undefined,
      points: { show: entry.dots || entry.heldOut || entry.steps.length < 40, size: entry.dots ? 9 : 5, fill: stroke },
    };
  }

  function lastIndex(values) {
    for (let place = values.length - 1; place >= 0; place--) { if (values[place] != null) { return place; } }
    return null;
  }

  // Without a pointer, the legend has the last values.
  function showLast(u) {
    if (u.data[0].length) { u.setLegend({ idxs: u.data.map(lastIndex) }); }
  }

  function draw(box) {
    const chart = charts[Number(box.dataset.chart)];
    const before = plots.get(box);
    if (before) { before.destroy(); }
    const axis = { stroke: color("muted"), grid: { stroke: color("grid"), width: 1 }, ticks: { stroke: color("grid"), width: 1 }, font: "12px system-ui" };
    const data = uPlot.join(chart.series.map((entry) => [entry.steps, entry.values]));
    const plot = new uPlot({
      width: box.clientWidth, height: 220, scales: { x: { time: false }, y: chart.unit.startsWith("share") ? { range: (u, low) => [Math.max(Math.min(low, 0.5) - 0.05, 0), 1.02] } : {} },
      cursor: chart.frontier ? { drag: { x: false, y: false } } : { sync: { key: "step", scales: ["x", null] }, drag: { x: true, y: false } },
      axes: [
        { ...axis, label: chart.xLabel, labelSize: chart.xLabel ? 18 : 0, labelFont: "12px system-ui", values: (u, ticks) => ticks.map((tick) => (Math.abs(tick) >= 1e4 ? tick / 1e3 + "k" : String(Number(tick.toPrecision(6))))) },
        { ...axis, size: 58, values: (u, ticks) => ticks.map((tick) => short(tick, 4)) },
      ],
      series: [{ label: chart.xLabel || "step", value: shown }, ...chart.series.map(seriesOf)],
      hooks: { ready: [(u) => setTimeout(() => showLast(u), 0)] },
    }, data, box);
    chart.series.forEach((entry, place) => {
      if (entry.faint) { box.querySelectorAll(".u-legend .u-series")[place + 1].style.display = "none"; }
    });
    plot.over.addEventListener("mouseleave", () => setTimeout(() => showLast(plot), 0));
    const touch = (event) => {
      const corner = plot.over.getBoundingClientRect(), finger = event.touches[0];
      plot.setCursor({ left: finger.clientX - corner.left, top: finger.clientY - corner.top });
    };
    plot.over.addEventListener("touchstart", touch, { passive: true });
    plot.over.addEventListener("touchmove", touch, { passive: true });
    plots.set(box, plot);
  }

  const resized = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const plot = plots.get(entry.target);
      if (plot && Math.abs(plot.width - entry.target.clientWidth) > 1 && entry.target.clientWidth) {
        plot.setSize({ width: entry.target.clientWidth, height: 220 });
      }
    }
  });
  function drawShown() {
    document.querySelectorAll(".chart").forEach((box) => {
      if (box.clientWidth && !plots.has(box)) { draw(box); resized.observe(box); }
    });
  }
  document.querySelectorAll("details").forEach((box) => box.addEventListener("toggle", drawShown));
  drawShown();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => [...plots.keys()].forEach(draw));
})();

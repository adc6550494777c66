"use strict";
// The page is whole without this: it adds smoothing, and values at the step under the pointer.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const types = { f4: Float32Array, f8: Float64Array };
  const columns = data.columns.map((text) => {
    const bytes = Uint8Array.from(atob(text.slice(3)), (letter) => letter.charCodeAt(0));
    return new types[text.slice(0, 2)](bytes.buffer);
  });
  const curves = data.curves.map((curve) => ({
    step: columns[curve.step],
    epoch: columns[curve.epoch],
    seconds: columns[curve.seconds],
    value: columns[curve.value],
    smooth: null,
  }));
  const [first, last] = data.x;
  const root = document.documentElement;
  const across = (step) => (step - first) / (last - first);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // The place of a value in the box of its plot, from the top; NaN where it has none.
  const placer = (path) => {
    const plot = path.closest(".plot");
    const [low, high] = [Number(plot.dataset.low), Number(plot.dataset.high)];
    const log = plot.classList.contains("log");
    return (value) => {
      const at = log ? Math.log10(value) : value;
      return 600 * (1 - (at / 2 - low / 2) / (high / 2 - low / 2));
    };
  };

  // An exponential mean whose start does not count as if it had lasted for ever.
  const smoothed = (values, weight) => {
    let total = 0, share = 0;
    return values.map((value) => {
      if (!Number.isFinite(value)) return NaN;
      total = weight * total + (1 - weight) * value;
      share = weight * share + (1 - weight);
      return total / share;
    });
  };

  const slider = document.querySelector("#smoothing input");
  const smooth = () => {
    const weight = Number(slider.value);
    slider.nextElementSibling.value = weight;
    root.classList.toggle("smoothed", weight > 0);
    for (const path of all(".smooth")) {
      const curve = curves[path.dataset.curve], place = placer(path);
      curve.smooth = weight > 0 ? smoothed(Float64Array.from(curve.value), weight) : null;
      let d = "", pen = "M";
      for (let i = 0; curve.smooth && i < curve.step.length; i++) {
        const y = place(curve.smooth[i]);
        if (!Number.isFinite(y)) { pen = "M"; continue; }
        d += `${pen}${(1200 * across(curve.step[i])).toFixed(0)} ${y.toFixed(1)}`;
        pen = "L";
      }
      path.setAttribute("d", d);
    }
  };
  slider.addEventListener("input", smooth);
  slider.parentElement.hidden = false;
  if (Number(slider.value)) smooth();

  const number = (value) => {
    if (Number.isNaN(value)) return "NaN";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
    const size = Math.abs(value);
    const plain = value === 0 || (size >= 1e-3 && size < 1e5);
    return plain
      ? String(size < 1e4 ? Number(value.toPrecision(4)) : Math.round(value))
      : value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  };
  const duration = (seconds) => {
    const [h, m, s] = [seconds / 3600, (seconds / 60) % 60, seconds % 60].map(Math.floor);
    return h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
  };
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
  };

  const legends = all(".legend li").map((item) => ({
    curve: curves[item.dataset.curve],
    shown: item.querySelector("b"),
    final: item.querySelector("b").textContent,
  }));
  const rings = all(".at").map((path) => ({
    path, curve: curves[path.dataset.curve], place: placer(path),
  }));
  const whens = all(".when");
  const value = (curve, i) => (curve.smooth ?? curve.value)[i];

  const read = (plot, event) => {
    const box = plot.getBoundingClientRect();
    const aim = first + ((event.clientX - box.left) / box.width) * (last - first);
    const near = all(".at", plot).map((path) => {
      const curve = curves[path.dataset.curve], i = nearest(curve.step, aim);
      return { step: curve.step[i], epoch: curve.epoch[i], seconds: curve.seconds[i] };
    });
    const at = near.reduce((a, b) => (Math.abs(b.step - aim) < Math.abs(a.step - aim) ? b : a));
    root.classList.add("reading");
    root.style.setProperty("--at", across(at.step));
    const when = `step ${at.step.toLocaleString("en")} · epoch ${at.epoch} · ${duration(at.seconds)}`;
    for (const one of whens) one.textContent = when;
    for (const { curve, shown } of legends) {
      shown.textContent = number(value(curve, nearest(curve.step, at.step)));
    }
    for (const { path, curve, place } of rings) {
      const i = nearest(curve.step, at.step), y = place(value(curve, i));
      path.setAttribute("d", Number.isFinite(y) ? `M${1200 * across(curve.step[i])} ${y}h0` : "");
    }
  };
  const leave = () => {
    root.classList.remove("reading");
    for (const one of whens) one.textContent = "";
    for (const { shown, final } of legends) shown.textContent = final;
    for (const { path } of rings) path.removeAttribute("d");
  };
  for (const plot of all(".plot")) {
    plot.addEventListener("pointermove", (event) => read(plot, event));
    plot.addEventListener("pointerdown", (event) => read(plot, event));
    plot.addEventListener("pointerleave", leave);
  }
})();

"use strict";
// Draws every figure of the page with uPlot, from the JSON in it. pages/chart.py writes that.
(() => {
  const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif';
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const shown = (value, digits) => (value == null ? "–" : String(Number(value.toPrecision(digits))));
  const SHAPES = { circle: "●", square: "■", triangle: "▲", diamond: "◆", cross: "✕" };
  const drawn = [];

  // Axes --------------------------------------------------------------------------------------------------------------

  function axis(label, more) {
    const line = { stroke: () => css("line"), width: 1 };
    return { label, stroke: () => css("soft"), font: FONT, labelFont: FONT, labelSize: 20, labelGap: 2, grid: line,
      ticks: { ...line, size: 5 }, ...more };
  }

  // As wide as its longest number.
  function room(u, texts, which, cycle) {
    const own = u.axes[which];
    if (cycle > 1) return own._size;
    u.ctx.font = own.font[0];
    const longest = Math.max(0, ...(texts || []).map((text) => u.ctx.measureText(text ?? "").width));
    return Math.ceil(own.ticks.size + own.gap + longest / devicePixelRatio) + 6;
  }

  // As many digits as it takes to tell neighbours apart.
  function written(u, splits) {
    const apart = splits.length > 1 ? Math.abs(splits[1] - splits[0]) : 1;
    const places = Math.max(0, -Math.floor(Math.log10(apart) + 1e-9)) + (/[^0]5/.test(apart.toPrecision(2)) ? 1 : 0);
    const form = { maximumFractionDigits: Math.min(12, places) };
    return splits.map((split) => (split == null ? "" : split.toLocaleString("en-US", form)));
  }

  function whole() {
    const steps = [];
    for (let power = 1; power < 1e15; power *= 10) steps.push(power, 2 * power, 5 * power);
    return steps;
  }

  function rangeOf(spec) {
    return (u, low, high) => {
      if (low == null) return [0, 1];
      if (spec.y.zero) return [-0.02 * (high || 1), (high || 1) * 1.06];
      const pad = (high - low) * 0.06 || Math.abs(high) * 1e-3 || 1;
      return [low - pad, high + pad];
    };
  }

  function scaleOfSteps(spec) {
    const x = spec.x.values;
    const edge = spec.kind === "map" && x.length > 1 ? (x[x.length - 1] - x[0]) / (x.length - 1) / 2 : 0;
    // A single look gets some room.
    return (u, low, high) => (low === high ? [low - 1, high + 1] : [low - edge, high + edge]);
  }

  // Lines -------------------------------------------------------------------------------------------------------------

  function mark(ctx, shape, x, y, size) {
    ctx.beginPath();
    if (shape === "circle") ctx.arc(x, y, size, 0, 2 * Math.PI);
    else if (shape === "square") ctx.rect(x - size, y - size, 2 * size, 2 * size);
    else if (shape === "triangle") { ctx.moveTo(x, y - 1.2 * size); ctx.lineTo(x + 1.2 * size, y + size);
      ctx.lineTo(x - 1.2 * size, y + size); ctx.closePath(); }
    else if (shape === "diamond") { ctx.moveTo(x, y - 1.4 * size); ctx.lineTo(x + 1.4 * size, y);
      ctx.lineTo(x, y + 1.4 * size); ctx.lineTo(x - 1.4 * size, y); ctx.closePath(); }
    else { ctx.moveTo(x - size, y - size); ctx.lineTo(x + size, y + size); ctx.moveTo(x + size, y - size);
      ctx.lineTo(x - size, y + size); ctx.stroke(); return; }
    ctx.fill();
  }

  function inside(u, x, y) {
    const { left, top, width, height } = u.bbox;
    return x >= left - 1 && x <= left + width + 1 && y >= top - 1 && y <= top + height + 1;
  }

  // Markers some way apart (at every value where there is no line), and a word at the end of each line.
  function finish(u, spec) {
    const ctx = u.ctx, scale = devicePixelRatio, words = [];
    ctx.save();
    spec.series.forEach((series, index) => {
      const values = u.data[index + 1];
      const colour = css(series.colour);
      ctx.fillStyle = ctx.strokeStyle = colour;
      ctx.lineWidth = 1.8 * scale;
      let last = -Infinity, end = null;
      values.forEach((value, i) => {
        if (value == null) return;
        const x = u.valToPos(u.data[0][i], "x", true), y = u.valToPos(value, "y", true);
        if (!inside(u, x, y)) return;
        end = y;
        if (series.marker && (!series.width || x - last >= 70 * scale)) {
          mark(ctx, series.marker, x, y, 3.2 * scale);
          last = x;
        }
      });
      if (series.label && end != null) words.push({ y: end, text: series.label, colour });
    });
    // Words that would lie on each other move apart, and stay beside the plot.
    const gap = 14 * scale, { left, top, width, height } = u.bbox;
    words.sort((one, other) => one.y - other.y);
    words.forEach((word, i) => { word.y = Math.max(word.y, i ? words[i - 1].y + gap : top); });
    for (let i = words.length - 1, most = top + height; i >= 0; i--, most -= gap) {
      words[i].y = Math.min(words[i].y, most);
      most = words[i].y;
    }
    ctx.font = FONT.replace("12px", `${12 * scale}px`);
    ctx.textBaseline = "middle";
    ctx.textAlign = "left";
    for (const word of words) {
      ctx.fillStyle = word.colour;
      ctx.fillText(word.text, left + width + 6 * scale, word.y);
    }
    ctx.restore();
  }

  function lines(spec) {
    const longest = Math.max(0, ...spec.series.map((series) => series.label.length));
    const series = spec.series.map((one) => ({
      label: `${SHAPES[one.marker] ?? ""} ${one.name}`.trim(), width: one.width, dash: one.dash,
      points: { show: false }, stroke: () => css(one.colour), value: (u, value) => shown(value, one.digits),
      paths: one.width ? undefined : () => null,
    }));
    return {
      scales: { x: { time: false, range: scaleOfSteps(spec) }, y: { range: rangeOf(spec) } },
      padding: [10, Math.max(28, 10 + 7 * longest), 0, 0],
      series: [{ label: spec.x.label, value: (u, value) => (value == null ? "–" : String(value)) }, ...series],
      bands: spec.bands.map(([high, low, colour]) => ({ series: [high + 1, low + 1], fill: () => css(colour) + "38" })),
      axes: [axis(spec.x.label, { incrs: whole(), space: 60, size: 32 }),
        axis(spec.y.label, { size: room, values: written })],
      legend: { markers: { width: 3, dash: (u, which) => (series[which - 1]?.dash.length ? "dashed" : "solid") } },
      cursor: { y: false, drag: { x: true, y: false }, points: { size: 8 } },
      hooks: { draw: [(u) => finish(u, spec)] },
      data: [spec.x.values, ...spec.series.map((one) => one.values)],
    };
  }

  // Maps --------------------------------------------------------------------------------------------------------------

  function rgb(colour) {
    return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  }

  function map(spec, say) {
    const x = spec.x.values, rows = spec.rows.length;
    const shades = Uint8Array.from(atob(spec.shades), (character) => character.charCodeAt(0));
    // A cell reaches half way to its neighbours.
    const ends = [2 * x[0] - (x[1] ?? x[0] + 1), ...x, 2 * x.at(-1) - (x.at(-2) ?? x.at(-1) - 1)];
    const edges = ends.slice(1).map((end, i) => (end + ends[i]) / 2);
    function cells(u) {
      const ctx = u.ctx, from = rgb(css("card")), to = rgb(css("s1"));
      const { left, top, width, height } = u.bbox;
      ctx.save();
      ctx.beginPath();
      ctx.rect(left, top, width, height);
      ctx.clip();
      const at = edges.map((edge) => Math.round(u.valToPos(edge, "x", true)));
      for (let row = 0; row < rows; row++) {
        const above = Math.round(top + (height * row) / rows), below = Math.round(top + (height * (row + 1)) / rows);
        for (let i = 0; i < x.length; i++) {
          const shade = shades[row * x.length + i];
          if (shade === 255 || at[i + 1] < left || at[i] > left + width) continue;
          const mixed = from.map((value, channel) => Math.round(value + (shade / 254) * (to[channel] - value)));
          ctx.fillStyle = `rgb(${mixed})`;
          ctx.fillRect(at[i], above, Math.max(1, at[i + 1] - at[i]), below - above);
        }
      }
      ctx.restore();
    }
    function tell(u) {
      const { idx, top } = u.cursor;
      if (idx == null || top < 0) { say(""); return; }
      const row = Math.min(rows - 1, Math.max(0, Math.floor((top / u.over.clientHeight) * rows)));
      const shade = shades[row * x.length + idx];
      const value = shade === 255 ? "–" : shown(spec.low + (shade / 254) * (spec.high - spec.low), 3);
      say(`${spec.x.label} ${x[idx]}, ${spec.y.label} ${spec.rows[row]}: ${value}`);
    }
    const every = Math.max(1, Math.ceil(rows / 10));
    const marks = spec.rows.map((_, i) => i).filter((i) => i % every === 0);
    return {
      scales: { x: { time: false, range: scaleOfSteps(spec) }, y: { range: [0, rows], dir: -1 } },
      padding: [10, 28, 0, 0],
      series: [{}, { show: true, paths: () => null, points: { show: false } }],
      axes: [axis(spec.x.label, { incrs: whole(), space: 60, size: 32, grid: { show: false } }),
        axis(spec.y.label, { size: room, grid: { show: false }, splits: () => marks.map((i) => i + 0.5),
          values: (u, splits) => splits.map((split) => spec.rows[Math.floor(split)]) })],
      legend: { show: false },
      cursor: { drag: { x: true, y: false }, points: { show: false } },
      hooks: { draw: [cells], setCursor: [tell] },
      data: [x, x.map(() => rows / 2)],
    };
  }

  // Figures -----------------------------------------------------------------------------------------------------------

  function draw(figure) {
    const box = figure.querySelector(".plot"), spec = JSON.parse(figure.querySelector("script").textContent);
    const [line, ramp, told] = ["p", "span", "span"].map((name) => document.createElement(name));
    line.className = "shown";
    ramp.className = "ramp";
    const isMap = spec.kind === "map";
    const { data, ...made } = isMap ? map(spec, (text) => { told.textContent = text; }) : lines(spec);
    const size = () => ({ width: box.clientWidth, height: 260 });
    const chart = new uPlot({ ...made, ...size() }, data, box);
    if (isMap) {
      line.append(shown(spec.low, 3), ramp, shown(spec.high, 3), document.createElement("br"), told);
      box.append(line);
    }
    new ResizeObserver(() => { if (box.clientWidth !== chart.width) chart.setSize(size()); }).observe(box);
    box.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const from = chart.cursor.idx ?? (move > 0 ? -1 : data[0].length);
      const index = Math.min(data[0].length - 1, Math.max(0, from + move));
      const top = chart.cursor.top > 0 ? chart.cursor.top : 1;
      chart.setCursor({ left: chart.valToPos(data[0][index], "x"), top });
    });
    drawn.push(chart);
  }

  // A page may have hundreds of them: each is drawn when it comes near the window, all before it is printed.
  const waiting = new Set(document.querySelectorAll("figure.chart"));
  const now = (figure) => { if (waiting.delete(figure)) draw(figure); };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { watcher.unobserve(entry.target); now(entry.target); }
  }, { rootMargin: "600px" });
  waiting.forEach((figure) => watcher.observe(figure));
  addEventListener("beforeprint", () => [...waiting].forEach(now));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((chart) => chart.redraw()));
})();

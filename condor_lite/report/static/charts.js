// Draws the charts with plotly: <div data-chart="KIND" data-from="ID">, where the element ID holds a JSON block.
// They are drawn anew when the data, the theme or, for prices, the newest price changes. Colours are the page's.
"use strict";

(() => {
  const query = (element) => document.getElementById(element.dataset.from).querySelector('script[type="application/json"]');
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const phone = matchMedia("(max-width: 44rem)");

  // What all have in common

  let colours;
  const readColours = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    colours = {
      ink: colour("ink"),
      faint: colour("faint"),
      line: colour("line"),
      strong: colour("strong-line"),
      card: colour("card"),
      bad: colour("bad"),
      warn: colour("warn"),
      series: [1, 2, 3, 4, 5, 6].map((n) => colour(`series-${n}`)),
      font: getComputedStyle(document.body).fontFamily,
    };
  };
  const fade = (hex, alpha) => {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  };
  const escape = (text) => text.replace(/[&<>]/g, (char) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[char]);
  const decimals = (price) => Math.max(2, 6 - String(Math.trunc(Math.abs(price))).length);

  // plotly shows times as they are written: in the reader's zone, by what its clocks say at the chart's end. An axis
  // that followed them through a change would have an hour twice, or none.
  let behind = 0;
  const clocks = ({ t, end }) => (behind = new Date((end ?? t?.at(-1) ?? 0) * 1000).getTimezoneOffset() * 60000);
  const local = (seconds) => new Date(seconds * 1000 - behind).toISOString().slice(0, 19).replace("T", " ");
  const times = (list) => list.map(local);

  const axis = (more) => ({
    gridcolor: colours.line, linecolor: colours.line, zerolinecolor: colours.strong, tickcolor: colours.line,
    automargin: true, fixedrange: true, ...more,
  });
  // The day is short: plotly leaves a label out that would not fit at the edge.
  const stops = [[null, 59999, "%H:%M:%S\n%b %-d"], [60000, 86399999, "%H:%M\n%b %-d"], [86400000, null, "%b %-d\n%Y"]]
    .map(([from, to, value]) => ({ dtickrange: [from, to], value }));
  const timeAxis = (more) => axis({ type: "date", showgrid: false, nticks: phone.matches ? 3 : 8, tickangle: 0, tickformatstops: stops, hoverformat: "%b %-d, %H:%M:%S", ...more });
  const layout = (more) => ({
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: colours.font, size: 12, color: colours.faint },
    margin: { l: 8, r: 8, t: 8, b: 8 },
    showlegend: false,
    hovermode: "x unified",
    hoverlabel: { namelength: -1, bgcolor: colours.card, bordercolor: colours.strong, font: { color: colours.ink, size: 12 } },
    dragmode: false,
    ...more,
  });
  const line = (x, y, colour, more = {}) => ({
    type: "scatter", mode: "lines", x, y, line: { color: colour, width: 1.5, ...(more.line || {}) }, ...more.trace,
  });
  const upright = (at, colour, dash = "dot") => ({
    type: "line", xref: "x", yref: "paper", x0: local(at), x1: local(at), y0: 0, y1: 1,
    line: { color: colour, width: 1, dash },
  });
  const label = (at, text) => ({
    x: local(at), y: 1, xref: "x", yref: "paper", text, showarrow: false, xanchor: "left", yanchor: "top",
    font: { size: 11, color: colours.faint }, xshift: 3,
  });

  // The charts

  const KINDS = {
    round(data) {
      const traces = [];
      const band = (fan, low, high, alpha) => {
        const x = times(fan.t);
        const colour = colours.series[fan.series - 1];
        const edge = { color: fade(colour, 0.5), width: low === 0 ? 1 : 0 };
        traces.push(line(x, fan.q[low], colour, { line: edge, trace: { hoverinfo: "skip" } }));
        traces.push(line(x, fan.q[high], colour, {
          line: edge,
          trace: { hoverinfo: "skip", fill: "tonexty", fillcolor: fade(colour, alpha) },
        }));
      };
      const at = (price) => `,.${decimals(price ?? 1)}f`;
      const format = at(data.p.find((price) => price !== null));
      data.fans.forEach((fan) => { band(fan, 0, 4, 0.06); band(fan, 1, 3, 0.16); });
      data.fans.forEach((fan) => {
        const colour = colours.series[fan.series - 1];
        traces.push(line(times(fan.t), fan.q[2], colour, {
          line: { width: 1.5, dash: "dot" },
          trace: {
            name: escape(fan.name),
            customdata: fan.q[0].map((low, k) => [low, fan.q[4][k]]),
            hovertemplate: `%{y:${format}} <span>(%{customdata[0]:${format}} … %{customdata[1]:${format}})</span>`,
          },
        }));
      });
      traces.push(line(times(data.t), data.p, colours.ink, {
        line: { width: 2 },
        trace: { name: "what happened", hovertemplate: `<b>%{y:${format}}</b>`, connectgaps: false },
      }));
      return [traces, layout({
        xaxis: timeAxis({ range: [local(Math.min(data.t[0] ?? data.start, data.start)), local(Math.max(data.t.at(-1) ?? data.end, data.end))] }),
        yaxis: axis({ side: "right", range: data.range ?? undefined, tickformat: format }),
        shapes: [upright(data.start, colours.strong, "solid"), upright(data.end, colours.strong)],
        annotations: [label(data.start, "asked"), { ...label(data.end, "end"), xanchor: "right", xshift: -3 }],
      })];
    },

    prices(data) {
      const colour = colours.series[0];
      const trace = line(times(data.t), data.p, colour, {
        trace: { hovertemplate: `%{y:,.${decimals(data.p.find((price) => price !== null) ?? 1)}f}<extra></extra>`, connectgaps: false },
      });
      return [[trace], layout({
        xaxis: timeAxis({ nticks: phone.matches ? 4 : 6 }),
        yaxis: axis({ side: "right", nticks: 5, tickformat: `,.${decimals(data.p.find((price) => price !== null) ?? 1)}~f` }),
      })];
    },

    score(data) {
      const x = times(data.t);
      const [recent, steady, anchor] = [colours.series[5], colours.series[1], colours.series[0]];
      const own = (name, width) => ({
        line: { width },
        trace: { name, hovertemplate: "%{y:+.2f}", connectgaps: false, mode: x.length === 1 ? "markers" : "lines", marker: { size: 7 } },
      });
      const marks = data.deployments.filter((one) => one.t >= data.t[0] && one.t <= data.t.at(-1));
      return [[
        line(x, data.recent, recent, own("recent, 24 h", 1)),
        line(x, data.steady, steady, own("steady, 3 d", 1.5)),
        line(x, data.anchor, anchor, own("anchor, 7 d", 2.5)),
      ], layout({
        xaxis: timeAxis(),
        yaxis: axis({ side: "right", tickformat: "+~g", zeroline: true }),
        shapes: marks.map((one) => upright(one.t, colours.warn)),
        annotations: marks.slice(-5).map((one) => ({
          ...label(one.t, "new version"), y: 0, yanchor: "bottom",
          ...(one.t > (data.t[0] + data.t.at(-1)) / 2 ? { xanchor: "right", xshift: -3 } : {}),
        })),
      })];
    },

    pit(data) {
      const n = data.shares.length;
      const x = data.shares.map((_, k) => (k + 0.5) / n);
      return [[{
        type: "bar", x, y: data.shares, marker: { color: fade(colours.series[0], 0.55) }, width: 0.92 / n,
        error_y: { type: "data", array: data.errors, visible: data.errors.some((error) => error !== null), color: colours.faint, thickness: 1, width: 0 },
        hovertemplate: "%{y:.1%}<extra></extra>",
      }], layout({
        hovermode: "closest",
        xaxis: axis({ range: [0, 1], showgrid: false, tickformat: ".0%", tickvals: [0, 0.25, 0.5, 0.75, 1] }),
        yaxis: axis({ side: "right", tickformat: ".0%", rangemode: "tozero", nticks: 5 }),
        shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1 / n, y1: 1 / n, line: { color: colours.ink, width: 1, dash: "dash" } }],
      })];
    },

    times(data) {
      const groups = [["SUCCESS", "answered", colours.series[0]], ["FAILED", "failed", colours.bad], ["TIMEOUT", "timed out", colours.warn]];
      return [groups.map(([status, name, colour]) => {
        const own = data.t.map((_, k) => k).filter((k) => data.status[k] === status);
        return {
          type: "scatter", mode: "markers", name, x: own.map((k) => local(data.t[k])), y: own.map((k) => data.ms[k]),
          marker: { color: fade(colour, 0.7), size: 5 }, hovertemplate: `%{y:,.3~g} ms, ${name}<extra></extra>`,
        };
      }), layout({
        hovermode: "closest",
        xaxis: timeAxis({ nticks: phone.matches ? 4 : 6 }),
        yaxis: axis({ side: "right", type: "log", ticksuffix: " ms", nticks: 5, dtick: Math.max(...data.ms) / Math.min(...data.ms) > 20 ? 1 : undefined }),
      })];
    },
  };

  // Drawing

  const config = { displayModeBar: false, responsive: true, displaylogo: false, showTips: false, staticPlot: false };
  const shown = new Map();

  const draw = (element) => {
    const block = query(element);
    if (!block) return;
    const data = shown.get(element) ?? JSON.parse(block.textContent);
    shown.set(element, data);
    clocks(data);
    const [traces, look] = KINDS[element.dataset.chart](data);
    element.querySelectorAll("noscript").forEach((note) => note.remove());
    window.Plotly.react(element, traces, look, config);
  };
  const charts = () => document.querySelectorAll("[data-chart]");
  const drawAll = () => {
    readColours();
    charts().forEach(draw);
  };

  document.addEventListener("condor:swapped", ({ detail }) => {
    for (const element of charts()) {
      if (detail.includes(element.dataset.from) || !shown.has(element)) {
        shown.delete(element);
        draw(element);
      }
    }
  });

  document.addEventListener("condor:prices", ({ detail }) => {
    for (const element of document.querySelectorAll('[data-chart="prices"]')) {
      const news = detail.assets.find(({ asset }) => asset === element.dataset.asset);
      const data = shown.get(element);
      if (!news || !data) continue;
      const at = Math.floor(Date.parse(news.ts) / 1000);
      if (data.t.length && at <= data.t.at(-1)) continue;
      data.t.push(at);
      data.p.push(news.price);
      while (data.t[0] < at - data.range) {
        data.t.shift();
        data.p.shift();
      }
      if (!document.hidden) draw(element);
    }
  });
  document.addEventListener("visibilitychange", () => !document.hidden && drawAll());
  dark.addEventListener("change", drawAll);
  phone.addEventListener("change", drawAll);
  drawAll();
})();

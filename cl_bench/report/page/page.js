"use strict";
// Sorts, filters and draws what cl_bench.report.page has computed; nothing is averaged or tested here.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// Okabe and Ito's palette without black and yellow and with two more, and lighter ones of the same hues for dark
// paper. Symbols move on by one with every lap, so that no two lines share colour and symbol before the 48th.
const COLOURS = {
  light: ["#0072B2", "#D55E00", "#009E73", "#C45C94", "#C98A00", "#3E9BD0", "#6A4C9C", "#7F6A4A"],
  dark: ["#5AB4F0", "#FF8A4C", "#3CCB9B", "#E79CC6", "#F0B93F", "#9AD0F5", "#B79CF0", "#CDB68F"],
};
const SYMBOLS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross"];
const DASHES = ["solid", "dot", "dashdot"];
const PATTERNS = ["", "/", "x"];
const PHASES = ["data_passes", "training", "evaluation", "checkpoints"];
const MOST_TICKED = 12; // lines in one chart at first: more can be ticked
const MOST_NUMBERED = 12; // experiences, in whose matrix a number still fits each cell
const RUNS_AT_ONCE = 100;
const UNDEFINED = "–";
const MATRIX_SCALE = [
  [0, "#440154"], [0.25, "#3b528b"], [0.5, "#21918c"], [0.75, "#5ec962"], [1, "#fde725"],
];

const state = {
  benchmark: 0,
  columns: [...data.shown, "seconds", "peak_megabytes", "trainable_parameters", "stored_megabytes"],
  sort: null, // {column, down}: none is the order of the report
  filter: "",
  status: "all",
  ticked: new Set(),
  metric: data.shown[0],
  reference: null,
  runs: RUNS_AT_ONCE,
};

// ---- small words ---------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function fill(id, ...children) {
  byId(id).replaceChildren(...children.filter((child) => child !== null));
}

const known = (value) => value !== null && value !== undefined;
const percent = (value) => (known(value) ? value.toFixed(2).replace("-", "−") : UNDEFINED);
const signed = (value) => (known(value) ? (value > 0 ? "+" : "") + percent(value) : UNDEFINED);
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");

function quantity(value) {
  if (!known(value)) return UNDEFINED;
  if (value >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

const isMetric = (name) => name in data.metrics;
const heading = (name) => (isMetric(name) ? data.metrics[name].short : data.costs[name]);
const benchmark = () => data.benchmarks[state.benchmark];
const value = (entry, name) => entry.statistics[name];

function isComplete(entry) {
  return entry.n === benchmark().blocks;
}

const FILTERS = {
  all: () => true,
  finished: (entry) => entry.n > 0,
  complete: isComplete,
  incomplete: (entry) => !isComplete(entry),
};

/** Entries that the filters leave, in the order of the table. */
function visible() {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const left = benchmark().entries.filter(
    (entry) => FILTERS[state.status](entry) && words.every((word) => entry.label.toLowerCase().includes(word)),
  );
  if (!state.sort) return left;
  const { column, down } = state.sort;
  const key = column === "label" ? (entry) => entry.label : (entry) => value(entry, column).mean;
  return [...left].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (!known(a) || !known(b)) return known(b) - known(a); // without a value: last, whichever way
    const order = typeof a === "string" ? a.localeCompare(b) : a - b;
    return down ? -order : order;
  });
}

/** Entries to draw: visible, ticked, and with a finished run. */
const drawn = () => visible().filter((entry) => entry.n > 0 && state.ticked.has(entry.label));

// ---- colours -------------------------------------------------------------------------------------

// By name over all benchmarks, not by rank: one strategy has one colour everywhere.
const LABELS = [
  ...new Set(data.benchmarks.flatMap((one) => one.entries.filter((entry) => !entry.joint).map((entry) => entry.label))),
].sort();

const paper = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function pen(entry) {
  if (entry.joint) return { colour: paper("faint"), symbol: "line-ew-open", dash: "dash", pattern: "" };
  const palette = COLOURS[isDark() ? "dark" : "light"];
  const place = LABELS.indexOf(entry.label);
  const lap = Math.floor(place / palette.length);
  return {
    colour: palette[place % palette.length],
    symbol: SYMBOLS[(place % palette.length + lap) % SYMBOLS.length],
    dash: DASHES[lap % DASHES.length],
    pattern: PATTERNS[lap % PATTERNS.length],
  };
}

function transparent(colour, alpha) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${red},${green},${blue},${alpha})`;
}

const SHAPES = {
  circle: "M2 7a5 5 0 1 0 10 0a5 5 0 1 0-10 0",
  square: "M3 3h8v8h-8z",
  "triangle-up": "M7 2l5.5 9h-11z",
  diamond: "M7 1l6 6l-6 6l-6-6z",
  "triangle-down": "M7 12l5.5-9h-11z",
  cross: "M5 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
  "line-ew-open": "M0 6h5v2h-5zM9 6h5v2h-5z",
};

/** The mark by which charts show an entry, for the table: the table is the legend of all of them. */
function mark(entry) {
  const { colour, symbol } = pen(entry);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  for (const [name, given] of Object.entries({ viewBox: "0 0 14 14", width: 12, height: 12, class: "mark", "aria-hidden": "true" }))
    svg.setAttribute(name, given);
  path.setAttribute("d", SHAPES[symbol]);
  path.setAttribute("fill", colour);
  svg.append(path);
  return svg;
}

// ---- charts --------------------------------------------------------------------------------------

function axis(title, more = {}) {
  return {
    title: { text: title, standoff: 8, font: { size: 12.5 } },
    gridcolor: paper("grid"), linecolor: paper("line"), zerolinecolor: paper("line"),
    tickcolor: paper("line"), ticks: "outside", ticklen: 4, automargin: true, fixedrange: true,
    ...more,
  };
}

function layout(more = {}) {
  return {
    paper_bgcolor: paper("paper"), plot_bgcolor: paper("paper"),
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: paper("ink") },
    margin: { l: 56, r: 18, t: 12, b: 46 },
    hoverlabel: { bgcolor: paper("panel"), bordercolor: paper("line"), font: { color: paper("ink") } },
    legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", font: { size: 11.5 } },
    hovermode: "closest",
    ...more,
  };
}

/** Height and lower margin of a chart with its legend below: a phone shows two names in a line, a desk six. */
function withLegend(height, names) {
  const across = Math.max(1, Math.floor(Math.min(innerWidth, 1080) / 180));
  const below = 24 * Math.ceil(names / across) + 6;
  return { height: height + below, margin: { l: 56, r: 18, t: 12, b: 46 + below } };
}

/** Draw a chart into an element, or say why there is none. */
function draw(target, traces, more, said, without = "Nothing to show: tick a strategy with finished runs in the table above.") {
  const box = typeof target === "string" ? byId(target) : target;
  if (!traces.length) {
    Plotly.purge(box);
    box.classList.remove("js-plotly-plot"); // purging leaves it, and with it the look of a chart
    box.replaceChildren(element("p", { class: "empty" }, without));
    return;
  }
  if (!box.classList.contains("js-plotly-plot")) box.replaceChildren();
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", said);
  Plotly.react(box, traces, layout(more), {
    responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtons: [["toImage"]], toImageButtonOptions: { format: "svg", filename: said.split(":")[0] },
  });
}

/** An axis of names, long ones cut: a phone has room for few characters beside a chart. */
function named(labels, more = {}) {
  const most = innerWidth < 640 ? 16 : 40;
  const cut = (label) => (label.length > most ? `${label.slice(0, most - 1)}…` : label);
  return axis("", { showgrid: false, ticks: "", tickvals: labels.map(escaped), ticktext: labels.map((label) => escaped(cut(label))), ...more });
}

function marker(entry, size = 10) {
  const { colour, symbol } = pen(entry);
  return { color: colour, symbol, size, line: { color: entry.joint ? colour : paper("paper"), width: entry.joint ? 2 : 1 } };
}

function whiskers(statistics, axisName) {
  const found = statistics.map((one) => one.std ?? 0);
  return found.some(Boolean) ? { [`error_${axisName}`]: { array: found, thickness: 1, width: 3, color: paper("faint") } } : {};
}

function curves() {
  const kind = byId("band").value;
  const [bands, traces] = [[], []];
  const entries = drawn().filter((entry) => entry.joint || entry.curve.length);
  const alpha = entries.length > 6 ? 0.06 : entries.length > 3 ? 0.1 : 0.16;
  const experiences = Array.from({ length: benchmark().length }, (_, i) => i + 1);
  for (const entry of entries) {
    const { colour, symbol, dash } = pen(entry);
    if (entry.joint) {
      const end = value(entry, "acc/sample").mean;
      traces.push({
        x: [experiences[0], experiences.at(-1)], y: [end, end], mode: "lines", name: escaped(entry.label),
        line: { color: colour, dash, width: 1.5 }, hovertemplate: `${escaped(entry.label)}, upper bound: %{y:.2f} %<extra></extra>`,
      });
      continue;
    }
    const bounds = entry.curve.map((point) =>
      kind === "interval" ? point.interval : kind === "std" && known(point.std) ? [point.mean - point.std, point.mean + point.std] : null,
    );
    if (bounds.every(known))
      bands.push({
        x: [...experiences, ...[...experiences].reverse()],
        y: [...bounds.map((bound) => bound[1]), ...bounds.map((bound) => bound[0]).reverse()],
        fill: "toself", fillcolor: transparent(colour, alpha), line: { width: 0.6, color: transparent(colour, 0.35) }, mode: "lines",
        hoverinfo: "skip", showlegend: false, legendgroup: entry.label,
      });
    traces.push({
      x: experiences, y: entry.curve.map((point) => point.mean), mode: "lines+markers", name: escaped(entry.label),
      legendgroup: entry.label, line: { color: colour, dash, width: 2 },
      marker: { color: colour, symbol, size: 7, line: { color: paper("paper"), width: 1 } },
      customdata: entry.curve.map((point) => (known(point.std) ? `± ${percent(point.std)}` : "")),
      hovertemplate: `${escaped(entry.label)}, %{x} learned: %{y:.2f} %{customdata} %<extra></extra>`,
    });
  }
  const means = entries.flatMap((entry) => (entry.joint ? [value(entry, "acc/sample").mean] : entry.curve.map((point) => point.mean)));
  const [low, high] = [Math.min(...means), Math.max(...means)];
  const room = Math.max(4, 0.12 * (high - low));
  draw("curve", [...bands, ...traces], {
    ...withLegend(400, entries.length),
    xaxis: axis("experiences learned", { dtick: experiences.length <= 12 ? 1 : undefined, range: [0.85, experiences.length + 0.15], showgrid: false }),
    yaxis: axis("accuracy over all classes seen (%)", { range: [Math.max(0, low - room), Math.min(101, high + room)] }),
  }, "Incremental accuracy: accuracy over all classes seen against experiences learned");
  const small = entries.some((entry) => !entry.joint && entry.n < 2);
  fill("curves-said", `Accuracy over the test images of all classes seen, after every experience; mean over runs.${small ? " A strategy with one run has no band: n too small." : ""} The axis may cut wide bands.`);
  numbers("curve-numbers", ["strategy", ...experiences.map(String)], entries.filter((entry) => !entry.joint).map((entry) => [
    entry.label, ...entry.curve.map((point) => `${percent(point.mean)}${known(point.std) ? ` ± ${percent(point.std)}` : ""}`),
  ]));
}

function numbers(id, header, lines) {
  const head = element("tr", {}, ...header.map((name) => element("th", { scope: "col" }, name)));
  const body = lines.map(([name, ...cells]) =>
    element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((cell) => element("td", {}, cell))));
  fill(id, element("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Numbers of the chart" },
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...body))));
}

/** Small square heat maps side by side: `tables` are {entry, rows, remark}. */
function heatmaps(id, tables, more) {
  const box = byId(id);
  const kept = new Map([...box.querySelectorAll("figure")].map((child) => [child.dataset.label, child]));
  const panels = tables.map(({ entry, rows, remark, said }) => {
    let panel = kept.get(entry.label);
    if (!panel) panel = element("figure", { style: "margin:0", "data-label": entry.label }, element("h4"), element("div", { class: "figure" }));
    const [title, chart] = panel.children;
    title.replaceChildren(mark(entry), document.createTextNode(entry.label), element("span", {}, remark));
    return { panel, chart, rows, said };
  });
  for (const child of kept.values()) if (!panels.some(({ panel }) => panel === child)) Plotly.purge(child.children[1]);
  box.replaceChildren(...panels.map(({ panel }) => panel));
  for (const { chart, rows, said } of panels) {
    const across = Math.max(...rows.map((row) => row.length));
    const size = chart.clientWidth || 230;
    const numbered = Math.max(across, rows.length) <= MOST_NUMBERED && (size - 34) / across > 15;
    const every = numbered ? 1 : Math.ceil(across / 6);
    const ticks = { showgrid: false, ticks: "", tickfont: { size: 10 }, zeroline: false, automargin: false };
    draw(chart, [{
      type: "heatmap", z: rows, x: Array.from({ length: across }, (_, j) => j + 1), y: rows.map((_, i) => i + more.first),
      zmin: more.low, zmax: more.high, colorscale: MATRIX_SCALE, showscale: false, xgap: 1.5, ygap: 1.5, hoverongaps: false,
      texttemplate: numbered ? "%{z:.0f}" : "", textfont: { size: Math.min(11, size / across / 2.7) }, hovertemplate: more.hover,
    }], {
      height: Math.max(120, Math.round(size * Math.min(1.4, rows.length / across)) + 12), margin: { l: 30, r: 4, t: 4, b: 30 },
      xaxis: axis("", { ...ticks, dtick: every, tick0: 1 }),
      yaxis: axis("", { ...ticks, dtick: rows.length > MOST_NUMBERED ? Math.ceil(rows.length / 6) : 1, tick0: more.first, autorange: more.down ? "reversed" : true }),
    }, said);
  }
}

function matrices() {
  const entries = drawn();
  const all = entries.flatMap((entry) => entry.matrix.flat().filter(known));
  const low = all.length ? Math.min(90, 10 * Math.floor(Math.min(...all) / 10)) : 0;
  const high = all.length ? Math.max(low + 10, 10 * Math.ceil(Math.max(...all) / 10)) : 100;
  const bar = element("i", { "aria-hidden": "true" });
  bar.style.background = `linear-gradient(to right, ${MATRIX_SCALE.map(([at, colour]) => `${colour} ${100 * at}%`).join(",")})`;
  fill("matrix-scale", `${low} %`, bar, `${high} %`);
  heatmaps("matrix-panels", entries.map((entry) => ({
    entry, rows: entry.matrix, remark: entry.n === 1 ? "1 run" : `${entry.n} runs`, said: `Accuracy matrix: ${entry.label}`,
  })), { low, high, first: 1, down: true, hover: "after %{y}, on %{x}: %{z:.2f} %<extra></extra>" });
  if (!entries.length) fill("matrix-panels", element("p", { class: "empty" }, "Nothing to show: tick a strategy with finished runs in the table above."));
}

/** Entries that no other beats in both cost and accuracy, by rising cost. */
function front(points) {
  const sorted = [...points].sort((one, other) => one.x - other.x || other.y - one.y);
  let best = -Infinity;
  return sorted.filter(({ y }) => y > best && (best = y) !== null);
}

function pareto() {
  const name = byId("cost-name").value;
  const metric = data.shown[0];
  const points = drawn()
    .map((entry) => ({ entry, x: value(entry, name).mean, y: value(entry, metric).mean }))
    .filter(({ x, y }) => known(x) && known(y));
  const logarithmic = byId("cost-log").checked && points.every(({ x }) => x > 0);
  const best = front(points.filter(({ entry }) => !entry.joint));
  const traces = points.map(({ entry, x, y }) => ({
    x: [x], y: [y], mode: "markers", name: escaped(entry.label), marker: marker(entry, 12), ...whiskers([value(entry, metric)], "y"),
    hovertemplate: `${escaped(entry.label)}: %{y:.2f} % at ${escaped(quantity(x))} ${escaped(data.costs[name])}<extra></extra>`,
  }));
  if (best.length > 1)
    traces.unshift({
      x: best.map(({ x }) => x), y: best.map(({ y }) => y), mode: "lines", line: { color: paper("faint"), width: 1, dash: "dot" },
      hoverinfo: "skip", showlegend: false,
    });
  draw("pareto", traces, {
    ...withLegend(380, points.length),
    xaxis: axis(data.costs[name], logarithmic ? { type: "log" } : { rangemode: "tozero" }),
    yaxis: axis(`${heading(metric)} (%)`),
  }, `Accuracy against cost: ${heading(metric)} against ${data.costs[name]}`, "No strategy that is ticked has measured this cost.");
}

function tasks() {
  const points = drawn()
    .map((entry) => ({ entry, x: value(entry, "task_id/sample"), y: value(entry, "within/sample") }))
    .filter(({ x, y }) => known(x.mean) && known(y.mean));
  const ends = (axisName) => {
    const found = points.map((point) => point[axisName].mean);
    const room = Math.max(4, 0.2 * (Math.max(...found) - Math.min(...found)));
    return [Math.max(0, Math.min(...found) - room), Math.min(100.5, Math.max(...found) + room)];
  };
  const traces = [];
  const annotations = [];
  if (points.length) {
    const [left, right] = ends("x");
    const [bottom, top] = ends("y");
    const [least, most] = [(left * bottom) / 100, (right * top) / 100];
    const step = most - least > 40 ? 10 : most - least > 15 ? 5 : most - least > 6 ? 2 : 1;
    for (let level = Math.ceil((least + 0.01) / step) * step; level < most; level += step) {
      const across = Array.from({ length: 60 }, (_, i) => left + ((right - left) * i) / 59).filter((x) => x > 0 && (100 * level) / x >= bottom && (100 * level) / x <= top);
      if (across.length < 8) continue;
      traces.push({
        x: across, y: across.map((x) => (100 * level) / x), mode: "lines", line: { color: paper("line"), width: 1, dash: "dot" },
        hoverinfo: "skip", showlegend: false,
      });
      annotations.push({ x: across[0], y: (100 * level) / across[0], text: String(level), showarrow: false, font: { size: 10, color: paper("faint") }, xanchor: "left", yanchor: "bottom" });
    }
    for (const { entry, x, y } of points)
      traces.push({
        x: [x.mean], y: [y.mean], mode: "markers", name: escaped(entry.label), marker: marker(entry, 12), ...whiskers([x], "x"), ...whiskers([y], "y"),
        hovertemplate: `${escaped(entry.label)}: task id %{x:.2f} %, within %{y:.2f} %, final ${percent(value(entry, "acc/sample").mean)} %<extra></extra>`,
      });
    draw("tasks", traces, {
      ...withLegend(400, points.length), annotations,
      xaxis: axis("experience found (%)", { range: [left, right], showgrid: false }), yaxis: axis("accuracy within the experience (%)", { range: [bottom, top], showgrid: false }),
    }, "Why a method loses: task-id accuracy against accuracy within the experience");
  } else draw("tasks", [], {}, "");
}

function domains() {
  const has = benchmark().entries.some((entry) => Object.keys(entry.domains || {}).length);
  byId("domains").hidden = !has;
  if (!has) return;
  const entries = drawn().filter((entry) => Object.keys(entry.domains).length);
  const traces = entries.map((entry) => ({
    type: "bar", name: escaped(entry.label), x: Object.keys(entry.domains), y: Object.values(entry.domains).map((one) => one.mean),
    marker: { color: pen(entry).colour, pattern: { shape: pen(entry).pattern, fgcolor: paper("paper"), fgopacity: 0.7, size: 6 } }, ...whiskers(Object.values(entry.domains), "y"),
    hovertemplate: `${escaped(entry.label)}, %{x}: %{y:.2f} %<extra></extra>`,
  }));
  draw("domain-bars", traces, {
    ...withLegend(360, entries.length), barmode: "group", bargap: 0.25, bargroupgap: 0.08,
    xaxis: axis("", { showgrid: false }), yaxis: axis("final accuracy (%)", { rangemode: "tozero" }),
  }, "By domain: final accuracy over the test images of each domain");
}

function inside() {
  const has = (part) => (entry) => entry.inside && part(entry.inside);
  const some = (list) => list.some(known);
  const parts = {
    "inside-violation": has((one) => Object.values(one.violation).some((kinds) => Object.values(kinds).some(some))),
    "inside-basis": has((one) => one.basis.some((layers) => layers.length)),
    "inside-angular": has((one) => one.angular),
    "inside-held": has((one) => some(one.held_out.before)),
  };
  const measured = benchmark().entries.filter((entry) => entry.inside);
  for (const [id, part] of Object.entries(parts)) byId(id).hidden = !measured.some(part);
  fill("inside-said", measured.length
    ? `Measured by the diagnostics callback in ${measured.map((entry) => entry.label).join(", ")}; means over the runs that have it.`
    : "Not recorded: no run of this benchmark had the diagnostics callback on.");
  const entries = drawn();
  violation(entries.filter(parts["inside-violation"]));
  basis(entries.filter(parts["inside-basis"]));
  angles(entries.filter(parts["inside-angular"]));
  heldOut(entries.filter(parts["inside-held"]));
}

function violation(entries) {
  if (byId("inside-violation").hidden) return;
  const kind = byId("violation-kind").value;
  const targets = [...new Set(entries.flatMap((entry) => Object.keys(entry.inside.violation[kind])))].sort();
  const traces = targets.flatMap((target, place) => entries.filter((entry) => entry.inside.violation[kind][target]).map((entry) => {
    const values = entry.inside.violation[kind][target];
    const { colour, symbol, dash } = pen(entry);
    return {
      x: values.map((_, layer) => layer), y: values, mode: "lines+markers", name: escaped(entry.label), legendgroup: entry.label, showlegend: place === 0,
      xaxis: place ? `x${place + 1}` : "x", yaxis: place ? `y${place + 1}` : "y", line: { color: colour, dash, width: 2 },
      marker: { color: colour, symbol, size: 7, line: { color: paper("paper"), width: 1 } },
      hovertemplate: `${escaped(entry.label)}, ${escaped(target)}, layer %{x}: %{y:.4f}<extra></extra>`,
    };
  }));
  // Where all is in the tenths or above a plain axis reads best; zero to rounding needs powers of ten.
  const values = traces.flatMap((trace) => trace.y).filter((y) => known(y) && y > 0);
  const wide = values.length > 0 && Math.max(...values) / Math.min(...values) > 100;
  const stacked = innerWidth < 640;
  const axes = {};
  const annotations = [];
  targets.forEach((target, place) => {
    const suffix = place ? place + 1 : "";
    const [start, end] = [place / targets.length, (place + 1) / targets.length];
    const room = [start + (place ? 0.06 : 0), end - (place + 1 < targets.length ? 0.02 : 0)];
    axes[`xaxis${suffix}`] = axis(stacked && place + 1 < targets.length ? "" : "layer", { anchor: `y${suffix}`, domain: stacked ? [0, 1] : room, dtick: 1, showgrid: false });
    axes[`yaxis${suffix}`] = axis(place && !stacked ? "" : "violation", {
      anchor: `x${suffix}`, domain: stacked ? [1 - end + (place + 1 < targets.length ? 0.1 : 0), 1 - start - 0.03] : [0, 1],
      ...(wide ? { type: "log", exponentformat: "power", dtick: 2 } : { rangemode: "tozero" }), ...(place ? { matches: "y" } : {}),
    });
    annotations.push({ text: `<b>${escaped(target.toUpperCase())}</b>`, xref: `x${suffix} domain`, yref: `y${suffix} domain`, x: 0.01, y: 1, yanchor: "top", showarrow: false });
  });
  draw("violation", traces, { ...withLegend(stacked ? 520 : 340, entries.length), annotations, ...axes }, `Null-space violation: ${kind}, by layer`);
}

function basis(entries) {
  if (byId("inside-basis").hidden) return;
  const tables = entries.map((entry) => {
    const grown = entry.inside.basis.filter((layers) => layers.length);
    return { entry, rows: grown[0].map((_, layer) => grown.map((layers) => layers[layer])), remark: "", said: `Basis growth: ${entry.label}` };
  });
  const all = tables.flatMap(({ rows }) => rows.flat()).filter(known);
  heatmaps("basis-panels", tables, { low: 0, high: Math.max(1, ...all), first: 0, down: false, hover: "matrix %{y}, after %{x}: %{z:.1f} directions<extra></extra>" });
}

function angles(entries) {
  if (byId("inside-angular").hidden) return;
  const box = byId("angular-panels");
  for (const chart of box.querySelectorAll(".js-plotly-plot")) Plotly.purge(chart);
  box.replaceChildren();
  for (const entry of entries) {
    const { nearest_old: x, own_centre: y } = entry.inside.angular;
    const danger = known(entry.inside.danger) ? `danger score ${entry.inside.danger.toFixed(3)}` : "";
    const chart = element("div", { class: "figure" });
    box.append(element("figure", { style: "margin:0" }, element("h4", {}, mark(entry), entry.label, element("span", {}, danger)), chart));
    const zone = (x0, x1, y0, y1, colour) => ({ type: "rect", x0, x1, y0, y1, line: { width: 0 }, fillcolor: transparent(colour, 0.1), layer: "below" });
    draw(chart, [{
      x, y, mode: "markers", marker: { color: transparent(pen(entry).colour, 0.65), size: 5 }, hovertemplate: "to the nearest old %{x:.3f}, to its own %{y:.3f}<extra></extra>",
    }], {
      height: 240, margin: { l: 34, r: 6, t: 6, b: 34 }, showlegend: false,
      shapes: [zone(0.5, 1.02, -0.25, 0.5, "#d55e00"), zone(-0.25, 0.5, 0.7, 1.02, "#009e73")],
      xaxis: axis("", { range: [Math.min(-0.05, ...x) - 0.02, 1.02], zeroline: false }), yaxis: axis("", { range: [Math.min(-0.05, ...y) - 0.02, 1.02], zeroline: false }),
    }, `Angles: ${entry.label}`);
  }
}

function heldOut(entries) {
  if (byId("inside-held").hidden) return;
  const traces = entries.flatMap((entry) => {
    const { colour, symbol } = pen(entry);
    return ["before", "after"].map((when) => {
      const values = entry.inside.held_out[when];
      return {
        x: values.map((_, i) => i + 1), y: values, mode: "lines+markers", name: escaped(entry.label), line: { color: colour, width: 2, dash: when === "before" ? "dot" : "solid" },
        showlegend: when === "after", legendgroup: entry.label,
        marker: { color: colour, symbol, size: 7 }, hovertemplate: `${escaped(entry.label)}, ${when} learning %{x}: %{y:.2f} %<extra></extra>`,
      };
    });
  });
  draw("held", traces, { ...withLegend(320, entries.length), xaxis: axis("experience", { dtick: 1, showgrid: false }), yaxis: axis("nearest-mean accuracy (%)") }, "Nearest mean on classes outside of the stream: before and after learning");
}

function phases() {
  const entries = drawn().filter((entry) => known(value(entry, "seconds").mean)).reverse();
  const shades = isDark() ? ["#7d8794", "#5AB4F0", "#3CCB9B", "#F0B93F"] : ["#9aa3ad", "#0072B2", "#009E73", "#E69F00"];
  const traces = PHASES.map((phase, place) => ({ phase, place, seconds: entries.map((entry) => value(entry, `seconds/${phase}`).mean) }))
    .filter(({ seconds }) => seconds.some((one) => known(one) && one > 0))
    .map(({ phase, place, seconds }) => ({
      type: "bar", orientation: "h", name: phase.replace("_", " "), y: entries.map((entry) => escaped(entry.label)), x: seconds,
      marker: { color: shades[place] }, hovertemplate: `%{y}, ${phase.replace("_", " ")}: %{x:.1f} s<extra></extra>`,
    }));
  draw("phases", traces, {
    height: 110 + 30 * entries.length, barmode: "stack", bargap: 0.3,
    xaxis: axis("seconds"), yaxis: named(entries.map((entry) => entry.label)), legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal", font: { size: 11.5 } },
    margin: { l: 56, r: 18, t: 34, b: 46 },
  }, "Time by phase: seconds of a whole run", "No run that is ticked has measured its seconds.");
}

// ---- differences ---------------------------------------------------------------------------------

const NOISE = "possibly noise";
const VERDICTS = { [NOISE]: "noise", "significant after Holm": "clear" };
const isClear = (pair) => pair.interval && pair.verdict !== NOISE;

/** Differences to the reference, as `entry - reference`, in the order of the table. */
function differences() {
  const entries = benchmark().entries;
  const made = benchmark().differences[state.metric] || [];
  const shown = new Set(visible().map((entry) => entry.label));
  return made
    .filter((pair) => [entries[pair.first].label, entries[pair.second].label].includes(state.reference))
    .map((pair) => {
      if (entries[pair.second].label === state.reference) return { ...pair, entry: entries[pair.first] };
      const [wins, ties, losses] = pair.score;
      return {
        ...pair, entry: entries[pair.second], mean: known(pair.mean) ? -pair.mean : null,
        interval: pair.interval && [-pair.interval[1], -pair.interval[0]], score: [losses, ties, wins],
      };
    })
    .filter((pair) => shown.has(pair.entry.label))
    .sort((one, other) => (other.mean ?? -1e9) - (one.mean ?? -1e9));
}

function forest() {
  const made = differences();
  const found = made.filter((pair) => known(pair.mean)).reverse();
  const traces = [];
  for (const clear of [true, false]) {
    const pairs = found.filter((pair) => Boolean(isClear(pair)) === clear);
    if (!pairs.length) continue;
    const colour = clear ? paper("good") : paper("faint");
    traces.push({
      x: pairs.map((pair) => pair.mean), y: pairs.map((pair) => escaped(pair.entry.label)), mode: "markers", name: clear ? "interval clear of zero" : "possibly noise, or n too small",
      marker: { color: colour, size: 10, symbol: clear ? "circle" : "circle-open", line: { width: 2, color: colour } },
      error_x: { array: pairs.map((pair) => (pair.interval ? pair.interval[1] - pair.mean : 0)), thickness: 2, width: 5, color: colour },
      customdata: pairs.map((pair) => pair.verdict), hovertemplate: "%{y}: %{x:+.2f} points, %{customdata}<extra></extra>",
    });
  }
  // The widest interval of two blocks would flatten all others; the table below has it in full.
  const widest = 4 * Math.max(1, ...found.map((pair) => Math.abs(pair.mean)));
  const ends = [0, ...found.flatMap((pair) => pair.interval || [pair.mean])];
  const [low, high] = [Math.max(-widest, Math.min(...ends)), Math.min(widest, Math.max(...ends))];
  const room = Math.max(0.4, 0.06 * (high - low));
  draw("forest", traces, {
    height: 120 + 34 * found.length, margin: { l: 56, r: 18, t: 10, b: 46 },
    xaxis: axis(`${heading(state.metric)} minus that of ${escaped(state.reference)}, in points`, { range: [low - room, high + room], zeroline: true, zerolinecolor: paper("ink"), zerolinewidth: 1 }),
    yaxis: named(found.map((pair) => pair.entry.label), { categoryorder: "array", categoryarray: found.map((pair) => escaped(pair.entry.label)) }),
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 11.5 } },
  }, `Differences: ${heading(state.metric)} against ${state.reference}`, "There are no two strategies with a shared seed and class order to compare.");
  const head = ["strategy", "Δ", "95 % interval", "shared blocks", "win/tie/loss", "p (Holm)", "verdict"];
  const rows = made.map((pair) => element("tr", {},
    element("th", { scope: "row" }, pair.entry.label),
    element("td", {}, signed(pair.mean)),
    element("td", {}, pair.interval ? `[${signed(pair.interval[0])}, ${signed(pair.interval[1])}]` : "n too small"),
    element("td", {}, String(pair.n)),
    element("td", {}, pair.score.join("/")),
    element("td", {}, known(pair.p) ? String(Number(pair.p.toPrecision(2))) : "n too small"),
    element("td", { class: `text ${VERDICTS[pair.verdict] ?? ""}` }, pair.verdict)));
  fill("pairs", element("thead", {}, element("tr", {}, ...head.map((name, i) => element("th", { scope: "col", class: i === 6 ? "text" : null }, name)))), element("tbody", {}, ...rows));
  const better = data.metrics[state.metric].higher ? "More is better" : "Less is better";
  fill("differences-said", `Each strategy minus ${state.reference}. ${better}. ${data.how.replace("the first line minus the second", "taken")}`);
}

function references() {
  const finished = benchmark().entries.filter((entry) => entry.n && !entry.joint);
  if (!finished.some((entry) => entry.label === state.reference)) state.reference = finished[0]?.label ?? "";
  fill("reference", ...finished.map((entry) => element("option", { value: entry.label, selected: entry.label === state.reference }, entry.label)));
  fill("metric", ...data.shown.map((name) => element("option", { value: name, selected: name === state.metric }, `${heading(name)} (${name})`)));
}

// ---- the table -----------------------------------------------------------------------------------

/** Whether a line is ranked: upper bounds are not, nor what lacks a block where another lacks none. */
function isRanked(entry) {
  const whole = (one) => !one.joint && one.n === benchmark().blocks;
  return benchmark().entries.some(whole) ? whole(entry) : !entry.joint;
}

/** Means that are best and second best as printed, of what is ranked. */
function best(name) {
  const means = benchmark().entries.filter(isRanked).map((entry) => value(entry, name).mean).filter(known).map((mean) => mean.toFixed(2));
  const sorted = [...new Set(means)].sort((one, other) => (data.metrics[name].higher ? other - one : one - other));
  return sorted;
}

function cell(entry, name, ranked) {
  const one = value(entry, name);
  if (!entry.n) return element("td", { class: "word" }, entry.statuses.join(", ") || "missing");
  if (!one.n) return element("td", { class: "undefined" }, UNDEFINED);
  if (!isMetric(name)) return element("td", {}, quantity(one.mean));
  const place = isRanked(entry) ? ranked.indexOf(one.mean.toFixed(2)) : -1;
  const deviation = known(one.std) ? element("span", { class: "deviation" }, ` ± ${percent(one.std)}`) : null;
  const count = one.n === benchmark().blocks ? null : element("span", { class: "count" }, ` (${one.n} of ${benchmark().blocks})`);
  const interval = one.interval ? `95 % t interval [${percent(one.interval[0])}, ${percent(one.interval[1])}]` : "interval: n too small";
  const bootstrap = one.bootstrap ? `; bootstrap [${percent(one.bootstrap[0])}, ${percent(one.bootstrap[1])}]` : "";
  return element("td", { title: interval + bootstrap },
    element("span", { class: ["best", "second"][place] ?? null }, percent(one.mean)), deviation, count);
}

function sortButton(column, title) {
  const active = state.sort?.column === column;
  const button = element("button", { type: "button", "data-column": column, title: isMetric(column) ? data.metrics[column].definition : null, onclick: () => {
    const first = column === "label" ? false : isMetric(column) ? data.metrics[column].higher : false;
    if (!active) state.sort = { column, down: first };
    else if (state.sort.down === first) state.sort.down = !first;
    else state.sort = null;
    render();
    document.querySelector(`#table button[data-column="${CSS.escape(column)}"]`).focus();
  } }, title);
  return element("th", { scope: "col", "aria-sort": active ? (state.sort.down ? "descending" : "ascending") : "none" }, button);
}

function table() {
  const entries = visible();
  const ranked = Object.fromEntries(state.columns.filter(isMetric).map((name) => [name, best(name)]));
  const head = element("tr", {}, sortButton("label", "strategy"), ...state.columns.map((name) => sortButton(name, heading(name))));
  const rows = entries.map((entry) => {
    const tick = entry.n ? element("input", { type: "checkbox", checked: state.ticked.has(entry.label), "aria-label": `Draw ${entry.label}`, onchange: (event) => {
      if (event.target.checked) state.ticked.add(entry.label); else state.ticked.delete(entry.label);
      charts();
    } }) : null;
    const name = element("label", { class: "line" }, tick, mark(entry), entry.joint ? `${entry.label} †` : entry.label);
    return element("tr", {}, element("th", { scope: "row" }, name), ...state.columns.map((column) => cell(entry, column, ranked[column])));
  });
  fill("table", element("thead", {}, head), element("tbody", {}, ...rows));
  if (!rows.length) byId("table").tBodies[0].append(element("tr", {}, element("td", { colspan: state.columns.length + 1 }, "No strategy matches.")));
  const bound = entries.some((entry) => entry.joint) ? " † Upper bound: trained on all classes at once, so what happens on the way is undefined (–) and it is not ranked." : "";
  const spared = entries.some((entry) => entry.n && !entry.joint && !isRanked(entry)) ? " What lacks seeds or class orders that another line finished is not ranked." : "";
  fill("results-note", `Mean ± sample standard deviation over ${benchmark().blocks} ${benchmark().blocks === 1 ? "block (seed and class order)" : "blocks (seeds and class orders)"}, or as many as stand behind it. Bold: best; underlined: second. Charts below draw what is ticked.${bound}${spared} A cell in words has no finished run. Point at a cell for its 95 % interval.`);
}

function absent() {
  const { absent: gone, copies, unnamed } = benchmark();
  const lines = gone.map((one) => `${one.label}, seed ${one.seed}, class order ${one.order}: ${one.status}${one.error ? `: ${one.error}` : ""}`);
  if (copies) lines.push(`${copies} more result files repeat a cell that is counted once`);
  const list = (items) => element("ul", {}, ...items.map((line) => element("li", {}, line)));
  const settings = Object.entries(unnamed).map(([name, keys]) => `${name}: ${keys.join(", ")}`);
  fill("absent",
    lines.length ? element("details", { class: "alert", open: lines.length <= 4 }, element("summary", {}, `In no mean: ${lines.length} ${lines.length === 1 ? "run" : "runs"}`), list(lines.slice(0, 200)), lines.length > 200 ? `and ${lines.length - 200} more` : null) : null,
    settings.length ? element("details", {}, element("summary", {}, "Further settings in which lines of one name differ"), list(settings)) : null);
}

function columnChoice() {
  const names = [...Object.keys(data.metrics), ...Object.keys(data.costs)];
  fill("columns", ...names.map((name) => element("label", {}, element("input", { type: "checkbox", value: name, checked: state.columns.includes(name), onchange: (event) => {
    const chosen = new Set(state.columns);
    if (event.target.checked) chosen.add(name); else chosen.delete(name);
    state.columns = names.filter((one) => chosen.has(one));
    if (state.sort && state.sort.column !== "label" && !chosen.has(state.sort.column)) state.sort = null;
    render();
  } }), isMetric(name) ? ` ${name}` : ` ${data.costs[name]}`)));
}

// ---- protocol and provenance ---------------------------------------------------------------------

function protocol() {
  const one = benchmark();
  fill("protocol-said", `Protocol ${one.fingerprint}. Two results share a table only if all of it is equal; seeds and class orders are the blocks of the statistics.`);
  fill("mixed", one.mixed.length ? element("div", { class: "alert" }, "Mixed provenance (number of runs); seconds may not compare:", element("ul", {}, ...one.mixed.map((line) => element("li", {}, line)))) : null);
  const rows = (table) => Object.entries(table).map(([key, text]) => element("tr", {}, element("td", {}, key), element("td", {}, text)));
  fill("identity", element("tbody", {}, ...rows(one.identity)));
  fill("definitions", element("tbody", {}, ...rows(Object.fromEntries(Object.entries(data.metrics).map(([name, { definition }]) => [name, definition])))));
  fill("runs-entry", element("option", { value: "" }, "all"), ...one.entries.map((entry) => element("option", { value: entry.label }, entry.label)));
}

function runs() {
  if (!byId("runs-details").open) return; // ten thousand lines are not built for nobody
  const wanted = byId("runs-entry").value;
  const all = benchmark().entries.filter((entry) => !wanted || entry.label === wanted).flatMap((entry) => entry.runs.map((run) => [entry, run]));
  const head = ["strategy", "seed", "class order", "status", ...data.shown.map(heading), "seconds", "cell", "commit", "device", "threads", "started", "versions"];
  const rows = all.slice(0, state.runs).map(([entry, run]) => element("tr", {},
    element("td", {}, entry.label), element("td", {}, String(run.seed)), element("td", {}, run.order),
    element("td", { class: run.status === "done" ? null : "word", title: run.error || null }, run.status), ...run.values.map((one) => element("td", {}, percent(one))),
    element("td", {}, quantity(run.seconds)), element("td", {}, element("code", {}, run.cell)), element("td", {}, element("code", {}, run.commit)),
    element("td", {}, run.device), element("td", {}, known(run.threads) ? String(run.threads) : ""), element("td", {}, run.started), element("td", { class: "text" }, run.versions)));
  fill("runs", element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))), element("tbody", {}, ...rows));
  byId("runs-more").hidden = all.length <= state.runs;
  byId("runs-more").textContent = `Show more (${all.length - state.runs})`;
}

// ---- all together --------------------------------------------------------------------------------

function charts() {
  for (const chart of [curves, matrices, pareto, tasks, domains, inside, phases]) chart();
}

function render() {
  table();
  forest();
  charts();
  runs();
}

function enter() {
  const finished = benchmark().entries.filter((entry) => entry.n);
  state.ticked = new Set(finished.slice(0, MOST_TICKED).map((entry) => entry.label));
  state.runs = RUNS_AT_ONCE;
  // The t interval of two runs is as wide as the axis: it is there to be asked for.
  byId("band").value = finished.every((entry) => entry.joint || entry.n > 2) ? "interval" : "std";
  fill("results-said", benchmark().sentence);
  const costs = Object.keys(data.costs).filter((name) => !name.startsWith("seconds/"));
  const chosen = byId("cost-name").value;
  fill("cost-name", ...costs.map((name) => element("option", { value: name, selected: name === chosen }, data.costs[name])));
  absent();
  references();
  protocol();
  render();
}

function opening() {
  const count = data.benchmarks.reduce((sum, one) => sum + one.entries.reduce((runs, entry) => runs + entry.n, 0), 0);
  const list = (items) => element("ul", {}, ...items.map((line) => element("li", {}, line)));
  fill("opening",
    element("h1", {}, data.title),
    element("p", { class: "said" }, `${count} finished ${count === 1 ? "run" : "runs"} on ${data.benchmarks.length} ${data.benchmarks.length === 1 ? "benchmark" : "benchmarks"}.`),
    data.protocols.length ? element("div", { class: "alert", id: "protocols" }, element("strong", {}, "Unequal protocols are kept apart."), list(data.protocols)) : null,
    data.unreadable.length ? element("div", { class: "alert" }, element("strong", {}, "Not read:"), list(data.unreadable)) : null);
  fill("footer", `Written by cl-bench ${data.version} from result files alone. This file holds all it shows and asks no host for anything.`);
  fill("benchmark", ...data.benchmarks.map((one, place) => element("option", { value: place }, one.title)));
  const titles = { results: "Results", differences: "Differences", curves: "Curves", matrices: "Matrices", cost: "Cost", why: "Why", domains: "Domains", inside: "Inside", time: "Time", protocol: "Protocol" };
  const anyDomain = data.benchmarks.some((one) => one.entries.some((entry) => Object.keys(entry.domains || {}).length));
  fill("sections", ...Object.entries(titles).filter(([id]) => id !== "domains" || anyDomain).map(([id, name]) => element("a", { href: `#${id}` }, name)));
}

const THEMES = { "": ["light", "◐", "as the system has them"], light: ["dark", "☀", "light"], dark: ["", "☾", "dark"] };

function nextTheme() {
  const root = document.documentElement;
  const [next] = THEMES[root.dataset.theme ?? ""];
  if (next) root.dataset.theme = next; else delete root.dataset.theme;
  const [, sign, name] = THEMES[next];
  byId("theme").textContent = sign;
  byId("theme").setAttribute("aria-label", `Colours: ${name}`);
  render();
}

function listen() {
  const on = (id, event, action) => byId(id).addEventListener(event, action);
  on("benchmark", "change", (event) => { state.benchmark = Number(event.target.value); state.sort = null; enter(); });
  on("theme", "click", nextTheme);
  on("filter", "input", (event) => { state.filter = event.target.value; render(); });
  on("status", "change", (event) => { state.status = event.target.value; render(); });
  on("metric", "change", (event) => { state.metric = event.target.value; forest(); });
  on("reference", "change", (event) => { state.reference = event.target.value; forest(); });
  on("band", "change", curves);
  on("cost-name", "change", pareto);
  on("cost-log", "change", pareto);
  on("violation-kind", "change", inside);
  on("runs-details", "toggle", runs);
  on("runs-entry", "change", () => { state.runs = RUNS_AT_ONCE; runs(); });
  on("runs-more", "click", () => { state.runs += RUNS_AT_ONCE; runs(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
  let waiting;
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar comes and goes
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(charts, 150);
  });
}

opening();
columnChoice();
listen();
enter();
document.documentElement.dataset.ready = "yes";

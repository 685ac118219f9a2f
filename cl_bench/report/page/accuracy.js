"use strict";
// Charts of the results: differences, accuracy over the stream, cost, and why a method loses.

// ---- differences ---------------------------------------------------------------------------------

const NOISE = "possibly noise";
const VERDICTS = { [NOISE]: "faint", "significant after Holm": "clear" };

/** Return the differences to the reference, as `entry - reference`, the largest first. */
function differences() {
  const { entries, differences: made } = benchmark();
  const shown = new Set(visible());
  return (made[state.metric] ?? [])
    .map((pair) => ({ ...pair, entry: entries[pair.first], other: entries[pair.second] }))
    .map((pair) => {
      if (pair.entry.label !== state.reference) return pair;
      const [wins, ties, losses] = pair.score;
      return {
        ...pair,
        entry: pair.other,
        other: pair.entry,
        mean: known(pair.mean) ? -pair.mean : null,
        interval: pair.interval && [-pair.interval[1], -pair.interval[0]],
        score: [losses, ties, wins],
      };
    })
    .filter((pair) => pair.other.label === state.reference && shown.has(pair.entry))
    .sort((one, other) => (other.mean ?? -1e9) - (one.mean ?? -1e9));
}

function forest() {
  const made = differences();
  const found = made.filter((pair) => known(pair.mean)).reverse();
  const ends = [0, ...found.flatMap((pair) => [pair.mean, ...(pair.interval ?? [])])];
  const most = reach(ends); // the table below has what lies beyond
  const [low, high] = [Math.max(-most, least(ends)), Math.min(most, greatest(ends))];
  const room = Math.max(0.4, 0.06 * (high - low));
  const cut = found.filter(({ mean }) => mean < low || mean > high);
  const traces = [true, false]
    .map((clear) => {
      const pairs = found.filter((pair) => Boolean(pair.interval && pair.verdict !== NOISE) === clear);
      const color = paper(clear ? "good" : "faint");
      return {
        x: pairs.map((pair) => (cut.includes(pair) ? null : pair.mean)),
        y: pairs.map((pair) => escaped(pair.entry.label)),
        mode: "markers",
        name: clear ? "interval clear of zero" : "possibly noise, or n too small",
        marker: { color, size: 10, symbol: clear ? "circle" : "circle-open", line: { width: 2, color } },
        error_x: {
          type: "data",
          symmetric: false,
          array: pairs.map((pair) => (pair.interval ? pair.interval[1] - pair.mean : 0)),
          arrayminus: pairs.map((pair) => (pair.interval ? pair.mean - pair.interval[0] : 0)),
          thickness: 2,
          width: 5,
          color,
        },
        customdata: pairs.map((pair) => pair.verdict),
        hovertemplate: "%{y}: %{x:+.2f} points, %{customdata}<extra></extra>",
      };
    })
    .filter((trace) => trace.x.length);
  draw(
    byId("forest"),
    traces,
    {
      height: 120 + 34 * found.length,
      margin: { l: 56, r: 18, t: 10, b: 46 },
      legend: LEGEND_ABOVE,
      annotations: cut.map(({ mean, entry }) =>
        beyond(signed(mean), mean > 0 ? high + room : low - room, escaped(entry.label), mean > 0),
      ),
      xaxis: axis(`${heading(state.metric)} minus that of ${escaped(state.reference)}, in points`, {
        range: [low - room, high + room],
        zeroline: true,
        zerolinecolor: paper("ink"),
        zerolinewidth: 1,
      }),
      yaxis: named(
        found.map((pair) => pair.entry.label),
        { categoryorder: "array", categoryarray: found.map((pair) => escaped(pair.entry.label)) },
      ),
    },
    `Differences: ${heading(state.metric)} against ${state.reference}`,
    "No two strategies share a seed and class order to compare.",
  );
  showPairs(made);
  const better = data.metrics[state.metric].higher ? "More is better" : "Less is better";
  fill("differences-description", `Each strategy minus ${state.reference}. ${better}. ${data.how}`);
}

// ---- accuracy ------------------------------------------------------------------------------------

function curves() {
  const kind = byId("band").value;
  const entries = drawn().filter((entry) => entry.joint || entry.curve.length);
  const learned = Array.from({ length: benchmark().length }, (_, i) => i + 1);
  const alpha = entries.length > 6 ? 0.06 : entries.length > 3 ? 0.1 : 0.16;
  const bounds = (mean) =>
    kind === "interval"
      ? mean.interval
      : kind === "std" && known(mean.std)
        ? spread(mean)
        : null;
  const band = (entry) => {
    const found = entry.curve.map(bounds);
    const { colour } = pen(entry);
    return found.length && found.every(known)
      ? [
          {
            x: [...learned, ...learned.toReversed()],
            y: [...found.map(([, high]) => high), ...found.map(([low]) => low).reverse()],
            fill: "toself",
            fillcolor: transparent(colour, alpha),
            line: { width: 0.6, color: transparent(colour, 0.35) },
            mode: "lines",
            hoverinfo: "skip",
            showlegend: false,
            legendgroup: entry.label,
          },
        ]
      : [];
  };
  const means = (entry) =>
    entry.joint ? learned.map(() => value(entry, "acc/sample").mean) : entry.curve.map((mean) => mean.mean);
  const deviation = ({ std }) => (known(std) ? ` ± ${percent(std)}` : "");
  const traces = entries.map((entry) => ({
    ...line(entry),
    ...(entry.joint ? { mode: "lines" } : {}),
    x: learned,
    y: means(entry),
    customdata: entry.curve.map(deviation),
    hovertemplate: `${escaped(entry.label)}${entry.joint ? ", upper bound" : ", %{x} learned"}: %{y:.2f}%{customdata} %<extra></extra>`,
  }));
  const all = entries.flatMap(means);
  const [low, high] = [least(all), greatest(all)];
  const room = Math.max(4, 0.12 * (high - low));
  draw(
    byId("curve"),
    [...entries.flatMap(band), ...traces],
    {
      ...withLegend(400, entries.length),
      xaxis: axis("experiences learned", {
        dtick: learned.length <= 12 ? 1 : undefined,
        range: [0.85, learned.length + 0.15],
        showgrid: false,
      }),
      yaxis: axis("accuracy over all classes seen (%)", {
        range: [Math.max(0, low - room), Math.min(100, high + room)],
      }),
    },
    "Incremental accuracy: accuracy over all classes seen against experiences learned",
  );
  const single = entries.some((entry) => !entry.joint && entry.n < 2)
    ? " A strategy with one run has no band: n too small."
    : "";
  fill(
    "curves-description",
    `Accuracy over the images of all classes seen, after every experience; mean over runs.${single} The axis may cut wide bands.`,
  );
  plain(
    "curve-numbers",
    ["strategy", ...learned],
    entries
      .filter((entry) => !entry.joint)
      .map((entry) => [entry.label, ...entry.curve.map((mean) => percent(mean.mean) + deviation(mean))]),
  );
}

function matrices() {
  const entries = drawn();
  const all = entries.flatMap((entry) => entry.matrix.flat().filter(known));
  const low = all.length ? Math.min(90, 10 * Math.floor(least(all) / 10)) : 0;
  const high = all.length ? Math.max(low + 10, 10 * Math.ceil(greatest(all) / 10)) : 100;
  fill(
    "matrix-scale",
    `${low} %`,
    element("i", { "aria-hidden": "true", style: `background: ${GRADIENT}` }),
    `${high} %`,
  );
  const how = { low, high, first: 1, down: true, hover: "after %{y}, on %{x}: %{z:.2f} %<extra></extra>" };
  panels(
    "matrix-panels",
    entries,
    (entry) => counted(entry.n, "run"),
    (entry, box) => heatmap(box, entry.matrix, how, `Accuracy matrix: ${entry.label}`),
  );
}

/** Show a section of the page and its link only if some entry of the benchmark has what it draws. */
function showSection(id, has) {
  const found = benchmark().entries.some(has);
  byId(id).hidden = !found;
  document.querySelector(`nav a[href='#${id}']`).hidden = !found;
  for (const scale of byId(id).querySelectorAll(".heat")) scale.style.background = GRADIENT;
  return found;
}

function confusion() {
  if (!showSection("confusion", (entry) => entry.confusion)) return;
  const kind = byId("confusion-kind").value;
  panels(
    "confusion-panels",
    drawn().filter((entry) => entry.confusion?.[kind]),
    (entry) => counted(entry.confusion.runs, "run"),
    (entry, box) => {
      const { names, rows } = entry.confusion[kind];
      const name = (i) => escaped(names ? names[i] : `experience ${i + 1}`);
      const hover = (i, j) => `${name(i)} as ${name(j)}`;
      heatmap(box, rows, { low: 0, high: 100, first: 1, down: true, hover }, `Confusion of ${kind}: ${entry.label}`);
    },
    kind === "classes" ? "Nothing to show: too many classes for a matrix, or no strategy is ticked." : NOTHING,
  );
}

function classes() {
  if (!showSection("classes", (entry) => entry.classes)) return;
  panels(
    "classes-panels",
    drawn().filter((entry) => entry.classes),
    (entry) => counted(entry.classes.runs, "run"),
    (entry, box) => {
      const { names, rows } = entry.classes;
      const hover = (i, j) => `${escaped(names[i])} after ${j + 1}`;
      heatmap(box, rows, { low: 0, high: 100, first: 1, down: true, hover }, `Accuracy by class: ${entry.label}`);
    },
  );
}

// ---- why, where and at what cost -----------------------------------------------------------------

/** Return the points that no other beats in both cost and accuracy, by rising cost. */
function front(points) {
  let best = -Infinity;
  return points
    .toSorted((one, other) => one.x - other.x || other.y - one.y)
    .filter(({ y }) => y > best && (best = y) !== null);
}

const dotted = (x, y, color) => ({
  x,
  y,
  mode: "lines",
  line: { color: paper(color), width: 1, dash: "dot" },
  hoverinfo: "skip",
  showlegend: false,
});

function pareto() {
  const [name, metric] = [byId("cost-name").value, data.shown[0]];
  const { bounds } = data.metrics[metric];
  const points = drawn()
    .map((entry) => ({ entry, x: value(entry, name).mean, y: value(entry, metric).mean }))
    .filter(({ x, y }) => known(x) && known(y));
  const logarithmic = byId("cost-log").checked && points.every(({ x }) => x > 0);
  const most = logarithmic ? Infinity : 1.15 * reach(points.map(({ x }) => x));
  const cut = points.filter(({ x }) => x > most);
  const best = front(points.filter(({ entry }) => !entry.joint));
  const traces = points.map(({ entry, x, y }) => ({
    ...point(entry),
    x: [Math.min(x, most)],
    y: [y],
    ...whiskers([value(entry, metric)], "y", bounds),
    hovertemplate: `${escaped(entry.label)}: %{y:.2f} % at ${quantity(x)} ${escaped(data.costs[name])}<extra></extra>`,
  }));
  if (best.length > 1)
    traces.unshift(
      dotted(
        best.map(({ x }) => x),
        best.map(({ y }) => y),
        "faint",
      ),
    );
  draw(
    byId("pareto"),
    traces,
    {
      ...withLegend(380, points.length),
      annotations: cut.map(({ x, y }) => beyond(quantity(x), most, y)),
      xaxis: axis(
        data.costs[name],
        logarithmic ? { type: "log" } : cut.length ? { range: [0, most] } : { rangemode: "tozero" },
      ),
      yaxis: axis(`${heading(metric)} (%)`, {
        range: within(
          points.flatMap(({ entry }) => spread(value(entry, metric), bounds)),
          bounds,
        ),
      }),
    },
    `Accuracy against cost: ${heading(metric)} against ${data.costs[name]}`,
    "No ticked strategy has measured this cost.",
  );
}

function tasks() {
  const points = drawn()
    .map((entry) => ({ entry, x: value(entry, "task_id/sample"), y: value(entry, "within/sample") }))
    .filter(({ x, y }) => known(x.mean) && known(y.mean));
  const ends = (means) => {
    const room = Math.max(4, 0.2 * (Math.max(...means) - Math.min(...means)));
    return [Math.max(0, Math.min(...means) - room), Math.min(100, Math.max(...means) + room)];
  };
  const [left, right] = ends(points.map(({ x }) => x.mean));
  const [bottom, top] = ends(points.map(({ y }) => y.mean));
  const [least, most] = [(left * bottom) / 100, (right * top) / 100];
  const step = [10, 5, 2].find((one) => most - least > 3.5 * one) ?? 1;
  const annotations = [];
  const levels = [];
  for (let level = Math.ceil((least + 0.01) / step) * step; points.length && level < most; level += step) {
    const across = Array.from({ length: 60 }, (_, i) => left + ((right - left) * i) / 59).filter(
      (x) => x > 0 && (100 * level) / x >= bottom && (100 * level) / x <= top,
    );
    if (across.length < 8) continue;
    levels.push(
      dotted(
        across,
        across.map((x) => (100 * level) / x),
        "line",
      ),
    );
    annotations.push({
      x: across[0],
      y: (100 * level) / across[0],
      text: String(level),
      showarrow: false,
      font: { size: 10, color: paper("faint") },
      xanchor: "left",
      yanchor: "bottom",
    });
  }
  const traces = points.map(({ entry, x, y }) => ({
    ...point(entry),
    x: [x.mean],
    y: [y.mean],
    ...whiskers([x], "x"),
    ...whiskers([y], "y"),
    hovertemplate: `${escaped(entry.label)}: task id %{x:.2f} %, within %{y:.2f} %, final ${percent(value(entry, "acc/sample").mean)} %<extra></extra>`,
  }));
  draw(
    byId("tasks"),
    [...levels, ...traces],
    {
      ...withLegend(400, points.length),
      annotations,
      xaxis: axis("experience found (%)", { range: [left, right], showgrid: false }),
      yaxis: axis("accuracy within the experience (%)", { range: [bottom, top], showgrid: false }),
    },
    "Why a method loses: task-id accuracy against accuracy within the experience",
  );
}

function domains() {
  const has = (entry) => Object.keys(entry.domains ?? {}).length;
  byId("domains").hidden = !benchmark().entries.some(has);
  if (byId("domains").hidden) return;
  const entries = drawn().filter(has);
  const traces = entries.map((entry) => ({
    type: "bar",
    name: escaped(entry.label),
    x: Object.keys(entry.domains).map(escaped),
    y: Object.values(entry.domains).map((one) => one.mean),
    marker: {
      color: pen(entry).colour,
      pattern: { shape: pen(entry).pattern, fgcolor: paper("paper"), fgopacity: 0.7, size: 6 },
    },
    ...whiskers(Object.values(entry.domains), "y"),
    hovertemplate: `${escaped(entry.label)}, %{x}: %{y:.2f} %<extra></extra>`,
  }));
  draw(
    byId("domain-bars"),
    traces,
    {
      ...withLegend(360, entries.length),
      barmode: "group",
      bargap: 0.25,
      bargroupgap: 0.08,
      xaxis: axis("", { type: "category", showgrid: false }),
      yaxis: axis("final accuracy (%)", { range: [0, 100] }),
    },
    "By domain: final accuracy over the images of each domain",
  );
}

const PHASES = ["data_passes", "training", "evaluation", "checkpoints"];

function phases() {
  const entries = drawn()
    .filter((entry) => known(value(entry, "seconds").mean))
    .reverse();
  const total = (entry) => value(entry, "seconds").mean;
  const most = 1.15 * reach(entries.map(total));
  const cut = entries.filter((entry) => total(entry) > most);
  const shades = isDark() ? ["#7d8794", "#5AB4F0", "#3CCB9B", "#F0B93F"] : ["#9aa3ad", "#0072B2", "#009E73", "#E69F00"];
  const traces = PHASES.map((phase, place) => ({
    type: "bar",
    orientation: "h",
    name: phase.replace("_", " "),
    y: entries.map((entry) => escaped(entry.label)),
    x: entries.map((entry) => value(entry, `seconds/${phase}`).mean),
    marker: { color: shades[place] },
    hovertemplate: `%{y}, ${phase.replace("_", " ")}: %{x:.1f} s<extra></extra>`,
  })).filter(({ x }) => x.some((one) => known(one) && one > 0));
  draw(
    byId("phases"),
    traces,
    {
      height: 110 + 30 * entries.length,
      barmode: "stack",
      bargap: 0.3,
      margin: { l: 56, r: 18, t: 34, b: 46 },
      legend: LEGEND_ABOVE,
      annotations: cut.map((entry) => ({
        ...beyond(`${quantity(total(entry))} s`, most, escaped(entry.label)),
        bgcolor: paper("paper"),
      })),
      xaxis: axis("seconds", cut.length ? { range: [0, most] } : {}),
      yaxis: named(entries.map((entry) => entry.label)),
    },
    "Time by phase: seconds of a whole run",
    "No ticked run has measured its seconds.",
  );
}

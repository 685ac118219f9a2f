"use strict";
// Charts and tables of the studies that chose the settings of tuned strategies.

/** Return the settings that some study of the benchmark has varied. */
const varied = () => [...new Set(benchmark().entries.flatMap((entry) => Object.keys(entry.study?.settings ?? {})))];

function tuning() {
  const { studies, sensitivity } = benchmark();
  byId("tuning").hidden = !studies.length;
  if (!studies.length) return;
  columns("studies", studies);
  byId("sensitivity-of-rates").hidden = !sensitivity.length;
  if (sensitivity.length) columns("sensitivity", sensitivity);
  const entries = drawn().filter((entry) => entry.study);
  progress(entries);
  overSetting(entries.filter((entry) => byId("setting").value in entry.study.settings));
}

/** Fill a table from its columns, each with its heading first. */
function columns(id, all) {
  const rows = all[0].slice(1).map((_, row) => all.map((column) => column[row + 1]));
  plain(
    id,
    all.map(([title]) => title),
    rows,
  );
}

function progress(entries) {
  const traces = entries.map((entry) => {
    const { colour, symbol, dash } = pen(entry);
    return {
      ...line(entry),
      x: entry.study.best.map((_, i) => i + 1),
      y: entry.study.best,
      line: { color: colour, dash, width: 2, shape: "hv" },
      marker: { color: colour, symbol, size: 5 },
      hovertemplate: `${escaped(entry.label)}, %{x} trials: ${escaped(entry.study.metric)} %{y:.2f}<extra></extra>`,
    };
  });
  draw(
    byId("progress"),
    traces,
    {
      ...withLegend(320, entries.length),
      xaxis: axis("trials", { showgrid: false }),
      yaxis: axis("best score so far (%)", { range: within(traces.flatMap(({ y }) => y).filter(known)) }),
    },
    "Best score after each trial",
  );
}

function overSetting(entries) {
  const key = byId("setting").value;
  const traces = entries.map((entry) => {
    const { values, importance } = entry.study.settings[key];
    const has = values.map((_, trial) => trial).filter((trial) => known(values[trial]) && known(entry.study.scores[trial]));
    const share = known(importance) ? `, importance ${Math.round(100 * importance)} %` : "";
    return {
      ...point(entry),
      x: has.map((trial) => (typeof values[trial] === "number" ? values[trial] : escaped(values[trial]))),
      y: has.map((trial) => entry.study.scores[trial]),
      marker: {
        color: pen(entry).colour,
        size: 8,
        symbol: has.map((trial) => (entry.study.pruned[trial] ? "x-thin-open" : pen(entry).symbol)),
      },
      hovertemplate: `${escaped(entry.label)}${share}: ${escaped(key)} %{x}, score %{y:.2f}<extra></extra>`,
    };
  });
  const isLog = entries.some((entry) => entry.study.settings[key].log);
  draw(
    byId("over-setting"),
    traces,
    {
      ...withLegend(320, entries.length),
      xaxis: axis(escaped(key), isLog ? { type: "log" } : {}),
      yaxis: axis("score (%)", { range: within(traces.flatMap(({ y }) => y)) }),
    },
    `Score over ${key}`,
  );
}

"use strict";
// Charts of what the diagnostics callback measured inside the network.

const INSIDE = {
  violation: (one) =>
    Object.values(one.violation).some((kinds) => Object.values(kinds).some((layers) => layers.some(known))),
  basis: (one) => one.basis.some((layers) => layers.length),
  angular: (one) => Boolean(one.angular),
  held: (one) => one.held_out.before.some(known),
};

function inside() {
  const measured = benchmark().entries.filter((entry) => entry.inside);
  fill(
    "inside-description",
    measured.length
      ? `Measured by the diagnostics callback in ${measured.map((entry) => entry.label).join(", ")}; means over the runs that have it.`
      : "Not recorded: no run of this benchmark used the diagnostics callback.",
  );
  for (const [name, chart] of Object.entries({ violation, basis, angular, held })) {
    const has = (entry) => entry.inside && INSIDE[name](entry.inside);
    byId(`inside-${name}`).hidden = !measured.some(has);
    if (measured.some(has)) chart(drawn().filter(has));
  }
}

function violation(entries) {
  const kind = byId("violation-kind").value;
  const targets = [...new Set(entries.flatMap((entry) => Object.keys(entry.inside.violation[kind])))].sort();
  const suffix = (place) => (place ? place + 1 : "");
  const traces = targets.flatMap((target, place) =>
    entries
      .filter((entry) => entry.inside.violation[kind][target])
      .map((entry) => ({
        ...line(entry),
        y: entry.inside.violation[kind][target],
        showlegend: place === 0,
        xaxis: `x${suffix(place)}`,
        yaxis: `y${suffix(place)}`,
        hovertemplate: `${escaped(entry.label)}, ${escaped(target)}, layer %{x}: %{y:.4f}<extra></extra>`,
      })),
  );
  // A plain axis reads best, unless values are zero to rounding: those need powers of ten.
  const values = traces.flatMap((trace) => trace.y).filter((y) => known(y) && y > 0);
  const scale =
    values.length && greatest(values) / least(values) > 100
      ? { type: "log", exponentformat: "power", dtick: 2 }
      : { rangemode: "tozero" };
  const axes = targets.map((target, place) => [
    [`xaxis${suffix(place)}`, axis(`layer of ${escaped(target.toUpperCase())}`, { dtick: 1, showgrid: false })],
    [
      `yaxis${suffix(place)}`,
      axis(place && !isPhone() ? "" : "violation", { ...scale, ...(place ? { matches: "y" } : {}) }),
    ],
  ]);
  const [rows, columns] = isPhone() ? [targets.length, 1] : [1, targets.length];
  draw(
    byId("violation"),
    traces,
    {
      ...withLegend(300 * rows, entries.length),
      grid: { rows, columns, pattern: "independent" },
      ...Object.fromEntries(axes.flat()),
    },
    `Null-space violation: ${kind}, by layer`,
  );
}

function basis(entries) {
  const tables = new Map(
    entries.map((entry) => {
      const grown = entry.inside.basis.filter((layers) => layers.length);
      return [entry, grown[0].map((_, layer) => grown.map((layers) => layers[layer]))];
    }),
  );
  const high = Math.max(1, greatest([...tables.values()].flat(2).filter(known)));
  const how = {
    low: 0,
    high,
    first: 0,
    down: false,
    hover: "matrix %{y}, after %{x}: %{z:.1f} directions<extra></extra>",
  };
  panels(
    "basis-panels",
    entries,
    () => "",
    (entry, box) => heatmap(box, tables.get(entry), how, `Basis growth: ${entry.label}`),
  );
}

function angular(entries) {
  const zone = (x0, x1, y0, y1, colour) => ({
    type: "rect",
    x0,
    x1,
    y0,
    y1,
    line: { width: 0 },
    fillcolor: transparent(colour, 0.1),
    layer: "below",
  });
  const from = (cosines) => axis("", { range: [Math.min(-0.05, ...cosines) - 0.02, 1.02], zeroline: false });
  const danger = ({ inside: { danger: score } }) => (known(score) ? `danger score ${score.toFixed(3)}` : "");
  panels("angular-panels", entries, danger, (entry, box) => {
    const { nearest_old: x, own_centre: y } = entry.inside.angular;
    draw(
      box,
      [
        {
          x,
          y,
          mode: "markers",
          marker: { color: transparent(pen(entry).colour, 0.65), size: 5 },
          hovertemplate: "to the nearest old %{x:.3f}, to its own %{y:.3f}<extra></extra>",
        },
      ],
      {
        height: 240,
        margin: { l: 34, r: 6, t: 6, b: 34 },
        showlegend: false,
        xaxis: from(x),
        yaxis: from(y),
        shapes: [zone(0.5, 1.02, -0.25, 0.5, "#d55e00"), zone(-0.25, 0.5, 0.7, 1.02, "#009e73")],
      },
      `Angles: ${entry.label}`,
    );
  });
}

function held(entries) {
  const traces = entries.flatMap((entry) =>
    ["before", "after"].map((when) => ({
      ...line(entry),
      x: entry.inside.held_out[when].map((_, i) => i + 1),
      y: entry.inside.held_out[when],
      showlegend: when === "after",
      line: { color: pen(entry).colour, width: 2, dash: when === "before" ? "dot" : "solid" },
      hovertemplate: `${escaped(entry.label)}, ${when} learning %{x}: %{y:.2f} %<extra></extra>`,
    })),
  );
  draw(
    byId("held"),
    traces,
    {
      ...withLegend(320, entries.length),
      xaxis: axis("experience", { dtick: 1, showgrid: false }),
      yaxis: axis("nearest-mean accuracy (%)", { range: within(traces.flatMap(({ y }) => y).filter(known)) }),
    },
    "Nearest mean on classes outside of the stream: before and after learning",
  );
}

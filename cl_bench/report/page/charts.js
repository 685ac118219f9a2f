"use strict";
// What the charts share. Plotly draws the strategies that are ticked and found in the table of results.

const MOST_NUMBERED = 12; // experiences up to which a number fits into each cell of a matrix
const HEAT = [
  [0, "#440154"],
  [0.25, "#3b528b"],
  [0.5, "#21918c"],
  [0.75, "#5ec962"],
  [1, "#fde725"],
];
const NOTHING = "Nothing to show: tick a strategy with finished runs in the table above.";

const isPhone = () => innerWidth < 640;

function axis(title, more = {}) {
  return {
    title: { text: title, standoff: 8, font: { size: 12.5 } },
    gridcolor: paper("grid"),
    linecolor: paper("line"),
    zerolinecolor: paper("line"),
    tickcolor: paper("line"),
    ticks: "outside",
    ticklen: 4,
    automargin: true,
    fixedrange: true,
    ...more,
  };
}

function layout(more = {}) {
  return {
    paper_bgcolor: paper("paper"),
    plot_bgcolor: paper("paper"),
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: paper("ink") },
    margin: { l: 56, r: 18, t: 12, b: 46 },
    hoverlabel: { bgcolor: paper("panel"), bordercolor: paper("line"), font: { color: paper("ink") } },
    legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", font: { size: 11.5 } },
    hovermode: "closest",
    ...more,
  };
}

/** Return the height and lower margin of a chart with its legend below: six names in a line, two on a phone. */
function withLegend(height, names) {
  const across = Math.max(1, Math.floor(Math.min(innerWidth, 1080) / 180));
  const below = 24 * Math.ceil(names / across) + 6;
  return { height: height + below, margin: { l: 56, r: 18, t: 12, b: 46 + below } };
}

const LEGEND_ABOVE = { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal", font: { size: 11.5 } };

/** Draw a chart into an element, or write why it is empty. `label` is its name for screen readers. */
function draw(box, traces, more, label, without = NOTHING) {
  if (!traces.length) {
    Plotly.purge(box);
    box.classList.remove("js-plotly-plot"); // purging leaves the class, and with it the look of a chart
    box.replaceChildren(element("p", { class: "empty" }, without));
    return;
  }
  if (!box.classList.contains("js-plotly-plot")) box.replaceChildren();
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", label);
  Plotly.react(box, traces, layout(more), {
    responsive: true,
    displaylogo: false,
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtons: [["toImage"]],
    toImageButtonOptions: { format: "svg", filename: label.split(":")[0] },
  });
}

/** Draw a small chart for each entry, side by side, under its name and a remark. */
function panels(id, entries, remark, plot, without = NOTHING) {
  const kept = new Map([...byId(id).querySelectorAll("figure")].map((figure) => [figure.dataset.label, figure]));
  const figures = entries.map((entry) => {
    const figure =
      kept.get(entry.label) ??
      element("figure", { "data-label": entry.label }, element("h4"), element("div", { class: "figure" }));
    kept.delete(entry.label);
    figure.firstChild.replaceChildren(mark(entry), entry.label, element("span", {}, remark(entry)));
    return figure;
  });
  for (const figure of kept.values()) Plotly.purge(figure.lastChild);
  fill(id, ...(figures.length ? figures : [element("p", { class: "empty" }, without)]));
  entries.forEach((entry, place) => plot(entry, figures[place].lastChild));
}

/** Return an axis of names. Long names are cut, to fit next to a chart on a phone. */
function named(labels, more = {}) {
  const most = isPhone() ? 16 : 40;
  const cut = (label) => (label.length > most ? `${label.slice(0, most - 1)}…` : label);
  return axis("", {
    type: "category",
    showgrid: false,
    ticks: "",
    tickvals: labels.map(escaped),
    ticktext: labels.map((label) => escaped(cut(label))),
    ...more,
  });
}

function line(entry) {
  const { colour, symbol, dash } = pen(entry);
  return {
    mode: "lines+markers",
    cliponaxis: false,
    name: escaped(entry.label),
    legendgroup: entry.label,
    line: { color: colour, dash, width: 2 },
    marker: { color: colour, symbol, size: 7, line: { color: paper("paper"), width: 1 } },
  };
}

function point(entry) {
  const { colour, symbol } = pen(entry);
  const edge = entry.joint ? { color: colour, width: 2 } : { color: paper("paper"), width: 1 };
  const marker = { color: colour, symbol, size: 12, line: edge };
  return { mode: "markers", cliponaxis: false, name: escaped(entry.label), marker };
}

/** Return error bars of one standard deviation, cut where values are no longer possible. */
function whiskers(statistics, axisName, bounds = [0, 100]) {
  const found = statistics.map((one) => spread(one, bounds));
  if (!statistics.some((one) => one.std)) return {};
  const array = found.map(([, high], place) => high - statistics[place].mean);
  const arrayminus = found.map(([low], place) => statistics[place].mean - low);
  const shown = { thickness: 1, width: 3, color: paper("faint") };
  return { [`error_${axisName}`]: { type: "data", symmetric: false, array, arrayminus, ...shown } };
}

/** Return the number of a mark that lies beyond the end of the axis, as a text beside that end. */
const beyond = (text, x, y, rightwards = true) => ({
  text: rightwards ? `${text} →` : `← ${text}`,
  x,
  y,
  xanchor: rightwards ? "right" : "left",
  xshift: rightwards ? -9 : 9,
  showarrow: false,
  font: { size: 10.5, color: paper("faint") },
});

/** Return mean minus and plus one standard deviation, cut where values are no longer possible. */
const spread = ({ mean, std }, [low, high] = [0, 100]) => [
  Math.max(low, mean - (std ?? 0)),
  Math.min(high, mean + (std ?? 0)),
];

const GRADIENT = `linear-gradient(to right, ${HEAT.map(([at, colour]) => `${colour} ${100 * at}%`).join(",")})`;

/**
 * Draw a square heat map of `rows`, whose first is numbered `first`, on the colour scale from `low` to `high`. The
 * texts of `hover` are made from row and column if it is a function.
 */
function heatmap(box, rows, { low, high, first, down, hover }, label) {
  const across = Math.max(...rows.map((row) => row.length));
  const size = box.clientWidth || 230;
  const numbered = Math.max(across, rows.length) <= MOST_NUMBERED && (size - 34) / across > 15;
  const ticks = { showgrid: false, ticks: "", tickfont: { size: 10 }, zeroline: false, automargin: false };
  draw(
    box,
    [
      {
        type: "heatmap",
        z: rows,
        x: Array.from({ length: across }, (_, j) => j + 1),
        y: rows.map((_, i) => i + first),
        zmin: low,
        zmax: high,
        colorscale: HEAT,
        showscale: false,
        xgap: 1.5,
        ygap: 1.5,
        hoverongaps: false,
        texttemplate: numbered ? "%{z:.0f}" : "",
        textfont: { size: Math.min(11, size / across / 2.7) },
        ...(typeof hover === "function"
          ? { text: rows.map((row, i) => row.map((_, j) => hover(i, j))), hovertemplate: "%{text}: %{z} %<extra></extra>" }
          : { hovertemplate: hover }),
      },
    ],
    {
      height: Math.max(120, Math.round(size * Math.min(1.4, rows.length / across)) + 12),
      margin: { l: 30, r: 4, t: 4, b: 30 },
      xaxis: axis("", { ...ticks, dtick: numbered ? 1 : Math.ceil(across / 6), tick0: 1 }),
      yaxis: axis("", {
        ...ticks,
        dtick: rows.length > MOST_NUMBERED ? Math.ceil(rows.length / 6) : 1,
        tick0: first,
        autorange: down ? "reversed" : true,
      }),
    },
    label,
  );
}

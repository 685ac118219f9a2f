"use strict";
// The tables. DataTables, https://datatables.net, sorts, searches and pages the two long ones.

// Numbers in either direction; a row without one comes last.
const byNumber = (sign) => (one, other) =>
  known(one) && known(other) ? sign * (one - other) : known(other) - known(one);
DataTable.type("number", { order: { asc: byNumber(1), desc: byNumber(-1) } });

const FIRST_COLUMNS = [...data.shown, "seconds", "peak_megabytes", "trainable_parameters", "stored_megabytes"];

/** Entries that the search leaves, in the order of the table. */
const visible = () => results.rows({ search: "applied", order: "applied" }).data().toArray();

/** Entries to draw: visible, ticked, and with a finished run. */
const drawn = () => visible().filter((entry) => entry.n && entry.ticked);

// ---- results -------------------------------------------------------------------------------------

function nameCell(entry) {
  const tick = element("input", {
    type: "checkbox",
    checked: Boolean(entry.ticked),
    "aria-label": `Draw ${entry.label}`,
    onchange: (event) => {
      entry.ticked = event.target.checked;
      charts();
    },
  });
  return element(
    "label",
    { class: "line" },
    entry.n ? tick : null,
    mark(entry),
    entry.joint ? `${entry.label} †` : entry.label,
  );
}

function valueCell(entry, name) {
  const one = value(entry, name);
  if (!entry.n) return element("span", { class: "word" }, entry.statuses.join(", "));
  if (!one.n) return element("span", { class: "faint" }, UNDEFINED);
  if (!isMetric(name)) return quantity(one.mean);
  const range = (bounds) => `[${percent(bounds[0])}, ${percent(bounds[1])}]`;
  const interval = one.interval ? `95 % logit interval ${range(one.interval)}` : "interval: n too small";
  return element(
    "span",
    { title: interval + (one.bootstrap ? `; bootstrap ${range(one.bootstrap)}` : "") },
    element("span", { class: [null, "best", "second"][entry.places[name] ?? 0] }, percent(one.mean)),
    known(one.std) ? element("span", { class: "deviation" }, ` ± ${percent(one.std)}`) : null,
    one.n === benchmark().blocks
      ? null
      : element("span", { class: "deviation" }, ` (${one.n} of ${benchmark().blocks})`),
  );
}

function valueColumn(name) {
  const risesFirst = !isMetric(name) || !data.metrics[name].higher;
  return {
    name,
    ariaTitle: heading(name),
    type: "number",
    visible: FIRST_COLUMNS.includes(name),
    searchable: false,
    title: isMetric(name)
      ? `<span title="${escaped(data.metrics[name].definition)}">${escaped(heading(name))}</span>`
      : escaped(heading(name)),
    orderSequence: risesFirst ? ["asc", "desc", ""] : ["desc", "asc", ""],
    data: (entry) => value(entry, name).mean,
    render: (mean, purpose, entry) => (purpose === "display" ? valueCell(entry, name) : mean),
  };
}

// A search finds the name, the statuses of unfinished runs, and rows that lack runs.
const searched = (entry) =>
  escaped([entry.label, ...entry.statuses, ...(entry.n < benchmark().blocks ? ["incomplete"] : [])].join(" "));

const results = new DataTable("#table", {
  columns: [
    {
      title: "strategy",
      type: "string",
      cellType: "th",
      data: (entry) => entry,
      render: (entry, purpose) =>
        purpose === "display" ? nameCell(entry) : purpose === "filter" ? searched(entry) : escaped(entry.label),
    },
    ...(data.chosen ? [{ title: data.chosen, data: (entry) => entry.chosen || UNDEFINED }] : []),
    ...[...Object.keys(data.metrics), ...Object.keys(data.costs)].map(valueColumn),
    ...(data.kept ? [{ title: data.kept, data: (entry) => entry.kept || UNDEFINED }] : []),
  ],
  order: [],
  paging: false,
  autoWidth: false,
  layout: {
    topStart: "search",
    topEnd: { buttons: [{ extend: "colvis", text: "Columns", columns: ":gt(0)" }] },
    bottomStart: null,
    bottomEnd: null,
  },
  language: {
    search: "Filter",
    searchPlaceholder: "name, failed, incomplete …",
    zeroRecords: "No strategy matches.",
    emptyTable: "No strategy matches.",
  },
});

/** Put the entries of the benchmark into the table; drawing it draws the charts too. */
function showResults() {
  const { entries, blocks } = benchmark();
  results.clear().order([]).rows.add(entries).draw();
  const over = blocks === 1 ? "1 block (seed and class order)" : `${blocks} blocks (seeds and class orders)`;
  const bound = entries.some((entry) => entry.joint)
    ? " † Upper bound: trained on all classes at once, so metrics over the stream are undefined (–) and it is not ranked."
    : "";
  const unranked = entries.some((entry) => entry.n && !entry.joint && !entry.ranked) ? ` ${data.incomplete}` : "";
  fill(
    "results-note",
    `Mean ± sample standard deviation over ${over}, or over as many as a cell names. Bold: best; underlined: second. The charts below draw the ticked strategies.${bound}${unranked} A cell in words has no finished run. Point at a cell for its 95 % interval.`,
  );
}

function showAbsent() {
  const { absent, unnamed } = benchmark();
  const folded = (title, lines, attributes = {}) =>
    lines.length
      ? element("details", attributes, element("summary", {}, `${title} (${lines.length})`), list(lines))
      : null;
  fill(
    "absent",
    folded("In no mean", absent, { class: "alert", open: absent.length <= 4 }),
    folded("Further settings in which rows of one name differ", unnamed),
  );
}

// ---- plain tables --------------------------------------------------------------------------------

/** Fill a table with rows of texts; the first text of a row is its heading. */
function plain(id, header, rows) {
  const cells = (texts, tag = "td") => texts.map((text) => element(tag, tag === "th" ? { scope: "col" } : {}, text));
  fill(
    id,
    element("thead", {}, element("tr", {}, ...cells(header, "th"))),
    element(
      "tbody",
      {},
      ...rows.map(([name, ...texts]) => element("tr", {}, element("th", { scope: "row" }, name), ...cells(texts))),
    ),
  );
}

function showPairs(pairs) {
  const small = "n too small";
  plain(
    "pairs",
    ["strategy", "Δ", "95 % interval", "shared blocks", "win/tie/loss", "p (Holm)", "verdict"],
    pairs.map((pair) => [
      pair.entry.label,
      signed(pair.mean),
      pair.interval ? `[${signed(pair.interval[0])}, ${signed(pair.interval[1])}]` : small,
      pair.n,
      pair.score.join("/"),
      known(pair.p) ? Number(pair.p.toPrecision(2)) : small,
      element("span", { class: VERDICTS[pair.verdict] ?? null }, pair.verdict),
    ]),
  );
}

function showProtocol() {
  const { fingerprint, identity, mixed } = benchmark();
  fill(
    "protocol-description",
    `Protocol ${fingerprint}. Results share a table only if their protocols are equal; seeds and class orders are the blocks of the statistics.`,
  );
  fill(
    "mixed",
    mixed.length
      ? element(
          "div",
          { class: "alert" },
          "Mixed provenance (number of runs); seconds may not be comparable:",
          list(mixed),
        )
      : null,
  );
  plain("identity", ["field", "value"], Object.entries(identity));
}

// ---- runs ----------------------------------------------------------------------------------------

const textColumn = (title, read) => ({ title, data: (row) => escaped(read(row) ?? "") });
const numberColumn = (title, read, shown = String) => ({
  title,
  type: "number",
  data: read,
  render: (one, purpose) => (purpose === "display" ? (known(one) ? shown(one) : "") : one),
});

let runs; // made when it is first opened, because ten thousand rows take a while
function showRuns() {
  if (!byId("runs-details").open) return;
  runs ??= new DataTable("#runs", {
    columns: [
      textColumn("strategy", ({ entry }) => entry.label),
      numberColumn("seed", ({ run }) => run.seed),
      textColumn("class order", ({ run }) => run.order),
      {
        title: "status",
        data: ({ run }) => run,
        render: (run, purpose) =>
          purpose === "display"
            ? element("span", { class: run.status === "done" ? null : "word", title: run.error }, run.status)
            : run.status,
      },
      ...data.shown.map((name, place) => numberColumn(heading(name), ({ run }) => run.values[place], percent)),
      numberColumn("seconds", ({ run }) => run.seconds, quantity),
      textColumn("cell", ({ run }) => run.cell),
      textColumn("commit", ({ run }) => run.commit),
      textColumn("device", ({ run }) => run.device),
      numberColumn("threads", ({ run }) => run.threads),
      textColumn("started", ({ run }) => run.started),
      textColumn("versions", ({ run }) => run.versions),
    ],
    order: [],
    autoWidth: false,
    pageLength: 50,
    language: { search: "Filter", info: "_START_ to _END_ of _TOTAL_ runs" },
    layout: { topStart: "search", topEnd: null, bottomStart: "info", bottomEnd: "paging" },
  });
  const rows = benchmark().entries.flatMap((entry) => entry.runs.map((run) => ({ entry, run })));
  runs.clear().order([]).rows.add(rows).draw();
}

"use strict";
// What the page shows and how every strategy is drawn. cl_bench.report.page has computed all numbers: the scripts
// sort, search and draw them, and neither average nor test.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

const UNDEFINED = "–";
const MOST_TICKED = 12; // lines in one chart at first; more can be ticked
const state = { benchmark: 0, metric: data.shown[0], reference: null };

const benchmark = () => data.benchmarks[state.benchmark];
const isMetric = (name) => name in data.metrics;
const heading = (name) => (isMetric(name) ? data.metrics[name].short : data.costs[name]);
const value = (entry, name) => entry.statistics[name];

for (const { entries } of data.benchmarks)
  for (const entry of entries.filter((one) => one.n).slice(0, MOST_TICKED)) entry.ticked = true;

// ---- elements and numbers ------------------------------------------------------------------------

/** Return a new element. An attribute that is null or false is left out; `onchange` and the like are listeners. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, given] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), given);
    else if (given === true) made.setAttribute(name, "");
    else if (given !== false && given !== null) made.setAttribute(name, given);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const fill = (id, ...children) => byId(id).replaceChildren(...children.filter((child) => child !== null));
const list = (lines) => element("ul", {}, ...lines.map((line) => element("li", {}, line)));
const options = (names, chosen, text = (name) => name) =>
  names.map((name) => element("option", { value: name, selected: name === chosen }, text(name)));

const known = (number) => number !== null && number !== undefined;
/** Two decimals; a tie, which only odd eighths are, goes to the even digit as in the other formats. */
const rounded = (number) => (number - (Math.abs(number * 8) % 4 === 1 ? Math.sign(number) / 1000 : 0)).toFixed(2);
const percent = (number) => (known(number) ? rounded(number).replace("-", "−") : UNDEFINED);
const signed = (number) => (known(number) ? (number > 0 ? "+" : "") + percent(number) : UNDEFINED);
const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** Return `text` for Plotly and DataTables, which read HTML; Plotly also fills in what stands behind `%{`. */
const escaped = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/"/g, "&#34;").replace(/%\{/g, "%&#123;");

// Not Math.min(...numbers), which fails for more numbers than a function takes arguments.
const least = (numbers) => numbers.reduce((one, other) => Math.min(one, other), Infinity);
const greatest = (numbers) => numbers.reduce((one, other) => Math.max(one, other), -Infinity);

/** Return the range of an axis around `numbers` that ends where values are no longer possible. */
function within(numbers, [low, high] = [0, 100]) {
  const [from, to] = [least(numbers), greatest(numbers)];
  const room = Math.max(1, 0.08 * (to - from));
  return [Math.max(low, from - room), Math.min(high, to + room)];
}

const FAR = 5; // a number so many times as far from zero as the next would squeeze the others

/** Return how far from zero an axis goes for `numbers`: at least half of them are shown, and those without a gap. */
function reach(numbers) {
  const sizes = numbers.map(Math.abs).sort((one, other) => one - other);
  const cut = sizes.findIndex((size, i) => i >= sizes.length / 2 && sizes[i - 1] > 0 && size > FAR * sizes[i - 1]);
  return sizes.at(cut < 0 ? -1 : cut - 1) ?? 0;
}

function quantity(number) {
  if (!known(number)) return UNDEFINED;
  if (number >= 100 || Number.isInteger(number)) return Math.round(number).toLocaleString("en-US");
  return String(Number(number.toPrecision(3)));
}

// ---- colours and symbols -------------------------------------------------------------------------

// Okabe and Ito's palette without black and yellow and with two more, and lighter ones of the same hues for dark
// paper. Symbols shift by one with every lap, so that no two of the first 48 lines share colour and symbol.
const COLOURS = {
  light: ["#0072B2", "#D55E00", "#009E73", "#C45C94", "#C98A00", "#3E9BD0", "#6A4C9C", "#7F6A4A"],
  dark: ["#5AB4F0", "#FF8A4C", "#3CCB9B", "#E79CC6", "#F0B93F", "#9AD0F5", "#B79CF0", "#CDB68F"],
};
const SYMBOLS = { circle: "●", square: "■", "triangle-up": "▲", diamond: "◆", "triangle-down": "▼", cross: "✚" };
const DASHES = ["solid", "dot", "dashdot"];
const PATTERNS = ["", "/", "x"];

// By name over all benchmarks, not by rank: one strategy has one colour everywhere.
const LABELS = [
  ...new Set(data.benchmarks.flatMap((one) => one.entries.filter((entry) => !entry.joint).map((entry) => entry.label))),
].sort();

const paper = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Return how charts draw an entry: an upper bound in grey, others by their place among all names. */
function pen(entry) {
  if (entry.joint) return { colour: paper("faint"), symbol: "line-ew-open", dash: "dash", pattern: "" };
  const palette = COLOURS[isDark() ? "dark" : "light"];
  const symbols = Object.keys(SYMBOLS);
  const place = LABELS.indexOf(entry.label);
  const lap = Math.floor(place / palette.length);
  return {
    colour: palette[place % palette.length],
    symbol: symbols[((place % palette.length) + lap) % symbols.length],
    dash: DASHES[lap % DASHES.length],
    pattern: PATTERNS[lap % PATTERNS.length],
  };
}

/** Return the symbol of an entry in its colour, which makes the table the legend of all charts. */
function mark(entry) {
  const { colour, symbol } = pen(entry);
  return element("span", {
    class: "mark",
    style: `color: ${colour}`,
    "data-symbol": SYMBOLS[symbol] ?? "╍",
    "aria-hidden": "true",
  });
}

function transparent(colour, alpha) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${red},${green},${blue},${alpha})`;
}

"use strict";
// The page as a whole: what it opens with, and what follows a choice.

const THEMES = { "": ["light", "◐", "as the system has them"], light: ["dark", "☀", "light"], dark: ["", "☾", "dark"] };

function opening() {
  const finished = data.benchmarks.flatMap((one) => one.entries).reduce((sum, entry) => sum + entry.n, 0);
  const alert = (id, title, lines) =>
    lines.length ? element("div", { class: "alert", id }, element("strong", {}, title), list(lines)) : null;
  fill(
    "opening",
    element("h1", {}, data.title),
    element(
      "p",
      { class: "description" },
      `${counted(finished, "finished run")} on ${counted(data.benchmarks.length, "benchmark")}.`,
    ),
    alert("protocols", "Unequal protocols are kept separate.", data.protocols),
    alert("unreadable", "Not read:", data.unreadable),
  );
  fill(
    "footer",
    `Written by cl-bench ${data.version} from result files only. This file holds everything it shows and contacts no host.`,
  );
  fill("benchmark", ...data.benchmarks.map((one, place) => element("option", { value: place }, one.title)));
  fill("metric", ...options(data.shown, state.metric, (name) => `${heading(name)} (${name})`));
  fill(
    "cost-name",
    ...options(
      Object.keys(data.costs).filter((name) => !name.startsWith("seconds/")),
      "seconds",
      heading,
    ),
  );
  plain(
    "definitions",
    ["metric", "definition"],
    Object.entries(data.metrics).map(([name, { definition }]) => [name, definition]),
  );
  if (!data.benchmarks.some((one) => one.entries.some((entry) => Object.keys(entry.domains ?? {}).length)))
    document.querySelector("nav a[href='#domains']").remove();
  if (!data.benchmarks.some((one) => one.studies.length)) document.querySelector("nav a[href='#tuning']").remove();
}

/** Show the chosen benchmark. */
function enter() {
  const finished = benchmark().entries.filter((entry) => entry.n && !entry.joint);
  if (!finished.some((entry) => entry.label === state.reference)) state.reference = finished[0]?.label ?? "";
  fill(
    "reference",
    ...options(
      finished.map((entry) => entry.label),
      state.reference,
    ),
  );
  byId("band").value = finished.every((entry) => entry.n > 2) ? "interval" : "std"; // below three runs there is no interval
  fill("setting", ...options(varied(), varied()[0]));
  fill("results-description", benchmark().sentence);
  showResults();
  showAbsent();
  showProtocol();
  showRuns();
}

/** Redraw every chart. */
function charts() {
  for (const chart of [forest, curves, matrices, confusion, classes, pareto, tasks, domains, inside, tuning, phases]) chart();
}

/** Draw table and charts in the colours of the paper. */
function repaint() {
  results.rows().invalidate().draw(false);
}

function nextTheme() {
  const root = document.documentElement;
  const [next] = THEMES[root.dataset.theme ?? ""];
  if (next) root.dataset.theme = next;
  else delete root.dataset.theme;
  const [, sign, name] = THEMES[next];
  byId("theme").textContent = sign;
  byId("theme").setAttribute("aria-label", `Colours: ${name}`);
  repaint();
}

function listen() {
  const on = (id, event, action) => byId(id).addEventListener(event, action);
  on("benchmark", "change", (event) => {
    state.benchmark = Number(event.target.value);
    enter();
  });
  on("metric", "change", (event) => {
    state.metric = event.target.value;
    forest();
  });
  on("reference", "change", (event) => {
    state.reference = event.target.value;
    forest();
  });
  on("band", "change", curves);
  on("confusion-kind", "change", confusion);
  on("cost-name", "change", pareto);
  on("cost-log", "change", pareto);
  on("violation-kind", "change", inside);
  on("setting", "change", tuning);
  on("runs-details", "toggle", showRuns);
  on("theme", "click", nextTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  results.on("draw", charts);
  let [waiting, width] = [null, innerWidth];
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar comes and goes
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(charts, 150);
  });
}

opening();
listen();
enter();
document.documentElement.dataset.ready = "yes";

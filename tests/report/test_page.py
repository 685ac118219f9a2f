"""The page in a real browser: Debian's chromium and chromium-driver, which `make browser` installs."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from cl_bench.report.command import report, results_below
from cl_bench.report.comparison import comparisons
from cl_bench.report.page import page
from cl_bench.report.tables import tables
from cl_bench.report.text import markdown
from cl_bench.results.result import Result

Drawn = Callable[..., Result]
Browser = webdriver.Chrome

STRENGTHS = {"JANUS-LoRA": (0.93, 0.01), "InfLoRA": (0.92, 0.03), "LoRA (merge)": (0.9, 0.08)}
HOSTILE = "<!-- <script></script>&%{x}<img src=x onerror=document.title='broken'>"
PHONE, DESK = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("Chromium or chromedriver is missing: run `make browser` as root on Debian.")
    options = webdriver.ChromeOptions()
    # For root in a container, which has no sandbox and little shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def folder(drawn: Drawn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three strategies and an upper bound on two benchmarks, and every kind of problem."""
    results = [
        drawn(name, seed, order, found=found, lost=lost, diagnostics=True)
        for name, (found, lost) in STRENGTHS.items()
        for seed in (1, 2, 3)
        for order in ("identity", "numpy-1993")
    ]
    results += [
        drawn(name, 1, dataset="domainnet", length=5, domains=True, found=found, lost=lost)
        for name, (found, lost) in STRENGTHS.items()
    ]
    results.append(drawn("LoRA (joint)", 1, regime="joint", found=0.98, lost=0.0))
    results.append(drawn(HOSTILE, 1))
    results.append(drawn("InfLoRA", 1, dataset="toy", length=3))
    results.append(drawn("InfLoRA", 1, dataset="toy", length=3, identity={"image_size": 64}))
    broken = drawn("KeepLoRA", 1)
    broken.status, broken.error = "diverged", "The mean loss is nan."
    root = tmp_path_factory.mktemp("many")
    for number, result in enumerate([*results, broken]):
        result.write(root / str(number))
    return root


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    (path,) = report(folder, "html").files
    return path


@pytest.fixture(scope="module")
def loaded(browser: Browser, path: Path) -> Browser:
    """The page, loaded once."""
    _size(browser, DESK)
    browser.get(path.as_uri())
    _wait(browser, "return document.documentElement.dataset.ready === 'yes'")
    return browser


@pytest.fixture
def opened(loaded: Browser) -> Iterator[Browser]:
    """The page in its initial state, on the benchmark with most strategies; a test may leave no error."""
    _size(loaded, DESK)
    loaded.execute_script(
        "delete document.documentElement.dataset.theme; results.search('');"
        "for (const { entries } of data.benchmarks)"
        "  for (const entry of entries) entry.ticked = entry.n > 0;"
        "state.metric = data.shown[0]; state.reference = null;"
        "document.querySelector('.skip').focus(); scrollTo(0, 0)"
    )
    Select(loaded.find_element(By.ID, "benchmark")).select_by_index(0)
    Select(loaded.find_element(By.ID, "benchmark")).select_by_visible_text("imagenet_r-T10")
    yield loaded
    assert [entry for entry in loaded.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def _size(browser: Browser, size: tuple[int, int]) -> None:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def _wait(browser: Browser, script: str) -> None:
    WebDriverWait(browser, 180, poll_frequency=0.05).until(lambda b: b.execute_script(script))


def _rows(browser: Browser, table: str = "table") -> dict[str, list[str]]:
    script = (
        "return [...document.getElementById(arguments[0]).tBodies[0].rows]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent.trim()))"
    )
    return {label: cells for label, *cells in browser.execute_script(script, table)}


def _column(browser: Browser, name: str) -> list[float]:
    heads = [head.text for head in browser.find_elements(By.CSS_SELECTOR, "#table .dt-column-title")]
    cells = [[label, *cells][heads.index(name)] for label, cells in _rows(browser).items()]
    return [float(cell.split()[0].replace("−", "-")) for cell in cells if re.match(r"−?\d", cell)]


def _head(browser: Browser, name: str) -> webdriver.remote.webelement.WebElement:
    """Return the button that sorts the table by the column with this heading."""
    return browser.find_element(By.CSS_SELECTOR, f"#table [role='button'][aria-label^='{name}:']")


def _lines(browser: Browser, chart: str) -> list[str]:
    script = (
        "return document.getElementById(arguments[0]).data"
        ".filter((trace) => trace.name && trace.showlegend !== false).map((trace) => trace.name)"
    )
    names: list[str] = browser.execute_script(script, chart)
    return names


def test_the_page_opens_without_an_error_and_contacts_no_host(opened: Browser) -> None:
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = {
        event["params"]["request"]["url"].partition(":")[0]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert "file" in asked
    assert asked <= {"file", "data", "blob"}


def test_every_chart_is_drawn(opened: Browser) -> None:
    drawn_charts = opened.execute_script(
        "return [...document.querySelectorAll('.js-plotly-plot')]"
        ".filter((chart) => chart.querySelector('.main-svg')).map((chart) => chart.id)"
    )
    assert {"forest", "curve", "pareto", "tasks", "violation", "held", "phases"} <= set(drawn_charts)
    panels = opened.execute_script(
        "return ['matrix', 'basis', 'angular'].map((name) => "
        "document.querySelectorAll(`#${name}-panels .js-plotly-plot`).length)"
    )
    assert panels == [5, 3, 3]


def test_every_class_has_a_row_and_its_accuracy(opened: Browser, folder: Path) -> None:
    script = (
        "const [shown] = document.querySelector(`#classes-panels [data-label='InfLoRA'] .figure`).data;"
        "return [shown.z, shown.text[3][9]]"
    )
    rows, text = opened.execute_script(script)
    runs = [
        one
        for one in results_below(folder)[0]
        if (one.strategy, one.benchmark) == ("InfLoRA", "imagenet_r-T10")
    ]
    right = [run.rows[9].correct[3] for run in runs if run.rows[9] is not None]
    assert (len(rows), len(right)) == (20, 6)
    assert rows[3][9] == round(sum(right) / len(right) / 48 * 100)
    assert rows[3][0] is None  # class 3 comes with the second experience
    assert text == "class 3 after 10"


def test_confusion_is_shown_only_if_predictions_were_kept(opened: Browser) -> None:
    assert not opened.find_element(By.ID, "confusion").is_displayed()
    opened.execute_script(
        "const { entries } = benchmark(), entry = entries.find((one) => one.label === 'InfLoRA');"
        "entry.confusion = { runs: 2, experiences: { names: null, rows: [[90, 10], [20, 80]] },"
        " classes: { names: ['cat', '<b>dog'], rows: [[70, 30], [0, 100]] } };"
        "globalThis.confused = entry; charts()"
    )
    shown = (
        "const [one] = document.querySelector(`#confusion-panels [data-label='InfLoRA'] .figure`).data;"
        "return [one.z, one.text[0][1]]"
    )
    assert opened.execute_script(shown) == [[[90, 10], [20, 80]], "experience 1 as experience 2"]
    Select(opened.find_element(By.ID, "confusion-kind")).select_by_value("classes")
    assert opened.execute_script(shown) == [[[70, 30], [0, 100]], "cat as &lt;b>dog"]
    opened.execute_script("confused.confusion = null; charts()")
    assert not opened.find_element(By.ID, "confusion").is_displayed()


def test_a_benchmark_with_domains_has_bars_for_them(opened: Browser) -> None:
    assert not opened.find_element(By.ID, "domains").is_displayed()
    Select(opened.find_element(By.ID, "benchmark")).select_by_visible_text("domainnet-T5")
    assert opened.find_element(By.ID, "domains").is_displayed()
    assert sorted(_lines(opened, "domain-bars")) == sorted(STRENGTHS)


def test_a_cell_holds_the_number_of_the_table(opened: Browser, folder: Path) -> None:
    text = markdown(tables(comparisons(results_below(folder)[0]), ["acc/sample"]))
    row = re.search(r"\| JANUS-LoRA .*?(\d+\.\d\d) ± (\d+\.\d\d) \(6\)", text)
    assert row is not None
    assert _rows(opened)["JANUS-LoRA"][0] == f"{row[1]} ± {row[2]}"


def test_numbers_are_rounded_as_in_the_other_formats(opened: Browser) -> None:
    numbers = [number / divisor for divisor in (8, 7, 1000) for number in range(-120, 120)]
    shown: list[str] = opened.execute_script("return arguments[0].map(percent)", numbers)
    assert shown == [f"{number:.2f}".replace("-", "−") for number in numbers]


def test_a_heading_sorts_in_both_directions_then_restores_the_order(opened: Browser) -> None:
    reported = list(_rows(opened))
    _head(opened, "ACC").click()
    assert _column(opened, "ACC") == sorted(_column(opened, "ACC"), reverse=True)
    _head(opened, "ACC").click()
    assert _column(opened, "ACC") == sorted(_column(opened, "ACC"))
    assert list(_rows(opened))[-1] == "KeepLoRA"  # rows without a number are last in both directions
    head = opened.find_element(By.CSS_SELECTOR, "#table th[aria-sort='ascending']")
    assert head.text.startswith("ACC")
    _head(opened, "ACC").click()
    assert list(_rows(opened)) == reported


def test_a_filter_applies_to_table_and_charts(opened: Browser) -> None:
    search = opened.find_element(By.CSS_SELECTOR, "#results input[type='search']")
    search.send_keys("inf")
    assert list(_rows(opened)) == ["InfLoRA"]
    assert _lines(opened, "curve") == ["InfLoRA"]
    search.send_keys("x")
    assert list(_rows(opened)) == ["No strategy matches."]
    assert "tick a strategy" in opened.find_element(By.ID, "curve").text
    search.send_keys(Keys.BACKSPACE)
    assert _lines(opened, "curve") == _lines(opened, "pareto") == ["InfLoRA"]


def test_incomplete_rows_are_found_and_their_errors_listed(opened: Browser) -> None:
    search = opened.find_element(By.CSS_SELECTOR, "#results input[type='search']")
    search.send_keys("incomplete")
    rows = _rows(opened)
    assert set(rows) == {"LoRA (joint) †", HOSTILE, "KeepLoRA"}
    assert set(rows["KeepLoRA"]) == {"diverged"}
    absent = opened.find_element(By.ID, "absent").get_attribute("textContent") or ""
    assert "KeepLoRA, seed 1, class order identity: diverged: The mean loss is nan." in absent


def test_clearing_a_tick_removes_a_strategy_from_the_charts(opened: Browser) -> None:
    opened.find_element(By.CSS_SELECTOR, "input[aria-label='Draw InfLoRA']").click()
    for chart in ("curve", "pareto", "tasks"):
        assert "InfLoRA" not in _lines(opened, chart)
        assert "JANUS-LoRA" in _lines(opened, chart)


def test_differences_follow_metric_and_reference(opened: Browser) -> None:
    before = _rows(opened, "pairs")["InfLoRA"]
    Select(opened.find_element(By.ID, "reference")).select_by_value("InfLoRA")
    after = _rows(opened, "pairs")["JANUS-LoRA"]
    assert float(before[0].replace("−", "-")) == -float(after[0])
    assert before[3].split("/") == after[3].split("/")[::-1]
    Select(opened.find_element(By.ID, "metric")).select_by_value("forgetting/chaudhry")
    assert "Less is better" in opened.find_element(By.ID, "differences-description").text


def test_the_keyboard_sorts_the_table(opened: Browser) -> None:
    for _ in range(60):
        opened.switch_to.active_element.send_keys(Keys.TAB)
        if (opened.switch_to.active_element.get_attribute("aria-label") or "").startswith("BWT:"):
            break
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    assert _column(opened, "BWT") == sorted(_column(opened, "BWT"), reverse=True)
    assert opened.switch_to.active_element == _head(opened, "BWT")


def test_a_phone_needs_no_sideways_scrolling_of_the_page(opened: Browser) -> None:
    _size(opened, PHONE)
    _wait(
        opened,
        "return ![...document.querySelectorAll('.js-plotly-plot .main-svg')]"
        ".some((svg) => svg.getBoundingClientRect().right > innerWidth + 1)",
    )
    assert opened.execute_script("return document.documentElement.scrollWidth") == PHONE[0]


def test_a_button_chooses_dark_or_light(opened: Browser) -> None:
    script = (
        "return [getComputedStyle(document.documentElement).backgroundColor, "
        "document.getElementById('curve').layout.paper_bgcolor]"
    )
    button = opened.find_element(By.ID, "theme")
    button.click()
    light = opened.execute_script(script)
    button.click()
    dark = opened.execute_script(script)
    assert light == ["rgb(255, 255, 255)", "#ffffff"]
    assert dark == ["rgb(20, 23, 27)", "#14171b"]
    assert button.get_attribute("aria-label") == "Colours: dark"


def test_unequal_protocols_are_separate_and_their_difference_named(opened: Browser) -> None:
    names = [option.text for option in Select(opened.find_element(By.ID, "benchmark")).options]
    separate = [name for name in names if name.startswith("toy-T3-")]
    assert len(separate) == 2
    assert "differ in image_size" in opened.find_element(By.ID, "protocols").text
    for name in separate:
        Select(opened.find_element(By.ID, "benchmark")).select_by_visible_text(name)
        assert list(_rows(opened)) == ["InfLoRA"]


def test_every_run_shows_its_provenance(opened: Browser) -> None:
    opened.execute_script("document.getElementById('runs-details').open = true")
    _wait(opened, "return document.getElementById('runs').rows.length > 1")
    cells = opened.find_element(By.ID, "runs").text
    assert "0123456789ab" in cells
    assert "torch 2.15.0" in cells
    assert "image_size" in (opened.find_element(By.ID, "identity").get_attribute("textContent") or "")


def test_runs_are_searched_by_any_word(opened: Browser) -> None:
    opened.execute_script("document.getElementById('runs-details').open = true")
    _wait(opened, "return document.getElementById('runs').rows.length > 1")
    opened.find_element(By.CSS_SELECTOR, "#protocol input[type='search']").send_keys("diverged")
    assert list(_rows(opened, "runs")) == ["KeepLoRA"]


def test_a_column_is_chosen_by_its_name(opened: Browser) -> None:
    shown = "return [...document.querySelectorAll('#table .dt-column-title')].map((head) => head.textContent)"
    before = opened.execute_script(shown)
    opened.find_element(By.CSS_SELECTOR, "#results .buttons-colvis").click()
    opened.find_element(By.XPATH, "//button[span='forgetting/pilot']").click()
    assert set(opened.execute_script(shown)) - set(before) == {"forgetting/pilot"}
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)


def test_a_hostile_name_is_text(opened: Browser) -> None:
    assert HOSTILE in _rows(opened)
    assert opened.title != "broken"
    assert opened.find_elements(By.CSS_SELECTOR, "main img[src='x']") == []


def test_no_axis_of_percentages_goes_beyond_0_and_100(opened: Browser) -> None:
    script = (
        "return ['curve', 'pareto', 'tasks'].flatMap((id) => document.getElementById(id).layout.yaxis.range)"
    )
    ends = opened.execute_script(script)
    assert len(ends) == 6
    assert 0 <= min(ends) < max(ends) <= 100


def test_one_outlier_squeezes_no_axis(opened: Browser) -> None:
    reach = "return [[1, 1.2, 1.5, 100], [7, -8, 3, 60], [2, 100, 100], [1, 2, 4, 8], [0, 5], []].map(reach)"
    assert opened.execute_script(reach) == [1.5, 8, 100, 8, 5, 0]
    opened.execute_script(
        "globalThis.slow = benchmark().entries.find((entry) => entry.label === 'InfLoRA');"
        "for (const name of ['seconds', 'seconds/training']) slow.statistics[name].mean *= 100;"
        "charts()"
    )
    others = (
        "benchmark().entries.map((one) => one.statistics.seconds.mean).filter((mean) => mean && mean < 1000)"
    )
    for chart in ("pareto", "phases"):
        end = opened.execute_script(f"return document.getElementById('{chart}').layout.xaxis.range[1]")
        assert end == pytest.approx(1.15 * opened.execute_script(f"return Math.max(...{others})"))
        texts = opened.execute_script(
            f"return document.getElementById('{chart}').layout.annotations.map((one) => one.text)"
        )
        assert len(texts) == 1 and re.fullmatch(r"39,000( s)? →", texts[0])
    opened.execute_script(
        "for (const name of ['seconds', 'seconds/training']) slow.statistics[name].mean /= 100"
    )


def test_a_package_without_its_script_is_named(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_bench.report.page.files", lambda package: [])
    with pytest.raises(FileNotFoundError, match=r"itables has no .*: pip install --upgrade itables"):
        page(tables(comparisons([drawn("InfLoRA", 1)]), ["acc/sample"]), "results")


def test_one_file_holds_everything(drawn: Drawn) -> None:
    text = page(tables(comparisons([drawn("InfLoRA", 1)]), ["acc/sample"]), "results")
    assert not re.search(r'<(script|link|img|iframe)[^>]*(src|href)="(?!data:)', text)
    assert "default-src 'none'" in text
    plotly, datatables = (
        gzip.decompress(base64.b64decode(packed)).decode()
        for packed in re.findall(r'<script type="application/gzip">(.*?)</script>', text)
    )
    assert "plotly.js (cartesian - minified) v4" in plotly[:100]
    assert "globalThis.DataTable=" in datatables
    assert "<!-- " not in text.partition("<script>")[0]


def test_the_page_is_far_below_two_megabytes(path: Path) -> None:
    assert path.stat().st_size < 1_200_000

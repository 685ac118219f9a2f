"""Result files of strangers: every field with wrong types, sizes, nesting and names, in every format.

Beside each hostile file lie two good ones. Whatever the hostile file holds, the report shows the good ones,
accounts for the hostile one in a table or in one line, and writes into its own folder only.
"""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_bench.report.command import FORMATS, Format, Report, report
from cl_bench.results.result import FILE_NAME, Result, read_all

Made = Callable[..., Result]
Files = list[tuple[str, bytes]]

GOOD = ("first good", "second good")

NAMES = [
    "x/../../../../ESCAPED",
    "/tmp/ESCAPED",
    "..",
    "nul\x00byte",
    "CON",
    "n" * 499,
    "ﷺ" * 300,
    "a\n\\input{/etc/passwd}",
    "a\r\\end{tabular}\x85\u2028% $",
    "<!-- script -->",
    "<!--<script>",
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=document.title='broken'>",
    "%{x}<a href='javascript:1'>",
    "a | b `c` [d](http://e) **f** &lt;",
    "=HYPERLINK(1)",
    "@SUM(1)",
    "\x1b]0;title\x07\x1b[2J\x9b31m",
    "\u202etxt.exe\u2066",
    "$_v CA$",
    "p$5_$q",
    r"\frac{",
    ":smile: [red]text[/red]",
    "__proto__",
    "first good",
]
"""Names that some place where they are shown would obey."""

WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    2.5,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "text",
    "7",
    [],
    {},
    [None],
    [[]],
    [[0, 1], [3, 2]],
    [1e9] * 20,
    {"a": {"b": []}},
    [[1]] * 2_000,
    ["\ud800"],
    {"\ud800": 1},
]
"""Values of wrong types, ranges and sizes."""

PLACES: list[tuple[str | int, ...]] = [
    ("strategy",),
    ("dataset",),
    ("experiences",),
    ("experiences", 1),
    ("class_names",),
    ("class_names", 0),
    ("test_images",),
    ("test_images", 0),
    ("order",),
    ("seed",),
    ("regime",),
    ("protocol",),
    ("protocol", "identity"),
    ("protocol", "identity", "backbone"),
    ("protocol", "identity", "backbone", "options"),
    ("protocol", "identity", "backbone", "model"),
    ("protocol", "identity", "variants"),
    ("protocol", "identity", "evaluated_on"),
    ("protocol", "factors"),
    ("config",),
    ("config", "seed"),
    ("setting",),
    ("status",),
    ("error",),
    ("rows",),
    ("rows", 1),
    ("rows", 1, "correct"),
    ("rows", 1, "correct", 0),
    ("rows", 1, "correct_by_domain"),
    ("costs",),
    ("costs", 0),
    ("costs", 0, "seconds"),
    ("costs", 0, "seconds", "training"),
    ("costs", 0, "stored_bytes"),
    ("provenance",),
    ("provenance", "versions"),
    ("provenance", "device"),
    ("provenance", "threads"),
    ("diagnostics",),
    ("diagnostics", 0),
    ("diagnostics", 0, "angular"),
    ("domains",),
    ("domain_images",),
    ("training_data",),
    ("schema",),
]
"""Places in a result file where a wrong value is put."""

NAMED: list[tuple[str | int, ...]] = [
    ("strategy",),
    ("dataset",),
    ("order",),
    ("setting",),
    ("error",),
    ("class_names", 0),
    ("protocol", "identity", "backbone", "model"),
    ("protocol", "identity", "precision"),
    ("provenance", "device"),
    ("provenance", "commit"),
    ("domains", 0),
]
"""Places of names."""


def base(made: Made) -> dict[str, Any]:
    """Return the JSON of a finished run with domains and diagnostics, in a benchmark of its own."""
    result = made("hostile", ((9,), (5, 8)), dataset="strange")
    result.domains, result.domain_images = ["one", "two"], [[5, 5], [5, 5]]
    for row in result.rows:
        assert row is not None
        row.correct_by_domain = [[min(5, count) for count in row.correct]] * 2
    result.diagnostics = [
        {
            "basis_dims": [3, 4],
            "violation": {"k": [{"absolute": 1.0, "relative": 0.1}]},
            "danger_score": 0.2,
            "angular": {"nearest_old": [0.1], "own_centre": [0.9]},
            "held_out_ncm": {"before": 0.5, "after": 0.4},
        }
    ] * 2
    payload: dict[str, Any] = json.loads(json.dumps(vars(result), default=vars))
    return payload


def changed(payload: dict[str, Any], place: tuple[str | int, ...], value: object) -> bytes:
    """Return ``payload`` with ``value`` at ``place``, as JSON with whatever Python's own writer allows."""
    made = copy.deepcopy(payload)
    inside: Any = made
    for step in place[:-1]:
        inside = inside[step]
    inside[place[-1]] = value
    return json.dumps(made).encode()


def raw(payload: dict[str, Any]) -> Files:
    """Return files that are wrong as a whole."""
    text = json.dumps(payload)
    longer = {"experiences": [[i, i + 1] for i in range(20_000)], "class_names": ["c"] * 20_000}
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    return [
        ("empty", b""),
        ("cut", text[: len(text) // 2].encode()),
        ("utf16", text.encode("utf-16")),
        ("latin1", text.replace("hostile", "h\xf6stile").encode("latin-1")),
        ("mark", b"\xef\xbb\xbf" + text.encode()),
        ("surrogate", text.replace("hostile", "\\ud83d").encode()),
        ("lists", b"[" * 100_000 + b"]" * 100_000),
        ("objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        ("nested", changed(payload, ("config", "deep"), deep)),
        ("twice", text.replace('"seed":', '"seed": 1, "seed":', 1).encode()),
        ("digits", text.replace('"seed": 1', f'"seed": {"9" * 5_000}', 1).encode()),
        ("exponent", text.replace('"training": 2.0', '"training": 1e999', 1).encode()),
        ("long stream", json.dumps(payload | longer | {"test_images": [1] * 20_000, "rows": []}).encode()),
        ("many keys", changed(payload, ("config", "many"), {str(i): i for i in range(20_000)})),
        ("long key", changed(payload, ("config", "k" * 100_000), 1)),
        ("rows", json.dumps(payload | {"rows": payload["rows"] * 3}).encode()),
        ("not an object", b'"schema"'),
    ]


def once_fatal(payload: dict[str, Any]) -> Files:
    """Return the kinds of files that a reader without validation found while it made its tables."""
    return [
        ("counts_null", changed(payload, ("rows", 1, "correct", 0), None)),
        ("name_null", changed(payload, ("strategy",), None)),
        ("provenance_null", changed(payload, ("provenance",), None)),
        ("row_above", changed(payload, ("rows", 0, "correct", 0), payload["test_images"][0] + 1)),
        ("rows_short", changed(payload, ("rows",), payload["rows"][:-1])),
    ]


def hostile(made: Made) -> Files:
    """Return the name and content of every hostile file."""
    payload = base(made)
    files = once_fatal(payload) + raw(payload)
    for place, (number, value) in itertools.product(PLACES, enumerate(WRONG)):
        files.append((f"{'.'.join(map(str, place))}-{number}", changed(payload, place, value)))
    for place, (number, name) in itertools.product(NAMED, enumerate(NAMES)):
        files.append((f"{'.'.join(map(str, place))}-name{number}", changed(payload, place, name)))
    return files


def written(files: Files, made: Made, folder: Path) -> int:
    """Write good and hostile files below ``folder`` and return how many there are."""
    for place, content in files:
        path = folder / place.replace("/", "_")[:100] / FILE_NAME
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    for number, name in enumerate(GOOD):
        made(name, seed=number).write(folder / name)
        made(name, seed=number + 1).write(folder / f"{name} again")
    return len(files) + 2 * len(GOOD)


def outside(folder: Path) -> set[Path]:
    """Return every path around ``folder`` and in it that is not of its report."""
    return {
        path for path in folder.parent.parent.rglob("*") if folder / "report" not in (path, *path.parents)
    }


def require_sound(left: Report, format: Format) -> None:  # noqa: A002
    """Require both good strategies in the report, and nothing in it that its format would obey."""
    text = left.files[0].read_text(encoding="utf-8")
    assert all(name in text for name in GOOD)
    assert all(line.isprintable() for line in left.notices)
    if format == "csv":
        for path in (path for path in left.files if path.suffix == ".csv"):
            for line in csv.reader(io.StringIO(path.read_text(encoding="utf-8"))):
                assert all(re.match(r"-?[\d.e-]+$|[^=+@-]|$", cell) for cell in line), line
    elif format == "json":
        json.loads(text, parse_constant=pytest.fail)
        assert all(line.isprintable() for line in text.splitlines())
    elif format == "html":
        before, _, after = text.partition('<script type="application/json" id="data">')
        data, _, scripts = after.partition("</script>")
        assert not set("<>&\u2028\u2029") & set(data)
        json.loads(data, parse_constant=pytest.fail)
        assert before.count('<script type="application/gzip">') == 2  # Plotly and DataTables
        assert '"use strict"' in scripts
    elif format == "latex":
        lines = [line for line in text.split("\n") if not line.startswith("%")]
        commands = set(re.findall(r"\\([A-Za-z]+)", "\n".join(lines).replace("\\\\", "")))
        assert commands <= LATEX_COMMANDS
        assert all(line.isprintable() for line in text.split("\n"))
        assert re.findall(r"\\label{tab:([^}]*)}", text) == re.findall(r"\\label{tab:([\w.-]*)}", text)
    else:
        assert all(line.isprintable() for line in text.split("\n"))
        assert not re.search(r"<[a-zA-Z!/]|(?<!\\)\[d\]", text)
        tables = [line for line in text.split("\n") if line.startswith("|")]
        assert all(line.endswith("|") for line in tables)


LATEX_COMMANDS = set(
    "begin end centering caption label toprule midrule bottomrule cmidrule multicolumn textbf underline emph "
    "scriptsize pm times leq geq Delta dots dagger textbackslash textasciitilde textasciicircum textless "
    "textgreater textbar char".split()
)
"""Every command that a table of ours may hold."""


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_bench.report.command.pictures", lambda *_: ([], []))


def test_a_hundred_hostile_files_cost_the_report_nothing(
    made: Made, tmp_path: Path, no_pictures: None
) -> None:
    every = hostile(made)
    folder = tmp_path / "deep" / "results"
    chosen = every[:25] + every[25 :: len(every) // 90]
    assert len(chosen) >= 100
    number = written(chosen, made, folder)
    before = outside(folder)
    for format in FORMATS:  # noqa: A001
        left = report(folder, format)
        results, unreadable = read_all(folder)
        assert len(results) + len(unreadable) == number
        assert len(results) > 10
        assert len(left.notices) == len(unreadable) > 50
        require_sound(left, format)
    assert outside(folder) == before


@pytest.mark.parametrize("place", NAMED, ids=lambda place: str(place[0]))
def test_every_hostile_name_is_shown_and_obeyed_nowhere(
    made: Made, tmp_path: Path, no_pictures: None, place: tuple[str | int, ...]
) -> None:
    payload = base(made)
    files = [(str(number), changed(payload, place, name)) for number, name in enumerate(NAMES)]
    folder = tmp_path / "deep" / "results"
    written(files, made, folder)
    for format in ("md", "latex", "html"):  # noqa: A001
        left = report(folder, format)
        assert left.notices == []
        require_sound(left, format)


def test_the_kinds_of_files_that_once_ended_a_report_no_longer_do(
    made: Made, tmp_path: Path, no_pictures: None
) -> None:
    folder = tmp_path / "deep" / "results"
    files = once_fatal(base(made))
    written(files, made, folder)
    for format in FORMATS:  # noqa: A001
        left = report(folder, format)
        assert len(left.notices) == len(files)
        require_sound(left, format)


@pytest.mark.soak
@pytest.mark.parametrize("format", FORMATS)
def test_every_hostile_file_costs_every_format_nothing(
    made: Made,
    tmp_path: Path,
    format: Format,  # noqa: A002
) -> None:
    every = hostile(made)
    assert len(every) >= 500
    accounted = 0
    for number, chunk in enumerate(chunks(every, 50)):
        folder = tmp_path / str(number) / "results"
        files = written(chunk, made, folder)
        before = outside(folder)
        left = report(folder, format)
        results, unreadable = read_all(folder)
        assert len(results) + len(unreadable) == files
        assert left.notices == [f"Not read: {line}" for line in unreadable]
        require_sound(left, format)
        assert outside(folder) == before
        accounted += len(chunk)
        shutil.rmtree(tmp_path / str(number))
    assert accounted == len(every)


def chunks(files: Files, size: int) -> Iterator[Files]:
    for start in range(0, len(files), size):
        yield files[start : start + size]

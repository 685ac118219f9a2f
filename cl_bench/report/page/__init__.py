"""The whole comparison as one HTML file that opens from disk; Plotly and DataTables are inside it.

The page contacts no host, and its content security policy forbids it. Everything it shows is computed here,
from the same tables as the other formats; the scripts only sort, search and draw.

Both libraries are compressed with gzip, which every browser decompresses since May 2023. Plotly is its bundle
of Cartesian charts, a third of the whole, which no Python package has: the file comes from the npm package
plotly.js-cartesian-dist-min, 4.1.1.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import files
from importlib.resources import files as resources
from typing import Any

import numpy as np
import numpy.typing as npt

from cl_bench import __version__
from cl_bench.artifacts.confusion import placed
from cl_bench.errors import visible
from cl_bench.report.comparison import Entry, flat
from cl_bench.report.records import finite, statistic_record
from cl_bench.report.statistics import Contrast, statistic
from cl_bench.report.tables import (
    COST_HEADINGS,
    HOW_TO_READ_DIFFERENCES,
    INCOMPLETE,
    SHORT_NAMES,
    TRAINING_DATA,
    Table,
    absent,
    compared,
    mixed_provenance,
    protocol_differences,
    unnamed_differences,
)
from cl_bench.report.tuning import (
    HEADING,
    best_so_far,
    chosen,
    marks,
    sensitivity_columns,
    study,
    tuned_columns,
)
from cl_bench.results.escapes import in_json
from cl_bench.results.metrics import (
    BOUNDS,
    DEFINITIONS,
    HIGHER_IS_BETTER,
    accuracy_matrix,
    incremental_accuracy,
)
from cl_bench.results.result import COSTS, Result

Array = npt.NDArray[np.float64]
Json = dict[str, Any]

_FOLDER = resources("cl_bench.report.page")
_SCRIPTS = ("data.js", "charts.js", "accuracy.js", "inside.js", "tuning.js", "tables.js", "page.js")
_PLACES = re.compile(r"<!-- (\w+) -->")
_PERCENT = (0.0, 100.0)
_EXPORTS = re.compile(r"export\{[^}]*?(\w+) as default[^}]*\};")  # itables' bundle hands on DataTables


def page(tables: Sequence[Table], title: str, unreadable: Sequence[str] = ()) -> str:
    """Return ``tables`` as one self-contained HTML page.

    Args:
        tables: Tables of the report.
        title: Name of the results.
        unreadable: A sentence for each file that could not be read.

    Raises:
        FileNotFoundError: If the package itables lacks its script.
    """
    parts = {
        "title": escape(visible(title)),
        "style": _part("page.css"),
        "plotly": _in_base64((_FOLDER / "plotly-cartesian.min.js.gz").read_bytes()),
        "datatables": _in_base64(gzip.compress(_datatables().encode(), mtime=0)),
        "data": in_json(_payload(tables, title, unreadable)),
        "scripts": "\n".join(map(_part, _SCRIPTS)),
    }
    # In one step, so that nothing in a part is taken for the place of another.
    return _PLACES.sub(lambda place: parts[place[1]], _part("page.html"))


def _part(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _datatables() -> str:
    """Return the script of DataTables as a function, so that its names are not those of the page."""
    script = _EXPORTS.sub(r"globalThis.DataTable=\1;", _packaged("itables", "html/dt_bundle.js"))
    return f"(() => {{\n{script}\n}})();"


def _packaged(package: str, path: str) -> str:
    """Return a script that ``package`` carries, without importing the package."""
    found = next((file for file in files(package) or [] if file.as_posix() == f"{package}/{path}"), None)
    if found is None:
        raise FileNotFoundError(f"The package {package} has no {path}: pip install --upgrade {package}.")
    return found.read_text(encoding="utf-8")


def _payload(tables: Sequence[Table], title: str, unreadable: Sequence[str]) -> Json:
    shown = [comparison for table in tables for comparison in table.comparisons]
    return {
        "title": visible(title),
        "version": __version__,
        "shown": list(tables[0].metrics),
        "metrics": {
            name: {
                "short": SHORT_NAMES.get(name, name),
                "definition": text,
                "higher": HIGHER_IS_BETTER[name],
                "bounds": BOUNDS[name],
            }
            for name, text in DEFINITIONS.items()
        },
        "costs": COST_HEADINGS,
        "kept": TRAINING_DATA if any(table.keeps_training_data for table in tables) else None,
        "chosen": HEADING if any(map(marks, tables)) else None,
        "incomplete": INCOMPLETE,
        "how": HOW_TO_READ_DIFFERENCES,
        "protocols": protocol_differences(shown),
        "unreadable": list(unreadable),
        "benchmarks": [
            _benchmark(table, index) for table in tables for index in range(len(table.comparisons))
        ],
    }


def _benchmark(table: Table, index: int) -> Json:
    comparison = table.comparisons[index]
    run = comparison.results[0]
    order = {entry.label: place for place, entry in enumerate(comparison.entries)}
    places = {name: table.places(index, name) for name in DEFINITIONS}
    marks = {
        row.label: {
            "ranked": ranked,
            "places": {name: of_rows[number] for name, of_rows in places.items() if of_rows[number]},
        }
        for number, (row, ranked) in enumerate(zip(table.rows, table.ranked(index), strict=True))
    }
    return {
        "title": visible(comparison.title),
        "length": run.num_experiences,
        "blocks": len(comparison.blocks),
        "sentence": compared(comparison),
        "fingerprint": comparison.fingerprint,
        "identity": {visible(key): _plain(value) for key, value in flat(comparison.identity).items()},
        "mixed": mixed_provenance(comparison),
        "absent": absent(comparison),
        "unnamed": unnamed_differences(comparison),
        "studies": tuned_columns(comparison),
        "sensitivity": sensitivity_columns(comparison),
        "entries": [_entry(entry, table.metrics) | marks[entry.label] for entry in comparison.entries],
        "differences": {
            name: [_difference(pair, order) for pair in pairs]
            for name, pairs in table.contrasts[index].items()
        },
    }


def _plain(value: object) -> str:
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _entry(entry: Entry, shown: Sequence[str]) -> Json:
    names = (*DEFINITIONS, *COSTS)
    record: Json = {
        "label": entry.label,
        "joint": entry.is_joint,
        "statuses": entry.statuses,
        "n": len(entry.runs),
        "kept": entry.training_data,
        "chosen": chosen(entry),
        "statistics": {
            name: statistic_record(entry.statistic(name), bootstrap=name in shown) for name in names
        },
        "runs": [_run(run, entry, shown) for run in (*entry.runs, *entry.unfinished)],
    }
    if entry.runs:
        record |= {
            "curve": [] if entry.is_joint else _curve(entry),
            "matrix": _rounded(np.mean([_matrix(run) for run in entry.runs], axis=0)),
            "classes": _classes(entry),
            "confusion": _confusion(entry),
            "domains": _domains(entry),
            "inside": _inside(entry),
            "study": _study(entry),
        }
    return record


def _run(run: Result, entry: Entry, shown: Sequence[str]) -> Json:
    provenance = run.provenance
    versions: Mapping[str, str] = provenance.get("versions", {})
    measured = entry.measured.get((run.seed, run.order), {}) if run.status == "done" else {}
    return {
        "seed": run.seed,
        "order": visible(run.order),
        "cell": run.cell,
        "status": run.status,
        "error": visible(run.error or ""),
        "values": [finite(measured[name]) if name in measured else None for name in shown],
        "seconds": finite(round(measured["seconds"], 1)) if measured else None,
        "commit": visible(provenance.get("commit") or ""),
        "device": visible(provenance.get("device") or ""),
        "threads": provenance.get("threads"),
        "started": visible(provenance.get("started") or ""),
        "versions": visible(", ".join(f"{name} {value}" for name, value in versions.items())),
    }


def _curve(entry: Entry) -> list[Json]:
    """Return the accuracy over the classes seen after every experience, as statistics over runs."""
    runs = np.array([incremental_accuracy(run.counts("correct"), run.totals) for run in entry.runs])
    resolutions = 100 / np.min([np.cumsum(run.totals) for run in entry.runs], axis=0)
    return [
        statistic_record(statistic(values, _PERCENT, resolution), bootstrap=False)
        for values, resolution in zip(runs.T, resolutions, strict=True)
    ]


def _matrix(run: Result) -> Array:
    return accuracy_matrix(run.counts("correct"), run.totals)


def _classes(entry: Entry) -> Json:
    """Return the accuracy of every class (rows) after each experience (columns), in whole percent.

    It is the mean over the runs in the class order of the first run.
    """
    first = entry.runs[0]
    tables = []
    for run in (run for run in entry.runs if run.class_names == first.class_names):
        table = np.full((len(first.class_names), first.num_experiences), np.nan)
        for after, row in enumerate(run.rows):
            if row is not None:
                seen = len(row.correct)
                table[:seen, after] = 100 * np.array(row.correct) / np.maximum(run.test_images[:seen], 1)
        tables.append(table)
    return {"names": _names(first), "runs": len(tables), "rows": _rounded(np.mean(tables, axis=0), None)}


def _confusion(entry: Entry) -> Json | None:
    """Return where images are placed at the end, in percent of a row, as means over runs; None if unknown.

    Between classes, only runs in the class order of the first run count.
    """
    if not entry.confusions:
        return None
    found = {
        "runs": len(entry.confusions),
        "experiences": {
            "names": None,
            "rows": _rounded(placed([one.experiences for one in entry.confusions])),
        },
    }
    first = entry.confusions[0].result
    counts = [
        one.classes
        for one in entry.confusions
        if one.classes is not None and one.result.class_names == first.class_names
    ]
    if counts:
        found["classes"] = {"names": _names(first), "rows": _rounded(placed(counts))}
    return found


def _names(run: Result) -> list[str]:
    return list(map(visible, run.class_names))


def _domains(entry: Entry) -> Json:
    """Return the final accuracy by domain, as statistics over the runs that counted domains."""
    by_domain: dict[str, list[float]] = {}
    for run in entry.runs:
        row = run.rows[-1] if run.rows else None
        if row is None or not row.correct_by_domain:
            continue
        for name, correct, images in zip(run.domains, row.correct_by_domain, run.domain_images, strict=True):
            if sum(images):
                by_domain.setdefault(visible(name), []).append(100.0 * sum(correct) / sum(images))
    return {
        name: statistic_record(statistic(values, _PERCENT), bootstrap=False)
        for name, values in by_domain.items()
    }


def _inside(entry: Entry) -> Json | None:
    """Return the diagnostics as means over the runs that have them; None if none has."""
    measured = [run.diagnostics for run in entry.runs if run.diagnostics]
    if not measured:
        return None
    last = [diagnostics[-1] for diagnostics in measured]
    angular = next((one["angular"] for one in last if one.get("angular")), None)
    return {
        "runs": len(measured),
        "basis": _mean_table(
            [[one.get("basis_dims") or [] for one in diagnostics] for diagnostics in measured]
        ),
        "violation": {
            kind: {
                visible(target): _mean_list(
                    [[layer[kind] for layer in (one.get("violation") or {}).get(target, [])] for one in last]
                )
                for target in sorted({target for one in last for target in one.get("violation") or {}})
            }
            for kind in ("absolute", "relative")
        },
        "danger": _mean_of([one.get("danger_score") for one in last]),
        "angular": angular and {name: [round(x, 4) for x in points] for name, points in angular.items()},
        "held_out": {
            when: [
                _mean_of([_scaled((one[i].get("held_out_ncm") or {}).get(when)) for one in measured])
                for i in range(min(map(len, measured)))
            ]
            for when in ("before", "after")
        },
    }


def _study(entry: Entry) -> Json | None:
    """Return the trials of the study whose best settings an entry has; None if it has none."""
    found = study(entry)
    if found is None:
        return None
    whole = max(found.experiences)
    return {
        "metric": visible(found.metric),
        "on": visible(found.on),
        "best": [finite(score) for score in best_so_far(found)],
        "scores": found.scores,
        "pruned": [learnt < whole for learnt in found.experiences],
        "settings": {
            visible(key): {
                "values": [visible(value) if isinstance(value, str) else value for value in values],
                "log": found.space.get(key, {}).get("log") is True,
                "importance": found.importance.get(key),
            }
            for key, values in found.settings.items()
        },
    }


def _scaled(fraction: float | None) -> float | None:
    return None if fraction is None else 100.0 * fraction


def _mean_of(values: Sequence[float | None]) -> float | None:
    return finite(statistic(value for value in values if value is not None).mean)


def _mean_list(lists: Sequence[Sequence[float]]) -> list[float | None]:
    """Return means over runs by position, using only the longest lists."""
    length = max(map(len, lists))
    full = [values for values in lists if len(values) == length]
    return [_mean_of(values) for values in zip(*full, strict=True)]


def _mean_table(tables: Sequence[Sequence[Sequence[float]]]) -> list[list[float | None]]:
    length = min(map(len, tables))
    return [_mean_list([table[i] for table in tables]) for i in range(length)]


def _difference(pair: Contrast, order: Mapping[str, int]) -> Json:
    interval = pair.difference.interval
    return {
        "first": order[pair.first],
        "second": order[pair.second],
        "mean": finite(pair.difference.mean),
        "interval": [finite(interval.low), finite(interval.high)] if interval.exists else None,
        "n": pair.difference.n,
        "score": [pair.wins, pair.ties, pair.losses],
        "p": finite(pair.p_holm),
        "verdict": pair.verdict,
    }


def _rounded(table: Array, digits: int | None = 2) -> list[list[float | None]]:
    return [[None if np.isnan(value) else round(float(value), digits) for value in row] for row in table]

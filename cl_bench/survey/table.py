"""What a survey found, in Markdown, for cl_bench/bench/README.md: tables, missed aims, and what failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
"""One row of a survey: its ``name``, what it found, and the sentences of what ``failed``."""

_NONE = "–"

# Aims for ViT-B/16 in bf16 on an H200: a step over the floor's, at most; share of the matrix rate, and images
# a second, at least; seconds of 50 epochs of ImageNet-R, at most.
_STEP, _SHARE, _RATE, _SECONDS = 1.05, 0.45, 4_500, 300.0


def markdown(setup: Row, rows: Sequence[Row], missing: Sequence[str]) -> str:
    """Return the tables of ``rows``, and below them what failed, is missing, or misses its aim.

    Args:
        setup: What was surveyed.
        rows: The rows that are made.
        missing: Names of the rows that are not.
    """
    by_name = {row["name"]: row for row in rows}
    failed = [f"{row['name']}: {sentence}" for row in rows for sentence in row["failed"]]
    wrong = sum(bool(row["failed"]) for row in rows)
    head = (
        f"**{setup['device']}**, {setup['cores']} CPU cores, torch {setup['torch']}, "
        f"commit {setup['commit']}, size {setup['size']}: {len(rows)} of {len(rows) + len(missing)} rows "
        f"made, {wrong} failed."
    )
    parts = [head, _steps(by_name), "\n".join(_stream(by_name)), _checks(by_name)]
    aimed = setup["size"] == "full" and not setup["device"].startswith("cpu")
    for title, entries in (
        ("Failed", failed),
        ("Missing; the same command makes them", missing),
        ("Aims missed", list(_aims_missed(by_name)) if aimed else []),
        ("Not measured", sorted(set(_reasons(rows)))),
    ):
        if entries:
            parts.append("\n".join([f"{title}:", "", *(f"- {entry}" for entry in entries)]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _steps(by_name: Mapping[str, Row]) -> str:
    """Return the table of training steps, each eager and compiled."""
    stems = dict.fromkeys(
        name.partition("/")[2] for name in by_name if name.startswith(("eager", "compiled"))
    )
    keys = {"images_per_s": ",.0f", "of_matrix_rate": ".0%", "ratio_to_floor": ".3f", "peak_bytes": ",d"}
    lines = []
    for stem in stems:
        eager, compiled = (
            by_name.get(f"{how}/{stem}", {}).get("steps") or {} for how in ("eager", "compiled")
        )
        for batch in eager | compiled:
            pair = eager.get(batch, {}), compiled.get(batch, {})
            cells = [_cell(one.get(key), form) for one in pair for key, form in keys.items()]
            quicker = pair[1]["images_per_s"] / pair[0]["images_per_s"] if all(pair) else None
            graphs = by_name[f"compiled/{stem}"]["graphs"] if compiled else None
            lines.append([stem, batch, *cells, _cell(quicker, ".2f"), _cell(graphs, "d")])
    columns = ["images/s", "of the matrix rate", "step over floor", "peak bytes"]
    head = ["strategy", "images", *columns, *(f"compiled: {name}" for name in columns), "speed-up", "graphs"]
    return _table(head, lines)


def _stream(by_name: Mapping[str, Row]) -> Iterator[str]:
    """Yield what loading and the stream took, a line each."""
    loading, stream = (by_name.get(f"stream/{name}", {}) for name in ("loading", "imagenet_r"))
    if "waiting" in loading:
        yield (
            f"- The loader delivers {loading['loader_images_per_s']:,.0f} images a second; training takes "
            f"{loading['training_images_per_s']:,.0f} and waits for it {loading['waiting']:.1%} of its time."
        )
    if "published_seconds" in stream:
        yield (
            f"- A stream of the shape of ImageNet-R takes {stream['run_seconds']:.0f} s, and with 50 epochs "
            f"an extrapolated {stream['published_seconds']:.0f} s; it trains on "
            f"{stream['training_images_per_s']:,.0f} images a second."
        )


def _checks(by_name: Mapping[str, Row]) -> str:
    """Return the table of checks, a line for each strategy."""
    kinds = {
        "counts_equal": ("counts as on the CPU", ""),
        "apart": ("tensors apart", ".0e"),
        "tolerance": ("allowed", ".0e"),
        "same_bits": ("same bits after a cut", ""),
        "no_wait": ("no wait", ""),
    }
    stems = sorted({n.partition("/")[2] for n in by_name if n.startswith(("tiny/", "vit/", "graphs/"))})
    lines = []
    for stem in stems:
        tiny, vit = (by_name.get(f"{transformer}/{stem}", {}) for transformer in ("tiny", "vit"))
        cells = [_cell(one.get(key), form) for one in (tiny, vit) for key, (_, form) in kinds.items()]
        lines.append([stem, *cells, _cell(by_name.get(f"graphs/{stem}", {}).get("graphs"), "d")])
    names = [f"{transformer}: {name}" for transformer in ("tiny", "ViT-B/16") for name, _ in kinds.values()]
    return _table(["strategy", *names, "graphs"], lines)


def _aims_missed(by_name: Mapping[str, Row]) -> Iterator[str]:
    for name, row in by_name.items():
        for batch, step in (row.get("steps") or {}).items():
            where = f"{name}, {batch} images"
            if step["ratio_to_floor"] > _STEP:
                yield f"{where}: {step['ratio_to_floor']:.3f} of a step of the floor, not {_STEP}"
            if step["of_matrix_rate"] < _SHARE:
                yield f"{where}: {step['of_matrix_rate']:.0%} of the matrix rate, not {_SHARE:.0%}"
            if step["images_per_s"] < _RATE:
                yield f"{where}: {step['images_per_s']:,.0f} images a second, not {_RATE:,}"
    if (seconds := by_name.get("stream/imagenet_r", {}).get("published_seconds", 0.0)) > _SECONDS:
        yield f"50 epochs of ImageNet-R take {seconds:.0f} s, not {_SECONDS:.0f}"


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        kind, _, stem = row["name"].partition("/")
        for figure, reason in row.get("reasons", {}).items():
            where = "" if reason.startswith("Only CUDA") else f" of {kind}/{stem}"
            yield f"{figure}{where}: {reason}"


def _cell(value: Any, form: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _NONE if value is None else f"{value:{form}}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table; none without lines.

    >>> print(_table(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | ---: |
    | 1 | 2 |
    """
    if not lines:
        return ""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))

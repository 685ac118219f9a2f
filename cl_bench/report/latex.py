r"""Tables as LaTeX: booktabs rules, the best of a column in bold, the second underlined.

What is written compiles in a document with ``\usepackage{booktabs}`` and UTF-8 input.
"""

from __future__ import annotations

from collections.abc import Sequence

from cl_bench.report.comparison import Comparison
from cl_bench.report.markdown import HOW_TO_READ_DIFFERENCES, p_value, quantity
from cl_bench.report.statistics import TOO_SMALL, Contrast
from cl_bench.report.tables import (
    COST_HEADINGS,
    INCOMPLETE,
    SHORT_NAMES,
    UNDEFINED,
    Row,
    Table,
    absent,
    compared,
    definitions,
    protocol_differences,
)
from cl_bench.results.result import COSTS

_DAGGER = r"$^\dagger$"

_SPECIAL = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "Δ": r"$\Delta$",
    "…": r"\dots{}",
    "†": _DAGGER,
    "⁻": "$^-$",
}


def escaped(text: str) -> str:
    r"""Return ``text`` so that LaTeX prints it as it is.

    >>> escaped("LoRA_r=4 & 5 %")
    'LoRA\\_r=4 \\& 5 \\%'
    """
    return "".join(_SPECIAL.get(character, character) for character in text)


def latex(tables: Sequence[Table]) -> str:
    """Return ``tables`` as LaTeX floats: accuracies, differences and costs, each with its caption."""
    lines = [
        r"% Needs \usepackage{booktabs}. Written by cl-bench report --format latex.",
        *(
            f"% {sentence}"
            for sentence in protocol_differences(
                [comparison for table in tables for comparison in table.comparisons]
            )
        ),
    ]
    floats = [part for table in tables for part in (_metrics(table), *_differences(table), *_costs(table))]
    return "\n".join(lines) + "\n\n" + "\n\n".join(floats) + "\n"


def _metrics(table: Table) -> str:
    names = [escaped(SHORT_NAMES.get(name, name)) for name in table.metrics]
    body = [[_label(row)] for row in table.rows]
    for index in range(len(table.comparisons)):
        for name in table.metrics:
            places = table.places(index, name)
            for line, row, place in zip(body, table.rows, places, strict=True):
                line.append(_metric_cell(table, row, index, name, place))
    return _float(table, table.comparisons, names, body, _caption(table), "results")


def _metric_cell(table: Table, row: Row, index: int, name: str, place: int | None) -> str:
    if not row.was_run(index):
        return rf"\emph{{{row.status(index)}}}"
    value = row.statistic(index, name)
    if value.n == 0:
        return "--"
    mean = f"{value.mean:.2f}".replace("-", "$-$")
    mark = {1: r"\textbf{%s}", 2: r"\underline{%s}", None: "%s"}[place] % mean
    deviation = "" if value.n == 1 else rf"\,{{\scriptsize$\pm${value.std:.2f}}}"
    count = table.count(row, index, name)
    return mark + deviation + (rf"\,{{\scriptsize({count})}}" if " " in count else "")


def _caption(table: Table) -> str:
    sentences = [compared(comparison) for comparison in table.comparisons]
    sentences.append(
        "Mean and sample standard deviation over seeds and class orders, in percent; best in bold, second "
        "underlined."
    )
    if any(row.is_joint for row in table.rows):
        sentences.append("† Upper bound, trained on all classes at once; not ranked.")
    if table.leaves_out_incomplete():
        sentences.append(INCOMPLETE)
    for name, meaning in zip(table.metrics, definitions(table.metrics), strict=True):
        sentences.append(f"{SHORT_NAMES.get(name, name)} is {meaning}.")
    for comparison in table.comparisons:
        gone = absent(comparison)
        sentences += [f"In no mean of {comparison.title}: {'; '.join(gone)}."] if gone else []
    return escaped(" ".join(sentences))


def _differences(table: Table) -> list[str]:
    made = []
    for index, comparison in enumerate(table.comparisons):
        pairs = table.pairs(index)
        if not pairs:
            continue
        name = SHORT_NAMES.get(table.metrics[0], table.metrics[0])
        body = [[escaped(f"{pair.first} − {pair.second}"), *_difference(pair)] for pair in pairs]
        header = ["", r"$\Delta$", r"95\,\% interval", "blocks", "$p$ (Holm)", "verdict"]
        caption = f"Paired differences in {name} on {comparison.title}. {HOW_TO_READ_DIFFERENCES}"
        rows = [" & ".join(line) + r" \\" for line in body]
        made.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{{escaped(caption)}}}",
                    rf"\label{{tab:differences-{comparison.title}}}",
                    r"\begin{tabular}{lrrrrl}",
                    r"\toprule",
                    " & ".join(header) + r" \\",
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return made


def _difference(pair: Contrast) -> list[str]:
    value, interval = pair.difference, pair.difference.interval
    shown = f"$[{interval.low:+.2f}, {interval.high:+.2f}]$" if interval.exists else TOO_SMALL
    mean = f"${value.mean:+.2f}$" if value.n else "--"
    return [mean, shown, str(value.n), p_value(pair), pair.verdict]


def _costs(table: Table) -> list[str]:
    """One float for each benchmark: side by side they fit no page."""
    names = [escaped(COST_HEADINGS[name]) for name in COSTS]
    made = []
    for index, comparison in enumerate(table.comparisons):
        body = [[_label(row), *(_cost_cell(row, index, name) for name in COSTS)] for row in table.rows]
        caption = (
            f"Costs on {comparison.title}, means over runs: seconds of a whole run and of its phases, peak "
            "memory, parameters trained at once, megabytes kept at the end."
        )
        made.append(_float(table, [comparison], names, body, escaped(caption), "costs"))
    return made


def _cost_cell(row: Row, index: int, name: str) -> str:
    if not row.was_run(index):
        return rf"\emph{{{row.status(index)}}}"
    shown = quantity(row.statistic(index, name).mean)
    return "--" if shown == UNDEFINED else shown


def _label(row: Row) -> str:
    return escaped(row.label) + (_DAGGER if row.is_joint else "")


def _float(
    table: Table,
    comparisons: Sequence[Comparison],
    names: Sequence[str],
    body: Sequence[Sequence[str]],
    caption: str,
    kind: str,
) -> str:
    """Lay out one float: a column for each name under each of ``comparisons``, upper bounds ruled off."""
    width = len(names)
    spans = [
        (escaped(comparison.title), 2 + index * width, 1 + (index + 1) * width)
        for index, comparison in enumerate(comparisons)
    ]
    titles = "".join(rf" & \multicolumn{{{width}}}{{c}}{{{title}}}" for title, _, _ in spans)
    rules = " ".join(rf"\cmidrule(lr){{{first}-{last}}}" for _, first, last in spans)
    joint = [line for line, row in zip(body, table.rows, strict=True) if row.is_joint]
    others = [line for line, row in zip(body, table.rows, strict=True) if not row.is_joint]
    parts = ["\n".join(" & ".join(line) + r" \\" for line in lines) for lines in (joint, others) if lines]
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{kind}-{'-'.join(comparison.title for comparison in comparisons)}}}",
            rf"\begin{{tabular}}{{l{('r' * width) * len(spans)}}}",
            r"\toprule",
            titles + r" \\",
            rules,
            " & ".join(["strategy", *(list(names) * len(spans))]) + r" \\",
            r"\midrule",
            "\n\\midrule\n".join(parts),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
        ]
    )

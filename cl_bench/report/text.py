r"""Tables as Markdown, for a terminal or a page, and as LaTeX, for a paper.

The LaTeX has booktabs rules; it compiles in a document with ``\usepackage{booktabs}`` and UTF-8 input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from cl_bench.errors import visible
from cl_bench.report.comparison import RANKING, Comparison
from cl_bench.report.statistics import (
    BOOTSTRAP_BLOCKS,
    INTERVAL_BLOCKS,
    TOO_SMALL,
    Contrast,
    Interval,
    Statistic,
)
from cl_bench.report.tables import (
    COST_HEADINGS,
    HOW_TO_READ_DIFFERENCES,
    INCOMPLETE,
    SHORT_NAMES,
    TRAINING_DATA,
    UNDEFINED,
    UPPER_BOUND,
    Row,
    Table,
    absent,
    compared,
    definitions,
    mixed_provenance,
    protocol_differences,
    unnamed_differences,
)
from cl_bench.report.tuning import FACTORS, HEADING, SCORES, marks, sensitivity_columns, tuned_columns
from cl_bench.results.escapes import DAGGER, in_latex, in_markdown
from cl_bench.results.files import file_name

_HOW_TO_READ_DIFFERENCES = f"Δ is the first row minus the second. {HOW_TO_READ_DIFFERENCES}"


def markdown(tables: Sequence[Table]) -> str:
    """Return ``tables`` as one Markdown page, each with a description above and footnotes below."""
    compared_ones = [comparison for table in tables for comparison in table.comparisons]
    paragraphs = [in_markdown(sentence) for sentence in protocol_differences(compared_ones)]
    for table in tables:
        paragraphs += _section(table)
    return "\n\n".join(paragraphs) + "\n"


def _section(table: Table) -> list[str]:
    titles = [in_markdown(comparison.title) for comparison in table.comparisons]
    paragraphs = [f"## {', '.join(titles)}"]
    paragraphs += [in_markdown(compared(comparison)) for comparison in table.comparisons]
    paragraphs.append(means(table))
    for comparison, title in zip(table.comparisons, titles, strict=True):
        paragraphs += _bullets(f"In no mean of {title}:", map(in_markdown, absent(comparison)))
        paragraphs += _bullets(
            "Further settings in which rows of one name differ:",
            map(in_markdown, unnamed_differences(comparison)),
        )
    paragraphs.append(_how_to_read(table))
    paragraphs += _bullets("Metrics, in percent:", definitions(table.metrics))
    paragraphs += _intervals(table) + _differences(table) + _studies(table) + _costs(table)
    for comparison, title in zip(table.comparisons, titles, strict=True):
        heading = f"Mixed provenance in {title} (number of runs); seconds may not be comparable:"
        paragraphs += _bullets(heading, map(in_markdown, mixed_provenance(comparison)))
    return paragraphs


def _how_to_read(table: Table) -> str:
    first = f" on {in_markdown(table.comparisons[0].title)}" if len(table.comparisons) > 1 else ""
    sentences = [f"Mean ± sample standard deviation (number of runs); rows by falling {RANKING}{first}."]
    if any(row.is_joint for row in table.rows):
        sentences.append(
            f"{UPPER_BOUND} Upper bound: trained on all classes at once, so metrics over the stream are "
            f"undefined ({UNDEFINED}). Bold: the best of the other rows."
        )
    else:
        sentences.append("Bold: the best of a column.")
    if table.leaves_out_incomplete():
        sentences.append(INCOMPLETE)
    if len(table.comparisons) > 1:
        sentences.append("A row has one name on every benchmark; its settings may differ by recipe.")
    if not all(row.was_run(index) for row in table.rows for index in range(len(table.comparisons))):
        sentences.append("A cell in words has no finished run.")
    return " ".join(sentences)


def _bullets(heading: str, lines: Iterable[str]) -> list[str]:
    listed = "\n".join(f"- {line}" for line in lines)
    return [f"{heading}\n\n{listed}"] if listed else []


def means(table: Table) -> str:
    """Return the means of ``table``, with standard deviations and numbers of runs, in Markdown."""
    headings = {name: name for name in table.metrics}
    return _grid(table, headings, partial(_metric_cells, table), marks(table))


def _grid(
    table: Table,
    headings: Mapping[str, str],
    cells: Callable[[int, str], Iterable[str]],
    marked: Sequence[str] = (),
) -> str:
    """Return a Markdown table with the columns ``headings`` on each benchmark, below the title of several.

    ``marked`` is how the settings of each row were chosen, a column of its own.
    """
    labels = [f"{row.label} {UPPER_BOUND}" if row.is_joint else row.label for row in table.rows]
    columns = [["strategy", *map(in_markdown, labels)]]
    columns += [[HEADING, *marked]] if marked else []
    for index, comparison in enumerate(table.comparisons):
        prefix = f"{in_markdown(comparison.title)} " if len(table.comparisons) > 1 else ""
        columns += [[prefix + heading, *cells(index, name)] for name, heading in headings.items()]
    return aligned(columns)


def _intervals(table: Table) -> list[str]:
    """Return the intervals of all means, or one sentence if no row has enough runs."""
    if not any(
        row.statistic(index, name).interval.exists
        for row in table.rows
        for index in range(len(table.comparisons))
        for name in table.metrics
    ):
        return [
            f"Intervals of the means: {TOO_SMALL}, because no strategy has {INTERVAL_BLOCKS} finished runs."
        ]
    grid = _grid(
        table,
        {name: name for name in table.metrics},
        lambda index, name: (_interval_cell(row, index, name) for row in table.rows),
    )
    remark = (
        f"95 % logit interval of each mean, from {INTERVAL_BLOCKS} runs up: Student's on a scale without "
        "ends, so its own ends are possible values; no narrower than one image. From "
        f"{BOOTSTRAP_BLOCKS} runs up, the bootstrap's as well."
    )
    return [remark, grid]


def _interval_cell(row: Row, index: int, name: str) -> str:
    if not row.was_run(index):
        return row.status(index)
    value = row.statistic(index, name)
    if value.n == 0:
        return UNDEFINED
    if not value.interval.exists:
        return TOO_SMALL
    bootstrap = f"; {_range(value.bootstrap)}" if value.bootstrap.exists else ""
    return _range(value.interval) + bootstrap


def _differences(table: Table) -> list[str]:
    paragraphs = []
    for index, comparison in enumerate(table.comparisons):
        pairs = table.pairs(index)
        if not pairs:
            continue
        left_out = len(table.contrasts[index][table.metrics[0]]) - len(pairs)
        others = f", with the best row; {left_out} more pairs in the CSV, JSON and HTML" if left_out else ""
        title = in_markdown(comparison.title)
        paragraphs.append(f"Paired differences in {table.metrics[0]} on {title}{others}:")
        columns = [
            ["first − second", *(in_markdown(f"{pair.first} − {pair.second}") for pair in pairs)],
            ["Δ (shared blocks)", *(f"{pair.difference.mean:+.2f} ({pair.difference.n})" for pair in pairs)],
            ["95 % interval", *(difference_interval(pair) for pair in pairs)],
            ["win/tie/loss", *(f"{pair.wins}/{pair.ties}/{pair.losses}" for pair in pairs)],
            ["p (Holm)", *(p_value(pair) for pair in pairs)],
            ["verdict", *(pair.verdict for pair in pairs)],
        ]
        paragraphs.append(aligned(columns).replace("+nan (0)", f"{UNDEFINED} (0)"))
    return [*paragraphs, _HOW_TO_READ_DIFFERENCES] if paragraphs else []


def _studies(table: Table) -> list[str]:
    """Return how tuned rows were tuned, and what their best settings lose at other learning rates."""
    paragraphs = []
    for comparison in table.comparisons:
        title = in_markdown(comparison.title)
        for heading, columns in (
            (f"Studies of the rows tuned here on {title}: {SCORES}", tuned_columns(comparison)),
            (f"Sensitivity on {title}: {FACTORS}", sensitivity_columns(comparison)),
        ):
            if columns:
                paragraphs += [heading, aligned([list(map(in_markdown, column)) for column in columns])]
    return paragraphs


def difference_interval(pair: Contrast) -> str:
    """Return the interval of a difference in signed points, or ``TOO_SMALL``."""
    return signed(pair.difference.interval)


def signed(interval: Interval) -> str:
    """Return the ends of ``interval`` with their signs, or ``TOO_SMALL``."""
    return f"[{interval.low:+.2f}, {interval.high:+.2f}]" if interval.exists else TOO_SMALL


def p_value(pair: Contrast) -> str:
    """Return the corrected p value of a difference, or ``TOO_SMALL``."""
    return TOO_SMALL if math.isnan(pair.p_holm) else f"{pair.p_holm:.2g}"


def _costs(table: Table) -> list[str]:
    remark = (
        "Costs, means over runs: seconds of a whole run and of its phases, peak memory of the accelerator "
        "(on a CPU, resident memory of the process), parameters trained at once, MB kept at the end."
    )
    grid = _grid(
        table, _cost_headings(table), lambda index, name: (_cost_cell(row, index, name) for row in table.rows)
    )
    return [remark, grid]


def _cost_headings(table: Table) -> dict[str, str]:
    return COST_HEADINGS | ({TRAINING_DATA: TRAINING_DATA} if table.keeps_training_data else {})


def _cost_cell(row: Row, index: int, name: str) -> str:
    if not row.was_run(index):
        return row.status(index)
    return row.training_data(index) if name == TRAINING_DATA else quantity(row.statistic(index, name).mean)


def _metric_cells(table: Table, index: int, name: str) -> list[str]:
    cells = []
    for row, place in zip(table.rows, table.places(index, name), strict=True):
        if row.was_run(index):
            text = _percent(row.statistic(index, name), table.count(row, index, name))
        else:
            text = row.status(index)
        cells.append(f"**{text}**" if place == 1 else text)
    return cells


def _percent(value: Statistic, count: str) -> str:
    if value.n == 0:
        return UNDEFINED
    deviation = "" if value.n == 1 else f" ± {value.std:.2f}"
    return f"{value.mean:.2f}{deviation} ({count})"


def _range(interval: Interval) -> str:
    return f"[{interval.low:.2f}, {interval.high:.2f}]"


def quantity(value: float) -> str:
    """Return a cost with as many digits as a reader needs.

    >>> quantity(1234.5), quantity(0.01234), quantity(math.nan)
    ('1,234', '0.0123', '–')
    """
    if math.isnan(value):
        return UNDEFINED
    return f"{value:,.0f}" if value >= 100 or value.is_integer() else f"{value:.3g}"


def aligned(columns: Sequence[Sequence[str]]) -> str:
    """Return columns as a Markdown table with aligned source, because it is printed as it is."""
    widths = [max(map(len, column)) for column in columns]
    justify: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * (len(columns) - 1)]
    lines = [
        [pad(cell, width) for pad, cell, width in zip(justify, cells, widths, strict=True)]
        for cells in zip(*columns, strict=True)
    ]
    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *lines[1:]])


def latex(tables: Sequence[Table]) -> str:
    """Return ``tables`` as LaTeX floats: accuracies, differences and costs, each with its caption."""
    compared_ones = [comparison for table in tables for comparison in table.comparisons]
    lines = [
        r"% Needs \usepackage{booktabs}. Written by cl-bench report --format latex.",
        *(f"% {visible(sentence)}" for sentence in protocol_differences(compared_ones)),
    ]
    floats = [
        part
        for table in tables
        for part in (_results_float(table), *_difference_floats(table), *_cost_floats(table))
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(floats) + "\n"


def _results_float(table: Table) -> str:
    names = [in_latex(SHORT_NAMES.get(name, name)) for name in table.metrics]
    marked = [f" ({mark})" for mark in marks(table)] or [""] * len(table.rows)
    body = [[_float_label(row) + in_latex(mark)] for row, mark in zip(table.rows, marked, strict=True)]
    for index in range(len(table.comparisons)):
        for name in table.metrics:
            places = table.places(index, name)
            for line, row, place in zip(body, table.rows, places, strict=True):
                line.append(_float_cell(table, row, index, name, place))
    return _wide_float(table, table.comparisons, names, body, _caption(table), "results")


def _float_cell(table: Table, row: Row, index: int, name: str, place: int | None) -> str:
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
    return in_latex(" ".join(sentences))


def _difference_floats(table: Table) -> list[str]:
    made = []
    for index, comparison in enumerate(table.comparisons):
        pairs = table.pairs(index)
        if not pairs:
            continue
        name = SHORT_NAMES.get(table.metrics[0], table.metrics[0])
        caption = f"Paired differences in {name} on {comparison.title}. {_HOW_TO_READ_DIFFERENCES}"
        header = ["", r"$\Delta$", r"95\,\% interval", "blocks", "$p$ (Holm)", "verdict"]
        body = [[in_latex(f"{pair.first} − {pair.second}"), *_difference_cells(pair)] for pair in pairs]
        label = f"differences-{file_name(comparison.title)}"
        made.append(_float("table", in_latex(caption), label, "lrrrrl", [_line(header)], [body]))
    return made


def _difference_cells(pair: Contrast) -> list[str]:
    value, interval = pair.difference, pair.difference.interval
    shown = f"$[{interval.low:+.2f}, {interval.high:+.2f}]$" if interval.exists else TOO_SMALL
    mean = f"${value.mean:+.2f}$" if value.n else "--"
    return [mean, shown, str(value.n), p_value(pair), pair.verdict]


def _cost_floats(table: Table) -> list[str]:
    """Return one float for each benchmark, because all side by side are too wide for a page."""
    headings = _cost_headings(table)
    made = []
    for index, comparison in enumerate(table.comparisons):
        body = [
            [_float_label(row), *(_cost_float_cell(row, index, name) for name in headings)]
            for row in table.rows
        ]
        caption = (
            f"Costs on {comparison.title}, means over runs: seconds of a whole run and of its phases, peak "
            "memory, parameters trained at once, megabytes kept at the end."
        )
        names = [in_latex(heading) for heading in headings.values()]
        made.append(_wide_float(table, [comparison], names, body, in_latex(caption), "costs"))
    return made


def _cost_float_cell(row: Row, index: int, name: str) -> str:
    shown = _cost_cell(row, index, name)
    if not row.was_run(index):
        return rf"\emph{{{shown}}}"
    return "--" if shown == UNDEFINED else shown


def _float_label(row: Row) -> str:
    return in_latex(row.label) + (DAGGER if row.is_joint else "")


def _wide_float(
    table: Table,
    comparisons: Sequence[Comparison],
    names: Sequence[str],
    body: Sequence[Sequence[str]],
    caption: str,
    kind: str,
) -> str:
    """Return a float with a column for each name under each comparison, and a rule below upper bounds."""
    width = len(names)
    spans = [
        (in_latex(comparison.title), 2 + index * width, 1 + (index + 1) * width)
        for index, comparison in enumerate(comparisons)
    ]
    titles = "".join(rf" & \multicolumn{{{width}}}{{c}}{{{title}}}" for title, _, _ in spans)
    rules = " ".join(rf"\cmidrule(lr){{{first}-{last}}}" for _, first, last in spans)
    joint = [line for line, row in zip(body, table.rows, strict=True) if row.is_joint]
    others = [line for line, row in zip(body, table.rows, strict=True) if not row.is_joint]
    head = [_line([titles]), rules, _line(["strategy", *(list(names) * len(spans))])]
    label = f"{kind}-{'-'.join(file_name(comparison.title) for comparison in comparisons)}"
    layout = f"l{('r' * width) * len(spans)}"
    return _float("table*", caption, label, layout, head, [part for part in (joint, others) if part])


def _float(
    environment: str,
    caption: str,
    label: str,
    layout: str,
    head: Sequence[str],
    parts: Sequence[Sequence[Sequence[str]]],
) -> str:
    """Return a float with the lines ``head`` and a rule above the rows of each part."""
    return "\n".join(
        [
            rf"\begin{{{environment}}}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{{layout}}}",
            r"\toprule",
            *head,
            *(line for rows in parts for line in (r"\midrule", *map(_line, rows))),
            r"\bottomrule",
            r"\end{tabular}",
            rf"\end{{{environment}}}",
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"

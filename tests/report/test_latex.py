from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from cl_bench.report.comparison import comparisons
from cl_bench.report.latex import escaped, latex
from cl_bench.report.tables import tables
from cl_bench.results.result import Result

Made = Callable[..., Result]


def _latex(results: Iterable[Result]) -> str:
    return latex(tables(comparisons(results), ("acc/sample", "bwt/gem")))


def _rows(text: str) -> dict[str, list[str]]:
    lines = (line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r"\\"))
    return {label: cells for label, *cells in reversed(list(lines))}


def test_best_is_bold_second_underlined_and_the_bound_neither(made: Made) -> None:
    results = [
        made("first", ((9,), (9, 9))),
        made("second", ((9,), (7, 8))),
        made("third", ((9,), (5, 8))),
        made("all (joint)", (None, (9, 10)), regime="joint"),
    ]
    rows = _rows(_latex(results))
    assert rows["first"][0] == r"\textbf{90.00}"
    assert rows["second"][0] == r"\underline{75.00}"
    assert rows["third"][0] == "65.00"
    assert rows[r"all (joint)$^\dagger$"] == ["95.00", "--"]


def test_rules_are_those_of_booktabs_and_environments_are_closed(made: Made) -> None:
    text = _latex([made(), made("NCM"), made(dataset="toy")])
    assert r"\hline" not in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 4
    assert r"\cmidrule(lr){2-3} \cmidrule(lr){4-5}" in text
    begun = re.findall(r"\\begin{(.*?)}", text)
    assert sorted(begun) == sorted(re.findall(r"\\end{(.*?)}", text))
    assert text.count("{") == text.count("}")


def test_every_line_of_a_table_has_its_columns(made: Made) -> None:
    text = _latex([made(), made("NCM", status="failed"), made("x & y_z", dataset="toy")])
    for body in re.findall(r"\\midrule(.*?)\\bottomrule", text, flags=re.DOTALL):
        counts = {len(re.findall(r"(?<!\\) & ", line)) for line in body.splitlines() if "&" in line}
        assert len(counts) == 1


def test_what_did_not_finish_is_said_in_words(made: Made) -> None:
    text = _latex([made(), made("NCM", status="diverged", error="NaN in step 3")])
    assert r"NCM & \emph{diverged} & \emph{diverged}" in text
    assert "NCM, seed 1, class order identity: diverged: NaN in step 3" in text


def test_special_characters_print_as_they_are() -> None:
    assert escaped(r"50 % of a_b & {c}\d ~ ^") == (
        r"50 \% of a\_b \& \{c\}\textbackslash{}d \textasciitilde{} \textasciicircum{}"
    )

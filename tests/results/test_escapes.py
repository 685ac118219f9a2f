from __future__ import annotations

import csv
import html
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_bench.errors import sentence, visible
from cl_bench.results.escapes import in_csv, in_json, in_latex, in_markdown


def test_special_characters_are_escaped_in_latex() -> None:
    assert in_latex(r"50 % of a_b & {c}\d ~ ^") == (
        r"50 \% of a\_b \& \{c\}\textbackslash{}d \textasciitilde{} \textasciicircum{}"
    )


@given(st.text())
def test_latex_stays_on_its_line_and_has_no_command_of_a_name(text: str) -> None:
    escaped = in_latex(text)
    assert len(escaped.splitlines()) <= 1
    ours = r"\\[&%$#_{}]|\\text\w+{}|{\\char\d+}|\\dots{}|\$(\\\w+|-|\^-|\^\\dagger)\$|{\[}|{\]}|{\*}"
    assert not set("\\{}$&#%_^~[]*") & set(re.sub(ours, "", escaped))


@given(st.text())
def test_json_in_a_page_is_the_same_value_and_nothing_that_html_obeys(text: str) -> None:
    written = in_json({"name": text})
    assert json.loads(written) == {"name": text}
    assert not set("<>&\u2028\u2029") & set(written)
    assert written.isprintable()


class _Scripts(HTMLParser):
    """Collects what follows the element ``script`` as an HTML parser sees it."""

    ended = False

    def handle_endtag(self, tag: str) -> None:
        self.ended |= tag == "p"


@pytest.mark.parametrize("name", ["<!-- script -->", "<!--<script>", "</script><p>", "]]>", "<script>"])
def test_no_name_hides_what_follows_the_data_of_a_page(name: str) -> None:
    parser = _Scripts()
    parser.feed(f'<script type="application/json">{in_json([name])}</script><p>shown</p>')
    assert parser.ended


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_has_no_word_for_is_an_error(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        in_json([number])


@given(st.text())
def test_a_cell_of_csv_is_one_line_and_no_formula(text: str) -> None:
    cell = in_csv(text)
    assert isinstance(cell, str)
    assert cell.isprintable()
    assert not cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r"))
    assert next(csv.reader([f'"{cell.replace(chr(34), chr(34) * 2)}"']), [""]) == [cell]


def test_numbers_of_csv_are_numbers() -> None:
    assert [in_csv(value) for value in (-1.5, 3, None)] == [-1.5, 3, None]


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=30))
def test_markdown_without_its_escapes_is_the_text(text: str) -> None:
    escaped = in_markdown(text)
    assert html.unescape(re.sub(r"\\([\\`*\[|~$_#+.)-])", r"\1", escaped)) == html.unescape(
        visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("imagenet_r-T10", "imagenet_r-T10"),
        ("left | right", r"left \| right"),
        ("a\nb", r"a\\nb"),
        ("<script>", "&lt;script&gt;"),
        ("![x](http://y)", r"!\[x](http://y)"),
        ("`_code_`", r"\`\_code\_\`"),
        ("# title", r"\# title"),
        ("- item", r"\- item"),
    ],
)
def test_markdown_shows_what_it_would_obey(text: str, shown: str) -> None:
    assert in_markdown(text) == shown


@pytest.mark.parametrize(
    "character", ["\x1b", "\x9b", "\x07", "\r", "\u202e", "\u2066", "\ud800", "\x7f", "\u200f"]
)
def test_a_terminal_receives_no_character_that_it_would_obey(character: str) -> None:
    assert visible(f"a{character}b") == f"a{ascii(character)[1:-1]}b"
    assert sentence(ValueError(f"a{character}b")).isprintable()


@given(st.text())
def test_visible_text_is_printable_and_stays_so(text: str) -> None:
    assert visible(text).isprintable()
    assert visible(visible(text)) == visible(text)

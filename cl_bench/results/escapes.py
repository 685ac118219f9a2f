"""Text of result files, escaped for where it is shown.

A name may come from anybody. Every place that shows one has characters that it obeys instead of showing, so
each has its function here, applied where the text enters the page, table or file.
"""

from __future__ import annotations

import json
import re
from typing import Any

from cl_bench.errors import visible

DAGGER = r"$^\dagger$"
"""The mark † in LaTeX."""

_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\char34}",
    "`": r"{\char96}",
    # After the end of a row, a bracket begins an argument, and so does an asterisk.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "Δ": r"$\Delta$",
    "…": r"\dots{}",
    "†": DAGGER,
    "⁻": "$^-$",
}
_MARKDOWN = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_FORMULA = tuple("=+-@＝＋－＠")  # noqa: RUF001 - a spreadsheet reads the wide ones too


def in_latex(text: str) -> str:
    r"""Return ``text`` as LaTeX that prints it, on one line.

    >>> print(in_latex("LoRA_r=4 & 5 %"))
    LoRA\_r=4 \& 5 \%
    """
    return "".join(_LATEX.get(character, character) for character in visible(text))


def in_markdown(text: str) -> str:
    r"""Return ``text`` as Markdown that shows it, on one line, in a paragraph or in a cell of a table.

    An underscore inside a word means nothing to Markdown and stays.

    >>> print(in_markdown("imagenet_r | *<b>*"))
    imagenet_r \| \*&lt;b&gt;\*
    """
    # The last two are those of a heading or a list, at the beginning of a line.
    special = r"[\\`*\[|~$]|(?<!\w)_|_(?!\w)|^[#+-]|(?<=^\d)[.)]"
    escaped = re.sub(special, r"\\\g<0>", visible(text))
    return re.sub("[<>&]", lambda match: _MARKDOWN[match[0]], escaped)


def in_csv(value: object) -> object:
    """Return ``value`` as a cell of CSV, a text that a spreadsheet would run as a formula behind a quote.

    >>> in_csv("=1+1"), in_csv("LoRA"), in_csv(-28.12)
    ("'=1+1", 'LoRA', -28.12)
    """
    if not isinstance(value, str):
        return value
    shown = visible(value)
    return f"'{shown}" if shown.lstrip(" ").startswith(_FORMULA) else shown


def in_json(value: Any, indent: int | None = None) -> str:
    r"""Return ``value`` as JSON in which no text ends a script, opens a comment, or moves a terminal.

    What is not printed, and what HTML obeys, is written as ``\u`` and a number, which is the same JSON: it
    may stand in an HTML element ``script`` as it is.

    Raises:
        ValueError: If a number is infinite or not a number, which JSON has no word for.

    >>> print(in_json("</script>é\x1b"))
    "\u003c/script\u003eé\u001b"
    """
    separators = None if indent is not None else (",", ":")
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)
    if text.isprintable() and not re.search("[<>&]", text):
        return text
    return re.sub(r"[<>&\x7f-\x9f]|[^\x00-\x7f]", _json_escape, text)


def _json_escape(match: re.Match[str]) -> str:
    one = match[0]
    if one in "<>&\x7f":
        return f"\\u{ord(one):04x}"
    return one if one.isprintable() else json.dumps(one)[1:-1]

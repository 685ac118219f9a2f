"""What someone may have meant by a word that is not in the list."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the one of ``words`` that is spelt most like ``word``, if any comes near.

    >>> nearest("lroa", ["lora", "ncm"])
    'lora'
    >>> nearest("zzz", ["lora", "ncm"]) is None
    True
    """
    matches = difflib.get_close_matches(word, list(words), n=1)
    return matches[0] if matches else None


def by_likeness(word: str, words: Iterable[str]) -> list[str]:
    """Return ``words``, those spelt most like ``word`` first.

    >>> by_likeness("numpi", ["identity", "numpy", "python"])
    ['numpy', 'identity', 'python']
    """
    return sorted(words, key=lambda other: -difflib.SequenceMatcher(None, word, other).ratio())


def suggestion(word: str, words: Collection[str]) -> str:
    """Return the sentence that helps on: the nearest of ``words``, or all of them if none comes near.

    >>> suggestion("lroa", ["lora", "ncm"])
    'Did you mean lora?'
    >>> suggestion("zzz", ["lora", "ncm"])
    'Choose among lora, ncm.'
    """
    match = nearest(word, words)
    return f"Did you mean {match}?" if match else f"Choose among {', '.join(words)}."

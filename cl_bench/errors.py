"""One sentence for every error, and what someone may have meant by a word that is not in the list."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager


def sentence(error: BaseException) -> str:
    r"""Return what ``error`` says, in one line; its kind comes first where the words alone would not tell.

    >>> sentence(ValueError("Give a rank\nof at least 1."))
    'Give a rank of at least 1.'
    >>> sentence(KeyError("means"))
    "KeyError: 'means'"
    """
    lines = str(error).strip().splitlines()
    # A loader's worker puts its own traceback before the message.
    if any(line.endswith("Traceback (most recent call last):") for line in lines):
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    words = " ".join(" ".join(lines).split())
    tells = words and isinstance(error, ValueError | OSError)
    return words if tells else f"{type(error).__name__}: {words}".rstrip(": ")


def is_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that memory does not suffice, of the accelerator or of this machine.

    >>> is_of_memory(MemoryError()), is_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    # torch has a class of its own for accelerators, and raises a RuntimeError like any other for main memory.
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return full or "DefaultCPUAllocator: can't allocate memory" in str(error)


@contextmanager
def refusing(*passed: type[Exception]) -> Iterator[None]:
    """Make one kind of error of all that a library may raise before anything is trained.

    Args:
        passed: Kinds that are raised as they are, beside ValueError and OSError.

    Raises:
        ValueError: If anything else is raised inside.
    """
    usable: tuple[type[Exception], ...] = (ValueError, OSError, *passed)
    try:
        yield
    except usable:
        raise
    except Exception as error:
        words = sentence(error)
        if is_of_memory(error):
            words = f"Memory does not suffice for sizes as these: choose smaller ones. ({words})"
        raise ValueError(words) from error


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

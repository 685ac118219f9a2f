"""One sentence for every error, text that is safe on a terminal, and suggestions for misspelt words."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager


def sentence(error: BaseException) -> str:
    r"""Return the message of ``error`` in one line, after the name of its class unless that is obvious.

    >>> sentence(ValueError("Give a rank\nof at least 1."))
    'Give a rank of at least 1.'
    >>> sentence(KeyError("means"))
    "KeyError: 'means'"
    """
    lines = str(error).strip().splitlines()
    # The message of a DataLoader worker contains the worker's own traceback.
    if any(line.endswith("Traceback (most recent call last):") for line in lines):
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    message = " ".join(" ".join(lines).split())
    is_clear = message and isinstance(error, ValueError | OSError)
    return visible(message if is_clear else f"{type(error).__name__}: {message}".rstrip(": "))


def visible(text: str) -> str:
    r"""Return ``text`` on one line, with an escape for every character that is not printed but obeyed.

    A terminal obeys control characters, the sequences that begin with one, marks that reverse the direction
    of text, and line separators; halves of surrogate pairs cannot be written at all. Python's
    :meth:`str.isprintable` decides.

    >>> print(visible("red \x1b[31m, two\nlines"))
    red \x1b[31m, two\nlines
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def is_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` means that the memory of the device or of this machine is exhausted.

    >>> is_of_memory(MemoryError()), is_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    # torch has an error class for the memory of devices, and raises a plain RuntimeError for main memory.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator: can't allocate memory" in str(error)


def is_of_shared_memory(error: BaseException) -> bool:
    """Return whether ``error`` means that the memory that processes share, ``/dev/shm``, is exhausted.

    >>> is_of_shared_memory(RuntimeError("unable to write to file </torch_22513_1103944902_1>"))
    True
    """
    # torch raises a plain RuntimeError, or the worker is killed and its parent names the cause.
    return isinstance(error, RuntimeError) and ("</torch_" in str(error) or "shared memory" in str(error))


@contextmanager
def refusing(*passed: type[Exception]) -> Iterator[None]:
    """Turn every error inside, except ValueError, OSError and those ``passed``, into a ValueError.

    Libraries raise errors of many classes before anything is trained.

    Args:
        passed: Classes of errors that stay as they are.

    Raises:
        ValueError: If another error is raised inside.
    """
    usable: tuple[type[Exception], ...] = (ValueError, OSError, *passed)
    try:
        yield
    except usable:
        raise
    except Exception as error:
        message = sentence(error)
        if is_of_memory(error):
            message = f"These sizes need too much memory: choose smaller ones. ({message})"
        raise ValueError(message) from error


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the most similar of ``words`` to ``word``, or None if none is similar.

    >>> nearest("lroa", ["lora", "ncm"])
    'lora'
    >>> nearest("zzz", ["lora", "ncm"]) is None
    True
    """
    matches = difflib.get_close_matches(word, list(words), n=1)
    return matches[0] if matches else None


def by_likeness(word: str, words: Iterable[str]) -> list[str]:
    """Return ``words``, sorted with the most similar to ``word`` first.

    >>> by_likeness("numpi", ["identity", "numpy", "python"])
    ['numpy', 'identity', 'python']
    """
    return sorted(words, key=lambda other: -difflib.SequenceMatcher(None, word, other).ratio())


def suggestion(word: str, words: Collection[str]) -> str:
    """Return a sentence that suggests the most similar of ``words``, or lists all if none is similar.

    >>> suggestion("lroa", ["lora", "ncm"])
    'Did you mean lora?'
    >>> suggestion("zzz", ["lora", "ncm"])
    'Choose among lora, ncm.'
    """
    match = nearest(word, words)
    return f"Did you mean {match}?" if match else f"Choose among {', '.join(words)}."

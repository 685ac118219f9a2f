"""Nested settings side by side: in which keys they differ, and how to say so in a few characters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WIDTH = 40
"""Most characters that a value may take in a sentence."""

_CONTEXT = 8


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``nested`` with dotted keys; whatever is no mapping, or an empty one, is a value.

    >>> flat({"backbone": {"model": "vit", "options": {}}, "epochs": 5})
    {'backbone.model': 'vit', 'backbone.options': {}, 'epochs': 5}
    """
    values: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """Return the keys in which ``settings`` differ, with the JSON value in each; None where there is none.

    >>> differences([{"rank": 4, "epochs": 5}, {"rank": 8, "epochs": 5}])
    {'rank': ['4', '8']}
    """
    flattened = [flat(setting) for setting in settings]
    keys = dict.fromkeys(key for setting in flattened for key in setting)
    table = {
        key: [json.dumps(each[key], sort_keys=True) if key in each else None for each in flattened]
        for key in keys
    }
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def distinguishing(table: Mapping[str, Sequence[str | None]]) -> list[str]:
    """Return few keys of ``table`` whose values together tell all of its columns apart.

    Greedy: the key that separates most comes first, and among equals the one with the shortest name.

    >>> distinguishing({"optimizer.lr": ["1", "2", "1"], "rank": ["4", "4", "8"], "alpha": ["4", "4", "8"]})
    ['optimizer.lr', 'rank']
    """
    keys: list[str] = []
    candidates = sorted(table, key=lambda key: (len(key.rpartition(".")[2]), key))
    columns: list[tuple[str | None, ...]] = [()] * max((len(values) for values in table.values()), default=0)
    while candidates:
        extended = {key: _extended(columns, table[key]) for key in candidates}
        best = max(candidates, key=lambda key: len(set(extended[key])))
        if len(set(extended[best])) == len(set(columns)):
            break
        columns = extended[best]
        keys.append(best)
        candidates.remove(best)
    return keys


def short_names(keys: Sequence[str]) -> list[str]:
    """Return for every dotted key its shortest ending that no other key shares.

    >>> short_names(["strategy.rank", "head.lr", "adapter.lr"])
    ['rank', 'head.lr', 'adapter.lr']
    """
    endings = [list(_endings(key)) for key in keys]
    taken = [ending for own in endings for ending in own]
    return [next((ending for ending in own if taken.count(ending) == 1), own[-1]) for own in endings]


def shortened(texts: Sequence[str], width: int = WIDTH) -> list[str]:
    """Return ``texts`` cut to about ``width`` characters so that what tells them apart remains.

    >>> shortened(["Resize(32), CenterCrop(32)", "Resize(32), CenterCrop(28)"], width=16)
    ['…terCrop(32)', '…terCrop(28)']
    """
    start = 0
    if len(texts) > 1 and max(map(len, texts)) > width:
        start = max(0, _first_difference(texts) - _CONTEXT)
    cut = [f"…{text[start:]}" if start else text for text in texts]
    return [text if len(text) <= width else f"{text[: width - 1]}…" for text in cut]


def plain(value: str) -> str:
    r"""Return a JSON value as a reader would write it: a text on one line, without quotation marks.

    >>> plain(json.dumps("Compose(\n  Resize\n)")), plain("0.5")
    ('Compose( Resize )', '0.5')
    """
    decoded = json.loads(value)
    return " ".join(decoded.split()) if isinstance(decoded, str) else value


def _first_difference(texts: Sequence[str]) -> int:
    alike = (len(set(characters)) == 1 for characters in zip(*texts, strict=False))
    return next((place for place, same in enumerate(alike) if not same), min(map(len, texts)))


def _extended(
    columns: Sequence[tuple[str | None, ...]], values: Sequence[str | None]
) -> list[tuple[str | None, ...]]:
    return [(*column, value) for column, value in zip(columns, values, strict=True)]


def _endings(key: str) -> Iterator[str]:
    parts = key.split(".")
    for start in range(len(parts) - 1, -1, -1):
        yield ".".join(parts[start:])

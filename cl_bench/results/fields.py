"""The types and limits of what a result file may hold, and the parsing of its JSON.

A result file may come from anybody. It is parsed under limits of size, then pydantic validates every field
against the types below; whatever does not fit is refused with a ValueError.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, FailFast, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

MOST_BYTES = 32 * 2**20
"""Largest result file: a hundred experiences of a thousand classes in six domains need a tenth of it."""

MOST_EXPERIENCES = 1_000
"""Longest stream: the memory of a report grows with its square."""

MOST_CLASSES = 100_000
"""Largest number of classes."""

LONGEST_NAME = 500
"""Largest number of characters of a name."""

MOST_KEYS = 2_000
"""Largest number of keys in a free part, such as a config, with those of the mappings inside it."""

DEEPEST = 30
"""Largest number of mappings and lists inside one another in a free part."""

MOST_WHOLE = 2**53
"""Largest whole number: up to it they are exact in a float, and in the page of a report."""

_LONGEST_TEXT = 100_000
_MOST_LAYERS = 10_000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes it

Whole = Annotated[int, Field(strict=True, ge=0, le=MOST_WHOLE)]
Seed = Annotated[int, Field(strict=True, ge=-MOST_WHOLE, le=MOST_WHOLE)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e15, le=1e15)]
Seconds = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1e12)]
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
Text = Annotated[str, Field(max_length=_LONGEST_TEXT)]
# Numbers of images have their range checked many at once, which takes half the time.
Counts = Annotated[list[Annotated[int, Field(strict=True)]], FailFast(), Field(max_length=MOST_CLASSES)]
Names = Annotated[list[Name], FailFast(), Field(max_length=MOST_CLASSES)]
Numbers = Annotated[list[Number], FailFast(), Field(max_length=10_000)]


class _Backbone(TypedDict, total=False):
    model: Name
    options: dict[str, Any] | None
    weights: Name
    weights_sha256: Name


class _Identity(TypedDict, total=False):
    backbone: _Backbone
    variants: dict[Name, Name]
    evaluated_on: Name


class _Provenance(TypedDict, total=False):
    versions: dict[Name, Name]
    commit: Name | None
    device: Name
    threads: Whole
    started: Name
    settings: Literal["published", "by hand", "tuned"]


class _Layer(TypedDict):
    absolute: Number
    relative: Number


class _Angles(TypedDict):
    nearest_old: Numbers
    own_centre: Numbers


class _HeldOut(TypedDict):
    before: Number
    after: Number


class _Diagnostics(TypedDict, total=False):
    basis_dims: Annotated[list[Whole] | None, Field(max_length=_MOST_LAYERS)]
    violation: dict[Name, Annotated[list[_Layer], Field(max_length=_MOST_LAYERS)]]
    danger_score: Number | None
    angular: _Angles | None
    held_out_ncm: _HeldOut | None


def _free(value: dict[str, Any]) -> dict[str, Any]:
    """Return ``value``; raise a ValueError if it is too deep, or has too many or too long keys."""
    keys = 0
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inside: list[Any] = []
        for item in level:
            if type(item) is dict:
                keys += len(item)
                if max(map(len, item), default=0) > LONGEST_NAME:
                    raise ValueError(f"a key is longer than {LONGEST_NAME} characters")
                inside += item.values()
            else:
                inside += item
        if keys > MOST_KEYS:
            raise ValueError(f"it has more than {MOST_KEYS} keys")
        kinds = set(map(type, inside))  # most levels hold nothing but text
        if int in kinds and any(type(item) is int and abs(item) > MOST_WHOLE for item in inside):
            raise ValueError(f"a whole number is beyond {MOST_WHOLE}")
        if kinds.isdisjoint((dict, list)):
            return value
        level = [item for item in inside if type(item) in (dict, list)]
    raise ValueError(f"mappings and lists are nested more than {DEEPEST} deep")


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    """Return ``value``, or raise a ValueError if one of its numbers is infinite or not a number."""
    level: list[Any] = [value]
    while level:
        item = level.pop()
        values = item.values() if type(item) is dict else item
        kinds = set(map(type, values))
        if float in kinds:
            for number in values:
                if type(number) is float and not math.isfinite(number):
                    raise ValueError(f"the number {number} is not finite")
        if not kinds.isdisjoint((dict, list)):
            level += [one for one in values if type(one) in (dict, list)]
    return value


def validated(adapter: TypeAdapter[Any], value: object) -> Any:
    """Return ``value`` as ``adapter`` reads it.

    Raises:
        ValueError: If it does not fit; the message has one line, on the first part that does not.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{place[:LONGEST_NAME]}: {reason}" if place else reason) from error


def _fitting(adapter: TypeAdapter[Any]) -> AfterValidator:
    """Return a validator that requires a value to fit ``adapter`` and keeps it as it is."""

    def fitting(value: dict[str, Any]) -> dict[str, Any]:
        validated(adapter, value)
        return value

    return AfterValidator(fitting)


# A setting may be infinite, such as a bound that bounds nothing.
Config = Annotated[dict[str, Any], AfterValidator(_free)]
Free = Annotated[dict[str, Any], AfterValidator(_free), AfterValidator(_finite)]
Identity = Annotated[Free, _fitting(TypeAdapter(_Identity))]
Provenance = Annotated[Free, _fitting(TypeAdapter(_Provenance))]
Diagnostics = Annotated[Free, _fitting(TypeAdapter(_Diagnostics))]


def parsed(data: bytes) -> dict[str, Any]:
    """Return the JSON object that ``data`` holds.

    Raises:
        ValueError: If it is not JSON in UTF-8, holds a key twice or half of a surrogate pair, or is nested
            too deeply.
    """
    text = data.decode("utf-8")
    try:
        payload = json.loads(text, object_pairs_hook=_without_duplicates)
        if "\\u" in text and _SURROGATE.search(text):
            json.dumps(payload, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(payload, dict):
        raise ValueError("its JSON is not an object")
    return payload


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has the key {twice[:LONGEST_NAME]!r} twice")
    return found

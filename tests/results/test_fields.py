from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_bench.results.fields import MOST_BYTES, MOST_KEYS, parsed
from cl_bench.results.result import FILE_NAME, Cost, Protocol, Result, Row, read, read_all

Payload = dict[str, Any]


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    """The JSON of a finished run over two experiences of two classes."""
    result = Result(
        strategy="LoRA",
        dataset="digits",
        experiences=[(0, 2), (2, 4)],
        class_names=list("abcd"),
        test_images=[10, 20, 30, 40],
        order="identity",
        seed=1,
        regime="sequential",
        protocol=Protocol({"precision": "32-true"}, {}, {}),
        status="done",
        rows=[Row([9, 18], [9, 18], [9, 18]), Row([5, 10, 30, 20], [5, 10, 30, 20], [5, 10, 30, 20])],
        costs=[Cost({"training": 1.5}, 1, 2, 3)] * 2,
    )
    written: Payload = json.loads(result.write(tmp_path).read_text())
    return written


def refusal(payload: Payload, folder: Path) -> str:
    path = folder / FILE_NAME
    path.write_text(json.dumps(payload))
    with pytest.raises(ValueError, match=r"; run its cell again, or remove the file\.$") as refused:
        read(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message.removeprefix(f"{path}: ").partition("; run its")[0]


def put(*place: str | int) -> Callable[[Payload, Any], None]:
    def into(payload: Any, value: Any) -> None:
        for step in place[:-1]:
            payload = payload[step]
        payload[place[-1]] = value

    return into


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("seed",), [], "seed: Input should be a valid integer"),
        (("seed",), True, "seed: Input should be a valid integer"),
        (("strategy",), None, "strategy: Input should be a valid string"),
        (("config",), None, "config: Input should be a valid dictionary"),
        (
            ("protocol", "identity", "backbone"),
            3,
            "protocol.identity: backbone: Input should be a valid dictionary",
        ),
        (("provenance", "threads"), "<b>", "provenance: threads: Input should be a valid integer"),
        (("costs", 0, "seconds", "training"), -1.0, "greater than or equal to 0"),
        (("costs", 0, "stored_bytes"), 10**400, "costs.0.stored_bytes: Input should be less than"),
        (("experiences",), [[0, 2], [3, 4]], "its experiences do not divide its 4 classes in order"),
        (("experiences",), [[0, 2], [2, 5]], "its experiences do not divide its 4 classes in order"),
        (("experiences",), [[2, 4], [0, 2]], "its experiences do not divide its 4 classes in order"),
        (("test_images",), [10, 20, 30], "it has 3 numbers of test images for 4 classes"),
        (("test_images",), [0, 0, 30, 40], "an experience has no test images"),
        (("test_images", 0), -1, "a number of test images is below 0"),
        (("rows", 0, "correct"), [9, 21], "row 0 counts fewer right images of a class than 0, or more"),
        (("rows", 0, "correct"), [9, -1], "row 0 counts fewer right images of a class than 0, or more"),
        (("rows", 0, "correct"), [9, 10**400], "row 0 counts fewer right images of a class than 0, or more"),
        (("rows", 0, "correct"), [9], "row 0 does not have a count for each of its 2 classes"),
        (("rows", 1), None, "it is done, but has rows after 1 of 2 experiences"),
        (("regime",), "joint", "a joint run has a row only after the last experience"),
        (("domains",), ["x", "x"], "two of its domains have one name"),
        (("domains",), ["x"], "its domain_images do not have a number for each domain and class"),
        (("diagnostics",), [{}] * 3, "it has more diagnostics than its 2 experiences"),
        (("schema",), 99, "it has schema 99, and this version reads schema 1"),
        (("training_data",), "all", "training_data: Input should be"),
    ],
    ids=lambda one: ".".join(map(str, one)) if isinstance(one, tuple) else None,
)
def test_what_does_not_fit_is_refused_with_its_reason(
    payload: Payload, tmp_path: Path, place: tuple[str | int, ...], value: object, reason: str
) -> None:
    put(*place)(payload, value)
    assert reason in refusal(payload, tmp_path)


def test_an_older_file_has_recorded_no_training_data_and_a_new_one_has(
    payload: Payload, tmp_path: Path
) -> None:
    path = tmp_path / FILE_NAME
    for value in ("none", "features", "images"):
        path.write_text(json.dumps(payload | {"training_data": value}))
        assert read(path).training_data == value
    del payload["training_data"]
    path.write_text(json.dumps(payload))
    assert read(path).training_data == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "it is not JSON"),
        (b"[]", "its JSON is not an object"),
        (b'{"a": 1, "a": 2}', "it has the key 'a' twice"),
        (b'{"a": {"b": 1, "b": 1}}', "it has the key 'b' twice"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\uDFFF": 1}', "surrogates not allowed"),
        (b'{"a": "\xff"}', "can't decode byte"),
        ('{"a": 1}'.encode("utf-16"), "can't decode byte"),
        (b"[" * 100_000 + b"]" * 100_000, "its JSON is nested too deeply"),
        (b'{"a": ' * 100_000, "its JSON is nested too deeply"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "4300"),
    ],
)
def test_json_that_no_result_has_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parsed(content)


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert parsed(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_no_number_that_is_shown_is_infinite_or_not_a_number(
    payload: Payload, tmp_path: Path, number: str
) -> None:
    for place in (("costs", 0, "seconds", "training"), ("provenance", "x"), ("protocol", "identity", "x")):
        changed = json.loads(json.dumps(payload))
        put(*place)(changed, "HERE")
        path = tmp_path / FILE_NAME
        path.write_text(json.dumps(changed).replace('"HERE"', number))
        with pytest.raises(ValueError, match="finite"):
            read(path)


def test_sizes_are_limited_before_any_work(payload: Payload, tmp_path: Path) -> None:
    many = 20_000
    long = {"experiences": [[i, i + 1] for i in range(many)], "class_names": ["c"] * many}
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    began = time.process_time()
    assert "at most 1000 items" in refusal(payload | long | {"test_images": [1] * many}, tmp_path)
    assert "more than 2000 keys" in refusal(
        payload | {"config": dict.fromkeys(map(str, range(MOST_KEYS + 1)))}, tmp_path
    )
    assert "nested more than 30 deep" in refusal(payload | {"config": {"a": deep}}, tmp_path)
    assert "at most 500 characters" in refusal(payload | {"strategy": "s" * 501}, tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b" " * (MOST_BYTES + 1))
    with pytest.raises(ValueError, match="it is larger than"):
        read(tmp_path / FILE_NAME)
    assert time.process_time() - began < 2


def test_what_is_no_file_is_a_line_and_not_the_end(payload: Payload, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for name in ("good", "pipe", "folder", "link", "bad\n\x1b[2J\udcff"):
        (folder / name).mkdir(parents=True)
    (folder / "good" / FILE_NAME).write_text(json.dumps(payload))
    os.mkfifo(folder / "pipe" / FILE_NAME)
    (folder / "folder" / FILE_NAME).mkdir()
    (folder / "link" / FILE_NAME).symlink_to("/dev/zero")
    (folder / "bad\n\x1b[2J\udcff" / FILE_NAME).write_text("{")
    results, unreadable = read_all(folder)
    assert len(results) == 1
    assert len(unreadable) == 4
    assert all(line.isprintable() for line in unreadable)


def test_folders_as_deep_as_the_system_allows_are_searched(payload: Payload, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    depth = 1_500
    for _ in range(depth):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    file = os.open(FILE_NAME, os.O_WRONLY | os.O_CREAT, dir_fd=descriptor)
    os.write(file, json.dumps(payload).encode())
    os.close(file)
    os.close(descriptor)
    try:
        results, unreadable = read_all(tmp_path)
    finally:  # Python's own removal of folders would not reach the end either
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)
    assert len(results) == 2  # the fixture has left one at the top
    assert unreadable == []

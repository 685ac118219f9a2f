import io
import os
import sys
from pathlib import Path

import pytest

from cl_bench.processes.streams import Unfailing, unfailing_output


def broken_pipe() -> io.TextIOWrapper:
    """Return the writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", encoding="utf-8")


def test_output_after_a_broken_pipe_is_dropped_also_that_of_libraries() -> None:
    with broken_pipe() as pipe:
        stream = Unfailing(pipe)
        for _ in range(3):
            stream.write("one line\n")
            stream.flush()
        assert isinstance(stream.error, BrokenPipeError)
        assert os.write(pipe.fileno(), b"from C") == 6  # the descriptor is the null device now
        pipe.flush()


def test_output_to_a_full_disk_is_dropped_and_the_error_kept() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        stream = Unfailing(full)
        stream.write("one line\n")
        stream.flush()
        assert isinstance(stream.error, OSError) and stream.error.strerror == "No space left on device"


def test_a_character_that_the_terminal_lacks_is_escaped() -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = Unfailing(terminal)
    stream.write("LoRA · é")
    stream.flush()
    assert terminal.buffer.getvalue() == b"LoRA \\xb7 \\xe9"
    assert stream.error is None


@pytest.mark.parametrize("closed", (None, "before"))
def test_a_closed_stream_takes_everything(closed: str | None, tmp_path: Path) -> None:
    file = (tmp_path / "out").open("w")
    file.close()
    stream = Unfailing(file if closed else None)
    stream.write("one line\n")
    stream.flush()
    stream.write("another\n")
    assert (tmp_path / "out").read_text() == ""


def test_the_streams_before_are_back_at_the_end() -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(ArithmeticError), unfailing_output():
        assert sys.stdout is not before[0]
        raise ArithmeticError
    assert (sys.stdout, sys.stderr) == before

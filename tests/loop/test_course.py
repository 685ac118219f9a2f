from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch

from cl_bench.loop.course import Course, Interrupted, Interruption

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Ctrl-C has a handler: a shell that starts the tests in the background ignores it."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_at_once(number: int) -> None:
    with pytest.raises(Interrupted), Interruption():
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_deferred_signal_waits_and_a_second_one_does_not(number: int) -> None:
    with Interruption() as interruption:
        interruption.raise_if_requested()
        interruption.deferred = True
        os.kill(os.getpid(), number)
        assert interruption.requested
        with pytest.raises(Interrupted):
            interruption.raise_if_requested()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)


def test_signals_get_their_handlers_back() -> None:
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption():
        os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_handlers_stay() -> None:
    found: list[object] = []

    def look() -> None:
        with Interruption():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_seconds_add_up_by_name_also_when_something_fails() -> None:
    course = Course(torch.device("cpu"))
    course.add("training", 2.0)
    course.add("training", 3.0)
    with pytest.raises(ArithmeticError), course.timed("evaluation"):
        raise ArithmeticError
    assert course.seconds.keys() == {"training", "evaluation"}
    assert course.seconds["training"] == 5.0
    assert 0 <= course.seconds["evaluation"] < 1


def test_a_signal_waits_for_the_end_of_a_step_only_while_steps_are_taken() -> None:
    course = Course(torch.device("cpu"))
    with course.interruption:
        course.step(True)
        os.kill(os.getpid(), signal.SIGTERM)
        course.step(False)
        assert course.interruption.requested
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)

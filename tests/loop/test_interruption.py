from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from cl_bench.loop.interruption import Interrupted, Interruption

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def _listening() -> Iterator[None]:
    """A shell that starts the tests in its background has them ignore Ctrl-C."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_at_once(number: int) -> None:
    with pytest.raises(Interrupted), Interruption():
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_deferred_signal_waits_until_it_is_heeded_and_a_second_one_does_not(number: int) -> None:
    with Interruption() as interruption:
        interruption.heed()
        interruption.deferred = True
        os.kill(os.getpid(), number)
        assert interruption.requested
        with pytest.raises(Interrupted):
            interruption.heed()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)


def test_signals_do_afterwards_what_they_did_before() -> None:
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption():
        os.kill(os.getpid(), signal.SIGINT)


def test_outside_of_the_main_thread_nothing_is_changed() -> None:
    heard: list[object] = []

    def listen() -> None:
        with Interruption():
            heard.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [signal.default_int_handler]

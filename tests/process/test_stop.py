"""The first signal asks, the second stops, and afterwards everything is as before."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from sniffer.process.stop import HANG_UP, SIGNALS, Stop, Stopped


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def terminal_can_be_lost() -> Iterator[None]:
    """As without `nohup`, which these tests may themselves run under."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_answered_before_the_next_item(number: int, capfd: pytest.CaptureFixture):
    seen = []
    with Stop() as stop, pytest.raises(Stopped) as caught:
        for item in stop.each(range(5)):
            if item == 2:
                send(number)
            seen.append(item)
    assert seen == [0, 1, 2]
    assert caught.value.signum == number and str(caught.value) == signal.Signals(number).name
    assert "once more stops at once" in capfd.readouterr().err


def test_waiting_is_given_up_at_once():
    def slow():
        yield 0
        send(signal.SIGINT)
        raise AssertionError("still waiting")

    with Stop() as stop, pytest.raises(Stopped):
        list(stop.each(slow()))


def test_a_second_signal_stops_wherever_it_comes():
    reached = []
    with Stop(), pytest.raises(KeyboardInterrupt) as caught:
        send(signal.SIGTERM)
        reached.append(1)
        send(signal.SIGINT)
        reached.append(2)
    assert reached == [1] and not isinstance(caught.value, Stopped)


def test_without_a_signal_nothing_happens():
    with Stop() as stop:
        assert list(stop.each(range(3))) == [0, 1, 2]
        with stop.at_once():
            pass
        stop.check()


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ValueError), Stop():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise ValueError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_signals_are_left_alone():
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with Stop() as stop:
                list(stop.each(range(3)))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


@pytest.mark.skipif(HANG_UP is None, reason="Windows has no SIGHUP")
@pytest.mark.usefixtures("terminal_can_be_lost")
def test_a_lost_terminal_stops_politely_however_often_it_is_told():
    with Stop() as stop:
        send(signal.SIGHUP)
        send(signal.SIGHUP)
        with pytest.raises(Stopped) as caught:
            stop.check()
    assert caught.value.signum == signal.SIGHUP


@pytest.mark.skipif(HANG_UP is None, reason="Windows has no SIGHUP")
def test_under_nohup_a_run_goes_on():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            send(signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(HANG_UP is None, reason="Windows has no SIGHUP")
@pytest.mark.usefixtures("terminal_can_be_lost")
def test_what_is_written_after_the_terminal_is_gone_goes_nowhere():
    import pty

    terminal, ours = pty.openpty()
    kept = os.dup(1)
    os.dup2(ours, 1)
    try:
        with Stop():
            os.close(ours)
            os.close(terminal)
            send(signal.SIGHUP)
            os.write(1, b"no error")
    finally:
        os.dup2(kept, 1)
        os.close(kept)

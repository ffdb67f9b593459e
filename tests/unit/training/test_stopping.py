"""Requests to stop: by any of the signals, at once where work may be left unfinished."""

import os
import signal
import time

import pytest

from ssl_vit.training.stopping import StopSignal


@pytest.mark.parametrize("number", StopSignal.signals)
def test_work_is_interrupted_at_once(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.unless_stopped(lambda: None)

        def work() -> None:
            os.kill(os.getpid(), number)
            time.sleep(60)

        started = time.monotonic()
        assert not stop.unless_stopped(work)
        assert time.monotonic() - started < 5
        assert stop.received == number
        done = []
        assert not stop.unless_stopped(lambda: done.append(1)), "it came before"
        assert not done
    assert signal.getsignal(number) == before


def test_elsewhere_it_is_only_noted():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == signal.SIGHUP


def test_an_error_of_the_work_comes_out_and_later_signals_wait():
    with StopSignal() as stop:
        with pytest.raises(ZeroDivisionError):
            stop.unless_stopped(lambda: 1 / 0)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.received == signal.SIGUSR2


def test_a_hangup_that_is_ignored_stays_ignored():
    """As nohup does it: the run shall outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_has_its_usual_effect():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

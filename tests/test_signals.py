"""Handling of signals that end a command."""

import os
import signal
import time

import pytest

from polyseg.errors import Interrupted
from polyseg.system.signals import ENDING, ending_at_once, ending_when_asked


@pytest.fixture(autouse=True)
def _default_sighup():
    """Restore the default handler of SIGHUP, which `nohup` disables."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ENDING)
def test_signal_ends_the_block_immediately(number):
    before = signal.getsignal(number)
    name = signal.Signals(number).name
    with pytest.raises(Interrupted, match=f"ended by {name}$") as end, ending_at_once():
        signal.raise_signal(number)
    assert end.value.number == number and signal.getsignal(number) == before


@pytest.mark.parametrize("number", ENDING)
def test_first_signal_is_remembered_and_second_one_raises(number, caplog):
    with (
        pytest.raises(Interrupted, match="after epoch 3"),
        ending_at_once(),
        ending_when_asked(lambda: "after epoch 3") as stop,
    ):
        assert stop.number == 0
        signal.raise_signal(number)
        assert stop.number == number and "a second signal ends at once" in caplog.text
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")


def test_forked_process_leaves_signals_to_its_parent():
    with ending_at_once():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


class SignalInFinalizer:
    """Send a signal from a finalizer, where Python discards exceptions."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def test_signal_during_a_finalizer_is_not_lost(capsys):
    with pytest.raises(Interrupted), ending_at_once():
        SignalInFinalizer()
        time.sleep(30)
    assert capsys.readouterr().err == ""
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_signal_after_the_block_has_no_effect():
    with ending_at_once() as stop:
        stop.done = True
        signal.raise_signal(signal.SIGTERM)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_at_once():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)

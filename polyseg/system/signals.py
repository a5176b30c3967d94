"""Signals: end the work at once, or after the current step.

SIGINT is Ctrl-C; systems and schedulers send SIGTERM; a scheduler can be told to send SIGUSR1 some
time before its limit; SIGHUP comes when a terminal is closed.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from polyseg.errors import Interrupted

log = logging.getLogger(__name__)

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_SECONDS_TO_REPEAT = 0.5


class StopRequest:
    """A signal that may have asked the work to stop."""

    number = 0
    """Number of the signal; 0 before one has come."""
    done = False
    """Whether the work is over; further signals are then ignored."""


@contextlib.contextmanager
def ending_at_once() -> Iterator[StopRequest]:
    """Raise `Interrupted` in the block when a signal comes.

    It is raised again every half second until the block ends or `done` is set, because Python
    drops exceptions that are raised while it frees objects.

    >>> with contextlib.suppress(Interrupted), ending_at_once():
    ...     signal.raise_signal(signal.SIGTERM)
    """
    stop = StopRequest()

    def leave(number: int) -> None:
        if number != signal.SIGALRM:
            stop.number = number
        if stop.done or not stop.number:
            return
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_REPEAT)
        raise interruption(stop.number, "")

    with _handled_by(leave, (*ENDING, signal.SIGALRM)):
        try:
            yield stop
        finally:
            stop.done = True
            if stop.number:
                signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def ending_when_asked(progress: Callable[[], str]) -> Iterator[StopRequest]:
    """Yield a request that the block checks after each step; raise at a second signal.

    `progress` returns how far the work has come, for the message of the second signal.

    >>> with ending_when_asked(lambda: "after epoch 3") as stop:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     stop.number == signal.SIGTERM
    True
    """
    stop = StopRequest()

    def remember(number: int) -> None:
        if stop.number:
            raise interruption(number, progress())
        stop.number = number
        log.warning("ending after this step; a second signal ends at once")

    with _handled_by(remember, ENDING):
        yield stop


def interruption(number: int, progress: str) -> Interrupted:
    """Return the exception for a signal."""
    return Interrupted(number, f"ended by {signal.Signals(number).name} {progress}".rstrip())


@contextlib.contextmanager
def _handled_by(handle: Callable[[int], None], numbers: tuple[int, ...]) -> Iterator[None]:
    process, hook = os.getpid(), sys.unraisablehook

    def handler(number: int, _: FrameType | None) -> None:
        # Forked workers inherit the handler; their parent ends them.
        if os.getpid() == process:
            handle(number)

    def quietly(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            hook(unraisable)

    # Ignored signals stay ignored, as under `nohup`.
    before = {one: signal.getsignal(one) for one in numbers}
    taken = [one for one, old in before.items() if old is not signal.SIG_IGN]
    for one in taken:
        signal.signal(one, handler)
    sys.unraisablehook = quietly
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for one in taken:
            signal.signal(one, before[one])

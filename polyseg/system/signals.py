"""How signals end work: at once where nothing is to be kept, else at the next good moment.

SIGINT is Ctrl-C, SIGTERM what systems and schedulers send, SIGUSR1 what a scheduler can be told to
send some time before its limit, and SIGHUP what is left of a terminal that was closed.
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

_SECONDS_TO_LEAVE = 0.5


class Wish:
    """Whether a signal has asked for the end, and whether it has come."""

    number = 0
    """Of the signal; 0 as long as none has come."""
    granted = False
    """Whether the work is over, so that no signal has anything left to end."""


@contextlib.contextmanager
def ending_at_once() -> Iterator[Wish]:
    """Let a signal raise `Interrupted` wherever the block is, which tidies up on its way out.

    It is raised again every half second, because Python drops what is raised where it frees
    objects, until the wish is said to be granted or the block is over.

    >>> with contextlib.suppress(Interrupted), ending_at_once():
    ...     signal.raise_signal(signal.SIGTERM)
    """
    wish = Wish()

    def leave(number: int) -> None:
        if number != signal.SIGALRM:
            wish.number = number
        if wish.granted or not wish.number:
            return
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_LEAVE)
        raise interruption(wish.number, "")

    with _handled_by(leave, (*ENDING, signal.SIGALRM)):
        try:
            yield wish
        finally:
            wish.granted = True
            if wish.number:
                signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def ending_when_asked(farewell: Callable[[], str]) -> Iterator[Wish]:
    """Yield a wish, which the block grants at its next good moment; a second signal ends it now.

    Args:
        farewell: how far the work has come, said at a second signal.

    >>> with ending_when_asked(lambda: "after epoch 3") as wish:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     wish.number == signal.SIGTERM
    True
    """
    wish = Wish()

    def remember(number: int) -> None:
        if wish.number:
            raise interruption(number, farewell())
        wish.number = number
        log.warning("ending after this step; once more to leave at once")

    with _handled_by(remember, ENDING):
        yield wish


def interruption(number: int, farewell: str) -> Interrupted:
    """Return the end by a signal.

    >>> print(interruption(signal.SIGTERM, "after epoch 3"))
    ended by SIGTERM after epoch 3
    """
    return Interrupted(number, f"ended by {signal.Signals(number).name} {farewell}".rstrip())


@contextlib.contextmanager
def _handled_by(handle: Callable[[int], None], numbers: tuple[int, ...]) -> Iterator[None]:
    process, hook = os.getpid(), sys.unraisablehook

    def handler(number: int, _: FrameType | None) -> None:
        # A process that reads images inherits this; the one that started it ends it.
        if os.getpid() == process:
            handle(number)

    def quietly(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            hook(unraisable)

    # What is ignored stays so: `nohup`, and jobs that a shell has put into the background.
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

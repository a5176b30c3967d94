"""`python -m polyseg`, and what the command `polyseg` starts."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import MutableMapping
from typing import Any

_SHORT_WAIT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long a thread of OpenMP may spin: iterations for GNU's library, ms for LLVM's and Intel's."""


def main() -> None:
    """Run the command line; no signal makes a traceback before it is there, or after it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    shorten_waiting(os.environ)
    _open_streams()
    from polyseg.cli.main import main as command_line

    try:
        command_line()
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        # All is written and said; libraries take up to a second to fold, some of them for ever.
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def shorten_waiting(environment: MutableMapping[str, str]) -> None:
    """Let waiting threads of OpenMP sleep sooner, unless the user has set how they wait.

    By default they spin for some milliseconds, and where other programs need the cores, they take
    them from the threads that they wait for. OpenMP reads this once, when torch is imported.

    >>> environment = {}
    >>> shorten_waiting(environment)
    >>> environment["GOMP_SPINCOUNT"]
    '1000'
    """
    if not environment.keys() & {*_SHORT_WAIT, "OMP_WAIT_POLICY"}:
        environment.update(_SHORT_WAIT)


class _Output(io.FileIO):
    """A standard stream whose reader may leave early, as `head` does; the work goes on without it.

    Messages on stderr are also dropped where they cannot be written for another reason.
    """

    def write(self, data: Any, /) -> int:
        """Write all bytes, or drop them."""
        rest = memoryview(data).cast("B")
        size = rest.nbytes
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and self.fileno() != 2:
                raise
        return size


def _open_streams() -> None:
    """Replace the standard streams, of which the caller may have closed some, by ones that last."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # This takes the free number, which a file of the work would get otherwise.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        elif mode == "w":
            # Without a buffer of bytes, which refuses a handler of signals that prints amid a line.
            text = io.TextIOWrapper(
                _Output(stream.fileno(), "w", closefd=False),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, text)


if __name__ == "__main__":
    main()

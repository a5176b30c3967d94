"""Entry point of `polyseg` and `python -m polyseg`."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import MutableMapping
from typing import Any

_SHORT_SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""Spinning time of idle OpenMP threads: in iterations (GNU) or milliseconds (LLVM and Intel)."""


def main() -> None:
    """Run the command line; a signal before or after it prints no traceback."""
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
        # Skip the cleanup of libraries, which takes up to a second and may hang.
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def shorten_waiting(environment: MutableMapping[str, str]) -> None:
    """Make idle OpenMP threads sleep soon, unless the user has set how they wait.

    By default they spin for some milliseconds, which on a busy machine takes cores from the threads
    that they wait for. OpenMP reads the settings once, when torch is imported.
    """
    if not environment.keys() & {*_SHORT_SPIN, "OMP_WAIT_POLICY"}:
        environment.update(_SHORT_SPIN)


class _Output(io.FileIO):
    """A standard stream that drops text that it cannot write.

    stdout drops text only after its reader has exited, as `head` does; it raises other errors.
    """

    def write(self, data: Any, /) -> int:
        """Write or drop all bytes, and return their number."""
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
    """Replace the standard streams by ones that work without a reader, also if they are closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # Occupy the free descriptor; otherwise the next opened file would get it.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        elif mode == "w":
            # Unbuffered: a buffered stream raises if a signal handler prints during a write.
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

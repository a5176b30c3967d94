"""Run a check in a child process that limits time and memory."""

import contextlib
import io
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from polyseg.cli.main import main
from polyseg.errors import PolysegError

MOST_SECONDS = 5.0
MOST_GROWTH = 200 * 10**6
_MOST_COPIES = 3
"""Allowed memory as a multiple of the bytes of the pixels that were read."""


def faults_in_child(check: Callable[[], Iterable[str]]) -> list[str]:
    """Return the faults that a check finds, including printed text, a timeout and a crash."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with tempfile.TemporaryFile() as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            found = list(check())
            sys.stdout.flush()
            sys.stderr.flush()
            if printed.seek(0, os.SEEK_END):
                printed.seek(0)
                found.append(f"printed {printed.read(200)!r}")
        os.write(write_end, "\n".join(found).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as stream:
        if not select.select([stream], [], [], 12 * MOST_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        found = [line for line in stream.read().split("\n") if line]
    status = os.waitpid(child, 0)[1]
    return found if status == 0 else [*found, f"ended by {status}"]


def faults_of_reading(
    path: Path, read: Callable[[Path], Any], good: Callable[[Any], bool] = lambda _: True
) -> list[str]:
    """Return the faults that reading a file shows.

    The reader must raise a one-line PolysegError that names the file, or return a good result.
    """
    found = []
    Path("/proc/self/clear_refs").write_text("5")  # Reset the peak to the current use.
    before, start = _memory("VmRSS"), time.process_time()
    held = 0
    try:
        result = read(path)
        held = getattr(result, "nbytes", 0)
        if not good(result):
            found.append(f"{read.__name__} took it for something else")
    except PolysegError as error:
        message = str(error)
        if "\n" in message or str(path) not in message:
            found.append(f"{read.__name__} says {message!r}")
    except BaseException as error:
        found.append(f"{read.__name__} raised {error!r}"[:300].replace("\n", " "))
    seconds, growth = time.process_time() - start, _memory("VmHWM") - before
    if seconds > MOST_SECONDS:
        found.append(f"{read.__name__} took {seconds:.1f} s")
    if growth > max(MOST_GROWTH, _MOST_COPIES * held):
        found.append(f"{read.__name__} took {growth / 1e6:.0f} MB")
    return found


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


class Answer(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def answer_of(*arguments: object) -> Answer:
    """Run a command of polyseg in this process, as the console script would."""
    out, err, before, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["polyseg", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    return Answer(code, out.getvalue(), err.getvalue())


def refusal_of(answer: Answer) -> PolysegError:
    """Return the PolysegError that ended a command; raise if the command ended otherwise."""
    if answer.code != 2 or not answer.err.startswith("error: ") or not answer.err.endswith("\n"):
        raise AssertionError(f"exit code {answer.code}, {answer.err[-300:]!r}")
    return PolysegError(answer.err.removesuffix("\n"))

"""Start polyseg processes quickly: forks of a server that has imported everything.

Starting Python and importing torch takes longer than the work of most tests. These are
ordinary processes to the system, each with its own process id, memory and exit code.
"""

import contextlib
import functools
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_IMPORTED_ONCE = (
    "tests.forks",
    "polyseg.__main__",
    "polyseg.cli.main",
    "polyseg.commands.train",
    "polyseg.commands.schedule",
    "polyseg.commands.evaluate",
    "polyseg.commands.estimate_uncertainty",
    "polyseg.commands.predict",
    "polyseg.commands.report",
    "monai.networks.nets",
    "torch._dynamo",
    "scipy.stats",
    "matplotlib.pyplot",
)


@functools.cache
def context() -> Any:
    """Return the multiprocessing context whose server has all imports and one thread."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(_IMPORTED_ONCE))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return made


def start(
    argv: list[str],
    out: Path,
    err: Path,
    *,
    environment: Mapping[str, str] | None = None,
    at: float = 0,
) -> BaseProcess:
    """Start `polyseg` with these arguments and append its output to two files, or to one.

    Args:
        argv: arguments after `polyseg`.
        out: file for standard output.
        err: file for standard error.
        environment: variables added to those of the server; PYTHONPATH also applies to imports.
        at: time, by `time.monotonic`, at which the command begins.
    """
    arguments = (argv, out, err, dict(environment or {}), at)
    process = context().Process(target=_be_polyseg, args=arguments, daemon=True)
    process.start()
    return process


_CLIENT = """#!/bin/sh
exec "{python}" -SEc '
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(chr(0) + "{name}")
server.sendall(chr(0).join([str(os.getpid()), *sys.argv[1:]]).encode())
server.shutdown(socket.SHUT_WR)
sys.exit(server.recv(1)[0])
' "$@"
"""


@contextlib.contextmanager
def program() -> Iterator[str]:
    """Yield the text of a program `polyseg` for scripts, each call of which is a fork.

    A fork has the output and the exit code of its call, but the variables and the working folder
    of the server, and no signal that its call gets.
    """
    context()
    name = f"polyseg-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX) as calls:
        calls.bind(f"\0{name}")
        calls.listen()
        threading.Thread(target=_answer_calls, args=(calls,), daemon=True).start()
        yield _CLIENT.format(python=sys.executable, name=name)
        calls.shutdown(socket.SHUT_RDWR)


def _answer_calls(calls: socket.socket) -> None:
    with contextlib.suppress(OSError):  # once it is closed
        while True:
            threading.Thread(target=_answer, args=(calls.accept()[0],), daemon=True).start()


def _answer(call: socket.socket) -> None:
    with call, call.makefile() as stream:
        pid, *argv = stream.read().split("\0")
        process = start(argv, Path(f"/proc/{pid}/fd/1"), Path(f"/proc/{pid}/fd/2"))
        process.join()
        call.sendall(bytes([(process.exitcode or 0) % 256]))


def _be_polyseg(
    argv: list[str], out: Path, err: Path, environment: dict[str, str], at: float
) -> None:
    import torch

    from polyseg.__main__ import main

    os.setsid()
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = ["polyseg", *argv]
    time.sleep(max(0.0, at - time.monotonic()))
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    # multiprocessing ends a process differently from how a command ends.
    os._exit(code)

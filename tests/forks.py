"""Start polyseg processes quickly: forks of a server that has imported everything.

Starting Python and importing torch takes longer than the work of most tests. These are
ordinary processes to the system, each with its own process id, memory and exit code.
"""

import contextlib
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
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

"""Commands in several processes, as `torchrun` starts them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

PATIENCE = 180
"""Seconds, after which processes that should have ended are taken to hang."""


def begin(count, *arguments, log, nodes=1, node=0, port=None):
    """Start one of `nodes` agents with so many processes each; what they say goes to a file."""
    meeting = (
        ["--standalone"]
        if nodes == 1
        else ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=a"]
    )
    command = [
        *(sys.executable, "-m", "torch.distributed.run", *meeting),
        *(f"--nnodes={nodes}", f"--node-rank={node}", f"--nproc-per-node={count}"),
        *("-m", "polyseg", *map(str, arguments)),
    ]
    with Path(log).open("wb") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def end(agent, seconds=PATIENCE):
    """Return an agent's exit code; where it hangs, all that it started is killed."""
    try:
        return agent.wait(seconds)
    finally:
        for number in (agent.pid, *workers(agent)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)


def run(count, *arguments, log):
    """Run a command in so many processes to its end; return the exit code."""
    return end(begin(count, *arguments, log=log))


def workers(agent):
    """Return the numbers of the processes that an agent has started, and that are still there."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    return [int(number) for number in children.read_text().split()] if children.exists() else []


def free_port():
    """Return a port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

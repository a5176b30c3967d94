"""Run commands in several processes, with the variables of `torchrun` or by `torchrun` itself.

Those without `torchrun` are forks of a server that has one thread, as threads survive no fork.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from tests import forks

PATIENCE = 180
"""Seconds after which a process that should have ended counts as hanging."""


class Group(list):
    """Processes of one command, and their rendezvous store."""

    store: TCPStore


def begin(count, *arguments, log, environment=None):
    """Start `count` processes of one command and write their output to a file."""
    group = Group()
    group.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(group.store.port)}
    told |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(count)}
    for rank in range(count):
        mine = {**told, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})}
        group.append(forks.start([*map(str, arguments)], log, log, environment=mine))
    return group


def end(group, seconds=PATIENCE):
    """Return the first exit code that is not 0, or 0; if one process hangs, kill all."""
    deadline = time.monotonic() + seconds
    for process in group:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [process for process in group if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} of {len(group)} processes did not end"
    return next((process.exitcode for process in group if process.exitcode), 0)


def run(count, *arguments, log):
    """Run a command in `count` processes to its end and return the exit code."""
    return end(begin(count, *arguments, log=log))


def begin_agent(count, *arguments, log, nodes, node, port):
    """Start one of `nodes` agents of `torchrun`, with `count` processes each."""
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=a")
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


def end_agent(agent):
    """Return an agent's exit code; if it hangs, kill it and its processes."""
    try:
        return agent.wait(PATIENCE)
    finally:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
        workers = children.read_text().split() if children.exists() else []
        for number in (agent.pid, *map(int, workers)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)


def free_port():
    """Return an unused port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

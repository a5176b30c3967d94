"""Fixtures that all tests share."""

import functools
import gc
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

from polyseg.__main__ import shorten_waiting

shorten_waiting(os.environ)  # Before torch is imported; child processes inherit it.

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from polyseg.cli.main import main  # noqa: E402
from polyseg.commands.train import train  # noqa: E402
from polyseg.config import load_config  # noqa: E402
from polyseg.runs.run_folder import RunDirectory  # noqa: E402

# Machines differ in speed, so no test may fail because of elapsed time.
settings.register_profile("polyseg", deadline=None, max_examples=50)
settings.load_profile("polyseg")

# Background jobs of a shell inherit that this signal is ignored, and polyseg respects that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test cuts the power, and a run would wait dozens of times for the disk.
os.fsync = lambda _: None

# Tensors of tests are tiny, so several threads would only wait for one another.
torch.set_num_threads(1)

TINY = (
    "data.demo_images=16",
    "data.size=32",
    "network.kwargs={channels: [4, 8], strides: [2], num_res_units: 1}",
    "training.batch_size=4",
    "training.epochs=3",
    "uncertainty.samples=3",
    "control.start=1",
    "control.every=1",
    "output.overlays=2",
)
"""Settings of a run that takes one or two seconds."""


class Answer(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def pytest_collection_finish():
    """Let the collector of garbage skip the many objects of imported modules and of pytest."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that still read it


@pytest.fixture
def tiny(tmp_path):
    """Return a function that builds a configuration of TINY plus overrides, its run in tmp_path."""

    def make(name="run", *overrides):
        place = f"output.path={tmp_path / name}"
        return load_config(overrides=[*TINY, place, "output.figures=false", *overrides])

    return make


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """Return a function that trains TINY plus overrides once per session, without any patches."""

    @functools.cache
    def trained(*overrides):
        place = tmp_path_factory.mktemp("trained") / "run"
        here = (f"output.path={place}", "output.figures=false")
        train(load_config(overrides=[*TINY, *here, *overrides]))
        return place

    return trained


@pytest.fixture
def finished(trained_once, tmp_path):
    """Return a function that copies a run of `trained_once`, for tests that need a finished run."""

    def copy(name="run", *overrides):
        shutil.copytree(trained_once(*overrides), tmp_path / name)
        return RunDirectory(tmp_path / name)

    return copy


@pytest.fixture
def quick_figures(monkeypatch):
    """Save figures as empty files, in tests that look at none of them."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).touch())


@pytest.fixture
def polyseg(monkeypatch, capsys):
    """Return a function that runs a command in this process as the console script does."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["polyseg", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        return Answer(code, *capsys.readouterr())

    return run

"""Imports of each command: torch and MONAI only if it computes with tensors."""

import subprocess
import sys
from pathlib import Path

import pytest

from polyseg.data.phantoms.phantom_sets import make_phantoms, write_phantoms

from .reference import commands

RUN = Path(__file__).parent / "run_of_0_1"
TENSORS = {"torch", "monai"}
FIGURES = {*TENSORS, "matplotlib"}
IMAGES = {*FIGURES, "scipy", "h5py", "rich.progress"}
RECORDS = {*FIGURES, "scipy", "PIL", "rich.progress"}
HEAVY = {*FIGURES, "scipy", "h5py", "numpy", "PIL"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a small data set."""
    path = tmp_path_factory.mktemp("start")
    write_phantoms(path / "phantoms", make_phantoms(10, size=(32, 32)))
    return path


def imported_by(folder, code):
    """Return the modules that a new process has imported after running the code."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print('imported:', *sys.modules)"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported:")[2].split())


def running(*commands, said=""):
    """Return code that runs commands in one process and checks exit code and output."""
    return (
        "from typer.testing import CliRunner\nfrom polyseg.cli.main import app\n"
        f"for command in {[list(map(str, command)) for command in commands]}:\n"
        "    done = CliRunner().invoke(app, command)\n"
        f"    assert done.exit_code == 0 and {said!r} in done.output, (command, done.output)\n"
    )


@pytest.mark.parametrize(
    ("commands", "absent"),
    [
        ([["plot-loss", "--terms", 3, "--gradient"]], {*TENSORS, "scipy", "h5py", "rich.progress"}),
        (
            [
                ["schedule", "show", RUN],
                ["schedule", "show", RUN, "--image", "phantom_0000"],
                ["schedule", "recompute", RUN, "--set", "control.sensitivity=2"],
                ["schedule", "export", RUN],
                ["schedule", "validity", RUN, "--csv"],
            ],
            RECORDS,
        ),
        ([["config", "show"], ["config", "schema"], ["config", "init", "a.yaml"]], HEAVY),
        (
            [["data", "check", "phantoms"], ["data", "split", "phantoms", "--out", "split.json"]],
            IMAGES,
        ),
        ([["data", "demo", "more", "--images", 2, "--size", 32]], {*FIGURES, "h5py"}),
    ],
    ids=["plot-loss", "records", "config", "data", "data demo"],
)
def test_commands_import_no_more_than_they_need(folder, commands, absent):
    """The commands run in one process, which then has imported the modules of all of them."""
    imported = imported_by(folder, running(*commands))
    assert "polyseg.cli.main" in imported
    assert not absent & imported


@pytest.mark.slow
def test_drawing_imports_no_torch(folder):
    """Figures are saved by matplotlib alone, here as empty files."""
    code = running(
        ["schedule", "validity", RUN, "--out", "validity"],
        ["schedule", "plot", RUN, "--out", "plot"],
        ["report", RUN, "--out", "page.html"],
    )
    saving = (
        "from matplotlib.figure import Figure\n"
        "Figure.savefig = lambda _, path, **__: open(path, 'w').close()\n"
    )
    assert not TENSORS & imported_by(folder, saving + code)


def test_help_of_every_command_imports_nothing_heavy(tmp_path):
    names = [[*name, "--help"] for name, _ in commands()]
    assert len(names) > 10
    assert not HEAVY & imported_by(tmp_path, running(*names, said="Example"))


def test_modules_of_records_and_images_import_no_torch(tmp_path):
    modules = ("curves", "difficulty", "records", "runs", "runs.checkpoints", "data.loading")
    imported = imported_by(tmp_path, "\n".join(f"import polyseg.{name}" for name in modules))
    assert "polyseg.data.dataset" in imported
    assert not FIGURES & imported

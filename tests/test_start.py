"""What a command imports: torch and MONAI only where there are tensors."""

import subprocess
import sys
from pathlib import Path

import pytest

from polyseg.data.phantoms.phantom_sets import make_phantoms, write_phantoms

from .reference import commands

RUN = Path(__file__).parent / "run_of_0_1"
TENSORS = {"torch", "monai"}
FIGURES = {*TENSORS, "matplotlib"}
HEAVY = {*FIGURES, "scipy", "h5py", "numpy"}
IMAGES = {*FIGURES, "scipy", "h5py"}
RECORDS = {*FIGURES, "scipy", "PIL", "rich.progress"}
REPORTING = (
    "import sys\n"
    "from polyseg.cli.main import main\n"
    "try:\n    main()\n"
    "finally:\n    print('imported:', *sys.modules, file=sys.stderr)\n"
)


def imported_by(folder, *arguments):
    """Return the modules that a command has imported when it ends, in a new process."""
    command = [sys.executable, "-c", REPORTING, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rpartition("imported:")[2].split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a small data set in it."""
    path = tmp_path_factory.mktemp("start")
    write_phantoms(path / "phantoms", make_phantoms(10, size=(32, 32)))
    return path


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["plot-loss", "--terms", "3", "--gradient"], {*TENSORS, "scipy", "h5py"}),
        (["schedule", "show", RUN], RECORDS),
        (["schedule", "show", RUN, "--image", "phantom_0000"], RECORDS),
        (["schedule", "recompute", RUN, "--set", "control.sensitivity=2"], RECORDS),
        (["schedule", "export", RUN], RECORDS),
        (["schedule", "validity", RUN, "--csv"], RECORDS),
        (["schedule", "validity", RUN, "--out", "validity"], TENSORS),
        (["schedule", "plot", RUN, "--out", "plot"], TENSORS),
        (["report", RUN], TENSORS),
        (["config", "show"], HEAVY),
        (["config", "schema"], HEAVY),
        (["config", "init"], HEAVY),
        (["data", "check", "phantoms"], IMAGES),
        (["data", "split", "phantoms", "--out", "split.json"], IMAGES),
        (["data", "demo", "more", "--images", "2", "--size", "32"], {*FIGURES, "h5py"}),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, list) else "",
)
def test_commands_that_need_no_tensor_import_neither_torch_nor_monai(folder, arguments, absent):
    imported = imported_by(folder, *arguments)
    assert "polyseg.cli.main" in imported
    assert not absent & imported


def test_help_of_every_command_imports_nothing_heavy(tmp_path):
    """In one process: what one help imports, all of them together have imported."""
    names = [list(name) for name, _ in commands()]
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom polyseg.cli.main import app\n"
        f"for name in {names}:\n"
        "    done = CliRunner().invoke(app, [*name, '--help'])\n"
        "    assert done.exit_code == 0 and 'Example' in done.output, name\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(names) > 10
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    ["curves", "difficulty", "records", "runs", "runs.checkpoints", "data.dataset", "data.loading"],
)
def test_modules_of_records_and_images_import_no_torch(tmp_path, module):
    code = f"import polyseg.{module}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not FIGURES & set(done.stdout.split())

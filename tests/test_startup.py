"""Start of the program: threads that do not spin, and closed standard streams."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from polyseg.__main__ import shorten_waiting

from .conftest import TINY

SET = [word for override in TINY for word in ("--set", override)]
TRAIN = ["train", *SET, "--epochs", "1", "--set", "output.figures=false", "--out"]
WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")


def start(*arguments, redirect="", **how):
    """Run the program from a shell that redirects its streams."""
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "polyseg"]
    how.setdefault("stdout", subprocess.PIPE)
    how.setdefault("stderr", subprocess.PIPE)
    return subprocess.run([*command, *map(str, arguments)], text=True, check=False, **how)


@pytest.fixture
def closed_pipe():
    """Yield a pipe whose reader is closed."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    yield write_end
    os.close(write_end)


def test_threads_wait_briefly_by_default():
    environment = {"OMP_NUM_THREADS": "2"}
    shorten_waiting(environment)
    assert environment == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", WAITING)
def test_openmp_wait_settings_of_the_user_are_kept(name):
    environment = {name: "3"}
    shorten_waiting(environment)
    assert environment == {name: "3"}


def test_importing_the_package_does_not_change_the_environment():
    code = "import os; b = dict(os.environ); import polyseg.__main__; assert b == dict(os.environ)"
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch has the library of GNU on Linux only")
def test_openmp_settings_are_set_before_torch_is_imported(tmp_path):
    """The OpenMP library itself prints the settings that it uses."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    done = start("train", "--dry-run", *SET, "--out", tmp_path / "run", env=environment)
    assert done.returncode == 0
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr


def test_child_processes_of_the_tests_wait_briefly():
    assert set(WAITING) & set(os.environ)


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["config", "schema"], 0), (["--version"], 0), (["config", "show", "nowhere.yaml"], 2)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_closed_streams_do_not_change_the_exit_code(arguments, code, redirect):
    done = start(*arguments, redirect=redirect)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code and "2>&-" not in redirect:
        assert done.stderr.startswith("error: nowhere.yaml")
    if not code and redirect == "2>&-":
        assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["config", "schema"], 0), (["--help"], 0), (["config", "show", "nowhere.yaml"], 2)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_readers_do_not_change_the_exit_code(closed_pipe, arguments, code, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = start(*arguments, stdout=closed_pipe, env=environment)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert (
        start(*arguments, stdout=closed_pipe, stderr=closed_pipe, env=environment).returncode
        == code
    )


@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["", ">&-", "2>&-", ">&- 2>&-"])
def test_figure_is_drawn_despite_closed_streams(tmp_path, closed_pipe, redirect):
    done = start("plot-loss", "--out", tmp_path / "a.png", redirect=redirect, stdout=closed_pipe)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@full_device
def test_training_succeeds_without_streams(tmp_path, closed_pipe):
    done = start(*TRAIN, tmp_path / "closed", redirect=">&- 2>&-")
    assert done.returncode == 0
    done = start(*TRAIN, tmp_path / "gone", "--json", redirect="2>/dev/full", stdout=closed_pipe)
    assert done.returncode == 0
    first, second = (
        json.loads((tmp_path / name / "evaluation/summary.json").read_text())["runs"][0]["metrics"]
        for name in ("closed", "gone")
    )
    assert first == second
    assert "epoch 1/1" in (tmp_path / "gone" / "log.txt").read_text()


def test_signal_message_starts_on_its_own_line():
    code = (
        "import signal, sys\n"
        "from polyseg import __main__ as start\n"
        "start._open_streams()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('told', file=sys.stderr, flush=True))\n"
        "whole = start._Output.write\n"
        "def write(stream, data):\n"
        "    start._Output.write = whole\n"
        "    signal.raise_signal(signal.SIGUSR1)\n"
        "    return whole(stream, data)\n"
        "start._Output.write = write\n"
        "print('line', file=sys.stderr, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stderr.split() == ["told", "line"]


def test_slow_reader_receives_large_results_completely():
    """The results exceed the capacity of a pipe, so they are written in parts."""
    code = (
        "import sys\n"
        "from polyseg.__main__ import _open_streams\n"
        "_open_streams()\n"
        "print('x' * 500_000, end='', flush=True)\n"
    )
    slow = f'{sys.executable} -c "{code}" | (sleep 0.2; wc -c)'
    done = subprocess.run(slow, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "500000" and done.stderr == ""


@full_device
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_results_that_cannot_be_written_are_an_error(unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = start("config", "schema", redirect=">/dev/full", env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No space left on device")


@full_device
def test_errors_that_cannot_be_written_keep_their_exit_code():
    assert start("config", "show", "nowhere.yaml", redirect="2>/dev/full").returncode == 2

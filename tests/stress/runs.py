"""Start, end and compare small training runs in separate processes.

Most of them are forks of a server that has imported everything. Genuine processes are started by
`python -m polyseg`.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from polyseg.errors import PolysegError
from tests import forks

EPOCHS = 6
SETTINGS = (
    "data.demo_images=8",
    "data.size=32",
    "network.kwargs={channels: [4, 8], strides: [2], num_res_units: 1}",
    "training.batch_size=4",
    "uncertainty.samples=3",
    "control.start=1",
    "control.every=1",
    "output.figures=false",
)
PATIENCE = 120.0
"""Seconds after which a process that should have ended counts as hanging."""

_BETWEEN_LOOKS = 0.003
_REPOSITORY = Path(__file__).parents[2]
_numbers = itertools.count()
_kept: list[tempfile.TemporaryDirectory[str]] = []


class Answer(NamedTuple):
    """Exit code and output of a command; the code is None if it did not end in time."""

    code: int | None
    out: str
    err: str

    def __str__(self) -> str:
        last = self.err.strip().splitlines()[-1:] or ["nothing"]
        return f"code {self.code}, stderr ends with {last[0]!r}"


class Times(NamedTuple):
    """Seconds that a process ran on a processor, and that it waited for one."""

    worked: float
    waited: float


class Running:
    """A process of polyseg."""

    def __init__(self, process: "subprocess.Popen[bytes] | BaseProcess", words: Path) -> None:
        self.process, self.words = process, words
        self.genuine = isinstance(process, subprocess.Popen)
        self.last_times = Times(0.0, 0.0)

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self.process.pid or 0)

    def send(self, number: int) -> None:
        """Send a signal; do nothing if the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def ended(self) -> bool:
        """Return whether the process has ended."""
        return self.wait(0) is not None

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Return the exit code, negative for a signal, or None if the process is still running."""
        if isinstance(self.process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
            return self.process.returncode
        self.process.join(seconds)
        return self.process.exitcode

    def answer(self, seconds: float = PATIENCE) -> Answer:
        """Return its exit code and output; kill it after `seconds`."""
        code = self.wait(seconds)
        if code is None:
            self.send(signal.SIGKILL)
            self.wait()
        return Answer(code, *(_text(self.words, ending) for ending in (".out", ".err")))

    def work(self, seconds: float = PATIENCE) -> float:
        """Wait until the process has run for `seconds`, ends, or hangs; return its processor time.

        Processor time is counted, so that a loaded machine does not change the moment.
        """
        deadline = time.monotonic() + PATIENCE
        while not self.ended() and self.times().worked < seconds and time.monotonic() < deadline:
            time.sleep(_BETWEEN_LOOKS)
        return self.last_times.worked

    def times(self) -> Times:
        """Return its running and waiting time, as last seen if it has ended."""
        with contextlib.suppress(OSError, IndexError):
            worked, waited, _ = _proc(self.pid, "schedstat")[0].split()
            self.last_times = Times(int(worked) / 1e9, int(waited) / 1e9)
        return self.last_times

    def has_begun(self) -> bool:
        """Return whether polyseg itself is certainly running, after the start of Python.

        This is so once it handles SIGTERM or has imported torch; in a fork, which has torch
        from the beginning, after at most one second.
        """
        with contextlib.suppress(OSError):
            status = dict(
                line.split(":\t", 1) for line in _proc(self.pid, "status") if ":\t" in line
            )
            if int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1:
                return True
            if self.genuine:
                return any("libtorch" in line for line in _proc(self.pid, "maps"))
            return time.time() - self.words.with_suffix(".err").stat().st_mtime > 1
        return False


def _proc(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/{name}").read_text().splitlines()


def _text(words: Path, ending: str) -> str:
    path = words.with_suffix(ending)
    return path.read_text() if path.exists() else ""


def start(argv: list[str], place: Path, *, genuine: bool = False, at: float = 0) -> Running:
    """Start a command with its output in files in `place`.

    Args:
        argv: arguments after `polyseg`.
        place: folder for the output.
        genuine: start as `python -m polyseg`, not as a fork.
        at: time, by `time.monotonic`, at which the command of a fork begins.
    """
    words = place / f"words-{next(_numbers)}"
    if genuine:
        with (
            words.with_suffix(".out").open("wb") as out,
            words.with_suffix(".err").open("wb") as err,
        ):
            command = [sys.executable, "-m", "polyseg", *argv]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=_REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        return Running(process, words)
    places = (words.with_suffix(ending) for ending in (".out", ".err"))
    return Running(forks.start(argv, *places, at=at), words)


def run(argv: list[str], place: Path, *, genuine: bool = False) -> Answer:
    """Run a command to its end."""
    return start(argv, place, genuine=genuine).answer()


def training(folder: Path, *, epochs: int = EPOCHS) -> list[str]:
    """Return the arguments of a small run."""
    settings = (*SETTINGS, f"training.epochs={epochs}")
    return ["train", "--out", str(folder), *(part for one in settings for part in ("--set", one))]


def resuming(folder: Path) -> list[str]:
    """Return the arguments that resume a run."""
    return ["train", "--resume", "--out", str(folder)]


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Yield a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="polyseg-stress-") as folder:
        yield Path(folder)


def lasting_folder() -> Path:
    """Return a new folder that is removed when this process ends."""
    _kept.append(tempfile.TemporaryDirectory(prefix="polyseg-stress-"))
    return Path(_kept[-1].name)


def trials(
    name: str, count: int, seed: int, trial: Callable[[random.Random, int, Path], list[str]]
) -> list[str]:
    """Run trials, each with its own folder and random numbers; return the failures."""
    failures = []
    for number in range(count):
        with workplace() as place:
            chance = random.Random(f"{name} {seed} {number}")
            try:
                wrong = trial(chance, number, place)
            except PolysegError as error:
                wrong = [f"the harness cannot read the run: {error}"]
            for failure in wrong:
                failures.append(f"{name}, seed {seed}, trial {number}: {failure}")
                print(failures[-1], file=sys.stderr, flush=True)
    return failures


class Reference(NamedTuple):
    """An undisturbed run, and the processor time of its process."""

    folder: Path
    seconds: float


@functools.cache
def reference(*, genuine: bool = True, epochs: int = EPOCHS) -> Reference:
    """Return an undisturbed run, made once."""
    place = lasting_folder()
    if not genuine:
        # The first fork has cold caches and takes longer than later ones.
        run(training(place / "first"), place)
    process = start(training(place / "run", epochs=epochs), place, genuine=genuine)
    seconds = process.work()
    answer = process.answer()
    if answer.code != 0:
        raise RuntimeError(f"the reference run failed: {answer}")
    return Reference(place / "run", seconds)


def committed_epoch(folder: Path) -> int:
    """Return the epoch of the last checkpoint, or -1 if there is none."""
    from polyseg.runs.checkpoints import read_checkpoint

    last = folder / "checkpoints" / "last.safetensors"
    return read_checkpoint(last).epoch if last.is_file() else -1


def continued(folder: Path, place: Path, *, genuine: bool = False) -> tuple[list[str], list[str]]:
    """Return the arguments that continue an interrupted run, and the faults found.

    If nothing was committed, resuming must be refused in one line, and the run starts again.
    """
    if committed_epoch(folder) >= 0:
        return resuming(folder), []
    refusal = run(resuming(folder), place, genuine=genuine)
    good = refusal.code == 2 and is_one_line_naming(folder, refusal.err)
    wrong = [] if good else [f"--resume of a run without a checkpoint: {refusal}"]
    if committed_epoch(folder) >= 0:
        wrong.append("--resume of a run without a checkpoint began one")
    return training(folder), wrong


def is_one_line_naming(folder: Path, words: str) -> bool:
    """Return whether the text is one line that names the folder."""
    return len(words.splitlines()) == 1 and str(folder) in words


def complete(argv: list[str], folder: Path, place: Path, *, genuine: bool = False) -> list[str]:
    """Run a command that completes a run; return its differences from the reference."""
    answer = run(argv, place, genuine=genuine)
    if answer.code != 0:
        return [f"{argv[1]} failed: {answer}"]
    return differences(folder, reference().folder)


def differences(folder: Path, other: Path) -> list[str]:
    """Return the differences between two runs, bit by bit, except for times."""
    first, second = contents(folder), contents(other)
    found = [f"{name} is in one run only" for name in sorted(first.keys() ^ second.keys())]
    for name in sorted(first.keys() & second.keys()):
        one, another = first[name], second[name]
        inner = one.keys() | another.keys()
        wrong = sorted(part for part in inner if one.get(part) != another.get(part))
        found += [f"{name} differs in {len(wrong)} values, such as {wrong[0]}"] if wrong else []
    return found


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the comparable content of a run by file and name."""
    return {
        str(path.relative_to(folder)): {
            name: _comparable(value, folder)
            for name, value in _leaves(_read(path), "")
            if "seconds" not in name
        }
        for path in folder.rglob("*")
        if path.is_file()
    }


def _read(path: Path) -> Any:
    """Return the record of a file, or None for files of times and paths."""
    from polyseg.runs.checkpoints import read_checkpoint
    from polyseg.runs.record_files import read_assessment, read_schedule

    if path.suffix == ".safetensors":
        checkpoint = read_checkpoint(path)
        # Assessments hold the settings, which name the folder, so their hashes differ.
        names = dict.fromkeys(checkpoint.assessments, "")
        return dataclasses.replace(checkpoint, assessments=names)
    if path.suffix == ".h5":
        return read_schedule(path) if path.stem == "schedule" else read_assessment(path)
    if path.name == "history.csv":
        columns = zip(*(line.split(",") for line in path.read_text().splitlines()), strict=True)
        return {column[0]: column[1:] for column in columns}
    if path.name in (".lock", "log.txt", "environment.json"):
        return None
    return path.read_bytes().decode(errors="backslashreplace")


def _leaves(record: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of a nested record by name."""
    if hasattr(record, "model_dump"):
        record = record.model_dump()
    if dataclasses.is_dataclass(record):
        record = {one.name: getattr(record, one.name) for one in dataclasses.fields(record)}
    if isinstance(record, list | tuple):
        record = dict(enumerate(record))
    if not isinstance(record, Mapping):
        yield name, record
        return
    for key, value in record.items():
        yield from _leaves(value, f"{name}/{key}" if name else str(key))


def _comparable(value: Any, folder: Path) -> Any:
    """Return numbers as bytes, so that NaN equals itself, and texts without the folder's name."""
    if hasattr(value, "numpy"):
        value = value.numpy()
    if hasattr(value, "tobytes"):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, Path):
        value = str(value)
    return value.replace(str(folder), "RUN") if isinstance(value, str) else repr(value)

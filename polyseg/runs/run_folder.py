"""The folder of a run: its lock, checkpoints, history, configuration and environment.

Renaming `checkpoints/last.safetensors` commits an epoch. It comes last, and the checkpoint names
the hashes of the files it relies on. `history.csv` and `schedule.h5` repeat its content for people
and for other runs; resuming writes them again.
"""

import contextlib
import json
import logging
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyseg import __version__
from polyseg.config import Config
from polyseg.data.splits import PARTS, Split, refuse_overlap
from polyseg.errors import PolysegError, reason
from polyseg.records import Assessment
from polyseg.runs.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from polyseg.runs.history import COLUMNS, completed
from polyseg.runs.record_files import read_assessment, write_schedule
from polyseg.system import files
from polyseg.system.files import (
    TEMPORARY_PREFIX,
    csv_table,
    exclusive_lock,
    keep_as,
    read_text,
    sha256_of_file,
    write_text,
)

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812

log = logging.getLogger(__name__)

_BEFORE_EPOCH_1 = {
    *("environment.json", "config.yaml", "split.json", "log.txt", "replay.h5", "checkpoints")
}
_RECORDED_VERSIONS = (
    *("torch", "numpy", "monai", "scipy", "h5py", "safetensors", "pillow", "tifffile"),
)


class RunDirectory:
    """The paths in a run's folder, and the files that are written in every epoch."""

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.last = path / "checkpoints" / "last.safetensors"
        self.previous = path / "checkpoints" / "previous.safetensors"
        self.best = path / "checkpoints" / "best.safetensors"
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.split = path / "split.json"
        self.log = path / "log.txt"
        self.history = path / "history.csv"
        self.schedule = path / "schedule.h5"
        self.replay = path / "replay.h5"
        self.figures = path / "figures"
        self.evaluation = path / "evaluation"
        self._last_is_damaged = False

    @contextlib.contextmanager
    def writing(self, *, resume: bool) -> Iterator[None]:
        """Lock the folder for the length of the block; a new run needs an empty one."""
        try:
            files.disk.make_folder(self.path)
        except OSError as error:
            raise PolysegError(f"{self.path}: cannot be made: {reason(error)}") from error
        with exclusive_lock(self.path / ".lock", owner=str(self.path)):
            if not resume:
                self.refuse_occupied()
                self._remove_unfinished_files()
            yield

    def refuse_occupied(self) -> None:
        """Raise if the folder is not empty, or its name is not text, which checkpoints need."""
        if not str(self.path).isprintable():
            raise PolysegError(f"{str(self.path)!r}: is not text; choose another --out")
        if self.path.is_dir() and not self._holds_nothing():
            raise PolysegError(
                f"{self.path}: is not empty; add --resume to continue its run, or choose "
                "another --out for a new one"
            )

    def _holds_nothing(self) -> bool:
        """Return whether the folder is empty, or holds a run that ended before its first epoch."""
        names = {entry.name for entry in self.path.iterdir()} - {".lock"}
        names = {name for name in names if not name.startswith(TEMPORARY_PREFIX)}
        begun = names <= _BEFORE_EPOCH_1 and _is_environment(self.environment)
        return not names or (begun and not any(self.last.parent.glob("[!.]*")))

    def refuse_missing(self) -> None:
        """Raise if there is no run to resume."""
        if not self.last.is_file() and not self.previous.is_file():
            raise PolysegError(
                f"{self.path}: holds no run to resume (no {self.last.relative_to(self.path)}); "
                "without --resume a new run starts"
            )

    def checkpoint_to_resume(self) -> Checkpoint:
        """Read the last checkpoint, or the previous one if the last is missing or damaged."""
        try:
            return read_checkpoint(self.last)
        except PolysegError as error:
            if not self.previous.is_file():
                raise
            checkpoint = read_checkpoint(self.previous)
            self._last_is_damaged = True
            log.warning("%s; resuming from the previous one, epoch %d", error, checkpoint.epoch)
            return checkpoint

    def commit(self, checkpoint: Checkpoint) -> None:
        """Write the files of an epoch; renaming the last checkpoint commits it.

        If a file cannot be written, earlier epochs stay committed.
        """
        self._write_copies(checkpoint)
        if self.last.is_file():
            keep_as(self.last, self.previous)
        write_checkpoint(self.last, checkpoint)
        self._write_best(checkpoint)

    def recover(self, checkpoint: Checkpoint) -> None:
        """Make the folder match a checkpoint before training resumes from it.

        Unfinished files and assessments of later epochs are removed; history, schedule and best
        checkpoint are written again.
        """
        assessments = self.path / "uncertainty"
        for path in () if assessments.is_symlink() else assessments.glob("epoch_*.h5"):
            number = path.stem.removeprefix("epoch_")
            if number.isdecimal() and int(number) > checkpoint.epoch:
                files.disk.remove(path)
        self._remove_unfinished_files()
        if self._last_is_damaged and self.last.is_file():
            files.disk.rename(self.last, self.last.with_suffix(".damaged"))
        self._write_copies(checkpoint)
        self._write_best(checkpoint)

    def _remove_unfinished_files(self) -> None:
        own = (self.last.parent, self.path / "uncertainty", self.figures, self.evaluation)
        for folder in (self.path, *(one for one in own if not one.is_symlink())):
            for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
                if not path.is_dir():
                    files.disk.remove(path)

    def _write_copies(self, checkpoint: Checkpoint) -> None:
        if checkpoint.history:
            rows = (completed(row).values() for row in checkpoint.history)
            cells = ([f"{value:.9g}" for value in row] for row in rows)
            write_text(self.history, csv_table(list(COLUMNS), cells))
        if checkpoint.schedule is not None:
            write_schedule(self.schedule, checkpoint.schedule)

    def _write_best(self, checkpoint: Checkpoint) -> None:
        # Also when resuming: a crash may have come between the two checkpoints.
        if checkpoint.best_epoch == checkpoint.epoch:
            write_checkpoint(self.best, checkpoint.weights_only())

    def assessment(self, epoch: int) -> Path:
        """Return the path of an epoch's assessment file."""
        return self.path / "uncertainty" / f"epoch_{epoch:04d}.h5"

    def begin(self, config: Config, split: str, now: Mapping[str, Any]) -> str:
        """Write the files that identify a run, and return the sha256 of its split.

        `split` is a result of `splits.split_json`, `now` of `environment`.
        """
        # Write first the file by which the folder of a run is recognised.
        write_text(self.environment, json.dumps(now, indent=2) + "\n")
        self.write_config(config)
        write_text(self.split, split)
        return sha256_of_file(self.split)

    def changes_of_environment(self, now: Mapping[str, Any]) -> list[str]:
        """Return the differences from the environment in which the run was last started."""
        recorded = self._read_environment()
        recorded |= recorded.get("resumed", [{}])[-1]
        return [
            f"{name} {recorded.get(name)} -> {value}"
            for name, value in now.items()
            if name not in ("command", "started") and recorded.get(name) != value
        ]

    def note_resumption(self, epoch: int, now: Mapping[str, Any]) -> None:
        """Add the environment in which a run resumes to environment.json."""
        recorded = self._read_environment()
        recorded["resumed"] = [*recorded.get("resumed", []), {"after_epoch": epoch, **now}]
        write_text(self.environment, json.dumps(recorded, indent=2) + "\n")

    def _read_environment(self) -> dict[str, Any]:
        try:
            recorded = json.loads(read_text(self.environment))
            resumed = recorded.get("resumed", [{}])
            if not (isinstance(resumed, list) and resumed and isinstance(resumed[-1], dict)):
                raise ValueError("it has no list of resumed environments")
            return dict(recorded)
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise PolysegError(f"{self.environment}: cannot be read: {error}") from None

    def write_config(self, config: Config) -> None:
        """Write config.yaml; a resumed run may have been given more epochs."""
        write_text(self.config, config.to_yaml())

    def read_split(self, sha256: str = "") -> tuple[Split, dict[str, str]]:
        """Return the ids by part, and the hashes of the images by id.

        A missing or damaged split.json, or one whose hash is not `sha256`, raises PolysegError.
        """
        try:
            text = read_text(self.split)
            if sha256 and sha256_of_file(self.split) != sha256:
                raise ValueError("it is not the file that the run recorded (its sha256 differs)")
            record = json.loads(text)
            split = {part: [str(row["id"]) for row in record[part]] for part in PARTS}
            rows = (row for part in PARTS for row in record[part])
            hashes = {str(row["id"]): str(row["sha256"]) for row in rows}
            if not split["train"] or not all(map(str.isprintable, hashes)):
                raise ValueError("it has no training images, or unprintable names")
            refuse_overlap(split, str(self.split))
            return split, hashes
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise PolysegError(f"{self.split}: cannot be read: {error}") from None


def new_run_path() -> Path:
    """Return the default folder of a new run: runs/ and the time."""
    return Path("runs") / time.strftime("%Y%m%d-%H%M%S")


def find_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint file as it is, or the best checkpoint of a run's folder."""
    path = Path(path)
    if path.is_file():
        return path
    run = RunDirectory(path)
    if run.best.is_file():
        return run.best
    if run.last.is_file():
        log.warning("%s: has no best checkpoint; using the last one", path)
        return run.last
    what = "is neither a checkpoint nor a run (it has no checkpoints/best.safetensors)"
    raise PolysegError(f"{path}: {what if path.exists() else 'there is no such file or folder'}")


def in_order(assessments: Iterable[str]) -> list[str]:
    """Return names of assessment files in the order of their epochs.

    >>> in_order(["epoch_10000.h5", "epoch_9999.h5"])
    ['epoch_9999.h5', 'epoch_10000.h5']
    """
    return sorted(assessments, key=lambda name: (len(name), name))


def read_assessments(run: RunDirectory, recorded: Mapping[str, str]) -> list[Assessment]:
    """Read the assessments of a run in order, checking the hashes that it recorded."""
    return [
        read_assessment(run.path / "uncertainty" / name, sha256=recorded[name])
        for name in in_order(recorded)
    ]


def results_beside(source: str | Path, name: str) -> Path:
    """Return the default folder for results: in the run, or beside the checkpoint file."""
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    return folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _is_environment(path: Path) -> bool:
    """Return whether a file is the environment.json of a run of polyseg."""
    try:
        return "polyseg" in dict(json.loads(read_text(path)))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def environment(device: "Device", processes: int = 1) -> dict[str, Any]:
    """Return the versions, the machine and the command of this process."""
    import torch

    return {
        "polyseg": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _RECORDED_VERSIONS},
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }

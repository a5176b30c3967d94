"""Read the files of runs and evaluations for a report, with remarks on unreadable ones.

Folders may be untrusted. Nothing outside the folder is read, wherever links lead; sizes are
checked before files are opened; a damaged file becomes a remark and the rest is shown. Weights are
not decoded.
"""

import csv
import io
import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from PIL import Image

from polyseg.errors import PolysegError
from polyseg.records import Assessment, Schedule
from polyseg.runs.checkpoints import Checkpoint, read_checkpoint
from polyseg.runs.record_files import read_assessment, read_schedule
from polyseg.system.files import TEMPORARY_PREFIX, csv_rows
from polyseg.system.yaml import parse_yaml

MOST_PICTURES, MOST_ASSESSMENTS, MOST_EPOCHS = 40, 1000, 100_000
LARGEST_PICTURE = 3 * 2**20
"""Largest size of a PNG file, in bytes."""

_LARGEST_TEXT, _LARGEST_ARRAYS, _LARGEST_CHECKPOINT = 2**25, 2**30, 2**32
_MOST_PIXELS, _MOST_LABELS, _MOST_COLUMNS = 2**25, 32, 200

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationFiles:
    """The content of an evaluation's folder; missing or unreadable parts are empty."""

    name: str
    compares: bool = False
    """Whether it is a separate evaluation, not the test in a run's folder, shown with the run."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Content of summary.json, unchecked."""
    per_image: Sequence[Sequence[str]] = ()
    """Rows of per_image.csv, the head first, all of equal length."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """PNG files by their path."""
    remarks: Sequence[str] = ()
    """Sentences on files that were unreadable or left out."""


@dataclass(frozen=True)
class RunFiles:
    """The content of a run's folder; missing or unreadable parts are empty."""

    name: str
    config_text: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of config.yaml by dotted key."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, float]] = ()
    """A row for each epoch, with its `epoch`."""
    assessments: Sequence[Assessment] = ()
    """Assessments in order of epochs, without maps."""
    schedule: Schedule | None = None
    evaluation: EvaluationFiles = EvaluationFiles("")
    """The test in the run's folder; its remarks are among the run's."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """PNG files of figures/ by their path in the run."""
    remarks: Sequence[str] = ()
    """Sentences on files that were missing, unreadable or left out."""


def read_run(path: Path, name: str) -> RunFiles:
    """Read the files of a run, which the report calls `name`.

    A folder without config.yaml and history.csv raises PolysegError.
    """
    if not any((path / one).is_file() for one in ("config.yaml", "history.csv")):
        evaluation = (path / "summary.json").is_file()
        hint = "; give an evaluation by --evaluation" if evaluation else ""
        raise PolysegError(f"{path}: is not a run (no config.yaml or history.csv in it){hint}")
    folder = _Folder(path)
    config_text = folder.read("config.yaml", _text, "")
    # A run's checkpoint names the hashes of its HDF5 files.
    checkpoint = folder.read("checkpoints/last.safetensors", _checkpoint, None)
    if not folder.names("checkpoints", ".safetensors"):
        folder.remarks.append(
            "checkpoints/ has no checkpoint: the network cannot be evaluated again, and the files "
            "of assessments and epsilons are shown unchecked"
        )
    return RunFiles(
        name=name,
        config_text=config_text,
        settings=folder.read("config.yaml", _settings, {}) if config_text else {},
        environment=folder.read("environment.json", _mapping, {}),
        history=folder.read("history.csv", _history, []),
        assessments=_assessments(folder, checkpoint),
        schedule=(
            folder.read("schedule.h5", _schedule, None)
            if checkpoint is None
            else checkpoint.schedule
        ),
        evaluation=_evaluation(folder, name, "evaluation"),
        pictures=_pictures(folder, "figures"),
        remarks=[f"{name}: {remark}" for remark in folder.remarks],
    )


def read_evaluation(path: Path, name: str) -> EvaluationFiles:
    """Read the folder of an evaluation, which the report calls `name`.

    A folder without summary.json raises PolysegError.
    """
    if not (path / "summary.json").is_file():
        raise PolysegError(
            f"--evaluation {path}: is not a folder of `polyseg evaluate` (no summary.json in it)"
        )
    folder = _Folder(path)
    found = _evaluation(folder, name, "")
    remarks = [f"{name}: {remark}" for remark in folder.remarks]
    return replace(found, compares=True, remarks=remarks)


def sources_of(path: Path) -> list[str]:
    """Return the runs that a summary.json compares, relative to its folder, if it names them.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or no JSON object.
    """
    found = _mapping(path).get("sources")
    return [str(one) for one in found] if isinstance(found, list) else []


class _Folder:
    """A folder whose files are read by name, and remarks on those that are unreadable."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.remarks: list[str] = []

    def read(self, name: str, reader: Callable[[Path], T], missing: T) -> T:
        """Return the result of `reader`, or else `missing`, with a remark if the file exists."""
        path = self.path / name
        try:
            if not path.exists() and not path.is_symlink():
                return missing
            if not path.resolve().is_relative_to(self.path):
                raise ValueError("is a link that leads out of the folder")
            if not path.is_file() and not path.is_dir():
                raise ValueError("is not a file")
            return reader(path)
        except MemoryError:
            reason = "does not fit into memory"
        except (
            *(OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError),
            *(RuntimeError, SyntaxError, EOFError, csv.Error, PolysegError),
        ) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        # A page should not disclose the path of the folder.
        reason = " ".join(reason.replace(f"{path}: ", "").split())[:200]
        self.remarks.append(f"{name} could not be read: {reason}")
        return missing

    def names(self, folder: str, suffix: str) -> list[str]:
        """Return the paths of the files in a sub-folder, short names first."""

        def listed(path: Path) -> list[str]:
            return [
                str(PurePosixPath(folder, one.name))
                for one in path.iterdir()
                if one.suffix == suffix and not one.name.startswith(TEMPORARY_PREFIX)
            ]

        found: list[str] = self.read(folder, listed, [])
        return sorted(found, key=lambda one: (len(one), one))

    def first(self, names: Sequence[str], most: int, what: str) -> list[str]:
        """Return at most `most` names, with a remark on the others."""
        if len(names) > most:
            self.remarks.append(f"{len(names) - most:,} of {len(names):,} {what} are left out")
        return list(names[:most])


def _assessments(folder: _Folder, checkpoint: Checkpoint | None) -> list[Assessment]:
    hashes = {} if checkpoint is None else checkpoint.assessments
    found = [
        name
        for name in folder.names("uncertainty", ".h5")
        if checkpoint is None or PurePosixPath(name).name in hashes
    ]
    names = folder.first(found, MOST_ASSESSMENTS, "assessments")
    read = (
        folder.read(name, partial(_assessment, hashes.get(PurePosixPath(name).name)), None)
        for name in names
    )
    by_epoch = {one.epoch: one for one in read if one is not None}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _evaluation(folder: _Folder, name: str, place: str) -> EvaluationFiles:
    inside = PurePosixPath(place)
    return EvaluationFiles(
        name,
        summary=folder.read(str(inside / "summary.json"), _mapping, {}),
        per_image=folder.read(str(inside / "per_image.csv"), _table, []),
        pictures=_pictures(folder, place),
    )


def _pictures(folder: _Folder, place: str) -> dict[str, bytes]:
    names = folder.first(folder.names(place, ".png"), MOST_PICTURES, "figures")
    read = {name: folder.read(name, _png, b"") for name in names}
    return {name: data for name, data in read.items() if data}


def _checked_size(path: Path, most: int) -> Path:
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"has {size:,} bytes, over {most:,}, and is left out")
    return path


def _text(path: Path) -> str:
    return _checked_size(path, _LARGEST_TEXT).read_text(encoding="utf-8")


def _mapping(path: Path) -> dict[str, Any]:
    found = json.loads(_text(path))
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found


def _settings(path: Path) -> dict[str, Any]:
    tree = parse_yaml(_text(path), path.name)
    if not isinstance(tree, dict):
        raise ValueError("is not a mapping of settings")
    return _flat(tree)


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _table(path: Path) -> list[list[str]]:
    rows = csv_rows(_text(path))
    if any(len(row) != len(rows[0]) for row in rows) or (rows and len(rows[0]) > _MOST_COLUMNS):
        raise ValueError("has rows of different lengths, or too many columns")
    return rows


def _history(path: Path) -> list[dict[str, float]]:
    head, *rows = _table(path) or [[]]
    if "epoch" not in head or len(rows) > MOST_EPOCHS:
        raise ValueError("has no column epoch, or too many epochs")
    history = [dict(zip(head, map(float, row), strict=True)) for row in rows]
    for row in history:
        _check_epoch(row["epoch"])
    return history


def _checkpoint(path: Path) -> Checkpoint:
    checkpoint = read_checkpoint(_checked_size(path, _LARGEST_CHECKPOINT), with_weights=False)
    _check_labels(checkpoint.config.data.labels)
    return checkpoint


def _assessment(sha256: str | None, path: Path) -> Assessment:
    assessment = read_assessment(_checked_size(path, _LARGEST_ARRAYS), sha256=sha256)
    _check_epoch(assessment.epoch)
    _check_labels(assessment.label_names)
    return assessment


def _schedule(path: Path) -> Schedule:
    schedule = read_schedule(_checked_size(path, _LARGEST_ARRAYS))
    for epoch in schedule.epochs:
        _check_epoch(epoch)
    _check_labels(dict.fromkeys(schedule.labels or [""]))
    return schedule


def _check_epoch(epoch: float) -> None:
    if not 0 <= epoch <= MOST_EPOCHS:
        raise ValueError(f"has an epoch {epoch}")


def _check_labels(labels: Collection[str]) -> None:
    if len(labels) > _MOST_LABELS:
        raise ValueError(f"has {len(labels)} labels, over {_MOST_LABELS}")


def _png(path: Path) -> bytes:
    """Return the bytes of a PNG file of a size that browsers accept."""
    data = _checked_size(path, LARGEST_PICTURE).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"has {image.width} x {image.height} pixels and is left out")
            image.verify()
    return data

"""A run's folder: who may write it, its checkpoints, its history, what it was made with.

An epoch is committed by the renaming of `checkpoints/last.safetensors`, which comes after all that
it relies on. Checkpoints hold tensors and a JSON header; nothing in them can run.
"""

import contextlib
import csv
import io
import json
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from polyseg import __version__
from polyseg.config import Config, build_config
from polyseg.data.preprocessing import Levels, levels_from
from polyseg.data.splits import PARTS, Split, refuse_overlap
from polyseg.errors import PolysegError
from polyseg.files import TEMPORARY_PREFIX, atomic_path, exclusive_lock, read_text, write_text
from polyseg.networks import SegmentationNetwork, Window, build_network

QUANTILES = (5, 25, 50, 75, 95)
"""Percentiles of epsilon in the history."""

MOST_CHANNELS = 64

_KIND = "polyseg checkpoint"
_SCHEMA = 1
HISTORY_COLUMNS = (
    "epoch",
    "learning_rate",
    "train_loss",
    *(f"epsilon_q{quantile:02d}" for quantile in QUANTILES),
    "wrong_sign_images",
    "validation_loss",
    "validation_dice",
    "validation_iou",
    "assessed",
    "seconds_train",
    "seconds_validation",
    "seconds_assessment",
)
_RECORDED_VERSIONS = (
    "torch",
    "numpy",
    "monai",
    "scipy",
    "h5py",
    "safetensors",
    "pillow",
    "tifffile",
)


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and what is known of them."""

    config: Config
    channels: int
    """Of the images that the network takes."""
    epoch: int
    """Epochs completed."""
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    """The optimizer's tensors by "index/name"; empty where training cannot go on from here."""
    best_epoch: int = 0
    best_dice: float = -1.0
    assessments: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the assessment files written so far, by file name."""
    replay: str = ""
    """sha256 of the schedule that the run replays; empty where it makes its own."""
    levels: Levels | None = None
    """Gray levels of the training images, where images do not go by their own."""

    def build(self, *, trust: bool = False) -> SegmentationNetwork:
        """Return the network with these weights.

        Raises:
            PolysegError: the network is somebody's own code and `trust` does not allow it, or the
                weights do not fit it.
        """
        name = self.config.network.name
        if ":" in name and not trust:
            raise PolysegError(
                f"checkpoint: its network {name} is code outside polyseg; --trust imports and runs "
                "it, if you know where it is from"
            )
        if ":" not in name:
            # Settings may ask for any size: theirs must be that of the weights before one is made.
            with torch.device("meta"):
                _refuse_misfits(new_network(self.config, self.channels), self.weights)
        network = new_network(self.config, self.channels)
        fit_weights(network, self.weights)
        return network


class RunDirectory:
    """The paths of a run's folder, and the writing of what is written every epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "checkpoints" / "last.safetensors"
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

    @contextlib.contextmanager
    def writing(self, *, resume: bool) -> Iterator[None]:
        """Hold the folder for writing; a new run wants it empty.

        Raises:
            PolysegError: the folder is in use, or is not empty.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PolysegError(f"{self.path}: cannot be made: {error.strerror}") from error
        with exclusive_lock(self.path / ".lock", owner=str(self.path)):
            if not resume:
                self.refuse_occupied()
            yield

    def refuse_occupied(self) -> None:
        """Raise if there is something in the folder, which a new run would write over.

        Checkpoints want names that are text, which is said before anything is trained.

        Raises:
            PolysegError: there is.
        """
        if not str(self.path).isprintable():
            raise PolysegError(f"{str(self.path)!r}: is no text; choose another --out")
        if self.path.is_dir() and any(entry.name != ".lock" for entry in self.path.iterdir()):
            raise PolysegError(
                f"{self.path}: is not empty; --resume continues a run, another --out starts one"
            )

    def checkpoint_to_resume(self) -> Checkpoint:
        """Read the last checkpoint.

        Raises:
            PolysegError: there is none, or it is damaged.
        """
        if not self.last.is_file():
            raise PolysegError(
                f"{self.path}: holds no run to resume (no {self.last.relative_to(self.path)}); "
                "leave --resume out to start one"
            )
        return read_checkpoint(self.last)

    def assessment(self, epoch: int) -> Path:
        """Return the path of an epoch's assessment file."""
        return self.path / "uncertainty" / f"epoch_{epoch:04d}.h5"

    def begin(
        self, config: Config, split: Split, hashes: Mapping[str, str], device: torch.device
    ) -> None:
        """Write what a run is known by, before its first epoch."""
        self.write_config(config)
        write_text(self.environment, json.dumps(environment(device), indent=2) + "\n")
        write_text(self.split, split_json(split, hashes))

    def changes_of_environment(self, device: torch.device) -> list[str]:
        """Return what is no longer as it was when the run began, and may move its last digits."""
        try:
            recorded = json.loads(read_text(self.environment))
            return [
                f"{name} {recorded.get(name)} -> {now}"
                for name, now in environment(device).items()
                if name not in ("command", "started") and recorded.get(name) != now
            ]
        except (OSError, ValueError, AttributeError, RecursionError):
            return [f"{self.environment} cannot be read"]

    def remove_leftovers(self, assessments: Mapping[str, str]) -> None:
        """Remove what a run that was killed has left behind: assessments and torn files."""
        for path in (self.path / "uncertainty").glob("*.h5"):
            if path.name not in assessments:
                path.unlink()
        for path in self.path.rglob(f"{TEMPORARY_PREFIX}*"):
            path.unlink()

    def write_config(self, config: Config) -> None:
        """Write config.yaml; a resumed run may have been given more epochs."""
        write_text(self.config, config.to_yaml())

    def read_split(self) -> tuple[Split, dict[str, str]]:
        """Return the ids by part, and the hashes of the images by id.

        Raises:
            PolysegError: split.json is missing or not what a run writes.
        """
        try:
            record = json.loads(read_text(self.split))
            split = {part: [str(row["id"]) for row in record[part]] for part in PARTS}
            rows = [row for part in PARTS for row in record[part]]
            if not split["train"] or not all(str(row["id"]).isprintable() for row in rows):
                raise ValueError("it names no training images, or what is no name")
            refuse_overlap(split, str(self.split))
            return split, {str(row["id"]): str(row["sha256"]) for row in rows}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise PolysegError(f"{self.split}: cannot be read: {error}") from None

    def write_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write history.csv, a row an epoch."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=HISTORY_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.9g}" for key, value in row.items()} for row in rows)
        write_text(self.history, text.getvalue())

    def read_history(self, up_to: int) -> list[dict[str, float]]:
        """Return the rows of the epochs up to and with `up_to`, of which none may be missing.

        Raises:
            PolysegError: history.csv is damaged.
        """
        if up_to == 0:
            return []
        try:
            rows = [
                {key: float(value) for key, value in row.items()}
                for row in csv.DictReader(io.StringIO(read_text(self.history)))
            ][:up_to]
            if any(row.keys() != set(HISTORY_COLUMNS) for row in rows):
                raise ValueError("its columns are not those that polyseg writes")
            if [row["epoch"] for row in rows] != list(range(1, up_to + 1)):
                raise ValueError(f"it lacks some of the epochs 1 to {up_to}")
            return rows
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise PolysegError(f"{self.history}: cannot be read: {error}") from None


def split_json(split: Split, hashes: Mapping[str, str]) -> str:
    """Return a split as a run keeps it: ids by part, with the sha256 of their pixels.

    >>> json.loads(split_json({"train": ["a"]}, {"a": "00"}))
    {'train': [{'id': 'a', 'sha256': '00'}]}
    """
    record = {
        part: [{"id": identity, "sha256": hashes.get(identity, "")} for identity in ids]
        for part, ids in split.items()
    }
    return json.dumps(record, indent=1) + "\n"


def new_run_path() -> Path:
    """Return a name for a run that gives none: runs/ and the time."""
    return Path("runs") / time.strftime("%Y%m%d-%H%M%S")


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint file that a path stands for: itself, or a run's best one.

    Raises:
        PolysegError: there is none.
    """
    if path.is_file():
        return path
    run = RunDirectory(path)
    for candidate in (run.best, run.last):
        if candidate.is_file():
            return candidate
    raise PolysegError(
        f"{path}: is neither a checkpoint nor a run (no checkpoints/best.safetensors)"
    )


def new_network(config: Config, channels: int) -> SegmentationNetwork:
    """Build the network of a configuration, with weights from torch's global generator."""
    settings = config.network
    network = build_network(
        settings.name,
        in_channels=channels,
        out_channels=len(config.data.labels),
        dropout=settings.dropout,
        dropout_kind=settings.dropout_kind,
        dropout_layers=settings.dropout_layers,
        multiple_of=settings.multiple_of,
        settings=settings.kwargs,
    )
    if config.data.fit == "tile" and config.data.size is not None:
        size = config.data.size
        square = (size, size) if isinstance(size, int) else size
        network.window = Window(square, config.data.tile_overlap)
    return network


def fit_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a network that must have them all and no others.

    Raises:
        PolysegError: names, shapes or types differ.
    """
    _refuse_misfits(network, weights)
    for name, values in weights.items():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise PolysegError(f"checkpoint: its weights {name} are not finite")
    network.load_state_dict(dict(weights))


def _refuse_misfits(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    expected = network.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys()) + [
        name
        for name, values in expected.items()
        if name in weights
        and (weights[name].shape != values.shape or weights[name].dtype != values.dtype)
    ]
    if wrong:
        raise PolysegError(
            f"checkpoint: {len(wrong)} weights do not fit its own configuration, such as {wrong[0]}"
        )


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        PolysegError: the file cannot be written.
    """
    header = {
        "kind": _KIND,
        "schema": _SCHEMA,
        "polyseg": __version__,
        "epoch": checkpoint.epoch,
        "channels": checkpoint.channels,
        "levels": None if checkpoint.levels is None else vars(checkpoint.levels),
        "best_epoch": checkpoint.best_epoch,
        "best_dice": checkpoint.best_dice,
        "assessments": dict(checkpoint.assessments),
        "replay": checkpoint.replay,
        "config": checkpoint.config.model_dump(mode="json"),
    }
    tensors = {f"weights/{name}": values for name, values in checkpoint.weights.items()}
    tensors |= {f"optimizer/{name}": values for name, values in checkpoint.optimizer.items()}
    # Copies, because two names may share one storage, which the format does not know.
    tensors = {name: values.detach().cpu().clone() for name, values in tensors.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, {"polyseg": json.dumps(header)})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        PolysegError: the file is missing, damaged, or not polyseg's.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("polyseg", "{}"))
            if not isinstance(header, dict) or header.get("kind") != _KIND:
                raise PolysegError(f"{path}: is no polyseg checkpoint")
            if header["schema"] != _SCHEMA:
                raise PolysegError(f"{path}: is from another polyseg, such as a newer; update it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_numbers(header)
        return Checkpoint(
            config=build_config(header["config"], str(path)),
            channels=int(header["channels"]),
            epoch=int(header["epoch"]),
            levels=levels_from(header.get("levels"), int(header["channels"])),
            weights=_with_prefix(tensors, "weights/"),
            optimizer=_with_prefix(tensors, "optimizer/"),
            best_epoch=int(header["best_epoch"]),
            best_dice=float(header["best_dice"]),
            assessments=_checked_names(header["assessments"]),
            replay=str(header.get("replay", "")),
        )
    except PolysegError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PolysegError(f"{path}: cannot be read as a checkpoint: {error}") from None
    except safetensors.SafetensorError as error:
        raise PolysegError(f"{path}: is damaged or no checkpoint: {error}") from None


def in_order(assessments: Iterable[str]) -> list[str]:
    """Return names of assessment files by their epoch, which may have more digits than four.

    >>> in_order(["epoch_10000.h5", "epoch_9999.h5"])
    ['epoch_9999.h5', 'epoch_10000.h5']
    """
    return sorted(assessments, key=lambda name: (len(name), name))


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the run is made with: versions, machine, command."""
    return {
        "polyseg": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _RECORDED_VERSIONS},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _check_numbers(header: Mapping[str, Any]) -> None:
    """Raise where a header has numbers that no training writes."""
    epoch, best = header["epoch"], header["best_epoch"]
    if not (isinstance(epoch, int) and isinstance(best, int) and 0 <= best <= epoch <= 100_000):
        raise ValueError(f"epoch {epoch!r:.40} and best_epoch {best!r:.40} do not fit")
    channels = header["channels"]
    if not isinstance(channels, int) or not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(f"channels {channels!r:.40}: images have 1 to {MOST_CHANNELS}")


def _checked_names(assessments: Mapping[str, Any]) -> dict[str, str]:
    """Return hashes by file name, if the names are those of files in the run's own folder."""
    for name in assessments:
        if not re.fullmatch(r"epoch_[0-9]{4,9}\.h5", name):
            raise ValueError(f"{name!r} is no name of an assessment")
    return {name: str(digest) for name, digest in assessments.items()}


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): values
        for name, values in tensors.items()
        if name.startswith(prefix)
    }

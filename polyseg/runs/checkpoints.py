"""Checkpoints: safetensors files of weights and, for resuming, the state of the training.

The header holds one JSON text, and the sha256 of that text and of all tensors against damage. The
last checkpoint of a run also holds the optimizer, the history and the schedule. Nothing in a file
can run code.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from polyseg import __version__
from polyseg.config import Config, build_config
from polyseg.data.preprocessing import Levels, levels_from
from polyseg.errors import PolysegError
from polyseg.records import Schedule
from polyseg.system.files import atomic_path
from polyseg.system.memory import refuse_beyond_memory

if TYPE_CHECKING:
    from torch import Tensor

MOST_CHANNELS = 64
"""Largest number of channels that images may have."""

_KIND = "polyseg checkpoint"
_SCHEMA = 2
_MOST_EPOCHS = 100_000
_SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
_DTYPES = {
    "BOOL": "bool",
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    **{
        f"{sign}{bits}": f"{name}int{bits}"
        for sign, name in (("I", ""), ("U", "u"))
        for bits in (8, 16, 32, 64)
    },
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
}
"""Names of safetensors' types in torch, most of which NumPy shares."""


class Stored(NamedTuple):
    """A tensor as stored in a file, with little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: Any


@dataclass(frozen=True)
class Checkpoint:
    """A network's weights and the state of its training.

    `optimizer`, `scaler`, `history`, `schedule` and `losses` are empty or None in a checkpoint of
    weights only, from which training cannot be resumed.
    """

    config: Config
    channels: int
    """Channels of the images that the network takes."""
    epoch: int
    """Number of completed epochs."""
    weights: "Mapping[str, Tensor]"
    """Tensors by name; empty where they were not read."""
    optimizer: "Mapping[str, Tensor]" = field(default_factory=dict)
    """The optimizer's tensors by "index/name"."""
    scaler: Mapping[str, float] = field(default_factory=dict)
    """State of the gradient scaler; empty without one."""
    history: Sequence[Mapping[str, float]] = ()
    """One row for each epoch."""
    schedule: Schedule | None = None
    """The epsilons of all epochs."""
    losses: NDArray[np.float64] | None = None
    """Last loss of each column of the schedule."""
    best_epoch: int = 0
    """Epoch of the best validation Dice; 0 before the first."""
    best_dice: float = -1.0
    """Best validation Dice; -1 before the first epoch, NaN without validation images."""
    assessments: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the assessment files written so far, by file name."""
    replay: str = ""
    """sha256 of the schedule that the run replays; empty without a replay."""
    split: str = ""
    """sha256 of the run's split.json; empty without one."""
    levels: Levels | None = None
    """Gray levels of the training images, if all images are normalised by them."""

    def weights_only(self) -> "Checkpoint":
        """Return the checkpoint without the fields that only resuming needs."""
        return replace(self, optimizer={}, scaler={}, history=(), schedule=None, losses=None)


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically."""
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
        "split": checkpoint.split,
        "scaler": dict(checkpoint.scaler),
        "history": list(checkpoint.history[0]) if checkpoint.history else [],
        "config": checkpoint.config.model_dump(mode="json"),
    }
    tensors = {f"weights/{name}": values for name, values in checkpoint.weights.items()}
    tensors |= {f"optimizer/{name}": values for name, values in checkpoint.optimizer.items()}
    tensors |= _record_tensors(checkpoint)
    # Clones, because names may share a storage, which safetensors refuses.
    tensors = {name: values.detach().cpu().clone().contiguous() for name, values in tensors.items()}
    text = json.dumps(header)
    stored = {name: stored_of(values) for name, values in tensors.items()}
    metadata = {"polyseg": text, "sha256": digest_of(text, stored)}
    # Not `save_file`, which writes its own temporary file.
    with atomic_path(path) as temporary:
        temporary.write_bytes(_packed(tensors, metadata))


def read_checkpoint(path: str | Path, *, with_weights: bool = True) -> Checkpoint:
    """Read a checkpoint, without weights and optimizer (and without torch) on request.

    A file that is missing, damaged, or not from polyseg raises PolysegError.
    """
    try:
        content = _content(Path(path))
        tensors = {
            name: Stored(_DTYPES[one["dtype"]], tuple(one["shape"]), one["data"])
            for name, one in safetensors.deserialize(content)  # type: ignore[no-untyped-call]
        }
        metadata = _metadata(content)
        text = metadata.get("polyseg", "{}")
        header = json.loads(text)
        _check_origin(header, str(path))
        if metadata.get("sha256") != digest_of(text, tensors):
            raise PolysegError(f"{path}: is damaged (its sha256 differs)")
        _check_numbers(header)
        config = build_config(header["config"], str(path))
        return Checkpoint(
            config=config,
            channels=int(header["channels"]),
            epoch=int(header["epoch"]),
            levels=levels_from(header.get("levels"), int(header["channels"])),
            weights=_tensors(tensors, "weights/") if with_weights else {},
            optimizer=_tensors(tensors, "optimizer/") if with_weights else {},
            best_epoch=int(header["best_epoch"]),
            best_dice=float(header["best_dice"]),
            assessments=_checked_names(header["assessments"]),
            replay=str(header["replay"]),
            split=str(header["split"]),
            scaler=_scaler(header["scaler"]),
            history=_history(header, tensors),
            schedule=_schedule(config, int(header["epoch"]), tensors),
            losses=_losses(tensors),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PolysegError(f"{path}: cannot be read as a checkpoint: {error}") from None
    except safetensors.SafetensorError as error:
        raise PolysegError(f"{path}: is damaged or not a checkpoint: {error}") from None


def _check_origin(header: Any, path: str) -> None:
    if not isinstance(header, dict) or header.get("kind") != _KIND:
        raise PolysegError(f"{path}: is not a polyseg checkpoint")
    if header["schema"] != _SCHEMA:
        raise PolysegError(
            f"{path}: has schema {header['schema']!r:.40}, this polyseg reads {_SCHEMA}; use the "
            "polyseg that wrote it"
        )


def _content(path: Path) -> bytes:
    """Return the bytes of a file in one read, since it may be replaced at any time."""
    if path.exists() and not path.is_file():
        raise OSError("is not a file")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        # Twice the size, for the bytes and for the tensors that are made from them.
        refuse_beyond_memory(2 * size, f"{path}: its {size:,} bytes", "use a larger machine")
        return stream.read(size)


def _metadata(content: bytes) -> dict[str, str]:
    """Return the texts in the header of a valid safetensors file."""
    length = int.from_bytes(content[:8], "little")
    found = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return {str(name): str(text) for name, text in found.items()}


def stored_of(tensor: "Tensor") -> Stored:
    """Return a tensor as stored in a file, without copying the values."""
    import torch

    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return Stored(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)


def digest_of(text: str, tensors: Mapping[str, Stored]) -> str:
    """Return the sha256 of a header and of the names, types, shapes and values of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, (dtype, shape, data) in sorted(tensors.items()):
        digest.update(f"\n{name} torch.{dtype} {shape}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def _array(stored: Stored) -> NDArray[Any]:
    values: NDArray[Any] = np.frombuffer(stored.data, stored.dtype).reshape(stored.shape)
    return values


def _tensors(tensors: Mapping[str, Stored], prefix: str) -> "dict[str, Tensor]":
    """Return the tensors with a prefix, by the rest of their names."""
    import torch

    found = {}
    for name, (dtype, shape, data) in tensors.items():
        if name.startswith(prefix):
            kind = getattr(torch, dtype)
            empty = 0 in shape  # torch refuses an empty buffer.
            flat = torch.empty(0, dtype=kind) if empty else torch.frombuffer(data, dtype=kind)
            found[name.removeprefix(prefix)] = flat.reshape(shape)
    return found


def _packed(tensors: "Mapping[str, Tensor]", metadata: dict[str, str]) -> bytes:
    import safetensors.torch
    import torch

    if any(values.dtype == torch.bfloat16 for values in tensors.values()):
        return safetensors.torch.save(dict(tensors), metadata)
    # The library leaks some memory for each tensor that it saves, but none for arrays.
    return safetensors.numpy.save({name: one.numpy() for name, one in tensors.items()}, metadata)


def _record_tensors(checkpoint: Checkpoint) -> "dict[str, Tensor]":
    """Return the history and the schedule of a checkpoint as tensors."""
    import torch

    arrays: dict[str, NDArray[Any] | None] = {}
    if checkpoint.history:
        rows = [list(row.values()) for row in checkpoint.history]
        arrays["history"] = np.array(rows, np.float64)
    if (schedule := checkpoint.schedule) is not None:
        ids = bytearray("\n".join(dict.fromkeys(schedule.ids)).encode())
        arrays |= {"schedule/ids": np.frombuffer(ids, np.uint8), "losses": checkpoint.losses}
        for name in ("epsilon", "assessed", "group", "statistics"):
            arrays[f"schedule/{name}"] = getattr(schedule, name)
    return {name: torch.from_numpy(one) for name, one in arrays.items() if one is not None}


def _losses(tensors: Mapping[str, Stored]) -> NDArray[np.float64] | None:
    if "losses" not in tensors or "schedule/epsilon" not in tensors:
        return None
    losses = tensors["losses"]
    if losses.shape != tensors["schedule/epsilon"].shape[1:] or losses.dtype != "float64":
        raise ValueError("its losses do not match its images")
    return _array(losses)


def _scaler(found: Mapping[str, Any]) -> dict[str, float]:
    if not found:
        return {}
    plain = found.keys() == _SCALER_KEYS and all(
        type(value) in (int, float) and 0 <= value < 2**127 for value in found.values()
    )
    grows = plain and found["growth_factor"] > 1 > found["backoff_factor"] > 0
    if not (grows and found["scale"] > 0 and found["growth_interval"] >= 1):
        raise ValueError("its state of the gradient scaler is invalid")
    return dict(found)


def _history(header: Mapping[str, Any], tensors: Mapping[str, Stored]) -> list[dict[str, float]]:
    if "history" not in tensors:
        return []
    values, columns = tensors["history"], [str(name) for name in header["history"]]
    if values.shape != (header["epoch"], len(columns)) or values.dtype != "float64":
        raise ValueError("its history does not match its epochs")
    return [dict(zip(columns, row, strict=True)) for row in _array(values).tolist()]


def _schedule(config: Config, epochs: int, tensors: Mapping[str, Stored]) -> Schedule | None:
    if "schedule/epsilon" not in tensors:
        return None
    labels = config.data.labels
    images = _array(tensors["schedule/ids"]).tobytes().decode().split("\n")
    epsilon, assessed = tensors["schedule/epsilon"], tensors["schedule/assessed"]
    wanted = (epochs, len(images) * len(labels))
    if epsilon.shape != wanted or epsilon.dtype != "float32":
        raise ValueError("its schedule does not match its epochs and images")
    if assessed.shape != (epochs,) or assessed.dtype != "int64":
        raise ValueError("its schedule lacks its assessments")
    if len(set(images)) < len(images) or not all(name.isprintable() for name in images):
        raise ValueError("its schedule has repeated or unprintable names")
    ids, names = columns_of(images, labels)
    numbers = np.arange(1, epochs + 1)
    # Version 0.1 wrote neither of these.
    group, statistics = (
        _array(tensors[name]) if name in tensors else None
        for name in ("schedule/group", "schedule/statistics")
    )
    if statistics is not None and not np.isfinite(statistics).all():
        raise ValueError("its schedule has statistics that are not finite")
    return Schedule(ids, numbers, _array(epsilon), names, _array(assessed), group, statistics)


def columns_of(images: Sequence[str], labels: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Return the ids, and the labels if there are several, of the columns of a schedule.

    >>> columns_of(["a", "b"], ["x", "y"])
    (['a', 'a', 'b', 'b'], ['x', 'y', 'x', 'y'])
    """
    if len(labels) == 1:
        return list(images), None
    return [image for image in images for _ in labels], [*labels] * len(images)


def _check_numbers(header: Mapping[str, Any]) -> None:
    """Raise if the header has numbers that no training writes."""
    epoch, best = header["epoch"], header["best_epoch"]
    whole = isinstance(epoch, int) and isinstance(best, int)
    if not (whole and 0 <= best <= epoch <= _MOST_EPOCHS):
        raise ValueError(f"epoch {epoch!r:.40} and best_epoch {best!r:.40} are inconsistent")
    channels = header["channels"]
    if not isinstance(channels, int) or not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(f"channels is {channels!r:.40}; images have 1 to {MOST_CHANNELS}")


def _checked_names(assessments: Mapping[str, Any]) -> dict[str, str]:
    """Return hashes by file name, if each is the name of an assessment in the run's folder."""
    for name in assessments:
        if not re.fullmatch(r"epoch_[0-9]{4,9}\.h5", name):
            raise ValueError(f"{name!r} is not the name of an assessment file")
    return {name: str(digest) for name, digest in assessments.items()}

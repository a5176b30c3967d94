"""Checkpoints: weights and what is known of them, in files of tensors in which nothing can run.

A file is a safetensors file. Its header holds one JSON text, and the sha256 of that text and of all
tensors, so that damage is never read as something else. The last checkpoint of a run also holds
what training goes on from: the optimizer, the history and the schedule so far.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseg import __version__
from polyseg.config import Config, build_config
from polyseg.data.preprocessing import Levels, levels_from
from polyseg.errors import PolysegError
from polyseg.networks.networks_by_name import SegmentationNetwork, Window, build_network
from polyseg.records import Schedule
from polyseg.system.files import atomic_path
from polyseg.system.memory import refuse_beyond_memory

MOST_CHANNELS = 64

_KIND = "polyseg checkpoint"
_SCHEMA = 2
_MOST_EPOCHS = 100_000
_OF_A_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


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
    scaler: Mapping[str, float] = field(default_factory=dict)
    """How gradients are scaled; empty where they are not."""
    history: Sequence[Mapping[str, float]] = ()
    """A row an epoch; empty where training cannot go on from here."""
    schedule: Schedule | None = None
    """The epsilons of all epochs; None where training cannot go on from here."""
    losses: NDArray[np.float64] | None = None
    """Of the columns of the schedule, each image's last one; None where there is no schedule."""
    best_epoch: int = 0
    best_dice: float = -1.0
    assessments: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the assessment files written so far, by file name."""
    replay: str = ""
    """sha256 of the schedule that the run replays; empty where it makes its own."""
    split: str = ""
    """sha256 of the run's split.json; empty where it has none."""
    levels: Levels | None = None
    """Gray levels of the training images, where images do not go by their own."""

    def weights_only(self) -> "Checkpoint":
        """Return the same without what training goes on from."""
        return replace(self, optimizer={}, scaler={}, history=(), schedule=None, losses=None)

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


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
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
        "split": checkpoint.split,
        "scaler": dict(checkpoint.scaler),
        "history": list(checkpoint.history[0]) if checkpoint.history else [],
        "config": checkpoint.config.model_dump(mode="json"),
    }
    tensors = {f"weights/{name}": values for name, values in checkpoint.weights.items()}
    tensors |= {f"optimizer/{name}": values for name, values in checkpoint.optimizer.items()}
    tensors |= _record_tensors(checkpoint)
    # Copies, because two names may share one storage, which the format does not know.
    tensors = {name: values.detach().cpu().clone() for name, values in tensors.items()}
    text = json.dumps(header)
    metadata = {"polyseg": text, "sha256": _digest(text, tensors)}
    # Not by the library, which would write to a temporary file of its own first.
    with atomic_path(path) as temporary:
        temporary.write_bytes(_packed(tensors, metadata))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        PolysegError: the file is missing, damaged, or not polyseg's.
    """
    try:
        content = _content(Path(path))
        tensors = safetensors.torch.load(content)
        metadata = _metadata(content)
        text = metadata.get("polyseg", "{}")
        header = json.loads(text)
        if not isinstance(header, dict) or header.get("kind") != _KIND:
            raise PolysegError(f"{path}: is no polyseg checkpoint")
        if header["schema"] != _SCHEMA:
            raise PolysegError(f"{path}: is from another polyseg, older or newer than this one")
        if metadata.get("sha256") != _digest(text, tensors):
            raise PolysegError(f"{path}: is damaged: its content is not what was written")
        _check_numbers(header)
        config = build_config(header["config"], str(path))
        return Checkpoint(
            config=config,
            channels=int(header["channels"]),
            epoch=int(header["epoch"]),
            levels=levels_from(header.get("levels"), int(header["channels"])),
            weights=_with_prefix(tensors, "weights/"),
            optimizer=_with_prefix(tensors, "optimizer/"),
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
    except PolysegError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PolysegError(f"{path}: cannot be read as a checkpoint: {error}") from None
    except safetensors.SafetensorError as error:
        raise PolysegError(f"{path}: is damaged or no checkpoint: {error}") from None


def _content(path: Path) -> bytes:
    """Return the bytes of a file, at once: the next moment its name may be that of another."""
    if path.exists() and not path.is_file():
        raise OSError("is no file")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        # Held twice for a moment, as bytes and as tensors.
        refuse_beyond_memory(2 * size, f"{path}: its {size:,} bytes", "use a larger machine")
        return stream.read(size)


def _metadata(content: bytes) -> dict[str, str]:
    """Return the texts in the header of what is known to be a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    found = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return {str(name): str(text) for name, text in found.items()}


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a header's text and of tensors: names, types, shapes and values."""
    digest = hashlib.sha256(text.encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"\n{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(_bytes(values).data)
    return digest.hexdigest()


def _bytes(values: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor, which it shares."""
    bytes_of: NDArray[np.uint8] = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    return bytes_of


def _packed(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a safetensors file."""
    plain = {name: values.contiguous() for name, values in tensors.items()}
    if any(values.dtype == torch.bfloat16 for values in plain.values()):
        return safetensors.torch.save(plain, metadata)
    # From tensors the library keeps some memory of each, commit by commit; from arrays it does not.
    return safetensors.numpy.save({name: one.numpy() for name, one in plain.items()}, metadata)


def _record_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return history and schedule as tensors, where a checkpoint has them."""
    tensors = {}
    if checkpoint.history:
        rows = [list(row.values()) for row in checkpoint.history]
        tensors["history"] = torch.tensor(rows, dtype=torch.float64)
    schedule = checkpoint.schedule
    if schedule is not None:
        ids = "\n".join(dict.fromkeys(schedule.ids)).encode()
        tensors["schedule/ids"] = torch.frombuffer(bytearray(ids), dtype=torch.uint8)
        if checkpoint.losses is not None:
            tensors["losses"] = torch.from_numpy(checkpoint.losses)
        tensors["schedule/epsilon"] = torch.from_numpy(schedule.epsilon)
        if schedule.assessed is not None:
            tensors["schedule/assessed"] = torch.from_numpy(schedule.assessed)
        if schedule.group is not None and schedule.statistics is not None:
            tensors["schedule/group"] = torch.from_numpy(schedule.group)
            tensors["schedule/statistics"] = torch.from_numpy(schedule.statistics)
    return tensors


def _losses(tensors: Mapping[str, Tensor]) -> NDArray[np.float64] | None:
    if "losses" not in tensors or "schedule/epsilon" not in tensors:
        return None
    losses = tensors["losses"]
    if losses.shape != tensors["schedule/epsilon"].shape[1:] or losses.dtype != torch.float64:
        raise ValueError("its losses are not those of its images")
    values: NDArray[np.float64] = losses.numpy()
    return values


def _scaler(found: Mapping[str, Any]) -> dict[str, float]:
    numbers = {str(name): value for name, value in found.items()}
    if not numbers:
        return {}
    plain = numbers.keys() == _OF_A_SCALER and all(
        type(value) in (int, float) and 0 <= value < 2**127 for value in numbers.values()
    )
    grows = plain and numbers["growth_factor"] > 1 > numbers["backoff_factor"] > 0
    if not (grows and numbers["scale"] > 0 and numbers["growth_interval"] >= 1):
        raise ValueError("its scale of gradients is none")
    return numbers


def _history(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[dict[str, float]]:
    if "history" not in tensors:
        return []
    values, columns = tensors["history"], [str(name) for name in header["history"]]
    if values.shape != (header["epoch"], len(columns)) or values.dtype != torch.float64:
        raise ValueError("its history is not of its epochs")
    return [dict(zip(columns, row, strict=True)) for row in values.tolist()]


def _schedule(config: Config, epochs: int, tensors: Mapping[str, Tensor]) -> Schedule | None:
    if "schedule/epsilon" not in tensors:
        return None
    labels = config.data.labels
    images = tensors["schedule/ids"].numpy().tobytes().decode().split("\n")
    epsilon, assessed = tensors["schedule/epsilon"], tensors["schedule/assessed"]
    wanted = (epochs, len(images) * len(labels))
    if epsilon.shape != wanted or epsilon.dtype != torch.float32:
        raise ValueError("its schedule is not of its epochs and images")
    if assessed.shape != (epochs,) or assessed.dtype != torch.int64:
        raise ValueError("its schedule does not tell its assessments")
    if len(set(images)) < len(images) or not all(name.isprintable() for name in images):
        raise ValueError("its schedule holds what is no name")
    ids, names = columns_of(images, labels)
    numbers = np.arange(1, epochs + 1)
    # Which checkpoints of version 0.1 do not have.
    group, statistics = (
        tensors[name].numpy() if name in tensors else None
        for name in ("schedule/group", "schedule/statistics")
    )
    if statistics is not None and not np.isfinite(statistics).all():
        raise ValueError("its schedule has statistics that are not finite")
    return Schedule(ids, numbers, epsilon.numpy(), names, assessed.numpy(), group, statistics)


def columns_of(images: Sequence[str], labels: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Return ids, and labels where there are several, of the columns of a schedule.

    >>> columns_of(["a", "b"], ["x", "y"])
    (['a', 'a', 'b', 'b'], ['x', 'y', 'x', 'y'])
    """
    if len(labels) == 1:
        return list(images), None
    return [image for image in images for _ in labels], [*labels] * len(images)


def _check_numbers(header: Mapping[str, Any]) -> None:
    """Raise where a header has numbers that no training writes."""
    epoch, best = header["epoch"], header["best_epoch"]
    if not (
        isinstance(epoch, int) and isinstance(best, int) and 0 <= best <= epoch <= _MOST_EPOCHS
    ):
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

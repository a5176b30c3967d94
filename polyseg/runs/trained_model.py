"""Trained networks from checkpoints, and the images to use them on."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyseg.choices import score_of
from polyseg.config import Config, DataConfig, UncertaintyConfig
from polyseg.data.dataset import ImageSet
from polyseg.data.loading import load_images, load_others
from polyseg.data.splits import PARTS, Split, split_by_settings
from polyseg.errors import PolysegError
from polyseg.networks.inference import choose_device
from polyseg.networks.segmentation_network import SegmentationNetwork
from polyseg.records import Progress, no_progress
from polyseg.runs.checkpoints import Checkpoint, read_checkpoint
from polyseg.runs.run_folder import RunDirectory, find_checkpoint
from polyseg.runs.weights import network_of
from polyseg.system.memory import keep_freed_memory

log = logging.getLogger(__name__)

_SHOWN = 5

Load = Callable[[DataConfig, Progress], ImageSet]
"""Function that returns the images for some settings."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint and its origin."""

    source: Path
    run: RunDirectory | None
    """The run's folder; None for a checkpoint file outside of one."""
    checkpoint: Checkpoint

    @property
    def config(self) -> Config:
        """The settings of the training."""
        return self.checkpoint.config

    def weights_only(self) -> "Trained":
        """Return a copy without the state that only resuming needs."""
        return dataclasses.replace(self, checkpoint=self.checkpoint.weights_only())

    def build(self, device: str, *, trust: bool) -> "Model":
        """Build the network on a device; a network of code outside polyseg needs `trust`."""
        network = network_of(self.checkpoint, trust=trust).to(choose_device(device))
        return Model(self.source, self.run, self.checkpoint, network)


@dataclass(frozen=True)
class Model(Trained):
    """A trained network and its origin."""

    network: SegmentationNetwork


@dataclass(frozen=True)
class Inputs:
    """The images that a trained network is used on, and how it is opened."""

    data: str | Path | None = None
    """Folder of images other than the run's own."""
    part: str | None = None
    """Part of the run's own images, one of `PARTS` or "all"; None for the command's default."""
    cache: str | Path | None = None
    """Folder for decoded images that do not fit into memory."""
    device: str = "auto"
    trust: bool = False
    """Whether code outside polyseg that a checkpoint names may run."""


def open_model(source: str | Path, device: str, trust: bool) -> Model:
    """Return the network of a checkpoint file, or of a run's best checkpoint.

    A missing or damaged file, and a network that needs `trust`, raise PolysegError.
    """
    return read_trained(source).build(device, trust=trust)


def read_trained(source: str | Path) -> Trained:
    """Read a checkpoint file, or a run's best checkpoint, without building the network."""
    keep_freed_memory()
    path = find_checkpoint(source)
    checkpoint = read_checkpoint(path)
    # The folder of decoded images depends on the machine, not on the checkpoint.
    data = checkpoint.config.data.model_copy(
        update={name: DataConfig.model_fields[name].default for name in ("memory", "cache")}
    )
    config = checkpoint.config.model_copy(update={"data": data})
    checkpoint = dataclasses.replace(checkpoint, config=config)
    run = RunDirectory(path.parent.parent)
    return Trained(Path(source), run if run.split.is_file() else None, checkpoint)


class LastImages:
    """A loader that keeps the last set of images for the next run on the same data."""

    def __init__(self, cache: str | Path | None = None) -> None:
        self.cache = {} if cache is None else {"cache": str(cache)}
        self.key: str | None = None
        self.images: ImageSet | None = None

    def __call__(self, config: DataConfig, progress: Progress) -> ImageSet:
        """Return the images for some settings."""
        config = config.model_copy(update=self.cache)
        # The images do not depend on the split.
        key = config.model_copy(update={"fold": None, "split_file": None}).model_dump_json()
        if self.images is None or key != self.key:
            self.images = None  # Frees the memory before the next set is read.
            self.images, self.key = load_images(config, progress), key
        return self.images


def images_for(
    model: Model,
    inputs: Inputs,
    default: str,
    progress: Progress = no_progress,
    load: Load = load_images,
) -> tuple[ImageSet, list[str]]:
    """Return images and the ids to use: a part of the run's own data, or all of another folder.

    The model's own data, read by `load`, are used if `inputs` name no folder or the same one, and
    `default` is the part if they name none. An unknown or empty part, or invalid data, raise
    PolysegError.
    """
    part = inputs.part
    if part not in (None, "all", *PARTS):
        raise PolysegError(f"--split {part}: choose {', '.join(PARTS)} or all")
    data = None if inputs.data is None else Path(inputs.data)
    config = model.config.data
    if inputs.cache is not None:
        config = config.model_copy(update={"cache": str(inputs.cache)})
    demo = config.path == "demo"
    if data is not None and (demo or data.resolve() != Path(config.path).resolve()):
        # Another folder has the run's split only if it replaces a missing folder.
        if part not in (None, "all") and not is_gone(config):
            raise _not_trained_on(model, data, part)
        images = load_others(data, config, model.checkpoint.channels, progress)
        return _images_of_folder(model, images, data, part, default)
    part = part or default
    refuse_gone(config, model.source)
    images = load(config, progress)
    if model.run is None:
        split = _split_of_file(model, images, part)
    else:
        split = split_of_run(model.run, images, model.checkpoint.split)
    images = dataclasses.replace(images, levels=model.checkpoint.levels)
    return images, part_of(split, part, images, model)


def _images_of_folder(
    model: Model, images: ImageSet, data: Path, part: str | None, default: str
) -> tuple[ImageSet, list[str]]:
    images = dataclasses.replace(images, levels=model.checkpoint.levels)
    split = None if part == "all" else moved_split(model, images)
    if split is not None:
        known = model.config.data.path
        log.info("%s: reading its images from %s instead of %s", model.source, data, known)
        return images, part_of(split, part or default, images, model)
    if part not in (None, "all"):
        raise _not_trained_on(model, data, part)
    _warn_of_known_images(model, images)
    return images, images.ids


def part_of(split: Split, part: str, images: ImageSet, model: Model) -> list[str]:
    """Return the ids of a part of a split, or of all images."""
    ids = images.ids if part == "all" else split[part]
    if not ids:
        raise PolysegError(f"--split {part}: {model.source} has no {part} images; choose another")
    return ids


def _not_trained_on(model: Model, data: Path, part: str | None) -> PolysegError:
    return PolysegError(f"--split {part}: {model.source} was not trained on {data}")


def is_gone(config: DataConfig) -> bool:
    """Return whether the data that the settings name no longer exist."""
    return config.path != "demo" and not Path(config.path).exists()


def refuse_gone(config: DataConfig, owner: Path) -> None:
    """Raise if the data of a run no longer exist."""
    if is_gone(config):
        raise PolysegError(
            f"{config.path}: there is no such file or folder; give the folder in which the "
            f"images of {owner} are now by --data"
        )


def moved_split(model: Model, images: ImageSet) -> Split | None:
    """Return the split of a model's run if its own data are gone and `images` contain them all."""
    if model.run is None or not is_gone(model.config.data):
        return None
    split, hashes = model.run.read_split(model.checkpoint.split)
    same = all(images.hashes.get(identity) == digest for identity, digest in hashes.items())
    return split if same else None


def split_of_run(run: RunDirectory, images: ImageSet, sha256: str = "") -> Split:
    """Return the split that a run recorded, if the images have not changed since.

    Missing or changed images, or a split.json whose hash is not `sha256`, raise PolysegError.
    """
    split, hashes = run.read_split(sha256)
    changes = {
        identity: "has changed" if identity in images.hashes else "is missing"
        for identity, digest in hashes.items()
        if images.hashes.get(identity) != digest
    }
    if changes:
        shown = ", ".join(f"{identity} {how}" for identity, how in list(changes.items())[:_SHOWN])
        more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise PolysegError(f"data: since {run.path} was made, image {shown}{more}")
    return split


def _split_of_file(model: Model, images: ImageSet, part: str) -> Split:
    """Return the split for a checkpoint outside of its run, computed again from its settings.

    Settings with a pattern or a file, which are untrusted, raise PolysegError.
    """
    if part == "all":
        return {}
    config = model.config.data
    if config.group_pattern is not None or config.split_file is not None:
        raise PolysegError(
            f"{model.source}: its split was made from data.group or data.split_file; give the "
            "folder of the run, --data of other images, or --split all"
        )
    return split_by_settings(images.members(), config)


def _warn_of_known_images(model: Model, images: ImageSet) -> None:
    """Warn if images of another folder are training or validation images of the network."""
    if model.run is None:
        return
    split, hashes = model.run.read_split()
    known = {hashes[identity] for part in ("train", "val") for identity in split[part]}
    seen = sum(images.hashes[identity] in known for identity in images.ids)
    if seen:
        log.warning(
            "%d of these %d images are training or validation images of %s: this is not a test",
            *(seen, len(images.ids), model.source),
        )


def passes_of(config: Config, *, masks: bool = True, **changes: Any) -> UncertaintyConfig:
    """Return the settings of MC Dropout with changes; those that are None change nothing.

    The metric becomes mutual_information if the training's own takes no passes, or needs masks and
    the images have none (`masks`).
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    metric = config.uncertainty.metric
    if not config.uncertainty.takes_passes:
        log.info("uncertainty.metric is mutual_information here, as %s takes no passes", metric)
        changes["metric"] = "mutual_information"
    elif score_of(metric).needs_mask and not masks:
        log.info("uncertainty.metric is mutual_information here, as %s needs masks", metric)
        changes["metric"] = "mutual_information"
    return config.uncertainty.model_copy(update=changes)

"""Opening what was trained: a network from its checkpoint, and the images to show it."""

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
from polyseg.networks.networks_by_name import SegmentationNetwork
from polyseg.records import Progress, no_progress
from polyseg.runs.checkpoints import Checkpoint, read_checkpoint
from polyseg.runs.run_folder import RunDirectory, find_checkpoint
from polyseg.runs.weights import network_of
from polyseg.system.memory import keep_freed_memory

log = logging.getLogger(__name__)

_SHOWN = 5

Load = Callable[[DataConfig, Progress], ImageSet]


@dataclass(frozen=True)
class Trained:
    """A checkpoint and where it is from."""

    source: Path
    run: RunDirectory | None
    """The run it is a checkpoint of, where that is still around it."""
    checkpoint: Checkpoint

    @property
    def config(self) -> Config:
        """The settings that it was trained with."""
        return self.checkpoint.config

    def weights_only(self) -> "Trained":
        """Return this without what only the resuming of a run needs."""
        return dataclasses.replace(self, checkpoint=self.checkpoint.weights_only())

    def build(self, device: str, *, trust: bool) -> "Model":
        """Build the network.

        Raises:
            PolysegError: there is no such device, or the network may not be trusted.
        """
        network = network_of(self.checkpoint, trust=trust).to(choose_device(device))
        return Model(self.source, self.run, self.checkpoint, network)


@dataclass(frozen=True)
class Model(Trained):
    """A trained network and where it is from."""

    network: SegmentationNetwork


@dataclass(frozen=True)
class Inputs:
    """Which images a trained network gets, and how it is opened."""

    data: str | Path | None = None
    """Folder of other images than the run's own."""
    part: str | None = None
    """Part of the run's own images: one of `PARTS` or "all"; None for the command's default."""
    cache: str | Path | None = None
    """Folder for decoded images that do not fit into memory."""
    device: str = "auto"
    trust: bool = False
    """Whether code outside polyseg that a checkpoint names is run."""


def open_model(source: str | Path, device: str, trust: bool) -> Model:
    """Return the network of a checkpoint file, or of a run's best checkpoint.

    Raises:
        PolysegError: there is none, it is damaged, or its network may not be trusted.
    """
    return read_trained(source).build(device, trust=trust)


def read_trained(source: str | Path) -> Trained:
    """Read a checkpoint file, or a run's best checkpoint, without building its network.

    Raises:
        PolysegError: there is none, or it is damaged.
    """
    keep_freed_memory()
    path = find_checkpoint(source)
    checkpoint = read_checkpoint(path)
    # Where decoded images are kept is this machine's affair, not the checkpoint's.
    data = checkpoint.config.data.model_copy(
        update={name: DataConfig.model_fields[name].default for name in ("memory", "cache")}
    )
    config = checkpoint.config.model_copy(update={"data": data})
    checkpoint = dataclasses.replace(checkpoint, config=config)
    run = RunDirectory(path.parent.parent)
    return Trained(Path(source), run if run.split.is_file() else None, checkpoint)


class LastImages:
    """Reads images, unless those of equal settings were the last: runs to compare share theirs."""

    def __init__(self, cache: str | Path | None = None) -> None:
        self.cache = {} if cache is None else {"cache": str(cache)}
        self.key: str | None = None
        self.images: ImageSet | None = None

    def __call__(self, config: DataConfig, progress: Progress) -> ImageSet:
        """Return the images of these settings."""
        config = config.model_copy(update=self.cache)
        # Images are the same whichever of them are for testing.
        key = config.model_copy(update={"fold": None, "split_file": None}).model_dump_json()
        if self.images is None or key != self.key:
            self.images = None  # Before others are read, so that memory holds one set.
            self.images, self.key = load_images(config, progress), key
        return self.images


def images_for(
    model: Model,
    inputs: Inputs,
    default: str,
    progress: Progress = no_progress,
    load: Load = load_images,
) -> tuple[ImageSet, list[str]]:
    """Return images and the ids to use: a part of the run's own data, or all of a folder.

    Args:
        model: the network that gets them.
        inputs: the model's own data are used where it names the same folder or none; other
            folders have no parts.
        default: the part where none is named.
        progress: of reading.
        load: what reads the model's own data.

    Raises:
        PolysegError: an unknown or empty part, or data that are not in order.
    """
    part = inputs.part
    if part not in (None, "all", *PARTS):
        raise PolysegError(f"--split {part}: choose {', '.join(PARTS)} or all")
    data = None if inputs.data is None else Path(inputs.data)
    config = model.config.data
    if inputs.cache is not None:
        config = config.model_copy(update={"cache": str(inputs.cache)})
    own = data is None or (config.path != "demo" and data.resolve() == Path(config.path).resolve())
    if not own and data is not None:
        # Only data of a folder that is gone may have a split elsewhere.
        if part not in (None, "all") and not is_gone(config):
            raise _not_trained_on(model, data, part)
        images = load_others(data, config, model.checkpoint.channels, progress)
        images = dataclasses.replace(images, levels=model.checkpoint.levels)
        split = None if part == "all" else moved_split(model, images)
        if split is not None:
            log.info(
                "%s: its images are read from %s, in place of %s", model.source, data, config.path
            )
            return images, part_of(split, part or default, images, model)
        if part not in (None, "all"):
            raise _not_trained_on(model, data, part)
        _warn_of_known_images(model, images)
        return images, images.ids
    part = part or default
    refuse_gone(config, model.source)
    images = load(config, progress)
    split = (
        split_of_run(model.run, images, model.checkpoint.split)
        if model.run
        else _split_of_file(model, images, part)
    )
    images = dataclasses.replace(images, levels=model.checkpoint.levels)
    return images, part_of(split, part, images, model)


def part_of(split: Split, part: str, images: ImageSet, model: Model) -> list[str]:
    """Return the ids of a part of a split, or of all images.

    Raises:
        PolysegError: there are none.
    """
    ids = images.ids if part == "all" else split[part]
    if not ids:
        raise PolysegError(f"--split {part}: {model.source} has no {part} images; choose another")
    return ids


def _not_trained_on(model: Model, data: Path, part: str) -> PolysegError:
    return PolysegError(f"--split {part}: {data} is not what {model.source} was trained on")


def is_gone(config: DataConfig) -> bool:
    """Return whether the folder or file that the settings name is not there any more."""
    return config.path != "demo" and not Path(config.path).exists()


def refuse_gone(config: DataConfig, owner: Path) -> None:
    """Raise if the data of a run are not where its settings say.

    Raises:
        PolysegError: names the option that says where they are now.
    """
    if is_gone(config):
        raise PolysegError(
            f"{config.path}: there is no such file or folder; give the place where the images of "
            f"{owner} are now by --data"
        )


def moved_split(model: Model, images: ImageSet) -> Split | None:
    """Return the split of a model's run if its own data are gone and `images` hold all of them.

    None where the images are others, or the model's own data are still there.
    """
    if model.run is None or not is_gone(model.config.data):
        return None
    split, hashes = model.run.read_split(model.checkpoint.split)
    same = all(images.hashes.get(identity) == digest for identity, digest in hashes.items())
    return split if same else None


def split_of_run(run: RunDirectory, images: ImageSet, sha256: str = "") -> Split:
    """Return the split that a run recorded, if the images are still the same.

    Args:
        run: the run.
        images: as they are now.
        sha256: what the hash of split.json must be, where it is known.

    Raises:
        PolysegError: split.json was changed, or images are missing or have changed, by name.
    """
    split, hashes = run.read_split(sha256)
    what = {
        identity: "has changed" if identity in images.hashes else "is missing"
        for identity, digest in hashes.items()
        if images.hashes.get(identity) != digest
    }
    if what:
        shown = ", ".join(f"{identity} {how}" for identity, how in list(what.items())[:_SHOWN])
        more = f" and {len(what) - _SHOWN} more" if len(what) > _SHOWN else ""
        raise PolysegError(f"data: since {run.path} was made, image {shown}{more}")
    return split


def _split_of_file(model: Model, images: ImageSet, part: str) -> Split:
    """Return the split of a checkpoint that has left its run: made anew, if that is safe.

    A pattern or a file that a checkpoint names is not used: the one may take forever, the other may
    be any.
    """
    if part == "all":
        return {}
    config = model.config.data
    if config.group is not None or config.split_file is not None:
        raise PolysegError(
            f"{model.source}: was trained on a split of its own, which its run folder keeps; give "
            "the run, --data of other images, or --split all"
        )
    return split_by_settings(images.members(), config)


def _warn_of_known_images(model: Model, images: ImageSet) -> None:
    """Say so where images of another folder are those that the network was trained or chosen on."""
    if model.run is None:
        return
    split, hashes = model.run.read_split()
    known = {hashes[identity] for part in ("train", "val") for identity in split[part]}
    seen = sum(images.hashes[identity] in known for identity in images.ids)
    if seen:
        log.warning(
            "%d of these %d images are training or validation images of %s: no test",
            seen,
            len(images.ids),
            model.source,
        )


def passes_of(config: Config, *, masks: bool = True, **changes: Any) -> UncertaintyConfig:
    """Return the settings of MC Dropout, also of a training whose difficulty took no passes.

    Args:
        config: of the training.
        masks: whether the images have masks, without which some scores do not exist.
        changes: settings that are others here, of the values that `UncertaintyConfig` allows; None
            leaves what the training had.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    metric = config.uncertainty.metric
    if not config.uncertainty.takes_passes:
        log.info("uncertainty.metric %s takes no passes: mutual_information here", metric)
        changes["metric"] = "mutual_information"
    elif score_of(metric).needs_mask and not masks:
        log.info("uncertainty.metric %s needs masks: mutual_information here", metric)
        changes["metric"] = "mutual_information"
    return config.uncertainty.model_copy(update=changes)

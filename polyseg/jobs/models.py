"""Opening what was trained: a network from its checkpoint, and the images to show it."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from polyseg.config import Config
from polyseg.data.dataset import ImageSet, load_folder, load_images
from polyseg.data.splits import PARTS, Split, refuse_leaks, split_by_ratio
from polyseg.errors import PolysegError
from polyseg.inference import choose_device
from polyseg.networks import SegmentationNetwork
from polyseg.records import Progress
from polyseg.run import Checkpoint, RunDirectory, find_checkpoint, read_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A trained network and where it is from."""

    source: Path
    run: RunDirectory | None
    """The run it is a checkpoint of, where that is still around it."""
    checkpoint: Checkpoint
    network: SegmentationNetwork

    @property
    def config(self) -> Config:
        """The settings that it was trained with."""
        return self.checkpoint.config


def open_model(source: Path, device: str, trust: bool) -> Model:
    """Return the network of a checkpoint file, or of a run's best checkpoint.

    Raises:
        PolysegError: there is none, it is damaged, or its network may not be trusted.
    """
    path = find_checkpoint(source)
    checkpoint = read_checkpoint(path)
    network = checkpoint.build(trust=trust).to(choose_device(device))
    run = RunDirectory(path.parent.parent)
    return Model(source, run if run.split.is_file() else None, checkpoint, network)


def images_for(
    model: Model, data: Path | None, part: str | None, default: str, progress: Progress
) -> tuple[ImageSet, list[str]]:
    """Return images and the ids to use: a part of the run's own data, or all of a folder.

    Args:
        model: what will look at them.
        data: a folder; the model's own data where it is the same or left out.
        part: one of `PARTS` or "all"; of another folder than the model's own there are no parts.
        default: the part where none is named.
        progress: of reading.

    Raises:
        PolysegError: an unknown or empty part, or data that are not in order.
    """
    if part not in (None, "all", *PARTS):
        raise PolysegError(f"--split {part}: choose {', '.join(PARTS)} or all")
    config = model.config.data
    own = data is None or (config.path != "demo" and data.resolve() == Path(config.path).resolve())
    if not own and data is not None:
        if part not in (None, "all"):
            raise PolysegError(f"--split {part}: {data} is not what {model.source} was trained on")
        images = load_folder(data, config, model.checkpoint.channels, progress)
        _warn_of_known_images(model, images)
        return images, images.ids
    images = load_images(config, progress)
    split = split_of_run(model.run, images) if model.run else new_split(model.config, images)
    part = part or default
    ids = images.ids if part == "all" else split[part]
    if not ids:
        raise PolysegError(f"--split {part}: {model.source} has no {part} images; choose another")
    return images, ids


def new_split(config: Config, images: ImageSet) -> Split:
    """Divide the images as the settings say, and make sure that no image is on two sides.

    Raises:
        PolysegError: too few images, sizes that no batch can hold, or one image on two sides.
    """
    if len(images.sizes()) > 1 and config.training.batch_size > 1:
        raise PolysegError(
            f"data.size: the images have {len(images.sizes())} sizes and no batch can hold them; "
            "set data.size, or training.batch_size=1"
        )
    if len(images.sizes()) > 1 and config.uncertainty.save_maps and config.adaptive:
        raise PolysegError(
            f"uncertainty.save_maps: the images have {len(images.sizes())} sizes and one array of "
            "maps has one; set data.size"
        )
    split = split_by_ratio(images.ids, config.data.split, config.data.split_seed)
    refuse_leaks(split, images.hashes)
    return split


def split_of_run(run: RunDirectory, images: ImageSet) -> Split:
    """Return the split that a run recorded, if the images are still the same.

    Raises:
        PolysegError: an image is missing or has changed, by name.
    """
    split, hashes = run.read_split()
    for identity, digest in hashes.items():
        if images.hashes.get(identity) != digest:
            what = "has changed" if identity in images.hashes else "is missing"
            raise PolysegError(f"data: image {identity} {what} since {run.path} was made")
    return split


@contextlib.contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that is there and empty; what fails before it is filled leaves none behind.

    Raises:
        PolysegError: it holds something already, or cannot be made.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise PolysegError(f"{path}: is not empty and nothing is overwritten; choose another --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PolysegError(f"{path}: cannot be made: {error.strerror}") from error
    try:
        yield path
    finally:
        if not any(path.iterdir()):
            path.rmdir()


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


def results_beside(source: Path, name: str) -> Path:
    """Return where results go that were given no place: into the run, or beside the checkpoint."""
    folder = source if source.is_dir() else source.parent
    return folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"

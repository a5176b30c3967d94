"""`polyseg data preview`: draw training images before and after augmentation."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from polyseg.choices import NORMALISATIONS
from polyseg.config import Config
from polyseg.data.augmentation import augment, changes_of
from polyseg.data.dataset import ImageSet
from polyseg.data.loading import load_images
from polyseg.data.new_split import new_split
from polyseg.errors import PolysegError
from polyseg.figures.pictures import OutlinedImage, samples_sheet
from polyseg.figures.run_figures import displayed
from polyseg.figures.style import save_figure
from polyseg.records import Progress, no_progress
from polyseg.system.output_folder import refuse_existing_figure
from polyseg.system.seeds import derive_seed


def preview(
    config: Config,
    *,
    out: Path,
    count: int,
    samples: int,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> list[Path]:
    """Draw some training images with their masks, before and after augmentation."""
    if not (1 <= count <= 50 and 1 <= samples <= 20):
        raise PolysegError("--images must be from 1 to 50, and --samples from 1 to 20")
    refuse_existing_figure(out, overwrite=overwrite)
    images = load_images(config.data, progress)
    ids = new_split(config, images)["train"]
    if NORMALISATIONS[config.data.normalise].pooled:
        images = dataclasses.replace(images, levels=images.pooled_over(ids))
    rows = [_preview_row(config, images, one, samples) for one in _varied(images, ids, count)]
    name = f"{config.data.augmentation} augmentation"
    return save_figure(samples_sheet(rows, title=name), out)


def _varied(images: ImageSet, ids: Sequence[str], count: int) -> list[str]:
    """Return images to draw: with foreground first, and from as many groups as possible."""
    seen: Counter[str] = Counter()
    turn = {}
    for identity in sorted(ids, key=lambda one: not images.item(one).foreground):
        group = images.item(identity).group or identity
        turn[identity] = seen[group]
        seen[group] += 1
    return sorted(turn, key=lambda one: (not images.item(one).foreground, turn[one], one))[:count]


def _preview_row(
    config: Config, images: ImageSet, identity: str, samples: int
) -> list[OutlinedImage]:
    """Return an image, and its augmented versions in the first epochs."""
    changes, seed = changes_of(config.data), config.training.seed
    masks = images.sample(identity)[1]
    row = [OutlinedImage(identity, displayed(images.pixels(identity)), masks.numpy())]
    for epoch in range(1, samples + 1):
        image, masks = images.patch(identity, derive_seed(seed, epoch, "patch", identity))
        if changes is not None:
            key = derive_seed(seed, epoch, "augmentation", identity)
            image, masks = augment(image, masks, changes, key)
        shown = displayed(image.movedim(0, 2).numpy())
        row.append(OutlinedImage(f"epoch {epoch}", shown, masks.numpy()))
    return row

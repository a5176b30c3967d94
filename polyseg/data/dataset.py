"""The images of a run in memory, and batches of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from polyseg.config import DataConfig
from polyseg.data.augmentation import Strength, augment
from polyseg.data.images import Pixels, read_image, read_mask, resize_image, resize_mask
from polyseg.data.layouts import Pair, find_images, find_pairs
from polyseg.data.phantoms import make_phantoms
from polyseg.data.splits import content_hash
from polyseg.errors import PolysegError
from polyseg.records import Batch, Progress, no_progress
from polyseg.seeds import derive_seed


@dataclass(frozen=True)
class ImageSet:
    """Images decoded and resized once, kept as they were stored: 8 or 16 bit."""

    ids: list[str]
    images: list[Pixels]
    """Each (H, W, C)."""
    masks: list[NDArray[np.uint8]] | None
    """Each (H, W) in {0, 1}."""
    normalise: str
    hashes: dict[str, str] = field(default_factory=dict)
    """By id, of the pixels before resizing."""
    known_difficulty: dict[str, float] = field(default_factory=dict)
    """By id, for phantoms."""

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return int(self.images[0].shape[2])

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Positions by id."""
        return {identity: i for i, identity in enumerate(self.ids)}

    def mask_of(self, identity: str) -> NDArray[np.uint8]:
        """Return the mask of an image, (H, W) in {0, 1}.

        Raises:
            ValueError: the images have no masks.
        """
        if self.masks is None:
            raise ValueError("these images have no masks")
        return self.masks[self.index[identity]]

    def sizes(self) -> set[tuple[int, int]]:
        """Return the heights and widths that occur."""
        return {(image.shape[0], image.shape[1]) for image in self.images}

    def sample(self, i: int) -> tuple[Tensor, Tensor]:
        """Return image i, (C, H, W) float32 normalised, and its mask, (H, W) uint8.

        Without masks the mask is of zeros.
        """
        image = torch.from_numpy(np.moveaxis(self.images[i], 2, 0).astype(np.float32))
        if self.masks is None:
            mask = torch.zeros(image.shape[1:], dtype=torch.uint8)
        else:
            mask = torch.from_numpy(self.masks[i].copy())
        if self.normalise == "unit":
            return image / float(np.iinfo(self.images[i].dtype).max), mask
        deviation = image.std(dim=(1, 2), keepdim=True, correction=0).clamp_min(1e-3)
        return (image - image.mean(dim=(1, 2), keepdim=True)) / deviation, mask

    def batches(self, ids: Sequence[str], batch_size: int) -> Iterator[Batch]:
        """Yield the images in this order, un-augmented, neighbours of one size together."""
        start = 0
        positions = [self.index[identity] for identity in ids]
        while start < len(positions):
            size = self.images[positions[start]].shape
            end = start + 1
            while (
                end < min(len(positions), start + batch_size)
                and self.images[positions[end]].shape == size
            ):
                end += 1
            yield self._batch(positions[start:end])
            start = end

    def _batch(self, positions: Sequence[int]) -> Batch:
        images, masks = zip(*(self.sample(i) for i in positions), strict=True)
        return Batch(
            [self.ids[i] for i in positions],
            torch.stack(images),
            None if self.masks is None else torch.stack(masks),
        )


def load_images(config: DataConfig, progress: Progress = no_progress) -> ImageSet:
    """Read the images and masks that the settings name, or make the demo's phantoms.

    Raises:
        PolysegError: names the folder or file and what is wrong with it.
    """
    if config.path == "demo":
        return make_demo(config)
    return read_pairs(find_pairs(Path(config.path)), config, progress)


def load_folder(
    folder: Path, config: DataConfig, channels: int, progress: Progress = no_progress
) -> ImageSet:
    """Read a folder for a network of so many channels; masks are read where it has them.

    Raises:
        PolysegError: names the folder or file and what is wrong with it.
    """
    pairs = find_pairs(folder) if (folder / "masks").is_dir() else find_images(folder)
    return read_pairs(pairs, config, progress, channels)


def make_demo(config: DataConfig) -> ImageSet:
    """Return the demo's phantoms as if they had been read."""
    phantoms = make_phantoms(
        config.demo_images, size=_size(config) or (128, 128), modality=config.demo_modality
    )
    return ImageSet(
        ids=[phantom.id for phantom in phantoms],
        images=[np.atleast_3d(phantom.image) for phantom in phantoms],
        masks=[phantom.mask for phantom in phantoms],
        normalise=config.normalise,
        hashes={phantom.id: content_hash(phantom.image) for phantom in phantoms},
        known_difficulty={phantom.id: phantom.difficulty for phantom in phantoms},
    )


def read_pairs(
    pairs: Sequence[Pair],
    config: DataConfig,
    progress: Progress = no_progress,
    channels: int | None = None,
) -> ImageSet:
    """Read pairs of files; without a wish for channels all become RGB if one is.

    Raises:
        PolysegError: all the problems of the files, joined.
    """
    images, masks, hashes, problems = [], [], {}, []
    for done, pair in enumerate(pairs, start=1):
        try:
            pixels, mask = _read_pair(pair, config)
        except PolysegError as error:
            problems.append(str(error))
            continue
        hashes[pair.id] = content_hash(pixels)
        size = _size(config)
        images.append(resize_image(pixels, size) if size else pixels)
        if mask is not None:
            masks.append(resize_mask(mask, size) if size else mask)
        progress("reading images", done, len(pairs))
    if problems:
        raise PolysegError("\n".join(problems))
    found = 3 if any(image.ndim == 3 for image in images) else 1
    if channels is not None and found > channels:
        raise PolysegError("data: the images are RGB, the network was trained on gray ones")
    return ImageSet(
        ids=[pair.id for pair in pairs],
        images=[_with_channels(image, channels or found) for image in images],
        masks=masks or None,
        normalise=config.normalise,
        hashes=hashes,
    )


def training_batches(
    images: ImageSet,
    ids: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    strength: Strength = "none",
    workers: int = 0,
) -> DataLoader[tuple[list[str], Tensor, Tensor]]:
    """Return the batches of an epoch: shuffled by (seed, epoch), augmented by (seed, epoch, id).

    The number of workers changes nothing in them, and torch's global random stream is not used.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, "order"))
    return DataLoader[Any](
        _Augmented(images, list(ids), seed, epoch, strength),
        batch_size=batch_size,
        shuffle=True,
        generator=generator,
        num_workers=workers,
        collate_fn=_collate,
    )


class _Augmented(Dataset[tuple[str, Tensor, Tensor]]):
    def __init__(
        self, images: ImageSet, ids: list[str], seed: int, epoch: int, strength: Strength
    ) -> None:
        self.images, self.ids = images, ids
        self.seed, self.epoch, self.strength = seed, epoch, strength

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[str, Tensor, Tensor]:
        identity = self.ids[i]
        image, mask = self.images.sample(self.images.index[identity])
        seed = derive_seed(self.seed, self.epoch, "augmentation", identity)
        return identity, *augment(image, mask, self.strength, seed)


def _collate(samples: list[tuple[str, Tensor, Tensor]]) -> tuple[list[str], Tensor, Tensor]:
    ids, images, masks = zip(*samples, strict=True)
    return list(ids), torch.stack(images), torch.stack(masks)


def _read_pair(pair: Pair, config: DataConfig) -> tuple[Pixels, NDArray[np.uint8] | None]:
    pixels = read_image(pair.image)
    if pair.mask is None:
        return pixels, None
    labels = config.foreground
    mask = read_mask(pair.mask, (labels,) if isinstance(labels, int) else labels)
    if mask.shape != pixels.shape[:2]:
        raise PolysegError(
            f"{pair.mask}: is {mask.shape[0]} x {mask.shape[1]}, its image "
            f"{pixels.shape[0]} x {pixels.shape[1]}; they must be of one size"
        )
    return pixels, mask


def _size(config: DataConfig) -> tuple[int, int] | None:
    return (config.size, config.size) if isinstance(config.size, int) else config.size


def _with_channels(image: Pixels, channels: int) -> Pixels:
    planes = np.atleast_3d(image)
    return np.repeat(planes, 3, axis=2) if planes.shape[2] < channels else planes

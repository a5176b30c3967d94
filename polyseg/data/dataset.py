"""Store the decoded images of a run, and make batches of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from polyseg.config import DataConfig
from polyseg.data.duplicates import Likeness, likeness_of
from polyseg.data.pixel_store import Image, Masks, MemoryStore, Store
from polyseg.data.preprocessing import Kept, Levels, cut_patch, levels_of, pooled_levels, sides_of
from polyseg.data.splits import Member
from polyseg.errors import PolysegError
from polyseg.records import Batch
from polyseg.system.memory import refuse_beyond_memory

if TYPE_CHECKING:
    from torch import Tensor

_BYTES_OF_PHANTOMS = {"ultrasound": 2, "endoscopy": 4}
"""Bytes of memory for a pixel of a phantom and its mask."""


@dataclass(frozen=True)
class Repeatable:
    """Batches that can be iterated several times."""

    make: Callable[[], Iterator[Batch]]

    def __iter__(self) -> Iterator[Batch]:
        return self.make()


@dataclass(frozen=True)
class Item:
    """Facts about an image besides its pixels."""

    id: str
    size: tuple[int, int]
    channels: int
    likeness: Likeness
    """Hashes of the pixels before resizing."""
    levels: Levels
    shares: tuple[float, ...] | None
    """Share of the pixels of each label, before resizing; None without masks."""
    original_size: tuple[int, int]
    """Height and width before resizing."""
    bits: int = 8
    spacing: tuple[float, float] | None = None
    """Millimetres between rows and between columns, after resizing."""
    part: str | None = None
    group: str | None = None
    known_difficulty: float | None = None
    """Difficulty of a phantom."""
    kept: Kept | None = None
    """Foreground after resizing to a smaller size."""

    @property
    def foreground(self) -> float | None:
        """Largest share of pixels of a label; None without masks."""
        return None if self.shares is None else max(self.shares)

    @property
    def bytes(self) -> int:
        """Size of pixels and masks as stored, in bytes."""
        each = self.channels * self.bits // 8 + len(self.shares or ())
        return each * self.size[0] * self.size[1]


@dataclass(frozen=True)
class Tiling:
    """Patches that a network trains on."""

    size: tuple[int, int]
    foreground_share: float
    """Probability that a patch is centred on foreground."""


@dataclass(frozen=True)
class ImageSet:
    """Images that were decoded and resized once, with their original pixel types."""

    items: Sequence[Item]
    store: Store
    channels: int
    """Number of channels of every image; gray images among RGB images get equal channels."""
    labels: tuple[str, ...] = ("",)
    """Names of the K channels of the masks."""
    tiling: Tiling | None = None
    levels: Levels | None = None
    """Common levels of all images; None if each image has its own."""
    read_original: Callable[[str], tuple[Image, Masks | None]] | None = None
    """Function that reads an image by id at the size of its file; None if all have that size."""

    @cached_property
    def ids(self) -> list[str]:
        """The images' ids, in order."""
        return [item.id for item in self.items]

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Positions by id."""
        return {identity: i for i, identity in enumerate(self.ids)}

    @cached_property
    def hashes(self) -> Mapping[str, str]:
        """Hashes of the pixels by id."""
        return {item.id: item.likeness.exact for item in self.items}

    @cached_property
    def known_difficulty(self) -> Mapping[str, float]:
        """Difficulty by id, for images of known difficulty."""
        return {
            item.id: item.known_difficulty
            for item in self.items
            if item.known_difficulty is not None
        }

    @cached_property
    def has_masks(self) -> bool:
        """Whether every image has masks."""
        return all(item.shares is not None for item in self.items)

    def item(self, identity: str) -> Item:
        """Return the facts about an image."""
        return self.items[self.index[identity]]

    def members(self) -> list[Member]:
        """Return the facts about each image that a split needs."""
        return [member_of(item) for item in self.items]

    def sizes(self) -> set[tuple[int, int]]:
        """Return the sizes of the images, each once."""
        return {item.size for item in self.items}

    def pixels(self, identity: str) -> Image:
        """Return an image as it is stored, (H, W, C)."""
        return self._with_channels(self.store.get(self.index[identity])[0])

    def masks(self, identity: str) -> Masks | None:
        """Return the masks of an image, (K, H, W), or None if it has none."""
        return self.store.get(self.index[identity])[1]

    def original(self, identity: str) -> tuple[Image, Masks | None]:
        """Return an image, (H, W, C), and its masks, (K, H, W), at the size of its file."""
        item = self.item(identity)
        if self.read_original is None or item.size == item.original_size:
            return self.pixels(identity), self.masks(identity)
        image, masks = self.read_original(identity)
        return self._with_channels(image), masks

    def original_spacing(self, identity: str) -> tuple[float, float] | None:
        """Return the millimetres between rows and between columns of an image's file, if known."""
        item = self.item(identity)
        if item.spacing is None:
            return None
        rows, columns = (
            spacing * size / original
            for spacing, size, original in zip(
                item.spacing, item.size, item.original_size, strict=True
            )
        )
        return rows, columns

    def sample(self, identity: str) -> "tuple[Tensor, Tensor]":
        """Return a normalised image, (C, H, W) float32, and its masks, (K, H, W) uint8.

        Without masks they are 0.
        """
        i = self.index[identity]
        return self._tensors(i, *self.store.get(i))

    def patch(self, identity: str, seed: int) -> "tuple[Tensor, Tensor]":
        """Return the training sample of an image: a patch, or the whole image."""
        i = self.index[identity]
        image, masks = self.store.get(i)
        if self.tiling is not None:
            share = self.tiling.foreground_share
            image, masks = cut_patch(image, masks, self.tiling.size, share, seed)
        return self._tensors(i, image, masks)

    def batches(self, ids: Sequence[str], batch_size: int) -> Iterable[Batch]:
        """Return batches of whole images in this order, without augmentation.

        The images of a batch have the same size; images that are read window by window come one by
        one. The result can be iterated more than once.
        """
        return Repeatable(partial(self._batches, ids, batch_size))

    def _batches(self, ids: Sequence[str], batch_size: int) -> Iterator[Batch]:
        import torch

        batch_size = 1 if self.tiling is not None else batch_size
        for _, run in groupby(ids, key=lambda identity: self.item(identity).size):
            alike = list(run)
            for start in range(0, len(alike), batch_size):
                names = alike[start : start + batch_size]
                images, masks = zip(*map(self.sample, names), strict=True)
                stacked = torch.stack(masks) if self.has_masks else None
                yield Batch(names, torch.stack(images), stacked, self.labels)

    def pooled_over(self, ids: Sequence[str]) -> Levels:
        """Return the levels by mean and standard deviation over all pixels of some images."""
        items = [self.item(identity) for identity in ids]
        levels = [self._repeated(item.levels) for item in items]
        return pooled_levels(levels, [item.size[0] * item.size[1] for item in items])

    def _tensors(self, i: int, image: Image, masks: Masks | None) -> "tuple[Tensor, Tensor]":
        import torch

        levels = self.levels or self._repeated(self.items[i].levels)
        tensor = torch.from_numpy(levels.apply(self._with_channels(image)))
        if masks is None:
            return tensor, torch.zeros((len(self.labels), *tensor.shape[1:]), dtype=torch.uint8)
        return tensor, torch.from_numpy(masks.copy())

    def _with_channels(self, image: Image) -> Image:
        return np.repeat(image, self.channels, axis=2) if image.shape[2] < self.channels else image

    def _repeated(self, levels: Levels) -> Levels:
        times = self.channels // len(levels.offset)
        return Levels(levels.offset * times, levels.scale * times, levels.clipped)


def member_of(item: Item) -> Member:
    """Return the facts about an image that a split needs."""
    return Member(item.id, item.foreground or 0.0, item.group, item.part)


def item_of(
    identity: str,
    pixels: Image,
    image: Image,
    masks: Masks | None,
    config: DataConfig,
    *,
    sliced: bool = False,
    **more: Any,
) -> Item:
    """Return the facts about an image, `pixels` as read, (H, W, C), and `image` as stored.

    `masks` are as read, (K, H, W); `more` are further fields of the item.
    """
    return Item(
        id=identity,
        size=(image.shape[0], image.shape[1]),
        channels=image.shape[2],
        likeness=likeness_of(pixels, sliced=sliced),
        levels=levels_of(image, config),
        original_size=(pixels.shape[0], pixels.shape[1]),
        shares=None if masks is None else tuple(float(mask.mean()) for mask in masks),
        bits=8 * image.dtype.itemsize,
        **more,
    )


def image_set(
    items: Sequence[Item], store: Store, config: DataConfig, channels: int | None = None
) -> ImageSet:
    """Return a set of images; if `channels` is None and some images are RGB, all become RGB.

    Raises:
        PolysegError: there are no images, or their numbers of channels do not match.
    """
    if not items:
        raise PolysegError("data: there are no images")
    found = sorted({item.channels for item in items})
    channels = channels or found[-1]
    odd = next((item for item in items if item.channels not in (1, channels)), None)
    if odd is not None or (found[0] != channels and channels != 3):
        seen = " and ".join(map(str, found))
        raise PolysegError(
            f"data: the images have {seen} channels, such as {(odd or items[0]).id}; expected "
            f"{channels} in each{' (or gray)' if channels == 3 else ''}; data.channels=gray makes "
            "each gray"
        )
    tiled = config.fit == "tile" and config.size is not None
    tiling = Tiling(sides_of(config.size), config.tile_foreground) if tiled else None
    return ImageSet(items, store, channels, config.labels, tiling)


def arrays_as_set(
    ids: Sequence[str],
    images: Sequence[NDArray[Any]],
    masks: Sequence[NDArray[np.uint8] | None],
    config: DataConfig,
    known_difficulty: Sequence[float | None] | None = None,
) -> ImageSet:
    """Return a set of images from arrays in memory.

    Args:
        ids: ids of the images.
        images: images, each (H, W, C) or (H, W).
        masks: masks, each (K, H, W) or (H, W) in {0, 1}, or None.
        config: settings of the normalisation.
        known_difficulty: difficulties of phantoms.

    >>> images = arrays_as_set(["a"], [np.eye(4, dtype=np.uint8)], [None], DataConfig())
    >>> images.sample("a")[0].shape
    torch.Size([1, 4, 4])
    """
    kept = [np.atleast_3d(image) for image in images]
    stacks = [mask[None] if mask is not None and mask.ndim == 2 else mask for mask in masks]
    known = known_difficulty or [None] * len(kept)
    items = [
        item_of(identity, image, image, mask, config, known_difficulty=difficulty)
        for identity, image, mask, difficulty in zip(ids, kept, stacks, known, strict=True)
    ]
    return image_set(items, MemoryStore(kept, stacks), config)


def make_demo(config: DataConfig) -> ImageSet:
    """Return the demo's phantoms as a set of images.

    Raises:
        PolysegError: the settings have several labels, or more phantoms than fit into memory.
    """
    from polyseg.data.phantoms.phantom_sets import make_phantoms

    if len(config.labels) > 1:
        raise PolysegError("data.foreground: the demo's masks are 0/1; leave it out")
    sized = config.size not in (None, "auto") and config.fit == "resize"
    size = sides_of(config.size) if sized else (128, 128)
    refuse_beyond_memory(
        config.demo_images * size[0] * size[1] * _BYTES_OF_PHANTOMS[config.demo_modality],
        f"data.demo_images: {config.demo_images:,} images of {size[0]} x {size[1]}, with masks,",
        "lower it, or data.size",
    )
    phantoms = make_phantoms(config.demo_images, size=size, modality=config.demo_modality)
    return arrays_as_set(
        [phantom.id for phantom in phantoms],
        [phantom.image for phantom in phantoms],
        [phantom.mask for phantom in phantoms],
        config,
        [phantom.difficulty for phantom in phantoms],
    )

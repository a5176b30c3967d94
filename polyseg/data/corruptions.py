"""Corrupt images at graded strengths, to test the robustness of networks.

The idea, and its five grades, are from D. Hendrycks and T. Dietterich, "Benchmarking neural network
robustness to common corruptions and perturbations" (ICLR 2019). Gray values are changed in units of
the image's own range, so a grade is the same for 8-bit, 16-bit and floating-point pixels; lengths
are shares of the image's shorter side.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image as Picture

from polyseg.config import DataConfig
from polyseg.data.dataset import ImageSet
from polyseg.data.pixel_store import Image, Masks, Store
from polyseg.data.preprocessing import levels_of, resize_image
from polyseg.errors import PolysegError
from polyseg.system.seeds import derive_seed

Gray = NDArray[np.float64]
"""Gray values, (H, W, C), 0 at the image's 1st percentile and 1 at its 99th."""

STRENGTHS = (0, 1, 2, 3, 4, 5)
"""Strengths, from none to severe."""

AMOUNTS: dict[str, tuple[float, ...]] = {
    "noise": (0.03, 0.06, 0.1, 0.17, 0.28),  # deviation
    "blur": (0.003, 0.006, 0.01, 0.016, 0.025),  # deviation of the kernel, share of the side
    "contrast": (0.8, 0.6, 0.4, 0.25, 0.12),  # share of the contrast that is left
    "gamma": (1.25, 1.6, 2.1, 2.8, 4.0),  # exponent
    "bias": (1.15, 1.35, 1.7, 2.3, 3.5),  # factor between the field's extremes and 1
    "motion": (0.01, 0.025, 0.05, 0.08, 0.12),  # length of the path, share of the side
    "speckle": (0.05, 0.1, 0.18, 0.3, 0.5),  # deviation of the factor
    "resolution": (1.5, 2.0, 3.0, 4.0, 6.0),  # old pixels along a side of a new one
    "jpeg": (50, 25, 15, 9, 5),  # quality
}
"""Parameter of each corruption at the strengths 1 to 5, with gray values in units of `Gray`."""

CORRUPTIONS = tuple(AMOUNTS)


def check_corruption(name: str, strength: int) -> None:
    """Raise PolysegError if there is no such corruption or strength."""
    if name not in AMOUNTS:
        choices = ", ".join(CORRUPTIONS)
        raise PolysegError(f"{name}: is not a corruption; choose {choices}")
    if strength not in STRENGTHS:
        raise PolysegError(f"{name}: has the strengths 0 (none) to 5 (severe), not {strength}")


def corrupt(image: Image, name: str, strength: int, *, seed: int, side: int | None = None) -> Image:
    """Return a corrupted image of the same shape and type, between its lowest and highest value.

    Args:
        image: (H, W, C), of any type, finite.
        name: one of `CORRUPTIONS`.
        strength: 0 to 5; 0 does not change the image. An image of a single value never changes.
        seed: random seed; with equal seeds noise differs between strengths in amplitude only.
        side: length in pixels to which lengths are relative; by default the shorter side.

    Raises:
        PolysegError: there is no such corruption or strength.

    >>> image = np.arange(64, dtype=np.uint16).reshape(8, 8, 1)
    >>> damaged = corrupt(image, "contrast", 5, seed=0)
    >>> int(damaged.min()), int(damaged.max()), damaged.dtype
    (28, 35, dtype('uint16'))
    """
    check_corruption(name, strength)
    low, high = _range_of(image)
    if strength == 0 or low == high:
        return image
    gray = (image.astype(np.float64) - low) / (high - low)
    generator, length = np.random.default_rng(seed), side or min(image.shape[:2])
    damaged = _KINDS[name](gray, AMOUNTS[name][strength - 1], generator, length)
    values = (damaged * (high - low) + low).clip(image.min(), image.max())
    whole = np.issubdtype(image.dtype, np.integer)
    return (values.round() if whole else values).astype(image.dtype)


def corrupted(
    images: ImageSet,
    name: str,
    strength: int,
    *,
    seed: int,
    config: DataConfig,
    ids: Sequence[str] | None = None,
) -> ImageSet:
    """Return images as if they had been corrupted before they were read.

    Pixels are corrupted at each access and not stored. Each image has different noise, which is the
    same at every strength. Gray values are normalised by the levels of the corrupted image, or by
    those of the training images if these are used. So normalisation undoes "contrast" except for
    rounding, unless `data.normalise` is unit, window or dataset. Ids, hashes and masks do not
    change. Lengths are shares of a patch's side if images are tiled.

    Args:
        images: images at the size of the network's input.
        name: one of `CORRUPTIONS`.
        strength: 0 to 5.
        seed: random seed of the noise, together with name and id.
        config: settings of the normalisation.
        ids: ids of the images to return, in this order; None for all.

    >>> from polyseg.data.dataset import arrays_as_set
    >>> clean = arrays_as_set(["a"], [200 * np.eye(8, dtype=np.uint8)], [None], DataConfig())
    >>> noisy = corrupted(clean, "noise", 1, seed=0, config=DataConfig())
    >>> noisy.hashes == clean.hashes, bool((noisy.pixels("a") == clean.pixels("a")).all())
    (True, False)
    """
    check_corruption(name, strength)
    ids = images.ids if ids is None else ids
    seeds = [derive_seed(seed, "corruption", name, identity) for identity in ids]
    places = [images.index[identity] for identity in ids]
    side = min(images.tiling.size) if images.tiling is not None else None
    store = _CorruptedStore(images.store, places, seeds, name, strength, side)
    items = [images.items[i] for i in places]
    if images.levels is None:
        items = [
            dataclasses.replace(item, levels=levels_of(store.get(i)[0], config))
            for i, item in enumerate(items)
        ]
    return dataclasses.replace(images, items=items, store=store)


@dataclass(frozen=True)
class _CorruptedStore:
    """Some images of another store, each corrupted at access."""

    store: Store
    places: Sequence[int]
    """Positions of the images in that store."""
    seeds: Sequence[int]
    name: str
    strength: int
    side: int | None

    def get(self, i: int) -> tuple[Image, Masks | None]:
        """Return the corrupted image i, (H, W, C), and its unchanged masks."""
        image, masks = self.store.get(self.places[i])
        damaged = corrupt(image, self.name, self.strength, seed=self.seeds[i], side=self.side)
        return damaged, masks


def _range_of(image: Image) -> tuple[float, float]:
    """Return the 1st and 99th percentile, or the extremes if these are equal."""
    low, high = np.percentile(image, (1, 99))
    return (low, high) if low < high else (float(image.min()), float(image.max()))


def _noise(gray: Gray, deviation: float, generator: Generator, _: int) -> Gray:
    return gray + deviation * generator.standard_normal(gray.shape)


def _speckle(gray: Gray, deviation: float, generator: Generator, _: int) -> Gray:
    return gray * (1 + deviation * generator.standard_normal((*gray.shape[:2], 1)))


def _blur(gray: Gray, share: float, _: Generator, side: int) -> Gray:
    from scipy import ndimage

    return ndimage.gaussian_filter(gray, share * side, axes=(0, 1))


def _motion(gray: Gray, share: float, generator: Generator, side: int) -> Gray:
    """Return the mean along a straight path in a random direction."""
    from scipy import ndimage, signal

    length, angle = share * side, generator.uniform(0, math.pi)
    reach = math.ceil(length / 2) + 1
    still = np.zeros((2 * reach + 1, 2 * reach + 1))
    still[reach, reach] = 1
    path = np.linspace(-length / 2, length / 2, 2 * reach + 1)
    steps = [(t * math.sin(angle), t * math.cos(angle)) for t in path]
    kernel = np.mean([ndimage.shift(still, step, order=1) for step in steps], axis=0)
    padded = np.pad(gray, [(reach, reach), (reach, reach), (0, 0)], mode="symmetric")
    return np.asarray(signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1)))


def _contrast(gray: Gray, share: float, _: Generator, __: int) -> Gray:
    mean = gray.mean(axis=(0, 1))
    return np.asarray(mean + share * (gray - mean))


def _gamma(gray: Gray, exponent: float, _: Generator, __: int) -> Gray:
    # Outside [0, 1] a power is undefined or brightens.
    return np.where((gray > 0) & (gray < 1), np.abs(gray) ** exponent, gray)


def _bias(gray: Gray, factor: float, generator: Generator, _: int) -> Gray:
    """Return the image times a smooth field in [1 / factor, factor] that reaches one end."""
    weights = generator.standard_normal((3, 3))
    weights[0, 0] = 0
    rows, columns = (np.linspace(-1, 1, length) for length in gray.shape[:2])
    field = np.polynomial.legendre.leggrid2d(rows, columns, weights)
    return np.asarray(gray * factor ** (field / np.abs(field).max())[..., None])


def _resolution(gray: Gray, factor: float, _: Generator, __: int) -> Gray:
    height, width = gray.shape[:2]
    size = max(round(height / factor), 1), max(round(width / factor), 1)
    return resize_image(resize_image(gray, size), (height, width))


def _jpeg(gray: Gray, quality: float, _: Generator, __: int) -> Gray:
    """Return the image plus the errors of 8-bit rounding and JPEG between the percentiles."""
    shown = gray.clip(0, 1)
    levels = np.rint(255 * shown).astype(np.uint8)
    if levels.shape[2] == 3:
        compressed = _through_jpeg(levels, quality)
    else:
        planes = [_through_jpeg(plane, quality) for plane in np.moveaxis(levels, 2, 0)]
        compressed = np.stack(planes, axis=2)
    return np.asarray(gray + compressed / 255.0 - shown)


def _through_jpeg(levels: NDArray[np.uint8], quality: float) -> NDArray[np.uint8]:
    """Return 8-bit values, (H, W) or (H, W, 3), compressed and read again."""
    file = io.BytesIO()
    Picture.fromarray(levels).save(file, format="jpeg", quality=int(quality))
    with Picture.open(file) as picture:
        return np.asarray(picture)


_KINDS: dict[str, Callable[[Gray, Any, Generator, int], Gray]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "gamma": _gamma,
    "bias": _bias,
    "motion": _motion,
    "speckle": _speckle,
    "resolution": _resolution,
    "jpeg": _jpeg,
}

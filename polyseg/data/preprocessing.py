"""Prepare images for the network: size, gray values, patches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from polyseg.choices import NORMALISATIONS
from polyseg.config import DataConfig
from polyseg.errors import PolysegError

_LARGEST_AUTO, _MULTIPLE = 256, 16
_LEAST_DEVIATION = 1e-3
"""Smallest standard deviation by which an image is divided, in units of its pixels."""


@dataclass(frozen=True)
class Levels:
    """Offset and scale of gray values, one of each per channel: (x - offset) / scale."""

    offset: tuple[float, ...]
    scale: tuple[float, ...]
    clipped: bool = False
    """Whether values are clipped to [0, 1]."""

    def apply(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Return an image, (H, W, C), as (C, H, W) float32.

        >>> Levels((1.0,), (2.0,)).apply(np.full((1, 1, 1), 4, np.uint8))
        array([[[1.5]]], dtype=float32)
        """
        reduced = np.moveaxis(image, 2, 0).astype(np.float32)
        offset, scale = (
            np.array(values, dtype=np.float32)[:, None, None]
            for values in (self.offset, self.scale)
        )
        reduced -= offset
        reduced /= scale
        return reduced.clip(0, 1, out=reduced) if self.clipped else reduced


def levels_of(image: NDArray[Any], config: DataConfig) -> Levels:
    """Return the levels of an image, (H, W, C), by `data.normalise`.

    With "dataset" they are the image's own mean and deviation, which `pooled_levels` pools.

    Raises:
        PolysegError: `data.normalise` is "unit" and the pixels have no full range.

    >>> levels_of(np.array([[[1], [3]]], np.uint8), DataConfig())
    Levels(offset=(2.0,), scale=(1.0,), clipped=False)
    """
    levels: Levels = NORMALISATIONS[config.normalise].resolve()(image, config)
    return levels


def mean_and_deviation(image: NDArray[Any], _: DataConfig) -> Levels:
    """Return mean and deviation of each channel."""
    deviation = image.std(axis=(0, 1), dtype=np.float64)
    mean = image.mean(axis=(0, 1), dtype=np.float64)
    return Levels(_floats(mean), _floats(np.maximum(deviation, _LEAST_DEVIATION)))


def full_range(image: NDArray[Any], _: DataConfig) -> Levels:
    """Return 0 and the largest value that the pixels can have."""
    if image.dtype not in (np.uint8, np.uint16):
        raise PolysegError(
            f"data.normalise=unit: {image.dtype} pixels have no full range; choose zscore, "
            "percentile, dataset or window"
        )
    channels = image.shape[2]
    return Levels((0.0,) * channels, (float(np.iinfo(image.dtype).max),) * channels)


def percentiles(image: NDArray[Any], _: DataConfig) -> Levels:
    """Return the 1st percentile of each channel, and its distance to the 99th."""
    low, high = np.percentile(image, (1, 99), axis=(0, 1))
    return Levels(_floats(low), _floats(np.maximum(high - low, _LEAST_DEVIATION)), clipped=True)


def window(image: NDArray[Any], config: DataConfig) -> Levels:
    """Return the lower end of `data.window`, and its width."""
    (low, high), channels = config.window, image.shape[2]
    return Levels((low,) * channels, (high - low,) * channels, clipped=True)


def pooled_levels(levels: Sequence[Levels], pixels: Sequence[int]) -> Levels:
    """Return mean and deviation over all images from those of each and its number of pixels.

    >>> pooled_levels([Levels((0.0,), (1.0,)), Levels((2.0,), (1.0,))], [1, 1])
    Levels(offset=(1.0,), scale=(1.4142135623730951,), clipped=False)
    """
    weights = np.asarray(pixels, dtype=np.float64)[:, None] / np.sum(pixels)
    means = np.array([one.offset for one in levels])
    deviations = np.array([one.scale for one in levels])
    mean = (weights * means).sum(axis=0)
    variance = (weights * (deviations**2 + (means - mean) ** 2)).sum(axis=0)
    return Levels(_floats(mean), _floats(np.sqrt(variance)))


def levels_from(record: Any, channels: int) -> Levels | None:
    """Return the levels that a checkpoint recorded, or None where it recorded none.

    Raises:
        ValueError: they are not levels of that number of channels.

    >>> levels_from({"offset": [1.0], "scale": [2.0], "clipped": False}, 1)
    Levels(offset=(1.0,), scale=(2.0,), clipped=False)
    """
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise ValueError("levels are a mapping")
    offset, scale = (tuple(float(one) for one in record[name]) for name in ("offset", "scale"))
    right = len(offset) == len(scale) == channels and min(scale) > 0
    if not (right and bool(np.isfinite([*offset, *scale]).all())):
        raise ValueError(f"levels do not fit {channels} channels")
    return Levels(offset, scale, bool(record["clipped"]))


def resize_image(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Resize (H, W, C) to height and width, bilinear and without aliasing; the type stays.

    >>> resize_image(np.full((8, 8, 1), 7, np.uint8), (4, 2))[..., 0]
    array([[7, 7],
           [7, 7],
           [7, 7],
           [7, 7]], dtype=uint8)
    """
    if pixels.shape[:2] == size:
        return pixels
    planes = np.moveaxis(pixels, 2, 0)
    resized = np.stack([_resize_plane(plane, size, "BILINEAR") for plane in planes], axis=2)
    if not np.issubdtype(pixels.dtype, np.integer):
        return resized.astype(pixels.dtype)
    limits = np.iinfo(pixels.dtype)
    return resized.round().clip(limits.min, limits.max).astype(pixels.dtype)


def resize_mask(mask: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize a mask of 0 and 1: foreground where at least half of the area was.

    >>> resize_mask(np.eye(4, dtype=np.uint8), (2, 2))
    array([[1, 0],
           [0, 1]], dtype=uint8)
    """
    if mask.shape == size:
        return mask
    return (_resize_plane(mask, size, "BOX") >= 0.5).astype(np.uint8)


@dataclass(frozen=True)
class Kept:
    """The foreground of an image after resizing."""

    objects: int
    """Number of connected objects, of all labels."""
    lost: int
    """Number of objects without a remaining pixel."""
    area: float
    """Area after resizing as a share of the area before."""


def kept_foreground(masks: NDArray[np.uint8], resized: NDArray[np.uint8]) -> Kept:
    """Return the foreground that resizing masks, (K, H, W), to (K, h, w) keeps.

    >>> masks = np.zeros((1, 8, 8), np.uint8)
    >>> masks[0, 0, 0] = masks[0, 4:, 4:] = 1
    >>> kept_foreground(masks, resize_mask(masks[0], (2, 2))[None])
    Kept(objects=2, lost=1, area=0.9411764705882353)
    """
    from scipy.ndimage import label

    objects = lost = 0
    for mask, small in zip(masks, resized, strict=True):
        numbers, count = label(mask)
        rows, columns = np.nonzero(mask)
        (height, width), (low, narrow) = mask.shape, small.shape
        seen = small[rows * low // height, columns * narrow // width]
        objects += count
        lost += count - np.unique(numbers[rows, columns][seen == 1]).size
    before = masks.mean(dtype=np.float64)
    return Kept(objects, lost, float(resized.mean(dtype=np.float64) / before) if before else 1.0)


def sides_of(size: Any) -> tuple[int, int]:
    """Return the height and width of data.size, which may be one number."""
    return (size, size) if isinstance(size, int) else size


def auto_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size of data.size=auto from the heights and widths of images.

    >>> auto_size([(600, 800)]), auto_size([(100, 130), (96, 128), (90, 128)])
    ((192, 256), (96, 128))
    """
    height, width = np.median(np.array(sizes), axis=0)
    scale = min(1.0, _LARGEST_AUTO / max(height, width))
    sides = (max(2, int(side * scale / _MULTIPLE + 0.5)) * _MULTIPLE for side in (height, width))
    return next(sides), next(sides)


def as_gray(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return pixels, (N, H, W, C), with one channel: luma of RGB, else the mean; the type stays.

    >>> as_gray(np.array([[[[255, 0, 0]]]], np.uint8))[0, 0, 0, 0]
    np.uint8(76)
    """
    count = pixels.shape[3]
    if count == 1:
        return pixels
    weights = (0.299, 0.587, 0.114) if count == 3 else (1 / count,) * count
    gray = (pixels * np.array(weights, np.float32)).sum(axis=3, keepdims=True)
    return np.asarray(gray.round() if pixels.dtype.kind in "iu" else gray, pixels.dtype)


def resize_map(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize a map of real values, (H, W), bilinear."""
    return values if values.shape == size else _resize_plane(values, size, "BILINEAR")


def cut_patch(
    image: NDArray[Any],
    masks: NDArray[np.uint8] | None,
    size: tuple[int, int],
    foreground_share: float,
    seed: int,
) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
    """Cut a random patch of an image, (H, W, C), and its masks, (K, H, W) in {0, 1}.

    Beyond the edge, the image is mirrored and the mask is 0. `foreground_share` is the probability
    that the patch is centred on foreground. Equal seeds give equal patches.

    >>> image, masks = np.zeros((9, 9, 1)), np.ones((1, 9, 9), np.uint8)
    >>> [part.shape for part in cut_patch(image, masks, (4, 12), 0.5, seed=0)]
    [(4, 12, 1), (1, 4, 12)]
    """
    generator = np.random.default_rng(seed)
    image, masks = _padded_to(image, masks, size)
    top, left = (
        int(generator.integers(0, side - wanted + 1))
        for side, wanted in zip(image.shape[:2], size, strict=True)
    )
    centred = generator.random() < foreground_share
    if masks is not None and centred and masks.any():
        row, column = _pixel_of(masks, generator)
        top = min(max(row - size[0] // 2, 0), image.shape[0] - size[0])
        left = min(max(column - size[1] // 2, 0), image.shape[1] - size[1])
    window = (slice(top, top + size[0]), slice(left, left + size[1]))
    return image[window], None if masks is None else masks[(slice(None), *window)]


def _pixel_of(masks: NDArray[np.uint8], generator: "np.random.Generator") -> tuple[int, int]:
    """Return row and column of a random foreground pixel."""
    inside = masks[0] if len(masks) == 1 else np.asarray(masks.any(axis=0))
    # Choose the row first, because listing all pixels of a large mask is slow.
    ends = np.count_nonzero(inside, axis=1).cumsum()
    row = int(np.searchsorted(ends, generator.integers(ends[-1]), side="right"))
    return row, int(generator.choice(np.flatnonzero(inside[row])))


def _padded_to(
    image: NDArray[Any], masks: NDArray[np.uint8] | None, size: tuple[int, int]
) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
    lacking = [max(wanted - side, 0) for side, wanted in zip(image.shape[:2], size, strict=True)]
    if not any(lacking):
        return image, masks
    edges = [(lack // 2, lack - lack // 2) for lack in lacking]
    padded = np.pad(image, [*edges, (0, 0)], mode="symmetric")
    return padded, None if masks is None else np.pad(masks, [(0, 0), *edges])


def _resize_plane(
    plane: NDArray[Any], size: tuple[int, int], method: Literal["BILINEAR", "BOX"]
) -> NDArray[np.float32]:
    from PIL import Image

    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling[method]))


def _floats(values: NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)

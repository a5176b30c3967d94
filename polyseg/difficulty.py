"""From pixels to one difficulty an image, and from difficulties to epsilons (section 3.4).

The functions take NumPy arrays or torch tensors and return the same kind, in float64. Arrays of
another shape than stated are a ValueError that prints the shapes.
"""

from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool2d

Array = TypeVar("Array", NDArray[np.float64], Tensor)
Region = Literal["mask", "prediction", "union", "boundary", "image"]

FALLBACKS = ("none", "prediction", "empty")
"""By code, what `select_region` took for an image: the region asked for; the prediction, because
that region is empty; nothing, because the prediction is empty too."""


def foreground_mean(pixel_map: Array, region: Array) -> Array:
    """Return the difficulty D, the mean of a pixel map over the foreground (section 3.4.1).

    Args:
        pixel_map: (B, H, W).
        region: (B, H, W) in {0, 1}, the foreground of each image.

    Returns:
        (B,) float64; 0 where the region is empty.

    >>> foreground_mean(np.array([[[0.2, 0.4], [0.9, 0.9]]]), np.array([[[1, 1], [0, 0]]]))
    array([0.3])
    """
    if len(pixel_map.shape) != 3 or pixel_map.shape != region.shape:
        raise ValueError(
            f"pixel map {tuple(pixel_map.shape)} and region {tuple(region.shape)} must have one "
            "shape (B, H, W)"
        )
    chosen = _numpy(region) > 0
    values = mean_by_image(_numpy(pixel_map)[chosen], chosen.nonzero()[0], len(chosen))
    return _like(values, pixel_map)


def mean_by_image(
    values: NDArray[Any], image: NDArray[np.int64], images: int
) -> NDArray[np.float64]:
    """Return the mean of the pixels of each image, 0 where it has none.

    Args:
        values: (n,), of some pixels.
        image: (n,), which image each belongs to.
        images: B.

    Returns:
        (B,) float64.

    >>> mean_by_image(np.array([0.2, 0.4, 0.9]), np.array([0, 0, 2]), 3)
    array([0.3, 0. , 0.9])
    """
    if np.ndim(values) != 1 or values.shape != image.shape:
        raise ValueError(f"values {values.shape} and image {image.shape} must have one shape (n,)")
    total = np.bincount(image, weights=values, minlength=images)
    if len(total) != images:
        raise ValueError(f"image {image.shape} holds {len(total) - 1}, of {images} images from 0")
    mean: NDArray[np.float64] = total / np.bincount(image, minlength=images).clip(min=1)
    return mean


def normalise(difficulty: Array, percentile: float = 50.0, delta: float = 1e-9) -> Array:
    """Return (D - D_pct) / (sigma_D + delta) over the images given (eq. 11).

    Args:
        difficulty: (n,), n at least 1.
        percentile: pct in [0, 100], by linear interpolation.
        delta: keeps equal difficulties from dividing by zero.

    Returns:
        (n,) float64, without bound; 0 for a single image. sigma has divisor n.

    >>> normalise(np.array([0.1, 0.2, 0.3])).round(3)
    array([-1.225,  0.   ,  1.225])
    """
    values = np.asarray(difficulty, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"difficulty {values.shape} must be (n,) with n at least 1")
    found = percentile_and_sigma(values, percentile)
    return _like(normalise_by(values, *found, delta), difficulty)


def percentile_and_sigma(difficulty: NDArray[np.float64], percentile: float) -> tuple[float, float]:
    """Return D_pct and sigma_D of some images, by which `normalise` goes.

    Args:
        difficulty: (n,), n at least 1.
        percentile: pct in [0, 100], by linear interpolation.

    >>> percentile_and_sigma(np.array([0.25, 0.5, 0.75, 0.5]), 50)
    (0.5, 0.1767766952966369)
    """
    return float(np.percentile(difficulty, percentile)), float(difficulty.std())


def normalise_by(difficulty: Any, center: Any, sigma: Any, delta: float) -> Any:
    """Return the normalised difficulty by given statistics: D_pct, the center, and sigma_D.

    >>> normalise_by(0.75, center=0.5, sigma=0.25, delta=0.0)
    1.0
    """
    return (difficulty - center) / (sigma + delta)


def epsilon_from_difficulty(
    normalised: Array, epsilon_min: float, epsilon_max: float, sensitivity: float
) -> Array:
    """Return eps_min + (eps_max - eps_min) sigmoid(lambda D_norm) (eq. 12).

    Args:
        normalised: (n,) normalised difficulties.
        epsilon_min: what the easiest images tend to.
        epsilon_max: what the hardest images tend to.
        sensitivity: lambda, how sharply epsilon answers to difficulty.

    Returns:
        (n,) float64 in [epsilon_min, epsilon_max].

    >>> epsilon_from_difficulty(np.array([-50.0, 0.0, 50.0]), -0.4, 1.0, 1.0)
    array([-0.4,  0.3,  1. ])
    """
    if len(normalised.shape) != 1:
        raise ValueError(f"normalised difficulties {tuple(normalised.shape)} must be (n,)")
    # tanh never overflows, and the clip keeps rounding inside the range.
    x = _float64(normalised) * (0.5 * sensitivity)
    share = 0.5 * (1 + (x.tanh() if isinstance(x, Tensor) else np.tanh(x)))
    epsilon: Array = epsilon_min + (epsilon_max - epsilon_min) * share
    return epsilon.clip(epsilon_min, epsilon_max)


def select_region(
    region: Region, mask: Tensor | None, mean: Tensor, *, boundary_width: int = 3
) -> tuple[Tensor, Tensor]:
    """Return the pixels that D is averaged over, and which images needed a fallback to have some.

    Where the region of an image is empty, as "mask" of an empty mask and "boundary" of a mask that
    fills the image are, the prediction takes its place: its region of that name, or if that is
    empty too all of it. Where nothing is predicted either, nothing is chosen and D is 0.

    Args:
        region: "mask"; "prediction", mean >= 0.5; "union" of both; "boundary", the pixels within
            `boundary_width` of the mask's edge on either side; "image", all pixels.
        mask: (B, H, W) in {0, 1}, or None, which counts as empty.
        mean: (B, H, W) mean prediction in [0, 1].
        boundary_width: pixels.

    Returns:
        (B, H, W) bool, and (B,) int8 codes into `FALLBACKS`.

    Raises:
        ValueError: an unknown region, or other shapes.

    >>> mean = torch.tensor([[[0.9, 0.1]]])
    >>> select_region("mask", torch.zeros(1, 1, 2), mean)
    (tensor([[[ True, False]]]), tensor([1], dtype=torch.int8))
    """
    if mean.ndim != 3 or (mask is not None and mask.shape != mean.shape):
        given = None if mask is None else tuple(mask.shape)
        raise ValueError(f"mask {given} and mean {tuple(mean.shape)} must have one shape (B, H, W)")
    predicted = mean >= 0.5
    truth = torch.zeros_like(predicted) if mask is None else mask > 0
    if region == "mask":
        tried = [truth, predicted]
    elif region == "boundary":
        tried = [*(_edge_band(one, boundary_width) for one in (truth, predicted)), predicted]
    elif region == "union":
        tried = [truth | predicted]
    elif region == "prediction":
        tried = [predicted]
    elif region == "image":
        tried = [torch.ones_like(predicted)]
    else:
        raise ValueError(f"region = {region!r}: choose one of {', '.join(get_args(Region))}")
    chosen = tried[0]
    fallback = torch.zeros(len(mean), dtype=torch.int8, device=mean.device)
    for other in tried[1:]:
        empty = ~chosen.flatten(1).any(dim=1)
        fallback[empty] = FALLBACKS.index("prediction")
        chosen = torch.where(empty[:, None, None], other, chosen)
    fallback[~chosen.flatten(1).any(dim=1)] = FALLBACKS.index("empty")
    return chosen, fallback


def _edge_band(outline: Tensor, width: int) -> Tensor:
    """Return the pixels within `width` (chessboard distance) of the edge of the True region."""
    inside = outline[:, None].float()
    grown, grown_outside = (
        max_pool2d(part, kernel_size=2 * width + 1, stride=1, padding=width) > 0
        for part in (inside, 1 - inside)
    )
    return (grown & grown_outside)[:, 0]


def _numpy(values: Array) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _float64(values: Array) -> Array:
    if isinstance(values, Tensor):
        return values.to(torch.float64)
    return np.asarray(values, dtype=np.float64)


def _like(result: NDArray[np.float64], given: Array) -> Array:
    if isinstance(given, Tensor):
        return torch.as_tensor(result, device=given.device)
    return result

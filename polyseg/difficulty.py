"""Compute the difficulty of each image from its pixels, and epsilons from difficulties (3.4).

The functions take NumPy arrays or torch tensors and return the same kind, in float64. A wrong shape
is a ValueError that prints the shapes.
"""

import math
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", NDArray[np.float64], "Tensor")

FALLBACKS = ("none", "prediction", "empty")
"""Regions that `select_region` used, by code: the requested one; the prediction, if the requested
region is empty; no pixels, if the prediction is empty too."""


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
            f"pixel map {tuple(pixel_map.shape)} and region {tuple(region.shape)} must have the "
            "same shape (B, H, W)"
        )
    chosen = _numpy(region) > 0
    values = mean_by_image(_numpy(pixel_map)[chosen], chosen.nonzero()[0], len(chosen))
    mean: Array = _like(values, pixel_map)
    return mean


def mean_by_image(
    values: NDArray[Any], image: NDArray[np.int64], images: int
) -> NDArray[np.float64]:
    """Return the mean of the pixels of each image, 0 for images without any.

    Args:
        values: (n,) values of pixels.
        image: (n,) index of the image of each pixel.
        images: number B of images.

    Returns:
        (B,) float64.

    >>> mean_by_image(np.array([0.2, 0.4, 0.9]), np.array([0, 0, 2]), 3)
    array([0.3, 0. , 0.9])
    """
    if np.ndim(values) != 1 or values.shape != image.shape:
        raise ValueError(
            f"values {values.shape} and image {image.shape} must have the same shape (n,)"
        )
    total = np.bincount(image, weights=values, minlength=images)
    if len(total) != images:
        raise ValueError(f"image {image.shape} contains {len(total) - 1}, not below {images}")
    mean: NDArray[np.float64] = total / np.bincount(image, minlength=images).clip(min=1)
    return mean


def size_difficulty(mask_pixels: NDArray[Any]) -> NDArray[np.float64]:
    """Return -log(max(foreground pixels, 1)), which is largest for the smallest foreground.

    Args:
        mask_pixels: (n,) foreground pixels of each image's mask.

    >>> size_difficulty(np.array([0, 1, 100])).round(3)
    array([-0.   , -0.   , -4.605])
    """
    difficulty: NDArray[np.float64] = -np.log(np.maximum(mask_pixels, 1).astype(np.float64))
    return difficulty


def normalise(difficulty: Array, percentile: float = 50.0, delta: float = 1e-9) -> Array:
    """Return difficulties normalised by `normalise_by` with the statistics of these images.

    Args:
        difficulty: (n,), n at least 1.
        percentile: pct in [0, 100], by linear interpolation.
        delta: avoids a division by zero if all difficulties are equal.

    Returns:
        (n,) float64, unbounded; 0 for a single image. sigma has divisor n.

    >>> normalise(np.array([0.1, 0.2, 0.3])).round(3)
    array([-1.225,  0.   ,  1.225])
    """
    values = np.asarray(difficulty, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"difficulty {values.shape} must be (n,) with n at least 1")
    found = percentile_and_sigma(values, percentile)
    normalised: Array = _like(normalise_by(values, *found, delta), difficulty)
    return normalised


def percentile_and_sigma(difficulty: NDArray[np.float64], percentile: float) -> tuple[float, float]:
    """Return D_pct and sigma_D of some images, such as those of a batch.

    Args:
        difficulty: (n,), n at least 1.
        percentile: pct in [0, 100], by linear interpolation.

    >>> percentile_and_sigma(np.array([0.25, 0.5, 0.75, 0.5]), 50)
    (0.5, 0.1767766952966369)
    """
    return float(np.percentile(difficulty, percentile)), float(difficulty.std())


def normalise_by(difficulty: Any, center: Any, sigma: Any, delta: float) -> Any:
    """Return (D - D_pct) / (sigma_D + delta) (eq. 11).

    Args:
        difficulty: D, a number or an array.
        center: D_pct.
        sigma: sigma_D.
        delta: avoids a division by zero if all difficulties are equal.

    >>> normalise_by(0.75, center=0.5, sigma=0.25, delta=0.0)
    1.0
    """
    return (difficulty - center) / (sigma + delta)


def normalise_by_rank(
    difficulty: NDArray[np.float64], center: float = 0.0, sigma: float = 0.0, delta: float = 0.0
) -> NDArray[np.float64]:
    """Return Phi^-1((rank_i - 1/2) / n) of some images, the normal scores of their ranks.

    Only the order of the images matters, so outliers do not shrink the differences of the others.

    Args:
        difficulty: (n,), n at least 1; equal ones get the average of their ranks.
        center, sigma, delta: ignored; they are arguments of all normalisations.

    Returns:
        (n,) float64, whose sum is 0 if no two are equal.

    >>> normalise_by_rank(np.array([0.1, 9.0, 0.2])).round(3)
    array([-0.967,  0.967,  0.   ])
    """
    from scipy.special import ndtri
    from scipy.stats import rankdata

    values = np.asarray(difficulty, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"difficulty {values.shape} must be (n,) with n at least 1")
    scores: NDArray[np.float64] = ndtri((rankdata(values) - 0.5) / len(values))
    return scores


def epsilon_from_difficulty(
    normalised: Array, epsilon_min: float, epsilon_max: float, sensitivity: float
) -> Array:
    """Return eps_min + (eps_max - eps_min) sigmoid(lambda D_norm) (eq. 12).

    Args:
        normalised: (n,) normalised difficulties.
        epsilon_min: limit for the easiest images.
        epsilon_max: limit for the hardest images.
        sensitivity: lambda, how strongly epsilon depends on the difficulty.

    Returns:
        (n,) float64 in [epsilon_min, epsilon_max].

    >>> epsilon_from_difficulty(np.array([-50.0, 0.0, 50.0]), -0.4, 1.0, 1.0)
    array([-0.4,  0.3,  1. ])
    """
    if len(normalised.shape) != 1:
        raise ValueError(f"normalised difficulties {tuple(normalised.shape)} must be (n,)")
    # tanh never overflows, and clip removes rounding beyond the range.
    x: Any = normalised
    half = 0.5 * sensitivity
    tanh = (x.double() * half).tanh() if _is_tensor(x) else np.tanh(np.asarray(x, float) * half)
    epsilon: Any = epsilon_min + (epsilon_max - epsilon_min) * (0.5 * (1 + tanh))
    clipped: Array = epsilon.clip(epsilon_min, epsilon_max)
    return clipped


def epsilon_from_weight(
    normalised: NDArray[np.float64], epsilon_min: float, epsilon_max: float, sensitivity: float
) -> NDArray[np.float64]:
    """Return clip((c exp(lambda D_norm) - 1) / 2, eps_min, eps_max), for mean weight 1.

    The weight of an image's angle term is 1 + 2 epsilon. Bisection finds the c for which the mean
    weight is 1, as with epsilon 0 for all images, so only the relative weights change.

    Args:
        normalised: (n,) normalised difficulties of the images normalised together.
        epsilon_min: smallest epsilon, from -1/2 to below 0.
        epsilon_max: largest epsilon, above 0.
        sensitivity: lambda, how strongly weights differ; with 0 every epsilon is 0.

    Returns:
        (n,) float64 in [epsilon_min, epsilon_max].

    >>> epsilon = epsilon_from_weight(np.array([-1.0, 0.0, 1.0]), -0.4, 1.0, 1.0)
    >>> epsilon.round(3), (1 + 2 * epsilon).mean().round(6)
    (array([-0.365, -0.133,  0.498]), np.float64(1.0))
    """
    values = np.asarray(normalised, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"normalised difficulties {values.shape} must be (n,), n at least 1")
    if not -0.5 <= epsilon_min < 0 < epsilon_max:
        raise ValueError(f"epsilon_min {epsilon_min}, epsilon_max {epsilon_max}: 0 must be between")
    exponents = sensitivity * values
    least = math.log1p(2 * epsilon_min) if epsilon_min > -0.5 else -math.inf
    most = math.log1p(2 * epsilon_max)

    def weights(log_c: float) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.exp((exponents + log_c).clip(least, most))
        return found

    # With c at these bounds no weight is above 1, or none is below 1.
    low, high = -float(exponents.max()), -float(exponents.min())
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (middle, high) if weights(middle).mean() < 1 else (low, middle)
    epsilon: NDArray[np.float64] = ((weights(high) - 1) / 2).clip(epsilon_min, epsilon_max)
    return epsilon


def _numpy(values: Any) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if _is_tensor(values) else values)


def _like(result: Any, given: Any) -> Any:
    if not _is_tensor(given):
        return result
    import torch

    return torch.as_tensor(result, device=given.device)


def _is_tensor(values: Any) -> bool:
    """Return whether values are a tensor, without an import of torch."""
    return "torch" in sys.modules and isinstance(values, sys.modules["torch"].Tensor)

"""Common parts of phantoms: factors of difficulty, shapes of lesions, smooth noise."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, ...]
"""Height and width."""
Place = tuple[float, float]
Field = NDArray[np.float64]
Blob = NDArray[np.bool_]

_JITTER = 0.08
_WIDEST = 0.3  # half axis of a lesion at most, as a share of the image's side


@dataclass(frozen=True)
class Factors:
    """The properties that make a lesion hard to segment.

    Contrast and noise are shares of ultrasound's grey range; a polyp's colour and relief, and the
    grain of an endoscope's sensor, are in proportion to them.
    """

    contrast: float  # step between lesion and tissue
    blur: float  # standard deviation of the edge in pixels, for a shorter side of 128
    noise: float  # standard deviation of the speckle
    area: float  # share of the image
    raggedness: float  # standard deviation of the contour's radius, as a share of its mean
    distractors: float  # number of similar structures outside the mask; more are more similar


def draw_factors(rng: np.random.Generator, difficulty: float) -> Factors:
    """Draw factors that follow the difficulty, each with separate random variation."""
    own = np.clip(difficulty + _JITTER * rng.standard_normal(6), 0, 1)
    return Factors(
        contrast=float(_between(0.36, 0.15, own[0])),
        blur=float(_between(0.7, 2.0, own[1])),
        noise=float(_between(0.05, 0.10, own[2])),
        area=float(0.12 * (0.012 / 0.12) ** own[3]),
        raggedness=float(_between(0.03, 0.18, own[4])),
        distractors=float(round(_between(0, 6, own[5]))),
    )


def draw_blob(
    rng: np.random.Generator,
    size: Size,
    *,
    area: float,
    raggedness: float,
    elongation: float,
    center: Place,
) -> Blob:
    """Draw a ragged ellipse that covers exactly a share of the image, and one pixel at least.

    Area and center are shares of the image, and raggedness, the standard deviation of the radius,
    is a share of its mean. Elongation is width over height. Elongation and center are changed where
    the blob would not fit into the image.

    >>> rng = np.random.default_rng(0)
    >>> shape = {"area": 0.1, "raggedness": 0.1, "elongation": 1.5}
    >>> blob = draw_blob(rng, (40, 50), **shape, center=(0.5, 0.5))
    >>> int(blob.sum())
    200
    """
    height, width = size
    limit = np.pi * _WIDEST**2 / area
    elongation = float(np.clip(elongation, width / height / limit, width / height * limit))
    row, column = _keep_inside(
        center, area * width / height / elongation, area * height / width * elongation
    )
    tilt = rng.uniform(-0.4, 0.4) * min(elongation, 1 / elongation)
    y, x = np.ogrid[:height, :width]
    offset = (x + 0.5 - column * width) + 1j * (y + 0.5 - row * height)
    offset *= np.exp(1j * tilt)
    offset = offset.real / elongation + 1j * offset.imag
    level = np.abs(offset) / _radius(rng, np.angle(offset), raggedness)
    count = max(round(area * level.size), 1)
    blob = np.zeros(level.size, dtype=np.bool_)
    blob[np.argpartition(level, count - 1, axis=None)[:count]] = True
    return blob.reshape(size)


def far_center(rng: np.random.Generator, taken: list[Place]) -> Place:
    """Return the random place that is farthest from the occupied ones."""
    places = rng.uniform(0.1, 0.9, (12, 2))
    distances = np.linalg.norm(places[:, None] - np.array(taken)[None], axis=2).min(axis=1)
    row, column = places[distances.argmax()]
    return float(row), float(column)


def center_of(blob: Blob) -> Place:
    """Return the row and column of a blob's center as shares of the height and width."""
    from scipy import ndimage

    row, column = ndimage.center_of_mass(blob)
    return (row + 0.5) / blob.shape[0], (column + 0.5) / blob.shape[1]


def smooth_noise(rng: np.random.Generator, size: Size, rows: float, columns: float) -> Field:
    """Return noise of mean 0 and deviation about 1, with `rows` by `columns` bumps."""
    grid = rng.standard_normal((max(round(rows), 2) + 2, max(round(columns), 2) + 2))
    y = np.linspace(0.5, grid.shape[0] - 1.5, size[0])
    x = np.linspace(0.5, grid.shape[1] - 1.5, size[1])
    # Not a product of BLAS, whose last digits may depend on its number of threads.
    across = np.einsum("yg,gx->yx", grid, _spline(grid.shape[1], x).T)
    return np.asarray(1.5 * np.einsum("yg,gx->yx", _spline(grid.shape[0], y), across))


def soften(field: NDArray[np.generic], sigma: float | tuple[float, ...]) -> Field:
    """Blur with a Gaussian of deviation `sigma` in pixels, per axis if two are given."""
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(field.astype(np.float64), sigma, mode="nearest"))


def pixel_unit(size: Size) -> float:
    """Return the pixel size of an image with shorter side 128, in pixels of this size."""
    return min(size) / 128


def _between(easy: float, hard: float, share: float) -> float:
    return easy + (hard - easy) * share


def _keep_inside(center: Place, tall: float, wide: float) -> Place:
    """Move a center away from the border, given the areas of circles of its height and width."""
    reach = np.minimum(1.5 * np.sqrt(np.array([tall, wide]) / np.pi), 0.5)
    row, column = np.clip(center, reach, 1 - reach)
    return float(row), float(column)


def _radius(rng: np.random.Generator, angle: Field, raggedness: float) -> Field:
    """Return a contour's radius, of mean 1, in every direction: a sum of random waves."""
    waves = np.arange(2, 10)
    swing = rng.uniform(0.3, 1, waves.size) / waves
    swing *= raggedness * np.sqrt(2 / np.sum(swing**2))
    turn = np.linspace(-np.pi, np.pi, 256)
    shift = rng.uniform(0, 2 * np.pi, waves.size)
    radius = 1 + np.cos(np.outer(turn, waves) + shift) @ swing
    return np.interp(angle, turn, np.maximum(radius, 0.4))


def _spline(knots: int, at: Field) -> Field:
    """Return the weight of each knot at each place, by a cubic B-spline."""
    distance = np.abs(at[:, None] - np.arange(knots))
    return np.asarray(
        np.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, 0)
        + np.where((distance >= 1) & (distance < 2), (2 - distance) ** 3 / 6, 0)
    )

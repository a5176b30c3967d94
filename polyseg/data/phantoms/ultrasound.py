"""Phantoms that look like breast ultrasound: layers, speckle, and a dark lesion."""

import numpy as np
from numpy.typing import NDArray

from polyseg.data.phantoms.lesions import (
    Blob,
    Factors,
    Field,
    Place,
    Size,
    center_of,
    draw_blob,
    far_center,
    pixel_unit,
    smooth_noise,
    soften,
)


def paint(rng: np.random.Generator, size: Size, factors: Factors) -> tuple[NDArray[np.uint8], Blob]:
    """Paint a grey image (H, W) and the lesion in it."""
    unit = pixel_unit(size)
    lesion = draw_blob(
        rng,
        size,
        area=factors.area,
        raggedness=factors.raggedness,
        elongation=rng.uniform(0.95, 1.7),
        center=(rng.uniform(0.36, 0.6), rng.uniform(0.2, 0.8)),
    )
    echo = _draw_tissue(rng, size)
    _add_distractors(rng, echo, lesion, factors)
    _add_lesion(rng, echo, lesion, factors)
    echo = soften(echo, (0.4 * unit, 0.9 * unit)) + factors.noise * _draw_speckle(rng, size)
    return (255 * np.clip(echo, 0, 1)).round().astype(np.uint8), lesion


def _draw_tissue(rng: np.random.Generator, size: Size) -> Field:
    """Return the echoes of skin, fat, gland, fascia and muscle, in shares of the grey range."""
    depth = (np.arange(size[0])[:, None] + 0.5) / size[0]
    fat_ends, gland_ends, muscle_begins = (
        _draw_boundary(rng, size, low, high)
        for low, high in ((0.14, 0.26), (0.66, 0.78), (0.82, 0.9))
    )
    fibres = _draw_fibres(rng, size, 14, 3.5)
    fine = _draw_fibres(rng, size, 26, 8)
    cloud = smooth_noise(rng, size, 5, 4)
    fat = 0.34 + 0.22 * fine**4 + 0.03 * cloud
    gland = 0.50 + 0.20 * fibres**3 + 0.10 * fine**3 + 0.05 * cloud
    muscle = 0.30 + 0.20 * _draw_fibres(rng, size, 30, 2) ** 3
    echo = np.asarray(fat + (gland - fat) * _step(depth - fat_ends, 0.02))
    echo += (fat - echo) * _step(depth - gland_ends, 0.02)
    echo += (muscle - echo) * _step(depth - muscle_begins, 0.01)
    echo += 0.30 * _ridge(depth - muscle_begins, 0.010) + 0.15 * _ridge(depth - fat_ends, 0.012)
    echo -= 0.16 * depth**2 + 0.05 * smooth_noise(rng, (1, size[1]), 2, 7)
    skin = _draw_boundary(rng, size, 0.055, 0.07)
    echo += 0.35 * _ridge(depth - skin, 0.012) + 0.5 * _ridge(depth, 0.018)
    return echo


def _draw_boundary(rng: np.random.Generator, size: Size, low: float, high: float) -> Field:
    """Return the depth of a wavy boundary in every column, (1, W)."""
    wave = smooth_noise(rng, (1, size[1]), 2, 4)
    return np.asarray(rng.uniform(low, high) + 0.02 * wave)


def _draw_fibres(rng: np.random.Generator, size: Size, rows: float, columns: float) -> Field:
    """Return wavy bright lines in [0, 1]: the places where smooth noise changes sign."""
    return np.asarray(np.clip(1 - np.abs(smooth_noise(rng, size, rows, columns)), 0, 1))


def _step(distance: Field, width: float) -> Field:
    return np.asarray(0.5 + 0.5 * np.tanh(distance / width))


def _ridge(distance: Field, width: float) -> Field:
    return np.asarray(np.exp(-((distance / width) ** 2)))


def _add_distractors(rng: np.random.Generator, echo: Field, lesion: Blob, factors: Factors) -> None:
    """Paint fat lobules and shadows, which are dark like the lesion."""
    taken = [center_of(lesion)]
    likeness = 0.4 + 0.1 * factors.distractors
    for _ in range(round(factors.distractors)):
        taken.append(far_center(rng, taken))
        drop = likeness * factors.contrast * rng.uniform(0.7, 1.1)
        draw = (_add_lobule, _add_lobule, _add_shadow)[rng.integers(3)]
        draw(rng, echo, taken[-1], drop, factors)


def _add_lobule(
    rng: np.random.Generator, echo: Field, center: Place, drop: float, factors: Factors
) -> None:
    """Paint a flat dark lobule in a bright capsule, which a lesion does not have."""
    lobule = draw_blob(
        rng,
        echo.shape,
        area=factors.area * rng.uniform(0.5, 1.1),
        raggedness=0.06,
        elongation=rng.uniform(1.7, 2.6),
        center=center,
    )
    inside = soften(lobule, 0.8 * pixel_unit(echo.shape))
    capsule = 4 * inside * (1 - inside)
    echo += inside * (echo[lobule].mean() - drop - echo) * 0.9 + 0.12 * capsule


def _add_shadow(
    rng: np.random.Generator, echo: Field, center: Place, drop: float, factors: Factors
) -> None:
    """Darken everything below a place, as a ligament or bad contact does."""
    height, width = echo.shape
    depth, across = np.arange(height)[:, None] / height, np.arange(width)[None] / width
    lean = rng.uniform(-0.15, 0.15)
    reach = rng.uniform(0.25, 0.6)
    below = _step(depth - center[0], 0.05) * np.exp(-np.maximum(depth - center[0], 0) / reach)
    beam = _ridge(across - center[1] - lean * (depth - center[0]), 0.6 * np.sqrt(factors.area))
    echo -= drop * below * beam


def _add_lesion(rng: np.random.Generator, echo: Field, lesion: Blob, factors: Factors) -> None:
    """Paint the lesion, and the tissue below it brighter (a cyst) or darker (a scirrhus)."""
    size, unit = echo.shape, pixel_unit(echo.shape)
    inside = soften(lesion, factors.blur * unit)
    before = np.cumsum(inside, axis=0) / np.maximum(inside.sum(axis=0).max(), 1)
    behind = soften(before, (0, 1.5 * unit)) * (1 - inside)
    below = np.arange(size[0])[:, None] / size[0] - center_of(lesion)[0]
    behind *= np.exp(-np.maximum(below, 0) / 0.35)
    around = np.average(echo, weights=soften(lesion, 4 * unit) * (1 - inside))
    own = around - factors.contrast + 0.04 * smooth_noise(rng, size, 14, 9)
    echo += inside * (own - echo)
    echo += rng.choice([-1, 1]) * (0.04 + 0.25 * factors.contrast) * behind


def _draw_speckle(rng: np.random.Generator, size: Size) -> Field:
    """Return log-compressed Rayleigh speckle of mean 0 and deviation 1, coarser with depth."""
    # Images with smaller pixels have finer speckle, but not in proportion.
    unit = pixel_unit(size) ** 0.5
    depth = np.linspace(0, 1, size[0])[:, None]
    parts = []
    for _ in range(2):
        waves = rng.standard_normal((2, *size))
        near, far = (
            soften(wave, (0.7 * unit, lateral * unit)) * np.sqrt(lateral)
            for wave, lateral in zip(waves, (1.0, 2.0), strict=True)
        )
        parts.append(near * (1 - depth) + far * depth)
    envelope = np.hypot(*parts)
    echo = np.log(envelope + 0.3 * envelope.mean())
    return np.asarray((echo - echo.mean()) / echo.std())

"""Phantoms that look like colonoscopy: lit mucosa with folds and vessels, and a polyp."""

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

_MUCOSA = np.array([0.86, 0.50, 0.40])
_PALE = np.array([0.90, 0.62, 0.50])
_VESSEL = np.array([0.66, 0.24, 0.22])
_POLYP = np.array([0.78, 0.28, 0.28])


def paint(rng: np.random.Generator, size: Size, factors: Factors) -> tuple[NDArray[np.uint8], Blob]:
    """Paint a colour image (H, W, 3) and the polyp in it."""
    unit = pixel_unit(size)
    polyp = draw_blob(
        rng,
        size,
        area=factors.area,
        raggedness=factors.raggedness,
        elongation=rng.uniform(0.8, 1.4),
        center=(rng.uniform(0.36, 0.64), rng.uniform(0.2, 0.8)),
    )
    inside = soften(polyp, factors.blur * unit)
    lumen = _draw_lumen(rng, center_of(polyp))
    height = _draw_folds(rng, size, lumen)
    color = _draw_mucosa(rng, size, 1 - inside)
    _add_distractors(rng, height, color, polyp, factors)
    height += 2.0 * factors.contrast * _dome(polyp, factors)
    texture = 1 + 0.08 * smooth_noise(rng, size, 28, 28)
    color += (1.8 * factors.contrast * inside)[..., None] * (_POLYP * texture[..., None] - color)
    light = _light(height, lumen, 0.3 * smooth_noise(rng, size, 4, 4))
    image = color * light[..., None] + _draw_glints(rng, height, light)[..., None]
    image += factors.noise / 3 * _draw_grain(rng, size)
    image *= _vignette(size)[..., None]
    return (255 * np.clip(image, 0, 1)).round().astype(np.uint8), polyp


def _draw_lumen(rng: np.random.Generator, polyp: Place) -> Place:
    """Return the place of the lumen, away from the polyp and often outside the image."""
    row, column = far_center(rng, [polyp])
    reach = rng.uniform(0.9, 1.7)
    return 0.5 + reach * (row - 0.5), 0.5 + reach * (column - 0.5)


def _polar(size: Size, center: Place) -> tuple[Field, Field]:
    """Return the distance from a place, in shares of the shorter side, and the direction."""
    y, x = np.ogrid[: size[0], : size[1]]
    offset = (x + 0.5 - center[1] * size[1]) + 1j * (y + 0.5 - center[0] * size[0])
    return np.abs(offset) / min(size), np.angle(offset)


def _draw_folds(rng: np.random.Generator, size: Size, lumen: Place) -> Field:
    """Return the height of a wall with folds that ring the lumen, in pixels."""
    distance, _ = _polar(size, lumen)
    warped = np.maximum(distance + 0.12 * smooth_noise(rng, size, 3, 3), 0)
    phase = rng.uniform(7, 12) * np.log(warped + 0.35) + rng.uniform(0, 6)
    crest = (0.5 + 0.5 * np.cos(phase)) ** 3
    strength = np.clip(0.6 + 0.6 * smooth_noise(rng, size, 3, 3), 0, 1.5)
    fine = 0.35 * smooth_noise(rng, size, 22, 22) + 1.5 * smooth_noise(rng, size, 6, 6)
    return np.asarray((8 * crest * strength + fine) * pixel_unit(size))


def _draw_mucosa(rng: np.random.Generator, size: Size, outside: Field) -> Field:
    """Return the colour of the wall (H, W, 3), with vessels that stop where the polyp begins."""
    pale = np.clip(0.5 + 0.4 * smooth_noise(rng, size, 4, 4), 0, 1)[..., None]
    color = _MUCOSA + (_PALE - _MUCOSA) * pale
    coarse, fine = (np.abs(smooth_noise(rng, size, n, n)) for n in (5, 11))
    vessels = 0.5 * np.exp(-((coarse / 0.07) ** 2)) + 0.3 * np.exp(-((fine / 0.10) ** 2))
    vessels *= np.clip(0.5 + 0.7 * smooth_noise(rng, size, 4, 4), 0, 1) * outside
    return np.asarray(color + vessels[..., None] * (_VESSEL - color))


def _add_distractors(
    rng: np.random.Generator, height: Field, color: Field, polyp: Blob, factors: Factors
) -> None:
    """Add bulges of the wall's colour and flat red patches; a polyp is both raised and red."""
    size = height.shape
    taken = [center_of(polyp)]
    likeness = (0.4 + 0.1 * factors.distractors) * factors.contrast
    for _ in range(round(factors.distractors)):
        taken.append(far_center(rng, taken))
        blob = draw_blob(
            rng,
            size,
            area=factors.area * rng.uniform(0.4, 1.0),
            raggedness=0.1,
            elongation=rng.uniform(0.6, 1.8),
            center=taken[-1],
        )
        if rng.random() < 0.5:
            height += 1.6 * likeness * _dome(blob, factors)
        else:
            patch = soften(blob, 3 * pixel_unit(size))
            color += (likeness * patch)[..., None] * (_VESSEL - color)


def _dome(blob: Blob, factors: Factors) -> Field:
    """Return the height of a ball that sticks out of the wall over a blob, in pixels."""
    radius = np.sqrt(blob.sum() / np.pi)
    bulge = soften(blob, 0.4 * radius)
    inward = np.clip(2 * bulge / bulge.max() - 1, 0, 1)
    ball = radius * np.sqrt(1 - (1 - inward) ** 3) * blob
    return soften(ball, factors.blur * pixel_unit(blob.shape))


def _light(height: Field, lumen: Place, warp: Field) -> Field:
    """Return the light reflected by the wall, less where it is tilted or far away."""
    down, across = np.gradient(height)
    distance, direction = _polar(height.shape, lumen)
    toward = down * np.sin(direction) + across * np.cos(direction)
    distance = distance * np.exp(warp)
    facing = (1 + 0.7 * toward - 0.3 * down) / np.sqrt(1 + down**2 + across**2)
    depth = 1 - 0.85 * np.exp(-((distance / 0.22) ** 2)) - 0.2 * np.exp(-((distance / 0.5) ** 2))
    return np.asarray((0.42 + 0.66 * np.clip(facing, 0, 1.4)) * depth)


def _draw_glints(rng: np.random.Generator, height: Field, light: Field) -> Field:
    """Return white highlights where the wet wall reflects the lamp."""
    size = height.shape
    wet = smooth_noise(rng, size, 30, 24) + 0.6 * smooth_noise(rng, size, 8, 8)
    mirror = np.clip((wet + 3 * light - 5.3) * 3, 0, 1)
    return 0.9 * soften(mirror, 0.5 * pixel_unit(size))


def _draw_grain(rng: np.random.Generator, size: Size) -> Field:
    """Return the noise of a sensor, softened by its colour filter, of deviation 1, (H, W, 3)."""
    grain = soften(rng.standard_normal((*size, 3)) + rng.standard_normal((*size, 1)), (0.6, 0.6, 0))
    return np.asarray(grain / grain.std())


def _vignette(size: Size) -> Field:
    """Return the brightness of the optics: dimmer outwards, black in the rounded corners."""
    y, x = np.linspace(-1, 1, size[0])[:, None], np.linspace(-1, 1, size[1])[None]
    corner = (np.abs(x) ** 5 + np.abs(y) ** 5) ** 0.2
    edge = np.clip((1.06 - corner) * min(size) / 3, 0, 1)
    return np.asarray(edge * (1 - 0.3 * (x**2 + y**2) / 2))

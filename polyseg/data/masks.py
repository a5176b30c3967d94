"""Turn the values of a label file into masks of 0 and 1."""

import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseg.config.label_values import COLOUR, NONZERO, shown_value
from polyseg.errors import PolysegError

# Values within this share of full scale from 0 or from full are compression noise (JPEG of quality
# 75 overshoots by 15 %); values between are edges.
_NOISE = 0.15
# Largest distances of edges and of noise from the outline, in pixels: JPEG keeps noise in blocks of
# 8 (16 if the mask was enlarged later). Labels of real areas lie farther away.
_EDGE_REACH = 4
_NOISE_REACH = 16
_EDGE_SHARE = 0.1
_FEW_PIXELS = 200
_FEWEST_VALUES = 3
# JPEG may shift flat areas by this share of full scale.
_ROUNDING = 2.5 / 255
_MOST_VALUES = 2**16
_FEW_VALUES = 8
_PHOTOGRAPH = 1000
"""Number of different values above which masks are probably images."""
_SWAPPED = "are the folders of images and masks swapped? So many values look like photographs; "
_MOST_SHOWN = 6
_BLOCK = 2**20


def to_masks(
    labels: NDArray[Any], path: Path, foreground: Sequence[tuple[int, ...]] | None
) -> NDArray[np.uint8]:
    """Return masks, (N, K, H, W) in {0, 1}, from the values of a label file, (N, H, W).

    Args:
        labels: as read, integers or floats; colours are COLOUR + 65536 R + 256 G + B.
        path: their file, for errors.
        foreground: K tuples of label values: channel k is 1 where the value is among the k-th,
            other labels are background. None makes one channel of 0/1, 0/255 or 0/65535; edges may
            be smoothed (anti-aliasing, JPEG), and are 1 from half full scale on.

    Raises:
        UnclearValuesError: `foreground` is None and there are other values, or it names no colour
            and the mask has colours.

    >>> labels = np.array([[[0, 1, 2, 4]]])
    >>> to_masks(labels, Path("a.png"), [(1, 4), (2,)])[0, :, 0]
    array([[0, 1, 0, 1],
           [0, 0, 1, 0]], dtype=uint8)
    >>> to_masks(labels, Path("a.png"), None)
    Traceback (most recent call last):
    polyseg.data.masks.UnclearValuesError: a.png: a mask of values 0, 1, 2, 4; expected 0/1 or 0/255, or set data.foreground to the values that count
    """  # noqa: E501
    coloured = labels.dtype.kind in "iu" and bool((labels >= COLOUR).any())
    if foreground is None and not coloured:
        return _binary(labels, path)[:, None]
    foreground = foreground or ()
    named = [value for values in foreground for value in values]
    if coloured and not any(value >= COLOUR or value == NONZERO for value in named):
        raise UnclearValuesError(path, labels, "is a colour image")
    masks = np.zeros((len(labels), len(foreground), *labels.shape[1:]), np.uint8)
    for k, values in enumerate(foreground):
        if NONZERO in values:
            black = 0 if not coloured else COLOUR
            masks[:, k] = labels != black
        elif len(values) > _FEW_VALUES:
            masks[:, k] = np.isin(labels, values)
        else:
            for value in values:
                _where_equal(labels, _gray_if_possible(labels, value, coloured), masks[:, k])
    return masks


class UnclearValuesError(PolysegError):
    """The error of a mask with ambiguous values, with their counts."""

    def __init__(self, path: Path, labels: NDArray[Any], what: str = "") -> None:
        values, counts = np.unique(labels, return_counts=True)
        self.path = path
        self.counts = Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        shown = ", ".join(f"{value:g}" for value in values[:8])
        more = ", ..." if len(values) > 8 else ""
        self.is_coloured = bool(what)
        what = what or f"a mask of values {shown}{more}; expected 0/1 or 0/255"
        super().__init__(f"{path}: {what}, or set data.foreground to the values that count")


def lines_about_unclear(unclear: Sequence[UnclearValuesError]) -> list[str]:
    """Return a line about all masks with unclear values, and one about all with colours.

    >>> lines_about_unclear([UnclearValuesError(Path("a.png"), np.array([0, 0, 0, 7]))])
    ['a.png: masks contain the values 0 (75 %), 7 (25 %); say which are foreground, such as data.foreground=nonzero or data.foreground=7']
    """  # noqa: E501
    lines = []
    for coloured in (False, True):
        found = [one for one in unclear if one.is_coloured == coloured]
        counts = sum((one.counts for one in found), Counter())
        if not found:
            continue
        total, common = counts.total(), counts.most_common(_MOST_SHOWN)
        names_of = _label_map(found[0].path) if coloured else {}
        shares = ", ".join(
            f"{_shown(value)} ({names_of.get(value, '')}{_percent(n / total)} %)"
            for value, n in common
        )
        more = f" and {len(counts) - _MOST_SHOWN} more" if len(counts) > _MOST_SHOWN else ""
        example = next((value for value, _ in common if value not in (0, COLOUR)), common[0][0])
        names = f"{found[0].path}" + (f" and {len(found) - 1} more" if found[1:] else "")
        lines.append(
            f"{names}: {_SWAPPED if len(counts) > _PHOTOGRAPH else ''}masks contain the "
            f"{'colours' if coloured else 'values'} {shares}{more}; say which are foreground, such "
            f"as data.foreground=nonzero or data.foreground={_shown(example)}"
        )
    return lines


def _label_map(mask: Path) -> dict[float, str]:
    """Return names by colour, "liver, ", if CVAT's labelmap.txt is beside the masks."""
    for folder in mask.parents[:2]:
        with contextlib.suppress(OSError, ValueError):
            lines = (folder / "labelmap.txt").read_text(encoding="utf-8")[:100_000]
            found = re.findall(r"^([\w +().-]{1,40}):(\d+),(\d+),(\d+):", lines, re.MULTILINE)
            colours = {name: tuple(map(int, rgb)) for name, *rgb in found}
            return {
                COLOUR + int.from_bytes(rgb): f"{name}, "
                for name, rgb in colours.items()
                if max(rgb) < 256
            }
    return {}


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share > 0.1 else f"{100 * share:.2g}"


def _shown(value: float) -> str:
    return shown_value(int(value)) if value == int(value) else f"{value:.3g}"


def _gray_if_possible(labels: NDArray[Any], value: int, coloured: bool) -> int:
    """Return the gray value of a colour in a gray mask, if it has one."""
    if coloured or value < COLOUR:
        return value
    red, green, blue = (value - COLOUR).to_bytes(3)
    return red if red == green == blue and labels.dtype == np.uint8 else NONZERO


def unite(masks: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return the union of the masks of an image, which must have the same shape.

    >>> unite([np.array([0, 1, 0], np.uint8), np.array([0, 1, 1], np.uint8)])
    array([0, 1, 1], dtype=uint8)
    """
    shapes = sorted({mask.shape for mask in masks})
    if len(shapes) > 1:
        shown = ", ".join(" x ".join(map(str, shape[-2:])) for shape in shapes)
        raise PolysegError(f"masks of one image differ in size: {shown}; expected one size")
    united = masks[0].copy()
    for mask in masks[1:]:
        united |= mask
    return united


def _binary(labels: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    values = _distinct(labels)
    for high in (1, 255, 65535):
        if set(values.tolist()) <= {0, high}:
            return _where_equal(labels, high)
    scale = _full_scale(values)
    if scale is not None and _is_soft(labels, values, scale):
        return np.asarray(labels >= scale / 2).view(np.uint8)
    raise UnclearValuesError(path, labels)


def _where_equal(
    labels: NDArray[Any], value: int, masks: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Set masks, (N, H, W), to 1 where labels are a value; empty slices take no memory."""
    masks = np.zeros(labels.shape, np.uint8) if masks is None else masks
    for one, mask in zip(labels, masks, strict=True):
        found = one == value
        if found.any():
            mask[found] = 1
    return masks


def _distinct(labels: NDArray[Any]) -> NDArray[Any]:
    """Return the values that occur, in order, up to a limit."""
    flat = labels.reshape(-1)
    found = flat[:1]
    for start in range(0, flat.size, _BLOCK):
        found = np.union1d(found, _distinct_of_block(flat[start : start + _BLOCK]))
        if found.size > _MOST_VALUES:
            break
    return found


def _distinct_of_block(block: NDArray[Any]) -> NDArray[Any]:
    if block.min() == block.max():  # True of most blocks, and far faster than sorting.
        return block[:1]
    if block.dtype in (np.uint8, np.uint16):
        return np.flatnonzero(np.bincount(block)).astype(block.dtype)
    return np.unique(block)


def _full_scale(values: NDArray[Any]) -> float | None:
    """Return the foreground value of a mask with soft edges, or None if it is another mask."""
    low, high = float(values[0]), float(values[-1])
    scale = 255.0 if high <= 255 else 65535.0
    if values.dtype.kind == "f" and high <= 1:
        scale = 1.0
    return scale if low >= 0 and 0.78 * scale <= high <= scale else None


def _is_soft(labels: NDArray[Any], values: NDArray[Any], scale: float) -> bool:
    """Return whether all values except 0 and full are edges, or noise near edges."""
    edges = values[(values > _NOISE * scale) & (values < (1 - _NOISE) * scale)]
    between = values[(values > 0) & (values < scale)]
    # Labels 1, 2 with 255 for "ignore" are on one side only; JPEG's noise is on both.
    both_sides = between.size > 1 and between[0] < scale / 2 < between[-1]
    if not (both_sides or edges.size >= _FEWEST_VALUES):
        return False
    if edges.size and between.size < _FEWEST_VALUES:
        return False
    found = [_edges_of_slice(one, scale) for one in labels]
    soft = sum(count for count, _ in found)
    few = soft <= _FEW_PIXELS or soft < _EDGE_SHARE * labels.size
    return few and not any(stray for _, stray in found)


def _edges_of_slice(labels: NDArray[Any], scale: float) -> tuple[int, bool]:
    """Return the number of edge pixels of a slice, (H, W), and whether a value is misplaced."""
    count = 0
    rows = max(4 * _NOISE_REACH, _BLOCK // labels.shape[1])
    for start in range(0, len(labels), rows):
        first = max(0, start - _NOISE_REACH)
        around = labels[first : start + rows + _NOISE_REACH]
        inner = around[start - first :][:rows]
        half = around >= scale / 2
        edge, noise = (
            np.nonzero((inner > share * scale) & (inner < (1 - share) * scale))
            for share in (_NOISE, _ROUNDING)
        )
        count += len(edge[0])
        for found, reach in ((edge, _EDGE_REACH), (noise, _NOISE_REACH)):
            if not _near_outline(half, found[0] + (start - first), found[1], reach).all():
                return count, True
    return count, False


def _near_outline(
    half: NDArray[np.bool_], rows: NDArray[np.intp], columns: NDArray[np.intp], reach: int
) -> NDArray[np.bool_]:
    """Return whether both foreground and background are within some rows and columns of a pixel."""
    # sums[i, j] counts the foreground above row i and before column j.
    sums = np.zeros((half.shape[0] + 1, half.shape[1] + 1), np.int32)
    sums[1:, 1:] = half.cumsum(0, np.int32).cumsum(1)
    top, left = np.maximum(rows - reach, 0), np.maximum(columns - reach, 0)
    bottom = np.minimum(rows + reach + 1, half.shape[0])
    right = np.minimum(columns + reach + 1, half.shape[1])
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return np.asarray((inside > 0) & (inside < (bottom - top) * (right - left)))

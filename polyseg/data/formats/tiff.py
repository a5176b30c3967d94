"""Read TIFF pictures and stacks, and refuse damaged and malicious files."""

import logging
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from tifffile import COMPRESSION, PHOTOMETRIC

from polyseg.data.formats.images import ORIENTATION_TAG, as_stack, encoded_sides, upright
from polyseg.data.formats.stacks import (
    LARGEST_VOLUME,
    MOST_SLICES,
    Stack,
    guarded,
    refuse_if_large,
)
from polyseg.errors import PolysegError

# The error already reports problems of damaged files.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

_COMPRESSIONS = ("NONE", "LZW", "JPEG", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "LZMA", "ZSTD")
_SHADES = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE)
_UNSIGNED = ("bool", "uint8", "uint16")
# tifffile's readers of these kinds trust the metadata; without them it reads the pages.
_FOREIGN_KINDS = (
    *("ome", "lsm", "mmstack", "ndtiff", "fluoview", "stk", "sis", "svs", "scn", "qpi", "ndpi"),
    *("bif", "avs", "eer", "philips", "scanimage", "nih", "mdgel"),
)
_MOST_TAGS = 4096
_MOST_SUBIMAGES = 16
_MOST_SEGMENTS = 2**15
_BYTES_OF_TYPE = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
_SUBIMAGES_TAG = 330

_MILLIMETRES = {"mm": 1.0, "cm": 10.0, "inch": 25.4, "micron": 1e-3, "um": 1e-3, "µm": 1e-3}
# Dots per inch that programs write for printing.
_PRINTERS = (1, 72, 75, 90, 96, 100, 120, 144, 150, 180, 200, 240, 300, 360, 400, 600, 720, 1200)


def read_tiff(path: Path, *, labels: bool = False) -> Stack:
    """Read a TIFF of one picture or of a stack of them.

    The axes Y and X are those of a slice, S and C are channels, all others are slices. Images of 1,
    8 or 16 bit in which 0 is white are inverted, as for display; 1-bit images from tifffile are
    not. Labels are the values as stored, without palette or inversion. The spacing is that of the
    resolution tags, unless these are typical of printing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.tif"
    ...     tifffile.imwrite(path, np.zeros((5, 20, 30), np.uint16))
    ...     read_tiff(path).pixels.shape
    (5, 20, 30, 1)
    """
    with guarded(path):
        _refuse_circular_tiff(path)
        with _opened_tiff(path) as file:
            series = _only_series(path, file)
            page = series.keyframe
            _refuse_unsupported_tiff(path, page)
            _refuse_incomplete_tiff(path, series)
            _refuse_if_large_tiff(path, series)
            pixels = _stack_of(path, file, series, labels=labels)
            spacing = _spacing_of_tiff(page, file.imagej_metadata or {})
            turned = _orientation_of_tiff(page)
        return as_stack(path, pixels, labels=labels, spacing=spacing, turned=turned)


def tiff_resolution(path: Path) -> tuple[tuple[float, float], int] | None:
    """Return pixels per unit, across and down, and the unit's number of a TIFF that was read."""
    with guarded(path):
        _refuse_circular_tiff(path)
        with _opened_tiff(path) as file:
            return _resolution(file.pages.first)


def _opened_tiff(path: Path) -> Any:
    return tifffile.TiffFile(path, **{f"is_{kind}": False for kind in _FOREIGN_KINDS})


def _refuse_circular_tiff(path: Path) -> None:
    """Walk the directories once, because tifffile would follow a circle of them forever."""
    size = path.stat().st_size
    seen: set[int] = set()
    values = 0
    for offset, tags in _directories(path):
        if offset in seen:
            raise PolysegError(f"{path}: is damaged: its pages follow each other in a circle")
        seen.add(offset)
        if len(seen) > MOST_SLICES or len(tags) > _MOST_TAGS:
            raise PolysegError(
                f"{path}: has over {MOST_SLICES:,} pages or {_MOST_TAGS:,} tags; cut it into parts"
            )
        for code, kind, count in tags:
            bytes_of_value = count * (_BYTES_OF_TYPE[kind] if kind < len(_BYTES_OF_TYPE) else 1)
            values += bytes_of_value if bytes_of_value > 8 else 0
            if code == _SUBIMAGES_TAG and count > _MOST_SUBIMAGES:
                raise PolysegError(f"{path}: a page has {count} sub-pages; remove them")
        if values > size:
            raise PolysegError(f"{path}: is damaged: its tags are longer than the file")


def _directories(path: Path) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """Yield the position of each directory, and the code, type and count of its tags."""
    with path.open("rb") as stream:
        start = stream.read(16)
        order = "<" if start[:2] == b"II" else ">"
        if len(start) < 8 or start[:2] not in (b"II", b"MM"):
            return
        big = struct.unpack_from(f"{order}H", start, 2)[0] == 43
        kinds = ("Q", "Q", "HHQQ") if big else ("H", "I", "HHII")
        number, pointer, entry = (order + kind for kind in kinds)
        offset = struct.unpack_from(pointer, start.ljust(16, b"\0"), 8 if big else 4)[0]
        while offset:
            stream.seek(min(offset, 2**62))
            found = stream.read(struct.calcsize(number))
            if len(found) < struct.calcsize(number):
                return
            count = min(struct.unpack(number, found)[0], _MOST_TAGS + 1)
            width = struct.calcsize(entry)
            table = stream.read(count * width)
            whole = table[: len(table) // width * width]
            yield offset, [tag[:3] for tag in struct.iter_unpack(entry, whole)]
            following = stream.read(struct.calcsize(pointer))
            if len(following) < struct.calcsize(pointer):
                return
            offset = struct.unpack(pointer, following)[0]


def _only_series(path: Path, file: Any) -> Any:
    """Return the one series of equal pages; a reduced copy of it does not count."""
    # tifffile takes pages of half the size as reduced copies; only those marked as such are.
    levels = [level for one in file.series for level in one.levels]
    series = [one for one in levels if not one.keyframe.is_reduced] or levels
    if len(series) != 1:
        sizes = ", ".join(" x ".join(map(str, one.shape)) for one in series[:4])
        raise PolysegError(
            f"{path}: holds {len(series)} images of different kinds ({sizes}); "
            "save each in its own file"
        )
    if any(page is None for page in series[0].pages):
        raise PolysegError(f"{path}: is damaged: not all of its pages are there")
    return series[0]


def _refuse_unsupported_tiff(path: Path, page: Any) -> None:
    """Raise on compressions and kinds of pixels that are not read."""
    kind = getattr(page.compression, "name", page.compression)
    if kind not in _COMPRESSIONS:
        raise PolysegError(
            f"{path}: TIFF compression {kind} is not read; save it with LZW, Deflate or none"
        )
    as_shown = page.photometric in (*_SHADES, PHOTOMETRIC.RGB, PHOTOMETRIC.PALETTE)
    # The decoder of JPEG converts it to RGB.
    converted = page.photometric == PHOTOMETRIC.YCBCR and page.compression == COMPRESSION.JPEG
    white = page.photometric == PHOTOMETRIC.MINISWHITE
    if not (as_shown or converted) or (white and str(page.dtype) not in _UNSIGNED):
        kind = getattr(page.photometric, "name", page.photometric)
        raise PolysegError(
            f"{path}: a TIFF of kind {kind} is not read; save it as gray (0 is black) or RGB"
        )


def _refuse_incomplete_tiff(path: Path, series: Any) -> None:
    """Raise if strips or tiles are missing or shared, or decode to more than their size."""
    size = path.stat().st_size
    expected = math.prod(series.keyframe.chunked)
    total = segments = 0
    for page in series.pages:
        sizes = page.databytecounts
        if len(sizes) != expected or len(page.dataoffsets) != expected or 0 in sizes:
            raise PolysegError(
                f"{path}: is damaged: not all of its {expected} strips or tiles are there"
            )
        total += sum(sizes)
        segments += expected
    if total > size:
        raise PolysegError(f"{path}: is damaged: its strips or tiles are longer than the file")
    if segments > max(_MOST_SEGMENTS, size // 64):
        raise PolysegError(f"{path}: has {segments:,} strips or tiles; save it with larger ones")
    if series.keyframe.compression == COMPRESSION.JPEG:
        _refuse_oversized_jpeg(path, series)


def _refuse_oversized_jpeg(path: Path, series: Any) -> None:
    """Raise where the JPEG of a strip or tile is larger than the strip or tile itself."""
    page = series.keyframe
    height = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
    width = page.tilewidth if page.is_tiled else page.imagewidth
    if encoded_sides(series.keyframe.jpegtables or b"") is not None:
        raise PolysegError(f"{path}: is damaged: its JPEG tables hold an image")
    with path.open("rb") as stream:
        for page in series.pages:
            for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
                stream.seek(offset)
                sides = encoded_sides(stream.read(length))
                # Encoders may fill up to whole blocks.
                if sides is not None and (sides[0] > height + 16 or sides[1] > width + 16):
                    raise PolysegError(
                        f"{path}: is damaged: a tile holds a JPEG of {sides[0]} x {sides[1]}"
                    )


def _refuse_if_large_tiff(path: Path, series: Any) -> None:
    page = series.keyframe
    sides = (int(page.imagelength), int(page.imagewidth))
    pixels = math.prod(series.shape)
    slices = max(1, pixels // max(1, sides[0] * sides[1] * page.samplesperpixel))
    if slices > 1 and pixels > LARGEST_VOLUME * page.samplesperpixel:
        slices = LARGEST_VOLUME
    each = page.samplesperpixel * series.dtype.itemsize
    refuse_if_large(path, sides, slices=slices, bytes_per_pixel=each)
    if page.imagedepth != 1:
        raise PolysegError(f"{path}: has pages {page.imagedepth} deep; save it slice by slice")


def _stack_of(path: Path, file: Any, series: Any, *, labels: bool) -> NDArray[Any]:
    """Decode a series to (N, H, W, C), upright."""
    page, axes = series.keyframe, series.axes
    if not axes.count("Y") == axes.count("X") == 1:
        raise PolysegError(f"{path}: has axes {axes}; expected rows (Y) and columns (X)")
    pixels, axes = _with_ome_axes(page, series.asarray(maxworkers=1), axes)
    stack = _slices(_without_alpha(page, pixels, axes), axes)
    # tifffile writes bits with this tag, whichever value is foreground.
    raw_bits = stack.dtype == bool and str(page.software).startswith("tifffile")
    if page.photometric == PHOTOMETRIC.MINISWHITE and not raw_bits and not labels:
        stack = ~stack
    if page.photometric == PHOTOMETRIC.PALETTE and not labels:
        stack = _coloured(path, stack, page.colormap)
    turned = _orientation_of_tiff(page)
    return stack if turned == 1 else np.stack([upright(one, turned) for one in stack])


def _with_ome_axes(page: Any, pixels: NDArray[Any], axes: str) -> tuple[NDArray[Any], str]:
    """Return pixels and axes with the channels of an OME-TIFF apart from its slices."""
    text = page.description or ""
    found = re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", text) if page.is_ome else []
    said = dict(re.findall(r'(\w+)="(\w+)"', found[0])) if len(found) == 1 else {}
    order = said.get("DimensionOrder", "")[:1:-1]
    if sorted(order) != ["C", "T", "Z"] or axes[:1] != "I":
        return pixels, axes
    sizes = {axis: int(said.get(f"Size{axis}", 1)) for axis in order}
    sizes["C"] //= page.samplesperpixel
    if math.prod(sizes.values()) != len(pixels):
        return pixels, axes
    return pixels.reshape(*(sizes[axis] for axis in order), *pixels.shape[1:]), order + axes[1:]


def _without_alpha(page: Any, pixels: NDArray[Any], axes: str) -> NDArray[Any]:
    if "S" not in axes:
        return pixels
    colours = 1 if page.photometric in _SHADES else 3
    # A fourth sample beside RGB is alpha, even if it is not declared.
    undeclared = colours == 3 and page.samplesperpixel == 4
    declared = sum(int(kind) in (1, 2) for kind in page.extrasamples)
    kept = page.samplesperpixel - max(declared, int(undeclared))
    return pixels.take(range(kept), axes.index("S")) if kept < page.samplesperpixel else pixels


def _slices(pixels: NDArray[Any], axes: str) -> NDArray[Any]:
    """Reorder pixels of any axes to (N, H, W, C)."""
    channels = [i for i, axis in enumerate(axes) if axis in "SC"]
    sides = [axes.index("Y"), axes.index("X")]
    others = [i for i in range(len(axes)) if i not in channels + sides]
    count = math.prod(pixels.shape[i] for i in channels)
    moved = pixels.transpose(others + sides + channels)
    return moved.reshape(-1, *(pixels.shape[i] for i in sides), count)


def _coloured(path: Path, stack: NDArray[Any], table: Any) -> NDArray[Any]:
    """Replace palette numbers, (N, H, W, 1), by RGB of 8 bit."""
    if table is None or stack.dtype.kind not in "bu" or int(stack.max()) >= table.shape[1]:
        raise PolysegError(f"{path}: is damaged: its palette lacks colours")
    # It should be of 16 bit, but some programs write 8.
    colours = table.astype(np.uint16) >> (8 if table.max() > 255 else 0)
    return np.asarray(colours.T.astype(np.uint8)[stack[..., 0].astype(np.uint16, copy=False)])


def _orientation_of_tiff(page: Any) -> int:
    value = page.tags.valueof(ORIENTATION_TAG, 1)
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else 1


def _resolution(page: Any) -> tuple[tuple[float, float], int] | None:
    """Return pixels per unit, across and down, of the upright picture, and the unit's number."""
    values = [page.tags.valueof(name) for name in ("XResolution", "YResolution")]
    if not all(isinstance(value, tuple) and len(value) == 2 and all(value) for value in values):
        return None
    across, down = (float(value[0]) / float(value[1]) for value in values)
    if _orientation_of_tiff(page) >= 5:
        across, down = down, across
    return (across, down), int(page.tags.valueof("ResolutionUnit", 2))


def _spacing_of_tiff(page: Any, imagej: dict[str, Any]) -> tuple[float, float] | None:
    """Return millimetres between rows and columns, or None where they were not measured."""
    found = _resolution(page)
    if found is None:
        return None
    (across, down), number = found
    name = str(imagej.get("unit", "")).replace("\\u00B5", "µ")
    unit = _MILLIMETRES.get(name) or {2: 25.4, 3: 10.0}.get(number)
    if unit is None:
        return None
    dots_per_inch = across * 25.4 / unit
    if not name and any(abs(dots_per_inch / usual - 1) < 0.01 for usual in _PRINTERS):
        return None
    spacing = unit / down, unit / across
    return spacing if all(1e-6 <= one <= 20 for one in spacing) else None

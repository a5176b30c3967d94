"""Reading pictures and TIFF stacks, guarded against files that are not what they seem."""

import logging
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tifffile import COMPRESSION, PHOTOMETRIC

from polyseg.data.stacks import (
    LARGEST_IMAGE,
    LARGEST_VOLUME,
    MOST_SLICES,
    Stack,
    guarded,
    image_pixels,
    label_pixels,
    refuse_if_large,
    refuse_if_no_file,
)
from polyseg.errors import PolysegError

__all__ = ["LARGEST_IMAGE", "Pixels", "read_image", "read_mask", "resize_image", "resize_mask"]

# What it would say of a damaged file is said once, in the error.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
TIFF_SUFFIXES = (".tif", ".tiff")

Pixels = NDArray[np.unsignedinteger[Any]]
"""8 or 16 bit."""

_COLOUR_MODES = ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV")
# By name, because Pillow would also run Ghostscript on what it finds to be PostScript.
_PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "GIF")
_STRIP = 2**20
_ORIENTATION = 0x0112

_COMPRESSIONS = (
    COMPRESSION.NONE,
    COMPRESSION.LZW,
    COMPRESSION.JPEG,
    COMPRESSION.ADOBE_DEFLATE,
    COMPRESSION.DEFLATE,
    COMPRESSION.PACKBITS,
    COMPRESSION.LZMA,
    COMPRESSION.ZSTD,
)
# Their readers trust what such files say of themselves; without them the pages still count.
_FOREIGN_KINDS = (
    "ome",
    "lsm",
    "mmstack",
    "ndtiff",
    "fluoview",
    "stk",
    "sis",
    "svs",
    "scn",
    "qpi",
    "ndpi",
    "bif",
    "avs",
    "eer",
    "philips",
    "scanimage",
    "nih",
    "mdgel",
)
_MOST_TAGS = 4096
_MOST_SUBIMAGES = 16
_MOST_SEGMENTS = 2**15
_BYTES_OF_TYPE = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
_SUBIMAGES_TAG = 330

_MILLIMETRES = {"mm": 1.0, "cm": 10.0, "inch": 25.4, "micron": 1e-3, "um": 1e-3, "µm": 1e-3}
# Dots per inch that programs write when nobody measured anything.
_PRINTERS = (1, 72, 75, 90, 96, 100, 120, 144, 150, 180, 200, 240, 300, 360, 400, 600, 720, 1200)


def read_picture(path: Path, *, labels: bool = False) -> Stack:
    """Read PNG, JPEG, BMP or GIF as a stack of one slice; alpha is dropped.

    A picture that a camera stored on its side, and says so (EXIF), is turned, masks too. For
    labels the numbers of a palette count (of a gray GIF the grays), for images its colours. No
    spacing is taken from dots per inch.

    Raises:
        PolysegError: the file is damaged, too large, animated or of another kind.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.png"
    ...     Image.new("RGB", (30, 20)).save(path)
    ...     read_picture(path).pixels.shape
    (1, 20, 30, 3)
    """
    with guarded(path):
        refuse_if_no_file(path)
        pixels, turned = _read_with_pillow(path, keep_palette=labels)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.shape[2] in (2, 4):
            pixels = pixels[..., :-1]
        return _finished(path, _upright(pixels, turned)[None], labels=labels)


def read_tiff(path: Path, *, labels: bool = False) -> Stack:
    """Read a TIFF of one picture or of a stack of them.

    Of its axes Y and X are those of a slice, S and C are channels, all others are slices. Where 0
    is white, values of 1, 8 or 16 bit are inverted, for images and labels alike, so that they are
    as displayed; only bits that tifffile wrote are as they were given to it. For labels the
    numbers of a palette count, for images its colours. The spacing is that of the resolution
    tags, unless these are a printer's.

    Raises:
        PolysegError: the file is damaged, too large, of unequal pages or of a kind not read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.tif"
    ...     tifffile.imwrite(path, np.zeros((5, 20, 30), np.uint16))
    ...     read_tiff(path).pixels.shape
    (5, 20, 30, 1)
    """
    with guarded(path):
        refuse_if_no_file(path)
        _refuse_tangled_tiff(path)
        with _opened_tiff(path) as file:
            series = _only_series(path, file)
            page = series.keyframe
            _refuse_misleading_tiff(path, page)
            _refuse_incomplete_tiff(path, series)
            _refuse_if_large_tiff(path, series)
            pixels = _stack_of(path, file, series, labels=labels)
            spacing = _spacing_of_tiff(page, file.imagej_metadata or {})
        return _finished(path, pixels, labels=labels, spacing=spacing)


def tiff_resolution(path: Path) -> tuple[tuple[float, float], int] | None:
    """Return pixels per unit, across and down, and the unit's number of a TIFF that was read.

    Raises:
        PolysegError: the file is damaged.
    """
    with guarded(path):
        refuse_if_no_file(path)
        _refuse_tangled_tiff(path)
        with _opened_tiff(path) as file:
            return _resolution(file.pages.first)


def encoded_sides(data: bytes) -> tuple[int, int] | None:
    """Return the height and width that a JPEG or JPEG 2000 stream will be decoded to.

    >>> encoded_sides(imagecodecs.jpeg_encode(np.zeros((20, 30), np.uint8)))
    (20, 30)
    >>> encoded_sides(b"text") is None
    True
    """
    start = data.find(b"\xff\x4f\xff\x51")
    if start >= 0 and len(data) >= start + 24:
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        return bottom - top, right - left
    return _sides_of_jpeg(data)


def _sides_of_jpeg(data: bytes) -> tuple[int, int] | None:
    at = 0
    while (at := data.find(b"\xff", at)) >= 0 and at + 9 <= len(data):
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack_from(">2H", data, at + 5)
            return height, width
        elif marker in (0xD9, 0xDA):
            return None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


# Pictures.


def _read_with_pillow(path: Path, *, keep_palette: bool) -> tuple[NDArray[Any], int]:
    """Return pixels as they are stored, (H, W) or (H, W, C), and how they lie (EXIF, 1 to 8)."""
    try:
        with Image.open(path, formats=_PILLOW_FORMATS) as image:
            if image.format in ("GIF", "PNG") and getattr(image, "is_animated", False):
                raise PolysegError(f"{path}: is animated; expected one picture a file")
            deep = image.format == "PNG" and _is_deep_colour(path)
            each = _bytes_per_pixel(image, deep=deep, keep_palette=keep_palette)
            refuse_if_large(path, (image.height, image.width), bytes_per_pixel=each)
            turned = _orientation(image)
            if deep:
                # Pillow would cut colours of 16 bit down to 8.
                return imagecodecs.png_decode(path.read_bytes()), turned
            return _copied(image, _mode_to_read(image, keep_palette=keep_palette)), turned
    except UnidentifiedImageError:
        raise ValueError(
            "cannot identify image file; expected PNG, JPEG, BMP or GIF, as its name says"
        ) from None


def _bytes_per_pixel(image: Image.Image, *, deep: bool, keep_palette: bool) -> int:
    """Return what a pixel takes while a picture is decoded, of which nothing is decoded yet."""
    if deep:
        return 8
    # Runs of a BMP are decoded to two copies besides, before any of them is looked at.
    if image.format == "BMP" and image.info.get("compression", 0) in (1, 2):
        return 12
    if image.mode == "P" and keep_palette:
        return 1
    return {"1": 1, "L": 1, "I;16": 2}.get(image.mode, 4)


def _mode_to_read(image: Image.Image, *, keep_palette: bool) -> str:
    """Return Pillow's mode for the pixels: colours are RGB, palettes of grays are gray."""
    if image.mode != "P":
        return "RGB" if image.mode in _COLOUR_MODES else image.mode
    colours = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
    gray = bool((colours == colours[:, :1]).all())
    # A GIF has no gray but by a palette, which says nothing else.
    if keep_palette and not (gray and image.format == "GIF"):
        return "P"
    return "L" if gray else "RGB"


def _is_deep_colour(path: Path) -> bool:
    with path.open("rb") as stream:
        header = stream.read(26)
    return len(header) == 26 and header[24] == 16 and header[25] in (2, 4, 6)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # What cannot be understood is shown as stored, as programs do.
        return 1


def _copied(image: Image.Image, mode: str) -> NDArray[Any]:
    """Copy strip by strip: at once, Pillow would hold everything two more times."""
    rows = max(1, _STRIP // image.width)
    strips = (
        image.crop((0, top, image.width, min(image.height, top + rows)))
        for top in range(0, image.height, rows)
    )
    pixels: NDArray[Any] | None = None
    for k, strip in enumerate(strips):
        part = np.asarray(strip if strip.mode == mode else strip.convert(mode))
        if part.dtype == bool:  # Pillow's are 0 and 255.
            part = part.view(np.uint8) > 0
        if pixels is None:
            pixels = np.empty((image.height, *part.shape[1:]), part.dtype)
        pixels[k * rows : k * rows + len(part)] = part
    assert pixels is not None
    return pixels


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn pixels, (H, W, ...), as the orientation of EXIF and TIFF says."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _finished(
    path: Path,
    pixels: NDArray[Any],
    *,
    labels: bool,
    spacing: tuple[float, float] | None = None,
) -> Stack:
    """Make a stack of pixels, (N, H, W, C)."""
    if labels:
        return Stack(label_pixels(path, one_channel(path, pixels)), spacing)
    return Stack(image_pixels(path, np.ascontiguousarray(pixels)), spacing)


def one_channel(path: Path, pixels: NDArray[Any]) -> NDArray[Any]:
    """Return the one channel, (N, H, W), of labels, (N, H, W, C), that have equal ones.

    Raises:
        PolysegError: they differ.
    """
    for channel in range(1, pixels.shape[3]):
        if not np.array_equal(pixels[..., channel], pixels[..., 0]):
            raise PolysegError(f"{path}: is a colour image; a mask has one channel")
    return np.ascontiguousarray(pixels[..., 0])


# TIFF.


def _opened_tiff(path: Path) -> Any:
    return tifffile.TiffFile(path, **{f"is_{kind}": False for kind in _FOREIGN_KINDS})


def _refuse_tangled_tiff(path: Path) -> None:
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
                raise PolysegError(f"{path}: a page has {count} pages of its own; remove them")
        if values > size:
            raise PolysegError(f"{path}: is damaged: its tags are longer than the file")


def _directories(path: Path) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """Yield where each directory lies and its tags: code, type and count."""
    with path.open("rb") as stream:
        start = stream.read(16)
        order = "<" if start[:2] == b"II" else ">"
        if len(start) < 8 or start[:2] not in (b"II", b"MM"):
            return
        big = struct.unpack_from(f"{order}H", start, 2)[0] == 43
        number, pointer, entry = ("Q", "Q", "HHQQ") if big else ("H", "I", "HHII")
        number, pointer, entry = order + number, order + pointer, order + entry
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
    # Pages of half the size are levels of one series to tifffile; pages that say so are no images.
    levels = [level for one in file.series for level in one.levels]
    series = [one for one in levels if not one.keyframe.is_reduced] or levels
    if len(series) != 1:
        sizes = ", ".join(" x ".join(map(str, one.shape)) for one in series[:4])
        raise PolysegError(
            f"{path}: holds {len(series)} images of different kinds ({sizes}); "
            "save each as a file of its own"
        )
    if any(page is None for page in series[0].pages):
        raise PolysegError(f"{path}: is damaged: not all of its pages are there")
    return series[0]


def _refuse_misleading_tiff(path: Path, page: Any) -> None:
    """Raise where pixels would not mean what they seem to."""
    if page.compression not in _COMPRESSIONS:
        kind = getattr(page.compression, "name", page.compression)
        raise PolysegError(
            f"{path}: TIFF compression {kind} is not read; save it with LZW, Deflate or none"
        )
    as_shown = page.photometric in (
        PHOTOMETRIC.MINISBLACK,
        PHOTOMETRIC.MINISWHITE,
        PHOTOMETRIC.RGB,
        PHOTOMETRIC.PALETTE,
    )
    # The decoder of JPEG makes RGB of it.
    converted = page.photometric == PHOTOMETRIC.YCBCR and page.compression == COMPRESSION.JPEG
    white = page.photometric == PHOTOMETRIC.MINISWHITE
    if not (as_shown or converted) or (white and str(page.dtype) not in _UNSIGNED):
        kind = getattr(page.photometric, "name", page.photometric)
        raise PolysegError(
            f"{path}: a TIFF of kind {kind} is not read; save it as gray (0 is black) or RGB"
        )


_UNSIGNED = ("bool", "uint8", "uint16")


def _refuse_incomplete_tiff(path: Path, series: Any) -> None:
    """Raise where strips or tiles are missing, shared, or decode to more than their place."""
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
        _refuse_outgrown_jpeg(path, series)


def _refuse_outgrown_jpeg(path: Path, series: Any) -> None:
    """Raise where the JPEG of a strip or tile is larger than this is said to be."""
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
    # tifffile writes bits so, whatever is foreground in them.
    raw_bits = stack.dtype == bool and str(page.software).startswith("tifffile")
    if page.photometric == PHOTOMETRIC.MINISWHITE and not raw_bits:
        stack = ~stack
    if page.photometric == PHOTOMETRIC.PALETTE and not labels:
        stack = _coloured(path, stack, page.colormap)
    turned = _orientation_of_tiff(page)
    return stack if turned == 1 else np.stack([_upright(one, turned) for one in stack])


def _with_ome_axes(page: Any, pixels: NDArray[Any], axes: str) -> tuple[NDArray[Any], str]:
    """Tell channels from slices among the pages of an OME-TIFF, as its one `Pixels` says."""
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
    colours = 1 if page.photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE) else 3
    # A fourth sample beside RGB is alpha, whether it says so or not.
    undeclared = colours == 3 and page.samplesperpixel == 4
    declared = sum(int(kind) in (1, 2) for kind in page.extrasamples)
    kept = page.samplesperpixel - max(declared, int(undeclared))
    return pixels.take(range(kept), axes.index("S")) if kept < page.samplesperpixel else pixels


def _slices(pixels: NDArray[Any], axes: str) -> NDArray[Any]:
    """Bring pixels of any axes to (N, H, W, C)."""
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
    value = page.tags.valueof(_ORIENTATION, 1)
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
    """Return millimetres between rows and columns, if somebody measured them."""
    found = _resolution(page)
    if found is None:
        return None
    (across, down), number = found
    name = str(imagej.get("unit", "")).replace("\\u00B5", "µ")
    unit = _MILLIMETRES.get(name) or {2: 25.4, 3: 10.0}.get(number)
    if unit is None or (not name and _is_printed(across * 25.4 / unit)):
        return None
    spacing = unit / down, unit / across
    return spacing if all(1e-6 <= one <= 20 for one in spacing) else None


def _is_printed(dots_per_inch: float) -> bool:
    return any(abs(dots_per_inch / usual - 1) < 0.01 for usual in _PRINTERS)


# What others still import from here.


def read_image(path: Path) -> Pixels:
    """Read an image as (H, W) gray or (H, W, 3) RGB, uint8 or uint16; alpha is dropped.

    Raises:
        PolysegError: the file is damaged, too large or of a kind that is not read.
    """
    pixels = _one_slice(path, labels=False)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise PolysegError(f"{path}: has {pixels.dtype} pixels; expected 8 or 16 bit without sign")
    if pixels.shape[2] not in (1, 3):
        raise PolysegError(f"{path}: has shape {pixels.shape}; expected gray or RGB")
    return cast(Pixels, pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def read_mask(path: Path, foreground: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
    """Read a mask as (H, W) of 0 and 1.

    Args:
        path: the file; RGB is taken where its channels are equal.
        foreground: label values that count; None expects 0/1 or 0/255 (0/65535).

    Raises:
        PolysegError: the file is damaged, or holds other values: they are named.
    """
    pixels = _one_slice(path, labels=True)
    if foreground is not None:
        return np.isin(pixels, foreground).astype(np.uint8)
    values = np.unique(pixels)
    high = next((v for v in (1, 255, 65535) if set(values.tolist()) <= {0, v}), None)
    if high is None:
        shown = ", ".join(str(value) for value in values[:8]) + (", ..." if len(values) > 8 else "")
        raise PolysegError(
            f"{path}: a mask of values {shown}; expected 0/1 or 0/255, or say by data.foreground "
            "which values count"
        )
    return np.asarray(pixels == high, dtype=np.uint8)


def _one_slice(path: Path, *, labels: bool) -> NDArray[Any]:
    read = read_tiff if path.suffix.lower() in TIFF_SUFFIXES else read_picture
    pixels = read(path, labels=labels).pixels
    if len(pixels) != 1:
        raise PolysegError(f"{path}: has {len(pixels)} pages; expected one image a file")
    return cast(NDArray[Any], pixels[0])


def resize_image(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize (H, W) or (H, W, 3) to height and width, bilinear and without aliasing.

    >>> resize_image(np.full((8, 8), 7, np.uint8), (4, 2))
    array([[7, 7],
           [7, 7],
           [7, 7],
           [7, 7]], dtype=uint8)
    """
    if pixels.shape[:2] == size:
        return pixels
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    resized = np.stack(
        [
            _resize_plane(plane, size, Image.Resampling.BILINEAR)
            for plane in np.moveaxis(planes, 2, 0)
        ],
        axis=2,
    )
    limits = np.iinfo(pixels.dtype)
    rounded = resized.round().clip(limits.min, limits.max).astype(pixels.dtype)
    return rounded[..., 0] if pixels.ndim == 2 else rounded


def resize_mask(mask: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize a mask of 0 and 1: foreground where at least half of the area was.

    >>> resize_mask(np.eye(4, dtype=np.uint8), (2, 2))
    array([[1, 0],
           [0, 1]], dtype=uint8)
    """
    if mask.shape == size:
        return mask
    return (_resize_plane(mask, size, Image.Resampling.BOX) >= 0.5).astype(np.uint8)


def _resize_plane(
    plane: NDArray[Any], size: tuple[int, int], method: Image.Resampling
) -> NDArray[np.float32]:
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((size[1], size[0]), method))

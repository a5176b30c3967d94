"""Reading and resizing images and masks, guarded against files that are not what they seem."""

import logging
import math
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tifffile import PHOTOMETRIC

from polyseg.errors import PolysegError

# What it would say of a damaged file is said once, in the error.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

LARGEST_IMAGE = 2**26
"""Pixels; a larger file is refused before it is decoded."""

Pixels = NDArray[np.unsignedinteger[Any]]
"""8 or 16 bit."""

_COLOUR_MODES = ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV")
_TIFF = (".tif", ".tiff")
_PILLOW_FORMATS = ("PNG", "JPEG", "BMP")


def read_image(path: Path) -> Pixels:
    """Read an image as (H, W) gray or (H, W, 3) RGB, uint8 or uint16; alpha is dropped.

    Raises:
        PolysegError: the file is damaged, too large or of a kind that is not read.
    """
    pixels = _read(path)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype not in (np.uint8, np.uint16):
        raise PolysegError(f"{path}: has {pixels.dtype} pixels; expected 8 or 16 bit without sign")
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] != 3):
        raise PolysegError(f"{path}: has shape {pixels.shape}; expected gray or RGB")
    return cast(Pixels, pixels)


def read_mask(path: Path, foreground: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
    """Read a mask as (H, W) of 0 and 1.

    Args:
        path: the file; RGB is taken where its channels are equal.
        foreground: label values that count; None expects 0/1 or 0/255 (0/65535).

    Raises:
        PolysegError: the file is damaged, or holds other values: they are named.
    """
    pixels = _read(path, as_labels=True)
    if pixels.ndim == 3:
        channels = pixels[..., : max(1, pixels.shape[2] - (pixels.shape[2] in (2, 4)))]
        if (channels != channels[..., :1]).any():
            raise PolysegError(f"{path}: is a colour image; a mask has one channel")
        pixels = channels[..., 0]
    if pixels.ndim != 2:
        raise PolysegError(f"{path}: has shape {pixels.shape}; a mask is (H, W)")
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


def _read(path: Path, *, as_labels: bool = False) -> NDArray[Any]:
    if path.exists() and not path.is_file():
        raise PolysegError(f"{path}: is no file")
    try:
        if path.suffix.lower() in _TIFF:
            return _read_tiff(path)
        return _read_with_pillow(path, keep_palette=as_labels)
    except PolysegError:
        raise
    except MemoryError:
        raise PolysegError(f"{path}: does not fit into memory") from None
    except Exception as error:  # Decoders fail on damaged files in many ways, all alike to users.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise PolysegError(f"{path}: cannot be read as an image: {reason}") from None


def _read_with_pillow(path: Path, *, keep_palette: bool) -> NDArray[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # By name, because Pillow would also run Ghostscript on what it finds to be PostScript.
        with Image.open(path, formats=_PILLOW_FORMATS) as image:
            _refuse_if_large(path, image.width, image.height)
            # The palette numbers of a mask are its labels; those of an image are colours.
            colours = image.mode in _COLOUR_MODES and not (keep_palette and image.mode == "P")
            # A camera may store a picture lying on its side, and how to turn it.
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB") if colours else upright)


def _read_tiff(path: Path) -> NDArray[Any]:
    with tifffile.TiffFile(path) as file:
        if len(file.pages) != 1:
            raise PolysegError(f"{path}: has {len(file.pages)} pages; expected one image a file")
        page = file.pages[0]
        _refuse_if_large(path, page.imagelength, page.imagewidth)
        if page.samplesperpixel > 4:
            raise PolysegError(f"{path}: has {page.samplesperpixel} channels; expected gray or RGB")
        _refuse_misleading_tiff(path, page)
        pixels = page.asarray()
        return np.moveaxis(pixels, 0, 2) if page.axes == "SYX" else pixels


def _refuse_misleading_tiff(path: Path, page: Any) -> None:
    """Raise where pixels would not mean what they seem to, or are not all there."""
    if page.photometric not in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB):
        kind = getattr(page.photometric, "name", page.photometric)
        raise PolysegError(
            f"{path}: a TIFF of kind {kind} is not read; save it as gray (0 is black) or RGB"
        )
    segments = math.prod(page.chunked)
    sizes = page.databytecounts
    if len(sizes) != segments or len(page.dataoffsets) != segments or 0 in sizes:
        raise PolysegError(
            f"{path}: is damaged: not all of its {segments} strips or tiles are there"
        )


def _refuse_if_large(path: Path, *sides: int) -> None:
    if np.prod(sides, dtype=np.float64) > LARGEST_IMAGE:
        raise PolysegError(
            f"{path}: has {' x '.join(map(str, sides))} pixels; the most that is read is "
            f"{LARGEST_IMAGE:,}"
        )

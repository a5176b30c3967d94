"""Define the stack of slices that readers return, and the limits of its size."""

import contextlib
import importlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from polyseg.errors import PolysegError, reason

Plane = Literal["axial", "coronal", "sagittal"]

LARGEST_IMAGE = 2**26
"""Largest number of pixels of a slice; a larger one is refused before it is decoded."""
LONGEST_SIDE = 2**16
"""Largest side of a slice, in pixels."""
LARGEST_VOLUME = 2**29
"""Largest number of pixels of all slices of a file."""
LARGEST_DECODED = 2**31
"""Largest size of all pixels of a file, or of a series of files, in bytes."""
MOST_SLICES = 2**14
MOST_CHANNELS = 64

# A file may unpack to this many bytes, or to this multiple of its size. No real picture is packed
# to below 1 %. Volumes of labels may be, up to the limit of gzip, but unpacking larger ones only to
# find them empty would take too long.
SMALL = 2**26
RATIO = 100
SMALL_VOLUME = 2**29
VOLUME_RATIO = 1100

_IMAGE_TYPES = (np.uint8, np.uint16, np.int16, np.float32)


@dataclass(frozen=True)
class Stack:
    """The slices of a file; a 2D file has one."""

    pixels: NDArray[Any]
    """Images: (N, H, W, C), uint8, uint16, int16 or float32; labels: (N, H, W), raw values."""
    spacing: tuple[float, float] | None = None
    """Millimetres between rows and between columns of a slice, where the file says."""
    turned: int = 1
    """Orientation tag (EXIF, 1 to 8) by which the stored pixels were rotated; 1: not rotated."""


@contextlib.contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn errors of a decoder into one PolysegError, and suppress its other messages.

    >>> with guarded(Path("a.png")):
    ...     raise ValueError("broken")
    Traceback (most recent call last):
    polyseg.errors.PolysegError: a.png: cannot be read as an image: broken
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PolysegError:
        raise
    except MemoryError:
        raise PolysegError(f"{path}: does not fit into memory") from None
    except OSError as error:
        raise PolysegError(_error_line(path, reason(error))) from None
    except Exception as error:  # Decoders fail on damaged files in many ways.
        raise PolysegError(_error_line(path, str(error) or type(error).__name__)) from None


def imported(name: str, path: Path, kind: str) -> Any:
    """Return an optional library that reads a kind of file."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise PolysegError(
            f"{path}: {kind} is read by {name}, which is not installed; "
            "pip install 'polyseg[medical]'"
        ) from None


def _error_line(path: Path, why: str) -> str:
    words = " ".join(why.split())[:120].rstrip()
    shown = "".join(letter if letter.isprintable() else "?" for letter in words)
    return f"{path}: cannot be read as an image: {shown}"


def refuse_if_no_file(path: Path) -> None:
    """Raise on pipes, devices and folders, which cannot be read or could block.

    >>> refuse_if_no_file(Path("/dev/zero"))
    Traceback (most recent call last):
    polyseg.errors.PolysegError: /dev/zero: is not a file; expected an image
    """
    if path.exists() and not path.is_file():
        raise PolysegError(f"{path}: is not a file; expected an image")


def refuse_if_large(
    path: Path,
    sides: tuple[int, int],
    *,
    slices: int = 1,
    bytes_per_pixel: int = 1,
    held: int | None = None,
) -> None:
    """Refuse a file by the sizes that it declares, before anything is decoded.

    Sides are height and width; `bytes_per_pixel` is the memory that all channels of a pixel take
    during decoding, and `held` the size of all files of an image, by default that of this file.

    >>> refuse_if_large(Path("a.png"), (10**5, 10**5), held=100)
    Traceback (most recent call last):
    polyseg.errors.PolysegError: a.png: has 100000 x 100000 pixels; at most 67,108,864
    """
    height, width = sides
    if min(height, width, slices) < 1:
        raise PolysegError(f"{path}: declares {slices} slices of {height} x {width} pixels")
    if height * width > LARGEST_IMAGE:
        raise PolysegError(f"{path}: has {height} x {width} pixels; at most {LARGEST_IMAGE:,}")
    if max(sides) > LONGEST_SIDE:
        raise PolysegError(
            f"{path}: has {height} x {width} pixels; a side may have at most {LONGEST_SIDE:,}"
        )
    if slices > MOST_SLICES or slices * height * width > LARGEST_VOLUME:
        raise PolysegError(
            f"{path}: has {slices} slices of {height} x {width} pixels; at most "
            f"{MOST_SLICES:,} slices and {LARGEST_VOLUME:,} pixels; cut it into parts"
        )
    held = path.stat().st_size if held is None else held
    packed = min(VOLUME_RATIO * held, SMALL_VOLUME) if slices > 1 else 0
    decoded = slices * height * width * bytes_per_pixel
    most = max(SMALL, RATIO * held, packed)
    if decoded > LARGEST_DECODED:
        raise PolysegError(
            f"{path}: takes {decoded:,} bytes in memory; at most "
            f"{LARGEST_DECODED:,}; cut it into parts"
        )
    if decoded > most:
        raise PolysegError(
            f"{path}: would unpack {held:,} bytes to {decoded:,}; at most {most:,} are allowed; "
            "save it with less compression if it is not damaged"
        )


def refuse_other_shape(path: Path, expected: Sequence[int], values: NDArray[Any]) -> None:
    """Raise if values to write for a file differ in shape from its slices."""
    if tuple(expected) != values.shape:
        shown, found = (" x ".join(map(str, shape)) for shape in (expected, values.shape))
        raise PolysegError(f"{path}: has slices of {shown}; the values to write have {found}")


def image_pixels(path: Path, pixels: NDArray[Any]) -> NDArray[Any]:
    """Convert pixels of any number type to uint8, uint16, int16 or float32 without loss.

    Integers of more bits become 16 bit where all fit, else float32; bits become 0 and 255.

    Raises:
        PolysegError: they are complex, records or not finite, or have over 64 channels.

    >>> image_pixels(Path("a.tif"), np.array([[[[-5], [300]]]], np.int64)).dtype
    dtype('int16')
    """
    if pixels.shape[-1] > MOST_CHANNELS:
        raise PolysegError(f"{path}: has {pixels.shape[-1]} channels; at most {MOST_CHANNELS}")
    pixels = _native(path, pixels)
    if pixels.dtype == bool:
        return pixels.view(np.uint8) * np.uint8(255)
    if pixels.dtype in _IMAGE_TYPES:
        return pixels
    if pixels.dtype.kind in "iu":
        return pixels.astype(_first_fitting_type(pixels, (np.int16, np.uint16)) or np.float32)
    with np.errstate(over="ignore"):
        return _native(path, pixels.astype(np.float32))


def label_pixels(path: Path, pixels: NDArray[Any]) -> NDArray[Any]:
    """Convert labels to integers if all are within 0.001 of one; otherwise keep fractions.

    An array of floats may be overwritten.

    Raises:
        PolysegError: they are complex, records or not finite.

    >>> label_pixels(Path("a.nii"), np.array([[[0, 1.0004]]]))
    array([[[0, 1]]], dtype=int32)
    """
    pixels = _native(path, pixels)
    if pixels.dtype == bool:
        return pixels.view(np.uint8)
    if pixels.dtype.kind in "iu":
        return pixels
    near = all((abs(one - np.rint(one)) <= 1e-3).all() for one in pixels)
    if not near or _first_fitting_type(pixels, (np.int32,)) is None:
        return pixels.astype(np.float32, copy=False)
    # In the same memory where possible, because a volume of labels may be large.
    reused = pixels.dtype == np.float32 and pixels.flags.writeable
    rounded = pixels.view(np.int32) if reused else np.empty(pixels.shape, np.int32)
    for k, one in enumerate(pixels):
        rounded[k] = np.rint(one)
    return rounded


def whole_numbers(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return float64 as int16 if all values are whole and fit, other pixels unchanged.

    >>> whole_numbers(np.array([[1.0, -7.0]])).dtype, whole_numbers(np.array([[0.5]])).dtype
    (dtype('int16'), dtype('float64'))
    """
    kind = _first_fitting_type(pixels, (np.int16,)) if pixels.dtype == np.float64 else None
    if kind is None or not all(np.array_equal(one, np.rint(one)) for one in pixels):
        return pixels
    return pixels.astype(kind)


def _native(path: Path, pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.dtype.kind not in "biuf":
        raise PolysegError(f"{path}: holds {pixels.dtype} pixels; expected integers or floats")
    # min and max are NaN if any value is; isfinite of all values would make a copy.
    if pixels.dtype.kind == "f" and not (np.isfinite(pixels.min()) and np.isfinite(pixels.max())):
        raise PolysegError(f"{path}: holds NaN or infinite values; replace them by numbers")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _first_fitting_type(pixels: NDArray[Any], kinds: tuple[type[np.integer[Any]], ...]) -> Any:
    """Return the first type whose range holds all values, or None."""
    low, high = pixels.min(), pixels.max()
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return kind
    return None

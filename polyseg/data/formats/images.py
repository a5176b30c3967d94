"""Read PNG, JPEG, BMP, GIF and WebP, with protection against malicious files."""

import struct
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from polyseg.config.label_values import COLOUR
from polyseg.data.formats.stacks import (
    Stack,
    guarded,
    image_pixels,
    label_pixels,
    refuse_if_large,
)
from polyseg.errors import PolysegError

_COLOUR_MODES = ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV")
# Named, because Pillow would otherwise open PostScript files too, by running Ghostscript.
_PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
_STRIP = 2**20
ORIENTATION_TAG = 0x0112


def read_picture(path: Path, *, labels: bool = False) -> Stack:
    """Read PNG, JPEG, BMP, GIF or WebP as a stack of one slice; alpha is dropped.

    Images and masks are rotated by their orientation tag (EXIF). Of a palette, labels are the
    indices (in a gray GIF the grays), images the colours. Dots per inch are not used as spacing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.png"
    ...     Image.new("RGB", (30, 20)).save(path)
    ...     read_picture(path).pixels.shape
    (1, 20, 30, 3)
    """
    with guarded(path):
        pixels, turned = _read_with_pillow(path, keep_palette=labels)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.shape[2] in (2, 4):
            if labels:
                _refuse_if_only_transparent(path, pixels)
            pixels = pixels[..., :-1]
        return as_stack(path, upright(pixels, turned)[None], labels=labels, turned=turned)


def _refuse_if_only_transparent(path: Path, pixels: NDArray[Any]) -> None:
    """Raise on a mask, (H, W, C), of one colour, which is drawn by its transparency."""
    colours, alpha = pixels[..., :-1], pixels[..., -1]
    if (colours == colours[:1, :1]).all() and alpha.min() != alpha.max():
        raise PolysegError(
            f"{path}: has one colour and differs only in transparency, which is dropped; save the "
            "mask as gray"
        )


def encoded_sides(data: bytes) -> tuple[int, int] | None:
    """Return the height and width of a JPEG or JPEG 2000 stream.

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


def _read_with_pillow(path: Path, *, keep_palette: bool) -> tuple[NDArray[Any], int]:
    """Return stored pixels, (H, W) or (H, W, C), and their orientation tag (EXIF, 1 to 8)."""
    try:
        with Image.open(path, formats=_PILLOW_FORMATS) as image:
            if image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False):
                raise PolysegError(f"{path}: is animated; expected one picture per file")
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
            "cannot identify image file; expected PNG, JPEG, BMP, GIF or WebP, as its name says"
        ) from None


def _bytes_per_pixel(image: Image.Image, *, deep: bool, keep_palette: bool) -> int:
    """Return the bytes that a pixel takes during decoding."""
    if deep:
        return 8
    # A run-length encoded BMP is decoded to two more copies.
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
    # A gray GIF stores gray values by a palette, whose indices have no meaning.
    if keep_palette and not (gray and image.format == "GIF"):
        return "P"
    return "L" if gray else "RGB"


def _is_deep_colour(path: Path) -> bool:
    with path.open("rb") as stream:
        header = stream.read(26)
    return len(header) == 26 and header[24] == 16 and header[25] in (2, 4, 6)


def _orientation(image: Image.Image) -> int:
    try:
        value = int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # With a damaged tag the picture is taken as stored, as viewers do.
        return 1
    return value if 1 <= value <= 8 else 1


def _copied(image: Image.Image, mode: str) -> NDArray[Any]:
    """Copy strip by strip, because Pillow would otherwise need twice the memory."""
    rows = max(1, _STRIP // image.width)
    pixels: NDArray[Any] | None = None
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        part = np.asarray(strip if strip.mode == mode else strip.convert(mode))
        if part.dtype == bool:  # Pillow's are 0 and 255.
            part = part.view(np.uint8) > 0
        if pixels is None:
            pixels = np.empty((image.height, *part.shape[1:]), part.dtype)
        pixels[top : top + rows] = part
    assert pixels is not None
    return pixels


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn pixels, (H, W, ...), as the orientation of EXIF and TIFF says.

    >>> upright(np.array([[1, 2, 3]]), 6)
    array([[1],
           [2],
           [3]])
    """
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def as_stack(
    path: Path,
    pixels: NDArray[Any],
    *,
    labels: bool,
    spacing: tuple[float, float] | None = None,
    turned: int = 1,
) -> Stack:
    """Return a stack of pixels, (N, H, W, C), of images or labels.

    `turned` is the orientation tag (EXIF) by which they were turned.
    """
    if labels:
        return Stack(label_pixels(path, one_channel(path, pixels)), spacing, turned)
    return Stack(image_pixels(path, np.ascontiguousarray(pixels)), spacing, turned)


def as_stored(stack: Stack) -> Stack:
    """Return a stack as its file holds it, not turned by the orientation tag.

    >>> turned = upright(np.array([[1, 2, 3]]), 6)
    >>> as_stored(Stack(turned[None], turned=6)).pixels
    array([[[1, 2, 3]]])
    """
    # Only the two quarter turns are not their own inverse.
    back = {6: 8, 8: 6}.get(stack.turned, stack.turned)
    spacing = stack.spacing
    if spacing is not None and back >= 5:
        spacing = spacing[1], spacing[0]
    return Stack(np.stack([upright(one, back) for one in stack.pixels]), spacing)


def one_channel(path: Path, pixels: NDArray[Any]) -> NDArray[Any]:
    """Return labels, (N, H, W, C) with equal channels, as one channel, (N, H, W).

    Colours of 8 bit become numbers, COLOUR + 65536 R + 256 G + B.
    """
    for channel in range(1, pixels.shape[3]):
        if not np.array_equal(pixels[..., channel], pixels[..., 0]):
            if pixels.shape[3] == 3 and pixels.dtype == np.uint8:
                weights = np.array([2**16, 2**8, 1], np.int32)
                return np.asarray(COLOUR + (pixels * weights).sum(axis=3, dtype=np.int32))
            raise PolysegError(f"{path}: is a colour image; a mask has one channel")
    return np.ascontiguousarray(pixels[..., 0])

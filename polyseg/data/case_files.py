"""Read the files of a case: the channels and masks of an image, or of the slices of a volume."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from polyseg.config import DataConfig
from polyseg.data.formats.images import as_stored
from polyseg.data.formats.readers import read_image_stack, read_label_stack
from polyseg.data.formats.stacks import Stack
from polyseg.data.layouts.cases import Case
from polyseg.data.masks import to_masks, unite
from polyseg.data.pixel_store import DTYPES, Image, Masks
from polyseg.data.preprocessing import as_gray
from polyseg.errors import PolysegError


def read_case(case: Case, config: DataConfig) -> Iterator[tuple[str, Image, Masks | None, Any]]:
    """Yield id, pixels (H, W, C), masks (K, H, W) and spacing of each slice of a case, as read.

    Raises:
        PolysegError: a file cannot be read, or the sizes of the case's files differ.
    """
    stacks = [read_image_stack(path, config.plane) for path in case.images]
    # A picture has no axes, so the axes of a volume's header would turn its mask.
    stored = stacks[0].spacing is None
    labels = [read_label_stack(path, config.plane, stored=stored) for path in case.masks or ()]
    stacks, labels = _of_one_orientation(case, stacks, labels, config)
    first = stacks[0].pixels.shape
    for path, stack in zip(case.images, stacks, strict=True):
        if stack.pixels.shape[:3] != first[:3]:
            raise PolysegError(
                f"{path}: is {_size_text(stack.pixels.shape[:3])}, {case.images[0]} "
                f"{_size_text(first[:3])}; the channels of an image must have the same size"
            )
    pixels = np.concatenate([stack.pixels for stack in stacks], axis=3)
    if pixels.dtype.name not in DTYPES:
        pixels = pixels.astype(np.float32)
    if config.channels == "gray":
        pixels = as_gray(pixels)
    masks = _masks_of(case, labels, config, pixels.shape[:3])
    for k, image in enumerate(pixels):
        identity = case.id if len(pixels) == 1 else f"{case.id}#{k:03d}"
        yield identity, image, None if masks is None else masks[k], stacks[0].spacing


def _of_one_orientation(
    case: Case, images: list[Stack], labels: list[Stack], config: DataConfig
) -> tuple[list[Stack], list[Stack]]:
    """Return images and labels, rotated by their orientation tags (EXIF) or as stored."""
    if config.orientation == "stored":
        return list(map(as_stored, images)), list(map(as_stored, labels))
    for path, label in zip(case.masks or (), labels, strict=True):
        image, sides = images[0], slice(1, 3)
        alike = label.turned == image.turned or config.orientation == "tag"
        fits = image.pixels.shape[sides] == label.pixels.shape[sides]
        stored = [as_stored(one).pixels.shape[sides] for one in (image, label)]
        if not alike and (stored[0] == stored[1] or not fits):
            raise PolysegError(
                f"{case.images[0]}: has the orientation tag {image.turned} (EXIF), its mask "
                f"{path.name} {label.turned}; set data.orientation=stored if masks were drawn on "
                "the pixels as stored, or =tag if they were drawn on the rotated image"
            )
    return images, labels


def _masks_of(
    case: Case, labels: Sequence[Stack], config: DataConfig, shape: tuple[int, ...]
) -> Masks | None:
    """Return (N, K, H, W), or None for a case without masks."""
    if case.masks is None:
        return None
    count, height, width = shape
    foreground = list(config.tasks.values()) or None
    if not case.masks:
        return np.zeros((count, len(config.labels), height, width), dtype=np.uint8)
    masks = []
    for path, label in zip(case.masks, labels, strict=True):
        if label.pixels.shape != shape:
            raise PolysegError(
                f"{path}: is {_size_text(label.pixels.shape)}, its image {case.images[0].name} "
                f"{_size_text(shape)}; they must have the same size"
            )
        masks.append(to_masks(label.pixels, path, foreground))
    return masks[0] if len(masks) == 1 else unite(masks)


def _size_text(shape: Sequence[int]) -> str:
    """Return "4 x 3" for one slice, "2 slices of 4 x 3" for several."""
    count, height, width = shape
    return f"{height} x {width}" if count == 1 else f"{count} slices of {height} x {width}"

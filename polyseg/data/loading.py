"""Find, read and resize the images of a data set, and keep them in memory or on disk."""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyseg.config import DataConfig
from polyseg.data.case_files import read_case
from polyseg.data.dataset import ImageSet, Item, image_set, item_of, make_demo
from polyseg.data.formats.readers import read_image_stack
from polyseg.data.groups import with_groups
from polyseg.data.image_cache import (
    MEGABYTE,
    cache_folder,
    cache_key,
    item_from_row,
    remove_stale,
    remove_unused,
)
from polyseg.data.layouts.cases import Case, Layout
from polyseg.data.layouts.find_cases import find_cases, holds_masks
from polyseg.data.layouts.unlabelled import find_unlabelled
from polyseg.data.masks import UnclearValuesError, lines_about_unclear
from polyseg.data.pixel_store import (
    DiskStore,
    Image,
    Masks,
    MemoryStore,
    Store,
    index_of,
    writing_store,
)
from polyseg.data.preprocessing import (
    auto_size,
    kept_foreground,
    resize_image,
    resize_mask,
    sides_of,
)
from polyseg.errors import PolysegError
from polyseg.records import Progress, no_progress

log = logging.getLogger(__name__)

_MOST_PROBLEMS = 50
_FEWEST_MERGED = 4
"""Smallest number of files with the same problem that share one line."""
_SAMPLED = 101
_SMALL_LOSS = 0.03


@dataclasses.dataclass(frozen=True)
class ReadImage:
    """An image that was read and resized."""

    item: Item
    image: Image
    masks: Masks | None


def load_images(config: DataConfig, progress: Progress = no_progress) -> ImageSet:
    """Read the images and masks that the settings name, or make the demo's phantoms.

    Raises:
        PolysegError: there are problems with them; one line for each.
    """
    if config.path == "demo":
        return make_demo(config)
    layout = found_cases(config)
    config = settled(config, layout)
    log.info("%s: %s", config.path, layout.name)
    for note in layout.notes:
        log.info("%s", note)
    if len(layout.labels) > 1 and config.foreground is None:
        named = ", ".join(f"{name}: {value}" for name, value in layout.labels.items())
        log.info("labels of %s; data.foreground={%s} segments each of them", config.path, named)
    cases, line = grouped(layout.cases, config)
    if line:
        log.warning("%s", line)
    images = read_cases(cases, config, progress, problems=layout.problems)
    _log_images(images, config)
    return images


def found_cases(config: DataConfig) -> Layout:
    """Return the cases that the settings name."""
    names = ("layout", "images", "masks", "unmasked")
    return find_cases(Path(config.path), **{name: getattr(config, name) for name in names})


def grouped(cases: Sequence[Case], config: DataConfig) -> tuple[list[Case], str]:
    """Return cases with the groups that data.group=auto finds, and a line about them or ""."""
    if config.group != "auto":
        return list(cases), ""
    found, guess = with_groups(cases, config.split_file is not None)
    return found, "" if guess is None else guess.line(len(found))


def settled(config: DataConfig, layout: Layout | None = None) -> DataConfig:
    """Return the settings with values from the data: data.size for auto, and regions as labels.

    A run records them, and predictions of other images use them.
    """
    auto = config.size == "auto"
    if config.path == "demo":
        return config.model_copy(update={"size": 128}) if auto else config
    layout = layout or found_cases(config)
    changes: dict[str, Any] = {}
    if layout.regions and config.foreground is None:
        changes["foreground"] = dict(layout.regions)
        log.info("%s: labels are the regions of dataset.json: %s", config.path, layout.regions)
    if auto:
        changes["size"] = _auto_size(layout.cases, config)
    return config.model_copy(update=changes)


def _auto_size(cases: Sequence[Case], config: DataConfig) -> tuple[int, int]:
    """Return the median image size of at most 101 cases at even distances."""
    sizes = []
    for case in cases[:: -(-len(cases) // _SAMPLED)] if cases else ():
        with contextlib.suppress(PolysegError):  # It is reported when all images are read.
            sizes.append(read_image_stack(case.images[0], config.plane).pixels.shape[1:3])
    return auto_size(sizes) if sizes else (128, 128)


def load_others(
    path: Path, config: DataConfig, channels: int, progress: Progress = no_progress
) -> ImageSet:
    """Read other images, with masks if they have them, for a network with `channels` channels."""
    config = config.model_copy(
        update={"path": str(path), "layout": "auto", "images": None, "masks": None}
    )
    if holds_masks(path):
        layout = find_cases(path, unmasked=config.unmasked)
        images = read_cases(layout.cases, config, progress, channels, layout.problems)
    else:
        images = read_cases(find_unlabelled([path]), config, progress, channels)
    _log_images(images, config)
    return images


def read_cases(
    cases: Sequence[Case],
    config: DataConfig,
    progress: Progress = no_progress,
    channels: int | None = None,
    problems: Sequence[str] = (),
) -> ImageSet:
    """Read cases; if `channels` is None and some images are RGB, all become RGB.

    Images stay in memory up to `data.memory`; larger sets go to a file in `data.cache`.

    Raises:
        PolysegError: there are problems; one line for each, after the given `problems`.
    """
    found = list(problems)
    if config.size == "auto":
        config = config.model_copy(update={"size": _auto_size(cases, config)})
    items, store = _store(cases, config, _samples(cases, config, found, progress), found)
    images = image_set(items, store, config, channels)
    return dataclasses.replace(images, read_original=_OriginalReader(cases, config))


class _OriginalReader:
    """Function that reads an image and its masks from their files again, volume by volume."""

    def __init__(self, cases: Sequence[Case], config: DataConfig) -> None:
        self.cases, self.config = {case.id: case for case in cases}, config
        self.last: dict[str, tuple[Image, Masks | None]] = {}

    def __call__(self, identity: str) -> tuple[Image, Masks | None]:
        """Return (H, W, C) and (K, H, W), by the id of the image."""
        if identity not in self.last:
            case = self.cases.get(identity) or self.cases[identity.rpartition("#")[0]]
            self.last = {}  # Free the memory of the last volume before the next is read.
            slices = read_case(case, self.config)
            self.last = {name: (pixels, masks) for name, pixels, masks, _ in slices}
        return self.last[identity]


def scan_cases(
    cases: Sequence[Case],
    config: DataConfig,
    progress: Progress = no_progress,
    problems: Sequence[str] = (),
) -> list[Item]:
    """Read cases and return facts about the images, without keeping pixels."""
    found = list(problems)
    items = [sample.item for sample in _samples(cases, config, found, progress)]
    _raise_merged(found)
    return items


def _samples(
    cases: Sequence[Case], config: DataConfig, problems: list[str], progress: Progress
) -> Iterator[ReadImage]:
    """Yield the samples of all cases that can be read, and add the others to `problems`."""
    unclear: list[UnclearValuesError] = []
    for done, case in enumerate(cases, start=1):
        try:
            slices = list(read_case(case, config))
            for identity, pixels, masks, spacing in slices:
                yield _prepare(identity, pixels, masks, spacing, case, config, len(slices) > 1)
        except UnclearValuesError as error:
            unclear.append(error)
        except PolysegError as error:
            problems.append(str(error))
        progress("reading images", done, len(cases))
    problems += lines_about_unclear(unclear)


def _prepare(
    identity: str,
    pixels: Image,
    masks: Masks | None,
    spacing: tuple[float, float] | None,
    case: Case,
    config: DataConfig,
    sliced: bool,
) -> ReadImage:
    """Return a slice in the form in which it is stored."""
    image, kept_masks, kept = pixels, masks, None
    height, width = pixels.shape[:2]
    if config.size is not None and config.fit == "resize":
        size = sides_of(config.size)
        image = resize_image(pixels, size)
        if masks is not None:
            kept_masks = np.stack([resize_mask(mask, size) for mask in masks])
            if size[0] < height or size[1] < width:
                kept = kept_foreground(masks, kept_masks)
        if spacing is not None:
            spacing = (spacing[0] * height / size[0], spacing[1] * width / size[1])
    item = item_of(
        identity,
        pixels,
        image,
        masks,
        config,
        sliced=sliced,
        spacing=spacing,
        part=case.part,
        group=case.group or (case.id if sliced else None),
        kept=kept,
    )
    # Copies, because a view would keep the whole volume in memory.
    if sliced:
        image = image.copy()
        kept_masks = None if kept_masks is None else kept_masks.copy()
    return ReadImage(item, image, kept_masks)


def _store(
    cases: Sequence[Case], config: DataConfig, samples: Iterator[ReadImage], problems: list[str]
) -> tuple[list[Item], Store]:
    """Keep samples in memory up to data.memory; more are written to, or read from, a file."""
    bound = config.memory * MEGABYTE
    held: list[ReadImage] = []
    size = 0
    for sample in samples:
        held.append(sample)
        size += sample.image.nbytes + (0 if sample.masks is None else sample.masks.nbytes)
        if size > bound or size / len(held) * len(cases) > bound:
            _raise_merged(problems)
            return _on_disk(cases, config, held, samples, problems)
    _raise_merged(problems)
    images, masks = [sample.image for sample in held], [sample.masks for sample in held]
    return [sample.item for sample in held], MemoryStore(images, masks)


def _on_disk(
    cases: Sequence[Case],
    config: DataConfig,
    held: list[ReadImage],
    rest: Iterator[ReadImage],
    problems: list[str],
) -> tuple[list[Item], Store]:
    folder = cache_folder(config)
    path = folder / f"{cache_key(cases, config)}.images"
    remove_stale(folder)
    remove_unused(folder, keep=path)
    if not (path.is_file() and index_of(path).is_file()):
        with writing_store(path) as file:
            held.reverse()  # Popped from its end, it frees memory while the file is written.
            for sample in itertools.chain((held.pop() for _ in range(len(held))), rest):
                file.add(sample.image, sample.masks, dataclasses.asdict(sample.item))
            _raise_merged(problems)
    store = DiskStore(path)
    with contextlib.suppress(OSError):  # The file may belong to another user.
        os.utime(index_of(path))
    return [item_from_row(row, path) for row in zip(store.about, store.shapes, strict=True)], store


def _log_images(images: ImageSet, config: DataConfig) -> None:
    """Log where the images are, and which tasks none of them has."""
    count, size = len(images.items), sum(item.bytes for item in images.items) / MEGABYTE
    if isinstance(images.store, DiskStore):
        where = f"over data.memory ({config.memory} MB): read from {images.store.path}"
        log.info("%d images of %.0f MB are %s", count, size, where)
    else:
        log.info("%d images in memory, %.1f MB", count, size)
    if line := lost_foreground(images.items):
        log.warning("%s", line)
    for k, label in enumerate(images.labels if images.has_masks else ()):
        if not any(item.shares and item.shares[k] for item in images.items):
            what = f"of {label}" if label else "at all"
            log.warning("no mask has any foreground %s; see data.foreground", what)


def lost_foreground(items: Sequence[Item]) -> str:
    """Return a line if resizing loses more than 3 % of the foreground, else ""."""
    found = [(item, item.kept) for item in items if item.kept is not None and item.foreground]
    weights = [sum(item.shares or ()) * math.prod(item.original_size) for item, _ in found]
    if not found:
        return ""
    area = sum(weight * kept.area for weight, (_, kept) in zip(weights, found, strict=True))
    lost, objects = (sum(getattr(kept, name) for _, kept in found) for name in ("lost", "objects"))
    share = max(0.0, 1 - area / sum(weights))
    if max(share, lost / max(1, objects)) <= _SMALL_LOSS:
        return ""
    height, width = found[0][0].size
    return (
        f"resizing to {height} x {width} loses {lost} of {objects} objects and {100 * share:.0f} % "
        "of the foreground's area; data.fit=tile with data.size=256 keeps the images' resolution, "
        "or set a larger data.size"
    )


def _raise_merged(problems: Sequence[str]) -> None:
    if problems:
        lines = _merged([line for problem in problems for line in problem.splitlines()])
        more = len(lines) - _MOST_PROBLEMS
        raise PolysegError(*lines[:_MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else []))


def _merged(lines: Sequence[str]) -> list[str]:
    """Return lines with a single line for the same problem of many files.

    >>> _merged([f"images/{k}.png: is cut short at {k} bytes" for k in range(9)])
    ['images/0.png: is cut short at 0 bytes (so are 8 more files: 1.png, 2.png, 3.png, ...)']
    """
    alike: dict[str, list[str]] = {}
    for line in lines:
        _, colon, what = line.partition(": ")
        key = re.sub(r"\S+\.\w+|\d+", "#", what) if colon else line
        alike.setdefault(key, []).append(line)
    merged = []
    for found in alike.values():
        if len(found) < _FEWEST_MERGED:
            merged += found
            continue
        names = [Path(line.partition(": ")[0]).name for line in found[1:4]]
        more = ", ..." if len(found) > 4 else ""
        count = f"so are {len(found) - 1} more files: {', '.join(names)}{more}"
        merged.append(f"{found[0]} ({count})")
    return merged

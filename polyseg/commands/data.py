"""`polyseg data check`, `split` and `demo`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyseg.choices import MODALITIES
from polyseg.config import Config, DataConfig
from polyseg.data.dataset import ImageSet, Item, image_set, member_of
from polyseg.data.duplicates import near_pairs
from polyseg.data.layouts.draft import draft_of
from polyseg.data.loading import (
    found_cases,
    grouped,
    load_images,
    lost_foreground,
    scan_cases,
    settled,
)
from polyseg.data.new_split import new_split
from polyseg.data.pixel_store import MemoryStore
from polyseg.data.splits import PARTS, group_names, groups_of_parts, split_json
from polyseg.errors import PolysegError
from polyseg.records import Progress, no_progress
from polyseg.system.files import write_text
from polyseg.system.output_folder import refuse_existing

_SHOWN = 5


def check_data(config: Config, progress: Progress = no_progress) -> dict[str, Any]:
    """Read a whole data set as training would, and return a summary."""
    if config.data.path == "demo":
        raise PolysegError("data check: the demo has no files; give a folder or a manifest")
    layout = found_cases(config.data)
    data = settled(config.data, layout)
    cases, groups = grouped(layout.cases, data)
    items = scan_cases(cases, data, progress, problems=layout.problems)
    images = image_set(items, MemoryStore([], []), data)
    split = new_split(config.model_copy(update={"data": data}), images)
    in_split = groups_of_parts(split, [member_of(item) for item in items], data)
    notes = [*layout.notes, groups, lost_foreground(items)]
    return {
        "layout": layout.name,
        "images": len(items),
        **({"files": len(layout.cases)} if len(items) != len(layout.cases) else {}),
        **({"labels": dict(layout.labels)} if layout.labels else {}),
        **_parts_and_groups(items, data),
        "split": {part: len(ids) for part, ids in split.items()},
        **({"groups in the split": in_split} if in_split else {}),
        "sizes": _most_common("{} x {}".format(*item.original_size) for item in items),
        "size of the network's input": _input_size(images, data),
        "channels": sorted({item.channels for item in items}),
        "bits": sorted({item.bits for item in items}),
        **_spacing(items),
        **_foreground(items, data.labels),
        **_copies(items),
        **({"notes": list(filter(None, notes))} if any(notes) else {}),
    }


def make_split(
    config: Config, out: Path, progress: Progress = no_progress, *, overwrite: bool = False
) -> dict[str, Any]:
    """Split a data set by its settings, write the split to a file, and return the counts."""
    refuse_existing(out, overwrite=overwrite)
    images = load_images(config.data, progress)
    split = new_split(config, images)
    write_text(out, split_json(split, images.hashes))
    shares = {
        part: round(float(np.mean([images.item(i).foreground or 0 for i in ids])), 4)
        for part, ids in split.items()
        if ids
    }
    return {
        "file": str(out),
        "images": {part: len(split[part]) for part in PARTS},
        "foreground, mean": shares,
    }


def write_manifest(path: Path, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a draft of a CSV manifest of a folder, and return its counts."""
    if not path.is_dir():
        raise PolysegError(f"{path}: not a folder; give the folder of a data set")
    refuse_existing(out, overwrite=overwrite)
    text, images, bare = draft_of(path, out.parent)
    write_text(out, text)
    return {"file": str(out), "images": images, "images without a mask": bare}


def write_demo(path: Path, *, count: int, size: int, modality: str, seed: int) -> None:
    """Write phantoms as PNG files, with a table of their known difficulties."""
    if modality not in MODALITIES:
        raise PolysegError(f"--modality {modality}: choose {' or '.join(MODALITIES)}")
    if seed < 0:
        raise PolysegError(f"--seed {seed}: give 0 or more")
    if not (1 <= count <= 100_000 and 32 <= size <= 1024):
        raise PolysegError("--images must be from 1 to 100000, and --size from 32 to 1024")
    if count * size**2 > 2**30:
        raise PolysegError(f"--images {count} of --size {size} do not fit into memory; make fewer")
    from polyseg.data.phantoms import phantom_sets

    made = phantom_sets.make_phantoms(count, seed=seed, size=(size, size), modality=modality)
    phantom_sets.write_phantoms(path, made)


def _input_size(images: ImageSet, config: DataConfig) -> str:
    """Return the size of the network's input in training, as text."""
    if config.size is None:
        return "unchanged"
    size = [config.size] * 2 if isinstance(config.size, int) else config.size
    return " x ".join(map(str, size)) + ("" if images.tiling is None else " (tiles)")


def _parts_and_groups(items: Sequence[Item], config: DataConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if any(item.part for item in items):
        counts = Counter(item.part or "not given" for item in items)
        found["parts"] = dict(counts)
    if groups := group_names([member_of(item) for item in items], config):
        more = f" and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
        found["groups"] = f"{len(groups)} ({', '.join(groups[:_SHOWN])}{more})"
    return found


def _most_common(values: Iterable[str]) -> list[str]:
    return _first_few([f"{value} ({number})" for value, number in Counter(values).most_common()])


def _first_few(texts: list[str]) -> list[str]:
    more = len(texts) - _SHOWN
    return texts[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])


def _spacing(items: Sequence[Item]) -> dict[str, Any]:
    known = [
        (item.spacing[0] * item.size[0] / height, item.spacing[1] * item.size[1] / width)
        for item in items
        if item.spacing is not None
        for height, width in [item.original_size]
    ]
    texts = _most_common(f"{rows:.3g} x {columns:.3g}" for rows, columns in known)
    return {"spacing (mm)": texts} if texts else {}


def _foreground(items: Sequence[Item], labels: Sequence[str]) -> dict[str, Any]:
    """Return shares of foreground and numbers of empty masks for each label."""
    found: dict[str, Any] = {}
    for k, label in enumerate(labels):
        shares = np.array([item.shares[k] for item in items if item.shares is not None])
        name = f"foreground of {label}" if label else "foreground"
        low, high = (round(float(one), 4) for one in (shares.min(), shares.max()))
        found[f"{name}, mean"] = round(float(shares.mean()), 4)
        found[f"{name}, range"] = [low, high]
        found[f"empty masks of {label}" if label else "empty masks"] = int((shares == 0).sum())
    return found


def _copies(items: Sequence[Item]) -> dict[str, Any]:
    likeness = {item.id: item.likeness for item in items}
    exact = Counter(one.exact for one in likeness.values() if one.near)
    near = [
        f"{one} and {other}"
        for one, other in near_pairs(likeness)
        if likeness[one].exact != likeness[other].exact
    ]
    return {
        "copies of another image": sum(number - 1 for number in exact.values()),
        "near-duplicates": _first_few(near) or 0,
    }

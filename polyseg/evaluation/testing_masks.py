"""Test masks that other tools have written, by the rules for networks."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from polyseg.config import DataConfig
from polyseg.data.dataset import ImageSet
from polyseg.data.formats.readers import read_label_stack
from polyseg.data.layouts.cases import Folders, raise_problems, some, stem_of
from polyseg.data.masks import to_masks
from polyseg.data.splits import volume_of
from polyseg.errors import PolysegError
from polyseg.evaluation.scores import RunScores
from polyseg.evaluation.testing_networks import (
    ImagePrediction,
    ImageTest,
    MaskKeeper,
    NetworkResults,
    scores_of,
    true_masks,
)
from polyseg.metrics.image_metrics import METRICS

log = logging.getLogger(__name__)

_OF_PROBABILITIES = [name for name, one in METRICS.items() if one.of_probability]
"""Metrics that need probabilities, and are undefined for masks."""

Stack = NDArray[np.uint8]
Files = dict[str, Path]
"""Files of an image by label; "" is the label map of all labels."""


@dataclasses.dataclass(frozen=True)
class OtherMasks:
    """Folders of masks to test, and the settings for true masks if there are no runs."""

    folders: Mapping[str, Path]
    """Folders by their names in tables."""
    config: DataConfig


def measure_masks(folder: Path, test: ImageTest, config: DataConfig) -> NetworkResults:
    """Return the metrics of the masks in a folder; those that need probabilities are undefined.

    A file has the id of its image as its name: a label map, or one file for each label, as
    LABEL/ID or as ID_LABEL. If no file has just the id, any one pattern that gives a file for
    each image is taken, such as ID_seg or ID/ID_trans.

    Raises:
        PolysegError: masks are missing or of another size, none of their values is a label, or
            more than one pattern fits.
    """
    labels = test.images.labels
    files = _files_of(folder, test, config)
    keeper = MaskKeeper(test.name, labels, dict.fromkeys(labels, 0.5))
    predictions = (keeper(one) for one in _predictions(test, files, config))
    scores = [
        _without_probabilities(run) for run in scores_of(test, predictions, keeper.thresholds)
    ]
    if not any(image.predicted_pixels for run in scores for image in run.scores):
        log.warning("%s: no mask has foreground; see data.foreground", folder)
    return NetworkResults(scores, [], keeper.masks(test.processes))


def _files_of(folder: Path, test: ImageTest, config: DataConfig) -> dict[str, Files]:
    """Return the files of each image or volume, by its id; log which files belong to none."""
    there = _index(folder)
    wanted = dict.fromkeys(one if one in there else volume_of(one) for one in test.ids)
    found = {case: _files_of_case(case, there, test.images.labels) for case in wanted}
    if not any(found.values()):
        found |= _by_pattern(folder, list(wanted), there, test.images.labels)
    missing = [case for case, files in found.items() if not files]
    if missing:
        unused = _unused(folder, there, found)
        near = next((name for name in unused if missing[0] in name), next(iter(unused), None))
        held = f" (not as {near})" if near else ""
        raise PolysegError(
            f"{folder}: has no mask for {some('image', missing)}; name each mask like its image, "
            f"such as {missing[0]}.png{held}, or test fewer images by --split"
        )
    if extra := _unused(folder, there, found):
        log.warning("%s: left out %s without a tested image", folder, some("file", extra))
    return found


def _unused(folder: Path, there: Files, found: Mapping[str, Files]) -> list[str]:
    """Return the files of a folder that belong to none of the images."""
    used = {path for files in found.values() for path in files.values()}
    return [path.relative_to(folder).as_posix() for path in there.values() if path not in used]


def _index(folder: Path) -> Files:
    """Return the masks in a folder and its sub-folders by their path without suffix."""
    if not folder.is_dir():
        raise PolysegError(f"--predictions {folder}: there is no such folder")
    folders, found, problems = Folders(), Files(), []
    open_folders = [folder]
    while open_folders:
        here = open_folders.pop()
        listing = folders.list(here)
        series = folders.series(here) if here != folder else None
        paths = [here] if series is not None else list(listing.files)
        open_folders += [] if series is not None else listing.folders
        for path in paths:
            stem = path.name if path.is_dir() else stem_of(path)
            key = (path.parent / stem).relative_to(folder).as_posix()
            if key in found:
                problems.append(f"{folder}: {path.name} and {found[key].name} are masks of {key}")
            found[key] = path
    raise_problems(problems)
    return found


def _files_of_case(case: str, there: Mapping[str, Path], labels: Sequence[str]) -> Files:
    """Return the label map of a case, or a file for each label; nothing if one is missing."""
    if case in there:
        return {"": there[case]}
    found = {
        label: there.get(f"{label}/{case}") or there.get(f"{case}_{label}") for label in labels
    }
    files = {label: path for label, path in found.items() if path is not None}
    return files if len(files) == len(labels) else {}


def _by_pattern(
    folder: Path, cases: Sequence[str], there: Mapping[str, Path], labels: Sequence[str]
) -> dict[str, Files]:
    """Return a label map for each case by the one pattern of names that fits all; none without."""
    of_labels = {pattern for one in labels for pattern in (f"{one}/ID", f"ID_{one}")}
    patterns = {key.replace(cases[0], "ID") for key in there if cases[0] in key} - of_labels
    fitting = sorted(
        one for one in patterns if all(one.replace("ID", case) in there for case in cases)
    )
    if len(fitting) > 1:
        raise PolysegError(
            f"{folder}: holds several masks for each image ({', '.join(fitting)}); give a folder "
            "with one of them"
        )
    if fitting:
        log.info("%s: masks are the files named %s", folder, fitting[0])
    return {case: {"": there[one.replace("ID", case)]} for one in fitting for case in cases}


def _predictions(
    test: ImageTest, files: Mapping[str, Files], config: DataConfig
) -> Iterator[ImagePrediction]:
    """Yield the masks of each image of this process's share; a volume is read once."""
    mine = test.processes.share(test.ids)
    last, masks = "", np.zeros((0, 0, 0, 0), np.uint8)
    for done, identity in enumerate(mine, start=1):
        case = identity if identity in files else volume_of(identity)
        if case != last:
            # A picture, such as a PNG file, has no orientation that a mask's header could match.
            stored = test.images.item(identity).spacing is None
            last, masks = case, _read(files[case], test.images, config, stored=stored)
        number = 0 if case == identity else int(identity.rpartition("#")[2])
        size = test.images.item(identity).original_size
        count, height, width = masks.shape[0], *masks.shape[2:]
        if number >= count or (height, width) != size:
            raise PolysegError(
                f"{next(iter(files[case].values()))}: has {count} slices of {height} x {width}, "
                f"and {identity} is {size[0]} x {size[1]}; masks must have the size of the images"
            )
        yield ImagePrediction(
            identity, masks[number].astype(np.float32), true_masks(test, identity), {}
        )
        total = len(test.ids)
        test.progress(f"testing {test.name}", min(total, test.processes.count * done), total)


def _read(files: Files, images: ImageSet, config: DataConfig, *, stored: bool) -> Stack:
    """Return the masks of a case, (N, K, H, W) in {0, 1}."""
    if "" in files:
        labels = read_label_stack(files[""], config.plane, stored=stored).pixels
        return to_masks(labels, files[""], list(config.tasks.values()) or None)
    parts = [
        to_masks(
            read_label_stack(files[label], config.plane, stored=stored).pixels, files[label], None
        )
        for label in images.labels
    ]
    if len({part.shape for part in parts}) > 1:
        raise PolysegError(f"{next(iter(files.values()))}: the labels' masks differ in size")
    return np.concatenate(parts, axis=1)


def _without_probabilities(run: RunScores) -> RunScores:
    """Return metrics with those that need probabilities undefined."""
    undefined = dict.fromkeys(_OF_PROBABILITIES, math.nan)
    scores = [dataclasses.replace(one, values={**one.values, **undefined}) for one in run.scores]
    return dataclasses.replace(run, scores=scores, reliability=None, threshold=math.nan)

"""`polyseg predict`: write masks of images at the size, format and geometry of their files."""

import contextlib
import dataclasses
import errno
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyseg import INTENDED_USE
from polyseg.choices import UNCERTAINTIES
from polyseg.commands.outcome import Outcome
from polyseg.config import MOST_SAMPLES, DataConfig, UncertaintyConfig
from polyseg.data.dataset import ImageSet
from polyseg.data.formats.file_formats import format_of
from polyseg.data.formats.writers import write_labels, write_map
from polyseg.data.layouts.cases import Case
from polyseg.data.layouts.unlabelled import find_unlabelled
from polyseg.data.loading import read_cases
from polyseg.data.preprocessing import resize_map
from polyseg.errors import PolysegError
from polyseg.evaluation.predictions import probabilities
from polyseg.montecarlo.assessment import assess
from polyseg.networks.inference import choose_device
from polyseg.records import Assessment, Progress, no_progress
from polyseg.runs.trained_model import Model, open_model, passes_of
from polyseg.system.files import csv_table, write_text
from polyseg.system.output_folder import moved, whole_folder
from polyseg.system.process_group import PATIENCE, Processes, together

log = logging.getLogger(__name__)

_UNBOUNDED = 10**9
"""Value of data.memory, in MB, that keeps all images in memory."""
_KNOWN_BY = ("predictions.csv",)
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Rows = list[dict[str, Any]]
Maps = NDArray[np.floating]


def predict_images(
    source: Path,
    paths: Sequence[Path],
    *,
    out: Path,
    overwrite: bool = False,
    uncertainty: bool = False,
    samples: int | None = None,
    device: str = "auto",
    trust: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Segment images, and write a mask of the same size, format and geometry for each.

    An error at the end names the images that cannot be read; all others are segmented. Several
    processes share the images and write to the same folder, which all of them must see.

    Args:
        source: a checkpoint or a run.
        paths: images, and folders of images or of a DICOM series.
        out: folder for the masks, new or empty, or with `overwrite` that of earlier predictions.
        uncertainty: whether to write uncertainty maps and difficulties too.
        samples: number of passes of MC Dropout; None for that of the training.
        trust: whether code outside polyseg that the checkpoint names may run.
    """
    if samples is not None and not 2 <= samples <= MOST_SAMPLES:
        raise PolysegError(f"--samples {samples}: must be from 2 to {MOST_SAMPLES:,}")
    with contextlib.ExitStack() as stack:
        with together(choose_device(device), PATIENCE) as processes:
            model = open_model(source, device, trust)
            changes = {"samples": samples, "save_maps": True, "region": "prediction"}
            passes = passes_of(model.config, masks=False, **changes) if uncertainty else None
            cases = processes.from_leader(find_unlabelled(paths) if processes.leads else None)
            held = whole_folder(out, overwrite=overwrite, known_by=_KNOWN_BY)
            folder = processes.entered_by_leader(stack, held)
            with processes.failing_together():
                share = _predict_share(model, cases, folder, out, passes, processes, progress)
                done = list(share)
            found = processes.joined(done)
        if not processes.leads:
            return Outcome(out, [])
        problems = [one.problem for one in found if one.problem]
        files = _write_table(found, folder)
        if not files:
            raise _refusal(problems, len(cases), out)
    if problems:
        raise _refusal(problems, len(cases), out)
    return Outcome(out, moved(files, folder, out))


class _Predicted(NamedTuple):
    """The files and table rows of a case, or the reason why there are none."""

    files: list[Path]
    rows: Rows
    problem: str = ""
    """Reason why the case could not be segmented; empty if it was."""


def _write_table(found: Sequence[_Predicted], folder: Path) -> list[Path]:
    """Write predictions.csv, and return it with all masks; nothing if no image was segmented."""
    files = [path for one in found for path in one.files]
    rows = [row for one in found for row in one.rows]
    if not rows:
        return []
    table = [[*row.values(), INTENDED_USE] for row in rows]
    path = folder / "predictions.csv"
    write_text(path, csv_table([*rows[0], "intended_use"], table))
    return [*files, path]


def _predict_share(
    model: Model,
    cases: Sequence[Case],
    folder: Path,
    out: Path,
    passes: UncertaintyConfig | None,
    processes: Processes,
    progress: Progress,
) -> Iterator[_Predicted]:
    """Segment this process's share of the cases into a folder, and yield the result of each.

    Errors name the folder `out`, its name once all files are written.
    """
    for done, case in enumerate(processes.share(cases), start=1):
        try:
            yield _Predicted(*_predict_case(model, case, folder, passes))
        except PolysegError as error:
            message = str(error).replace(str(folder), str(out))
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in _NO_SPACE:  # Every image would fail.
                raise PolysegError(message) from error
            yield _Predicted([], [], message)
        progress("predicting", min(len(cases), processes.count * done), len(cases))


def _refusal(problems: Sequence[str], count: int, out: Path) -> PolysegError:
    """Return the error that names the images that could not be segmented."""
    lines = [line for problem in problems for line in problem.splitlines()]
    good = f"{count - len(problems)} of {count} images are in {out}; the others:"
    return PolysegError(good, *lines)


def _predict_case(
    model: Model, case: Case, folder: Path, passes: UncertaintyConfig | None
) -> tuple[list[Path], Rows]:
    config = model.config
    # Keep the images of one file in memory, however large it is.
    settings = config.data.model_copy(update={"memory": _UNBOUNDED})
    images = read_cases([case], settings, channels=model.checkpoint.channels)
    images = dataclasses.replace(images, levels=model.checkpoint.levels)
    shape = images.items[0].original_size
    batch_size = config.training.batch_size
    found = probabilities(model.network, images, images.ids, batch_size)
    probability = np.stack([one for _, one in found])
    source, plane = case.images[0], settings.plane
    maps = _label_maps(probability, settings, source)
    labels = {
        name: write_labels(source, written, folder, name=f"{case.id}{name}", plane=plane)
        for name, written in maps.items()
    }
    files = list(labels.values())
    assessment = None
    if passes is not None:
        batches, epoch = images.batches(images.ids, batch_size), model.checkpoint.epoch
        assessment = assess(model.network, batches, passes, seed=config.training.seed, epoch=epoch)
        for label in assessment.label_names:
            pixels = assessment.of_label(label).maps[assessment.metric]
            stack = np.stack([resize_map(one.astype(np.float32), shape) for one in pixels])
            name = "_".join(filter(None, (case.id, label, "uncertainty")))
            files.append(write_map(source, stack, folder, name=name, plane=plane))
    return files, _rows(images, maps, labels, settings, assessment)


def _label_maps(probability: Maps, config: DataConfig, source: Path) -> dict[str, NDArray[Any]]:
    """Return the label maps to write, (N, H, W), by the suffix of their file's name.

    Labels with distinct values share one map, where the most probable label of at least 0.5 wins.
    Labels that share values may overlap, and have a map each.
    """
    values = [value for task in config.tasks.values() for value in task]
    if len(values) == len(set(values)):
        firsts = config.written(_foreground_of(source)).values()
        return {"": label_map(probability, list(firsts))}
    return {
        f"_{label}": label_map(probability[:, k : k + 1], [_foreground_of(source)])
        for k, label in enumerate(config.labels)
    }


def _foreground_of(source: Path) -> int:
    """Return the value of written foreground: 255 (visible as white) in 2D files, 1 in volumes."""
    kind = format_of(source)
    return 1 if kind is not None and (kind.has_planes or kind.holds_series) else 255


def label_map(probability: Maps, values: Sequence[int]) -> NDArray[Any]:
    """Return the value of the most probable label at each pixel, or 0 if none reaches 0.5.

    Args:
        probability: (N, K, H, W).
        values: values of the K labels.

    >>> label_map(np.array([[[[0.9, 0.6, 0.1]], [[0.2, 0.7, 0.2]]]], np.float32), [1, 300])
    array([[[  1, 300,   0]]], dtype=uint16)
    """
    written = np.array([0, *values], dtype=np.uint8 if max(values) < 256 else np.uint16)
    chosen = np.where(probability.max(axis=1) >= 0.5, probability.argmax(axis=1) + 1, 0)
    return np.asarray(written[chosen])


def _rows(
    images: ImageSet,
    maps: Mapping[str, NDArray[Any]],
    files: Mapping[str, Path],
    config: DataConfig,
    assessment: Assessment | None,
) -> Rows:
    """Return the rows of predictions.csv, one for each slice and label."""
    rows = []
    values, shared = config.written(1), "" in files
    for n, identity in enumerate(images.ids):
        for k, label in enumerate(images.labels):
            name = "" if shared else f"_{label}"
            written = maps[name][n]
            mask = written == values[label] if shared and label else written > 0
            row: dict[str, Any] = {"id": identity, "file": files[name].name}
            row |= {"label": label} if label else {}
            row |= {"foreground_pixels": int(mask.sum()), "foreground": f"{mask.mean():.6g}"}
            if assessment is not None:
                i = n * len(images.labels) + k
                row |= {name: f"{assessment.scores[name][i]:.9g}" for name in UNCERTAINTIES}
            rows.append(row)
    return rows

"""The figures of a page, with their captions, from what runs left behind."""

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from polyseg.page.document import Picture
from polyseg.page.runfiles import RunFiles
from polyseg.plots.style import formatted, headed, save_figure
from polyseg.plots.training import (
    difficulty_against_dice,
    difficulty_distribution,
    epsilon_quantiles,
    training_curves,
)
from polyseg.ranks import spearman
from polyseg.records import Assessment, Schedule

_LARGEST_DRAWING = 300_000
_CAPTIONS = {
    "overlays_hardest": "the images of the greatest difficulty D in the last assessment, with mask,"
    " mean prediction and uncertainty",
    "overlays_easiest": "the images of the least difficulty D in the last assessment, with mask, "
    "mean prediction and uncertainty",
    "comparison": "a point each test image; boxes show the quartiles, whiskers reach from 5 to "
    "95 %, diamonds are means",
}


def training_picture(run: RunFiles) -> Picture:
    """Draw a run's history, which must have an epoch at least."""
    first, last = run.history[0], run.history[-1]
    losses = [formatted(row.get("train_loss", np.nan), ".3f") for row in (first, last)]
    return _drawn(
        training_curves(run.history),
        f"{run.name}: loss, overlap with the validation masks, and learning rate. Ticks at the "
        "foot are assessments of the uncertainty.",
        f"Curves of {run.name}: training loss from {losses[0]} in epoch {first['epoch']:g} to "
        f"{losses[1]} in epoch {last['epoch']:g}.",
        wide=True,
    )


def difficulty_pictures(run: RunFiles) -> list[Picture]:
    """Draw epsilon where it moved, and the difficulties where there are assessments."""
    pictures: list[Picture] = []
    for label in _labels(run):
        name = f"{run.name}, {label}" if label else run.name
        parts = [one.of_label(label) for one in run.assessments if label in one.label_names]
        if run.schedule is not None:
            pictures += _epsilon(run, run.schedule, label, name)
        if parts:
            pictures += _difficulties(parts, label, name)
    return pictures


def epsilon_of(schedule: Schedule, label: str) -> Any:
    """Return the epsilons of one label, (E, n), of all images where there are no labels.

    >>> schedule = Schedule(["a", "a"], np.array([1]), np.array([[0.0, 1.0]]), ["x", "y"])
    >>> epsilon_of(schedule, "y").tolist()
    [[1.0]]
    """
    if schedule.labels is None:
        return schedule.epsilon
    return schedule.epsilon[:, [one == label for one in schedule.labels]]


def extreme_pictures(run: RunFiles) -> list[Picture]:
    """Return the figures of training that a run keeps as files, but those that are drawn anew.

    That is those of the hardest and the easiest images, and what stands in for a damaged record.
    """
    drawn = {"curves": run.history, "epsilon": run.schedule, "difficulty": run.assessments}
    anew = tuple(f"figures/{kind}" for kind, source in drawn.items() if source)
    found = [one for one in run.pictures if one.startswith("figures") and not one.startswith(anew)]
    # The hardest first, as they are what readers look for.
    found.sort(key=lambda name: "hardest" not in name)
    return [_kept(run, name) for name in found]


def evaluation_pictures(run: RunFiles) -> list[Picture]:
    """Return the figures of an evaluation that a run keeps as files."""
    return [_kept(run, name, wide=True) for name in run.pictures if name.startswith("evaluation")]


def _kept(run: RunFiles, name: str, *, wide: bool = False) -> Picture:
    words = _CAPTIONS.get(PurePosixPath(name).stem, name)
    return Picture(
        run.pictures[name], "png", f"{run.name}: {words}.", f"{name} of {run.name}", wide
    )


def _labels(run: RunFiles) -> list[str]:
    if run.assessments:
        return run.assessments[-1].label_names
    labels = None if run.schedule is None else run.schedule.labels
    return list(dict.fromkeys(labels or [""]))


def _epsilon(run: RunFiles, schedule: Schedule, label: str, name: str) -> Iterator[Picture]:
    epsilon = np.asarray(epsilon_of(schedule, label), dtype=np.float64)
    known = epsilon[np.isfinite(epsilon)]
    if known.size == 0 or np.ptp(known) == 0:
        return
    ends = (("control.epsilon_min", known.min()), ("control.epsilon_max", known.max()))
    given = [run.settings.get(key) for key, _ in ends]
    low, high = (
        float(value) if isinstance(value, int | float) else float(reached)
        for value, (_, reached) in zip(given, ends, strict=True)
    )
    yield _drawn(
        headed(epsilon_quantiles(schedule.epochs, epsilon, limits=(low, high)), label),
        f"{name}: ε of the training images, epoch by epoch.",
        f"Quantiles of epsilon over {epsilon.shape[1]} images in {len(epsilon)} epochs, from "
        f"{formatted(known.min(), '.2f')} to {formatted(known.max(), '.2f')}.",
    )


def _difficulties(parts: list[Assessment], label: str, name: str) -> Iterator[Picture]:
    last = parts[-1]
    boxes = difficulty_distribution(
        [one.epoch for one in parts], [one.difficulty for one in parts], metric=last.metric
    )
    yield _drawn(
        headed(boxes, label),
        f"{name}: difficulty D at each assessment. Boxes show the quartiles, whiskers reach from 5 "
        "to 95 %.",
        f"Boxes of the difficulty at {len(parts)} assessments.",
    )
    if not np.isfinite(last.dice).any():
        return
    correlation = spearman(last.difficulty, 1 - last.dice)
    cloud = difficulty_against_dice(
        last.difficulty,
        last.dice,
        metric=last.metric,
        correlation=correlation,
        epoch=last.epoch,
    )
    yield _drawn(
        headed(cloud, label),
        f"{name}: Dice over difficulty D at the last assessment, a point each training image.",
        f"Dice over difficulty of {len(last.ids)} images; Spearman's correlation of D with 1 − "
        f"Dice is {formatted(correlation, '.2f')}.",
    )


def _drawn(figure: Any, caption: str, alternative: str, *, wide: bool = False) -> Picture:
    """Return a figure as SVG, or as PNG where so much is in it that SVG would be large."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # A stranger's values may leave axes without room or names without glyphs; that shows.
        warnings.simplefilter("ignore")
        (path,) = save_figure(figure, Path(folder) / "figure.svg")
        if path.stat().st_size <= _LARGEST_DRAWING:
            return Picture(path.read_bytes(), "svg", caption, alternative, wide)
        (path,) = save_figure(figure, Path(folder) / "figure.png")
        return Picture(path.read_bytes(), "png", caption, alternative, wide)

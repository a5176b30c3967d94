"""The figures of a report and their captions, from the files of runs."""

import io
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from polyseg.figures.style import formatted, headed, save_figure
from polyseg.figures.training import (
    difficulty_figures,
    epsilon_quantiles,
    training_curves,
    validation_curves,
)
from polyseg.metrics.rank_stability import spearman
from polyseg.records import Assessment, Schedule
from polyseg.report.document import Picture
from polyseg.report.run_files import EvaluationFiles, RunFiles

_LARGEST_DRAWING = 300_000
_ONE_COLUMN = 1000
"""Largest width, in pixels, of a figure file that was drawn for one column."""
_OVERLAYS = "difficulty D in the last assessment, with mask, mean prediction and uncertainty"
_LARGEST = f"the images with the largest {_OVERLAYS}"
_SMALLEST = f"the images with the smallest {_OVERLAYS}"
_OUTLINED = "mean Dice, with the outlines of mask and prediction"
_CAPTIONS = {
    "overlays_largest_d": _LARGEST,
    "overlays_smallest_d": _SMALLEST,
    # Names of version 0.1.
    "overlays_hardest": _LARGEST,
    "overlays_easiest": _SMALLEST,
    "differences": "mean differences from the baseline with 95 % bootstrap intervals over images; "
    "stars show p after Holm's method",
    "comparison": "one point for each test image; boxes show the quartiles, whiskers reach from 5 "
    "to 95 %, diamonds are means",
    "reliability": "observed share of foreground over its predicted probability, and numbers of "
    "pixels; the diagonal is perfect calibration",
    "risk_coverage": "mean risk, 1 − Dice, of the images that remain when the least certain are "
    "left out",
    "robustness": "Dice over the strength of corruption, from 0 (unchanged images) to 5 (severe)",
    "predictions_worst": f"the images with the lowest {_OUTLINED}",
    "predictions_best": f"the images with the highest {_OUTLINED}",
}
"""Captions by name of the file, in the order of the figures."""
_OF_IMAGES = re.compile(r"(predictions)(?:_\d+_(.+))?_(worst|best)", re.DOTALL)


def training_picture(run: RunFiles) -> Picture:
    """Draw the history of a run with at least one epoch."""
    first, last = run.history[0], run.history[-1]
    name = "train_loss_constant" if "train_loss_constant" in first else "train_loss"
    losses = [formatted(row.get(name, np.nan), ".3f") for row in (first, last)]
    assessed = any(row.get("assessed") == 1 for row in run.history)
    ticks = (
        " Ticks at the bottom are assessments of the uncertainty; the dashed line is E0, the first "
        "of them, after which each image has its own epsilon."
    )
    return _drawn(
        training_curves(run.history),
        f"{run.name}: loss, overlap with the validation masks, and learning rate."
        + (ticks if assessed else ""),
        f"Curves of {run.name}: training loss from {losses[0]} in epoch {first['epoch']:g} to "
        f"{losses[1]} in epoch {last['epoch']:g}.",
        wide=True,
    )


def validation_picture(runs: Sequence[RunFiles]) -> Picture:
    """Draw the validation Dice of runs with at least one epoch each in one figure."""
    best = [max(dice, default=np.nan) for dice in map(_finite_dice, runs)]
    named = (f"{run.name} {formatted(dice, '.3f')}" for run, dice in zip(runs, best, strict=True))
    return _drawn(
        validation_curves(
            [run.name for run in runs],
            [_column(run, "epoch") for run in runs],
            [_column(run, "validation_dice") for run in runs],
        ),
        "Validation Dice of all runs; circles mark the best epochs.",
        f"Curves of the validation Dice; the best: {', '.join(named)}.",
        wide=True,
    )


def difficulty_pictures(run: RunFiles) -> list[Picture]:
    """Draw epsilon where it changed, and the difficulties of the assessments."""
    pictures: list[Picture] = []
    for label in _labels(run):
        name = f"{run.name}, {label}" if label else run.name
        parts = [one for one in run.assessments if label in one.label_names]
        if run.schedule is not None:
            pictures += _epsilon(run, run.schedule, label, name)
        if parts:
            pictures += _difficulties(parts, label, name)
    return pictures


def epsilon_of(schedule: Schedule, label: str) -> Any:
    """Return the epsilons of one label, (E, n), or all of a schedule without labels.

    >>> schedule = Schedule(["a", "a"], np.array([1]), np.array([[0.0, 1.0]]), ["x", "y"])
    >>> epsilon_of(schedule, "y").tolist()
    [[1.0]]
    """
    if schedule.labels is None:
        return schedule.epsilon
    return schedule.epsilon[:, [one == label for one in schedule.labels]]


def extreme_pictures(run: RunFiles) -> list[Picture]:
    """Return the figures in a run's folder, except those that are drawn again from its records."""
    drawn = {"curves": run.history, "epsilon": run.schedule, "difficulty": run.assessments}
    anew = tuple(f"figures/{kind}" for kind, source in drawn.items() if source)
    found = [one for one in run.pictures if one.startswith("figures") and not one.startswith(anew)]
    # The largest D first.
    found.sort(key=lambda name: _kind(name)[0] not in ("overlays_largest_d", "overlays_hardest"))
    return [_kept(run, name) for name in found]


def evaluation_pictures(evaluation: EvaluationFiles) -> tuple[list[Picture], list[Picture]]:
    """Return the figures in the folder of an evaluation: those of numbers, and those of images."""
    order = list(_CAPTIONS)

    def place(name: str) -> int:
        kind = _kind(name)[0]
        return order.index(kind) if kind in order else len(order)

    names = sorted(evaluation.pictures, key=place)
    of_images = [name for name in names if _kind(name)[0].startswith("predictions")]
    of_numbers = [name for name in names if name not in of_images]
    kept = {name: _kept(evaluation, name) for name in names}
    return [kept[name] for name in of_numbers], [kept[name] for name in of_images]


def _kept(source: RunFiles | EvaluationFiles, name: str) -> Picture:
    kind, label = _kind(name)
    title = f"{source.name}, {label}" if label else source.name
    data = source.pictures[name]
    caption = f"{title}: {_CAPTIONS.get(kind, name)}."
    return Picture(data, "png", caption, f"{name} of {source.name}", _is_wide(data))


def _kind(name: str) -> tuple[str, str]:
    """Return the kind of a figure, and its label.

    >>> _kind("evaluation/predictions_2_cyst_worst.png"), _kind("comparison.png")
    (('predictions_worst', 'cyst'), ('comparison', ''))
    """
    stem = PurePosixPath(name).stem
    if not (found := _OF_IMAGES.fullmatch(stem)):
        return stem, ""
    kind, label, which = found.groups(default="")
    return f"{kind}_{which}", label


def _is_wide(data: bytes) -> bool:
    """Return whether a PNG is wider than one column, and not a stack of images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return image.width > max(_ONE_COLUMN, image.height)


def _column(run: RunFiles, name: str) -> Any:
    return np.array([row.get(name, np.nan) for row in run.history], dtype=np.float64)


def _finite_dice(run: RunFiles) -> Any:
    dice = _column(run, "validation_dice")
    return dice[np.isfinite(dice)]


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
        f"{name}: ε of the training images in each epoch.",
        f"Quantiles of epsilon over {epsilon.shape[1]} images in {len(epsilon)} epochs, from "
        f"{formatted(known.min(), '.2f')} to {formatted(known.max(), '.2f')}.",
    )


def _difficulties(assessments: Sequence[Assessment], label: str, name: str) -> Iterator[Picture]:
    figures = difficulty_figures(assessments, label)
    yield _drawn(
        figures["difficulty"],
        f"{name}: difficulty D at each assessment. Boxes show the quartiles, whiskers reach from 5 "
        "to 95 %.",
        f"Boxes of the difficulty at {len(assessments)} assessments.",
    )
    if "difficulty_dice" in figures:
        last = assessments[-1].of_label(label)
        correlation = formatted(spearman(last.difficulty, 1 - last.dice), ".2f")
        yield _drawn(
            figures["difficulty_dice"],
            f"{name}: Dice over difficulty D at the last assessment, one point for each image.",
            f"Dice over difficulty of {len(last.ids)} images; Spearman's correlation of D with "
            f"1 − Dice is {correlation}.",
        )


def _drawn(figure: Any, caption: str, alternative: str, *, wide: bool = False) -> Picture:
    """Return a figure as SVG, or as PNG if the SVG would be large."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Odd values or names in the records make matplotlib warn.
        warnings.simplefilter("ignore")
        (path,) = save_figure(figure, Path(folder) / "figure.svg")
        if path.stat().st_size <= _LARGEST_DRAWING:
            return Picture(path.read_bytes(), "svg", caption, alternative, wide)
        (path,) = save_figure(figure, Path(folder) / "figure.png")
        return Picture(path.read_bytes(), "png", caption, alternative, wide)

"""The figures of a report and their captions, from the files of runs.

A new figure is a row of figures/figures_by_name.py and needs nothing here.
"""

import io
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from polyseg.figures.figures_by_name import (
    EVALUATION_FIGURES,
    IMAGE_FIGURES,
    RUN_FIGURES,
    RunRecords,
)
from polyseg.figures.run_figures import drawn_figures
from polyseg.figures.style import ONE_COLUMN, finite_values, formatted, save_figure
from polyseg.figures.training import validation_curves
from polyseg.report.document import Picture
from polyseg.report.run_files import EvaluationFiles, RunFiles

_LARGEST_DRAWING = 300_000
_ONE_COLUMN = 1000
"""Largest width, in pixels, of a figure file that was drawn for one column."""
_OF_IMAGES = re.compile(r"(predictions)(?:_\d+_(.+))?_(worst|best)", re.DOTALL)


def run_pictures(run: RunFiles, *sources: str) -> list[Picture]:
    """Draw the figures of a run whose rows name one of these sources."""
    ends = (run.settings.get(f"control.epsilon_{end}") for end in ("min", "max"))
    low, high = (float(one) if isinstance(one, int | float) else None for one in ends)
    records = RunRecords(run.history, run.schedule, run.assessments, (low, high))
    names = [row.name for row in RUN_FIGURES.values() if row.source in sources]
    return [
        _drawn(
            drawn.figure,
            f"{run.name}, {label}: {drawn.caption}" if label else f"{run.name}: {drawn.caption}",
            drawn.alternative,
            wide=drawn.figure.get_figwidth() > ONE_COLUMN,
        )
        for _, label, drawn in drawn_figures(records, names)
    ]


def validation_picture(runs: Sequence[RunFiles]) -> Picture:
    """Draw the validation Dice of runs with at least one epoch each in one figure."""
    curves = [_column(run, "validation_dice") for run in runs]
    best = [max(finite_values(dice), default=np.nan) for dice in curves]
    named = (f"{run.name} {formatted(dice, '.3f')}" for run, dice in zip(runs, best, strict=True))
    return _drawn(
        validation_curves(
            [run.name for run in runs],
            [_column(run, "epoch") for run in runs],
            curves,
        ),
        "Validation Dice of all runs; circles mark the best epochs.",
        f"Curves of the validation Dice; the best: {', '.join(named)}.",
        wide=True,
    )


def extreme_pictures(run: RunFiles) -> list[Picture]:
    """Return the figures in a run's folder, except those that are drawn again from its records."""
    rows = RUN_FIGURES.values()
    redrawn = tuple(f"figures/{row.name}" for row in rows if getattr(run, row.source))
    names = [one for one in run.pictures if one.startswith("figures")]
    found = [one for one in names if not one.startswith(redrawn)]
    # Show the figure of the largest D first.
    found.sort(key=lambda name: _kind(name)[0] not in ("overlays_largest_d", "overlays_hardest"))
    return [_kept(run, name) for name in found]


def evaluation_pictures(evaluation: EvaluationFiles) -> tuple[list[Picture], list[Picture]]:
    """Return the figures in the folder of an evaluation: those of numbers, and those of images."""
    order = [*EVALUATION_FIGURES, *IMAGE_FIGURES]

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
    row = (EVALUATION_FIGURES | IMAGE_FIGURES).get(kind)
    caption = f"{title}: {row.help if row else name}."
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
    """Return whether a PNG is wider than one column."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return image.width > _ONE_COLUMN


def _column(run: RunFiles, name: str) -> Any:
    return np.array([row.get(name, np.nan) for row in run.history], dtype=np.float64)


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

"""`polyseg schedule plot` and `validity --out`: draw the recorded difficulties and epsilons."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polyseg.adaptive import score_correlations
from polyseg.adaptive.recorded_schedule import Row, RunRecord
from polyseg.commands.outcome import Outcome
from polyseg.commands.schedule import read_record
from polyseg.errors import PolysegError
from polyseg.figures.schedules import (
    Panel,
    difficulty_panels,
    epsilon_bands,
    epsilon_map,
    rank_curves,
    validity_curves,
)
from polyseg.figures.style import headed, save_figure
from polyseg.figures.training import epsilon_quantiles
from polyseg.runs.run_folder import results_beside
from polyseg.system.files import short_names
from polyseg.system.output_folder import moved, whole_folder

_MOST_PANELS = 9
_PANELS = {
    "with_error": "with 1 − Dice",
    "with_size": "with the size\nof the mask",
    "with_error_given_size": "with 1 − Dice\nat equal size",
    "with_previous": "with the previous\nassessment",
}


def plot(paths: Sequence[Path], out: Path | None = None, *, overwrite: bool = False) -> Outcome:
    """Draw the schedules of runs, and of several runs also in one figure."""
    records = [read_record(path) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if record.labels != records[0].labels:
            raise PolysegError(f"{path}: has other labels than {paths[0]}; plot them separately")
    names = short_names(paths)
    several = len(records) > 1
    files = []
    target = out or results_beside(paths[0], "schedule")
    known_by = _files_named("rank_stability.png")
    with whole_folder(target, overwrite=overwrite, known_by=known_by) as folder:
        for i, (name, record) in enumerate(zip(names, records, strict=True), start=1):
            place = folder / _plain(f"{i}_{name}" if several else "")
            for label, part, below in _labelled(record, place):
                files += _draw(part, label, below)
        for label, _, below in _labelled(records[0], folder) if several else ():
            parts = [record.of_label(label).schedule for record in records]
            bands = {
                name: (one.epochs, one.epsilon)
                for name, one in zip(names, parts, strict=True)
                if len(one.epochs)
            }
            if bands:
                files += save_figure(headed(epsilon_bands(bands), label), below / "epsilon")
    return Outcome(target, moved(files, folder, target))


def draw_validity(
    rows: Sequence[Row], path: Path, out: Path | None = None, *, overwrite: bool = False
) -> Outcome:
    """Draw the correlations that `validity` returned, with a figure for each label."""
    labels = list(dict.fromkeys(row.get("label", "") for row in rows))
    epochs = sorted({row["epoch"] for row in rows})
    files = []
    target = out or results_beside(path, "validity")
    known_by = _files_named("validity.png")
    with whole_folder(target, overwrite=overwrite, known_by=known_by) as folder:
        for k, label in enumerate(labels, start=1):
            curves = score_correlations.validity_curves(rows, label)
            panels = {title: curves[measure] for measure, title in _PANELS.items()}
            below = folder / _plain(f"{k}_{label}" if label else "")
            files += save_figure(headed(validity_curves(epochs, panels), label), below / "validity")
    return Outcome(target, moved(files, folder, target))


def _files_named(name: str) -> list[str]:
    """Return the patterns of a figure that is drawn for each run and label."""
    return [name, f"1_*/{name}", f"1_*/1_*/{name}"]


def _plain(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name)


def _labelled(record: RunRecord, folder: Path) -> list[tuple[str, RunRecord, Path]]:
    """Return each label with its record and its folder; a single label has no extra folder."""
    return [
        (label, record.of_label(label), folder / _plain(f"{k}_{label}" if label else ""))
        for k, label in enumerate(record.labels, start=1)
    ]


def _draw(part: RunRecord, label: str, folder: Path) -> list[Path]:
    """Draw all figures of one run and label."""
    assessments, schedule = part.assessments, part.schedule
    epochs = [assessment.epoch for assessment in assessments]
    limits = (part.config.control.epsilon_min, part.config.control.epsilon_max)
    figures = {"rank_stability": rank_curves(epochs, score_correlations.stability(part))}
    if len(schedule.epochs):
        figures["epsilon"] = epsilon_quantiles(schedule.epochs, schedule.epsilon, limits=limits)
        figures["epsilon_map"] = epsilon_map(
            schedule.epochs,
            schedule.epsilon,
            assessments[-1].difficulty,
            limits=limits,
            assessed=epochs,
            ids=schedule.ids,
        )
    if any(np.isfinite(assessment.dice).any() for assessment in assessments):
        figures["difficulty_dice"] = difficulty_panels(
            [_panel(part, k) for k in _evenly(len(assessments))], metric=assessments[-1].metric
        )
    return [
        path
        for name, figure in figures.items()
        for path in save_figure(headed(figure, label), folder / name)
    ]


def _panel(part: RunRecord, k: int) -> Panel:
    one = part.assessments[k]
    found = score_correlations.correlation(one.difficulty, 1 - one.dice)
    return Panel(one.epoch, one.difficulty, one.dice, found)


def _evenly(count: int) -> list[int]:
    """Return the indices of assessments to show, including the first and the last."""
    return [round(place) for place in np.linspace(0, count - 1, min(count, _MOST_PANELS))]

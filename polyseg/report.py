"""What a run or a checkpoint leaves for people: tables and figures from the records."""

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseg import evaluate, plots
from polyseg.cache import read_assessment
from polyseg.config import Config
from polyseg.data.dataset import ImageSet
from polyseg.difficulty import FALLBACKS
from polyseg.files import write_text
from polyseg.records import METRICS, Assessment
from polyseg.run import RunDirectory, in_order

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a job has to show."""

    folder: Path
    files: list[Path]
    runs: Sequence[evaluate.RunScores] = ()
    correlations: Sequence[Mapping[str, Any]] = ()


_COMPARED = ("dice", "iou", "sensitivity", "hd95")


def write_scores(runs: Sequence[evaluate.RunScores], folder: Path, *, figures: bool) -> list[Path]:
    """Write the tables of an evaluation, and for several runs a figure; return the files."""
    texts = {
        "table.md": evaluate.markdown_table(runs),
        "table.tex": evaluate.latex_table(runs),
        "per_image.csv": evaluate.per_image_csv(runs),
        "summary.json": evaluate.summary_json(runs),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    files = [folder / name for name in texts]
    if figures:
        metrics = [metric for metric in evaluate.METRICS if metric.key in _COMPARED]
        values = {
            metric.title: [
                np.array([image.values[metric.key] for image in run.scores]) for run in runs
            ]
            for metric in metrics
        }
        figure = plots.comparison([run.name for run in runs], values)
        files += plots.save_figure(figure, folder / "comparison")
    return files


def read_assessments(run: RunDirectory, recorded: Mapping[str, str]) -> list[Assessment]:
    """Read the assessments that a run recorded, by the hashes that it recorded, in order."""
    return [
        read_assessment(run.path / "uncertainty" / name, sha256=recorded[name])
        for name in in_order(recorded)
    ]


def difficulty_correlations(
    assessment: Assessment, known: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return Spearman's correlation of each score with 1 - Dice, and with difficulty where known.

    A correlation is NaN where it is not defined, such as without masks.
    """
    rows = [i for i, identity in enumerate(assessment.ids) if identity in known]
    truth = np.array([known[assessment.ids[i]] for i in rows])
    found: list[dict[str, Any]] = []
    for name in METRICS:
        scores = assessment.scores[name]
        found.append(
            {"metric": name, "with 1 - Dice": evaluate.spearman(scores, 1 - assessment.dice)}
        )
        if rows:
            found[-1]["with known difficulty"] = evaluate.spearman(scores[rows], truth)
    return found


def log_correlations(rows: Sequence[Mapping[str, Any]]) -> None:
    """Log what `difficulty_correlations` found."""
    for row in rows:
        found = [
            f"{name} {value:.2f}"
            for name, value in row.items()
            if isinstance(value, float) and math.isfinite(value)
        ]
        if found:
            log.info("Spearman of the difficulty by %s: %s", row["metric"], ", ".join(found))


def assessment_csv(assessment: Assessment) -> str:
    """Return an assessment as CSV, a row an image."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "difficulty", *METRICS, "dice", "foreground_pixels", "fallback"])
    for i, identity in enumerate(assessment.ids):
        values = [assessment.difficulty[i], *(assessment.scores[name][i] for name in METRICS)]
        row = [f"{value:.9g}" for value in (*values, assessment.dice[i])]
        writer.writerow(
            [identity, *row, assessment.foreground_pixels[i], FALLBACKS[assessment.fallback[i]]]
        )
    return text.getvalue()


def draw_assessment(assessment: Assessment, folder: Path) -> list[Path]:
    """Draw difficulty against Dice, where there are masks."""
    if not np.isfinite(assessment.dice).any():
        return []
    figure = plots.difficulty_against_dice(
        assessment.difficulty,
        assessment.dice,
        metric=assessment.metric,
        correlation=evaluate.spearman(assessment.difficulty, 1 - assessment.dice),
        epoch=assessment.epoch,
    )
    return plots.save_figure(figure, folder / "difficulty_dice")


def draw_difficulties(assessments: Sequence[Assessment], folder: Path) -> list[Path]:
    """Draw how the difficulties move from one assessment to the next."""
    figure = plots.difficulty_distribution(
        [assessment.epoch for assessment in assessments],
        [assessment.difficulty for assessment in assessments],
        metric=assessments[-1].metric,
    )
    return plots.save_figure(figure, folder / "difficulty")


def draw_history(rows: Sequence[Mapping[str, float]], folder: Path) -> list[Path]:
    """Draw losses and metrics over the epochs."""
    return plots.save_figure(plots.training_curves(rows), folder / "curves")


def draw_schedule(epsilon: NDArray[np.float32], config: Config, folder: Path) -> list[Path]:
    """Draw the quantiles of epsilon, (epochs, images), where it was adapted."""
    if not config.adaptive:
        return []
    limits = (config.control.epsilon_min, config.control.epsilon_max)
    epochs = np.arange(1, len(epsilon) + 1)
    figure = plots.epsilon_quantiles(epochs, epsilon, limits=limits)
    return plots.save_figure(figure, folder / "epsilon")


def draw_overlays(assessment: Assessment, images: ImageSet, path: Path, title: str) -> list[Path]:
    """Draw image, mask, mean prediction and uncertainty of every image of an assessment."""
    cases = []
    for i, identity in enumerate(assessment.ids):
        position = images.index[identity]
        cases.append(
            plots.OverlayCase(
                id=identity,
                image=_displayed(images.images[position]),
                mask=None if images.masks is None else images.masks[position],
                mean=assessment.maps["mean"][i].astype(np.float64),
                uncertainty=assessment.maps[assessment.metric][i].astype(np.float64),
                difficulty=float(assessment.difficulty[i]),
                dice=float(assessment.dice[i]),
            )
        )
    figure = plots.overlays(cases, metric=assessment.metric, title=title)
    return plots.save_figure(figure, path)


def _displayed(image: NDArray[Any]) -> NDArray[Any]:
    """Return (H, W), or (H, W, 3) in [0, 1]."""
    if image.shape[2] == 1:
        return image[..., 0]
    return image / float(np.iinfo(image.dtype).max)

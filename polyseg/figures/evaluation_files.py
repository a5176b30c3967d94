"""The files of an evaluation: tables and figures."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from polyseg.data.dataset import ImageSet
from polyseg.evaluation import export
from polyseg.evaluation.scores import Evaluation, mean_scores
from polyseg.evaluation.testing_networks import PredictedMasks
from polyseg.figures.calibration import reliability_diagram, risk_coverage_curves
from polyseg.figures.evaluation import comparison, differences
from polyseg.figures.figures_by_name import EVALUATION_FIGURES
from polyseg.figures.pictures import PredictionCase, predictions
from polyseg.figures.robustness import robustness_curves
from polyseg.figures.run_figures import displayed, paths_of_labels
from polyseg.figures.style import headed, save_figure
from polyseg.metrics.calibration import risk_coverage
from polyseg.metrics.dice import dice_coefficient
from polyseg.metrics.image_metrics import METRICS
from polyseg.metrics.significance import stars
from polyseg.system.files import write_text

_CASES = 5
_MOST_SHOWN = 6
"""Largest number of runs in a figure of predictions."""


def write_evaluation(evaluation: Evaluation, folder: Path, *, figures: bool) -> list[Path]:
    """Write the tables and figures of an evaluation, and return their paths."""
    summary = export.summary(evaluation)
    texts = {
        "table.md": export.markdown(summary),
        "table.tex": export.latex(summary),
        "per_image.csv": export.per_image_csv(evaluation.runs),
        "summary.json": json.dumps(summary, indent=2) + "\n",
    }
    if evaluation.robustness:
        texts["robustness.csv"] = export.robustness_csv(evaluation)
    for name, text in texts.items():
        write_text(folder / name, text)
    files = [folder / name for name in texts]
    for name, row in EVALUATION_FIGURES.items() if figures else ():
        if (figure := row.resolve()(evaluation)) is not None:
            files += save_figure(figure, folder / name)
    return files


def draw_predictions(
    evaluation: Evaluation, masks: Sequence[PredictedMasks], images: ImageSet, folder: Path
) -> list[Path]:
    """Draw the images with the lowest and highest mean Dice over the runs, a figure for each label.

    For an arm, the prediction of its first run that tested an image is drawn.
    """
    files = []
    for label, place in paths_of_labels(images.labels, folder / "predictions"):
        arms = _arms(evaluation, masks, label)
        dice = _mean_dice(evaluation, label)
        ranked = sorted(dice, key=lambda identity: dice[identity])
        for title, ids in (("worst", ranked), ("best", ranked[::-1])):
            cases = (_case(identity, label, arms, images, evaluation.at) for identity in ids)
            shown = list(itertools.islice((one for one in cases if one is not None), _CASES))
            if not shown:
                continue
            heading = f"The {len(shown)} {title} images, by mean Dice"
            figure = predictions(shown, list(arms), title=heading)
            path = place.with_name(f"{place.name}_{title}")
            files += save_figure(headed(figure, label), path)
    return files


def draw_comparison(evaluation: Evaluation) -> Figure:
    """Draw the values of each image: a panel for each metric, a row for each run."""
    runs = evaluation.runs
    values = {
        evaluation.heading(metric): [run.column(metric.name) for run in runs]
        for metric in METRICS.values()
        if metric.in_figures
    }
    return comparison([run.title for run in runs], values)


def draw_reliability(evaluation: Evaluation) -> Figure | None:
    """Draw the reliability diagram of the runs that have one."""
    curves = {run.title: run.reliability for run in evaluation.runs if run.reliability is not None}
    if not curves:
        return None
    return reliability_diagram(
        list(curves),
        [curve.mean_predicted for curve in curves.values()],
        [curve.observed for curve in curves.values()],
        [curve.count for curve in curves.values()],
        [curve.calibration_error for curve in curves.values()],
    )


def draw_risk_coverage(evaluation: Evaluation) -> Figure | None:
    """Draw the risk of the images that remain when the least certain ones are left out."""
    names, found, curves, best = [], [], [], []
    for run in evaluation.runs:
        risk = 1 - run.column("dice")
        for name in list(dict.fromkeys(k for image in run.scores for k in image.uncertainty))[:1]:
            uncertainty = run.uncertainty(name)
            known = np.isfinite(uncertainty) & np.isfinite(risk)
            if known.any():
                names.append(run.title)
                found.append(name.replace("_", " "))
                curves.append(risk_coverage(risk[known], uncertainty[known]))
                best.append(risk_coverage(risk[known], risk[known]))
    if not names:
        return None
    one = found[0] if len(set(found)) == 1 else ""
    if not one:
        names = [", ".join(pair) for pair in zip(names, found, strict=True)]
    return risk_coverage_curves(names, curves, best=best, uncertainty=one)


def draw_differences(evaluation: Evaluation) -> Figure | None:
    """Draw the mean differences from the baseline, a panel for each metric."""
    if not evaluation.comparisons:
        return None
    compared = evaluation.comparisons
    intervals, marks, better = {}, {}, {}
    for metric in METRICS.values():
        if metric.in_figures:
            title = evaluation.heading(metric)
            found = [one.differences[metric.name] for one in compared]
            intervals[title] = np.array([(one.mean, *one.interval) for one in found]).T
            marks[title] = [stars(one.adjusted) for one in found]
            better[title] = metric.higher_is_better
    return differences(
        [one.run for one in compared],
        intervals,
        stars=marks,
        higher_is_better=better,
        baseline=", ".join(dict.fromkeys(one.baseline for one in compared)),
    )


def draw_robustness(evaluation: Evaluation) -> Figure | None:
    """Draw the Dice of the images over the strength of each corruption."""
    points = evaluation.robustness
    if not points:
        return None
    strengths = sorted({point.strength for point in points})
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    for corruption in dict.fromkeys(point.corruption for point in points):
        of_it = [point for point in points if point.corruption == corruption]
        values[corruption] = {
            run: np.stack([point.column("dice") for point in of_it if point.run == run])
            for run in dict.fromkeys(point.run for point in of_it)
        }
    return robustness_curves(strengths, values)


def _mean_dice(evaluation: Evaluation, label: str) -> dict[str, float]:
    """Return the mean Dice of each image over the runs."""
    runs = [run for run in evaluation.runs if run.label == label and run.prediction == "plain"]
    return {one.id: one.values["dice"] for one in mean_scores([run.scores for run in runs])}


def _arms(
    evaluation: Evaluation, masks: Sequence[PredictedMasks], label: str
) -> dict[str, list[PredictedMasks]]:
    """Return the predictions of the runs in each of the first arms, by the name of the arm."""
    of_label = {one.run: one for one in masks if one.label == label}
    arms = [run for run in evaluation.runs if run.label == label and run.prediction == "plain"]
    return {
        arm.name: [of_label[run.name] for run in (arm.members or [arm]) if run.name in of_label]
        for arm in arms[:_MOST_SHOWN]
    }


def _case(
    identity: str,
    label: str,
    arms: Mapping[str, Sequence[PredictedMasks]],
    images: ImageSet,
    at: str,
) -> PredictionCase | None:
    """Return an image with the predictions of the first run of each arm that tested it.

    None if an arm has no prediction of the size of the image.
    """
    if identity not in images.hashes:
        return None
    pixels, truth = (
        (images.pixels(identity), images.masks(identity))
        if at == "network"
        else images.original(identity)
    )
    size = pixels.shape[:2]
    found = [
        next((one.mask(identity) for one in runs if one.shapes.get(identity) == size), None)
        for runs in arms.values()
    ]
    predicted = [one for one in found if one is not None]
    if truth is None or len(predicted) < len(found):
        return None
    mask = truth[images.labels.index(label)]
    dice = dice_coefficient(
        torch.from_numpy(np.stack(predicted)), torch.from_numpy(np.stack([mask] * len(predicted)))
    )
    return PredictionCase(identity, displayed(pixels), mask, predicted, dice.tolist())

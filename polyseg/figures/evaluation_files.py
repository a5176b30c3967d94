"""What an evaluation leaves for people: its tables as files, and its figures."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from polyseg.data.dataset import ImageSet
from polyseg.evaluation import export
from polyseg.evaluation.scores import Evaluation, RunScores
from polyseg.evaluation.testing_networks import PredictedMasks
from polyseg.figures.calibration import reliability_diagram, risk_coverage_curves
from polyseg.figures.evaluation import comparison, differences
from polyseg.figures.pictures import PredictionCase, predictions
from polyseg.figures.robustness import robustness_curves
from polyseg.figures.run_figures import displayed, paths_of_labels
from polyseg.figures.style import headed, save_figure
from polyseg.metrics.calibration import risk_coverage
from polyseg.metrics.dice import dice_coefficient
from polyseg.metrics.image_metrics import METRICS
from polyseg.metrics.significance import stars
from polyseg.system.files import write_text

_COMPARED = ("dice", "iou", "sensitivity", "precision", "hd95", "nsd")
_CASES = 5
_MOST_SHOWN = 6
"""Of the images, and of the runs, in a figure of predictions."""


def write_evaluation(evaluation: Evaluation, folder: Path, *, figures: bool) -> list[Path]:
    """Write the tables of an evaluation, and its figures; return the files."""
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
    return files + (_draw_evaluation(evaluation, folder) if figures else [])


def draw_predictions(
    evaluation: Evaluation, masks: Sequence[PredictedMasks], images: ImageSet, folder: Path
) -> list[Path]:
    """Draw the images that were segmented worst and best, a figure a label.

    Args:
        evaluation: what says which those are, by the mean Dice over the runs.
        masks: what the runs predicted; of an arm its first run that tested an image is drawn.
        images: the images.
        folder: where to.
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


def _draw_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    runs = evaluation.runs
    titles = [run.title for run in runs]
    compared = [metric for metric in METRICS if metric.key in _COMPARED]
    values = {
        evaluation.heading(metric): [run.column(metric.key) for run in runs] for metric in compared
    }
    files = save_figure(comparison(titles, values), folder / "comparison")
    files += _draw_reliability(runs, folder)
    files += _draw_risk_coverage(runs, folder)
    files += _draw_differences(evaluation, folder)
    return files + _draw_robustness(evaluation, folder)


def _draw_reliability(runs: Sequence[RunScores], folder: Path) -> list[Path]:
    curves = [(run.title, run.reliability) for run in runs if run.reliability is not None]
    if not curves:
        return []
    figure = reliability_diagram(
        [title for title, _ in curves],
        [curve.mean_predicted for _, curve in curves],
        [curve.observed for _, curve in curves],
        [curve.count for _, curve in curves],
        [curve.calibration_error for _, curve in curves],
    )
    return save_figure(figure, folder / "reliability")


def _draw_risk_coverage(runs: Sequence[RunScores], folder: Path) -> list[Path]:
    """Draw what is left of the risk as the least certain images are put aside."""
    names, found, curves, best = [], [], [], []
    for run in runs:
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
        return []
    one = found[0] if len(set(found)) == 1 else ""
    if not one:
        names = [", ".join(pair) for pair in zip(names, found, strict=True)]
    figure = risk_coverage_curves(names, curves, best=best, uncertainty=one)
    return save_figure(figure, folder / "risk_coverage")


def _draw_differences(evaluation: Evaluation, folder: Path) -> list[Path]:
    if not evaluation.comparisons:
        return []
    compared = [metric for metric in METRICS if metric.key in _COMPARED]
    found = evaluation.comparisons
    baselines = ", ".join(dict.fromkeys(one.baseline for one in found))
    rows = {
        evaluation.heading(metric): [one.differences[metric.key] for one in found]
        for metric in compared
    }
    better = [metric.higher_is_better for metric in compared]
    figure = differences(
        [one.run for one in found],
        {
            title: (
                np.array([one.mean for one in of_metric]),
                np.array([one.interval.low for one in of_metric]),
                np.array([one.interval.high for one in of_metric]),
            )
            for title, of_metric in rows.items()
        },
        stars={title: [stars(one.adjusted) for one in ones] for title, ones in rows.items()},
        higher_is_better=dict(zip(rows, better, strict=True)),
        baseline=baselines,
    )
    return save_figure(figure, folder / "differences")


def _draw_robustness(evaluation: Evaluation, folder: Path) -> list[Path]:
    points = evaluation.robustness
    if not points:
        return []
    strengths = sorted({point.strength for point in points})
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    for corruption in dict.fromkeys(point.corruption for point in points):
        of_it = [point for point in points if point.corruption == corruption]
        values[corruption] = {
            run: np.stack([point.column("dice") for point in of_it if point.run == run])
            for run in dict.fromkeys(point.run for point in of_it)
        }
    return save_figure(robustness_curves(strengths, values), folder / "robustness")


def _mean_dice(evaluation: Evaluation, label: str) -> dict[str, float]:
    """Return each image's mean Dice over the runs."""
    found: dict[str, list[float]] = {}
    for run in evaluation.runs:
        if run.label == label and run.prediction == "plain":
            for image in run.scores:
                found.setdefault(image.id, []).append(image.values["dice"])
    return {identity: float(np.mean(values)) for identity, values in found.items()}


def _arms(
    evaluation: Evaluation, masks: Sequence[PredictedMasks], label: str
) -> dict[str, list[PredictedMasks]]:
    """Return what the first runs or arms predicted of a label, by their names."""
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
    """Return an image and what the first run of each arm that tested it predicted.

    None where an arm has no prediction of the size of the image.
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

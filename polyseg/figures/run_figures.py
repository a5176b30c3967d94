"""What a run or a checkpoint leaves for people: tables and figures from the records."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from polyseg.choices import UNCERTAINTIES
from polyseg.config import Config
from polyseg.data.dataset import ImageSet
from polyseg.difficulty import FALLBACKS
from polyseg.evaluation.scores import Evaluation
from polyseg.figures.pictures import OverlayCase, highest_uncertainty, overlays
from polyseg.figures.style import headed, save_figure
from polyseg.figures.training import difficulty_figures, epsilon_quantiles, training_curves
from polyseg.metrics.rank_stability import spearman
from polyseg.metrics.significance import rank_correlation
from polyseg.records import Assessment
from polyseg.system.files import csv_table

if TYPE_CHECKING:
    from polyseg.networks.networks_by_name import SegmentationNetwork

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a job has to show."""

    folder: Path
    files: list[Path]
    evaluation: Evaluation | None = None
    correlations: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    """Sentences on the correlations."""


def difficulty_correlations(
    assessment: Assessment, known: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return Spearman's correlation of each score with 1 - Dice, and with difficulty where known.

    That with 1 - Dice has its 95 % interval, by `rank_correlation`. With several labels there are
    rows for each, since labels differ in difficulty. A correlation is NaN where it is not defined,
    such as without masks.
    """
    found: list[dict[str, Any]] = []
    for label in assessment.label_names:
        part = assessment.of_label(label)
        rows = [i for i, identity in enumerate(part.ids) if identity in known]
        truth = np.array([known[part.ids[i]] for i in rows])
        for name, scores in part.scores.items():
            row: dict[str, Any] = {"metric": name} | ({"label": label} if label else {})
            of_error = rank_correlation(scores, 1 - part.dice)
            row |= {"with 1 - Dice": of_error.value, "95 % interval": list(of_error.interval)}
            if rows:
                row["with known difficulty"] = spearman(scores[rows], truth)
            found.append(row)
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
            name = " of ".join(filter(None, (row["metric"], row.get("label"))))
            log.info("Spearman of the difficulty by %s: %s", name, ", ".join(found))


def assessment_csv(assessment: Assessment) -> str:
    """Return an assessment as CSV, a row an image."""
    labels = assessment.labels
    errors = assessment.scores_se.get(assessment.metric)
    of_difficulty = [assessment.difficulty] if errors is None else [assessment.difficulty, errors]
    columns = [*of_difficulty, *assessment.scores.values()]
    named = ["difficulty", "difficulty_se"][: len(of_difficulty)]
    heads = ["id", *(["label"] if labels else []), *named, *assessment.scores, "dice"]
    rows = []
    for i, identity in enumerate(assessment.ids):
        values = [column[i] for column in columns]
        row = [f"{value:.9g}" for value in (*values, assessment.dice[i])]
        own = [identity, *([labels[i]] if labels else [])]
        rows.append(
            [*own, *row, assessment.foreground_pixels[i], FALLBACKS[assessment.fallback[i]]]
        )
    return csv_table([*heads, "foreground_pixels", "fallback"], rows)


def draw_difficulties(
    assessments: Sequence[Assessment], folder: Path, kinds: Sequence[str]
) -> list[Path]:
    """Draw those of `difficulty_figures` that are of some kinds, a figure a label."""
    last = assessments[-1]
    labels = {label: difficulty_figures(assessments, label) for label in last.label_names}
    return [
        path
        for kind in kinds
        for label, place in paths_of_labels(last.label_names, folder / kind)
        if kind in labels[label]
        for path in save_figure(labels[label][kind], place)
    ]


def draw_run(
    history: Sequence[Mapping[str, float]],
    epsilon: NDArray[np.float32],
    config: Config,
    folder: Path,
) -> list[Path]:
    """Draw losses and metrics over the epochs, and quantiles of epsilon where it was adapted.

    Args:
        history: a row an epoch.
        epsilon: (epochs, rows), the labels of an image one after another.
        config: of the run.
        folder: where to.
    """
    files = save_figure(training_curves(history), folder / "curves")
    if not config.adaptive:
        return files
    limits = (config.control.epsilon_min, config.control.epsilon_max)
    epochs = np.arange(1, len(epsilon) + 1)
    labels = config.data.labels
    for k, (label, path) in enumerate(paths_of_labels(labels, folder / "epsilon")):
        figure = epsilon_quantiles(epochs, epsilon[:, k :: len(labels)], limits=limits)
        files += save_figure(headed(figure, label), path)
    return files


def draw_extremes(
    network: "SegmentationNetwork",
    config: Config,
    images: ImageSet,
    assessment: Assessment,
    folder: Path,
) -> list[Path]:
    """Draw the images of largest and of smallest D of an assessment.

    Their maps are measured anew, with the network as it is now, which may have trained on since.
    """
    if assessment.metric not in UNCERTAINTIES:
        return []  # Without passes there are no maps.
    # Here, because the commands that only draw what is recorded need no torch.
    from polyseg.networks.networks_by_name import hash_weights

    order = np.argsort(-assessment.difficulty, kind="stable")
    moved = hash_weights(network) != assessment.weights_sha256
    since = f" at epoch {assessment.epoch}, as the trained network sees them" if moved else ""
    shown = min(config.output.overlays, len(order))
    if shown == 0:
        return []
    found = {
        which: _measured_anew(network, config, images, assessment, rows)
        for which, rows in (("largest", order[:shown]), ("smallest", order[::-1][:shown]))
    }
    highest = highest_uncertainty(
        [again.maps[again.metric][i] for again, rows in found.values() for i in rows]
    )
    files = []
    for which, (again, rows) in found.items():
        chosen = rows if which == "largest" else rows[::-1]
        path, title = folder / f"overlays_{which}_d", f"The {shown} images of {which} D{since}"
        files += draw_overlays(again, chosen, images, path, title, highest)
    return files


def _measured_anew(
    network: "SegmentationNetwork",
    config: Config,
    images: ImageSet,
    assessment: Assessment,
    rows: NDArray[np.int64],
) -> tuple[Assessment, list[int]]:
    """Return an assessment, with maps, of the images of some rows, and its rows by falling D.

    Measured anew they may stand in another order, and a figure goes by what it shows.
    """
    from polyseg.montecarlo.assessment import assess

    changes = {"samples": assessment.samples, "save_maps": True}
    again = assess(
        network,
        images.batches(list(dict.fromkeys(assessment.ids[i] for i in rows)), 1),
        config.uncertainty.model_copy(update=changes),
        seed=assessment.seed,
        epoch=assessment.epoch,
    )
    labels = assessment.labels or [""] * len(assessment.ids)
    places = list(zip(again.ids, again.labels or [""] * len(again.ids), strict=True))
    chosen = [places.index((assessment.ids[i], labels[i])) for i in rows]
    return again, sorted(chosen, key=lambda i: again.difficulty[i], reverse=True)


def draw_overlays(
    assessment: Assessment,
    rows: Sequence[int],
    images: ImageSet,
    path: Path,
    title: str,
    highest: float,
) -> list[Path]:
    """Draw image, mask, mean prediction and uncertainty of some rows of an assessment."""
    cases = []
    for i in rows:
        identity = assessment.ids[i]
        label = assessment.labels[i] if assessment.labels else ""
        masks = images.masks(identity)
        cases.append(
            OverlayCase(
                id=f"{identity}: {label}" if label else identity,
                image=displayed(images.pixels(identity)),
                mask=None if masks is None else masks[images.labels.index(label)],
                mean=assessment.maps["mean"][i].astype(np.float64),
                uncertainty=assessment.maps[assessment.metric][i].astype(np.float64),
                difficulty=float(assessment.difficulty[i]),
                dice=float(assessment.dice[i]),
            )
        )
    figure = overlays(cases, metric=assessment.metric, title=title, highest=highest)
    return save_figure(figure, path)


def paths_of_labels(labels: Sequence[str], path: Path) -> list[tuple[str, Path]]:
    """Return a path for each label's figure; that of a single one is `path` itself."""
    if len(labels) == 1:
        return [(labels[0], path)]
    plain = [re.sub(r"[^\w-]+", "_", label) for label in labels]
    return [
        (label, path.with_name(f"{path.name}_{k}_{name}"))
        for k, (label, name) in enumerate(zip(labels, plain, strict=True), start=1)
    ]


def displayed(image: NDArray[Any]) -> NDArray[Any]:
    """Return an image, (H, W, C), as (H, W), or RGB as (H, W, 3) in [0, 1].

    Of images with other numbers of channels the first is shown.

    >>> float(displayed(np.full((2, 2, 3), 255, np.uint8)).max())
    1.0
    """
    if image.shape[2] != 3:
        return image[..., 0]
    unsigned = image.dtype.kind == "u"
    lowest = 0.0 if unsigned else float(image.min())
    highest = float(np.iinfo(image.dtype).max) if unsigned else float(image.max())
    return (image - lowest) / max(highest - lowest, 1e-6)

"""The figures of a run or a checkpoint, from its records and images."""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from polyseg.choices import UNCERTAINTIES
from polyseg.config import Config
from polyseg.data.dataset import ImageSet
from polyseg.figures.figures_by_name import RUN_FIGURES, Drawn, RunFigure, RunRecords
from polyseg.figures.pictures import OverlayCase, highest_uncertainty, overlays
from polyseg.figures.schedules import Panel, difficulty_panels
from polyseg.figures.style import formatted, headed, save_figure
from polyseg.figures.training import (
    difficulty_distribution,
    epsilon_quantiles,
    first_assessment,
    training_curves,
)
from polyseg.metrics.rank_stability import spearman
from polyseg.records import Assessment

if TYPE_CHECKING:
    from polyseg.networks.segmentation_network import SegmentationNetwork


def drawn_figures(
    records: RunRecords, names: Collection[str] = RUN_FIGURES
) -> Iterator[tuple[RunFigure, str, Drawn]]:
    """Yield the figures of a run with their rows and labels, grouped by label."""
    rows = [row for name, row in RUN_FIGURES.items() if name in names]
    parts = [("", [row for row in rows if row.source == "history"])]
    parts += [(one, [row for row in rows if row.source != "history"]) for one in records.labels]
    for label, of_label in parts:
        for row in of_label:
            if getattr(records, row.source) and (drawn := row.resolve()(records, label)):
                yield row, label, replace(drawn, figure=headed(drawn.figure, label))


def draw_run(records: RunRecords, folder: Path, names: Collection[str] = RUN_FIGURES) -> list[Path]:
    """Write the figures of a run to a folder; return the files."""
    files = []
    for row, label, drawn in drawn_figures(records, names):
        labels = [""] if row.source == "history" else records.labels
        files += save_figure(drawn.figure, dict(paths_of_labels(labels, folder / row.name))[label])
    return files


def curves(records: RunRecords, _: str) -> Drawn:
    """Draw losses, validation Dice and IoU, and learning rate over the epochs."""
    first, last = records.history[0], records.history[-1]
    name = "train_loss_constant" if "train_loss_constant" in first else "train_loss"
    losses = [formatted(row.get(name, math.nan), ".3f") for row in (first, last)]
    caption = "loss, validation Dice and IoU, and learning rate."
    if any(row.get("assessed") == 1 for row in records.history):
        caption += (
            " Ticks at the bottom are assessments of the uncertainty; the dashed line is E0, the "
            "first of them, after which each image has its own epsilon."
        )
    elif first_assessment(records.history) is not None:
        caption += " The dashed line is E0 of the recorded run, after which epsilon first changes."
    return Drawn(
        training_curves(records.history),
        caption,
        f"Curves of the training loss, from {losses[0]} in epoch {first['epoch']:g} to "
        f"{losses[1]} in epoch {last['epoch']:g}.",
    )


def epsilon(records: RunRecords, label: str) -> Drawn | None:
    """Draw the quantiles of epsilon over the epochs, if it changed."""
    assert records.schedule is not None
    values = np.asarray(records.schedule.of_label(label).epsilon, dtype=np.float64)
    known = values[np.isfinite(values)]
    if known.size == 0 or np.ptp(known) == 0:
        return None
    low, high = (
        float(reached) if given is None else given
        for given, reached in zip(records.limits, (known.min(), known.max()), strict=True)
    )
    return Drawn(
        epsilon_quantiles(records.schedule.epochs, values, limits=(low, high)),
        "ε of the training images in each epoch.",
        f"Quantiles of epsilon over {values.shape[1]} images in {len(values)} epochs, from "
        f"{formatted(known.min(), '.2f')} to {formatted(known.max(), '.2f')}.",
    )


def difficulty(records: RunRecords, label: str) -> Drawn:
    """Draw the distribution of D at each assessment."""
    parts = [one.of_label(label) for one in records.assessments if label in one.label_names]
    figure = difficulty_distribution(
        [one.epoch for one in parts],
        [one.difficulty for one in parts],
        metric=parts[-1].metric,
    )
    return Drawn(
        figure,
        "difficulty D at each assessment. Boxes show the quartiles, whiskers reach from 5 to 95 %.",
        f"Boxes of the difficulty at {len(parts)} assessments.",
    )


def difficulty_dice(records: RunRecords, label: str) -> Drawn | None:
    """Draw the Dice of each image over its D at the last assessment, if there are masks."""
    last = records.assessments[-1].of_label(label)
    if not np.isfinite(last.dice).any():
        return None
    known = np.isfinite(last.difficulty) & np.isfinite(last.dice)
    correlation = spearman(last.difficulty, 1 - last.dice)
    panel = Panel(last.epoch, last.difficulty[known], last.dice[known], correlation)
    return Drawn(
        difficulty_panels([panel], metric=last.metric),
        "Dice over difficulty D at the last assessment, one point for each image.",
        f"Dice over difficulty of {len(last.ids)} images; Spearman's correlation of D with "
        f"1 − Dice is {formatted(correlation, '.2f')}.",
    )


def draw_extremes(
    network: "SegmentationNetwork",
    config: Config,
    images: ImageSet,
    assessment: Assessment,
    folder: Path,
) -> list[Path]:
    """Draw the images with the largest and the smallest D of an assessment.

    Maps, D and Dice are computed again with the network as it is now, possibly trained further.
    """
    if assessment.metric not in UNCERTAINTIES:
        return []  # Other scores have no maps.
    # Imported here, because commands that draw recorded data only need no torch.
    from polyseg.networks.segmentation_network import hash_weights

    order = np.argsort(-assessment.difficulty, kind="stable")
    moved = hash_weights(network) != assessment.weights_sha256
    then = f" at epoch {assessment.epoch}; D and Dice shown are of the final network"
    since = then if moved else ""
    shown = min(config.output.overlays, len(order))
    if shown == 0:
        return []
    found = {
        which: _measured_again(network, config, images, assessment, rows)
        for which, rows in (("largest", order[:shown]), ("smallest", order[::-1][:shown]))
    }
    highest = highest_uncertainty(
        [again.maps[again.metric][i] for again, rows in found.values() for i in rows]
    )
    files = []
    for which, (again, rows) in found.items():
        chosen = rows if which == "largest" else rows[::-1]
        path, title = folder / f"overlays_{which}_d", f"The {shown} images of {which} D{since}"
        files += _draw_overlays(again, chosen, images, path, title, highest)
    return files


def _measured_again(
    network: "SegmentationNetwork",
    config: Config,
    images: ImageSet,
    assessment: Assessment,
    rows: NDArray[np.int64],
) -> tuple[Assessment, list[int]]:
    """Return a new assessment, with maps, of the images of some rows, and its rows by falling D.

    The order is that of the new D, which the figure shows.
    """
    from polyseg.montecarlo.assessment import assess

    changes = {"samples": assessment.samples, "save_maps": True, "metric": assessment.metric}
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


def _draw_overlays(
    assessment: Assessment,
    rows: Sequence[int],
    images: ImageSet,
    path: Path,
    title: str,
    highest: float,
) -> list[Path]:
    """Draw image, mask, mean prediction and uncertainty for some rows of an assessment."""
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
    """Return a path for each label's figure; for a single label that is `path` itself."""
    if len(labels) == 1:
        return [(labels[0], path)]
    plain = [re.sub(r"[^\w-]+", "_", label) for label in labels]
    return [
        (label, path.with_name(f"{path.name}_{k}_{name}"))
        for k, (label, name) in enumerate(zip(labels, plain, strict=True), start=1)
    ]


def displayed(image: NDArray[Any]) -> NDArray[Any]:
    """Return an image, (H, W, C), as RGB (H, W, 3) in [0, 1], or else its first channel (H, W).

    >>> float(displayed(np.full((2, 2, 3), 255, np.uint8)).max())
    1.0
    """
    if image.shape[2] != 3:
        return image[..., 0]
    unsigned = image.dtype.kind == "u"
    lowest = 0.0 if unsigned else float(image.min())
    highest = float(np.iinfo(image.dtype).max) if unsigned else float(image.max())
    return (image - lowest) / max(highest - lowest, 1e-6)

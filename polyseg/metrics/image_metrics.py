"""The metrics of the segmentation of one image and label.

Which to report, and the weaknesses of each: Maier-Hein, Reinke et al., "Metrics reloaded", Nature
Methods 2024.

Empty cases: if mask and prediction are both empty, a metric has its best value; if one of them is,
its worst (for distances the image's diagonal). What the mask alone leaves undefined is NaN:
sensitivity, AUC-ROC and average precision without foreground, specificity and AUC-ROC without
background.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyseg.errors import PolysegError
from polyseg.metrics.calibration import (
    Ranking,
    Values,
    brier,
    calibration_error,
    negative_log_likelihood,
)

Group = Literal["overlap", "ranking", "surface", "calibration"]
Binary = NDArray[np.bool_]


@dataclass(frozen=True)
class MetricColumn:
    """A metric and how tables show it.

    >>> hd95 = next(metric for metric in METRICS if metric.key == "hd95")
    >>> hd95.heading("mm")
    'HD95 (mm)'
    """

    key: str
    title: str
    group: Group
    decimals: int = 3
    higher_is_better: bool = True
    is_distance: bool = False
    """Whether it is a length in the unit of the spacing."""

    def heading(self, unit: str = "px") -> str:
        """Return the title, with the unit for a distance."""
        return f"{self.title} ({unit})" if self.is_distance else self.title


def _distance(key: str, title: str) -> MetricColumn:
    return MetricColumn(key, title, "surface", decimals=2, higher_is_better=False, is_distance=True)


def _error(key: str, title: str) -> MetricColumn:
    return MetricColumn(key, title, "calibration", decimals=4, higher_is_better=False)


METRICS = (
    MetricColumn("dice", "Dice", "overlap"),
    MetricColumn("iou", "IoU", "overlap"),
    MetricColumn("sensitivity", "Sensitivity", "overlap"),
    MetricColumn("specificity", "Specificity", "overlap"),
    MetricColumn("precision", "Precision", "overlap"),
    MetricColumn("accuracy", "Accuracy", "overlap"),
    MetricColumn("auc", "AUC-ROC", "ranking"),
    MetricColumn("average_precision", "AP", "ranking"),
    _distance("hd95", "HD95"),
    _distance("asd", "ASD"),
    MetricColumn("nsd", "NSD", "surface"),
    _error("brier", "Brier"),
    _error("nll", "NLL"),
    _error("ece", "ECE"),
    _error("ace", "ACE"),
)

# MONAI's names of the metrics that follow from the confusion matrix.
_MONAI_NAMES = {
    "dice": "f1 score",
    "iou": "threat score",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "accuracy": "accuracy",
}


def image_metrics(
    probability: ArrayLike,
    mask: ArrayLike,
    *,
    threshold: float = 0.5,
    spacing: tuple[float, float] | None = None,
    tolerance: float = 2.0,
) -> dict[str, float]:
    """Return all metrics of one image, the prediction being probability >= threshold.

    Args:
        probability: (H, W) in [0, 1].
        mask: (H, W) in {0, 1}.
        threshold: in [0, 1]; ranking and calibration do not use it.
        spacing: of rows and of columns, in mm, above 0; None for distances in pixels.
        tolerance: largest distance of two surfaces, in the same unit, that the normalised surface
            Dice counts as agreement; at least 0.

    Returns:
        Values by the keys of `METRICS`, in their order.

    Raises:
        PolysegError: a probability is NaN or outside [0, 1], or spacing or tolerance is invalid.

    >>> values = image_metrics([[0.9, 0.4], [0.1, 0.2]], [[1, 1], [0, 0]])
    >>> values["sensitivity"], round(values["dice"], 4), values["hd95"], round(values["brier"], 3)
    (0.5, 0.6667, 0.95, 0.105)
    """
    p, truth = np.asarray(probability, dtype=np.float64), np.asarray(mask) > 0
    if p.ndim != 2 or p.shape != truth.shape:
        raise ValueError(f"expected two arrays (H, W), got {p.shape} and {truth.shape}")
    predicted = p >= threshold
    values = {
        "brier": brier(p, truth),
        "nll": negative_log_likelihood(p, truth),
        "ece": calibration_error(p, truth),
        **_ranking(p, truth),
        **_overlap(predicted, truth),
        **_surface(predicted, truth, _checked_spacing(spacing), _checked_tolerance(tolerance)),
    }
    return {metric.key: values[metric.key] for metric in METRICS}


def _ranking(probability: Values, truth: Binary) -> dict[str, float]:
    """Return the metrics that need the pixels sorted by probability."""
    ranking = Ranking.of(probability, truth)
    return {
        "auc": ranking.area_under_roc(),
        "average_precision": ranking.average_precision(),
        "ace": ranking.calibration_error(),
    }


def _overlap(predicted: Binary, truth: Binary) -> dict[str, float]:
    """Return the metrics of the confusion matrix."""
    import torch
    from monai.metrics import compute_confusion_matrix_metric, get_confusion_matrix

    pair = (torch.from_numpy(one.astype(np.uint8))[None, None] for one in (predicted, truth))
    matrix = get_confusion_matrix(*pair).double()
    values = {
        key: float(compute_confusion_matrix_metric(name, matrix))
        for key, name in _MONAI_NAMES.items()
    }
    if not predicted.any():
        # 0/0 for the precision, and for all three if the mask is empty as well.
        values |= dict.fromkeys(("dice", "iou", "precision"), float(not truth.any()))
    return values


def _surface(
    predicted: Binary, truth: Binary, spacing: tuple[float, float], tolerance: float
) -> dict[str, float]:
    """Return the metrics of the distances between the two surfaces.

    As in MONAI: a surface is the pixels of a region that a cross-shaped erosion removes; HD95 is
    the larger of the two directed 95th percentiles (linear interpolation); ASD is the mean over the
    pixels of both; NSD is the share of them within the tolerance (Nikolov et al., JMIR 2021), each
    pixel counting one whatever the spacing.
    """
    from monai.metrics import get_mask_edges, get_surface_distance

    if not (predicted.any() and truth.any()):
        agreed = not (predicted.any() or truth.any())
        worst = 0.0 if agreed else math.hypot(*np.multiply(truth.shape, spacing))
        return {"hd95": worst, "asd": worst, "nsd": float(agreed)}
    # No border is added: SciPy's erosion takes pixels outside the image for background, so a
    # region has a surface where the image cuts it off.
    edges = get_mask_edges(predicted, truth, crop=False)
    directed = [get_surface_distance(*one, spacing=spacing) for one in (edges, edges[::-1])]
    distances = np.concatenate(directed)
    return {
        "hd95": max(float(np.percentile(one.astype(np.float64), 95)) for one in directed),
        "asd": float(distances.mean(dtype=np.float64)),
        # In float32 like the distances: in float64 three pixels of 0.1 mm exceed 0.3 mm.
        "nsd": float((distances <= np.float32(tolerance)).mean()),
    }


def _checked_spacing(spacing: tuple[float, float] | None) -> tuple[float, float]:
    if spacing is None:
        return 1.0, 1.0
    if len(spacing) != 2 or not all(0 < one < math.inf for one in spacing):
        raise PolysegError(f"spacing: {spacing} is invalid; give rows, columns in mm, above 0")
    return float(spacing[0]), float(spacing[1])


def _checked_tolerance(tolerance: float) -> float:
    if not 0 <= tolerance < math.inf:
        raise PolysegError(f"tolerance: {tolerance} is invalid; give a number of at least 0")
    return float(tolerance)

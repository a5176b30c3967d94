"""The metrics of one image and label. To add one, add a row to `METRICS`.

Maier-Hein, Reinke et al., "Metrics reloaded", Nature Methods 2024, say which to report, and the
weaknesses of each.

Empty cases: if mask and prediction are both empty, a metric has its best value; if only one of them
is empty, its worst (for distances the image's diagonal). Sensitivity, AUC-ROC and average precision
are NaN without foreground in the mask, specificity and AUC-ROC without background.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyseg.errors import PolysegError
from polyseg.metrics.calibration import (
    Ranking,
    Values,
    brier,
    calibration_error,
    check_probability,
    negative_log_likelihood,
)
from polyseg.registry import Registry, Row

if TYPE_CHECKING:
    from torch import Tensor

Binary = NDArray[np.bool_]


@dataclass(frozen=True)
class Segmentation:
    """A prediction for one image and its mask, with intermediate results that metrics share.

    >>> Segmentation(np.array([[0.9, 0.4]]), np.array([[True, True]])).predicted
    array([[ True, False]])
    """

    probability: Values
    """(H, W) probabilities of foreground, in [0, 1]."""
    truth: Binary
    """(H, W), the foreground of the mask."""
    threshold: float = 0.5
    """Smallest probability that predicts a pixel as foreground."""
    spacing: tuple[float, float] = (1.0, 1.0)
    """Distance of rows and of columns, in mm or pixels."""
    tolerance: float = 2.0
    """Largest distance at which the normalised surface Dice counts two surfaces as equal."""

    @cached_property
    def predicted(self) -> Binary:
        """(H, W), the foreground of the prediction."""
        return self.probability >= self.threshold

    @cached_property
    def ranking(self) -> Ranking:
        """The pixels in the order of their probability."""
        return Ranking.of(self.probability, self.truth)

    @cached_property
    def _confusion(self) -> "Tensor":
        import torch
        from monai.metrics import get_confusion_matrix

        both = (self.predicted, self.truth)
        pair = (torch.from_numpy(one.astype(np.uint8))[None, None] for one in both)
        matrix: Tensor = get_confusion_matrix(*pair).double()
        return matrix

    def by_confusion(self, name: str) -> float:
        """Return MONAI's metric of that name from the confusion matrix; NaN for 0/0."""
        from monai.metrics import compute_confusion_matrix_metric

        return float(compute_confusion_matrix_metric(name, self._confusion))

    def by_overlap(self, name: str) -> float:
        """Return `by_confusion`; without predicted pixels 1 for an empty mask and 0 for others."""
        return self.by_confusion(name) if self.predicted.any() else float(self.both_empty)

    @property
    def both_empty(self) -> bool:
        """Whether neither mask nor prediction has foreground."""
        return not (self.predicted.any() or self.truth.any())

    @property
    def one_is_empty(self) -> bool:
        """Whether the mask or the prediction has no foreground, or neither."""
        return not (self.predicted.any() and self.truth.any())

    @cached_property
    def distances(self) -> tuple[Values, Values]:
        """The distances of each surface's pixels to the other surface, as MONAI computes them.

        A surface is the pixels of a region that the cross-shaped erosion removes. If only one of
        the two has a surface, the distance is the image's diagonal.
        """
        from monai.metrics import get_mask_edges, get_surface_distance

        if self.one_is_empty:
            diagonal = math.hypot(*np.multiply(self.truth.shape, self.spacing))
            worst = np.array([0.0 if self.both_empty else diagonal])
            return worst, worst
        # No border is added, because outside the image is background for SciPy's erosion.
        edges = get_mask_edges(self.predicted, self.truth, crop=False)
        return (
            get_surface_distance(*edges, spacing=self.spacing),
            get_surface_distance(*edges[::-1], spacing=self.spacing),
        )


def _hd95(case: Segmentation) -> float:
    return max(float(np.percentile(one.astype(np.float64), 95)) for one in case.distances)


def _asd(case: Segmentation) -> float:
    return float(np.concatenate(case.distances).mean(dtype=np.float64))


def _nsd(case: Segmentation) -> float:
    if case.one_is_empty:
        return float(case.both_empty)
    # In float32, as the distances are: in float64 three pixels of 0.1 mm exceed 0.3 mm.
    return float((np.concatenate(case.distances) <= np.float32(case.tolerance)).mean())


@dataclass(frozen=True)
class Metric(Row):
    """A metric of one image and label.

    >>> METRICS["hd95"].heading("mm"), METRICS["nsd"].heading("mm", 1.5), METRICS["dice"].heading()
    ('HD95 (mm)', 'NSD (1.5 mm)', 'Dice')
    """

    title: str = ""
    """Name in tables and figures."""
    value: Callable[[Segmentation], float] = lambda _: math.nan
    decimals: int = 3
    higher_is_better: bool = True
    unit: str = ""
    """Text in brackets after the title; "{length}" stands for px or mm, "{tolerance}" for NSD's."""
    in_figures: bool = False
    """Whether figures that compare runs have a panel for it."""
    of_probability: bool = False
    """Whether it depends on the probabilities, not on the threshold."""

    def heading(self, length: str = "px", tolerance: float = 2.0) -> str:
        """Return the title with its unit, distances being in `length`."""
        unit = self.unit.format(length=length, tolerance=f"{tolerance:g}")
        return f"{self.title} ({unit})" if unit else self.title


_error_of_probability = partial(Metric, decimals=4, higher_is_better=False, of_probability=True)

METRICS = Registry(
    "metric",
    Metric(
        "dice",
        "Dice coefficient, 2 TP / (2 TP + FP + FN)",
        title="Dice",
        value=lambda case: case.by_overlap("f1 score"),
        in_figures=True,
    ),
    Metric(
        "iou",
        "intersection over union, TP / (TP + FP + FN)",
        title="IoU",
        value=lambda case: case.by_overlap("threat score"),
        in_figures=True,
    ),
    Metric(
        "sensitivity",
        "share of the mask's foreground that is predicted, TP / (TP + FN)",
        title="Sensitivity",
        value=lambda case: case.by_confusion("sensitivity"),
        in_figures=True,
    ),
    Metric(
        "specificity",
        "share of the mask's background that is predicted as such, TN / (TN + FP)",
        title="Specificity",
        value=lambda case: case.by_confusion("specificity"),
    ),
    Metric(
        "precision",
        "share of the predicted foreground that is in the mask, TP / (TP + FP)",
        title="Precision",
        value=lambda case: case.by_overlap("precision"),
        in_figures=True,
    ),
    Metric(
        "accuracy",
        "share of the pixels that are predicted correctly",
        title="Accuracy",
        value=lambda case: case.by_confusion("accuracy"),
    ),
    Metric(
        "auc",
        "area under the ROC curve over the pixels",
        title="AUC-ROC",
        value=lambda case: case.ranking.area_under_roc(),
        of_probability=True,
    ),
    Metric(
        "average_precision",
        "average precision over the pixels",
        title="AP",
        value=lambda case: case.ranking.average_precision(),
        of_probability=True,
    ),
    Metric(
        "hd95",
        "Hausdorff distance, the larger of the two directed 95th percentiles",
        title="HD95",
        value=_hd95,
        decimals=2,
        higher_is_better=False,
        unit="{length}",
        in_figures=True,
    ),
    Metric(
        "asd",
        "average symmetric surface distance, the mean over the pixels of both surfaces",
        title="ASD",
        value=_asd,
        decimals=2,
        higher_is_better=False,
        unit="{length}",
    ),
    Metric(
        "nsd",
        "normalised surface Dice, the share of the pixels of both surfaces that are within "
        "`--tolerance` of the other one (Nikolov et al., JMIR 2021)",
        title="NSD",
        value=_nsd,
        unit="{tolerance} {length}",
        in_figures=True,
    ),
    _error_of_probability(
        "brier",
        "Brier score, the mean squared difference of probability and mask",
        title="Brier",
        value=lambda case: brier(case.probability, case.truth),
    ),
    _error_of_probability(
        "nll",
        "negative log-likelihood of the mask's pixels, in nats",
        title="NLL",
        value=lambda case: negative_log_likelihood(case.probability, case.truth),
    ),
    _error_of_probability(
        "ece",
        "calibration error of the foreground probability in 15 bins of equal width",
        title="ECE",
        value=lambda case: calibration_error(case.probability, case.truth),
    ),
    _error_of_probability(
        "ace",
        "calibration error of the foreground probability in 15 bins of equal mass",
        title="ACE",
        value=lambda case: case.ranking.calibration_error(),
    ),
)
"""Every metric, in the order of tables, CSV and summary.json."""


def image_metrics(
    probability: ArrayLike,
    mask: ArrayLike,
    *,
    threshold: float = 0.5,
    spacing: tuple[float, float] | None = None,
    tolerance: float = 2.0,
) -> dict[str, float]:
    """Return all metrics of one image, predicted as foreground where probability >= threshold.

    Args:
        probability: (H, W) in [0, 1].
        mask: (H, W) in {0, 1}.
        threshold: in [0, 1]; ranking and calibration do not use it.
        spacing: of rows and of columns, in mm, above 0; None for distances in pixels.
        tolerance: largest distance of two surfaces, in the same unit, that the normalised surface
            Dice counts as agreement; at least 0.

    Returns:
        Values by the names of `METRICS`, in their order.

    Raises:
        PolysegError: a probability is NaN or outside [0, 1], or spacing or tolerance is invalid.

    >>> values = image_metrics([[0.9, 0.4], [0.1, 0.2]], [[1, 1], [0, 0]])
    >>> values["sensitivity"], round(values["dice"], 4), values["hd95"], round(values["brier"], 3)
    (0.5, 0.6667, 0.95, 0.105)
    """
    p, truth = np.asarray(probability, dtype=np.float64), np.asarray(mask) > 0
    if p.ndim != 2 or p.shape != truth.shape:
        raise ValueError(f"expected two arrays (H, W), got {p.shape} and {truth.shape}")
    check_probability(p, truth)
    sides = (1.0, 1.0) if spacing is None else spacing
    if len(sides) != 2 or not all(0 < one < math.inf for one in sides):
        raise PolysegError(f"spacing: {spacing} is invalid; give rows, columns in mm, above 0")
    if not 0 <= tolerance < math.inf:
        raise PolysegError(f"tolerance: {tolerance} is invalid; give a number of at least 0")
    case = Segmentation(p, truth, threshold, sides, tolerance)
    return {name: float(metric.value(case)) for name, metric in METRICS.items()}

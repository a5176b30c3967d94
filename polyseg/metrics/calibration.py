"""What probabilities and uncertainties are worth beside the truth: calibration and ranking.

Of pixels: does a probability of 0.8 come true in 80 % of the cases, and do those of the foreground
rank above those of the background? Of images: do those fail of which the network was unsure?
Everything is NumPy in float64, over all elements of the arrays given, whatever their shape.

Where scores tie, their order would decide although it means nothing. So every tied element counts
with the mean outcome of those that tie with it, its expected value over their random order.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyseg.errors import PolysegError

Values = NDArray[np.float64]

_ROUNDING = 1e-6
"""How far beyond 0 and 1 a probability may lie, being a weighted sum of float32."""


def brier(probability: ArrayLike, truth: ArrayLike) -> float:
    """Return the Brier score, the mean of (p - y)^2 (Brier, 1950).

    Args:
        probability: any shape, not empty, in [0, 1].
        truth: the same shape, in {0, 1}.

    Returns:
        In [0, 1], 0 being the best.

    Raises:
        PolysegError: a probability is NaN or outside [0, 1].

    >>> brier([0.9, 0.5], [1, 0])
    0.13
    """
    p, y = check_probability(probability, truth)
    return float(np.square(p - y).mean())


def negative_log_likelihood(probability: ArrayLike, truth: ArrayLike) -> float:
    """Return the mean of -y log p - (1-y) log(1-p), the cross-entropy, in nats.

    p is first held within [e, 1 - e], e = 2^-52 as in scikit-learn: a pixel that was excluded
    and yet came true costs 36.04 rather than infinity.

    Args:
        probability: any shape, not empty, in [0, 1].
        truth: the same shape, in {0, 1}.

    Returns:
        In [0, 36.05], 0 being the best.

    Raises:
        PolysegError: a probability is NaN or outside [0, 1].

    >>> round(negative_log_likelihood([0.5, 0.5], [1, 0]), 4)
    0.6931
    """
    p, y = check_probability(probability, truth)
    least = np.finfo(np.float64).eps
    p = p.clip(least, 1 - least)
    return float(-np.log(np.where(y, p, 1 - p)).mean())


def calibration_error(probability: ArrayLike, truth: ArrayLike, bins: int = 15) -> float:
    """Return the expected calibration error of the foreground probability, over equal-width bins.

    ECE = sum_m n_m / n |observed_m - predicted_m| (Naeini et al., AAAI 2015; Guo et al., ICML
    2017), but of the foreground's probability rather than of the likelier class's. Where most
    pixels are sure background, their one bin has most of the weight.

    Args:
        probability: any shape, not empty, in [0, 1].
        truth: the same shape, in {0, 1}.
        bins: at least 1; the bins are closed on the right, the first on both sides.

    Returns:
        In [0, 1], 0 being the best.

    Raises:
        PolysegError: a probability is NaN or outside [0, 1].

    >>> round(calibration_error([0.9, 0.9, 0.2, 0.2], [1, 1, 0, 1]), 4)
    0.2
    """
    curve = ReliabilityCurve(bins)
    curve.add(probability, truth)
    return curve.calibration_error


def adaptive_calibration_error(probability: ArrayLike, truth: ArrayLike, bins: int = 15) -> float:
    """Return the calibration error of the foreground probability, over bins of equal mass.

    ACE = 1/M sum_m |observed_m - predicted_m| (Nixon et al., CVPR Workshops 2019, of one class: the
    background's bins mirror the foreground's). Bins differ in size by one element at most, and
    elements of equal probability that a cut divides count with their mean truth.

    Args:
        probability: any shape, not empty, in [0, 1].
        truth: the same shape, in {0, 1}.
        bins: M, at least 1; no more than elements are used.

    Returns:
        In [0, 1], 0 being the best.

    Raises:
        PolysegError: a probability is NaN or outside [0, 1].

    >>> round(adaptive_calibration_error([0.9, 0.9, 0.2, 0.2], [1, 1, 0, 1], bins=2), 4)
    0.2
    """
    return Ranking.of(*check_probability(probability, truth)).calibration_error(bins)


@dataclass
class ReliabilityCurve:
    """What came true beside what was predicted, in equal-width bins, from one image at a time.

    The bins divide [0, 1], closed on the right, the first on both sides. Curves of as many bins
    can be added.

    >>> curve = ReliabilityCurve(bins=2)
    >>> curve.add([[0.1, 0.3], [0.7, 0.9]], [[0, 0], [1, 0]])
    >>> curve.mean_predicted, curve.observed, curve.count
    (array([0.2, 0.8]), array([0. , 0.5]), array([2, 2]))
    >>> (curve + curve).count
    array([4, 4])
    """

    bins: int = 15
    count: NDArray[np.int64] = field(init=False)
    """(bins,), the elements in each bin."""
    _predicted: Values = field(init=False, repr=False)
    _true: Values = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.count = np.zeros(_checked_bins(self.bins), dtype=np.int64)
        self._predicted, self._true = np.zeros(self.bins), np.zeros(self.bins)

    def add(self, probability: ArrayLike, truth: ArrayLike) -> None:
        """Add the pixels of an image."""
        p, y = check_probability(probability, truth)
        index = np.searchsorted(np.linspace(0, 1, self.bins + 1)[1:-1], p)
        self.count += np.bincount(index, minlength=self.bins)
        self._predicted += np.bincount(index, weights=p, minlength=self.bins)
        self._true += np.bincount(index, weights=y, minlength=self.bins)

    def __add__(self, other: "ReliabilityCurve") -> "ReliabilityCurve":
        """Return the curve of all that either took in."""
        if self.bins != other.bins:
            raise ValueError(f"curves of {self.bins} and of {other.bins} bins cannot be added")
        total = ReliabilityCurve(self.bins)
        total.count = self.count + other.count
        total._predicted = self._predicted + other._predicted
        total._true = self._true + other._true
        return total

    @property
    def mean_predicted(self) -> Values:
        """The mean probability in each bin, (bins,); NaN in an empty one."""
        return self._mean(self._predicted)

    @property
    def observed(self) -> Values:
        """The share of foreground in each bin, (bins,) in [0, 1]; NaN in an empty one."""
        return self._mean(self._true)

    @property
    def calibration_error(self) -> float:
        """The expected calibration error, as the function of that name; NaN with nothing added."""
        total = self.count.sum()
        return float(np.abs(self._true - self._predicted).sum() / total) if total else math.nan

    def _mean(self, total: Values) -> Values:
        return np.where(self.count > 0, total / self.count.clip(min=1), math.nan)


@dataclass(frozen=True)
class Ranking:
    """Elements in the order of a score, beside what became of them: one sort for many measures.

    >>> ranking = Ranking.of([0.9, 0.4, 0.4], [1, 0, 1])
    >>> ranking.score, ranking.count, ranking.mean_outcome
    (array([0.4, 0.9]), array([2, 1]), array([0.5, 0.5, 1. ]))
    """

    score: Values
    """(g,), the distinct scores, ascending."""
    count: NDArray[np.intp]
    """(g,), how many elements have it."""
    outcome: Values
    """(g,), the sum of their outcomes; how many are true, where the outcome is a truth."""

    @classmethod
    def of(cls, score: ArrayLike, outcome: ArrayLike) -> "Ranking":
        """Rank elements, both arrays of the same shape and without NaN."""
        scores, outcomes = _pair(score, outcome)
        if np.isnan(scores).any():
            raise ValueError("NaN has no place in an order")
        distinct, group, count = np.unique(scores, return_inverse=True, return_counts=True)
        total = np.bincount(group, weights=outcomes, minlength=count.size)
        return cls(distinct, count, total.astype(np.float64))

    @property
    def mean_outcome(self) -> Values:
        """The outcome of each element in the order, (n,), the mean where several tie."""
        return np.repeat(self.outcome / self.count, self.count)

    def area_under_roc(self) -> float:
        """Return what the function of that name does."""
        negative = self.count - self.outcome
        pairs = self.outcome.sum() * negative.sum()
        below = negative.cumsum() - negative / 2
        return float(self.outcome @ below / pairs) if pairs else math.nan

    def average_precision(self) -> float:
        """Return what the function of that name does."""
        count, positive = self.count[::-1], self.outcome[::-1]
        foreground = positive.sum()
        precision = positive.cumsum() / count.cumsum()
        return float(positive @ precision / foreground) if foreground else math.nan

    def calibration_error(self, bins: int = 15) -> float:
        """Return what `adaptive_calibration_error` does, the scores being probabilities."""
        gap = np.repeat(self.score - self.outcome / self.count, self.count)
        used = min(_checked_bins(bins), gap.size)
        starts = np.arange(used) * gap.size // used
        sizes = np.diff(starts, append=gap.size)
        return float(np.abs(np.add.reduceat(gap, starts) / sizes).mean())


def area_under_roc(score: ArrayLike, truth: ArrayLike) -> float:
    """Return the area under the ROC curve; NaN unless both classes occur.

    It is the Mann-Whitney statistic over its largest value: the chance that an element of the
    foreground scores above one of the background, ties counting half (Hanley and McNeil, 1982).

    Args:
        score: any shape, without NaN.
        truth: the same shape, in {0, 1}.

    Returns:
        In [0, 1], 1 being the best and 1/2 chance.

    >>> area_under_roc([0.9, 0.4, 0.4], [True, True, False])
    0.75
    """
    return Ranking.of(score, truth).area_under_roc()


def average_precision(score: ArrayLike, truth: ArrayLike) -> float:
    """Return the area under the precision-recall curve, by steps; NaN without foreground.

    AP = sum_k (recall_k - recall_k-1) precision_k over the distinct thresholds, from the highest
    down, without interpolation: scikit-learn's `average_precision_score`.

    Args:
        score: any shape, without NaN.
        truth: the same shape, in {0, 1}.

    Returns:
        In [0, 1], 1 being the best and the share of foreground chance.

    >>> round(average_precision([0.9, 0.4, 0.4], [1, 0, 1]), 4)
    0.8333
    """
    return Ranking.of(score, truth).average_precision()


def risk_coverage(risk: ArrayLike, uncertainty: ArrayLike) -> tuple[Values, Values]:
    """Return the risk of the images that remain when only the most certain ones are kept.

    The k most certain of n images are a coverage of k / n, and their mean risk is the selective
    risk (El-Yaniv and Wiener, JMLR 2010). Where uncertainties tie, it is the expected value over
    the random order of the tied, so the order of the images does not matter.

    Args:
        risk: (n,), what an image costs, such as 1 - Dice, without NaN.
        uncertainty: (n,), in any unit, without NaN.

    Returns:
        Coverage, (n,) from 1 / n to 1, and selective risk, (n,), the last of which is the mean.

    >>> risk_coverage([0.5, 0.1, 0.3], [9.0, 2.0, 2.0])
    (array([0.33333333, 0.66666667, 1.        ]), array([0.2, 0.2, 0.3]))
    """
    expected = Ranking.of(uncertainty, risk).mean_outcome
    kept = np.arange(1, expected.size + 1)
    return kept / max(expected.size, 1), expected.cumsum() / kept


def area_under_risk_coverage(risk: ArrayLike, uncertainty: ArrayLike) -> float:
    """Return AURC, the mean selective risk over the coverages 1/n to 1; NaN without images.

    An uncertainty that says nothing has the mean risk for its expected area (Geifman et al., ICLR
    2019).

    Args:
        risk: (n,), without NaN.
        uncertainty: (n,), without NaN.

    Returns:
        In the range of the risks, the lower the better.

    >>> area_under_risk_coverage([0.0, 0.0, 1.0, 1.0], [1, 1, 1, 1])
    0.5
    """
    _, selective = risk_coverage(risk, uncertainty)
    return float(selective.mean()) if selective.size else math.nan


def excess_area(risk: ArrayLike, uncertainty: ArrayLike) -> float:
    """Return E-AURC, the area above that of the perfect order; NaN without images.

    The perfect order is by the risk itself, and its area is what no uncertainty can avoid (Geifman
    et al., ICLR 2019).

    Args:
        risk: (n,), without NaN.
        uncertainty: (n,), without NaN.

    Returns:
        Not negative, 0 being the best.

    >>> excess_area([0.1, 0.3, 0.5], [1, 2, 3]), round(excess_area([0.1, 0.3, 0.5], [3, 2, 1]), 4)
    (0.0, 0.2)
    """
    excess = area_under_risk_coverage(risk, uncertainty) - area_under_risk_coverage(risk, risk)
    return excess if math.isnan(excess) else max(excess, 0.0)


def failure_auroc(failed: ArrayLike, uncertainty: ArrayLike) -> float:
    """Return the chance that a failed image is less certain than one that did not fail.

    Args:
        failed: (n,) bool.
        uncertainty: (n,), without NaN.

    Returns:
        In [0, 1], 1/2 being chance, ties counting half; NaN if all or none failed.

    >>> failure_auroc([True, False, False], [0.3, 0.1, 0.4])
    0.5
    """
    return area_under_roc(uncertainty, failed)


def check_probability(probability: ArrayLike, truth: ArrayLike) -> tuple[Values, NDArray[np.bool_]]:
    """Return probabilities, clipped to [0, 1], and truths as flat arrays.

    Raises:
        PolysegError: a probability is NaN or further outside [0, 1] than rounding explains.
        ValueError: the shapes differ, or there are no elements.

    >>> check_probability([[0.5]], [[1]])
    (array([0.5]), array([ True]))
    """
    p, y = _pair(probability, truth)
    if not p.size:
        raise ValueError("no element was given")
    if not (p.min() >= -_ROUNDING and p.max() <= 1 + _ROUNDING):
        raise PolysegError(
            "probabilities: found NaN or a value outside [0, 1], expected what a sigmoid gives; "
            "look for NaN in the network's weights and in the images"
        )
    return p.clip(0, 1), y > 0


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Values, Values]:
    one, other = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if one.shape != other.shape:
        raise ValueError(f"shapes differ: {one.shape} and {other.shape}")
    return one.ravel(), other.ravel()


def _checked_bins(bins: int) -> int:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    return bins

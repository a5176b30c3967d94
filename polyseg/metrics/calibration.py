"""Calibration of probabilities, and measures of how well an uncertainty predicts errors.

All functions use NumPy in float64 over all elements of their arguments, which have the same shape
and no NaN. `probability` is in [0, 1], `truth` in {0, 1}; a probability that is NaN or outside
[0, 1] raises PolysegError. Elements with equal scores each count with the mean of their outcomes,
the expected value over all orders of these elements.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyseg.errors import PolysegError

Values = NDArray[np.float64]

_ROUNDING = 1e-6
"""Tolerance of probabilities beyond 0 and 1, as they may be weighted sums of float32."""


def brier(probability: ArrayLike, truth: ArrayLike) -> float:
    """Return the Brier score, the mean of (p - y)^2 (Brier, 1950), in [0, 1]; 0 is best.

    >>> brier([0.9, 0.5], [1, 0])
    0.13
    """
    p, y = check_probability(probability, truth)
    return float(np.square(p - y).mean())


def negative_log_likelihood(probability: ArrayLike, truth: ArrayLike) -> float:
    """Return the mean of -y log p - (1-y) log(1-p), the cross-entropy, in nats; 0 is best.

    p is clipped to [e, 1 - e] with e = 2^-52 as in scikit-learn, so the largest value is 36.04.

    >>> round(negative_log_likelihood([0.5, 0.5], [1, 0]), 4)
    0.6931
    """
    p, y = check_probability(probability, truth)
    least = np.finfo(np.float64).eps
    p = p.clip(least, 1 - least)
    return float(-np.log(np.where(y, p, 1 - p)).mean())


def calibration_error(probability: ArrayLike, truth: ArrayLike, bins: int = 15) -> float:
    """Return the expected calibration error of the foreground probability; 0 is best.

    ECE = sum_m n_m / n |observed_m - predicted_m| over `bins` bins of equal width (Naeini et al.,
    AAAI 2015; Guo et al., ICML 2017), but of the foreground's probability rather than of the
    likelier class's. Where most pixels are certain background, their bin has most of the weight.

    >>> round(calibration_error([0.9, 0.9, 0.2, 0.2], [1, 1, 0, 1]), 4)
    0.2
    """
    curve = ReliabilityCurve(bins)
    curve.add(probability, truth)
    return curve.calibration_error


@dataclass
class ReliabilityCurve:
    """Observed and predicted shares of foreground in equal-width bins, from one image at a time.

    The bins divide [0, 1]; they are closed on the right, the first on both sides. Curves with
    equal numbers of bins can be added.

    >>> curve = ReliabilityCurve(bins=2)
    >>> curve.add([[0.1, 0.3], [0.7, 0.9]], [[0, 0], [1, 0]])
    >>> curve.mean_predicted, curve.observed, curve.count
    (array([0.2, 0.8]), array([0. , 0.5]), array([2, 2]))
    >>> (curve + curve).count
    array([4, 4])
    """

    bins: int = 15
    count: NDArray[np.int64] = field(init=False)
    """(bins,) number of elements."""
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
        """Return the curve of the elements of both."""
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
        """The expected calibration error; NaN if nothing was added."""
        total = self.count.sum()
        return float(np.abs(self._true - self._predicted).sum() / total) if total else math.nan

    def _mean(self, total: Values) -> Values:
        return np.where(self.count > 0, total / self.count.clip(min=1), math.nan)


@dataclass(frozen=True)
class Ranking:
    """Elements sorted by a score, with their outcomes: one sort serves several measures.

    >>> ranking = Ranking.of([0.9, 0.4, 0.4], [1, 0, 1])
    >>> ranking.score, ranking.count, ranking.mean_outcome
    (array([0.4, 0.9]), array([2, 1]), array([0.5, 0.5, 1. ]))
    """

    score: Values
    """(g,) distinct scores, ascending."""
    count: NDArray[np.intp]
    """(g,) number of elements with each score."""
    outcome: Values
    """(g,) sum of their outcomes."""

    @classmethod
    def of(cls, score: ArrayLike, outcome: ArrayLike) -> "Ranking":
        """Rank elements by their scores."""
        scores, outcomes = _pair(score, outcome)
        if np.isnan(scores).any():
            raise ValueError("scores contain NaN, which has no rank")
        distinct, group, count = np.unique(scores, return_inverse=True, return_counts=True)
        total = np.bincount(group, weights=outcomes, minlength=count.size)
        return cls(distinct, count, total.astype(np.float64))

    @property
    def mean_outcome(self) -> Values:
        """The outcomes in the order of the scores, (n,); the mean where scores are equal."""
        return np.repeat(self.outcome / self.count, self.count)

    def area_under_roc(self) -> float:
        """Return `area_under_roc` of the score and a binary outcome."""
        negative = self.count - self.outcome
        pairs = self.outcome.sum() * negative.sum()
        below = negative.cumsum() - negative / 2
        return float(self.outcome @ below / pairs) if pairs else math.nan

    def average_precision(self) -> float:
        """Return the area under the precision-recall curve, by steps; NaN without foreground.

        AP = sum_k (recall_k - recall_k-1) precision_k over the distinct thresholds, from the
        highest down, without interpolation, as scikit-learn's `average_precision_score`. Chance is
        the share of foreground.

        >>> round(Ranking.of([0.9, 0.4, 0.4], [1, 0, 1]).average_precision(), 4)
        0.8333
        """
        count, positive = self.count[::-1], self.outcome[::-1]
        foreground = positive.sum()
        precision = positive.cumsum() / count.cumsum()
        return float(positive @ precision / foreground) if foreground else math.nan

    def calibration_error(self, bins: int = 15) -> float:
        """Return the calibration error of foreground probabilities, over bins of equal mass.

        ACE = 1/M sum_m |observed_m - predicted_m| (Nixon et al., CVPR Workshops 2019, of one class:
        the background's bins mirror the foreground's); 0 is best. The sizes of the M = `bins` bins
        differ by at most one element; there are no more bins than elements.

        >>> round(Ranking.of([0.9, 0.9, 0.2, 0.2], [1, 1, 0, 1]).calibration_error(bins=2), 4)
        0.2
        """
        gap = np.repeat(self.score - self.outcome / self.count, self.count)
        used = min(_checked_bins(bins), gap.size)
        starts = np.arange(used) * gap.size // used
        sizes = np.diff(starts, append=gap.size)
        return float(np.abs(np.add.reduceat(gap, starts) / sizes).mean())


def area_under_roc(score: ArrayLike, truth: ArrayLike) -> float:
    """Return the area under the ROC curve, in [0, 1]; NaN unless both classes occur.

    It is the probability that a foreground element has a higher score than a background element,
    equal scores counting half (Hanley and McNeil, 1982); 1/2 is chance.

    >>> area_under_roc([0.9, 0.4, 0.4], [True, True, False])
    0.75
    """
    return Ranking.of(score, truth).area_under_roc()


def risk_coverage(risk: ArrayLike, uncertainty: ArrayLike) -> tuple[Values, Values]:
    """Return coverage and selective risk, (n,) each, when only the most certain images are kept.

    The k most certain of n images are a coverage of k / n; the selective risk is their mean risk
    (El-Yaniv and Wiener, JMLR 2010), such as 1 - Dice. For equal uncertainties it is the expected
    value over all orders of these images.

    >>> risk_coverage([0.5, 0.1, 0.3], [9.0, 2.0, 2.0])
    (array([0.33333333, 0.66666667, 1.        ]), array([0.2, 0.2, 0.3]))
    """
    expected = Ranking.of(uncertainty, risk).mean_outcome
    kept = np.arange(1, expected.size + 1)
    return kept / max(expected.size, 1), expected.cumsum() / kept


def area_under_risk_coverage(risk: ArrayLike, uncertainty: ArrayLike) -> float:
    """Return AURC, the mean selective risk over the coverages 1/n to 1; NaN without images.

    A random order has the mean risk as its expected area (Geifman et al., ICLR 2019).

    >>> area_under_risk_coverage([0.0, 0.0, 1.0, 1.0], [1, 1, 1, 1])
    0.5
    """
    _, selective = risk_coverage(risk, uncertainty)
    return float(selective.mean()) if selective.size else math.nan


def excess_area(risk: ArrayLike, uncertainty: ArrayLike) -> float:
    """Return E-AURC, the area above that of the perfect order, at least 0; NaN without images.

    The perfect order is that of the risk itself (Geifman et al., ICLR 2019).

    >>> excess_area([0.1, 0.3, 0.5], [1, 2, 3]), round(excess_area([0.1, 0.3, 0.5], [3, 2, 1]), 4)
    (0.0, 0.2)
    """
    excess = area_under_risk_coverage(risk, uncertainty) - area_under_risk_coverage(risk, risk)
    return excess if math.isnan(excess) else max(excess, 0.0)


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
        raise ValueError("no elements were given")
    if not (p.min() >= -_ROUNDING and p.max() <= 1 + _ROUNDING):
        raise PolysegError(
            "probabilities: found NaN or values outside [0, 1]; check the network's weights and "
            "the images for NaN"
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

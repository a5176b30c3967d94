"""Comparisons of networks on the same images: confidence intervals, paired tests, spreads.

Values are metrics of images, NaN where undefined. Results do not depend on the order of the images;
random numbers are seeded by an argument.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyseg.errors import PolysegError
from polyseg.metrics.rank_stability import ranks, spearman

Values = NDArray[np.float64]
Groups = Sequence[str | None] | None
"""The group of each image, such as its patient."""

_DIGITS = 12
"""Number of decimals to which differences are rounded, relative to the largest value."""
_ENUMERATED = 13
"""Largest number of differences whose signs are all enumerated, which is exact even with ties."""
_NO_ORDER = 0.1
"""Largest upper end of the interval of a correlation that counts as none."""
_NORMAL_975 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""
_BATCH = 50_000
"""Number of values that the bootstrap draws at a time, to bound its memory."""


class Interval(NamedTuple):
    """A confidence interval; NaN where undefined."""

    low: float
    high: float


class RankCorrelation(NamedTuple):
    """Spearman's correlation of two series, with its confidence interval."""

    value: float
    """The correlation; NaN where undefined."""
    interval: Interval
    images: int
    """Number of images with both values."""

    @property
    def order(self) -> str:
        """The verdict on a difficulty, if the other series is the error; "" if D rises with it.

        >>> RankCorrelation(-0.4, Interval(-0.6, -0.1), 75).order
        'falls as the error rises'
        """
        low, high = self.interval
        if high < 0:
            return "falls as the error rises"
        if high < _NO_ORDER:
            return "does not rank images by error"
        return "is not shown to rank images by error" if low <= 0 <= high else ""


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a network from a baseline in one metric on the same images.

    A case is a patient if patients are known, otherwise an image.
    """

    images: int
    """Number of images for which the metric is defined for both networks."""
    mean: float
    """Mean over the cases of other - baseline; NaN without images."""
    interval: Interval
    """Interval of that mean; NaN below two cases."""
    p_value: float
    """p of Wilcoxon's signed-rank test over the cases, two-sided; NaN below two."""
    better: int
    """Number of cases in which the other network is better."""
    worse: int
    equal: int
    patients: int = 0
    """Number of patients of those images; 0 where none are known."""
    runs: int = 0
    """Number of pairs of runs with equal seed and fold, if arms of several runs are compared."""
    deviation_over_runs: float = math.nan
    """Standard deviation of the pairs' differences; NaN below two."""
    p_over_runs: float = math.nan
    """p of the paired t-test over the pairs of runs, two-sided; NaN below two."""
    adjusted: float = math.nan
    """`p` adjusted by `adjust_together`; NaN until then."""

    @property
    def p(self) -> float:
        """The larger of the known p: a difference has to hold over cases and over runs."""
        return float(np.fmax(self.p_value, self.p_over_runs))


def group_means(values: ArrayLike, groups: Groups = None) -> Values:
    """Return the mean of the defined values of each group of images, such as a patient's.

    Values are (n,), NaN where undefined; an image whose group is None is a group of its own, and
    without groups values stay as they are. Means are in order of appearance, NaN for a group
    without a defined value.

    >>> group_means([0.2, 0.4, 0.9, np.nan], ["a", "a", "b", "c"]).round(3)
    array([0.3, 0.9, nan])
    """
    given = np.asarray(values, dtype=np.float64)
    if groups is None:
        return given
    places: dict[tuple[bool, object], int] = {}
    keys = [(group is None, i if group is None else group) for i, group in enumerate(groups)]
    rows = np.array([places.setdefault(key, len(places)) for key in keys], dtype=np.intp)
    known = np.isfinite(given)
    counts = np.bincount(rows[known], minlength=len(places))
    sums = np.bincount(rows[known], weights=given[known], minlength=len(places))
    means: Values = np.divide(sums, counts, out=np.full(len(places), np.nan), where=counts > 0)
    return means


def mean_interval(
    values: ArrayLike, *, level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Interval:
    """Return the bootstrap confidence interval of the mean over images.

    Bias-corrected and accelerated (Efron, 1987); by percentiles where that is undefined. Values,
    (n,), that are not finite are dropped. The interval is NaN below two values, (v, v) if all are
    v, and mirrored for -values, unless the values are their own mirror image.

    >>> interval = mean_interval([0.7, 0.8, 0.9, 0.8])
    >>> 0.7 < interval.low < 0.8 < interval.high < 0.9
    True
    """
    known = np.sort(_finite(values))
    if known.size < 2:
        return Interval(math.nan, math.nan)
    if known[0] == known[-1]:
        return Interval(float(known[0]), float(known[0]))
    mirrored = -known[::-1]
    # Of values and mirrored values always resample the same one.
    if mirrored.tolist() > known.tolist():
        low, high = _bootstrap(mirrored, level, resamples, seed)
        return Interval(0.0 - high, 0.0 - low)
    return _bootstrap(known, level, resamples, seed)


def rank_correlation(first: ArrayLike, second: ArrayLike) -> RankCorrelation:
    """Return Spearman's correlation of two series, (n,), with its 95 % confidence interval.

    By Fisher's z = artanh r with the standard error sqrt((1 + r^2 / 2) / (n - 3)) of Bonett and
    Wright (2000), whose intervals hold their level for large r too. Images with a value that is not
    finite are left out. The interval is NaN below four images and where r is undefined, and (r, r)
    where r is 1 or -1.

    >>> x = np.arange(30.0)
    >>> found = rank_correlation(x, np.roll(x, 3))
    >>> round(found.value, 2), [round(end, 2) for end in found.interval]
    (0.46, [0.1, 0.71])
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    r, images = spearman(x, y), int((np.isfinite(x) & np.isfinite(y)).sum())
    if images < 4 or not math.isfinite(r):
        return RankCorrelation(r, Interval(math.nan, math.nan), images)
    if abs(r) >= 1:
        return RankCorrelation(r, Interval(r, r), images)
    half = _NORMAL_975 * math.sqrt((1 + r**2 / 2) / (images - 3))
    z = math.atanh(r)
    return RankCorrelation(r, Interval(math.tanh(z - half), math.tanh(z + half)), images)


def paired_difference(
    baseline: ArrayLike,
    other: ArrayLike,
    *,
    groups: Groups = None,
    higher_is_better: bool = True,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> PairedDifference:
    """Compare two networks on the same images: mean difference, its interval, Wilcoxon's test.

    If groups are known, such as patients, all results are over the means of the groups, because
    images of one patient are not independent. The interval is then that of a cluster bootstrap,
    which draws whole groups.

    Differences are rounded to 1e-12 of the largest value, so that rounding errors get no ranks.
    Zeros get no rank (Wilcoxon, 1945) and are counted as `equal`. p is exact up to 13 differences,
    up to 50 without ties, and beyond by the normal approximation with correction for ties. Pratt's
    ranking of zeros (1959) would need the approximation also for few differing images: for four
    that differ one way among sixteen zeros it gives p < 0.05, where the exact value is 1/8. If no
    two values differ, p is 1 and the interval (0, 0).

    Args:
        baseline: (n,), the metric of each image by one network.
        other: (n,), of the same images by the other; another number of images raises PolysegError.
        groups: n names, such as patients; None makes every image a case of its own.
        higher_is_better: False if small values are good, such as distances.
        level: level of the interval, in (0, 1).
        resamples: number of resamples of the bootstrap over the cases, at least 1.
        seed: random seed of the resampling.

    >>> found = paired_difference([0.5, 0.6, 0.7], [0.6, 0.6, np.nan])
    >>> found.images, round(found.mean, 3), found.better, found.worse, found.equal
    (2, 0.05, 1, 0, 1)
    """
    every, unit = _differences(baseline, other)
    differences = _finite(_rounded(group_means(every, groups), unit))
    cases = differences.size
    higher, lower = int((differences > 0).sum()), int((differences < 0).sum())
    better, worse = (higher, lower) if higher_is_better else (lower, higher)
    return PairedDifference(
        images=int(np.isfinite(every).sum()),
        patients=0 if groups is None else cases,
        mean=math.fsum(differences) / cases if cases else math.nan,
        interval=mean_interval(differences, level=level, resamples=resamples, seed=seed),
        p_value=_signed_rank(differences),
        better=better,
        worse=worse,
        equal=cases - higher - lower,
    )


def over_runs(found: PairedDifference, differences: ArrayLike) -> PairedDifference:
    """Add the paired t-test over the runs of two arms to a comparison over images.

    Images show whether these networks differ; only other seeds show whether two ways of training
    differ. `differences`, (m,), are those of the means of runs with equal seed and fold.

    >>> found = paired_difference([0.5, 0.6, 0.7], [0.6, 0.7, 0.8])
    >>> round(over_runs(found, [0.1, 0.2, 0.0]).p_over_runs, 3)
    0.225
    """
    known = _finite(differences)
    if known.size < 2:
        return replace(found, runs=known.size)
    deviation = float(known.std(ddof=1))
    if deviation > 0:
        from scipy import stats

        p_value = float(stats.ttest_1samp(known, 0).pvalue)
    else:
        p_value = 0.0 if known.any() else 1.0
    return replace(found, runs=known.size, deviation_over_runs=deviation, p_over_runs=p_value)


def adjust_together(differences: Sequence[PairedDifference]) -> list[PairedDifference]:
    """Return the comparisons of one family with p-values adjusted by `holm`.

    >>> one = paired_difference([0, 0, 0], [1, 2, 3], resamples=99)
    >>> [found.adjusted for found in adjust_together([one, one])]
    [0.5, 0.5]
    """
    adjusted = holm([one.p for one in differences])
    return [replace(one, adjusted=float(p)) for one, p in zip(differences, adjusted, strict=True)]


def holm(p_values: ArrayLike) -> Values:
    """Return p-values, (m,), adjusted for multiple comparisons (Holm, 1979); NaN stays NaN.

    Rejecting where the adjusted p is below alpha rejects any true hypothesis of the family with a
    probability of at most alpha.

    >>> holm([0.01, 0.04, 0.03, 0.005]).round(3)
    array([0.03, 0.06, 0.06, 0.02])
    """
    adjusted = np.array(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(adjusted))
    ascending = known[np.argsort(adjusted[known])]
    steps = adjusted[ascending] * np.arange(known.size, 0, -1)
    adjusted[ascending] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def stars(p_value: float) -> str:
    """Return "*" for p < 0.05, "**" for p < 0.01, "***" for p < 0.001, otherwise "".

    >>> stars(0.004), stars(0.05)
    ('**', '')
    """
    return "*" * sum(p_value < limit for limit in (0.05, 0.01, 0.001))


def terciles(values: ArrayLike) -> NDArray[np.int8]:
    """Return the third by rank of each value, (n,): 0 lowest, 2 highest, -1 for NaN.

    Equal values share the third of their mean rank, the upper one on a border. Without equal values
    the sizes of the thirds differ by at most one.

    >>> terciles([0.9, 0.1, 0.2, np.nan, 0.2])
    array([ 2,  0,  1, -1,  1], dtype=int8)
    """
    given = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(given)
    thirds = np.full(given.shape, -1, dtype=np.int8)
    # Twice the mean ranks are whole numbers, so that borders have no rounding.
    twice = np.rint(2 * ranks(given[known])).astype(np.int64)
    thirds[known] = 3 * (twice - 1) // (2 * max(twice.size, 1))
    return thirds


def deviation_over_seeds(matrix: ArrayLike) -> float:
    """Return the standard deviation of the seeds' means over images; NaN below two seeds.

    `matrix` is (seeds, images), NaN where undefined; means are over the other values.

    >>> round(deviation_over_seeds([[0.5, 0.7], [0.7, 0.9]]), 3)
    0.141
    """
    values = np.asarray(matrix, dtype=np.float64)
    defined = (~np.isnan(values)).sum(axis=1)
    means = np.nansum(values, axis=1)[defined > 0] / defined[defined > 0]
    return float(means.std(ddof=1)) if means.size > 1 else math.nan


def _finite(values: ArrayLike) -> Values:
    given = np.asarray(values, dtype=np.float64)
    return given[np.isfinite(given)]


def _bootstrap(values: Values, level: float, resamples: int, seed: int) -> Interval:
    from scipy import stats

    found = Interval(math.nan, math.nan)
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = stats.bootstrap(
                (values,),
                np.mean,
                n_resamples=resamples,
                batch=max(_BATCH // values.size, 1),
                confidence_level=level,
                method=method,
                rng=np.random.default_rng(seed),
            )
        found = Interval(*map(float, result.confidence_interval))
        if np.isfinite(found).all():
            break
    return found


def _differences(baseline: ArrayLike, other: ArrayLike) -> tuple[Values, float]:
    """Return other - baseline, (n,), NaN where one is undefined, and the unit of their rounding."""
    first, second = (np.asarray(values, dtype=np.float64) for values in (baseline, other))
    if first.shape != second.shape:
        raise PolysegError(
            f"the networks have {first.size} and {second.size} images; compare them on the same"
        )
    both = np.isfinite(first) & np.isfinite(second)
    largest = np.abs(np.stack([first[both], second[both]])).max(initial=0.0)
    # A power of two, because scaling by it causes no rounding.
    unit = float(np.ldexp(1.0, np.frexp(largest)[1]))
    differences = np.full(first.shape, np.nan)
    differences[both] = second[both] - first[both]
    return _rounded(differences, unit), unit


def _rounded(values: Values, unit: float) -> Values:
    rounded: Values = np.round(values / unit, _DIGITS) * unit
    return rounded + 0.0  # -0 becomes 0


def _signed_rank(differences: Values) -> float:
    from scipy import stats

    if differences.size < 2:
        return math.nan
    unequal = differences[differences != 0]
    if unequal.size < 2:
        return 1.0
    if unequal.size > _ENUMERATED:
        return float(stats.wilcoxon(unequal).pvalue)
    # As `wilcoxon` with ties, but vectorised.
    signed = ranks(np.abs(unequal)) * np.sign(unequal)
    return float(
        stats.permutation_test(
            (signed,),
            np.sum,
            permutation_type="samples",
            n_resamples=2**signed.size,
            vectorized=True,
        ).pvalue
    )

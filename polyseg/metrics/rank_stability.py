"""Rank correlations, and the reliability of difficulty ranks from a limited number of passes."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

FEWEST_PASSES = 4
"""Smallest number of passes for a standard error and a rank stability. With fewer, half of the
passes is a single pass, whose mutual information and variance are 0."""


def ranks(values: Values) -> Values:
    """Return the ranks of finite values, (n,), from 1; equal values get their mean rank.

    >>> ranks(np.array([0.3, 0.1, 0.3]))
    array([2.5, 1. , 2.5])
    """
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: Values = count.cumsum() - (count - 1) / 2
    return mean[group]


def spearman(first: Values, second: Values) -> float:
    """Return Spearman's rank correlation of the pairs of finite values; NaN where undefined.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([2.0, 9.0, 100.0]))
    1.0
    """
    known = np.isfinite(first) & np.isfinite(second)
    x, y = first[known], second[known]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef([ranks(x), ranks(y)])[1, 0])


def partial_spearman(first: Values, second: Values, given: Values) -> float:
    """Return Spearman's rank correlation of two series, controlled for a third, (n,) each.

    The partial correlation of the ranks: (r_12 - r_13 r_23) / sqrt((1 - r_13^2) (1 - r_23^2)).
    Images with a value that is not finite are dropped. NaN below four images, where a series is
    constant, and where `given` determines the ranks of one of the two.

    >>> size = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    >>> difficulty, error = np.array([[2.0, 1.0, 3.0, 5.0, 4.0], [2.0, 1.0, 4.0, 5.0, 3.0]])
    >>> round(spearman(difficulty, error), 2), round(partial_spearman(difficulty, error, size), 2)
    (0.9, 0.87)
    """
    series = np.stack([first, second, given])
    known = series[:, np.isfinite(series).all(axis=0)]
    if known.shape[1] < 4 or (np.ptp(known, axis=1) == 0).any():
        return float("nan")
    r: Values = np.asarray(np.corrcoef([ranks(one) for one in known]))
    left = 1 - r[:2, 2] ** 2
    # Equal ranks give 1 up to rounding; other ranks of 10,000 images at most 1 - 3e-12.
    if left.min() < 1e-13:
        return float("nan")
    partial = (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt(left[0] * left[1])
    return float(np.clip(partial, -1, 1))


def rank_stability(halves: Values) -> float:
    """Return the expected rank correlation of a difficulty with that of infinitely many passes.

    The correlation r of two halves of the passes is the reliability of one half; that of all passes
    is 2 r / (1 + r) (Spearman and Brown, 1910), and its root is the expected correlation. `halves`
    are (S, 2, n) difficulties from each half, for S ways of halving. The result is in [0, 1]; NaN
    where ranks are undefined.

    >>> rank_stability(np.array([[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]]))
    1.0
    """
    r = float(np.mean([spearman(one, other) for one, other in halves]))
    return math.sqrt(max(2 * r / (1 + r), 0.0)) if r > -1 else (0.0 if r == -1 else r)


def passes_needed(stability: float, passes: int, target: float) -> int:
    """Return the smallest number of passes whose expected rank stability reaches a target.

    `stability`, measured with `passes`, and `target` are in (0, 1). The odds of the squared
    stability are proportional to the passes.

    >>> passes_needed(0.9, 10, 0.9), passes_needed(0.9, 10, 0.95)
    (10, 22)
    """
    odds, wanted = (one**2 / (1 - one**2) for one in (stability, target))
    return math.ceil(round(passes * wanted / odds, 6))


def jackknife_error(left_out: Values) -> Values:
    """Return the standard error, (n,), of a statistic from its values with one group left out.

    The delete-a-group jackknife, sqrt((G - 1) / G sum_g (D_g - mean D)^2), for values (G, n) of G
    groups of about equal size, G at least 2.

    >>> means = np.array([[(2.0 + 3.0) / 2], [(1.0 + 3.0) / 2], [(1.0 + 2.0) / 2]])
    >>> round(float(jackknife_error(means)[0]), 4) == round(1 / 3**0.5, 4)
    True
    """
    groups: Any = len(left_out)
    if groups < 2:
        raise ValueError(f"left_out {left_out.shape} must be (G, n) with G at least 2")
    error: Values = np.sqrt((groups - 1) * left_out.var(axis=0))
    return error

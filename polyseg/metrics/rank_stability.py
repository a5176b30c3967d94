"""How sure a ranking of difficulties is, judged from the passes that it was made of."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

FEWEST_JUDGED = 4
"""Least number of passes for a standard error and a rank stability. Of fewer, a half is a single
pass, which disagrees with nothing: its mutual information and variance are 0 whatever the image."""


def ranks(values: Values) -> Values:
    """Return the ranks of finite values from 1, those of equal values their mean.

    Args:
        values: (n,).

    >>> ranks(np.array([0.3, 0.1, 0.3]))
    array([2.5, 1. , 2.5])
    """
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: Values = count.cumsum() - (count - 1) / 2
    return mean[group]


def spearman(first: Values, second: Values) -> float:
    """Return Spearman's rank correlation of two series, NaN where it has no meaning.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([2.0, 9.0, 100.0]))
    1.0
    """
    known = np.isfinite(first) & np.isfinite(second)
    x, y = first[known], second[known]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef([ranks(x), ranks(y)])[1, 0])


def partial_spearman(first: Values, second: Values, given: Values) -> float:
    """Return Spearman's rank correlation of two series at equal values of a third.

    The partial correlation of the ranks: (r_12 - r_13 r_23) / sqrt((1 - r_13^2) (1 - r_23^2)),
    that of what a straight line in the ranks of `given` leaves of the other two.

    Args:
        first: (n,); what is not finite in any of the three is dropped from all.
        second: (n,).
        given: (n,), what is held fixed.

    Returns:
        In [-1, 1]; NaN below four images, where a series is constant, and where `given` alone
        determines the ranks of one of the two.

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
    # Equal ranks correlate by 1 but for rounding; others, of 10,000 images, by 1 - 3e-12 at most.
    if left.min() < 1e-13:
        return float("nan")
    partial = (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt(left[0] * left[1])
    return float(np.clip(partial, -1, 1))


def rank_stability(halves: Values) -> float:
    """Return the rank correlation that a difficulty is expected to have with endless passes.

    The correlation r of two halves of the passes is the reliability of half of them, 2 r / (1 + r)
    that of all (Spearman and Brown, 1910), and its root the correlation with what they estimate.

    Args:
        halves: (S, 2, n), the difficulty of n images by either half of the passes, for S ways of
            halving them.

    Returns:
        In [0, 1]; NaN where ranks have no meaning.

    >>> rank_stability(np.array([[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]]))
    1.0
    """
    r = float(np.mean([spearman(one, other) for one, other in halves]))
    return math.sqrt(max(2 * r / (1 + r), 0.0)) if r > -1 else (0.0 if r == -1 else r)


def passes_needed(stability: float, passes: int, target: float) -> int:
    """Return the least number of passes whose rank stability is expected to reach a target.

    The odds of the squared stability grow in proportion to the passes.

    Args:
        stability: in (0, 1), of so many passes.
        passes: at least 1.
        target: in (0, 1).

    >>> passes_needed(0.9, 10, 0.9), passes_needed(0.9, 10, 0.95)
    (10, 22)
    """
    odds, wanted = (one**2 / (1 - one**2) for one in (stability, target))
    return math.ceil(round(passes * wanted / odds, 6))


def jackknife_error(left_out: Values) -> Values:
    """Return the standard error of a statistic from its values with one of G groups left out.

    The delete-a-group jackknife: sqrt((G - 1) / G sum_g (D_g - mean D)^2).

    Args:
        left_out: (G, n), G at least 2, groups of about one size.

    Returns:
        (n,), not negative.

    Raises:
        ValueError: there are fewer than 2 groups.

    >>> means = np.array([[(2.0 + 3.0) / 2], [(1.0 + 3.0) / 2], [(1.0 + 2.0) / 2]])
    >>> round(float(jackknife_error(means)[0]), 4) == round(1 / 3**0.5, 4)
    True
    """
    groups: Any = len(left_out)
    if groups < 2:
        raise ValueError(f"left_out {left_out.shape} must be (G, n) with G at least 2")
    error: Values = np.sqrt((groups - 1) * left_out.var(axis=0))
    return error

"""Rank stability and correlations against closed forms and simulated rankings."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import pearsonr, rankdata, spearmanr

from polyseg.metrics.rank_stability import (
    jackknife_error,
    partial_spearman,
    passes_needed,
    rank_stability,
    ranks,
    spearman,
)

# Spearman.


@given(
    st.lists(
        st.tuples(st.integers(-9, 9), st.integers(-9, 9) | st.just(math.nan)),
        min_size=1,
        max_size=30,
    )
)
def test_spearman_equals_pearson_of_ranks(pairs):
    x, y = np.array(pairs, dtype=float).T
    whole = np.isfinite(y)
    found = spearman(x, y)
    if whole.sum() < 3 or len(set(x[whole])) == 1 or len(set(y[whole])) == 1:
        assert math.isnan(found)
    else:
        expected = pearsonr(rankdata(x[whole]), rankdata(y[whole])).statistic
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "values",
    [[1.0, 2.0], [5.0, 5.0, 5.0], [1.0, math.nan, 2.0, math.inf]],
    ids=["two", "all alike", "two are finite"],
)
def test_spearman_is_undefined_without_enough_distinct_values(values):
    assert math.isnan(spearman(np.array(values), np.arange(len(values)) + 0.5))


# Partial correlation.


def residuals(series, control):
    """Return the residuals of a series' ranks after regression on the ranks of the control."""
    ranks = rankdata(series)
    design = np.stack([np.ones(len(ranks)), rankdata(control)], axis=1)
    return ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]


TRIPLES = st.integers(5, 30).flatmap(
    lambda n: arrays(np.float64, (3, n), elements=st.integers(0, 9))
)


@given(TRIPLES)
def test_partial_correlation_equals_correlation_of_rank_residuals(series):
    first, second, control = series
    left = [residuals(one, control) for one in (first, second)]
    found = partial_spearman(first, second, control)
    if np.ptp(control) == 0 or min(np.ptp(one) for one in left) < 1e-9:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(pearsonr(*left).statistic, abs=1e-9)


@given(TRIPLES)
def test_partial_correlation_is_symmetric_odd_and_depends_on_ranks_only(series):
    first, second, control = series
    found = partial_spearman(first, second, control)
    same = [
        partial_spearman(second, first, control),
        partial_spearman(first, second, -control),
        partial_spearman(np.exp(first), second**3, 2 * control + 1),
        partial_spearman(*series[:, ::-1]),
        -partial_spearman(-first, second, control),
    ]
    np.testing.assert_allclose(same, found, atol=1e-12)
    assert math.isnan(found) or -1 <= found <= 1


def test_partial_correlation_removes_only_a_common_cause():
    generator = np.random.default_rng(6)
    common, own, one, other = generator.normal(size=(4, 4000))
    first, second = common + one, common + other
    assert spearman(first, second) > 0.4
    assert partial_spearman(first, second, common) == pytest.approx(0, abs=0.06)
    unrelated = partial_spearman(first, second, own)
    assert unrelated == pytest.approx(spearman(first, second), abs=0.01)


def test_partial_correlation_by_hand():
    """Ranks correlate by 0.8, 0.6 and 0.8: (0.8 - 0.6 x 0.8) / sqrt(0.64 x 0.36)."""
    first, second, control = np.array([[2.0, 4, 1, 3], [1, 4, 2, 3], [1, 3, 2, 4]])
    correlations = [spearman(first, second), spearman(first, control), spearman(second, control)]
    assert correlations == pytest.approx([0.8, 0.6, 0.8])
    found = partial_spearman(first, second, control)
    assert found == pytest.approx(2 / 3)


def test_partial_correlation_excludes_non_finite_values():
    series = np.random.default_rng(7).normal(size=(3, 9))
    spoilt = series.copy()
    spoilt[[0, 1, 2], [1, 4, 8]] = [math.nan, math.inf, math.nan]
    kept = series[:, [0, 2, 3, 5, 6, 7]]
    assert partial_spearman(*spoilt) == partial_spearman(*kept)


@pytest.mark.parametrize(
    "series",
    [
        [[1, 2, 3], [1, 3, 2], [2, 1, 3]],
        [[1, 2, 3, 4], [1, 3, 2, math.nan], [2, 1, 3, 4]],
        [[1, 2, 3, 4], [5, 5, 5, 5], [2, 1, 3, 4]],
        [[1, 2, 3, 4], [2, 1, 3, 4], [5, 5, 5, 5]],
        [[1, 2, 3, 4], [2, 1, 3, 4], [1, 8, 27, 64]],
        [[2, 1, 3, 4], [1, 1, 2, 3], [-1, -1, -2, -3]],
    ],
    ids=["three", "three are finite", "constant", "constant control", "the control", "opposed"],
)
def test_partial_correlation_is_undefined_for_degenerate_series(series):
    assert math.isnan(partial_spearman(*np.array(series, dtype=float)))


@pytest.mark.parametrize("images", [*range(5, 40), 10_000])
def test_partial_correlation_with_the_control_itself_is_undefined_despite_rounding(images):
    control, other = np.random.default_rng(8).integers(0, images, size=(2, images)).astype(float)
    assert math.isnan(partial_spearman(control**3, other, control))
    assert math.isnan(partial_spearman(other, -control, control))


def test_partial_correlation_is_defined_if_two_ranks_differ_from_control():
    control, other = np.random.default_rng(8).normal(size=(2, 10_000))
    nearly = control.copy()
    i, j = np.argsort(control)[5000:5002]
    nearly[[i, j]] = control[[j, i]]
    assert not math.isnan(partial_spearman(nearly, other, control))


# Rank stability.


def measured(generator, images, passes, noise, repeats):
    """Simulate difficulties, and passes that measure them with independent errors.

    Returns:
        The true difficulties, (repeats, images), and the passes, (repeats, passes, images).
    """
    truth = generator.normal(size=(repeats, images))
    errors = generator.normal(scale=noise, size=(repeats, passes, images))
    return truth, truth[:, None] + errors


def mean_correlation(truths, samples):
    """Return the mean correlation of the means over passes with the truth."""
    pairs = zip(truths, samples, strict=True)
    return np.mean([spearman(truth, passes.mean(axis=0)) for truth, passes in pairs])


def halves_of(passes):
    """Split the passes into halves in five ways, as an assessment with ten groups does."""
    count = len(passes)
    ways = []
    for i in range(5):
        first = np.roll(np.arange(count), -i * count // 10)[: count // 2]
        second = np.setdiff1d(np.arange(count), first)
        ways.append([passes[first].mean(axis=0), passes[second].mean(axis=0)])
    return np.array(ways)


@pytest.mark.parametrize("noise", [0.5, 1.5, 3.0, 6.0])
@pytest.mark.parametrize("passes", [10, 40])
def test_stability_predicts_the_correlation_with_the_truth(noise, passes):
    generator = np.random.default_rng(0)
    truths, samples = measured(generator, 80, passes, noise, repeats=40)
    predicted = np.mean([rank_stability(halves_of(one)) for one in samples])
    actual = mean_correlation(truths, samples)
    # If halves hardly agree, the root of a value that varies around 0 is too small on average.
    assert predicted == pytest.approx(actual, abs=0.03 if actual > 0.6 else 0.08)


def test_stability_of_few_images_is_unbiased():
    truths, samples = measured(np.random.default_rng(1), 12, 20, 1.0, repeats=100)
    predicted = np.mean([rank_stability(halves_of(one)) for one in samples])
    assert predicted == pytest.approx(mean_correlation(truths, samples), abs=0.03)


def test_passes_without_information_have_zero_stability():
    generator = np.random.default_rng(2)
    found = [rank_stability(generator.normal(size=(5, 2, 100))) for _ in range(50)]
    assert np.mean(found) < 0.25


@given(arrays(np.float64, (3, 2, 9), elements=st.floats(-1, 1, width=16)))
def test_stability_is_between_0_and_1_or_undefined(halves):
    stability = rank_stability(halves)
    assert math.isnan(stability) or 0 <= stability <= 1


@given(arrays(np.float64, (3, 2, 9), elements=st.integers(-900, 900), unique=True))
def test_stability_depends_on_ranks_only(halves):
    bent = np.exp(halves / 30) * np.arange(1, 4)[:, None, None]
    assert rank_stability(halves) == pytest.approx(rank_stability(bent))


def test_jackknife_with_one_group_is_refused():
    with pytest.raises(ValueError, match=r"left_out \(1, 3\) must be \(G, n\)"):
        jackknife_error(np.ones((1, 3)))


def test_stability_of_equal_opposed_and_constant_halves():
    series = np.array([3.0, 1.0, 2.0, 7.0])
    assert rank_stability(np.array([[series, series]])) == 1
    assert rank_stability(np.array([[series, -series]])) == 0
    assert math.isnan(rank_stability(np.array([[series, np.ones(4)]])))


# Passes.

SHARES = st.floats(0.05, 0.99)


@given(SHARES, st.integers(1, 200), SHARES, SHARES)
def test_higher_target_never_needs_fewer_passes(stability, passes, first, second):
    low, high = sorted((first, second))
    assert passes_needed(stability, passes, low) <= passes_needed(stability, passes, high)


@given(SHARES, SHARES, st.integers(1, 200), SHARES)
def test_higher_stability_never_needs_more_passes(first, second, passes, target):
    low, high = sorted((first, second))
    assert passes_needed(high, passes, target) <= passes_needed(low, passes, target)


@given(st.floats(0.1, 10), st.integers(1, 300), st.floats(0.2, 0.98))
def test_passes_needed_follow_the_closed_form(ratio, passes, target):
    """With variance v of the truth and e of a pass, the squared stability is v / (v + e / N)."""
    stability = math.sqrt(ratio / (ratio + 1 / passes))
    needed = passes_needed(stability, passes, target)
    reached = [math.sqrt(ratio / (ratio + 1 / n)) for n in (needed - 1, needed) if n]
    assert reached[-1] >= target - 1e-6
    assert len(reached) == 1 or reached[0] <= target + 1e-6


@given(SHARES, st.integers(1, 200))
def test_reached_stability_needs_the_same_number_of_passes(stability, passes):
    assert passes_needed(stability, passes, stability) == passes


def test_predicted_number_of_passes_holds_for_simulated_rankings():
    generator = np.random.default_rng(3)
    _, samples = measured(generator, 200, 10, 2.0, repeats=20)
    stability = float(np.mean([rank_stability(halves_of(one)) for one in samples]))
    needed = passes_needed(stability, 10, 0.95)
    truths, more = measured(generator, 200, needed, 2.0, repeats=20)
    assert mean_correlation(truths, more) == pytest.approx(0.95, abs=0.02)


# Standard errors.


def leave_out(statistic, values, groups):
    """Return a statistic of the values without each of the groups in turn."""
    parts = np.array_split(np.arange(len(values)), groups)
    return np.stack([statistic(np.delete(values, part, axis=0)) for part in parts])


@given(
    arrays(
        np.float64,
        st.tuples(st.integers(2, 20), st.integers(1, 4)),
        elements=st.floats(-100, 100),
    )
)
def test_jackknife_error_of_a_mean_is_the_standard_error(values):
    left_out = leave_out(lambda part: part.mean(axis=0), values, len(values))
    expected = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    np.testing.assert_allclose(jackknife_error(left_out), expected, rtol=1e-6, atol=1e-9)


def test_jackknife_error_with_groups_is_unbiased():
    samples = np.random.default_rng(4).normal(scale=3.0, size=(40, 2000))
    squared = jackknife_error(leave_out(lambda part: part.mean(axis=0), samples, 10)) ** 2
    assert squared.mean() == pytest.approx(9 / 40, rel=0.05)


def test_jackknife_error_of_a_log_mean_follows_the_delta_method():
    """The error of the logarithm of a mean is about the error of the mean divided by the mean."""
    samples = np.random.default_rng(5).normal(10.0, 2.0, size=(100, 500))
    errors = jackknife_error(leave_out(lambda part: np.log(part.mean(axis=0)), samples, 10))
    assert np.mean(errors**2) == pytest.approx(4 / 100 / 100, rel=0.1)


def test_spearman_equals_scipy_to_the_last_digit():
    """Recorded runs and reports keep their numbers, whichever function computed them."""
    generator = np.random.default_rng(0)
    for n in (3, 4, 17, 128, 1001):
        for _ in range(20):
            first, noise = generator.integers(0, n, n).astype(float), generator.random(n)
            second = np.round(first + n * noise, 0)
            assert np.array_equal(ranks(first), rankdata(first))
            if np.ptp(first) and np.ptp(second):
                assert spearman(first, second) == spearmanr(first, second).statistic

"""Intervals, paired tests and spreads, against SciPy, closed forms and enumeration."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from polyseg.errors import PolysegError
from polyseg.metrics.significance import (
    Interval,
    RankCorrelation,
    adjust_together,
    deviation_over_seeds,
    holm,
    mean_interval,
    paired_difference,
    rank_correlation,
    stars,
    terciles,
)

FEW = {"resamples": 199}
METRICS = st.lists(st.integers(0, 20).map(lambda one: one / 20), min_size=2, max_size=25)
PAIRS = st.lists(
    st.tuples(*[st.integers(0, 20).map(lambda one: one / 20) | st.just(math.nan)] * 2),
    min_size=1,
    max_size=25,
)
FRACTIONS = st.floats(0, 1)


def undefined(interval):
    return math.isnan(interval.low) and math.isnan(interval.high)


# Intervals.


def bca(values, resamples, seed, level=0.95):
    """Return the BCa interval of Efron and Tibshirani (1993), eq. 14.9 to 14.15."""
    ordered = np.sort(values)
    n = ordered.size
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    means = ordered[drawn].mean(axis=1)
    centred = ordered - ordered.mean()
    below = ((means < ordered.mean()).mean() + (means <= ordered.mean()).mean()) / 2
    bias = stats.norm.ppf(below)
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        z = bias + stats.norm.ppf(share)
        ends.append(np.quantile(means, stats.norm.cdf(bias + z / (1 - acceleration * z))))
    return ends


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("seed", [0, 7])
def test_mean_interval_equals_bca(level, seed):
    values = np.random.default_rng(1).exponential(size=40)  # skewed: mirrored values are smaller
    found = mean_interval(values, level=level, resamples=2000, seed=seed)
    assert found == pytest.approx(bca(values, 2000, seed, level), abs=1e-12)


def test_interval_of_a_symmetric_sample_is_close_to_normal():
    values = stats.norm.ppf((np.arange(200) + 0.5) / 200, loc=3)
    half = 1.96 * values.std() / math.sqrt(200)
    assert mean_interval(values) == pytest.approx((3 - half, 3 + half), abs=0.05 * half)


def test_interval_of_a_skewed_sample_is_longer_towards_the_tail():
    values = stats.expon.ppf((np.arange(30) + 0.5) / 30)
    low, high = mean_interval(values)
    assert high - values.mean() > 1.15 * (values.mean() - low)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_intervals_have_about_nominal_coverage(draw):
    generator = np.random.default_rng(3)
    samples = getattr(generator, draw)(size=(300, 40))
    truth = 0.0 if draw == "normal" else 1.0
    intervals = [mean_interval(one, resamples=499, seed=i) for i, one in enumerate(samples)]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.89 <= covered <= 0.98


def test_level_and_seed_change_the_interval():
    values = np.random.default_rng(2).random(30)
    narrow, wide = (mean_interval(values, level=level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high
    assert mean_interval(values) == mean_interval(values) != mean_interval(values, seed=1)


def test_non_finite_values_are_dropped():
    assert mean_interval([0.5, math.nan, 0.7, math.inf, 0.6]) == mean_interval([0.5, 0.7, 0.6])


@pytest.mark.parametrize("values", [[], [0.5], [math.nan, 0.5, math.nan], [math.inf, 0.5]])
def test_one_value_has_no_interval(values):
    assert undefined(mean_interval(values))


def test_equal_values_have_an_interval_of_one_point():
    assert mean_interval([0.1] * 7) == Interval(0.1, 0.1)


def test_percentile_interval_is_used_if_the_skew_underflows():
    low, high = mean_interval([0.0, 1e-200, 2e-200, 2e-200])
    assert 0 <= low < 1.25e-200 < high <= 2e-200


@settings(deadline=None, max_examples=40)
@given(METRICS, st.randoms(use_true_random=False))
def test_interval_ignores_order_and_mirrors_with_the_sign(values, random):
    shuffled = random.sample(values, len(values))
    low, high = mean_interval(values, **FEW)
    assert mean_interval(shuffled, **FEW) == (low, high)
    assert mean_interval([-one for one in shuffled], **FEW) == (-high, -low)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


def test_many_images_are_resampled_in_chunks(monkeypatch):
    sizes = []

    def mean(values, axis):
        sizes.append(values.size)
        return values.mean(axis=axis)

    monkeypatch.setattr("polyseg.metrics.significance.np.mean", mean)
    mean_interval(np.arange(3000.0), resamples=999)
    assert max(sizes) <= 50_000


# Paired differences.


def sign_flip_p_value(differences):
    """Return Wilcoxon's p-value by enumeration of all signs of the ranks."""
    d = differences[differences != 0]
    ranks = stats.rankdata(np.abs(d))
    sums = np.array([ranks @ signs for signs in product([0, 1], repeat=d.size)])
    seen = ranks @ (d > 0)
    return min(2 * min((sums <= seen).mean(), (sums >= seen).mean()), 1.0)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(-5, 5), min_size=2, max_size=9)
    | st.just([3, -1, 2, 2, 5, 4, 1, 3, 1, 6, -2, 2, 4, 0])
)
def test_p_value_of_few_differences_with_ties_and_zeros_is_exact(steps):
    differences = np.array(steps, dtype=float)
    found = paired_difference(np.zeros(len(steps)), differences, **FEW)
    assert found.p_value == pytest.approx(sign_flip_p_value(differences))


def test_p_value_without_ties_is_exact_up_to_fifty_images():
    differences = np.random.default_rng(0).normal(0.3, 1, size=50)
    found = paired_difference(np.zeros(50), differences, **FEW)
    assert found.p_value == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


def test_p_value_of_many_images_is_the_normal_approximation():
    differences = np.round(np.random.default_rng(0).normal(0.2, 1, size=150), 1)
    unequal = differences[differences != 0]
    n = unequal.size
    ranks = stats.rankdata(np.abs(unequal))
    _, ties = np.unique(np.abs(unequal), return_counts=True)
    assert n < 150
    assert ties.max() > 1
    variance = n * (n + 1) * (2 * n + 1) / 24 - (ties**3 - ties).sum() / 48
    z = (ranks[unequal > 0].sum() - n * (n + 1) / 4) / math.sqrt(variance)
    found = paired_difference(np.ones(150), 1 + differences, **FEW)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(z)))


def test_images_without_difference_do_not_change_the_p_value():
    other = np.full(200, 0.5)
    other[:4] = [0.6, 0.7, 0.8, 0.9]
    found = paired_difference(np.full(200, 0.5), other, **FEW)
    assert found.p_value == pytest.approx(2 / 2**4)
    assert (found.better, found.worse, found.equal) == (4, 0, 196)


def test_p_value_is_about_uniform_under_the_null():
    values = np.random.default_rng(5).integers(0, 30, size=(300, 2, 20)) / 30
    p_values = np.array([paired_difference(*one, resamples=1).p_value for one in values])
    for share in (0.05, 0.2, 0.5):
        assert (p_values <= share).mean() == pytest.approx(share, abs=0.06)


def test_rounding_errors_count_as_ties():
    baseline = np.array([0.3, 0.7, 0.1, 0.1 + 0.2, 0.5])
    noisy = np.array([0.1 * 3, 0.1 * 7, 0.1, 0.3, 0.5 * (1 + 1e-15)])
    found = paired_difference(baseline, noisy, **FEW)
    assert (found.equal, found.p_value, found.mean) == (5, 1.0, 0.0)
    assert found.interval == (0.0, 0.0)
    assert [f"{end:.1f}" for end in paired_difference(noisy, baseline).interval] == ["0.0", "0.0"]
    # Differences of one tenth up to rounding: five positive and one negative of equal rank.
    starts = np.array([0.0, 0.1, 0.2, 0.3, 0.6, 0.9])
    ends = np.array([0.1, 0.2, 0.3, 0.4, 0.7, 0.8])
    assert len(set(np.abs(ends - starts))) > 1
    tied = np.array([1.0, 1, 1, 1, 1, -1])
    assert paired_difference(starts, ends, **FEW).p_value == sign_flip_p_value(tied)


def test_rounding_tolerance_is_relative():
    baseline, other = np.array([3e-15, 1e-15, 5e-15]), np.array([4e-15, 3e-15, 8e-15])
    found = paired_difference(baseline, other, **FEW)
    assert (found.better, found.p_value) == (3, 0.25)
    assert found.mean == pytest.approx(2e-15, rel=1e-9)
    assert 1e-15 <= found.interval.low < 2e-15 < found.interval.high <= 3.01e-15


def test_only_images_defined_for_both_are_compared():
    baseline, other = [0.5, math.nan, 0.2, 0.9, 0.4], [0.6, 0.3, math.nan, 0.7, 0.4]
    found = paired_difference(baseline, other)
    assert found == paired_difference([0.5, 0.9, 0.4], [0.6, 0.7, 0.4])
    assert (found.images, found.better, found.worse, found.equal) == (3, 1, 1, 1)
    assert found.mean == pytest.approx(-0.1 / 3)


def test_smaller_distances_count_as_better():
    found = paired_difference([9.0, 4.0, 5.0], [3.0, 2.0, 6.0], higher_is_better=False, **FEW)
    assert (found.better, found.worse) == (2, 1)
    assert found.mean == pytest.approx(-7 / 3)


def test_equal_networks_have_p_value_one():
    values = np.random.default_rng(0).random(20)
    found = paired_difference(values, values)
    assert (found.mean, found.interval, found.p_value, found.equal) == (0, (0, 0), 1, 20)


@pytest.mark.parametrize("images", [0, 1])
def test_comparison_of_fewer_than_two_images_is_undefined(images):
    found = paired_difference([0.5, math.nan][:images], [0.75, 0.5][:images])
    assert found.images == images
    assert math.isnan(found.p_value)
    assert undefined(found.interval)
    assert found.mean == 0.25 if images else math.isnan(found.mean)


def test_different_numbers_of_images_are_refused():
    with pytest.raises(PolysegError, match="1 and 3 images"):
        paired_difference([0.5], [0.5, 0.6, 0.7])


@settings(deadline=None, max_examples=40)
@given(PAIRS, st.randoms(use_true_random=False))
def test_comparison_ignores_order_and_swapping_mirrors_it(pairs, random):
    first, second = zip(*pairs, strict=True)
    found = paired_difference(first, second, **FEW)
    shuffled = paired_difference(*zip(*random.sample(pairs, len(pairs)), strict=True), **FEW)
    back = paired_difference(second, first, **FEW)
    np.testing.assert_equal(shuffled, found)
    np.testing.assert_equal(back.p_value, found.p_value)
    np.testing.assert_equal(back.mean, 0.0 - found.mean)
    differences = np.sort(np.nan_to_num(np.subtract(second, first)).round(9))
    if (differences != -differences[::-1]).any():
        np.testing.assert_allclose(back.interval, -np.array(found.interval[::-1]), rtol=1e-12)
    assert (back.better, back.worse, back.equal) == (found.worse, found.better, found.equal)
    assert found.better + found.worse + found.equal == found.images


def test_symmetric_differences_have_equal_intervals_after_swapping():
    """Both directions resample the same values, although samples are not symmetric."""
    first, second = [0.0, 0.5, 0.05], [0.05, 0.5, 0.0]
    found, back = paired_difference(first, second, **FEW), paired_difference(second, first, **FEW)
    assert back.interval == found.interval and found.mean == back.mean == 0
    assert found.interval.low < 0 < found.interval.high


def test_larger_gain_increases_the_mean_and_never_the_p_value():
    generator = np.random.default_rng(4)
    baseline, noise = generator.random((2, 40))
    found = [
        paired_difference(baseline, baseline + gain + noise - 0.5, **FEW)
        for gain in (0.0, 0.1, 0.3, 0.6)
    ]
    assert [one.mean for one in found] == sorted(one.mean for one in found)
    assert [one.p_value for one in found[1:]] == sorted(
        (one.p_value for one in found[1:]), reverse=True
    )
    assert [one.interval for one in found] == sorted(one.interval for one in found)


# Several p-values.


def closed_bonferroni(p_values):
    """Return the closed Bonferroni p-values: the largest over all families with a member."""
    members = range(len(p_values))
    families = [
        family for size in range(1, len(p_values) + 1) for family in combinations(members, size)
    ]
    return [
        min(max(len(f) * min(p_values[k] for k in f) for f in families if i in f), 1.0)
        for i in members
    ]


def test_holm_equals_a_case_by_hand():
    """3 x 0.01 = 0.03; 2 x 0.02 = 0.04; 1 x 0.035 is below the previous value, so 0.04."""
    assert holm([0.035, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([0.2]).tolist() == [0.2]
    assert holm([]).tolist() == []


@given(st.lists(FRACTIONS | st.sampled_from([0.01, 0.02]), min_size=1, max_size=7))
def test_holm_equals_closed_bonferroni(p_values):
    assert holm(p_values) == pytest.approx(closed_bonferroni(p_values))


@given(st.lists(FRACTIONS | st.just(math.nan), max_size=12))
def test_undefined_p_values_are_excluded_from_the_family(p_values):
    given_values = np.array(p_values)
    known = ~np.isnan(given_values)
    found = holm(given_values)
    assert np.isnan(found[~known]).all()
    assert found[known].tolist() == holm(given_values[known]).tolist()
    assert (found[known] >= given_values[known]).all()


@given(st.lists(FRACTIONS, min_size=2, max_size=12))
def test_holm_keeps_the_order_and_its_argument(p_values):
    given_values = np.array(p_values)
    found = holm(given_values)
    assert given_values.tolist() == p_values
    assert (np.diff(found[np.argsort(given_values)]) >= 0).all()


def test_comparisons_are_adjusted_as_one_family():
    baseline = np.random.default_rng(6).random((4, 12))
    family = [
        paired_difference(one, one + 0.02 * np.arange(12 - i) if i == 0 else one[::-1], **FEW)
        for i, one in enumerate(baseline)
    ]
    family.append(paired_difference([0.5], [0.6]))
    found = adjust_together(family)
    np.testing.assert_equal(
        [one.adjusted for one in found], holm([one.p_value for one in family]).tolist()
    )
    assert [one.p_value for one in found[:4]] == [one.p_value for one in family[:4]]
    assert all(math.isnan(one.adjusted) for one in family)


def test_stars_follow_the_p_value_limits():
    limits = {0.0009: "***", 0.001: "**", 0.0099: "**", 0.01: "*", 0.0499: "*", 0.05: ""}
    assert {p: stars(p) for p in limits} == limits
    assert stars(math.nan) == stars(1.0) == ""
    assert stars(0.0) == "***"


# Terciles.


@given(st.lists(st.integers(-1000, 1000), max_size=40, unique=True))
def test_terciles_have_about_equal_size_and_ascend(values):
    found = terciles(values)
    sizes = [(found == third).sum() for third in range(3)]
    assert sum(sizes) == len(values)
    assert max(sizes) - min(sizes) <= 1
    assert (np.diff(found[np.argsort(values)]) >= 0).all()
    assert (terciles([-one for one in values]) == 2 - found).all()


@given(st.lists(st.integers(0, 5) | st.just(math.nan), max_size=40))
def test_equal_values_are_in_the_same_tercile(values):
    given_values = np.array(values, dtype=float)
    found = terciles(given_values)
    assert found.dtype == np.int8
    assert ((found == -1) == np.isnan(given_values)).all()
    for value in set(given_values[~np.isnan(given_values)]):
        assert len(set(found[given_values == value])) == 1
    known = given_values[~np.isnan(given_values)]
    assert (np.diff(found[found >= 0][np.argsort(known)]) >= 0).all()
    assert (terciles(np.exp(known)) == found[found >= 0]).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([0.3], [1]),
        ([0.3, 0.1], [2, 0]),
        ([0.3, 0.1, 0.2], [2, 0, 1]),
        ([5.0, 5.0, 5.0, 5.0], [1, 1, 1, 1]),
        ([1, 2, 2, 2, 2, 9], [0, 1, 1, 1, 1, 2]),
        ([1, 1, 1, 2, 3, 4], [0, 0, 0, 1, 2, 2]),
        ([1, 2, 2, 3, 4, 5], [0, 1, 1, 1, 2, 2]),
        ([math.nan, math.nan], [-1, -1]),
        ([math.inf, 0.0, -math.inf], [2, 1, 0]),
    ],
)
def test_terciles_equal_cases_by_hand(values, expected):
    assert terciles(values).tolist() == expected


# Seeds.


def test_deviation_over_seeds_ignores_differences_between_images():
    seeds, images = np.array([-0.1, 0.0, 0.1]), np.array([0.4, 0.5, 0.6, 0.9])
    assert deviation_over_seeds(seeds[:, None] + images) == pytest.approx(0.1)


def test_image_noise_averages_out_of_the_deviation_over_seeds():
    values = np.random.default_rng(0).normal(0.8, 0.1, size=(200, 400))
    assert deviation_over_seeds(values) == pytest.approx(0.1 / math.sqrt(400), rel=0.2)


def test_undefined_cells_are_excluded_from_means():
    nan = math.nan
    matrix = [[0.2, nan, 0.9, nan], [0.4, 0.5, nan, nan], [nan, nan, nan, nan]]
    assert deviation_over_seeds(matrix) == pytest.approx(np.std([0.55, 0.45], ddof=1))


@pytest.mark.parametrize("shape", [(0, 0), (2, 0), (2, 3)])
@pytest.mark.filterwarnings("error")
def test_deviation_over_fewer_than_two_seeds_is_undefined(shape):
    assert math.isnan(deviation_over_seeds([[0.2, 0.4]]))
    assert math.isnan(deviation_over_seeds(np.full(shape, math.nan)))


# Rank correlations.


def test_rank_correlation_interval_is_wider_than_scipys():
    """SciPy's Pearson interval of the ranks uses the standard error 1 / sqrt(n - 3) for z."""
    generator = np.random.default_rng(3)
    x = generator.normal(size=40)
    y = 0.6 * x + generator.normal(size=40)
    found = rank_correlation(x, y)
    plain = stats.pearsonr(stats.rankdata(x), stats.rankdata(y))
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    wider = math.sqrt(1 + found.value**2 / 2)
    for end, theirs in zip(found.interval, plain.confidence_interval(0.95), strict=True):
        z, middle = math.atanh(theirs), math.atanh(found.value)
        assert end == pytest.approx(math.tanh(middle + wider * (z - middle)))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_rank_correlation_intervals_have_nominal_coverage(rho):
    """Test 1000 draws of two normal variables with known Spearman correlation."""
    truth = 6 / math.pi * math.asin(rho / 2)
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        x, noise = generator.normal(size=(2, 60))
        low, high = rank_correlation(x, rho * x + math.sqrt(1 - rho**2) * noise).interval
        inside += low <= truth <= high
    assert 930 <= inside <= 975


def test_few_images_have_no_interval():
    x = np.array([1.0, 2.0, 3.0, np.nan, 5.0])
    found = rank_correlation(x, np.array([1.0, 2.0, 4.0, 3.0, np.nan]))
    assert found.images == 3 and found.value == 1 and undefined(found.interval)
    assert undefined(rank_correlation(x, np.full(5, 0.5)).interval)
    assert rank_correlation(-np.arange(6.0), np.arange(6.0)).interval == (-1, -1)


@pytest.mark.parametrize(
    ("low", "high", "order"),
    [
        (-0.6, -0.2, "falls as the error rises"),
        (-0.6, 0.09, "does not rank images by error"),
        (-0.1, 0.1, "is not shown to rank images by error"),
        (-0.3, 0.4, "is not shown to rank images by error"),
        (0.01, 0.09, "does not rank images by error"),
        (0.05, 0.4, ""),
        (math.nan, math.nan, ""),
    ],
)
def test_order_by_error_is_derived_from_the_interval(low, high, order):
    assert RankCorrelation(0.0, Interval(low, high), 20).order == order

"""Calibration, ranking and failure detection against scikit-learn and closed forms."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as peer
from sklearn.calibration import calibration_curve

from polyseg.errors import PolysegError
from polyseg.metrics.calibration import (
    Ranking,
    ReliabilityCurve,
    area_under_risk_coverage,
    area_under_roc,
    brier,
    calibration_error,
    check_probability,
    excess_area,
    negative_log_likelihood,
    risk_coverage,
)

# Multiples of 1/8 fall on the edges of 2, 4 and 8 bins, and produce ties.
eighths = st.integers(0, 8).map(lambda value: value / 8)
pixels = st.lists(st.tuples(eighths, st.booleans()), min_size=1, max_size=60)
images = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 4)), min_size=1, max_size=6)


def average_precision(score, truth):
    return Ranking.of(score, truth).average_precision()


def adaptive_calibration_error(probability, truth, bins=15):
    return Ranking.of(*check_probability(probability, truth)).calibration_error(bins)


def columns(pairs):
    first, second = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    return first, second


def overconfident(seed, n=600):
    generator = np.random.default_rng(seed)
    probability = generator.beta(0.4, 0.8, n)
    return probability, generator.random(n) < 0.2 + 0.6 * probability


def error_by_hand(probability, truth, bins):
    total = 0.0
    for k in range(bins):
        low, high = k / bins, (k + 1) / bins
        inside = [i for i, p in enumerate(probability) if low < p <= high or p == low == 0]
        if inside:
            gap = np.mean([truth[i] for i in inside]) - np.mean([probability[i] for i in inside])
            total += len(inside) / len(probability) * abs(gap)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn(seed):
    p, y = overconfident(seed)
    p[:3] = 0, 1, 0
    assert brier(p, y) == pytest.approx(peer.brier_score_loss(y, p), abs=1e-14)
    assert negative_log_likelihood(p, y) == pytest.approx(peer.log_loss(y, p), rel=1e-12)
    assert area_under_roc(p, y) == pytest.approx(peer.roc_auc_score(y, p), abs=1e-14)
    assert average_precision(p, y) == pytest.approx(peer.average_precision_score(y, p), abs=1e-14)


@given(pixels)
def test_scores_with_ties_equal_scikit_learn(pairs):
    p, y = columns(pairs)
    assert brier(p, y) == pytest.approx(((p - y) ** 2).mean())
    assert negative_log_likelihood(p, y) == pytest.approx(peer.log_loss(y, p, labels=[0, 1]))
    both = 0 < y.sum() < y.size
    assert area_under_roc(p, y) == (pytest.approx(peer.roc_auc_score(y, p)) if both else NAN)
    precision = average_precision(p, y)
    assert precision == (pytest.approx(peer.average_precision_score(y, p)) if y.any() else NAN)


class Nan:
    def __eq__(self, other):
        return math.isnan(other)

    __hash__ = None


NAN = Nan()


def test_wrong_predictions_of_probability_one_have_finite_loss():
    least = 2.0**-52
    assert negative_log_likelihood([0.0], [1]) == pytest.approx(-math.log(least))
    assert negative_log_likelihood([1.0], [0]) == pytest.approx(-math.log(least))
    assert 0 <= negative_log_likelihood([0.0, 1.0], [0, 1]) < 1e-15
    assert brier([0.0, 1.0], [1, 0]) == calibration_error([0.0, 1.0], [1, 0]) == 1


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
@pytest.mark.parametrize("seed", range(3))
def test_reliability_curve_equals_scikit_learn(seed, bins):
    p, y = overconfident(seed)
    p[:4] = 0, 1, 1 / bins, 0.5
    curve = ReliabilityCurve(bins)
    curve.add(p, y)
    filled = curve.count > 0
    observed, predicted = calibration_curve(y, p, n_bins=bins)
    np.testing.assert_allclose(curve.observed[filled], observed, atol=1e-14)
    np.testing.assert_allclose(curve.mean_predicted[filled], predicted, atol=1e-14)
    assert np.isnan(curve.observed[~filled]).all() and curve.count.sum() == p.size
    assert curve.calibration_error == pytest.approx(error_by_hand(p, y, bins), abs=1e-12)
    assert calibration_error(p, y, bins) == curve.calibration_error


@given(pixels, st.sampled_from([1, 2, 4, 8]))
def test_calibration_error_with_values_on_bin_edges(pairs, bins):
    p, y = columns(pairs)
    assert calibration_error(p, y, bins) == pytest.approx(error_by_hand(p, y, bins), abs=1e-12)


@given(st.lists(pixels, min_size=1, max_size=4))
def test_curves_of_parts_add_up_to_the_curve_of_all(parts):
    whole, total = ReliabilityCurve(4), ReliabilityCurve(4)
    whole.add(*columns(itertools.chain(*parts)))
    for part in parts:
        curve = ReliabilityCurve(4)
        curve.add(*columns(part))
        total = total + curve
    np.testing.assert_array_equal(total.count, whole.count)
    np.testing.assert_allclose(total.observed, whole.observed, atol=1e-14)
    np.testing.assert_allclose(total.mean_predicted, whole.mean_predicted, atol=1e-14)
    assert total.calibration_error == pytest.approx(whole.calibration_error, abs=1e-14)


def test_adding_curves_does_not_change_the_summands():
    first, second = ReliabilityCurve(3), ReliabilityCurve(3)
    first.add([0.5], [1])
    total = first + second
    total.add([0.5], [0])
    assert first.count.sum() == 1 and second.count.sum() == 0 and total.count.sum() == 2
    with pytest.raises(ValueError, match="3 and of 4"):
        first + ReliabilityCurve(4)


def test_empty_curve_has_undefined_error():
    curve = ReliabilityCurve(2)
    assert math.isnan(curve.calibration_error) and np.isnan(curve.observed).all()
    assert curve.count.tolist() == [0, 0]


@pytest.mark.parametrize("bins", [1, 3, 15])
@pytest.mark.parametrize("seed", range(3))
def test_equal_mass_bins_equal_scikit_learn(seed, bins):
    p, y = overconfident(seed)  # 600 divides by the bins, so the quantiles cut between elements
    observed, predicted = calibration_curve(y, p, n_bins=bins, strategy="quantile")
    expected = np.abs(observed - predicted).mean()
    assert adaptive_calibration_error(p, y, bins) == pytest.approx(expected, abs=1e-12)


@given(
    st.lists(st.tuples(eighths, st.booleans()), min_size=1, max_size=6),
    st.integers(1, 8),
)
def test_equal_mass_bins_with_ties_average_over_orders(pairs, bins):
    p, y = columns(pairs)
    bins_used = min(bins, p.size)
    gaps = []
    for order in itertools.permutations(range(p.size)):
        chosen = np.array(sorted(order, key=lambda i: p[i]))  # a stable sort keeps ties shuffled
        cuts = [k * p.size // bins_used for k in range(1, bins_used)]
        gaps.append([(p[part] - y[part]).mean() for part in np.split(chosen, cuts)])
    expected = np.abs(np.mean(gaps, axis=0)).mean()
    assert adaptive_calibration_error(p, y, bins) == pytest.approx(expected, abs=1e-12)


@given(pixels, st.randoms(use_true_random=False), st.integers(1, 20))
def test_measures_do_not_depend_on_the_order(pairs, random, bins):
    p, y = columns(pairs)
    shuffled = list(pairs)
    random.shuffle(shuffled)
    q, z = columns(shuffled)
    for measure in (calibration_error, adaptive_calibration_error):
        assert measure(p, y, bins) == pytest.approx(measure(q, z, bins), abs=1e-12)
        assert 0 <= measure(p, y, bins) <= 1
    for measure in (area_under_roc, average_precision):
        assert measure(p, y) == pytest.approx(measure(q, z), abs=1e-12, nan_ok=True)
    assert excess_area(p, y) == pytest.approx(excess_area(q, z), abs=1e-12)


def test_constant_probability_has_error_equal_to_distance_from_frequency():
    y = np.arange(100) < 30
    for constant in (0.0, 0.3, 0.9, 1.0):
        p = np.full(100, constant)
        for bins in (1, 15, 1000):
            for measure in (calibration_error, adaptive_calibration_error):
                assert measure(p, y, bins) == pytest.approx(abs(constant - 0.3), abs=1e-12)


def test_error_with_one_bin_is_the_difference_of_means():
    p, y = overconfident(0)
    for measure in (calibration_error, adaptive_calibration_error):
        assert measure(p, y, 1) == pytest.approx(abs(p.mean() - y.mean()))


def test_calibrated_predictions_have_less_error_than_overconfident_ones():
    generator = np.random.default_rng(1)
    p = generator.random(200_000)
    y = generator.random(p.size) < p
    # The expected gap of a bin of m is sqrt(2/pi) sqrt(p(1-p)/m), here below 0.004.
    assert max(calibration_error(p, y), adaptive_calibration_error(p, y)) < 0.008
    shifted = generator.random(p.size) < 0.5 + 0.5 * (p - 0.5)
    # |0.5 + (p - 0.5) / 2 - p| has the mean 1/8 on [0, 1].
    assert calibration_error(p, shifted) == pytest.approx(0.125, abs=0.005)
    assert adaptive_calibration_error(p, shifted) == pytest.approx(0.125, abs=0.005)


def test_background_has_the_calibration_error_of_foreground():
    p, y = overconfident(3)
    for measure in (brier, negative_log_likelihood, adaptive_calibration_error, area_under_roc):
        assert measure(1 - p, ~y) == pytest.approx(measure(p, y), rel=1e-9)


def test_calibration_does_not_depend_on_image_shape():
    p, y = overconfident(2)
    for measure in (brier, negative_log_likelihood, calibration_error, adaptive_calibration_error):
        assert measure(p.reshape(20, 5, 6), y.reshape(20, 5, 6)) == pytest.approx(measure(p, y))


@pytest.mark.parametrize(
    "measure", [brier, negative_log_likelihood, calibration_error, adaptive_calibration_error]
)
def test_invalid_probabilities_are_refused(measure):
    for wrong in (math.nan, -0.01, 1.01, math.inf):
        with pytest.raises(PolysegError, match="NaN or values outside"):
            measure([0.5, wrong], [1, 0])
    assert measure([1 + 1e-9, -1e-9], [1, 0]) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="shapes differ"):
        measure(np.zeros((2, 3)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="no element"):
        measure([], [])


def test_zero_bins_and_nan_scores_are_refused():
    for wrong in (
        lambda: ReliabilityCurve(0),
        lambda: calibration_error([0.5], [1], 0),
        lambda: adaptive_calibration_error([0.5], [1], 0),
        lambda: area_under_roc([math.nan, 1.0], [1, 0]),
        lambda: risk_coverage([1.0, 2.0], [math.nan, 0.0]),
    ):
        with pytest.raises(ValueError):
            wrong()


def all_orders(risk, uncertainty):
    """Return the mean selective risks over all orders that the uncertainties allow."""
    curves = []
    for order in itertools.permutations(range(len(risk))):
        if all(uncertainty[a] <= uncertainty[b] for a, b in itertools.pairwise(order)):
            kept = [risk[i] for i in order]
            curves.append([np.mean(kept[: k + 1]) for k in range(len(kept))])
    return np.mean(curves, axis=0)


@given(images)
def test_risk_and_coverage_average_over_tied_orders(pairs):
    risk, uncertainty = columns(pairs)
    coverage, selective = risk_coverage(risk, uncertainty)
    expected = all_orders(risk, uncertainty)
    np.testing.assert_allclose(selective, expected, atol=1e-12)
    np.testing.assert_allclose(coverage, np.arange(1, len(risk) + 1) / len(risk))
    assert selective[-1] == pytest.approx(risk.mean())
    assert area_under_risk_coverage(risk, uncertainty) == pytest.approx(expected.mean())


@given(images)
def test_sorting_by_risk_gives_the_smallest_area(pairs):
    risk, uncertainty = columns(pairs)
    areas = [
        np.mean(np.cumsum(order) / np.arange(1, len(risk) + 1))
        for order in itertools.permutations(risk)
    ]
    excess = area_under_risk_coverage(risk, uncertainty) - min(areas)
    assert excess_area(risk, uncertainty) == pytest.approx(excess, abs=1e-12)
    assert excess_area(risk, 3 * risk - 7) == 0
    assert excess_area(risk, -risk) == pytest.approx(max(areas) - min(areas), abs=1e-12)


@pytest.mark.parametrize(("n", "failures"), [(1, 0), (1, 1), (7, 3), (50, 1), (50, 50)])
def test_failure_measures_equal_closed_forms(n, failures):
    failed = np.arange(n) >= n - failures
    perfect = sum(i / (n - failures + i) for i in range(1, failures + 1)) / n
    assert area_under_risk_coverage(failed, np.arange(n)) == pytest.approx(perfect)
    assert area_under_risk_coverage(failed, np.zeros(n)) == pytest.approx(failures / n)
    assert excess_area(failed, np.zeros(n)) == pytest.approx(failures / n - perfect)
    expected = 1.0 if 0 < failures < n else NAN
    assert area_under_roc(np.arange(n), failed) == expected
    assert area_under_roc(np.zeros(n), failed) == (0.5 if 0 < failures < n else NAN)


@given(images)
def test_failure_auroc_equals_scikit_learn(pairs):
    risk, uncertainty = columns(pairs)
    failed = risk > 5
    value = area_under_roc(uncertainty, failed)
    if failed.all() or not failed.any():
        assert math.isnan(value)
    else:
        assert value == pytest.approx(peer.roc_auc_score(failed, uncertainty))
        assert area_under_roc(np.exp(uncertainty), failed) == value
        assert area_under_roc(-uncertainty, failed) == pytest.approx(1 - value)


def test_metrics_without_images_are_undefined():
    coverage, selective = risk_coverage([], [])
    assert coverage.size == selective.size == 0
    for measure in (area_under_risk_coverage, excess_area, area_under_roc):
        assert math.isnan(measure([], []))
    assert Ranking.of([], []).mean_outcome.size == 0

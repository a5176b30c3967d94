"""The metrics of an image against scikit-learn, MONAI, brute force and hand calculations."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from scipy.spatial.distance import cdist
from sklearn import metrics as peer

from polyseg.errors import PolysegError
from polyseg.metrics.image_metrics import METRICS, image_metrics

SPACINGS = [None, (1.0, 1.0), (0.3, 2.5), (4.0, 0.1)]


def case(seed, size=(24, 31)):
    generator = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    y, x = generator.integers(0, 10, 2)
    mask[y : y + generator.integers(3, 25), x : x + generator.integers(3, 25)] = 1
    return np.clip(0.45 * mask + 0.7 * generator.random(size), 0, 1), mask


def surface(region):
    """Return the pixels with an edge neighbour outside the region, by the definition."""
    padded = np.pad(region, 1)
    middle = padded[1:-1, 1:-1]
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(middle & ~inner)


def brute_force(predicted, truth, spacing, tolerance):
    """Return HD95, ASD and NSD from all distances between the pixels of two surfaces."""
    scale = np.array(spacing or (1.0, 1.0))
    between = cdist(surface(predicted) * scale, surface(truth) * scale)
    there, back = between.min(axis=1), between.min(axis=0)
    both = np.concatenate([there, back])
    return {
        "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
        "asd": both.mean(),
        "nsd": (both <= tolerance + 1e-6).mean(),
    }


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_overlap_ranking_and_probability_equal_scikit_learn(seed, threshold):
    probability, mask = case(seed)
    values = image_metrics(probability, mask, threshold=threshold)
    truth, p = mask.ravel(), probability.ravel()
    predicted = p >= threshold
    expected = {
        "dice": peer.f1_score(truth, predicted),
        "iou": peer.jaccard_score(truth, predicted),
        "sensitivity": peer.recall_score(truth, predicted),
        "specificity": peer.recall_score(truth, predicted, pos_label=0),
        "precision": peer.precision_score(truth, predicted),
        "accuracy": peer.accuracy_score(truth, predicted),
        "auc": peer.roc_auc_score(truth, p),
        "average_precision": peer.average_precision_score(truth, p),
        "brier": peer.brier_score_loss(truth, p),
        "nll": peer.log_loss(truth, p),
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(4))
def test_surface_distances_equal_brute_force_and_monai(seed, spacing):
    probability, mask = case(seed)
    values = image_metrics(probability, mask, spacing=spacing, tolerance=1.2)
    predicted, truth = probability >= 0.5, mask > 0
    for name, value in brute_force(predicted, truth, spacing, 1.2).items():
        assert values[name] == pytest.approx(value, rel=1e-6), name
    pair = [torch.from_numpy(one)[None, None] for one in (predicted, truth)]
    settings = {"include_background": True, "spacing": spacing}
    monai = {
        "hd95": compute_hausdorff_distance(*pair, percentile=95, **settings),
        "asd": compute_average_surface_distance(*pair, symmetric=True, **settings),
        "nsd": compute_surface_dice(*pair, [1.2], **settings),
    }
    for name, value in monai.items():
        assert values[name] == pytest.approx(float(value), rel=1e-5), name


small = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))


@settings(max_examples=150, deadline=None)
@given(small, st.sampled_from(SPACINGS), st.sampled_from([0.0, 0.3, 1.0, 2.5]))
def test_metrics_of_small_masks_equal_brute_force(shape_and_seed, spacing, tolerance):
    *size, seed = shape_and_seed
    generator = np.random.default_rng(seed)
    predicted, truth = (generator.random(size) < generator.random() for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = image_metrics(predicted, truth, spacing=spacing, tolerance=tolerance)
        back = image_metrics(truth, predicted, spacing=spacing, tolerance=tolerance)
    assert list(values) == list(METRICS)
    if predicted.any() and truth.any():
        for name, value in brute_force(predicted, truth, spacing, tolerance).items():
            assert values[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    for name in ("dice", "iou", "accuracy", "hd95", "asd", "nsd", "brier"):
        assert values[name] == pytest.approx(back[name]), f"{name} is symmetric"
    assert values["iou"] == pytest.approx(values["dice"] / (2 - values["dice"]))
    for metric in METRICS.values():
        value = values[metric.name]
        if metric.higher_is_better:
            assert math.isnan(value) or 0 <= value <= 1, metric.name


@pytest.mark.parametrize("seed", range(3))
def test_distances_scale_with_spacing_and_follow_a_transposed_image(seed):
    probability, mask = case(seed)
    one = image_metrics(probability, mask, spacing=(0.3, 0.7), tolerance=1.0)
    scaled = image_metrics(probability, mask, spacing=(3, 7), tolerance=10)
    turned = image_metrics(probability.T, mask.T, spacing=(0.7, 0.3), tolerance=1.0)
    for metric in METRICS.values():
        value, factor = one[metric.name], 10 if metric.unit == "{length}" else 1
        assert scaled[metric.name] == pytest.approx(factor * value, rel=1e-5), metric.name
        assert turned[metric.name] == pytest.approx(value, rel=1e-6), metric.name


EMPTY, FULL, PIXEL = np.zeros((3, 4)), np.ones((3, 4)), np.eye(3, 4) * np.array([1, 0, 0, 0])
BEST = {metric.name: float(metric.higher_is_better) for metric in METRICS.values()}
BEST["nll"] = pytest.approx(0, abs=1e-12)
WORST = {"dice": 0, "iou": 0, "precision": 0, "hd95": 5, "asd": 5, "nsd": 0}


@pytest.mark.parametrize(
    ("predicted", "mask", "expected"),
    [
        (EMPTY, EMPTY, BEST),
        (FULL, FULL, BEST),
        (PIXEL, PIXEL, BEST),
        (
            EMPTY,
            PIXEL,
            WORST | {"sensitivity": 0, "specificity": 1, "auc": 0.5, "accuracy": 11 / 12},
        ),
        (PIXEL, EMPTY, WORST | {"specificity": 11 / 12, "accuracy": 11 / 12, "brier": 1 / 12}),
        (EMPTY, FULL, WORST | {"sensitivity": 0, "accuracy": 0, "average_precision": 1}),
        (FULL, EMPTY, WORST | {"specificity": 0, "accuracy": 0, "ece": 1, "ace": 1}),
        (FULL, PIXEL, {"dice": 2 / 13, "specificity": 0, "precision": 1 / 12, "auc": 0.5}),
        (PIXEL, FULL, {"dice": 2 / 13, "sensitivity": 1 / 12, "precision": 1, "nsd": 6 / 11}),
        (np.ones((1, 1)), np.ones((1, 1)), BEST),
        (np.ones((1, 1)), np.zeros((1, 1)), WORST | {"hd95": 2**0.5, "asd": 2**0.5, "brier": 1}),
    ],
)
def test_metrics_of_empty_and_full_masks(predicted, mask, expected):
    values = image_metrics(predicted, mask.astype(np.uint8))
    undefined = {name for name, value in values.items() if math.isnan(value)}
    assert undefined == (
        ({"sensitivity", "auc", "average_precision"} if not mask.any() else set())
        | ({"specificity", "auc"} if mask.all() else set())
    )
    for name, value in expected.items():
        if name not in undefined:
            expectation = value if name == "nll" else pytest.approx(value, abs=1e-12)
            assert values[name] == expectation, name


def test_worst_distance_is_the_diagonal_in_units_of_spacing():
    values = image_metrics(EMPTY, PIXEL, spacing=(2.0, 0.5))
    assert values["hd95"] == values["asd"] == pytest.approx(math.hypot(3 * 2, 4 * 0.5))


def test_region_at_the_image_border_has_a_surface_there():
    """By hand: the 8 border pixels of the full image, and those and the hole for the ring."""
    full, ring = np.ones((3, 3)), np.ones((3, 3))
    ring[1, 1] = 0
    assert image_metrics(full, ring)["hd95"] == 0
    left = np.zeros((3, 3))
    left[:, 0] = 1
    # From the full image: 3 pixels at 0, 2 at 1, 3 at 2; back: 3 at 0.
    values = image_metrics(full, left, tolerance=1)
    assert values["asd"] == pytest.approx(8 / 11)
    assert values["nsd"] == pytest.approx(8 / 11)
    assert values["hd95"] == pytest.approx(2)


def test_spacing_is_given_as_rows_then_columns():
    first, second = np.zeros((5, 5)), np.zeros((5, 5))
    first[1, 1] = second[3, 1] = 1
    assert image_metrics(first, second, spacing=(3.0, 0.5))["hd95"] == 6.0
    assert image_metrics(first.T, second.T, spacing=(3.0, 0.5))["hd95"] == 1.0


@pytest.mark.parametrize("pixels", range(1, 8))
@pytest.mark.parametrize("size", [0.1, 0.7, 1 / 3])
def test_tolerance_includes_its_exact_multiple_of_pixels(pixels, size):
    first, second = np.zeros((1, 9)), np.zeros((1, 9))
    first[0, 0] = second[0, pixels] = 1
    tolerances = (pixels * size, sum([size] * pixels), 0.999 * pixels * size)
    found = [
        image_metrics(first, second, spacing=(size, size), tolerance=one)["nsd"]
        for one in tolerances
    ]
    assert found == [1, 1, 0]


def test_value_at_the_threshold_is_foreground():
    assert image_metrics([[0.5, 0.49999]], [[1, 0]])["dice"] == 1
    assert image_metrics([[0.7, 0.69999]], [[1, 0]], threshold=0.7)["dice"] == 1


def test_constant_probability_has_the_auc_of_chance():
    values = image_metrics(np.full((2, 4), 0.25), np.eye(2, 4))
    assert values["auc"] == 0.5
    assert values["average_precision"] == values["brier"] + values["ece"] + 0.0625 == 0.25
    assert values["ace"] == 0


def test_metrics_state_which_direction_is_better():
    mask = np.zeros((20, 20))
    mask[4:11, 5:13] = 1
    larger = np.zeros((20, 20))
    larger[3:12, 4:14] = 1
    better, worse = (
        image_metrics(0.1 + 0.8 * np.roll(predicted, shift), mask, tolerance=1)
        for predicted, shift in ((mask, 1), (larger, 5))
    )
    for metric in METRICS.values():
        assert (better[metric.name] > worse[metric.name]) == metric.higher_is_better, metric.name
    assert [one.heading("mm") for one in METRICS.values() if one.unit == "{length}"] == [
        "HD95 (mm)",
        "ASD (mm)",
    ]
    assert METRICS["dice"].heading("mm") == "Dice"


@pytest.mark.parametrize(
    ("probability", "settings", "words"),
    [
        ([[math.nan, 0.5]], {}, "NaN"),
        ([[1.5, 0.5]], {}, "outside"),
        ([[-0.1, 0.5]], {}, "outside"),
        ([[0.1, 0.5]], {"spacing": (0.0, 1.0)}, "spacing"),
        ([[0.1, 0.5]], {"spacing": (1.0, math.nan)}, "spacing"),
        ([[0.1, 0.5]], {"spacing": (1.0, 1.0, 1.0)}, "spacing"),
        ([[0.1, 0.5]], {"tolerance": -1.0}, "tolerance"),
        ([[0.1, 0.5]], {"tolerance": math.inf}, "tolerance"),
    ],
)
def test_invalid_arguments_are_refused(probability, settings, words):
    with pytest.raises(PolysegError, match=words):
        image_metrics(probability, [[1, 0]], **settings)


def test_arrays_that_are_not_one_image_are_refused():
    for first, second in [((2, 3), (1, 3)), ((3,), (3,)), ((1, 2, 3), (1, 2, 3)), ((0, 3), (0, 3))]:
        with pytest.raises(ValueError):
            image_metrics(np.zeros(first), np.zeros(second))


def test_metrics_of_probabilities_alone_do_not_depend_on_the_threshold():
    probability, mask = case(0)
    first, second = (image_metrics(probability, mask, threshold=one) for one in (0.3, 0.8))
    for name, metric in METRICS.items():
        assert (first[name] == second[name]) == metric.of_probability, name

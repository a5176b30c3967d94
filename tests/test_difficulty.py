"""Section 3.4: D, eq. 11 and eq. 12 against NumPy and SciPy, and monotonicity."""

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage, special

from polyseg.choices import REGIONS
from polyseg.difficulty import (
    FALLBACKS,
    epsilon_from_difficulty,
    foreground_mean,
    mean_by_image,
    normalise,
)
from polyseg.montecarlo.regions import select_region

difficulties = arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 0.7))


def test_foreground_mean_is_the_mean_over_the_foreground():
    generator = np.random.default_rng(0)
    pixel_map = generator.random((3, 5, 7))
    region = generator.random((3, 5, 7)) < 0.4
    expected = [pixel_map[i][region[i]].mean() for i in range(3)]
    np.testing.assert_allclose(foreground_mean(pixel_map, region), expected)
    ours = foreground_mean(torch.from_numpy(pixel_map).float(), torch.from_numpy(region))
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_empty_region_has_difficulty_zero():
    assert foreground_mean(np.ones((1, 2, 2)), np.zeros((1, 2, 2))).tolist() == [0.0]


@given(difficulties, st.floats(0, 100))
def test_normalise_equals_numpy(values, percentile):
    expected = (values - np.percentile(values, percentile, method="linear")) / (
        np.sqrt(((values - values.mean()) ** 2).mean()) + 1e-9
    )
    np.testing.assert_allclose(normalise(values, percentile), expected, rtol=1e-9, atol=1e-9)


def test_single_image_gets_the_middle_epsilon():
    assert normalise(np.array([0.3])).tolist() == [0.0]
    assert epsilon_from_difficulty(np.array([0.0]), -0.4, 1.0, 1.0)[0] == pytest.approx(0.3)


@given(
    arrays(np.float64, st.integers(1, 20), elements=st.floats(-1e6, 1e6)),
    st.floats(-0.5, 3),
    st.floats(0, 3),
    st.floats(0, 1000),
)
def test_epsilon_equals_scipy_and_stays_in_range(normalised, low, width, sensitivity):
    ours = epsilon_from_difficulty(normalised, low, low + width, sensitivity)
    expected = low + width * special.expit(sensitivity * normalised)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
    assert (ours >= low).all() and (ours <= low + width).all()


@given(difficulties, st.floats(0, 100), st.floats(0.01, 10))
def test_epsilon_never_decreases_with_difficulty(values, percentile, sensitivity):
    epsilon = epsilon_from_difficulty(normalise(values, percentile), -0.4, 1.0, sensitivity)
    assert (np.diff(epsilon[np.argsort(values)]) >= 0).all()


@given(difficulties)
def test_epsilon_increases_strictly_with_distinct_difficulties(values):
    values = np.unique(values.round(3))
    assume(len(values) > 1)
    epsilon = epsilon_from_difficulty(normalise(values), -0.4, 1.0, 1.0)
    assert (np.diff(epsilon) > 0).all()


def test_equal_bounds_give_exactly_that_epsilon():
    assert (epsilon_from_difficulty(np.linspace(-9, 9, 50), 0.3, 0.3, 1.0) == 0.3).all()


def test_functions_return_tensors_for_tensors():
    values = torch.tensor([0.1, 0.2, 0.4])
    result = epsilon_from_difficulty(normalise(values), -0.4, 1.0, 1.0)
    assert isinstance(result, torch.Tensor) and result.dtype == torch.float64
    expected = epsilon_from_difficulty(normalise(values.double().numpy()), -0.4, 1.0, 1.0)
    np.testing.assert_allclose(result, expected)


@pytest.fixture
def blob():
    mask = torch.zeros(1, 20, 20)
    mask[0, 5:12, 6:15] = 1
    mean = torch.zeros(1, 20, 20)
    mean[0, 8:16, 6:15] = 0.9
    return mask, mean


def test_regions_select_their_pixels(blob):
    mask, mean = blob
    chosen = {
        name: select_region(name, mask, mean)[0]
        for name in ("mask", "prediction", "union", "image")
    }
    assert torch.equal(chosen["mask"], mask > 0)
    assert torch.equal(chosen["prediction"], mean >= 0.5)
    assert torch.equal(chosen["union"], (mask > 0) | (mean >= 0.5))
    assert chosen["image"].all()


@pytest.mark.parametrize("width", [1, 2, 3])
def test_boundary_band_equals_scipy(blob, width):
    mask, mean = blob
    square = np.ones((3, 3))
    inside = mask[0].numpy() > 0
    grown = ndimage.binary_dilation(inside, square, iterations=width)
    shrunk = ndimage.binary_erosion(inside, square, iterations=width)
    chosen, _ = select_region("boundary", mask, mean, boundary_width=width)
    np.testing.assert_array_equal(chosen[0].numpy(), grown & ~shrunk)


@pytest.mark.parametrize("region", ["mask", "boundary"])
def test_missing_mask_falls_back_to_the_prediction(blob, region):
    mask, mean = blob
    means = torch.cat([mean, mean, torch.zeros_like(mean)])
    masks = torch.cat([mask, torch.zeros_like(mask), torch.zeros_like(mask)])
    chosen, fallback = select_region(region, masks, means)
    assert [FALLBACKS[code] for code in fallback] == ["none", "prediction", "empty"]
    assert chosen[1].any() and not chosen[2].any()
    without, codes = select_region(region, None, means[:1])
    assert FALLBACKS[codes[0]] == "prediction"
    assert torch.equal(without[0], chosen[1])


def test_boundary_of_a_full_mask_falls_back_to_the_prediction():
    """Such a mask has no boundary; D = 0 would rank the image as the easiest."""
    masks = torch.ones(3, 32, 32)
    means = torch.zeros(3, 32, 32)
    means[0, :16] = 0.9
    means[1] = 0.9
    chosen, fallback = select_region("boundary", masks, means)
    assert [FALLBACKS[code] for code in fallback] == ["prediction", "prediction", "empty"]
    # The boundary of the prediction if it has one, otherwise the whole prediction.
    assert chosen[0].any(dim=1).nonzero().flatten().tolist() == list(range(13, 19))
    assert chosen[1].all() and not chosen[2].any()


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("truth", [0, 1, None])
@pytest.mark.parametrize("prediction", [0.0, 0.9])
def test_region_is_empty_only_without_a_prediction(region, truth, prediction):
    mask = None if truth is None else torch.full((1, 8, 8), truth)
    chosen, fallback = select_region(region, mask, torch.full((1, 8, 8), prediction))
    assert chosen.any().item() == (FALLBACKS[fallback[0]] != "empty")
    if not chosen.any():
        assert prediction == 0


def test_fallback_is_chosen_for_each_image():
    mask, mean = torch.zeros(3, 12, 12), torch.zeros(3, 12, 12)
    mask[0, 3:8, 3:8] = 1
    mask[1] = 1
    mean[:, :6] = 0.9
    together, codes = select_region("boundary", mask, mean)
    for i in range(3):
        alone, code = select_region("boundary", mask[i : i + 1], mean[i : i + 1])
        assert torch.equal(together[i : i + 1], alone) and codes[i] == code[0]


def test_unknown_region_is_refused():
    with pytest.raises(ValueError, match="'edge' is not a region: choose mask, prediction"):
        select_region("edge", None, torch.zeros(1, 2, 2))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (foreground_mean, [(2, 1, 3, 3), (2, 1, 3, 3)]),
        (foreground_mean, [(2, 3, 3), (2, 1, 3, 3)]),
        (foreground_mean, [(2, 3, 3), (1, 3, 3)]),
        (foreground_mean, [(3, 3), (3, 3)]),
        (normalise, [(3, 1)]),
        (normalise, [()]),
        (normalise, [(0,)]),
        (lambda x: epsilon_from_difficulty(x, 0, 1, 1), [(3, 1)]),
        (lambda x: epsilon_from_difficulty(x, 0, 1, 1), [()]),
        (lambda mask, mean: select_region("mask", mask, mean), [(2, 1, 3, 3), (2, 3, 3)]),
        (lambda mask, mean: select_region("union", mask, mean), [(1, 3, 3), (2, 3, 3)]),
        (lambda mask, mean: select_region("mask", mask, mean), [(2, 1, 3, 3), (2, 1, 3, 3)]),
        (lambda mean: select_region("image", None, mean), [(2, 1, 3, 3)]),
    ],
)
def test_shape_error_states_the_shapes(function, shapes):
    with pytest.raises(ValueError, match=".*".join(re.escape(str(shape)) for shape in shapes)):
        function(*(torch.zeros(shape) for shape in shapes))


def test_mean_by_image_refuses_invalid_image_indices():
    with pytest.raises(ValueError, match=r"values \(3,\) and image \(2,\)"):
        mean_by_image(np.zeros(3), np.zeros(2, dtype=np.int64), 2)
    with pytest.raises(ValueError, match="contains 4, not below 3"):
        mean_by_image(np.zeros(2), np.array([0, 4]), 3)

"""Eq. 8, 9 and 10 against NumPy in float64, and the accumulator against the functions."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from polyseg.choices import UNCERTAINTIES
from polyseg.uncertainty import (
    UncertaintyAccumulator,
    binary_entropy,
    mutual_information,
    prediction_variance,
    predictive_entropy,
)

probabilities = arrays(
    np.float64, st.tuples(st.integers(2, 12), st.integers(1, 6)), elements=st.floats(0, 1)
)


def numpy_entropy(u):
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = u * np.log(u) + (1 - u) * np.log(1 - u)
    return -np.nan_to_num(np.where((u == 0) | (u == 1), 0.0, terms))


@given(probabilities)
def test_functions_equal_numpy(samples):
    tensor = torch.from_numpy(samples)
    mean = samples.mean(0)
    np.testing.assert_allclose(
        prediction_variance(tensor), ((samples - mean) ** 2).mean(0), atol=1e-12
    )
    np.testing.assert_allclose(predictive_entropy(tensor), numpy_entropy(mean), atol=1e-12)
    expected = np.maximum(numpy_entropy(mean) - numpy_entropy(samples).mean(0), 0)
    np.testing.assert_allclose(mutual_information(tensor), expected, atol=1e-12)


@given(probabilities)
def test_measures_satisfy_their_bounds(samples):
    tensor = torch.from_numpy(samples)
    variance, entropy = prediction_variance(tensor), predictive_entropy(tensor)
    information = mutual_information(tensor)
    assert (variance >= 0).all() and (variance <= 0.25 + 1e-12).all()
    assert (entropy >= 0).all() and (entropy <= math.log(2) + 1e-12).all()
    assert (information >= 0).all() and (information <= entropy + 1e-12).all()
    # Pinsker's inequality: mutual information is at least twice the variance.
    assert (information >= 2 * variance - 1e-9).all()


@given(probabilities, st.randoms())
def test_measures_do_not_depend_on_the_order_of_samples(samples, random):
    order = list(range(len(samples)))
    random.shuffle(order)
    tensor = torch.from_numpy(samples)
    torch.testing.assert_close(mutual_information(tensor), mutual_information(tensor[order]))


def test_equal_passes_have_no_mutual_information_and_variance():
    samples = torch.rand(1, 5).expand(7, 5)
    assert mutual_information(samples).abs().max() < 1e-6
    assert prediction_variance(samples).abs().max() < 1e-12


def test_entropy_is_0_at_certainty_and_log_2_at_one_half():
    torch.testing.assert_close(
        binary_entropy(torch.tensor([0.0, 1.0, 0.5])), torch.tensor([0.0, 0.0, math.log(2)])
    )


@given(probabilities)
def test_accumulator_equals_the_functions(samples):
    for dtype in (torch.float64, torch.float32):
        tensor = torch.from_numpy(samples).to(dtype)
        record = UncertaintyAccumulator()
        for sample in tensor:
            record.update(sample)
        exact = tensor.double()
        for ours, expected in (
            (record.mean, exact.mean(0)),
            (record.variance, prediction_variance(exact)),
            (record.entropy, predictive_entropy(exact)),
            (record.mutual_information, mutual_information(exact)),
        ):
            assert (ours - expected).abs().max() < 1e-6


def test_accumulator_is_accurate_for_a_thousand_samples_in_constant_memory():
    generator = torch.Generator().manual_seed(0)
    record, samples = UncertaintyAccumulator(), []
    sizes = set()
    for _ in range(1000):
        # Cancellation is largest near 1.
        sample = torch.rand(4, 9, generator=generator) * 0.01 + 0.99
        samples.append(sample)
        record.update(sample)
        tensors = [value for value in vars(record).values() if isinstance(value, torch.Tensor)]
        sizes.add(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    exact = torch.stack(samples).double()
    assert (record.mutual_information - mutual_information(exact)).abs().max() < 1e-6
    assert (record.variance - prediction_variance(exact)).abs().max() < 1e-6
    assert len(sizes) == 1


def recorded(samples):
    record = UncertaintyAccumulator()
    for sample in samples:
        record.update(sample)
    return record


def check_record(record, samples):
    """Check that a record gives the values of the functions on all samples."""
    maps = record.maps()
    assert list(maps) == list(UNCERTAINTIES)
    assert record.count == len(samples)
    for found, again, expected in (
        (record.mean, record.mean, samples.mean(0)),
        (maps["mutual_information"], record.mutual_information, mutual_information(samples)),
        (maps["entropy"], record.entropy, predictive_entropy(samples)),
        (maps["variance"], record.variance, prediction_variance(samples)),
    ):
        assert torch.equal(found, again)
        assert found.shape == expected.shape
        if expected.numel():
            assert (found - expected).abs().max() < 1e-12


@given(probabilities, st.data())
def test_merged_records_equal_the_record_of_all_samples(samples, data):
    tensor = torch.from_numpy(samples)
    owner = torch.tensor(
        data.draw(st.lists(st.integers(0, 3), min_size=len(tensor), max_size=len(tensor)))
    )
    # Some parts may be empty.
    parts = [recorded(tensor[owner == i]) for i in range(4)]
    check_record(UncertaintyAccumulator.merged(parts), tensor)
    check_record(UncertaintyAccumulator.merged(parts[::-1]), tensor)


@given(probabilities, st.data())
def test_record_without_a_part_equals_the_record_of_the_rest(samples, data):
    tensor = torch.from_numpy(samples)
    out = data.draw(st.integers(1, len(tensor) - 1))
    whole, part = recorded(tensor), recorded(tensor[:out])
    check_record(whole.without(part), tensor[out:])
    check_record(whole, tensor)  # unchanged
    check_record(part, tensor[:out])
    check_record(UncertaintyAccumulator.merged([whole.without(part), part]), tensor)


@given(probabilities, st.data())
def test_record_can_be_restricted_to_pixels(samples, data):
    tensor = torch.from_numpy(samples)
    pixels = data.draw(st.sets(st.integers(0, tensor.shape[1] - 1), min_size=1))
    chosen = torch.zeros(tensor.shape[1], dtype=torch.bool)
    chosen[list(pixels)] = True
    check_record(recorded(tensor).at(chosen), tensor[:, chosen])


def test_record_of_maps_can_be_restricted_to_pixels():
    samples = torch.rand(6, 2, 4, 5, dtype=torch.float64)
    chosen = torch.rand(2, 4, 5) < 0.4
    record = recorded(samples)
    check_record(record.at(chosen), samples[:, chosen])
    check_record(record, samples)


def test_merged_without_and_at_can_be_combined():
    samples = torch.rand(12, 3, 7, dtype=torch.float64)
    chosen = torch.rand(3, 7) < 0.5
    groups = [recorded(samples[i::4]).at(chosen) for i in range(4)]
    whole = UncertaintyAccumulator.merged(groups)
    rest = [i for i in range(12) if i % 4 != 2]
    check_record(whole.without(groups[2]), samples[rest][:, chosen])


def test_accumulator_is_accurate_under_cancellation():
    """Probabilities close to 1, in float32 as from networks, with most passes removed."""
    samples = torch.rand(100, 50) * 1e-3 + 0.999
    left = recorded(samples).without(recorded(samples[:90]))
    exact = samples[90:].double()
    assert (left.variance - prediction_variance(exact)).abs().max() < 1e-12
    assert (left.variance >= 0).all()
    assert (left.mutual_information - mutual_information(exact)).abs().max() < 1e-6


def test_half_precision_samples_are_accumulated_in_float32():
    samples = torch.rand(5, 3).to(torch.bfloat16)
    assert mutual_information(samples).dtype == torch.float32


def test_invalid_samples_are_refused():
    record = UncertaintyAccumulator()
    with pytest.raises(ValueError, match="no sample"):
        _ = record.mean
    record.update(torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(3,\) after \(2,\)"):
        record.update(torch.zeros(3))


@pytest.mark.parametrize("function", [prediction_variance, predictive_entropy, mutual_information])
@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_no_samples_are_refused(function, shape):
    with pytest.raises(ValueError, match=re.escape(f"samples {shape} must be (N, ...)")):
        function(torch.zeros(shape))


def test_records_of_different_samples_cannot_be_combined():
    record, other = recorded(torch.rand(3, 2, 4)), recorded(torch.rand(2, 1, 4))
    with pytest.raises(ValueError, match=r"\(1, 4\), \(2, 4\)"):
        UncertaintyAccumulator.merged([record, other])
    with pytest.raises(ValueError, match=r"2 samples \(1, 4\) are not some of 3 samples \(2, 4\)"):
        record.without(other)
    with pytest.raises(ValueError, match=r"3 samples .* are not some of 3"):
        record.without(record)
    with pytest.raises(ValueError, match=r"chosen \(2,\) of samples \(2, 4\)"):
        record.at(torch.tensor([True, False]))

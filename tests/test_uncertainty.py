"""Eq. 8, 9 and 10 against NumPy in float64, and the accumulator against the functions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

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
def test_functions_agree_with_numpy(samples):
    tensor = torch.from_numpy(samples)
    mean = samples.mean(0)
    np.testing.assert_allclose(
        prediction_variance(tensor), ((samples - mean) ** 2).mean(0), atol=1e-12
    )
    np.testing.assert_allclose(predictive_entropy(tensor), numpy_entropy(mean), atol=1e-12)
    expected = np.maximum(numpy_entropy(mean) - numpy_entropy(samples).mean(0), 0)
    np.testing.assert_allclose(mutual_information(tensor), expected, atol=1e-12)


@given(probabilities)
def test_ranges_and_order(samples):
    tensor = torch.from_numpy(samples)
    variance, entropy = prediction_variance(tensor), predictive_entropy(tensor)
    information = mutual_information(tensor)
    assert (variance >= 0).all() and (variance <= 0.25 + 1e-12).all()
    assert (entropy >= 0).all() and (entropy <= math.log(2) + 1e-12).all()
    assert (information >= 0).all() and (information <= entropy + 1e-12).all()
    # Pinsker: what passes disagree on is at least twice their variance.
    assert (information >= 2 * variance - 1e-9).all()


@given(probabilities, st.randoms())
def test_the_order_of_samples_does_not_matter(samples, random):
    order = list(range(len(samples)))
    random.shuffle(order)
    tensor = torch.from_numpy(samples)
    torch.testing.assert_close(mutual_information(tensor), mutual_information(tensor[order]))


def test_passes_that_agree_share_no_information():
    samples = torch.rand(1, 5).expand(7, 5)
    assert mutual_information(samples).abs().max() < 1e-6
    assert prediction_variance(samples).abs().max() < 1e-12


def test_entropy_at_the_ends_and_in_the_middle():
    torch.testing.assert_close(
        binary_entropy(torch.tensor([0.0, 1.0, 0.5])), torch.tensor([0.0, 0.0, math.log(2)])
    )


@given(probabilities)
def test_the_accumulator_agrees_with_the_functions(samples):
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


def test_a_thousand_samples_stay_within_1e6_and_memory_does_not_grow():
    generator = torch.Generator().manual_seed(0)
    record, samples = UncertaintyAccumulator(), []
    sizes = set()
    for _ in range(1000):
        sample = torch.rand(4, 9, generator=generator) * 0.01 + 0.99  # where cancellation is worst
        samples.append(sample)
        record.update(sample)
        tensors = [value for value in vars(record).values() if isinstance(value, torch.Tensor)]
        sizes.add(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    exact = torch.stack(samples).double()
    assert (record.mutual_information - mutual_information(exact)).abs().max() < 1e-6
    assert (record.variance - prediction_variance(exact)).abs().max() < 1e-6
    assert len(sizes) == 1


def test_half_precision_samples_are_taken_in_float32():
    samples = torch.rand(5, 3).to(torch.bfloat16)
    assert mutual_information(samples).dtype == torch.float32


def test_misuse_is_refused():
    record = UncertaintyAccumulator()
    with pytest.raises(ValueError, match="no sample"):
        _ = record.mean
    record.update(torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(3,\) after \(2,\)"):
        record.update(torch.zeros(3))

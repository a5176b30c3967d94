"""Uncertainty of each pixel, and scores of whole images, from N samples.

Functions take all samples at once; `UncertaintyAccumulator` takes one at a time.

Samples are foreground probabilities, so all entropies are binary and at most log 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyseg.choices import UNCERTAINTIES
from polyseg.losses import dice_loss


def binary_entropy(probability: Tensor) -> Tensor:
    """Return H(u) = -u log u - (1-u) log(1-u) in nats, with 0 log 0 = 0.

    Args:
        probability: any shape, in [0, 1].

    Returns:
        Same shape, in [0, log 2].

    >>> binary_entropy(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.6931, 0.0000])
    """
    other, least = 1 - probability, torch.finfo(probability.dtype).tiny
    # Twice as fast as torch.special.entr; the bound makes 0 log 0 a zero.
    return probability * -probability.clamp_min(least).log() - other * other.clamp_min(least).log()


def prediction_variance(samples: Tensor) -> Tensor:
    """Return the variance of the predictions over the samples, divisor N (eq. 8).

    Args:
        samples: (N, ...) in [0, 1], N at least 1.

    Returns:
        (...) in [0, 1/4], float32 or wider.

    >>> prediction_variance(torch.tensor([[0.0], [1.0]]))
    tensor([0.2500])
    """
    _check_samples(samples)
    return _at_least_float32(samples).var(dim=0, correction=0)


def predictive_entropy(samples: Tensor) -> Tensor:
    """Return the entropy of the mean prediction, H(mean p), in nats (eq. 9).

    Args:
        samples: (N, ...) in [0, 1], N at least 1.

    Returns:
        (...) in [0, log 2], float32 or wider.

    >>> predictive_entropy(torch.tensor([[0.0], [1.0]]))
    tensor([0.6931])
    """
    _check_samples(samples)
    return binary_entropy(_at_least_float32(samples).mean(dim=0))


def mutual_information(samples: Tensor) -> Tensor:
    """Return the mutual information H(mean p) - mean H(p), in nats, at least 0 (eq. 10).

    Args:
        samples: (N, ...) in [0, 1], N at least 1.

    Returns:
        (...) in [0, log 2], float32 or wider.

    >>> mutual_information(torch.tensor([[0.0, 0.5], [1.0, 0.5]]))
    tensor([0.6931, 0.0000])
    """
    _check_samples(samples)
    # In float64, because the two entropies may be equal in six digits.
    wide = samples.to(_widest(samples))
    shared = predictive_entropy(wide) - binary_entropy(wide).mean(dim=0)
    return shared.clamp_min(0).to(torch.promote_types(samples.dtype, torch.float32))


class Moments(NamedTuple):
    """Statistics of the samples at each pixel, each (...), from which uncertainties are computed.

    To add an uncertainty, write a function of `Moments` and add a row to `choices.UNCERTAINTIES`.
    """

    mean: Tensor
    """Mean prediction, in [0, 1]."""
    variance: Tensor
    """Result of `prediction_variance`."""
    entropy: Tensor
    """Result of `predictive_entropy`."""
    mean_entropy: Tensor
    """Mean entropy of the samples, in nats."""
    samples: int = 0
    """Number N of samples."""


def variance_of(moments: Moments) -> Tensor:
    """Return the variance of the predictions."""
    return moments.variance


def entropy_of(moments: Moments) -> Tensor:
    """Return the entropy of the mean prediction, in nats."""
    return moments.entropy


def mutual_information_of(moments: Moments) -> Tensor:
    """Return the mutual information in nats, as `mutual_information` does."""
    return (moments.entropy - moments.mean_entropy).clamp_min(0)


def dispersion(moments: Moments, mask: Tensor | None = None) -> Tensor:
    """Return N/(N-1) sum Var(p) / (sum mean_n p_n^2 + 1) over all pixels of each image.

    This is the mean soft Dice distance between two passes, with the denominators of all pairs
    pooled and 1 added. The variance has divisor N, as in eq. 8.

    Args:
        moments: (B, H, W) each, of at least 2 samples.
        mask: ignored.

    Returns:
        (B,), at least 0.

    >>> record = UncertaintyAccumulator()
    >>> for sample in torch.tensor([[[[0.0, 1.0]]], [[[1.0, 1.0]]]]):
    ...     record.update(sample)
    >>> dispersion(record.moments)  # 2 * 0.25 / (0.5 + 1 + 1)
    tensor([0.2000], dtype=torch.float64)
    """
    if moments.samples < 2 or moments.mean.ndim != 3:
        shape = tuple(moments.mean.shape)
        raise ValueError(f"moments {shape} of {moments.samples} samples: (B, H, W) of at least 2")
    squares = (moments.variance + moments.mean.square()).flatten(1).sum(dim=1)
    spread = moments.variance.flatten(1).sum(dim=1)
    return moments.samples / (moments.samples - 1) * spread / (squares + 1)


def error_of_pass(probability: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Dice of the probabilities of a pass against the mask, by eq. 2 with smooth = 1.

    Args:
        probability: (B, H, W).
        mask: (B, H, W) in {0, 1}.

    Returns:
        (B,) float64 in [0, 1].
    """
    return dice_loss(probability.double(), mask, smooth=1.0)


class PairwiseDice:
    """Mean over all pairs of samples of 1 - Dice of their masks at 0.5; 0 for two empty masks.

    It stores the mask of every sample with eight pixels in a byte: N H W / 8 bytes per image.

    >>> pairs = PairwiseDice()
    >>> for sample in torch.tensor([[[[0.0, 0.9]]], [[[0.5, 0.9]]]]):
    ...     pairs.update(sample)
    >>> pairs.value.round(decimals=4)  # 1 - 2 * 1 / (1 + 2)
    tensor([0.3333], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.masks: list[NDArray[np.uint8]] = []
        self.sizes: list[NDArray[np.int64]] = []
        self.total: NDArray[np.float64] = np.zeros(())

    def update(self, sample: Tensor) -> None:
        """Add one sample, (B, H, W) in [0, 1]; all samples have the same shape."""
        mask = np.packbits((sample >= 0.5).flatten(1).cpu().numpy(), axis=1)
        size = _count_ones(mask)
        for other, other_size in zip(self.masks, self.sizes, strict=True):
            both = size + other_size
            dice = 2 * _count_ones(mask & other) / both.clip(min=1)
            self.total = self.total + np.where(both > 0, 1 - dice, 0.0)
        self.masks.append(mask)
        self.sizes.append(size)

    @property
    def value(self) -> Tensor:
        """The mean over the pairs, (B,) float64."""
        count = len(self.masks)
        if count < 2:
            raise ValueError(f"{count} samples have no pairs")
        return torch.from_numpy(self.total / (count * (count - 1) / 2))


def _count_ones(packed: NDArray[np.uint8]) -> NDArray[np.int64]:
    ones: NDArray[np.int64] = np.bitwise_count(packed).sum(axis=1, dtype=np.int64)
    return ones


@dataclass
class UncertaintyAccumulator:
    """Uncertainty maps from one sample at a time, in memory that does not grow with N.

    Sums are in float64 where the device has it; the variance follows by Welford's update.

    >>> record = UncertaintyAccumulator()
    >>> for sample in torch.tensor([[0.0], [1.0]]):
    ...     record.update(sample)
    >>> record.count, record.variance.item(), round(record.mutual_information.item(), 4)
    (2, 0.25, 0.6931)
    """

    count: int = 0
    _mean: Tensor = field(default_factory=lambda: torch.zeros(()), repr=False)
    _squares: Tensor = field(default_factory=lambda: torch.zeros(()), repr=False)
    _entropy: Tensor = field(default_factory=lambda: torch.zeros(()), repr=False)

    def update(self, sample: Tensor) -> None:
        """Add one sample, (...) in [0, 1]; all samples have the same shape."""
        if self.count == 0:
            self._mean = torch.zeros_like(sample, dtype=_widest(sample))
            self._squares, self._entropy = self._mean.clone(), self._mean.clone()
        if sample.shape != self._mean.shape:
            raise ValueError(f"sample {tuple(sample.shape)} after {tuple(self._mean.shape)}")
        self.count += 1
        value = sample.to(self._mean.dtype)
        change = value - self._mean
        self._mean += change / self.count
        self._squares.addcmul_(change, value - self._mean)
        self._entropy += binary_entropy(value)

    @classmethod
    def merged(cls, records: "Sequence[UncertaintyAccumulator]") -> "UncertaintyAccumulator":
        """Return one record of the samples of several records (Chan, Golub and LeVeque, 1979).

        >>> parts = [UncertaintyAccumulator(), UncertaintyAccumulator()]
        >>> for part, sample in zip(parts, torch.tensor([[0.0], [1.0]])):
        ...     part.update(sample)
        >>> UncertaintyAccumulator.merged(parts).variance.item()
        0.25
        """
        if len(shapes := {tuple(one._mean.shape) for one in records if one.count}) > 1:
            raise ValueError(f"records of samples of several shapes, {sorted(shapes)}")
        count = sum(one.count for one in records)
        mean = sum((one.count * one._mean for one in records), torch.zeros(())) / count
        squares = sum(
            (one._squares + one.count * (one._mean - mean).square() for one in records),
            torch.zeros(()),
        )
        return cls(count, mean, squares, sum((one._entropy for one in records), torch.zeros(())))

    def without(self, part: "UncertaintyAccumulator") -> "UncertaintyAccumulator":
        """Return the record without the samples of `part`, a record of some of them."""
        if self._mean.shape != part._mean.shape or not 0 < part.count < self.count:
            raise ValueError(
                f"{part.count} samples {tuple(part._mean.shape)} are not some of {self.count} "
                f"samples {tuple(self._mean.shape)}"
            )
        count = self.count - part.count
        mean = (self.count * self._mean - part.count * part._mean) / count
        squares = self._squares - part._squares
        squares -= (part.count * self.count / count) * (part._mean - self._mean).square()
        return UncertaintyAccumulator(
            count, mean, squares.clamp_min(0), self._entropy - part._entropy
        )

    def maps(self) -> dict[str, Tensor]:
        """Return the map of each row of `choices.UNCERTAINTIES` by name."""
        moments = self.moments
        return {name: row.resolve()(moments) for name, row in UNCERTAINTIES.items()}

    def at(self, chosen: Tensor) -> "UncertaintyAccumulator":
        """Return the record of the chosen pixels, given by a bool map of the samples' shape."""
        if chosen.shape != self._mean.shape:
            raise ValueError(f"chosen {tuple(chosen.shape)} of samples {tuple(self._mean.shape)}")
        parts = (self._mean[chosen], self._squares[chosen], self._entropy[chosen])
        return UncertaintyAccumulator(self.count, *parts)

    @property
    def moments(self) -> Moments:
        """The statistics from which uncertainties are computed."""
        mean_entropy = self._entropy / self.count
        return Moments(self.mean, self.variance, self.entropy, mean_entropy, self.count)

    @property
    def mean(self) -> Tensor:
        """The mean prediction, (...) in [0, 1]."""
        return self._nonempty(self._mean)

    @property
    def variance(self) -> Tensor:
        """The result of `prediction_variance`."""
        return self._nonempty(self._squares) / self.count

    @property
    def entropy(self) -> Tensor:
        """The result of `predictive_entropy`."""
        return binary_entropy(self._nonempty(self._mean).clamp(0, 1))

    @property
    def mutual_information(self) -> Tensor:
        """The result of the function `mutual_information`."""
        return mutual_information_of(self.moments)

    def _nonempty(self, total: Tensor) -> Tensor:
        if self.count == 0:
            raise ValueError("no sample was added yet")
        return total


def _check_samples(samples: Tensor) -> None:
    if samples.ndim == 0 or len(samples) == 0:
        raise ValueError(f"samples {tuple(samples.shape)} must be (N, ...) with N at least 1")


def _at_least_float32(samples: Tensor) -> Tensor:
    return samples.to(torch.promote_types(samples.dtype, torch.float32))


def _widest(samples: Tensor) -> torch.dtype:
    return torch.float32 if samples.device.type == "mps" else torch.float64

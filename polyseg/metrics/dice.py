"""Dice of binary predictions on tensors, for training and assessments."""

import torch
from torch import Tensor


def dice_coefficient(predicted: Tensor, truth: Tensor) -> Tensor:
    """Return 2 |P and T| / (|P| + |T|) of each image, (B,) float64; 1 where both are empty.

    `predicted` is (B, ...) bool, `truth` of the same shape with foreground above 0. IoU is dice /
    (2 - dice).

    >>> dice_coefficient(torch.tensor([[True, True]]), torch.tensor([[1, 0]]))
    tensor([0.6667], dtype=torch.float64)
    """
    if predicted.shape != truth.shape:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} and truth {tuple(truth.shape)} differ"
        )
    foreground = truth > 0
    both = (predicted & foreground).flatten(1).sum(dim=1).double()
    either = (predicted.flatten(1).sum(dim=1) + foreground.flatten(1).sum(dim=1)).double()
    return torch.where(either > 0, 2 * both / either.clamp_min(1), 1.0)

"""The losses by name, as functions of (logits, mask, epsilon): ours, MONAI's and torch's."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from polyseg import losses
from polyseg.config import POLYDICE_LOSSES, LossConfig

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, 1, H, W) logits and mask, (B,) epsilon -> (B,) losses."""


class Note(NamedTuple):
    """What a step tells of its images besides their losses: without gradient, each (B,)."""

    at_constant: Tensor
    """Losses at the constant epsilon, to the bit those of the step where that is its epsilon."""
    wrong_sign: Tensor
    """Whether the image is where a PolyDice loss rises with s."""


def build_objective(config: LossConfig) -> Objective:
    """Return the loss that the settings name; each image's is weighted by its own epsilon.

    Losses without an epsilon ignore it.

    >>> objective = build_objective(LossConfig(name="dice"))
    >>> objective(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4), torch.zeros(2))
    tensor([0.2000, 0.2000])
    """
    loss = _by_name(config)
    weight = config.bce_weight
    if weight == 0:
        return loss
    return lambda logits, mask, epsilon: (
        loss(logits, mask, epsilon) + weight * _cross_entropy(logits, mask)
    )


def as_tasks(values: Tensor) -> Tensor:
    """Return logits or masks with each label of each image as a binary task of its own.

    Args:
        values: (B, K, H, W).

    Returns:
        (B K, 1, H, W), the labels of an image one after another.

    >>> as_tasks(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([6, 1, 4, 4])
    """
    return values.flatten(0, 1)[:, None]


def take_note(
    config: LossConfig, values: Tensor, logits: Tensor, mask: Tensor, epsilon: Tensor
) -> Note:
    """Return what a step records of its images beside their losses, from the losses it had.

    Losses without an epsilon are the same at any epsilon, and never count as rising with s.

    >>> far_off = torch.tensor([[[[9.0, -9.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    >>> config, epsilon = LossConfig(), torch.zeros(1)
    >>> take_note(config, build_objective(config)(*far_off, epsilon), *far_off, epsilon).wrong_sign
    tensor([True])
    """
    values = values.detach()
    if config.name not in POLYDICE_LOSSES:
        return Note(values, torch.zeros_like(values, dtype=torch.bool))
    with torch.no_grad():
        s, theta = losses.scale_and_angle(
            logits.sigmoid(), mask.bool(), scale=config.scale, smooth=config.smooth
        )
        # Of all that is added up epsilon is in one term only, epsilon s theta^2.
        at_constant = values - (epsilon - config.epsilon) * s * theta.square()
        terms = config.terms if config.name == "polydice" else 1
        return Note(at_constant, losses.in_wrong_sign_region(theta, epsilon, terms=terms))


def _by_name(config: LossConfig) -> Objective:
    # Masks were checked when they were read: a bool mask is not searched for other values again,
    # which on CUDA would wait for the device in every step.
    if config.name in POLYDICE_LOSSES:
        return lambda logits, mask, epsilon: losses.polydice_loss(
            logits.sigmoid(),
            mask.bool(),
            epsilon,
            terms=config.terms if config.name == "polydice" else 1,
            scale=config.scale,
            scale_gradient=config.scale_gradient,
            smooth=config.smooth,
        )
    if config.name == "dice":
        return lambda logits, mask, _: losses.dice_loss(
            logits.sigmoid(), mask.bool(), smooth=config.smooth
        )
    if config.name == "tvmf":
        return lambda logits, mask, _: losses.tvmf_dice_loss(
            logits.sigmoid(), mask.bool(), config.tvmf_concentration, smooth=config.smooth
        )
    if config.name == "bce":
        return lambda logits, mask, _: _cross_entropy(logits, mask)
    return _from_monai(config)


def _from_monai(config: LossConfig) -> Objective:
    from monai.losses import DiceLoss, FocalLoss, TverskyLoss

    loss = {
        "dice_bce": lambda: DiceLoss(sigmoid=True, reduction="none"),
        "focal": lambda: FocalLoss(gamma=config.focal_gamma, reduction="none"),
        "tversky": lambda: TverskyLoss(
            sigmoid=True,
            alpha=config.tversky_alpha,
            beta=config.tversky_beta,
            reduction="none",
        ),
    }[config.name]()

    def objective(logits: Tensor, mask: Tensor, _: Tensor) -> Tensor:
        value: Tensor = loss(logits, mask).flatten(1).mean(dim=1)
        return value + _cross_entropy(logits, mask) if config.name == "dice_bce" else value

    return objective


def _cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of each image, (B,)."""
    return binary_cross_entropy_with_logits(logits, mask, reduction="none").flatten(1).mean(dim=1)

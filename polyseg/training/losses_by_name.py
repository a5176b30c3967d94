"""Make the losses by name, as functions of (logits, mask, epsilon).

To add one, write a function here that makes it from the settings, and its row in `choices.LOSSES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from polyseg import losses
from polyseg.choices import loss_of
from polyseg.config import LossConfig
from polyseg.registry import is_own

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function of (B, 1, H, W) logits and mask and (B,) epsilon that returns (B,) losses."""


class Note(NamedTuple):
    """Further results of a step, each (B,) without gradient."""

    at_constant: Tensor
    """Losses at the constant epsilon; equal to the losses of the step if epsilon is constant."""
    wrong_sign: Tensor
    """Whether the PolyDice loss of the image rises with s."""


def build_objective(config: LossConfig) -> Objective:
    """Return the loss that the settings name; losses without an epsilon ignore it.

    >>> objective = build_objective(LossConfig(name="dice"))
    >>> objective(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4), torch.zeros(2))
    tensor([0.2000, 0.2000])
    """
    row = loss_of(config.name)
    loss: Objective = row.resolve() if is_own(config.name) else row.resolve()(config)
    weight = config.bce_weight
    if weight == 0:
        return loss
    return lambda logits, mask, epsilon: (
        loss(logits, mask, epsilon) + weight * _cross_entropy(logits, mask)
    )


def as_tasks(values: Tensor) -> Tensor:
    """Return logits or masks, (B, K, H, W), as separate binary tasks, (B K, 1, H, W).

    >>> as_tasks(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([6, 1, 4, 4])
    """
    return values.flatten(0, 1)[:, None]


def take_note(
    config: LossConfig, values: Tensor, logits: Tensor, mask: Tensor, epsilon: Tensor
) -> Note:
    """Return the further results of a step with these losses (`values`).

    Losses without an epsilon are the same at any epsilon; only PolyDice losses can rise with s.

    >>> far_off = torch.tensor([[[[9.0, -9.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    >>> config, epsilon = LossConfig(), torch.zeros(1)
    >>> take_note(config, build_objective(config)(*far_off, epsilon), *far_off, epsilon).wrong_sign
    tensor([True])
    """
    values = values.detach()
    nowhere = torch.zeros_like(values, dtype=torch.bool)
    if not config.has_epsilon:
        return Note(values, nowhere)
    with torch.no_grad():
        if not config.polydice_terms:
            constant = torch.full_like(epsilon, config.epsilon)
            return Note(build_objective(config)(logits, mask, constant), nowhere)
        s, theta = losses.scale_and_angle(
            logits.sigmoid(), mask.bool(), scale=config.scale, smooth=config.smooth
        )
        # Only one term depends on epsilon, epsilon s theta^2.
        at_constant = values - (epsilon - config.epsilon) * s * theta.square()
        wrong_sign = losses.in_wrong_sign_region(theta, epsilon, terms=config.polydice_terms)
        return Note(at_constant, wrong_sign)


def polydice(config: LossConfig) -> Objective:
    """Return the PolyDice loss with the number of terms in the settings."""
    # Masks were checked when they were read. A bool mask avoids another check, which would make
    # CUDA synchronise in every step.
    return lambda logits, mask, epsilon: losses.polydice_loss(
        logits.sigmoid(),
        mask.bool(),
        epsilon,
        terms=config.polydice_terms,
        scale=config.scale,
        scale_gradient=config.scale_gradient,
        smooth=config.smooth,
    )


def dice(config: LossConfig) -> Objective:
    """Return the Dice loss with squared denominator."""
    return lambda logits, mask, _: losses.dice_loss(
        logits.sigmoid(), mask.bool(), smooth=config.smooth
    )


def tvmf(config: LossConfig) -> Objective:
    """Return the t-vMF Dice loss."""
    return lambda logits, mask, _: losses.tvmf_dice_loss(
        logits.sigmoid(), mask.bool(), config.tvmf_concentration, smooth=config.smooth
    )


def bce(_: LossConfig) -> Objective:
    """Return binary cross-entropy."""
    return lambda logits, mask, _: _cross_entropy(logits, mask)


def dice_bce(_: LossConfig) -> Objective:
    """Return MONAI's Dice loss, without squares in the denominator, plus binary cross-entropy."""
    from monai.losses import DiceLoss

    soft_dice = _mean_of_image(DiceLoss(sigmoid=True, reduction="none"))
    return lambda logits, mask, epsilon: (
        soft_dice(logits, mask, epsilon) + _cross_entropy(logits, mask)
    )


def focal(config: LossConfig) -> Objective:
    """Return MONAI's focal loss."""
    from monai.losses import FocalLoss

    return _mean_of_image(FocalLoss(gamma=config.focal_gamma, reduction="none"))


def tversky(config: LossConfig) -> Objective:
    """Return MONAI's Tversky loss."""
    from monai.losses import TverskyLoss

    weights = {"alpha": config.tversky_alpha, "beta": config.tversky_beta}
    return _mean_of_image(TverskyLoss(sigmoid=True, reduction="none", **weights))


def _mean_of_image(loss: Callable[[Tensor, Tensor], Tensor]) -> Objective:
    return lambda logits, mask, _: loss(logits, mask).flatten(1).mean(dim=1)


def _cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, mask, reduction="none").flatten(1).mean(dim=1)

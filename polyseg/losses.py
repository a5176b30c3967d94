"""Dice, PolyDice and t-vMF Dice as functions of probability, mask and epsilon, image by image.

Notation: p the probabilities and y the mask of one image, flattened; a = ||p||, b = ||y||,
q = <p, y>. The losses depend on these three sums only, so the gradient with respect to p is a
combination of p and y, and the maps are read once forward and once backward.

Shapes: probability and mask have the same shape, (B, H, W), (B, C, H, W) or (B, C, D, H, W).
Without `per_channel` C is 1, and results are (B,). With `per_channel=True` each of the C channels
of an image is a separate binary task, and results are (B, C). Any other shape is a ValueError that
prints the shapes, and so is a mask with values other than 0 and 1. Masks of dtype bool need no
check; the check of other masks makes CUDA synchronise.

Smoothing turns cos(theta) = q / (ab) into (2q + smooth) / (2ab + smooth) and s = 2ab / (a^2 + b^2)
into (2ab + smooth) / (a^2 + b^2 + smooth). Their product is Dice with the same smoothing, so the
identity Dice loss = 1 - s cos(theta) holds for every value of `smooth`.

An empty mask (b = q = 0) then has cos(theta) = 1 and theta = 0, and all losses of this module are
1 - s = a^2 / (a^2 + smooth), with gradient 2 p smooth / (a^2 + smooth)^2: predictions are pushed
towards zero, strongly only while a^2 is not far above `smooth`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from polyseg.curves import angle_penalty, polydice1_curve

__all__ = [
    "PolyDice1Loss",
    "dice_loss",
    "in_wrong_sign_region",
    "polydice1_curve",
    "polydice1_loss",
    "polydice_loss",
    "scale_and_angle",
    "tvmf_dice_loss",
]

Scale = Literal["norms", "printed"]
ScaleGradient = Literal["guarded", "full", "detached"]
Reduction = Literal["mean", "none"]


def dice_loss(
    probability: Tensor, mask: Tensor, *, smooth: float = 1e-6, per_channel: bool = False
) -> Tensor:
    """Return the Dice loss with squared denominator, 1 - 2q / (a^2 + b^2) (eq. 2).

    Args:
        probability: (B, H, W), (B, C, H, W) or (B, C, D, H, W), floating point in [0, 1].
        mask: same shape, in {0, 1}, any dtype.
        smooth: added to the numerator and the denominator.
        per_channel: return (B, C), a value for each channel; without it C must be 1.

    Returns:
        (B,), or (B, C) with `per_channel`, in [0, 1], float32 or wider.

    Raises:
        ValueError: shapes, dtype or mask are not as above.

    >>> p, y = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[1, 0]], [[1, 0]]])
    >>> dice_loss(p, y, smooth=0.0)
    tensor([0., 1.])
    """
    q, a2, b2 = _moments(probability, mask, per_channel)
    return 1 - (2 * q + smooth) / (a2 + b2 + smooth)


def scale_and_angle(
    probability: Tensor,
    mask: Tensor,
    *,
    scale: Scale = "norms",
    smooth: float = 1e-6,
    per_channel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return scale s and angle theta of the Dice loss, 1 - s cos(theta) (eq. 3).

    Args:
        probability: (B, H, W), (B, C, H, W) or (B, C, D, H, W), floating point in [0, 1].
        mask: same shape, in {0, 1}, any dtype.
        scale: "norms", s = 2ab / (a^2 + b^2), for which the identity holds, or "printed",
            s = 2q / (a^2 + b^2), as printed in section 3.1.2.
        smooth: see the docstring of this module.
        per_channel: return (B, C), a value for each channel; without it C must be 1.

    Returns:
        s in [0, 1] and theta in [0, pi/2], each (B,), or (B, C) with `per_channel`. The derivative
        of theta is infinite at 0: losses are built on theta squared, whose derivative is finite.

    Raises:
        ValueError: an unknown scale; shapes, dtype or mask are not as above.

    >>> p, y = torch.tensor([[[0.5, 0.0]]]), torch.tensor([[[1, 0]]])
    >>> s, theta = scale_and_angle(p, y, smooth=0.0)
    >>> s.item(), theta.item()
    (0.800000011920929, 0.0)
    """
    moments = _moments(probability, mask, per_channel)
    s, cosine = _scale_and_cosine(moments, scale=scale, smooth=smooth)
    return s, torch.arccos(cosine.clamp(-1, 1))


def polydice_loss(
    probability: Tensor,
    mask: Tensor,
    epsilon: float | Tensor = 0.0,
    *,
    terms: int = 1,
    scale: Scale = "norms",
    scale_gradient: ScaleGradient = "guarded",
    smooth: float = 1e-6,
    per_channel: bool = False,
) -> Tensor:
    """Return PolyDice of K terms, (1 - s) + s sum_k alpha_k theta^(2k) (eq. 5).

    alpha_k = (-1)^(k-1) / (2k)!, and alpha_1 = 1/2 + epsilon; at epsilon = 0 the sum tends to
    1 - cos(theta) with K, so the loss tends to Dice.

    Args:
        probability: (B, H, W), (B, C, H, W) or (B, C, D, H, W), floating point in [0, 1].
        mask: same shape, in {0, 1}, any dtype.
        epsilon: one number for all, one for each image, (B,), or with `per_channel` one for each
            channel of each image, (B, C). Below -1/2 (with one term) misalignment is rewarded.
        terms: K, at least 1.
        scale: see `scale_and_angle`.
        scale_gradient: where the sum exceeds 1 the loss rises with s, dL/ds = sum - 1 > 0, so it
            rewards making s small, as predicting everything or nothing does. "guarded" keeps the
            factor s of the sum constant in the backward pass for those images, "detached" for all
            images, "full" for none. The value is the same.
        smooth: see the docstring of this module.
        per_channel: return (B, C), a value for each channel; without it C must be 1.

    Returns:
        (B,), or (B, C) with `per_channel`, float32 or wider. The gradient is finite everywhere,
        theta = 0 included.

    Raises:
        ValueError: terms below 1, an unknown scale or scale_gradient; shapes, dtype or mask are not
            as above.

    >>> p, y = torch.tensor([[[0.9, 0.2]]]), torch.tensor([[[1, 0]]])
    >>> torch.allclose(polydice_loss(p, y, terms=8), dice_loss(p, y))
    True
    """
    if terms < 1:
        raise ValueError(f"terms = {terms}: PolyDice has at least one term")
    moments = _moments(probability, mask, per_channel)
    s, cosine = _scale_and_cosine(moments, scale=scale, smooth=smooth)
    penalty = angle_penalty(_squared_angle(cosine), _as_steepness(epsilon, s), terms)
    return (1 - s) + _guarded(s, penalty, scale_gradient) * penalty


def polydice1_loss(
    probability: Tensor,
    mask: Tensor,
    epsilon: float | Tensor = 0.0,
    *,
    scale: Scale = "norms",
    scale_gradient: ScaleGradient = "guarded",
    smooth: float = 1e-6,
    per_channel: bool = False,
) -> Tensor:
    """Return PolyDice-1, (1 - s) + s (1/2 + epsilon) theta^2 (eq. 6).

    Arguments, result and errors are those of `polydice_loss` with terms = 1. epsilon = 0 is the
    quadratic approximation of the Dice loss and never below it.

    >>> p, y = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[1, 0]], [[1, 0]]])
    >>> polydice1_loss(p, y, torch.tensor([0.0, 0.5]))
    tensor([0.0000, 2.4674])
    >>> polydice1_loss(p[None], y[None], torch.tensor([[0.0, 0.5]]), per_channel=True)
    tensor([[0.0000, 2.4674]])
    """
    return polydice_loss(
        probability,
        mask,
        epsilon,
        terms=1,
        scale=scale,
        scale_gradient=scale_gradient,
        smooth=smooth,
        per_channel=per_channel,
    )


class PolyDice1Loss(torch.nn.Module):
    """PolyDice-1 as a module, for training loops that expect one.

    Args:
        sigmoid: whether the input is logits, to which the loss applies a sigmoid.
        per_channel, scale, scale_gradient, smooth: see `polydice_loss`.
        reduction: "mean" over all images (and channels), or "none": (B,), or (B, C) with
            `per_channel`.

    Raises:
        ValueError: an unknown reduction.

    >>> logits = torch.tensor([[[99.0, -99.0]], [[-99.0, 99.0]]])
    >>> mask = torch.tensor([[[1, 0]], [[1, 0]]])
    >>> PolyDice1Loss(sigmoid=True, reduction="none")(logits, mask, torch.tensor([0.0, 0.5]))
    tensor([0.0000, 2.4674])
    """

    def __init__(
        self,
        *,
        sigmoid: bool = False,
        per_channel: bool = False,
        scale: Scale = "norms",
        scale_gradient: ScaleGradient = "guarded",
        smooth: float = 1e-6,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction = {reduction!r}: choose 'mean' or 'none'")
        self.sigmoid, self.reduction = sigmoid, reduction
        self.per_channel, self.smooth = per_channel, smooth
        self.scale: Scale = scale
        self.scale_gradient: ScaleGradient = scale_gradient

    def forward(self, input: Tensor, target: Tensor, epsilon: float | Tensor = 0.0) -> Tensor:
        """Return the loss of logits or probabilities against a mask.

        Args:
            input: as the probability of `polydice_loss`, or logits of that shape.
            target: the mask, in {0, 1}, any dtype.
            epsilon: a number, (B,), or with `per_channel` also (B, C), on any device.

        Raises:
            ValueError: as `polydice_loss`.
        """
        if self.sigmoid:
            # In float32 at least, because in half precision the sigmoid rounds to 1 too early.
            input = input.to(torch.promote_types(input.dtype, torch.float32)).sigmoid()
        losses = polydice1_loss(
            input,
            target,
            epsilon,
            scale=self.scale,
            scale_gradient=self.scale_gradient,
            smooth=self.smooth,
            per_channel=self.per_channel,
        )
        return losses.mean() if self.reduction == "mean" else losses


def in_wrong_sign_region(theta: Tensor, epsilon: float | Tensor, *, terms: int = 1) -> Tensor:
    """Return whether the loss of each image rises with s: sum_k alpha_k theta^(2k) > 1.

    There the derivative of the loss with respect to s, that sum - 1, is positive, and the loss
    rewards making s small.

    Args:
        theta: (B,) or (B, C), radians.
        epsilon: a number, (B,), or with theta (B, C) also (B, C).
        terms: K, at least 1.

    Returns:
        Bool, of theta's shape.

    Raises:
        ValueError: epsilon is of another shape.

    >>> in_wrong_sign_region(torch.tensor([0.8, 0.9]), 1.0)
    tensor([False,  True])
    """
    return angle_penalty(theta.square(), _as_steepness(epsilon, theta), terms) > 1


def tvmf_dice_loss(
    probability: Tensor,
    mask: Tensor,
    concentration: float = 32.0,
    *,
    smooth: float = 1e-6,
    per_channel: bool = False,
) -> Tensor:
    """Return the t-vMF Dice loss, (1 - phi)^2 with the t-vMF similarity phi of p and y.

    phi = (1 + cos(theta)) / (1 + concentration (1 - cos(theta))) - 1, after Kato and Hotta,
    "Adaptive t-vMF Dice Loss for Multi-class Medical Image Segmentation" (2022), with a fixed
    concentration. For an empty mask phi is 1 whatever is predicted, so the loss is 1 - s there, as
    for all losses of this module.

    Args:
        probability: (B, H, W), (B, C, H, W) or (B, C, D, H, W), floating point in [0, 1].
        mask: same shape, in {0, 1}, any dtype.
        concentration: how narrow the similarity is, at least 0; at 0 phi is cos(theta).
        smooth: see the docstring of this module.
        per_channel: return (B, C), a value for each channel; without it C must be 1.

    Returns:
        (B,), or (B, C) with `per_channel`, in [0, 4], float32 or wider.

    Raises:
        ValueError: shapes, dtype or mask are not as above.

    >>> tvmf_dice_loss(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1, 0]]]))
    tensor([0.])
    """
    moments = _moments(probability, mask, per_channel)
    s, cosine = _scale_and_cosine(moments, scale="norms", smooth=smooth)
    similarity = (1 + cosine) / (1 + concentration * (1 - cosine)) - 1
    return torch.where(moments.b2 > 0, (1 - similarity).square(), 1 - s)


class _Sums(NamedTuple):
    """The sums that all losses depend on, each (B,) or (B, C)."""

    q: Tensor
    a2: Tensor
    b2: Tensor


def _moments(probability: Tensor, mask: Tensor, per_channel: bool) -> _Sums:
    """Return q, a^2 and b^2, (B,) or (B, C), in float32 or wider, also under autocast."""
    _check_inputs(probability, mask, per_channel)
    dtype = torch.promote_types(probability.dtype, torch.float32)
    with torch.autocast(probability.device.type, enabled=False):
        p, y = (values.flatten(2 if per_channel else 1) for values in (probability, mask))
        return _Sums(*_moments_of_rows(p.to(dtype), y.to(dtype)))


def _check_inputs(probability: Tensor, mask: Tensor, per_channel: bool) -> None:
    shape = tuple(probability.shape)
    given = f"probability {shape} and mask {tuple(mask.shape)}"
    if shape != mask.shape or len(shape) not in (3, 4, 5):
        raise ValueError(f"{given} must have one shape, (B, H, W), (B, C, H, W) or (B, C, D, H, W)")
    if per_channel and len(shape) == 3:
        raise ValueError(f"{given} have no channels, which per_channel=True needs: (B, C, H, W)")
    if len(shape) > 3 and shape[1] != 1 and not per_channel:
        raise ValueError(
            f"{given} have {shape[1]} channels; set per_channel=True for a loss of each, or give "
            "volumes of one channel as (B, 1, D, H, W)"
        )
    if not probability.is_floating_point():
        raise ValueError(f"probability {shape} must be floating point, not {probability.dtype}")
    # In every dtype only 0 and 1 are equal to their squares.
    if mask.dtype != torch.bool and not torch.equal(mask * mask, mask):
        raise ValueError(f"mask {shape} must contain only 0 and 1; for 0 and 255 give mask > 0")


def _scale_and_cosine(moments: _Sums, *, scale: Scale, smooth: float) -> tuple[Tensor, Tensor]:
    q, a2, b2 = moments
    # The lower bound keeps the derivative of the root finite if the prediction is 0 everywhere.
    norms = a2.clamp_min(torch.finfo(a2.dtype).tiny).sqrt() * b2.sqrt()
    cosine = (2 * q + smooth) / (2 * norms + smooth)
    if scale == "norms":
        numerator = 2 * norms
    elif scale == "printed":
        numerator = 2 * q
    else:
        raise ValueError(f"scale = {scale!r}: choose 'norms' or 'printed'")
    return (numerator + smooth) / (a2 + b2 + smooth), cosine


def _as_steepness(epsilon: float | Tensor, like: Tensor) -> Tensor:
    """Return 1/2 + epsilon with dtype and device of `like`, in a shape that broadcasts to it.

    Raises:
        ValueError: epsilon is not a number, nor of the shape of `like`, nor (B,).
    """
    steepness = 0.5 + torch.as_tensor(epsilon, dtype=like.dtype, device=like.device)
    if steepness.shape in ((), like.shape):
        return steepness
    if like.ndim == 2 and steepness.shape == like.shape[:1]:
        return steepness[:, None]
    allowed = " or ".join(dict.fromkeys(str(tuple(s)) for s in (like.shape[:1], like.shape)))
    raise ValueError(f"epsilon {tuple(steepness.shape)} must be a number or of shape {allowed}")


def _guarded(s: Tensor, penalty: Tensor, scale_gradient: ScaleGradient) -> Tensor:
    """Return s, detached for the images that `scale_gradient` names."""
    if scale_gradient == "full":
        return s
    if scale_gradient == "detached":
        return s.detach()
    if scale_gradient == "guarded":
        return torch.where(penalty > 1, s.detach(), s)
    raise ValueError(f"scale_gradient = {scale_gradient!r}: 'guarded', 'full' or 'detached'")


class _Moments(torch.autograd.Function):
    """(q, a^2, b^2) of each row, (..., n); the backward pass needs only p and y."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(p, y)
        # y is 0 or 1, so its squared norm is its sum.
        return torch.linalg.vecdot(p, y), torch.linalg.vecdot(p, p), y.sum(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, da2: Tensor, _: Tensor) -> tuple[Tensor, None]:
        p, y = ctx.saved_tensors
        # In place, because one broadcast addcmul takes nine times as long on a CPU.
        return (dq[..., None] * y).addcmul_(2 * da2[..., None], p), None


class _SquaredAngle(torch.autograd.Function):
    """theta^2 = arccos(c)^2 with derivative -2 theta / sin(theta), which tends to -2 at c = 1."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor) -> Tensor:
        theta = torch.arccos(cosine.clamp(-1, 1))
        ctx.save_for_backward(theta)
        return theta.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (theta,) = ctx.saved_tensors
        # torch.sinc(x) is sin(pi x) / (pi x), which is 1 at x = 0.
        return gradient * (-2 / torch.sinc(theta / math.pi))


# Function.apply has no type annotations.
_moments_of_rows: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = _Moments.apply
_squared_angle: Callable[[Tensor], Tensor] = _SquaredAngle.apply

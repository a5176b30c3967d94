"""The pixels of each image that its difficulty is averaged over."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from polyseg.difficulty import FALLBACKS

Region = Literal["mask", "prediction", "union", "boundary", "image"]


def select_region(
    region: Region, mask: Tensor | None, mean: Tensor, *, boundary_width: int = 3
) -> tuple[Tensor, Tensor]:
    """Return the pixels that D is averaged over, and which images needed a fallback to have some.

    Where the region of an image is empty, as "mask" of an empty mask and "boundary" of a mask that
    fills the image are, the prediction takes its place: its region of that name, or if that is
    empty too all of it. Where nothing is predicted either, nothing is chosen and D is 0.

    Args:
        region: "mask"; "prediction", mean >= 0.5; "union" of both; "boundary", the pixels within
            `boundary_width` of the mask's edge on either side; "image", all pixels.
        mask: (B, H, W) in {0, 1}, or None, which counts as empty.
        mean: (B, H, W) mean prediction in [0, 1].
        boundary_width: pixels.

    Returns:
        (B, H, W) bool, and (B,) int8 codes into `FALLBACKS`.

    Raises:
        ValueError: an unknown region, or other shapes.

    >>> mean = torch.tensor([[[0.9, 0.1]]])
    >>> select_region("mask", torch.zeros(1, 1, 2), mean)
    (tensor([[[ True, False]]]), tensor([1], dtype=torch.int8))
    """
    if mean.ndim != 3 or (mask is not None and mask.shape != mean.shape):
        given = None if mask is None else tuple(mask.shape)
        raise ValueError(f"mask {given} and mean {tuple(mean.shape)} must have one shape (B, H, W)")
    predicted = mean >= 0.5
    truth = torch.zeros_like(predicted) if mask is None else mask > 0
    if region == "mask":
        tried = [truth, predicted]
    elif region == "boundary":
        tried = [*(_edge_band(one, boundary_width) for one in (truth, predicted)), predicted]
    elif region == "union":
        tried = [truth | predicted]
    elif region == "prediction":
        tried = [predicted]
    elif region == "image":
        tried = [torch.ones_like(predicted)]
    else:
        raise ValueError(f"region = {region!r}: choose one of {', '.join(get_args(Region))}")
    chosen = tried[0]
    fallback = torch.zeros(len(mean), dtype=torch.int8, device=mean.device)
    for other in tried[1:]:
        empty = ~chosen.flatten(1).any(dim=1)
        fallback[empty] = FALLBACKS.index("prediction")
        chosen = torch.where(empty[:, None, None], other, chosen)
    fallback[~chosen.flatten(1).any(dim=1)] = FALLBACKS.index("empty")
    return chosen, fallback


def _edge_band(outline: Tensor, width: int) -> Tensor:
    """Return the pixels within `width` (chessboard distance) of the edge of the True region."""
    inside = outline[:, None].float()
    grown, grown_outside = (
        max_pool2d(part, kernel_size=2 * width + 1, stride=1, padding=width) > 0
        for part in (inside, 1 - inside)
    )
    return (grown & grown_outside)[:, 0]

"""Select the pixels of each image over which its difficulty is averaged."""

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from polyseg.choices import REGIONS
from polyseg.difficulty import FALLBACKS


def select_region(
    region: str, mask: Tensor | None, mean: Tensor, *, boundary_width: int = 3
) -> tuple[Tensor, Tensor]:
    """Return the pixels over which D is averaged, and the fallback that each image needed.

    An empty region ("mask" of an empty mask, "boundary" of a mask that fills the image) is replaced
    by the same region of the prediction, or if that is empty too by the whole prediction. If
    nothing is predicted, no pixel is chosen and D is 0.

    `mask` is (B, H, W) in {0, 1}, or None, which counts as empty, `mean` the mean prediction,
    (B, H, W) in [0, 1], and `boundary_width` is in pixels on each side of the edge. The results are
    (B, H, W) bool, and (B,) int8 codes into `FALLBACKS`. An unknown region, or shapes that differ,
    raise ValueError.

    >>> mean = torch.tensor([[[0.9, 0.1]]])
    >>> select_region("mask", torch.zeros(1, 1, 2), mean)
    (tensor([[[ True, False]]]), tensor([1], dtype=torch.int8))
    """
    if mean.ndim != 3 or (mask is not None and mask.shape != mean.shape):
        given = None if mask is None else tuple(mask.shape)
        raise ValueError(
            f"mask {given} and mean {tuple(mean.shape)} must have the same shape (B, H, W)"
        )
    predicted = mean >= 0.5
    truth = torch.zeros_like(predicted) if mask is None else mask > 0
    tried = REGIONS.find(region).resolve()(truth, predicted, boundary_width)
    chosen = tried[0]
    fallback = torch.zeros(len(mean), dtype=torch.int8, device=mean.device)
    for other in tried[1:]:
        empty = ~chosen.flatten(1).any(dim=1)
        fallback[empty] = FALLBACKS.index("prediction")
        chosen = torch.where(empty[:, None, None], other, chosen)
    fallback[~chosen.flatten(1).any(dim=1)] = FALLBACKS.index("empty")
    return chosen, fallback


def of_mask(mask: Tensor, predicted: Tensor, _: int) -> list[Tensor]:
    """Return the mask, then the prediction."""
    return [mask, predicted]


def of_prediction(_mask: Tensor, predicted: Tensor, _: int) -> list[Tensor]:
    """Return the prediction."""
    return [predicted]


def of_union(mask: Tensor, predicted: Tensor, _: int) -> list[Tensor]:
    """Return the pixels of mask or prediction."""
    return [mask | predicted]


def of_boundary(mask: Tensor, predicted: Tensor, width: int) -> list[Tensor]:
    """Return the bands at the edges of mask and prediction, then the prediction."""
    return [_edge_band(mask, width), _edge_band(predicted, width), predicted]


def of_image(mask: Tensor, _predicted: Tensor, _: int) -> list[Tensor]:
    """Return all pixels."""
    return [torch.ones_like(mask)]


def _edge_band(outline: Tensor, width: int) -> Tensor:
    """Return the pixels within `width` (chessboard distance) of the edge of the True region."""
    inside = outline[:, None].float()
    grown, grown_outside = (
        max_pool2d(part, kernel_size=2 * width + 1, stride=1, padding=width) > 0
        for part in (inside, 1 - inside)
    )
    return (grown & grown_outside)[:, 0]

"""Convolutions with 3 x 3 kernels by a quarter of the multiplications (Winograd, 1980).

F(4 x 4, 3 x 3) as Lavin and Gray (2016, arXiv:1509.09308) have it: tiles of 6 x 6 inputs become as
many sums, each sum of all channels goes through a matrix of its own, and 4 x 4 outputs come back. A
whole side of a map is transformed by one matrix, which has the zeros around the map in it.
"""

from functools import lru_cache

import torch
from torch import Tensor

_OUTPUTS, _SUMS = 4, 6
"""A side of a tile: what comes out of it, and what is multiplied."""

_MOST_TRANSFORMS = 0.25
"""Pixels a side for a channel, up to which the transforms cost less than the products save."""

_INTO_SUMS = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_OUT_OF_SUMS = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)
_OF_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def is_worthwhile(weight: Tensor, height: int, width: int) -> bool:
    """Whether `convolve` is faster on a processor: transforms are dear on large, thin maps.

    Args:
        weight: (K, C, h, w)
        height: of the map in pixels.
        width: of the map.

    >>> is_worthwhile(torch.zeros(128, 128, 3, 3), 16, 16)
    True
    >>> is_worthwhile(torch.zeros(64, 64, 3, 3), 32, 32)
    False
    """
    outputs, inputs = weight.shape[:2]
    transforms = max(height, width) * (1 / inputs + 1 / outputs)
    return tuple(weight.shape[2:]) == (3, 3) and transforms <= _MOST_TRANSFORMS


def transform_kernel(weight: Tensor) -> Tensor:
    """Return a kernel as `convolve` takes it.

    Args:
        weight: (K, C, 3, 3), as `torch.nn.functional.conv2d` takes it.

    Returns:
        (36, C, K), computed in float64 and of the kernel's type.

    >>> transform_kernel(torch.zeros(5, 7, 3, 3)).shape
    torch.Size([36, 7, 5])
    """
    side = torch.tensor(_OF_KERNEL, dtype=torch.float64, device=weight.device)
    sums = torch.einsum("ai,bj,kcij->abck", side, side, weight.double())
    return sums.flatten(0, 1).to(weight.dtype).contiguous()


def convolve(images: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the convolution with a 3 x 3 kernel, of stride 1 and with zeros around.

    Args:
        images: (B, C, H, W), fastest where channels are last in memory.
        kernel: of `transform_kernel`.
        bias: (K,)

    Returns:
        (B, K, H, W), channels last in memory. It is `torch.nn.functional.conv2d` but for rounding,
        of which a single precision makes about three times as much.

    >>> images, weight = torch.rand(1, 2, 5, 6), torch.rand(3, 2, 3, 3)
    >>> expected = torch.nn.functional.conv2d(images, weight, padding=1)
    >>> torch.allclose(convolve(images, transform_kernel(weight)), expected, atol=1e-4)
    True
    """
    count, channels, height, width = images.shape
    (down, up), (across, back) = (
        tuple(one.to(images) for one in _matrices(size)) for size in (height, width)
    )
    rows, columns = len(down) // _SUMS, len(across) // _SUMS
    grid = (count, _SUMS, rows, _SUMS, columns)
    sums = down @ images.permute(0, 2, 3, 1).reshape(count, height, width * channels)
    sums = across @ sums.view(-1, width, channels)
    sums = sums.view(*grid, channels).permute(1, 3, 0, 2, 4, 5)
    sums = sums.reshape(len(kernel), -1, channels) @ kernel
    sums = sums.view(_SUMS, _SUMS, count, rows, columns, -1).permute(2, 0, 3, 1, 4, 5)
    sums = back @ sums.reshape(count * len(down), len(across), -1)
    result: Tensor = up @ sums.view(count, len(down), -1)
    result = result.view(count, height, width, -1)
    if bias is not None:
        result += bias
    return result.permute(0, 3, 1, 2)


def products(kernel: Tensor) -> float:
    """Return how many multiplications `convolve` takes for a pixel, its transforms left aside.

    >>> products(transform_kernel(torch.zeros(5, 7, 3, 3))) / (5 * 7)
    2.25
    """
    return kernel.numel() / _OUTPUTS**2


@lru_cache
def _matrices(size: int) -> tuple[Tensor, Tensor]:
    """Return what transforms a side of a map, (6 T, size) for T tiles, and back, (size, 6 T)."""
    tiles = -(-size // _OUTPUTS)
    padded = _OUTPUTS * tiles + 2
    there = torch.zeros(_SUMS, tiles, padded)
    back = torch.zeros(tiles, _OUTPUTS, _SUMS, tiles)
    for tile in range(tiles):
        first = tile * _OUTPUTS
        there[:, tile, first : first + _SUMS] = torch.tensor(_INTO_SUMS)
        back[tile, :, :, tile] = torch.tensor(_OUT_OF_SUMS)
    return there.flatten(0, 1)[:, 1 : size + 1].contiguous(), back.view(-1, _SUMS * tiles)[:size]

"""Convolutions with 3 x 3 kernels in a quarter of the multiplications (Winograd, 1980).

F(4 x 4, 3 x 3) of Lavin and Gray (2016, arXiv:1509.09308): tiles of 6 x 6 inputs are transformed to
36 sums, the channels of each sum are multiplied by a matrix, and the results are transformed to 4 x
4 outputs.
"""

import torch
from torch import Tensor
from torch.nn import functional

_OUTPUTS, _SUMS = 4, 6
"""Side of a tile of outputs, and of its sums."""

_MOST_TRANSFORMS = 1 / 32
"""Largest 1 / inputs + 1 / outputs, in channels, for which the algorithm saves time."""

_INTO_SUMS = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_OUT_OF_SUMS = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_OF_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def is_worthwhile(weight: Tensor) -> bool:
    """Return whether `convolve` is faster on a CPU for a kernel (K, C, h, w): with many channels.

    >>> is_worthwhile(torch.zeros(64, 64, 3, 3)), is_worthwhile(torch.zeros(32, 64, 3, 3))
    (True, False)
    """
    outputs, inputs = weight.shape[:2]
    thinness = 1 / inputs + 1 / outputs
    return tuple(weight.shape[2:]) == (3, 3) and thinness <= _MOST_TRANSFORMS


def transform_kernel(weight: Tensor) -> Tensor:
    """Return the kernel of `torch.nn.functional.conv2d`, (K, C, 3, 3), as `convolve` takes it.

    It is (36, C, K) in the same type, computed in float64.

    >>> transform_kernel(torch.zeros(5, 7, 3, 3)).shape
    torch.Size([36, 7, 5])
    """
    side = torch.tensor(_OF_KERNEL, dtype=torch.float64, device=weight.device)
    sums = torch.einsum("ai,bj,kcij->abck", side, side, weight.double())
    return sums.flatten(0, 1).to(weight.dtype).contiguous()


def convolve(images: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the convolution with a 3 x 3 kernel, stride 1 and zero padding of 1.

    `images` are (B, C, H, W), fastest with channels last in memory, which the result, (B, K, H, W),
    has too; `kernel` is a result of `transform_kernel` and `bias` (K,). It equals
    `torch.nn.functional.conv2d` up to rounding, which is about three times as large in float32.

    >>> images, weight = torch.rand(1, 2, 5, 6), torch.rand(3, 2, 3, 3)
    >>> expected = torch.nn.functional.conv2d(images, weight, padding=1)
    >>> torch.allclose(convolve(images, transform_kernel(weight)), expected, atol=1e-4)
    True
    """
    count, channels, height, width = images.shape
    rows, columns = -(-height // _OUTPUTS), -(-width // _OUTPUTS)
    below, beyond = _OUTPUTS * rows + 1 - height, _OUTPUTS * columns + 1 - width
    framed = functional.pad(images.permute(0, 2, 3, 1), (0, 0, 1, beyond, 1, below))
    tiles = framed.unfold(1, _SUMS, _OUTPUTS).unfold(2, _SUMS, _OUTPUTS).permute(4, 5, 0, 1, 2, 3)
    sums = _along_both(images.new_tensor(_INTO_SUMS), tiles)
    sums = sums.view(len(kernel), -1, channels) @ kernel
    made = _along_both(images.new_tensor(_OUT_OF_SUMS), sums.view(_SUMS, _SUMS, -1))
    made = made.view(_OUTPUTS, _OUTPUTS, count, rows, columns, -1).permute(2, 3, 0, 4, 1, 5)
    made = made.reshape(count, _OUTPUTS * rows, _OUTPUTS * columns, -1)
    result: Tensor = made[:, :height, :width].contiguous()
    if bias is not None:
        result += bias
    return result.permute(0, 3, 1, 2)


def products(kernel: Tensor) -> float:
    """Return the number of multiplications of `convolve` for a pixel, without transforms.

    >>> products(transform_kernel(torch.zeros(5, 7, 3, 3))) / (5 * 7)
    2.25
    """
    return kernel.numel() / _OUTPUTS**2


def _along_both(matrix: Tensor, tiles: Tensor) -> Tensor:
    """Apply a matrix to the rows and the columns of tiles, (n, n, ...); return them flat."""
    size = matrix.shape[1]
    rows = matrix @ tiles.reshape(size, -1)
    return matrix @ rows.view(len(matrix), size, -1)

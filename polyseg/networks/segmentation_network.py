"""The network of a run: any core network, for images of any size."""

import hashlib
import math
from dataclasses import dataclass
from operator import le

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyseg.system.memory import refuse_beyond_memory

_WINDOWS_AT_ONCE = 4
_BYTES_OF_TRAINING = 16
"""Bytes for a parameter, its gradient and two moments, in float32."""


@dataclass(frozen=True)
class SlidingWindow:
    """The sliding window of a network that was trained on patches."""

    size: tuple[int, int]
    overlap: float
    """Overlap of neighbouring windows as a share of their size, in [0, 1)."""


class SegmentationNetwork(nn.Module):
    """A network for images of any size: it pads images to a multiple and crops the logits.

    With `window`, larger images are segmented window by window in evaluation mode; the logits of
    overlapping windows are averaged with Gaussian weights.

    >>> network = SegmentationNetwork(nn.Conv2d(1, 1, 3, padding=1), multiple=32)
    >>> network(torch.zeros(2, 1, 50, 70)).shape
    torch.Size([2, 1, 50, 70])
    """

    def __init__(self, core: nn.Module, multiple: int) -> None:
        super().__init__()
        self.core = core
        self.multiple = multiple
        self.window: SlidingWindow | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (B, out, H, W), of images (B, C, H, W)."""
        window = self.window
        if window is None or self.training or all(map(le, images.shape[-2:], window.size)):
            return self._at_once(images)
        from monai.inferers import sliding_window_inference

        # One image at a time, because each may have its own MC-Dropout masks.
        parts = [
            sliding_window_inference(
                image[None],
                window.size,
                sw_batch_size=_WINDOWS_AT_ONCE,
                predictor=self._at_once,
                overlap=window.overlap,
                mode="gaussian",
                padding_mode="replicate",
            )
            for image in images
        ]
        return torch.cat(parts)

    def padded(self, images: Tensor) -> tuple[Tensor, int, int]:
        """Return images padded for the core, and the numbers of padded rows and columns before."""
        rows, columns = (_padding(size, self.multiple) for size in images.shape[-2:])
        top, left = rows // 2, columns // 2
        if rows or columns:
            edges = (left, columns - left, top, rows - top)
            images = functional.pad(images, edges, mode="replicate")
        return images, top, left

    def _at_once(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded, top, left = self.padded(images)
        logits: Tensor = self.core(padded)
        return logits[..., top : top + height, left : left + width]


def refuse_untrainable(network: nn.Module, device: torch.device) -> None:
    """Raise if a device has too little memory for training a network.

    Training needs weights, gradients and Adam's two moments. The network may be on torch's "meta"
    device, where it takes no memory.

    >>> network = nn.Linear(2**25, 2**25, bias=False, device="meta")
    >>> refuse_untrainable(network, torch.device("cpu"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    polyseg.errors.PolysegError: network: its 1,125,899,906,842,624 parameters, ...
    """
    count = sum(weights.numel() for weights in network.parameters())
    refuse_beyond_memory(
        _BYTES_OF_TRAINING * count,
        f"network: its {count:,} parameters, with their gradients and moments,",
        "lower the channels in network.kwargs",
        device,
    )


def hash_weights(network: nn.Module) -> str:
    """Return the sha256 of the names and values of a network's weights and buffers.

    >>> hash_weights(nn.Identity())[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, values in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _padding(size: int, multiple: int) -> int:
    # At least two pixels at the bottleneck, because batch norm needs several values.
    return max(math.ceil(size / multiple), 2) * multiple - size

"""Draw the masks of MC Dropout from a separate random generator for each layer and pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from polyseg.networks.dropout import mask_shape
from polyseg.system.seeds import derive_seed

Sharing = Literal["consistent", "independent"]


@dataclass(frozen=True)
class MaskStreams:
    """Masks that depend on (seed, epoch, pass, layer), and on the image if independent.

    They are drawn on the CPU, so they are equal on all devices.

    >>> streams = MaskStreams("independent", seed=0, epoch=1).of(["a", "b"], (8, 8))
    >>> streams.mask(range(3, 4), "dropout", call=1, shape=torch.Size([4, 1, 1]), rate=0.5).shape
    torch.Size([2, 4, 1, 1])
    """

    masks: Sharing
    seed: int
    epoch: int
    ids: list[str] = field(default_factory=list)
    shapes: dict[tuple[Any, ...], torch.Size] = field(default_factory=dict)
    """Results of `shape_of`, by image size, layer and call."""
    size: tuple[int, ...] = ()

    def of(self, ids: list[str], size: Sequence[int]) -> "MaskStreams":
        """Return the masks of these images, which have the same size."""
        return replace(self, ids=ids, size=tuple(size))

    def known_shape(self, name: str, call: int) -> torch.Size:
        """Return the last result of `shape_of` for a layer and images of this size."""
        return self.shapes[(*self.size, name, call)]

    def shape_of(self, name: str, call: int, layer: Any, features: Tensor) -> torch.Size:
        """Return, and store, the shape of the mask of one image of features, (B, C, H, W)."""
        shape = mask_shape(layer, features.shape[1:])
        self.shapes[(*self.size, name, call)] = shape
        return shape

    def mask(self, passes: range, name: str, call: int, shape: torch.Size, rate: float) -> Tensor:
        """Return masks of 0 and 1 / (1 - rate), (1, *shape) for all images, or (B, *shape).

        For several passes they are (passes B, *shape), pass after pass.
        """
        alike = self.masks == "consistent"
        owners: list[tuple[str, ...]] = [()] if alike else [(identity,) for identity in self.ids]
        drawn = torch.stack(
            [self._draw((n, name, call, *owner), shape) for n in passes for owner in owners]
        )
        if alike and len(passes) > 1:
            drawn = drawn.repeat_interleave(len(self.ids), dim=0)
        return (drawn >= rate).float() / (1 - rate)

    def _draw(self, key: tuple[int | str, ...], shape: torch.Size) -> Tensor:
        seed = derive_seed(self.seed, self.epoch, "mc-dropout", *key)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))

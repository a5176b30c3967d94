"""Random changes to training images, MONAI's, each sample with a seed of its own."""

import functools
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Strength = Literal["none", "light", "medium", "strong"]

_FACTORS = {"light": 1.0, "medium": 2.0, "strong": 3.0}


def augment(image: Tensor, mask: Tensor, strength: Strength, seed: int) -> tuple[Tensor, Tensor]:
    """Change an image and its mask alike, by nothing but the seed.

    Args:
        image: (C, H, W) float32, normalised.
        mask: (H, W) uint8 in {0, 1}.
        strength: "none" returns them as they are.
        seed: equal seeds give equal changes, in any process.

    Returns:
        An image and a mask of the same shapes and types.

    >>> image, mask = augment(torch.rand(1, 8, 8), torch.ones(8, 8).byte(), "light", seed=1)
    >>> image.shape, mask.dtype
    (torch.Size([1, 8, 8]), torch.uint8)
    """
    if strength == "none":
        return image, mask
    transform = _transform(strength, (image.shape[1], image.shape[2]))
    transform.set_random_state(seed=seed % 2**32)
    changed = transform({"image": image, "mask": mask[None].float()})
    return _plain(changed["image"]), (_plain(changed["mask"])[0] >= 0.5).to(torch.uint8)


@functools.lru_cache(maxsize=16)
def _transform(strength: Strength, size: tuple[int, int]) -> Any:
    """Return flips, one rotation-scale-shift, and changes of gain, offset, gamma and noise."""
    from monai import transforms
    from monai.data import set_track_meta

    # Plain tensors: nobody here reads the history that MONAI would attach to them.
    set_track_meta(False)
    factor = _FACTORS[strength]
    both = ["image", "mask"]
    return transforms.Compose(
        [
            transforms.RandFlipd(both, prob=0.5, spatial_axis=0),
            transforms.RandFlipd(both, prob=0.5, spatial_axis=1),
            transforms.RandAffined(
                both,
                prob=0.7,
                rotate_range=np.pi / 12 * factor,
                scale_range=(0.1 * factor, 0.1 * factor),
                translate_range=tuple(0.03 * factor * side for side in size),
                mode=("bilinear", "nearest"),
                padding_mode="reflection",
            ),
            transforms.RandScaleIntensityd("image", factors=0.1 * factor, prob=0.5),
            transforms.RandShiftIntensityd("image", offsets=0.1 * factor, prob=0.5),
            transforms.RandAdjustContrastd(
                "image", prob=0.2, gamma=(1 / (1 + 0.2 * factor), 1 + 0.2 * factor)
            ),
            transforms.RandGaussianNoised("image", prob=0.2, std=0.05 * factor),
        ]
    )


def _plain(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values))

"""Augment training images by MONAI's random changes, with a separate seed for each sample."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyseg.config import DataConfig


@dataclass(frozen=True)
class Changes:
    """The largest strength of each kind of change, 0 for none; `AugmentConfig` has the units."""

    flip: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    elastic: float = 0.0
    intensity: float = 0.0
    gamma: float = 0.0
    blur: float = 0.0
    noise: float = 0.0


PRESETS = {
    "none": Changes(),
    "light": Changes(
        flip=0.5, rotation=15, scale=0.1, shift=0.03, intensity=0.1, gamma=0.2, noise=0.05
    ),
    "medium": Changes(
        flip=0.5,
        rotation=30,
        scale=0.2,
        shift=0.06,
        elastic=0.05,
        intensity=0.2,
        gamma=0.4,
        blur=0.5,
        noise=0.1,
    ),
    "strong": Changes(
        flip=0.5,
        rotation=45,
        scale=0.3,
        shift=0.09,
        elastic=0.1,
        intensity=0.3,
        gamma=0.6,
        blur=1.0,
        noise=0.15,
    ),
}

_ELASTIC_NODES = 8


def changes_of(config: DataConfig) -> Changes | None:
    """Return the changes of the preset, with single strengths replaced by the settings.

    >>> changes_of(DataConfig(augmentation="none")) is None
    True
    """
    own = {name: value for name, value in config.augment if value is not None}
    changes = Changes(**vars(PRESETS[config.augmentation]) | own)
    return None if changes == Changes() else changes


def augment(image: Tensor, masks: Tensor, changes: Changes, seed: int) -> tuple[Tensor, Tensor]:
    """Return an image and its masks with the same random change, determined by the seed.

    The image is (C, H, W) float32 and normalised; the masks are (K, H, W) uint8 in {0, 1}. The
    results have the same shapes and types.

    >>> image, masks = torch.rand(1, 8, 8), torch.ones(1, 8, 8).byte()
    >>> image, masks = augment(image, masks, PRESETS["light"], seed=1)
    >>> image.shape, masks.dtype
    (torch.Size([1, 8, 8]), torch.uint8)
    """
    transform = _transform(changes, (image.shape[1], image.shape[2]))
    transform.set_random_state(seed=seed % 2**32)
    changed = transform({"image": image, "mask": masks.float()})
    return _plain_tensor(changed["image"]), (_plain_tensor(changed["mask"]) >= 0.5).to(torch.uint8)


@functools.lru_cache(maxsize=16)
def _transform(changes: Changes, size: tuple[int, int]) -> Any:
    """Return MONAI's transform: flips, affine and elastic deformation, gray-value changes."""
    from monai import transforms
    from monai.data import set_track_meta

    # Plain tensors, because the history that MONAI attaches to its own is not used.
    set_track_meta(False)
    both = ["image", "mask"]
    steps: list[Any] = []
    if changes.flip:
        steps += [transforms.RandFlipd(both, prob=changes.flip, spatial_axis=i) for i in (0, 1)]
    if changes.rotation or changes.scale or changes.shift:
        steps.append(
            transforms.RandAffined(
                both,
                prob=0.7,
                rotate_range=np.deg2rad(changes.rotation),
                scale_range=(changes.scale, changes.scale),
                translate_range=tuple(changes.shift * side for side in size),
                mode=("bilinear", "nearest"),
                padding_mode="reflection",
            )
        )
    if changes.elastic:
        spacing = tuple(max(side / _ELASTIC_NODES, 1.0) for side in size)
        steps.append(
            transforms.Rand2DElasticd(
                both,
                spacing=spacing,
                magnitude_range=(0.0, changes.elastic * min(spacing)),
                prob=0.3,
                mode=("bilinear", "nearest"),
                padding_mode="reflection",
            )
        )
    return transforms.Compose([*steps, *_gray_changes(changes)])


def _gray_changes(changes: Changes) -> list[Any]:
    from monai import transforms

    steps: list[Any] = []
    if changes.intensity:
        steps += [
            transforms.RandScaleIntensityd("image", factors=changes.intensity, prob=0.5),
            transforms.RandShiftIntensityd("image", offsets=changes.intensity, prob=0.5),
        ]
    if changes.gamma:
        limits = (1 / (1 + changes.gamma), 1 + changes.gamma)
        steps.append(transforms.RandAdjustContrastd("image", prob=0.2, gamma=limits))
    if changes.blur:
        sigma = (0.0, changes.blur)
        steps.append(
            transforms.RandGaussianSmoothd("image", sigma_x=sigma, sigma_y=sigma, prob=0.2)
        )
    if changes.noise:
        steps.append(transforms.RandGaussianNoised("image", prob=0.2, std=changes.noise))
    return steps


def _plain_tensor(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values))

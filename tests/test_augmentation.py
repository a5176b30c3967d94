"""Augmentation: masks move with images, each setting has its effect, seeds determine results."""

import dataclasses

import numpy as np
import pytest
import torch

from polyseg.config import DataConfig
from polyseg.data.augmentation import PRESETS, Changes, augment, changes_of
from polyseg.data.dataset import arrays_as_set
from polyseg.data.training_batches import training_batches


def scene(size=48):
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    masks[0, size // 4 : size * 5 // 8, size // 3 : size * 5 // 6] = 1
    masks[1, : size // 2] = 1
    noise = 0.01 * torch.randn(1, size, size, generator=generator)
    return masks[:1].float() * 4 - 2 + noise, masks


def dice(first, second):
    both = (first & second).sum()
    return float(2 * both / (first.sum() + second.sum()))


@pytest.mark.parametrize("preset", ["light", "medium", "strong"])
def test_masks_are_transformed_like_their_images(preset):
    """The mask is 1 where the image is bright, before and after augmentation."""
    image, masks = scene()
    changed = 0
    for seed in range(20):
        new_image, new_masks = augment(image, masks, PRESETS[preset], seed)
        assert new_image.shape == image.shape and new_image.dtype == torch.float32
        assert new_masks.shape == masks.shape and set(new_masks.unique().tolist()) <= {0, 1}
        bright = new_image[0] > (new_image.min() + new_image.max()) / 2
        assert dice(bright, new_masks[0] > 0) > 0.93
        changed += not torch.equal(new_masks, masks)
    assert changed > 12


@pytest.mark.parametrize("kind", [field.name for field in dataclasses.fields(Changes)])
def test_gray_changes_keep_masks_and_spatial_changes_move_both(kind):
    """Each kind of change is applied alone."""
    image, masks = scene()
    strength = {"rotation": 30.0, "blur": 2.0}.get(kind, 0.4)
    of_space = kind in ("flip", "rotation", "scale", "shift", "elastic")
    moved = told = 0
    for seed in range(20):
        new_image, new_masks = augment(image, masks, Changes(**{kind: strength}), seed)
        told += not torch.equal(new_image, image)
        moved += not torch.equal(new_masks, masks)
        if of_space:
            bright = new_image[0] > 0
            assert dice(bright, new_masks[0] > 0) > 0.93
    assert told >= 2
    assert moved >= 2 if of_space else moved == 0


def test_settings_override_the_preset():
    assert changes_of(DataConfig(augmentation="none")) is None
    assert changes_of(DataConfig(augmentation="none", augment={"flip": 0.5})) == Changes(flip=0.5)
    strong = changes_of(DataConfig(augmentation="strong", augment={"flip": 0, "noise": 1}))
    assert strong == dataclasses.replace(PRESETS["strong"], flip=0, noise=1)


def test_shift_moves_images_along_both_axes():
    """Flips, rotation and scale keep the centre in place, so only the shift moves it."""
    mask = torch.zeros(1, 64, 96, dtype=torch.uint8)
    mask[:, 24:40, 36:60] = 1
    changes = dataclasses.replace(PRESETS["strong"], elastic=0)
    moved = (augment(mask.float(), mask, changes, seed)[1][0] for seed in range(60))
    centers = torch.stack([one.nonzero().float().mean(dim=0) for one in moved])
    # Uniform up to 9 % of a side, in seven of ten images.
    expected = 0.09 * torch.tensor([64.0, 96.0]) * (0.7 / 3) ** 0.5
    assert ((centers.std(dim=0) / expected - 1).abs() < 0.3).all()


def test_augmentation_depends_on_the_seed_only():
    image, masks = torch.rand(3, 16, 16), torch.ones(1, 16, 16, dtype=torch.uint8)
    stream = torch.random.get_rng_state()
    first = augment(image, masks, PRESETS["medium"], 5)
    augment(image, masks, PRESETS["light"], 6)
    again = augment(image, masks, PRESETS["medium"], 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], augment(image, masks, PRESETS["medium"], 7)[0])
    assert torch.equal(torch.random.get_rng_state(), stream)


@pytest.fixture(params=["resize", "tile"])
def images(request):
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 256, (40, 48, 3), np.uint8) for _ in range(8)]
    masks = [(one[..., 0] > 200).astype(np.uint8) for one in pixels]
    config = DataConfig(size=32, fit=request.param)
    return arrays_as_set([f"i{i}" for i in range(8)], pixels, masks, config)


def collect(images, **settings):
    samples = {}
    batches = training_batches(images, images.ids, seed=3, epoch=2, **settings)
    for ids, batch, masks in batches:
        samples |= {i: (x, y) for i, x, y in zip(ids, batch, masks, strict=True)}
    return samples


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["light", "strong"])
def test_samples_do_not_depend_on_workers_or_batch_size(images, preset):
    changes = PRESETS[preset]
    expected = collect(images, batch_size=1, changes=changes)
    assert len(expected) == 8
    for settings in (
        {"batch_size": 8},
        {"batch_size": 1, "workers": 1},
        {"batch_size": 8, "workers": 2},
        {"batch_size": 3, "workers": 2},
    ):
        samples = collect(images, changes=changes, **settings)
        assert samples.keys() == expected.keys()
        for name, (image, mask) in samples.items():
            assert torch.equal(image, expected[name][0]) and torch.equal(mask, expected[name][1])


def test_augmentation_differs_between_epochs_and_images(images):
    def sample(epoch, identity):
        batches = training_batches(
            images, images.ids, batch_size=8, seed=0, epoch=epoch, changes=PRESETS["light"]
        )
        ids, tensors, _ = next(iter(batches))
        return tensors[ids.index(identity)]

    assert not torch.equal(sample(1, "i0"), sample(2, "i0"))
    assert not torch.equal(sample(1, "i0"), sample(1, "i1"))


def test_order_depends_on_seed_and_epoch(images):
    def order(seed, epoch):
        batches = training_batches(images, images.ids, batch_size=2, seed=seed, epoch=epoch)
        return [name for ids, _, _ in batches for name in ids]

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == images.ids
    assert len({tuple(order(0, epoch)) for epoch in range(1, 5)} | {tuple(order(1, 1))}) > 3

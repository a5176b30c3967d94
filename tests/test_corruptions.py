"""Corruptions: effect of each on the pixels, and the images that a network then reads."""

import dataclasses
import functools
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import norm

from polyseg.config import DataConfig
from polyseg.data.corruptions import AMOUNTS, CORRUPTIONS, STRENGTHS, corrupt, corrupted
from polyseg.data.dataset import arrays_as_set, make_demo
from polyseg.data.pixel_store import DiskStore, writing_store
from polyseg.data.preprocessing import levels_of
from polyseg.data.training_batches import training_batches
from polyseg.errors import PolysegError

each = pytest.mark.parametrize("name", CORRUPTIONS)
RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (24, 30, 3), np.uint8)


@functools.cache
def demo(modality):
    return make_demo(DataConfig(demo_images=8, demo_modality=modality))


def flat(value, size=100, channels=1):
    """Return a constant gray image with a band of zeros and a band of ones: its range is 1."""
    image = np.full((size, size, channels), value, np.float32)
    edge = size // 25
    image[:edge], image[-edge:] = 0, 1
    return image


def inside(image):
    return image[20:-20, 20:-20].astype(float)


def distance(one, other):
    return math.sqrt(((one.astype(float) - other) ** 2).mean())


@each
@pytest.mark.parametrize("modality", ["ultrasound", "endoscopy"])
def test_effect_grows_with_strength(name, modality):
    images = demo(modality)
    for seed, identity in enumerate(images.ids[:4]):
        image = images.pixels(identity)
        distances = [distance(corrupt(image, name, s, seed=seed), image) for s in STRENGTHS]
        assert distances[0] == 0
        assert (np.diff(distances) > 0).all(), distances


@each
@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(1, 17), st.integers(1, 17), st.integers(1, 4)),
    st.sampled_from([np.uint8, np.uint16, np.int16, np.float32]),
    st.integers(0, 5),
    st.integers(0, 2**32),
)
def test_shape_type_and_range_are_kept(name, shape, dtype, strength, seed):
    values = np.random.default_rng(seed).normal(100, 30, shape) * (1 if dtype == np.uint8 else 50)
    image = values.clip(0, 255 if dtype == np.uint8 else None).astype(dtype)
    before = image.copy()
    damaged = corrupt(image, name, strength, seed=seed)
    assert damaged.shape == image.shape and damaged.dtype == image.dtype
    assert image.min() <= damaged.min() and damaged.max() <= image.max()  # fails for NaN
    assert np.array_equal(image, before)
    assert np.array_equal(damaged, corrupt(image, name, strength, seed=seed))
    if strength == 0:
        assert np.array_equal(damaged, image)


@each
def test_constant_image_is_unchanged(name):
    shapes = ((1, 1, 1), (1, 1, 3), (8, 9, 3), (1, 40, 1))
    for shape, value in itertools.product(shapes, (0, 7, 255)):
        image = np.full(shape, value, np.uint8)
        assert np.array_equal(corrupt(image, name, 5, seed=0), image)


@each
def test_image_with_one_bright_pixel_keeps_its_range(name):
    image = np.zeros((40, 40, 1), np.uint16)
    image[20, 20] = 60000
    damaged = corrupt(image, name, 5, seed=0)
    assert damaged.min() >= 0 and damaged.max() <= 60000


@each
def test_corruption_scales_with_the_range_of_gray_values(name):
    real = COLOURS.astype(np.float32)
    for strength in (1, 5):
        expected = corrupt(real, name, strength, seed=3)
        scaled = corrupt(real * 16 - 1000, name, strength, seed=3)
        np.testing.assert_allclose((scaled + 1000) / 16, expected, atol=1e-3)
        eight = corrupt(COLOURS, name, strength, seed=3).astype(float)
        assert np.abs(eight - expected).max() <= 0.5 + 1e-3
        sixteen = corrupt(COLOURS.astype(np.uint16) * 257, name, strength, seed=3)
        np.testing.assert_allclose(sixteen / 257, expected, atol=0.51 / 257 + 1e-3)


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_noise_has_the_deviation_of_the_table(strength):
    image = flat(0.5, 200, 3)
    added = inside(corrupt(image, "noise", strength, seed=1)) - 0.5
    deviation = AMOUNTS["noise"][strength - 1]
    assert added.std() == pytest.approx(deviation, rel=0.02)
    assert abs(added.mean()) < 4 * deviation / math.sqrt(added.size)
    assert abs(np.corrcoef(added.reshape(-1, 3).T)[0, 1]) < 0.02


def test_speckle_grows_with_brightness_and_is_equal_in_all_channels():
    image = flat(0.4, 200, 3)
    image[:, 100:] = image[:, 100:] / 2
    added = corrupt(image, "speckle", 2, seed=1) - image
    deviation = AMOUNTS["speckle"][1]
    assert added[20:-20, :100].std() == pytest.approx(0.4 * deviation, rel=0.03)
    assert added[20:-20, 100:].std() == pytest.approx(0.2 * deviation, rel=0.03)
    np.testing.assert_allclose(added[20:-20, :, 0], added[20:-20, :, 2], atol=1e-6)


@pytest.mark.parametrize("strength", [3, 4, 5])
def test_blurred_edge_is_a_normal_distribution(strength):
    image = np.zeros((200, 200, 1), np.float32)
    image[:, 100:] = 1
    sigma = AMOUNTS["blur"][strength - 1] * 200
    expected = norm.cdf((np.arange(200) - 99.5) / sigma)
    blurred = corrupt(image, "blur", strength, seed=0)[50, :, 0]
    np.testing.assert_allclose(blurred, expected, atol=0.01)


def test_motion_blur_has_the_length_of_the_table():
    image = np.zeros((101, 101, 1), np.float32)
    image[50, 50] = 1
    angles = []
    for seed in range(6):
        spread = corrupt(image, "motion", 5, seed=seed)[..., 0].astype(float)
        assert spread.sum() == pytest.approx(1, abs=1e-4)
        places = np.stack(np.indices(spread.shape), axis=-1).reshape(-1, 2) - 50.0
        covariance = np.einsum("n,ni,nj->ij", spread.ravel(), places, places)
        (across, along), vectors = np.linalg.eigh(covariance)
        assert along == pytest.approx((AMOUNTS["motion"][4] * 101) ** 2 / 12, rel=0.2)
        assert across < 0.4  # squared pixels, from interpolation
        angles.append(math.atan2(*vectors[:, 1]) % math.pi)
    assert np.ptp(angles) > 0.5


@pytest.mark.parametrize("strength", STRENGTHS[1:])
def test_contrast_and_gamma_follow_their_formulas(strength):
    image = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20, 1)
    share = AMOUNTS["contrast"][strength - 1]
    expected = 0.5 + share * (image - 0.5)
    np.testing.assert_allclose(corrupt(image, "contrast", strength, seed=0), expected, atol=1e-6)
    low, high = np.percentile(image, (1, 99))
    gray = (image - low) / (high - low)
    powers = low + (high - low) * gray.clip(0, 1) ** AMOUNTS["gamma"][strength - 1]
    expected = np.where((image < low) | (image > high), image, powers)
    np.testing.assert_allclose(corrupt(image, "gamma", strength, seed=0), expected, atol=1e-6)


def test_bias_field_is_smooth_and_has_the_strength_of_the_table():
    image = flat(0.2, 120)
    for strength in (1, 3):
        factor = AMOUNTS["bias"][strength - 1]
        field = np.log(corrupt(image, "bias", strength, seed=2)[4:-4, :, 0] / 0.2)
        y, x = np.meshgrid(np.linspace(-1, 1, 112), np.linspace(-1, 1, 120), indexing="ij")
        terms = np.stack([y**i * x**j for i in range(3) for j in range(3)], axis=-1).reshape(-1, 9)
        fitted = terms @ np.linalg.lstsq(terms, field.ravel(), rcond=None)[0]
        np.testing.assert_allclose(fitted, field.ravel(), atol=1e-4)
        assert np.abs(field).max() == pytest.approx(math.log(factor), rel=0.1)


def test_lower_resolution_removes_fine_structure_only():
    fine = (np.indices((64, 64)).sum(axis=0) % 2).astype(np.float32)[..., None]
    coarse = np.linspace(0, 1, 64, dtype=np.float32)[None, :, None].repeat(64, axis=0)
    assert corrupt(fine, "resolution", 4, seed=0).std() < 0.1 * fine.std()
    assert distance(corrupt(coarse, "resolution", 4, seed=0)[:, 8:-8], coarse[:, 8:-8]) < 0.01


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_jpeg_equals_pillow(channels, tmp_path):
    image = COLOURS[..., :channels].copy()
    image[:3], image[3:6] = 0, 255  # so that the percentiles are the extremes
    damaged = corrupt(image, "jpeg", 4, seed=0)
    planes = [image] if channels == 3 else [image[..., k] for k in range(channels)]
    for k, plane in enumerate(planes):
        Image.fromarray(plane).save(tmp_path / "a.jpg", quality=AMOUNTS["jpeg"][3])
        expected = np.asarray(Image.open(tmp_path / "a.jpg"))
        assert np.array_equal(damaged if channels == 3 else damaged[..., k], expected)


def test_values_beyond_the_range_survive_jpeg():
    image = COLOURS[..., :1].astype(np.float32)
    image[5, 5] = 1e4
    assert corrupt(image, "jpeg", 5, seed=0)[5, 5, 0] > 9000


@pytest.mark.parametrize("name", ["noise", "speckle", "bias"])
def test_noise_pattern_is_equal_at_every_strength(name):
    image = flat(0.45)
    changes = [inside(corrupt(image, name, strength, seed=5)) / 0.45 for strength in (1, 2)]
    weak, strong = (np.log(change) if name == "bias" else change - 1 for change in changes)
    amounts = np.log(AMOUNTS[name]) if name == "bias" else AMOUNTS[name]
    np.testing.assert_allclose(weak * amounts[1] / amounts[0], strong, atol=1e-4)
    assert distance(corrupt(image, name, 3, seed=6), corrupt(image, name, 3, seed=5)) > 1e-3


def test_unknown_corruptions_and_strengths_are_refused_by_name():
    images = make_demo(DataConfig(demo_images=8, size=16))
    with pytest.raises(
        PolysegError, match=r"^fog: is not a corruption; choose noise, blur, contrast,"
    ):
        corrupt(COLOURS, "fog", 1, seed=0)
    with pytest.raises(PolysegError, match=r"blur: has the strengths 0 .* to 5 .*, not 6"):
        corrupt(COLOURS, "blur", 6, seed=0)
    with pytest.raises(PolysegError, match="not -1"):
        corrupted(images, "blur", -1, seed=0, config=DataConfig(), ids=[])


# Images that a network reads.


def twins(config, **more):
    """Return a set of two equal images and a different one."""
    images = [COLOURS, COLOURS, COLOURS[:, ::-1].copy()]
    mask = RANDOM.integers(0, 2, COLOURS.shape[:2]).astype(np.uint8)
    return arrays_as_set(["a", "b", "c"], images, [mask] * 3, config, **more)


def test_corruption_keeps_ids_hashes_and_masks():
    images = twins(DataConfig())
    damaged = corrupted(images, "noise", 5, seed=0, config=DataConfig())
    assert damaged.ids == images.ids and damaged.hashes == images.hashes
    for identity in images.ids:
        assert np.array_equal(damaged.masks(identity), images.masks(identity))
        assert torch.equal(damaged.sample(identity)[1], images.sample(identity)[1])
        assert damaged.item(identity).shares == images.item(identity).shares
        assert not np.array_equal(damaged.pixels(identity), images.pixels(identity))


def test_strength_zero_leaves_images_unchanged():
    images = twins(DataConfig())
    damaged = corrupted(images, "blur", 0, seed=0, config=DataConfig())
    for identity in images.ids:
        assert torch.equal(damaged.sample(identity)[0], images.sample(identity)[0])


def test_noise_of_an_image_depends_on_its_id_and_seed_only():
    images = twins(DataConfig())
    damaged = corrupted(images, "noise", 2, seed=0, config=DataConfig())
    assert not np.array_equal(damaged.pixels("a"), damaged.pixels("b"))
    other = corrupted(images, "noise", 2, seed=0, config=DataConfig(), ids=["c", "a"])
    assert other.ids == ["c", "a"]
    for identity in other.ids:
        assert torch.equal(other.sample(identity)[0], damaged.sample(identity)[0])
    reseeded = corrupted(images, "noise", 2, seed=1, config=DataConfig())
    assert not np.array_equal(reseeded.pixels("a"), damaged.pixels("a"))


@pytest.mark.parametrize(
    ("name", "normalise"),
    zip(CORRUPTIONS, itertools.cycle(["zscore", "percentile", "unit", "window"])),
)
def test_corrupted_image_is_normalised_like_a_file(name, normalise):
    config = DataConfig(normalise=normalise, window=(20.0, 90.0))
    damaged = corrupted(twins(config), name, 4, seed=0, config=config)
    read = arrays_as_set(["a"], [damaged.pixels("a")], [None], config)
    assert torch.equal(damaged.sample("a")[0], read.sample("a")[0])


def test_corrupted_images_use_the_levels_of_the_training_images():
    config = DataConfig(normalise="dataset")
    images = twins(config)
    images = dataclasses.replace(images, levels=images.pooled_over(["c"]))
    damaged = corrupted(images, "gamma", 5, seed=0, config=config)
    expected = torch.from_numpy(images.levels.apply(damaged.pixels("a")))
    assert torch.equal(damaged.sample("a")[0], expected)
    assert expected.mean() < images.sample("a")[0].mean() - 0.3


def test_gray_images_in_a_colour_set_stay_gray():
    config = DataConfig()
    images = arrays_as_set(["a", "b"], [COLOURS, COLOURS[..., :1]], [None, None], config)
    sample = corrupted(images, "noise", 3, seed=0, config=config).sample("b")[0]
    assert sample.shape == (3, 24, 30)
    assert torch.equal(sample[0], sample[1]) and torch.equal(sample[0], sample[2])


def test_tiles_are_cut_from_the_corrupted_image():
    config = DataConfig(size=16, fit="tile")
    images = twins(config)
    damaged = corrupted(images, "blur", 5, seed=0, config=config)
    assert damaged.tiling == images.tiling
    whole = corrupt(COLOURS, "blur", 5, seed=0, side=16)
    assert np.array_equal(damaged.pixels("a"), whole)
    assert not np.array_equal(whole, corrupt(COLOURS, "blur", 5, seed=0))
    tensor = torch.from_numpy(levels_of(whole, config).apply(whole))
    patch = damaged.patch("a", seed=3)[0]
    assert patch.shape == (3, 16, 16)
    windows = tensor.unfold(1, 16, 1).unfold(2, 16, 1)
    assert (windows.permute(1, 2, 0, 3, 4) == patch).flatten(2).all(-1).any()
    batches = list(damaged.batches(damaged.ids, 4))
    assert [batch.ids for batch in batches] == [["a"], ["b"], ["c"]]
    assert torch.equal(batches[0].images[0], tensor)


def test_corruption_works_with_disk_store_and_workers(tmp_path):
    config = DataConfig()
    images = twins(config)
    with writing_store(tmp_path / "a.images") as writer:
        for identity in images.ids:
            writer.add(images.pixels(identity), images.masks(identity), {})
    filed = dataclasses.replace(images, store=DiskStore(tmp_path / "a.images"))
    damaged = corrupted(filed, "motion", 3, seed=0, config=config)
    expected = corrupted(images, "motion", 3, seed=0, config=config)
    again = pickle.loads(pickle.dumps(damaged))
    assert torch.equal(again.sample("b")[0], expected.sample("b")[0])
    order = {"batch_size": 2, "seed": 0, "epoch": 1}
    alone, helped = (
        [batch[1] for batch in training_batches(damaged, damaged.ids, workers=workers, **order)]
        for workers in (0, 2)
    )
    assert all(torch.equal(one, other) for one, other in zip(alone, helped, strict=True))

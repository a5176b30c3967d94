"""Sizes, gray levels and patches against NumPy."""

import numpy as np
import pytest
from PIL import Image

from polyseg.config import DataConfig
from polyseg.data.preprocessing import (
    Kept,
    Levels,
    as_gray,
    auto_size,
    cut_patch,
    kept_foreground,
    levels_from,
    levels_of,
    pooled_levels,
    resize_image,
    resize_mask,
)
from polyseg.errors import PolysegError


def image(dtype=np.uint8, shape=(20, 30, 3), top=256):
    return np.random.default_rng(0).integers(0, top, shape).astype(dtype)


def reduced(pixels, **settings):
    return levels_of(pixels, DataConfig(**settings)).apply(pixels).astype(np.float64)


def test_zscore_is_computed_per_channel():
    pixels = image()
    expected = (pixels - pixels.mean((0, 1))) / pixels.std((0, 1))
    np.testing.assert_allclose(reduced(pixels), np.moveaxis(expected, 2, 0), atol=1e-5)


def test_unit_normalisation_uses_the_full_range():
    for dtype in (np.uint8, np.uint16):
        top = np.iinfo(dtype).max
        pixels = image(dtype, top=int(top) + 1)
        np.testing.assert_allclose(
            reduced(pixels, normalise="unit"), np.moveaxis(pixels / top, 2, 0), atol=1e-6
        )
    with pytest.raises(PolysegError, match="int16 pixels have no full range"):
        levels_of(image(np.int16), DataConfig(normalise="unit"))


def test_percentile_and_window_normalisation_clip():
    pixels = image(np.int16, top=3000) - 1000
    low, high = np.percentile(pixels, (1, 99), axis=(0, 1))
    expected = np.clip((pixels - low) / (high - low), 0, 1)
    np.testing.assert_allclose(
        reduced(pixels, normalise="percentile"), np.moveaxis(expected, 2, 0), atol=1e-5
    )
    window = reduced(pixels, normalise="window", window=(-160, 240))
    expected = np.clip((pixels + 160.0) / 400, 0, 1)
    np.testing.assert_allclose(window, np.moveaxis(expected, 2, 0), atol=1e-5)


def test_pooled_levels_equal_numpy_over_all_pixels():
    parts = [image(shape=(20, 30, 2)), image(shape=(5, 7, 2), top=90)]
    pooled = pooled_levels([levels_of(part, DataConfig()) for part in parts], [600, 35])
    pixels = np.concatenate([part.reshape(-1, 2) for part in parts]).astype(float)
    np.testing.assert_allclose(pooled.offset, pixels.mean(axis=0))
    np.testing.assert_allclose(pooled.scale, pixels.std(axis=0))


def test_flat_image_is_normalised_to_finite_values():
    assert np.abs(reduced(np.full((4, 4, 1), 9, np.uint8))).max() == 0


@pytest.mark.parametrize(
    "record",
    [
        3,
        {},
        {"offset": [1.0], "scale": [0.0], "clipped": False},
        {"offset": [1.0, 2.0], "scale": [1.0, 1.0], "clipped": False},
        {"offset": [float("nan")], "scale": [1.0], "clipped": False},
    ],
)
def test_invalid_levels_of_a_checkpoint_are_refused(record):
    with pytest.raises((ValueError, KeyError)):
        levels_from(record, 1)
    assert levels_from(None, 1) is None


def test_resizing_keeps_means_and_areas():
    pixels = image(shape=(64, 48, 3))
    small = resize_image(pixels, (16, 12))
    assert small.shape == (16, 12, 3) and small.dtype == np.uint8
    assert abs(float(small.mean()) - float(pixels.mean())) < 1
    deep = resize_image(pixels[..., :1].astype(np.uint16) * 257, (16, 12))
    assert deep.dtype == np.uint16 and abs(deep.mean() / 257 - pixels[..., 0].mean()) < 1
    signed = resize_image(pixels.astype(np.int16) - 1000, (16, 12))
    assert signed.dtype == np.int16 and abs(signed.mean() + 1000 - pixels.mean()) < 1
    mask = np.zeros((64, 64), np.uint8)
    mask[10:40, 8:50] = 1
    shrunk = resize_mask(mask, (32, 32))
    assert set(np.unique(shrunk)) == {0, 1}
    assert shrunk.mean() == pytest.approx(mask.mean(), abs=0.02)
    np.testing.assert_array_equal(resize_mask(shrunk, (64, 64))[::2, ::2], shrunk)


def test_patches_of_image_and_mask_agree_and_favour_foreground():
    pixels = np.arange(60 * 80, dtype=np.uint16).reshape(60, 80, 1)
    masks = np.zeros((1, 60, 80), np.uint8)
    masks[0, 50:54, 5:9] = 1
    for seed in range(50):
        patch, cut = cut_patch(pixels, masks, (16, 24), 1.0, seed)
        top, left = divmod(int(patch[0, 0, 0]), 80)
        np.testing.assert_array_equal(patch, pixels[top : top + 16, left : left + 24])
        np.testing.assert_array_equal(cut, masks[:, top : top + 16, left : left + 24])
        assert cut.any()
    shares = [
        np.mean([cut_patch(pixels, masks, (16, 24), p, seed)[1].any() for seed in range(400)])
        for p in (0.0, 0.5)
    ]
    assert shares[0] < 0.25 and shares[1] == pytest.approx(0.5 + shares[0] / 2, abs=0.1)


def test_patches_reach_every_pixel():
    pixels = np.zeros((20, 20, 1))
    reached = np.zeros((20, 20), bool)
    corners = np.arange(400).reshape(20, 20, 1)
    for seed in range(600):
        patch, _ = cut_patch(corners, None, (16, 16), 0.5, seed)
        top, left = divmod(int(patch[0, 0, 0]), 20)
        reached[top : top + 16, left : left + 16] = True
    assert reached.all() and pixels.shape == (20, 20, 1)


def test_patch_larger_than_the_image_is_padded_by_reflection():
    pixels = image(shape=(10, 40, 1))
    patch, cut = cut_patch(pixels, np.ones((1, 10, 40), np.uint8), (32, 32), 0.5, 0)
    assert patch.shape == (32, 32, 1) and cut.shape == (1, 32, 32)
    assert cut.sum() == 10 * 32 and not cut[:, :11].any()
    np.testing.assert_array_equal(patch[10], patch[11])


def test_levels_apply_offset_and_scale():
    pixels = np.full((1, 1, 2), 4, np.uint8)
    np.testing.assert_allclose(Levels((1.0, 2.0), (2.0, 4.0)).apply(pixels).ravel(), [1.5, 0.5])


def test_objects_lost_by_resizing_are_counted():
    masks = np.zeros((1, 64, 64), np.uint8)
    masks[0, 8:10, 8:10] = 1  # A quarter of one 4 x 4 pixel.
    masks[0, 32:48, 32:48] = 1
    small = np.stack([resize_mask(mask, (16, 16)) for mask in masks])
    assert kept_foreground(masks, small) == Kept(2, 1, pytest.approx(256 / 260))
    assert kept_foreground(0 * masks, 0 * small) == Kept(0, 0, 1.0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(768, 768)], (256, 256)),
        ([(64, 64), (64, 64), (900, 900)], (64, 64)),
        ([(1000, 500)], (256, 128)),
        ([(584, 565)], (256, 240)),
        ([(20, 2000)], (32, 256)),
    ],
)
def test_automatic_size_is_the_median_up_to_256(sizes, expected):
    assert auto_size(sizes) == expected


def test_as_gray_equals_pillow_for_colour_and_mean_for_channels():
    pixels = image(np.uint8, (5, 6, 3))
    expected = np.asarray(Image.fromarray(pixels).convert("L"), np.int16)
    assert np.abs(as_gray(pixels[None])[0, ..., 0].astype(np.int16) - expected).max() <= 1
    two = image(np.float32, (5, 6, 2))
    np.testing.assert_allclose(as_gray(two[None])[0, ..., 0], two.mean(axis=2), rtol=1e-6)

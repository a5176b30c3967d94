"""Folders, files, splits and batches."""

import functools
import operator
import os

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from polyseg.config import DataConfig
from polyseg.data.augmentation import augment
from polyseg.data.dataset import ImageSet, load_folder, load_images, training_batches
from polyseg.data.images import read_image, read_mask, resize_image, resize_mask
from polyseg.data.layouts import find_images, find_pairs
from polyseg.data.splits import PARTS, content_hash, refuse_leaks, split_by_ratio
from polyseg.errors import PolysegError


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path) if mode else Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(5):
        save(tmp_path / f"images/case {i}.png", generator.integers(0, 256, (20, 30), np.uint8))
        mask = np.zeros((20, 30), np.uint8)
        mask[4:12, 5 : 10 + i] = 255
        save(tmp_path / f"masks/case {i}.png", mask)
    return tmp_path


def test_pairs_by_equal_stem(folder):
    pairs = find_pairs(folder)
    assert [pair.id for pair in pairs] == [f"case {i}" for i in range(5)]
    assert all(pair.image.stem == pair.mask.stem for pair in pairs)
    (folder / "images/.hidden.png").touch()
    (folder / "images/notes.txt").touch()
    assert find_pairs(folder) == pairs


def test_misfits_are_all_named(folder):
    (folder / "masks/case 1.png").unlink()
    (folder / "images/case 3.png").unlink()
    with pytest.raises(PolysegError, match="1 without a mask: case 1; 1 without an image: case 3"):
        find_pairs(folder)


def test_other_layouts_say_what_was_seen(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(PolysegError, match=r"no folder images and no folder masks .*pictures"):
        find_pairs(tmp_path)
    with pytest.raises(PolysegError, match="holds no image"):
        find_images(tmp_path / "pictures")


def test_two_images_of_one_stem_are_refused(folder):
    save(folder / "images/case 1.bmp", np.zeros((4, 4), np.uint8))
    with pytest.raises(PolysegError, match="same stem"):
        find_pairs(folder)


@pytest.mark.parametrize(
    ("name", "mode", "shape"),
    [
        ("a.png", "L", (6, 8)),
        ("a.png", "1", (6, 8)),
        ("a.png", "RGB", (6, 8, 3)),
        ("a.png", "RGBA", (6, 8, 3)),
        ("a.png", "LA", (6, 8)),
        ("a.png", "P", (6, 8, 3)),
        ("a.jpg", "RGB", (6, 8, 3)),
        ("a.bmp", "L", (6, 8)),
    ],
)
def test_kinds_of_image(tmp_path, name, mode, shape):
    Image.new("RGB", (8, 6), (200, 30, 90)).convert(mode).save(tmp_path / name)
    pixels = read_image(tmp_path / name)
    assert pixels.shape == shape and pixels.dtype == np.uint8


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    pixels = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    save(tmp_path / "a.png", pixels)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(read_image(tmp_path / name), pixels)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], [0, 1]),
        ([0, 255], [0, 1]),
        ([0, 0], [0, 0]),
        ([1, 1], [1, 1]),
        ([255, 255], [1, 1]),
    ],
)
def test_masks_of_0_1_and_0_255(tmp_path, values, expected):
    save(tmp_path / "m.png", np.array([values], np.uint8))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), [expected])


def test_other_values_are_named_and_can_be_chosen(tmp_path):
    save(tmp_path / "m.png", np.array([[0, 1, 2, 7]], np.uint8))
    with pytest.raises(PolysegError, match=r"m\.png: a mask of values 0, 1, 2, 7"):
        read_mask(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", (2, 7)), [[0, 0, 1, 1]])


def test_palette_and_gray_rgb_masks(tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.save(tmp_path / "p.png")
    save(tmp_path / "rgb.png", np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8))
    save(tmp_path / "colour.png", np.array([[[0, 0, 0], [255, 0, 255]]], np.uint8))
    for name in ("p.png", "rgb.png"):
        np.testing.assert_array_equal(read_mask(tmp_path / name), [[0, 1]])
    with pytest.raises(PolysegError, match="colour image"):
        read_mask(tmp_path / "colour.png")


def test_damaged_and_huge_files_are_one_line(tmp_path, monkeypatch):
    save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.tif").write_bytes(b"II*\x00\x08\x00\x00\x00\xff\xff")
    for name in ("cut.png", "text.png", "cut.tif"):
        with pytest.raises(PolysegError, match=name.replace(".", r"\.")) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("polyseg.data.images.LARGEST_IMAGE", 1000)
    with pytest.raises(PolysegError, match="40 x 40 pixels; the most that is read is 1,000"):
        read_image(tmp_path / "a.png")


def test_resizing_keeps_means_and_areas():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (64, 48, 3), np.uint8)
    small = resize_image(image, (16, 12))
    assert small.shape == (16, 12, 3) and small.dtype == np.uint8
    assert abs(float(small.mean()) - float(image.mean())) < 1
    deep = resize_image((image[..., 0].astype(np.uint16) * 257), (16, 12))
    assert deep.dtype == np.uint16 and abs(deep.mean() / 257 - image[..., 0].mean()) < 1
    mask = np.zeros((64, 64), np.uint8)
    mask[10:40, 8:50] = 1
    shrunk = resize_mask(mask, (32, 32))
    assert set(np.unique(shrunk)) == {0, 1}
    assert shrunk.mean() == pytest.approx(mask.mean(), abs=0.02)
    np.testing.assert_array_equal(resize_mask(shrunk, (64, 64))[::2, ::2], shrunk)


@given(
    st.integers(3, 200),
    st.tuples(st.floats(0.1, 1), st.floats(0.05, 1), st.floats(0.05, 1)),
    st.integers(0, 10),
)
def test_splits_are_whole_and_of_the_wanted_size(n, weights, seed):
    shares = tuple(weight / sum(weights) for weight in weights)
    ids = [f"i{i}" for i in range(n)]
    split = split_by_ratio(ids, shares, seed)
    assert sorted(functools.reduce(operator.iadd, split.values(), [])) == sorted(ids)
    assert all(split[part] for part in PARTS)
    assert split == split_by_ratio(ids[::-1], shares, seed)
    if n >= 30:
        for part, share in zip(PARTS, shares, strict=True):
            assert abs(len(split[part]) - share * n) <= 1.5


def test_a_share_of_zero_gets_none():
    assert split_by_ratio(list("abcd"), (1.0, 0.0, 0.0), 0)["val"] == []
    with pytest.raises(PolysegError, match="2 images are too few"):
        split_by_ratio(list("ab"), (0.5, 0.25, 0.25), 0)


def test_the_same_picture_on_two_sides_is_refused():
    pixels = np.zeros((3, 3), np.uint8)
    hashes = {"a": content_hash(pixels), "b": content_hash(pixels.copy()), "c": "other"}
    refuse_leaks({"train": ["a", "b"], "val": [], "test": ["c"]}, hashes)
    with pytest.raises(PolysegError, match=r"b \(test\) and a \(train\) are the same image"):
        refuse_leaks({"train": ["a"], "val": ["c"], "test": ["b"]}, hashes)


def test_images_are_normalised_each_by_itself(folder):
    images = load_images(DataConfig(path=str(folder), size=(16, 32)))
    assert images.sizes() == {(16, 32)} and images.channels == 1
    for i in range(5):
        image, mask = images.sample(i)
        assert image.shape == (1, 16, 32) and mask.shape == (16, 32)
        assert image.mean().abs() < 1e-5
        assert image.std(correction=0) == pytest.approx(1, abs=1e-4)
    unit = load_images(DataConfig(path=str(folder), normalise="unit")).sample(0)[0]
    assert unit.min() >= 0 and unit.max() <= 1


def test_a_flat_image_does_not_explode(tmp_path):
    images = ImageSet(["flat"], [np.full((4, 4, 1), 9, np.uint8)], None, "zscore")
    assert images.sample(0)[0].abs().max() == 0


def test_gray_and_colour_together_become_colour(folder):
    save(folder / "images/colour.png", np.zeros((20, 30, 3), np.uint8))
    save(folder / "masks/colour.png", np.zeros((20, 30), np.uint8))
    images = load_images(DataConfig(path=str(folder)))
    assert {image.shape[2] for image in images.images} == {3}
    with pytest.raises(PolysegError, match="trained on gray"):
        load_folder(folder, DataConfig(), channels=1)


def test_every_bad_file_of_a_set_is_named(folder):
    save(folder / "masks/case 0.png", np.full((20, 30), 7, np.uint8))
    save(folder / "masks/case 2.png", np.zeros((9, 9), np.uint8))
    (folder / "images/case 4.png").write_text("x")
    with pytest.raises(PolysegError) as caught:
        load_images(DataConfig(path=str(folder)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "case 0.png: a mask of values 7" in lines[0]
    assert "case 2.png: is 9 x 9, its image 20 x 30" in lines[1]
    assert "case 4.png: cannot be read" in lines[2]


def test_batches_keep_order_and_never_mix_sizes():
    sizes = [4, 4, 4, 8, 8, 4]
    images = ImageSet(
        list("abcdef"),
        [np.full((size, size, 1), i, np.uint8) for i, size in enumerate(sizes)],
        [np.ones((size, size), np.uint8) for size in sizes],
        "unit",
    )
    batches = list(images.batches(list("abcdef"), 2))
    assert [batch.ids for batch in batches] == [["a", "b"], ["c"], ["d", "e"], ["f"]]


def test_masks_follow_their_images():
    """Where the image is bright the mask is 1, before and after every change."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(48, 48, dtype=torch.uint8)
    mask[12:30, 16:40] = 1
    image = mask[None].float() * 4 - 2 + 0.01 * torch.randn(1, 48, 48, generator=generator)
    changed = 0
    for seed in range(20):
        new_image, new_mask = augment(image, mask, "strong", seed)
        assert new_image.shape == image.shape and new_image.dtype == torch.float32
        assert set(new_mask.unique().tolist()) <= {0, 1}
        bright = new_image[0] > (new_image.min() + new_image.max()) / 2
        overlap = 2 * (bright & (new_mask > 0)).sum() / (bright.sum() + new_mask.sum())
        assert overlap > 0.93
        changed += not torch.equal(new_mask, mask)
    assert changed > 15


def test_a_picture_that_lies_on_its_side_is_turned(tmp_path):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, :8] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned to the left
    path = tmp_path / "a.jpg"
    Image.fromarray(np.rot90(upright).copy()).save(path, exif=exif, quality=95)
    assert np.abs(read_image(path).astype(int) - upright).max() < 20


def test_postscript_in_disguise_is_not_run(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(PolysegError, match="cannot identify image file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["miniswhite", "separated", "cielab"])
def test_tiff_whose_numbers_mean_something_else_is_refused(tmp_path, kind):
    shape = {"miniswhite": (9, 9), "separated": (9, 9, 4), "cielab": (9, 9, 3)}[kind]
    tifffile.imwrite(tmp_path / "a.tif", np.ones(shape, np.uint8), photometric=kind)
    with pytest.raises(PolysegError, match="save it as gray"):
        read_image(tmp_path / "a.tif")


def test_tiff_with_tiles_missing_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones((64, 64), np.uint8), tile=(16, 16))
    assert read_image(path).all()
    with tifffile.TiffFile(path, mode="r+") as file:
        sizes = list(file.pages[0].databytecounts)
        file.pages[0].tags["TileByteCounts"].overwrite([0, *sizes[1:]])
    with pytest.raises(PolysegError, match="is damaged: not all of its 16"):
        read_image(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(PolysegError, match="is no file"):
        read_image(tmp_path / "a.png")


def test_names_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / os.fsdecode(b"caf\xe9.png")).touch()
    with pytest.raises(PolysegError, match="is no text; rename that file"):
        find_images(tmp_path)


def test_planar_tiff_is_measured_by_its_sides(tmp_path, monkeypatch):
    monkeypatch.setattr("polyseg.data.images.LARGEST_IMAGE", 99)
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((3, 10, 10), np.uint8),
        photometric="rgb",
        planarconfig="separate",
    )
    with pytest.raises(PolysegError, match="has 10 x 10 pixels"):
        read_image(tmp_path / "a.tif")


def test_images_are_moved_along_both_axes():
    """Flips, rotation and scale leave the middle where it is, so what moves is the shift."""
    mask = torch.zeros(64, 96, dtype=torch.uint8)
    mask[24:40, 36:60] = 1
    changed = (augment(mask[None].float(), mask, "strong", seed)[1] for seed in range(60))
    centers = torch.stack([one.nonzero().float().mean(dim=0) for one in changed])
    # Uniform to 9 % of a side, in seven of ten images.
    expected = 0.09 * torch.tensor([64.0, 96.0]) * (0.7 / 3) ** 0.5
    assert ((centers.std(dim=0) / expected - 1).abs() < 0.3).all()


def test_augmentation_hangs_on_the_seed_alone():
    image, mask = torch.rand(3, 16, 16), torch.ones(16, 16, dtype=torch.uint8)
    stream = torch.random.get_rng_state()
    first = augment(image, mask, "medium", 5)
    augment(image, mask, "light", 6)
    again = augment(image, mask, "medium", 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], augment(image, mask, "medium", 7)[0])
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert augment(image, mask, "none", 5)[0] is image


def collect(images, **settings):
    samples = {}
    for ids, batch, masks in training_batches(images, images.ids, seed=3, epoch=2, **settings):
        samples |= {i: (x, y) for i, x, y in zip(ids, batch, masks, strict=True)}
    return samples


def test_workers_and_batch_size_do_not_change_a_sample(folder):
    images = load_images(DataConfig(path=str(folder), size=32))
    expected = collect(images, batch_size=1, strength="medium")
    for settings in ({"batch_size": 3}, {"batch_size": 2, "workers": 1}):
        samples = collect(images, strength="medium", **settings)
        assert samples.keys() == expected.keys()
        for name, (image, mask) in samples.items():
            assert torch.equal(image, expected[name][0]) and torch.equal(mask, expected[name][1])


def test_the_order_is_by_seed_and_epoch(folder):
    images = load_images(DataConfig(path=str(folder), size=32))

    def order(seed, epoch):
        batches = training_batches(images, images.ids, batch_size=2, seed=seed, epoch=epoch)
        return [name for ids, _, _ in batches for name in ids]

    assert order(1, 1) == order(1, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) > 5

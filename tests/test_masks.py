"""Conversion of mask files: foreground values, soft edges, and refused files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from polyseg.config import DataConfig, load_config
from polyseg.data.formats.readers import read_label_stack
from polyseg.data.loading import load_images
from polyseg.data.masks import UnclearValuesError, lines_about_unclear, to_masks, unite
from polyseg.errors import PolysegError

PATH = Path("m.png")


def mask_of(values, kind=np.uint8):
    return to_masks(np.array(values, kind)[None, None], PATH, None)[0, 0, 0].tolist()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.int32, np.float32])
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
def test_masks_of_0_1_and_0_255_are_read(values, expected, kind):
    assert mask_of(values, kind) == expected


def test_masks_of_16_bit_are_read():
    assert mask_of([0, 65535], np.uint16) == [0, 1]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0, 1, 2, 7], "0, 1, 2, 7"),
        ([7, 7], "7"),
        ([-1, 0, 1], "-1, 0, 1"),
        ([0, 0.25, 1], "0, 0.25, 1"),
        (range(12), "0, 1, 2, 3, 4, 5, 6, 7, ..."),
    ],
)
def test_unknown_values_are_refused_by_value(values, shown):
    with pytest.raises(PolysegError) as caught:
        mask_of(values, np.float32)
    assert str(caught.value) == (
        f"m.png: a mask of values {shown}; expected 0/1 or 0/255, or set data.foreground to "
        "the values that count"
    )


@given(
    st.lists(st.integers(0, 5), min_size=6, max_size=6),
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_foreground_values_become_channels(values, foreground):
    labels = np.array(values).reshape(1, 2, 3)
    masks = to_masks(labels, PATH, [tuple(one) for one in foreground])
    assert masks.shape == (1, len(foreground), 2, 3) and masks.dtype == np.uint8
    for k, chosen in enumerate(foreground):
        np.testing.assert_array_equal(masks[:, k], np.isin(labels, chosen))


def test_unite_joins_masks_of_equal_size():
    first, second = np.array([[[0, 1, 0]]], np.uint8), np.array([[[0, 1, 1]]], np.uint8)
    assert unite([first, second]).tolist() == [[[0, 1, 1]]]
    assert unite([first]).tolist() == first.tolist() and unite([first]) is not first
    with pytest.raises(PolysegError, match="differ in size: 1 x 2, 1 x 3"):
        unite([first, second[..., :2]])


# Soft edges.


def shapes(height=200, width=260):
    rows, columns = np.mgrid[:height, :width]
    ellipse = ((rows - 90) / 60) ** 2 + ((columns - 110) / 80) ** 2 < 1
    spot = np.hypot(rows - 30, columns - 230) < 8
    notch = np.hypot(rows - 90, columns - 110) < 20
    return ((ellipse & ~notch) | spot).astype(np.uint8)


@pytest.mark.parametrize("quality", [75, 85, 90, 95, 100])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_mask_is_thresholded(tmp_path, quality, mode):
    mask = shapes()
    path = tmp_path / "m.jpg"
    Image.fromarray(mask * 255).convert(mode).save(path, quality=quality)
    found = to_masks(read_label_stack(path).pixels, path, None)[0, 0]
    np.testing.assert_array_equal(found, mask)


def smooth(kind):
    mask = Image.fromarray(shapes(800, 1040) * 255)
    if kind == "shrunk":
        return np.asarray(mask.resize((300, 230), Image.Resampling.LANCZOS))
    if kind == "grown":
        return np.asarray(
            Image.fromarray(shapes() * 255).resize((600, 500), Image.Resampling.BICUBIC)
        )
    return np.asarray(Image.fromarray(shapes() * 255).filter(ImageFilter.GaussianBlur(1)))


@pytest.mark.parametrize("kind", ["shrunk", "grown", "blurred"])
def test_antialiased_edges_are_cut_at_half(kind):
    labels = smooth(kind)[None]
    assert len(np.unique(labels)) > 10
    expected = labels >= 127.5
    np.testing.assert_array_equal(to_masks(labels, PATH, None)[:, 0], expected)
    fractions = labels.astype(np.float32) / 255
    np.testing.assert_array_equal(to_masks(fractions, PATH, None)[:, 0], expected)
    deep = labels.astype(np.uint16) * 257
    np.testing.assert_array_equal(to_masks(deep, PATH, None)[:, 0], expected)


def test_stack_with_one_soft_slice_is_thresholded():
    labels = np.stack([shapes() * 255, smooth("blurred"), np.zeros((200, 260), np.uint8)])
    np.testing.assert_array_equal(to_masks(labels, PATH, None)[:, 0], labels >= 127.5)


def areas(*values):
    """Return stripes of these values, 12 pixels wide."""
    return np.repeat(np.array(values, np.uint8), 12)[None, None] * np.ones((1, 90, 1), np.uint8)


def voc(*labels):
    """Return small objects of these labels in rings of 255 ("ignore"), as in Pascal VOC."""
    page = np.zeros((1, 120, 160), np.uint8)
    for k, label in enumerate(labels):
        page[0, 20:46, 20 + 50 * k : 46 + 50 * k] = 255
        page[0, 25:41, 25 + 50 * k : 41 + 50 * k] = label
    return page


@pytest.mark.parametrize(
    "labels",
    [
        areas(0, 50, 100, 150),
        areas(0, 50, 100, 150, 200, 250),
        areas(0, 128, 255),
        areas(0, 85, 170, 255),
        areas(0, 64, 128, 192, 255),
        areas(0, 1, 255),
        areas(0, 1, 2, 3, 255),
        areas(0, 254),
        voc(1),
        voc(1, 15),
        voc(7, 40),
        np.random.default_rng(0).integers(0, 256, (1, 64, 64)).astype(np.uint8),
        np.linspace(0, 255, 120 * 100).reshape(1, 120, 100).astype(np.uint8),
    ],
    ids=str,
)
def test_labels_are_not_mistaken_for_soft_edges(labels):
    with pytest.raises(PolysegError, match=r"m\.png: a mask of values 0, "):
        to_masks(labels, PATH, None)


def test_thin_outline_of_one_value_is_a_label():
    labels = shapes()[None] * 255
    labels[0, 29:31, 222:225] = 128
    with pytest.raises(PolysegError, match="a mask of values 0, 128, 255"):
        to_masks(labels, PATH, None)


def test_soft_edges_of_a_large_mask_are_searched_in_blocks():
    mask = np.kron(shapes(), np.ones((16, 16), np.uint8)) * 255
    soft = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(1.2)))[None]
    np.testing.assert_array_equal(to_masks(soft, PATH, None)[:, 0], soft >= 127.5)
    stray = soft.copy()
    stray[0, 3000, 50] = 120
    with pytest.raises(PolysegError, match="a mask of values 0"):
        to_masks(stray, PATH, None)


# Values given by data.foreground.

RED, BLUE = (255, 0, 0), (0, 0, 255)


def foreground(text):
    return list(load_config(overrides=[f"data.foreground={text}"]).data.tasks.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nonzero", [[0, 1, 1, 1, 1]]),
        ("0", [[1, 0, 0, 0, 0]]),
        ("2-300", [[0, 0, 1, 1, 0]]),
        ("[1, 2-300]", [[0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]),
        ("{cell: [1, 2-300], all: nonzero}", [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
    ],
)
def test_foreground_accepts_ranges_and_nonzero(text, expected):
    labels = np.array([[[0, 1, 2, 300, 301]]], np.uint16)
    found = to_masks(labels, PATH, foreground(text))
    np.testing.assert_array_equal(found[0, :, 0], expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#ff0000", [[1, 0, 0]]),
        ("[#FF0000, '#0000FF']", [[1, 0, 0], [0, 1, 0]]),
        ("{a: [#FF0000, #0000FF]}", [[1, 1, 0]]),
        ("nonzero", [[1, 1, 0]]),
    ],
)
def test_foreground_accepts_colours(tmp_path, text, expected):
    Image.fromarray(np.array([[RED, BLUE, (0, 0, 0)]], np.uint8)).save(tmp_path / "a.png")
    labels = read_label_stack(tmp_path / "a.png").pixels
    np.testing.assert_array_equal(to_masks(labels, PATH, foreground(text))[0, :, 0], expected)


def test_gray_mask_in_a_coloured_set_is_read_as_gray(tmp_path):
    labels = np.array([[[0, 255]]], np.uint8)
    assert to_masks(labels, PATH, foreground("#ffffff")).ravel().tolist() == [0, 1]
    assert to_masks(labels, PATH, foreground("#ff0000")).ravel().tolist() == [0, 0]


def test_unknown_colours_are_refused_with_their_shares(tmp_path):
    Image.fromarray(np.array([[RED, (0, 0, 0)]], np.uint8)).save(tmp_path / "a.png")
    labels = read_label_stack(tmp_path / "a.png").pixels
    for named in (None, [(255,)]):
        with pytest.raises(UnclearValuesError) as caught:
            to_masks(labels, PATH, named)
        (line,) = lines_about_unclear([caught.value] * 3)
        assert "m.png and 2 more: masks contain the colours" in line
        assert "'#000000' (50 %), '#FF0000' (50 %)" in line
        assert "data.foreground='#FF0000'" in line


@pytest.mark.parametrize(("values", "swapped"), [(1500, True), (900, False)])
def test_masks_like_photographs_raise_the_suspicion_of_swapped_folders_first(values, swapped):
    labels = np.arange(values, dtype=np.uint16).reshape(1, 30, -1)
    with pytest.raises(UnclearValuesError) as caught:
        to_masks(labels, PATH, None)
    (line,) = lines_about_unclear([caught.value])
    start = f"{PATH}: are the folders of images and masks swapped?"
    assert line.startswith(start if swapped else f"{PATH}: masks contain the values")
    assert line.endswith(" such as data.foreground=nonzero or data.foreground=1")


@pytest.mark.parametrize("text", ["5-2", "a", "1-99999", "'#12345'", "-2", "70000"])
def test_invalid_foreground_values_are_refused(text):
    with pytest.raises(PolysegError, match=r"data\.foreground"):
        load_config(
            overrides=[f"data.foreground={text!r}" if "#" in text else f"data.foreground={text}"]
        )


def test_predictions_are_written_with_the_first_value_or_a_default():
    assert DataConfig(foreground=(2, 7)).written(255) == {"2": 2, "7": 7}
    assert DataConfig(foreground="1-300").written(255) == {"1-300": 1}
    assert DataConfig(foreground="#ff0000").written(255) == {"FF0000": 255}
    assert DataConfig(foreground=0).written(1) == {"0": 1}
    assert DataConfig(foreground=("#ff0000", "#00ff00")).written(255) == {"FF0000": 1, "00FF00": 2}


@pytest.mark.parametrize("axes", [(1, 1, 1, 1), (-1, -1, 1, 1)])
def test_volume_mask_of_an_image_keeps_its_voxel_order(tmp_path, axes):
    """MONAI, SimpleITK and ITK-SNAP write x to the right and y down, whatever the header says."""
    nibabel = pytest.importorskip("nibabel")
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    expected = {}
    for i in range(3):
        mask = np.zeros((24, 24), np.uint8)
        mask[2 + i : 8, 10:21] = 1
        expected[f"case{i}"] = mask
        pixels = generator.integers(0, 255, (24, 24), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/case{i}.png")
        volume = nibabel.Nifti1Image(mask.T[..., None], np.diag(np.array(axes, float)))
        nibabel.save(volume, tmp_path / f"masks/case{i}.nii.gz")
    images = load_images(DataConfig(path=str(tmp_path), size=None, group="none"))
    for identity, mask in expected.items():
        np.testing.assert_array_equal(images.masks(identity)[0], mask)

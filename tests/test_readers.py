"""Readers of images, volumes and labels: values, orientation, spacing, and damaged files."""

import gzip
import os
import re
import struct
import sys

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import tifffile
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import Image

from polyseg.data.formats.readers import read_image_stack, read_label_stack
from polyseg.data.formats.writers import write_labels
from polyseg.data.image_cache import _content
from polyseg.data.layouts.cases import Folders
from polyseg.errors import PolysegError
from tests.hostile import faults, hostile_files, warm_up


def save(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


def noise(shape, kind=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(kind)


def only(path):
    stack = read_image_stack(path)
    assert len(stack.pixels) == 1
    return stack.pixels[0]


# Image files.


@pytest.mark.parametrize(
    ("name", "mode", "channels"),
    [
        ("a.png", "L", 1),
        ("a.png", "1", 1),
        ("a.png", "RGB", 3),
        ("a.png", "RGBA", 3),
        ("a.png", "LA", 1),
        ("a.png", "P", 3),
        ("a.jpg", "RGB", 3),
        ("a.jpg", "L", 1),
        ("a.jpg", "CMYK", 3),
        ("a.JPEG", "RGB", 3),
        ("a.bmp", "L", 1),
        ("a.bmp", "RGB", 3),
        ("a.gif", "L", 1),
        ("a.gif", "P", 3),
    ],
)
def test_image_modes_are_read_with_their_channels(tmp_path, name, mode, channels):
    Image.new("RGB", (8, 6), (200, 30, 90)).convert(mode).save(tmp_path / name)
    stack = read_image_stack(tmp_path / name)
    assert stack.pixels.shape == (1, 6, 8, channels) and stack.pixels.dtype == np.uint8
    assert stack.spacing is None


def test_image_values_are_kept(tmp_path):
    gray, colour, deep = noise((6, 8)), noise((6, 8, 3)), noise((6, 8), np.uint16) * 257
    np.testing.assert_array_equal(only(save(tmp_path / "a.png", gray))[..., 0], gray)
    np.testing.assert_array_equal(only(save(tmp_path / "b.bmp", colour)), colour)
    np.testing.assert_array_equal(only(save(tmp_path / "c.png", deep))[..., 0], deep)
    bits = Image.fromarray(gray > 128)
    bits.save(tmp_path / "d.png")
    np.testing.assert_array_equal(only(tmp_path / "d.png")[..., 0], (gray > 128) * 255)
    assert set(np.unique(read_label_stack(tmp_path / "d.png").pixels)) == {0, 1}


def test_large_images_are_read_completely(tmp_path):
    pixels = noise((700, 3001))
    np.testing.assert_array_equal(only(save(tmp_path / "a.png", pixels))[..., 0], pixels)
    colours = np.stack([pixels, pixels[::-1], 255 - pixels], 2)
    palette = Image.fromarray(colours).quantize(64)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(only(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))


def test_16_bit_colour_is_kept(tmp_path):
    import imagecodecs

    for channels in (3, 4):
        pixels = noise((6, 8, channels), np.uint16) * 250
        (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
        np.testing.assert_array_equal(only(tmp_path / "a.png"), pixels[..., :3])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    stored = np.kron(noise((3, 5)), np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.jpg"):
        Image.fromarray(stored).save(tmp_path / name, exif=exif, quality=95)
        with Image.open(tmp_path / name) as image:
            expected = np.asarray(_turned_by_pillow(image)).astype(int)
        assert np.abs(only(tmp_path / name)[..., 0] - expected).max() == 0
        labels = read_label_stack(tmp_path / name).pixels[0]
        np.testing.assert_array_equal(labels, expected)


def _turned_by_pillow(image):
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def test_palette_indices_are_labels(tmp_path):
    labels = np.array([[0, 1, 2], [3, 3, 0]], np.uint8)
    image = Image.fromarray(labels).convert("P")
    image.putpalette([0, 0, 0, 200, 10, 10, 1, 2, 3, 250, 250, 250])
    for name in ("a.png", "a.gif"):
        image.save(tmp_path / name, optimize=False)
        np.testing.assert_array_equal(read_label_stack(tmp_path / name).pixels[0], labels)


@pytest.mark.parametrize("values", [[0, 255], [0, 0], [255, 255]])
def test_gray_gif_masks_keep_their_values(tmp_path, values):
    for mode in ("L", "P"):
        Image.fromarray(np.array([values], np.uint8)).convert(mode).save(tmp_path / "m.gif")
        np.testing.assert_array_equal(read_label_stack(tmp_path / "m.gif").pixels, [[values]])


def test_colour_masks_with_equal_channels_are_read_as_gray(tmp_path):
    mask = (noise((6, 8)) > 128).astype(np.uint8) * 255
    alpha = np.full_like(mask, 255)
    for name, channels in (("a.png", [mask] * 3), ("b.png", [mask] * 3 + [alpha])):
        save(tmp_path / name, np.stack(channels, 2))
        np.testing.assert_array_equal(read_label_stack(tmp_path / name).pixels[0], mask)
    save(tmp_path / "c.png", np.stack([mask, mask, 255 - mask], 2))
    colours = np.where(mask == 255, 0xFFFF00, 0x0000FF) + 2**24
    np.testing.assert_array_equal(read_label_stack(tmp_path / "c.png").pixels[0], colours)
    tifffile.imwrite(tmp_path / "d.tif", np.stack([mask, mask, 255 - mask], 2).astype(np.uint16))
    with pytest.raises(PolysegError, match="is a colour image; a mask has one channel"):
        read_label_stack(tmp_path / "d.tif")


def test_animations_are_refused(tmp_path):
    frames = [Image.fromarray(noise((6, 8), seed=seed)) for seed in range(3)]
    for name in ("a.gif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(PolysegError, match="is animated; expected one picture per file"):
            read_image_stack(tmp_path / name)


# TIFF.


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", ">u2", ">i2", "f4", ">f4"])
def test_tiff_number_types_are_kept(tmp_path, kind):
    pixels = (noise((6, 8), "i4") - (100 if np.dtype(kind).kind != "u" else 0)).astype(kind)
    order = ">" if kind[0] == ">" else "<"
    tifffile.imwrite(tmp_path / "a.tif", pixels, byteorder=order)
    found = only(tmp_path / "a.tif")[..., 0]
    np.testing.assert_array_equal(found, pixels)
    assert found.dtype == np.dtype(kind).newbyteorder("=")


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("f2", [0.5, 1], np.float32),
        ("f8", [0.5, 1], np.float32),
        ("i1", [-5, 7], np.int16),
        ("i4", [-5, 7], np.int16),
        ("u4", [5, 60000], np.uint16),
        ("i4", [-5, 70000], np.float32),
        ("bool", [True, False], np.uint8),
    ],
)
def test_other_tiff_number_types_are_converted(tmp_path, kind, values, expected):
    tifffile.imwrite(tmp_path / "a.tif", np.array([values] * 2, kind))
    found = only(tmp_path / "a.tif")
    assert found.dtype == expected
    factor = 255 if kind == "bool" else 1
    np.testing.assert_array_equal(found[..., 0], np.array([values] * 2, float) * factor)


@pytest.mark.parametrize(
    ("compression", "options"),
    [
        ("lzw", {}),
        ("zlib", {"tile": (16, 16)}),
        ("packbits", {"rowsperstrip": 7}),
        ("zstd", {"tile": (16, 16)}),
        ("lzma", {"rowsperstrip": 7}),
    ],
)
def test_compressed_tiff_is_read(tmp_path, compression, options):
    pixels = noise((40, 50, 3), np.uint16) * 3
    predictor = compression != "packbits"
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels,
        photometric="rgb",
        compression=compression,
        predictor=predictor,
        **options,
    )
    np.testing.assert_array_equal(only(tmp_path / "a.tif"), pixels)


def test_jpeg_in_tiff_becomes_rgb(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:] = 200, 30, 90
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, compression="jpeg", photometric="rgb", tile=(32, 32)
    )
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages[0].photometric == tifffile.PHOTOMETRIC.YCBCR
    assert np.abs(only(tmp_path / "a.tif").astype(int) - pixels).max() < 5


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((5, 20, 30), {}, (5, 20, 30, 1)),
        ((20, 30, 3), {"photometric": "rgb"}, (1, 20, 30, 3)),
        ((20, 30, 4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}, (1, 20, 30, 3)),
        ((5, 20, 30, 3), {"photometric": "rgb"}, (5, 20, 30, 3)),
        ((3, 20, 30), {"photometric": "rgb", "planarconfig": "separate"}, (1, 20, 30, 3)),
        ((20, 30, 7), {"planarconfig": "contig"}, (1, 20, 30, 7)),
        ((5, 2, 20, 30), {"imagej": True}, (5, 20, 30, 2)),
        ((4, 5, 2, 20, 30), {"imagej": True}, (20, 20, 30, 2)),
        ((4, 5, 20, 30), {"imagej": True, "metadata": {"axes": "TZYX"}}, (20, 20, 30, 1)),
        ((2, 5, 20, 30), {"ome": True, "metadata": {"axes": "CZYX"}}, (5, 20, 30, 2)),
        ((5, 2, 20, 30), {"ome": True, "metadata": {"axes": "ZCYX"}}, (5, 20, 30, 2)),
        ((5, 20, 30), {"metadata": None}, (5, 20, 30, 1)),
        ((5, 20, 30, 3), {"photometric": "rgb", "metadata": None}, (5, 20, 30, 3)),
        ((20, 3), {}, (1, 20, 3, 1)),
    ],
)
def test_tiff_axes_are_read_as_slices_rows_columns_channels(tmp_path, shape, options, expected):
    pixels = noise(shape, np.uint8)
    options = {"photometric": "minisblack"} | options
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    found = read_image_stack(tmp_path / "a.tif").pixels
    if "imagej" not in options:
        tifffile.imwrite(tmp_path / "b.tif", pixels, compression="zlib", **options)
        np.testing.assert_array_equal(read_image_stack(tmp_path / "b.tif").pixels, found)
    assert found.shape == expected
    axes = options.get("metadata") or {}
    if axes.get("axes") == "CZYX":
        pixels = np.moveaxis(pixels, 0, 1)
    if axes.get("axes") in ("CZYX", "ZCYX") or shape in ((5, 2, 20, 30), (4, 5, 2, 20, 30)):
        pixels = np.moveaxis(pixels, -3, -1)
    if options.get("planarconfig") == "separate":
        pixels = np.moveaxis(pixels, 0, -1)
    if shape[-1] == 4:
        pixels = pixels[..., :3]
    np.testing.assert_array_equal(found, pixels.reshape(expected))


def test_tiff_pages_are_slices_and_must_have_equal_size(tmp_path):
    pages = [noise((20, 30), seed=seed) for seed in range(3)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for page in pages:
            writer.write(page, metadata=None)
    np.testing.assert_array_equal(read_label_stack(tmp_path / "a.tif").pixels, pages)
    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        writer.write(pages[0], metadata=None)
        writer.write(noise((10, 15)), metadata=None)
    with pytest.raises(PolysegError, match="holds 2 images of different kinds"):
        read_image_stack(tmp_path / "b.tif")
    with tifffile.TiffWriter(tmp_path / "c.tif") as writer:
        writer.write(pages[0], metadata=None)
        writer.write(noise((10, 15)), metadata=None, subfiletype=1)
    np.testing.assert_array_equal(only(tmp_path / "c.tif")[..., 0], pages[0])


def test_tiff_with_white_zero_inverts_images_but_not_labels(tmp_path):
    pixels = noise((20, 30))
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    np.testing.assert_array_equal(only(tmp_path / "a.tif")[..., 0], 255 - pixels)
    np.testing.assert_array_equal(read_label_stack(tmp_path / "a.tif").pixels[0], pixels)
    # 1-bit images of a scanner are inverted; tifffile writes this tag by default, so its are not.
    tifffile.imwrite(tmp_path / "b.tif", pixels > 99, photometric="miniswhite", software="fax")
    np.testing.assert_array_equal(only(tmp_path / "b.tif")[..., 0] > 0, pixels <= 99)
    np.testing.assert_array_equal(read_label_stack(tmp_path / "b.tif").pixels[0], pixels > 99)
    tifffile.imwrite(tmp_path / "c.tif", pixels > 99)
    np.testing.assert_array_equal(read_label_stack(tmp_path / "c.tif").pixels[0], pixels > 99)


def test_tiff_palette_is_applied_to_images(tmp_path):
    numbers = noise((20, 30)) % 5
    colours = noise((3, 256), np.uint16) * 257
    tifffile.imwrite(tmp_path / "a.tif", numbers, photometric="palette", colormap=colours)
    expected = np.moveaxis((colours // 257)[:, numbers], 0, -1)
    np.testing.assert_array_equal(only(tmp_path / "a.tif"), expected)
    np.testing.assert_array_equal(read_label_stack(tmp_path / "a.tif").pixels[0], numbers)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"resolution": (40, 20), "resolutionunit": "CENTIMETER"}, (0.5, 0.25)),
        ({"resolution": (508, 254), "resolutionunit": "INCH"}, (0.1, 0.05)),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
        ({"resolution": (118.11, 118.11), "resolutionunit": "CENTIMETER"}, None),
        ({"resolution": (2, 2), "resolutionunit": "NONE"}, None),
        ({"resolution": (2, 4), "imagej": True, "metadata": {"unit": "mm"}}, (0.25, 0.5)),
        ({"resolution": (2, 4), "imagej": True, "metadata": {"unit": "um"}}, (25e-5, 5e-4)),
        ({}, None),
    ],
)
def test_tiff_spacing_is_read(tmp_path, options, expected):
    tifffile.imwrite(tmp_path / "a.tif", noise((20, 30)), **options)
    spacing = read_image_stack(tmp_path / "a.tif").spacing
    assert spacing == (expected if expected is None else pytest.approx(expected, rel=1e-3))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_orientation_is_applied(tmp_path, orientation):
    stored = noise((6, 8))
    tag = (274, "H", 1, orientation, True)
    tifffile.imwrite(tmp_path / "a.tif", stored, extratags=[tag], metadata=None)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(only(tmp_path / "a.tif"), only(tmp_path / "a.png"))


@pytest.mark.parametrize("kind", ["separated", "cielab"])
def test_tiff_with_unsupported_photometric_is_refused(tmp_path, kind):
    shape = {"separated": (9, 9, 4), "cielab": (9, 9, 3)}[kind]
    tifffile.imwrite(tmp_path / "a.tif", np.ones(shape, np.uint8), photometric=kind)
    with pytest.raises(PolysegError, match="save it as gray"):
        read_image_stack(tmp_path / "a.tif")


def test_tiff_with_nan_infinite_or_complex_values_is_refused(tmp_path):
    for value in (np.nan, np.inf):
        tifffile.imwrite(tmp_path / "a.tif", np.array([[1, value]], np.float32))
        for read in (read_image_stack, read_label_stack):
            with pytest.raises(PolysegError, match="holds NaN or infinite values"):
                read(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "a.tif", np.ones((4, 4), np.complex64))
    with pytest.raises(PolysegError, match="holds complex64 pixels"):
        read_image_stack(tmp_path / "a.tif")


def test_too_many_channels_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise((9, 9, 65)), planarconfig="contig")
    with pytest.raises(PolysegError, match="has 65 channels; at most 64"):
        read_image_stack(tmp_path / "a.tif")


def test_tiff_with_tiles_missing_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones((64, 64), np.uint8), tile=(16, 16))
    assert read_image_stack(path).pixels.all()
    with tifffile.TiffFile(path, mode="r+") as file:
        sizes = list(file.pages[0].databytecounts)
        file.pages[0].tags["TileByteCounts"].overwrite([0, *sizes[1:]])
    with pytest.raises(PolysegError, match="is damaged: not all of its 16"):
        read_image_stack(path)


def test_ome_tiff_does_not_open_other_files(tmp_path):
    """A TIFF may name files that belong to it; only the file given by the user is read."""
    tifffile.imwrite(tmp_path / "other.ome.tif", np.full((20, 30), 9, np.uint8), ome=True)
    tifffile.imwrite(tmp_path / "a.ome.tif", np.ones((2, 20, 30), np.uint8), ome=True)
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffFile(path, mode="r+b") as file:
        text = file.pages[0].description.replace(
            "</TiffData>", '<UUID FileName="other.ome.tif">urn:uuid:x</UUID></TiffData>'
        )
        file.pages[0].tags["ImageDescription"].overwrite(text)
    assert (read_image_stack(path).pixels == 1).all()


# NIfTI: a voxel at a known position in the body.

RAS = np.diag([1.0, 2.0, 3.0, 1.0])


def landmark(codes):
    """Return a volume of 10 x 12 x 8 voxels of 1, 2, 3 mm (right, front, up), reordered.

    One voxel is bright: third from the right side, fifth from the back, seventh from below.
    """
    volume = np.zeros((10, 12, 8), np.int16)
    # From left to right, back to front, below to above.
    volume[10 - 3, 5 - 1, 7 - 1] = 1000
    affine = RAS.copy()
    affine[:3, 3] = -7, 11, 30
    change = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    changed = nibabel.orientations.apply_orientation(volume, change)
    return nibabel.Nifti1Image(changed, affine @ inv_ornt_aff(change, volume.shape))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "LAS", "ASL", "SPR"])
def test_slices_have_radiological_orientation(tmp_path, codes):
    image = landmark(codes)
    assert "".join(nibabel.aff2axcodes(image.affine)) == codes
    nibabel.save(image, tmp_path / "a.nii.gz")
    expected = {
        # slice, row, column; between rows, between columns
        "axial": ((8, 12, 10), (7 - 1, 12 - 5, 3 - 1), (2, 1)),
        "coronal": ((12, 8, 10), (12 - 5, 8 - 7, 3 - 1), (3, 1)),
        "sagittal": ((10, 8, 12), (3 - 1, 8 - 7, 12 - 5), (3, 2)),
    }
    for plane, (shape, place, spacing) in expected.items():
        stack = read_image_stack(tmp_path / "a.nii.gz", plane)
        assert stack.pixels.shape == (*shape, 1) and stack.pixels.dtype == np.int16
        assert tuple(np.argwhere(stack.pixels[..., 0])[0]) == place
        assert stack.spacing == pytest.approx(spacing)
        assert tuple(np.argwhere(read_label_stack(tmp_path / "a.nii.gz", plane).pixels)[0]) == place


def test_oblique_volume_is_read_by_its_nearest_axes(tmp_path):
    image = landmark("PIR")
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    nibabel.save(
        nibabel.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine), tmp_path / "a.nii"
    )
    stack = read_image_stack(tmp_path / "a.nii")
    assert tuple(np.argwhere(stack.pixels[..., 0])[0]) == (6, 7, 2)
    assert stack.spacing == pytest.approx((2, 1))


@pytest.mark.parametrize(
    ("kind", "scale", "expected"),
    [
        (np.uint8, None, np.uint8),
        (np.uint16, None, np.uint16),
        (np.int16, None, np.int16),
        (np.int8, None, np.int16),
        (np.int32, None, np.int16),
        (np.int64, None, np.int16),
        (np.float32, None, np.float32),
        (np.float64, None, np.int16),
        (np.int16, (0.5, -3), np.float32),
        (np.uint8, (2, -1024), np.float32),
    ],
)
@pytest.mark.parametrize(
    ("version", "order"), [(nibabel.Nifti1Image, "<"), (nibabel.Nifti2Image, ">")]
)
def test_nifti_number_types_are_read(tmp_path, kind, scale, expected, version, order):
    stored = (noise((5, 6, 7)) % 100).astype(kind)
    header = version.header_class(endianness=order)
    header.set_data_dtype(kind)
    image = version(stored, np.diag([-1, -1, 1, 1]), header)
    if scale:
        image.header.set_slope_inter(*scale)
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    if scale:  # nibabel would divide the stored values by a given slope
        image = nibabel.load(tmp_path / "a.nii")
    found = read_image_stack(tmp_path / "a.nii").pixels
    assert found.dtype == expected
    np.testing.assert_array_equal(found[..., 0], image.get_fdata().transpose(2, 1, 0))


def test_nifti_with_channels_or_one_slice_is_read(tmp_path):
    def read(shape, plane="axial"):
        stored = noise(shape, np.uint8)
        nibabel.save(nibabel.Nifti1Image(stored, np.diag([-1, -1, 1, 1])), tmp_path / "a.nii")
        return stored, read_image_stack(tmp_path / "a.nii", plane).pixels

    stored, found = read((5, 6, 7, 2))
    np.testing.assert_array_equal(found, stored.transpose(2, 1, 0, 3))
    stored, found = read((5, 6, 7, 1, 2))
    np.testing.assert_array_equal(found, stored[..., 0, :].transpose(2, 1, 0, 3))
    stored, found = read((5, 6))
    np.testing.assert_array_equal(found[0, ..., 0], stored.T)
    for plane in ("axial", "coronal", "sagittal"):
        stored, found = read((5, 6, 1), plane)
        np.testing.assert_array_equal(found[0, ..., 0], stored[..., 0].T)
        assert read((1, 6, 7), plane)[1].shape == (1, 7, 6, 1)
    with pytest.raises(PolysegError, match="has 65 channels"):
        read((3, 3, 3, 65))
    with pytest.raises(PolysegError, match="expected 3 axes"):
        read((3, 3, 3, 2, 2))


def test_nan_in_nifti_becomes_the_smallest_value(tmp_path):
    stored = noise((5, 6, 7), np.float32) - 40
    stored[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(stored, np.diag([-1, -1, 1, 1])), tmp_path / "a.nii")
    found = read_image_stack(tmp_path / "a.nii").pixels
    assert found[0, 0, 0, 0] == np.nanmin(stored)
    with pytest.raises(PolysegError, match="holds NaN"):
        read_label_stack(tmp_path / "a.nii")
    stored[1] = np.inf
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(PolysegError, match="holds NaN or infinite"):
        read_image_stack(tmp_path / "a.nii")


def test_nearly_integer_labels_are_rounded(tmp_path):
    stored = (noise((5, 6, 7)) % 4 + 4e-4).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(stored, np.diag([-1, -1, 1, 1])), tmp_path / "a.nii.gz")
    labels = read_label_stack(tmp_path / "a.nii.gz").pixels
    assert labels.dtype.kind == "i"
    np.testing.assert_array_equal(labels, np.rint(stored).transpose(2, 1, 0))
    nibabel.save(nibabel.Nifti1Image(stored + 0.3, np.eye(4)), tmp_path / "b.nii")
    assert read_label_stack(tmp_path / "b.nii").pixels.dtype == np.float32


def test_nifti_spacing_units_are_converted(tmp_path):
    image = nibabel.Nifti1Image(noise((5, 6, 7)), np.diag([500, 700, 900, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "a.nii")
    assert read_image_stack(tmp_path / "a.nii").spacing == pytest.approx((0.7, 0.5))


def test_nifti_with_rgb_values_is_refused(tmp_path):
    stored = np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(PolysegError, match="such as colours"):
        read_image_stack(tmp_path / "a.nii")


def test_invalid_nifti_headers_are_refused(tmp_path):
    whole = nibabel.Nifti1Image(noise((20, 20, 20)), np.eye(4)).to_bytes()

    def refused(content, match, name="a.nii"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PolysegError, match=match) as caught:
            read_image_stack(tmp_path / name)
        assert "\n" not in str(caught.value)

    def changed(at, form, *values):
        content = bytearray(whole)
        struct.pack_into(form, content, at, *values)
        return bytes(content)

    refused(changed(42, "<3h", 32767, 32767, 32767), "at most")
    refused(changed(42, "<3h", 400, 400, 400), "is cut short|would unpack")
    refused(changed(42, "<3h", 20, 0, 20), "voxels; expected 3 axes")
    refused(changed(42, "<3h", 20, -4, 20), "voxels; expected 3 axes")
    refused(changed(280, "<4f", *[float("nan")] * 4), "correct its sform or qform")
    refused(changed(280, "<12f", *[0.0] * 12), "correct its sform or qform")
    refused(whole[:-5], "is cut short")
    refused(whole[:200], "is cut short")
    refused(b"no volume at all", "is not a NIfTI file")
    packed = gzip.compress(whole)
    refused(packed[: len(packed) // 2], "cannot be read|cut short", "a.nii.gz")
    refused(packed[:-8] + b"12345678", "CRC check failed", "a.nii.gz")
    refused(gzip.compress(bytes(400)), "is not a NIfTI file", "a.nii.gz")


# DICOM.


def dicom(path, pixels, **changes):
    """Write (H, W), (N, H, W) or (H, W, 3) with pydicom only."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    pixels = np.asarray(pixels)
    colour = changes.get("PhotometricInterpretation") in ("RGB", "YBR_FULL")
    dataset = Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID = "1.2.3"
    dataset.SeriesInstanceUID = "1.2.3.4"
    dataset.FrameOfReferenceUID = "1.2.3.5"
    dataset.PatientID, dataset.PatientName = "42", "Doe^Jane"
    dataset.Modality = "CT"
    if pixels.ndim == 3 and not colour:
        dataset.NumberOfFrames = len(pixels)
    dataset.Rows, dataset.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in changes.items():
        setattr(dataset, name, value)
    content = pixels.tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def dicom_series(folder, count=5, **changes):
    """Write slices whose value is their position, under unordered names; return the folder."""
    names = np.random.default_rng(3).permutation(count)
    for place, name in enumerate(names):
        dicom(
            folder / f"{name}.dcm",
            np.full((6, 8), place, np.int16),
            **{
                "ImageOrientationPatient": [1, 0, 0, 0, 0, -1],
                "ImagePositionPatient": [0, -10 + 2.5 * place, 0],
                "InstanceNumber": int(count - place),
                "PixelSpacing": [0.8, 0.6],
            }
            | changes,
        )
    return folder


@pytest.mark.parametrize("kind", ["u1", "u2", "i2"])
def test_dicom_number_types_are_read(tmp_path, kind):
    pixels = noise((3, 6, 8), kind)
    path = dicom(tmp_path / "a.dcm", pixels, PixelSpacing=[0.8, 0.6])
    stack = read_image_stack(path)
    np.testing.assert_array_equal(stack.pixels[..., 0], pixels)
    assert stack.pixels.dtype == kind and stack.spacing == (0.8, 0.6)
    np.testing.assert_array_equal(read_label_stack(path).pixels, pixels)


def test_dicom_is_rescaled(tmp_path):
    pixels = noise((6, 8), np.uint16) * 8
    path = dicom(tmp_path / "a.dcm", pixels, RescaleSlope=1, RescaleIntercept=-1024)
    found = only(path)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found[..., 0], pixels.astype(int) - 1024)
    found = only(dicom(tmp_path / "a.dcm", pixels, RescaleSlope=0.5, RescaleIntercept=3))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[..., 0], pixels * 0.5 + 3)
    found = only(dicom(tmp_path / "a.dcm", pixels, RescaleSlope=100, RescaleIntercept=0))
    np.testing.assert_array_equal(found[..., 0], pixels * 100.0)


def test_monochrome1_images_are_inverted_and_labels_kept(tmp_path):
    pixels = noise((6, 8), np.uint16)
    path = dicom(
        tmp_path / "a.dcm",
        pixels,
        PhotometricInterpretation="MONOCHROME1",
        BitsStored=12,
        HighBit=11,
    )
    np.testing.assert_array_equal(only(path)[..., 0], 4095 - pixels)
    np.testing.assert_array_equal(read_label_stack(path).pixels[0], pixels)


def test_colour_dicom_is_read(tmp_path):
    pixels = noise((6, 8, 3))
    path = dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation="RGB")
    np.testing.assert_array_equal(only(path), pixels)
    gray = np.full((6, 8, 3), 128, np.uint8)
    gray[..., 0] = noise((6, 8))
    path = dicom(tmp_path / "a.dcm", gray, PhotometricInterpretation="YBR_FULL")
    assert np.abs(only(path).astype(int) - gray[..., :1]).max() <= 1


def test_dicom_palette_is_applied(tmp_path):
    numbers = noise((6, 8)) % 4
    tables = {
        f"{colour}PaletteColorLookupTable{part}": value
        for k, colour in enumerate(("Red", "Green", "Blue"))
        for part, value in (
            ("Descriptor", [4, 0, 8]),
            ("Data", bytes([10 * k, 10 * k + 1, 10 * k + 2, 10 * k + 3])),
        )
    }
    path = dicom(tmp_path / "a.dcm", numbers, PhotometricInterpretation="PALETTE COLOR", **tables)
    expected = np.stack([numbers, numbers + 10, numbers + 20], 2)
    np.testing.assert_array_equal(only(path), expected)
    np.testing.assert_array_equal(read_label_stack(path).pixels[0], numbers)


def test_compressed_dicom_is_read(tmp_path):
    from pydicom.uid import MPEG2MPML, JPEG2000Lossless, JPEGLSLossless, RLELossless

    pixels = noise((3, 32, 40), np.uint16)
    dataset = pydicom.dcmread(dicom(tmp_path / "a.dcm", pixels))
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "b.dcm")
    np.testing.assert_array_equal(read_image_stack(tmp_path / "b.dcm").pixels[..., 0], pixels)
    import imagecodecs
    from pydicom.encaps import encapsulate

    frames = [imagecodecs.jpeg2k_encode(one, level=0, codecformat="j2k") for one in pixels]
    dataset.PixelData = encapsulate(frames)
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.save_as(tmp_path / "c.dcm")
    np.testing.assert_array_equal(read_image_stack(tmp_path / "c.dcm").pixels[..., 0], pixels)
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.save_as(tmp_path / "d.dcm")
    with pytest.raises(PolysegError, match="needs another package: pip install"):
        read_image_stack(tmp_path / "d.dcm")
    # A video, for which pydicom has no decoder.
    dataset.file_meta.TransferSyntaxUID = MPEG2MPML
    dataset.save_as(tmp_path / "e.dcm")
    with pytest.raises(PolysegError, match=r"is compressed as MPEG2 .* needs another package"):
        read_image_stack(tmp_path / "e.dcm")


def test_dicom_series_is_sorted_by_position(tmp_path):
    stack = read_image_stack(dicom_series(tmp_path / "series"))
    assert stack.pixels.shape == (5, 6, 8, 1) and stack.spacing == (0.8, 0.6)
    # The normal of these slices, rows down and columns to the left, points to the back.
    assert stack.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_dicom_series_without_positions_is_sorted_by_number_or_name(tmp_path):
    by_number = dicom_series(tmp_path / "a", ImagePositionPatient=None)
    assert read_image_stack(by_number).pixels[:, 0, 0, 0].tolist() == [4, 3, 2, 1, 0]
    for k in range(3):
        dicom(tmp_path / f"b/{k}", np.full((6, 8), k, np.uint8))
    (tmp_path / "b/.hidden").touch()
    (tmp_path / "b/notes.txt").write_text("as exported")
    assert read_label_stack(tmp_path / "b").pixels[:, 0, 0].tolist() == [0, 1, 2]


def test_folder_that_is_not_one_dicom_series_is_refused(tmp_path):
    folder = dicom_series(tmp_path / "a")
    dicom(folder / "9.dcm", np.zeros((6, 8), np.int16), SeriesInstanceUID="1.2.9")
    with pytest.raises(PolysegError, match=r"holds 2 DICOM series \(1\.2\.3\.4, 1\.2\.9\)"):
        read_image_stack(folder)
    dicom(folder / "9.dcm", np.zeros((6, 9), np.int16))
    with pytest.raises(PolysegError, match="differ in size"):
        read_image_stack(folder)
    dicom(folder / "9.dcm", np.zeros((2, 6, 8), np.int16))
    with pytest.raises(PolysegError, match="many frames"):
        read_image_stack(folder)
    (folder / "9.dcm").write_text("no DICOM")
    with pytest.raises(PolysegError, match=r"9\.dcm: is not a DICOM file"):
        read_image_stack(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PolysegError, match="holds 0 DICOM files"):
        read_image_stack(tmp_path / "empty")


def test_enhanced_dicom_frames_use_their_own_rescaling(tmp_path):
    from pydicom.dataset import Dataset

    def group(**values):
        holder, inner = Dataset(), Dataset()
        name = values.pop("name")
        for key, value in values.items():
            setattr(inner, key, value)
        setattr(holder, name, [inner])
        return holder

    measures = group(name="PixelMeasuresSequence", PixelSpacing=[0.3, 0.4])
    factors = [
        group(name="PixelValueTransformationSequence", RescaleSlope=slope, RescaleIntercept=0)
        for slope in (1, 2, 3)
    ]
    pixels = noise((3, 6, 8), np.uint16)
    path = dicom(
        tmp_path / "a.dcm",
        pixels,
        SharedFunctionalGroupsSequence=[measures],
        PerFrameFunctionalGroupsSequence=factors,
    )
    stack = read_image_stack(path)
    assert stack.spacing == (0.3, 0.4)
    np.testing.assert_array_equal(
        stack.pixels[..., 0], pixels * np.array([1, 2, 3], int)[:, None, None]
    )


# File names, and files that are not images.


def test_dicom_without_suffix_is_recognised_by_its_content(tmp_path):
    for name in ("IM0001", "1.2.840.113"):
        path = dicom(tmp_path / name, noise((6, 8)))
        np.testing.assert_array_equal(only(path)[..., 0], noise((6, 8)))


def test_mask_that_differs_only_in_transparency_is_refused(tmp_path):
    pixels = np.full((6, 8, 4), 255, np.uint8)
    pixels[:3, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with pytest.raises(PolysegError, match="differs only in transparency"):
        read_label_stack(tmp_path / "a.png")
    assert read_image_stack(tmp_path / "a.png").pixels.shape == (1, 6, 8, 3)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.nii", "a.nii.gz", "a.dcm"])
def test_pipes_are_refused_without_waiting(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(PolysegError, match="is not a file"):
        read_image_stack(path)
    path.unlink()
    with pytest.raises(PolysegError, match="No such file"):
        read_label_stack(path)
    path.symlink_to(path.name)
    with pytest.raises(PolysegError, match="symbolic links"):
        read_label_stack(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(PolysegError, match=r"is not a file|holds 0 DICOM files"):
        read_label_stack(path)


@pytest.mark.parametrize(
    ("name", "library"), [("a.nii", "nibabel"), ("a.dcm", "pydicom"), ("a.mha", "SimpleITK")]
)
def test_missing_library_error_states_how_to_install_it(tmp_path, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / name).touch()
    with pytest.raises(PolysegError) as caught:
        read_image_stack(tmp_path / name)
    assert str(caught.value).endswith(
        f"is read by {library}, which is not installed; pip install 'polyseg[medical]'"
    )


VOLUME = np.random.default_rng(0).integers(0, 900, (4, 6, 5)).astype(np.int16)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_itk_volumes_have_the_orientation_of_nifti(tmp_path, suffix, plane):
    """SimpleITK writes both files from one image, and nibabel reads NIfTI independently."""
    image = SimpleITK.GetImageFromArray(VOLUME)
    image.SetSpacing((0.7, 0.8, 3.0))
    image.SetDirection((0, 0, 1, 1, 0, 0, 0, -1, 0))
    for name in (f"a{suffix}", "b.nii.gz"):
        SimpleITK.WriteImage(image, str(tmp_path / name), useCompression=True)
    found, expected = (
        read_image_stack(tmp_path / one, plane) for one in (f"a{suffix}", "b.nii.gz")
    )
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    np.testing.assert_allclose(found.spacing, expected.spacing)
    labels = (found.pixels[..., 0] > 400).astype(np.uint8)
    path = write_labels(tmp_path / f"a{suffix}", labels, tmp_path, name="mask", plane=plane)
    np.testing.assert_array_equal(read_label_stack(path, plane).pixels, labels)
    written = SimpleITK.ReadImage(str(path))
    assert written.GetDirection() == image.GetDirection()
    assert written.GetSpacing() == pytest.approx(image.GetSpacing())


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_damaged_itk_volumes_are_one_line(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOLUME), str(path))
    whole = path.read_bytes()
    generator = np.random.default_rng(1)
    contents = [whole[:length] for length in (0, 20, len(whole) // 2, len(whole) - 9)]
    header = 200
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[int(generator.integers(header))] = int(generator.integers(256))
        contents.append(bytes(damaged))
    contents.append(whole.replace(b"5 6 4", b"50000 60000 4"))
    contents.append(whole.replace(b"LOCAL", b"/etc/hostname"))
    contents.append(whole.replace(b"\nencoding", b"\ndata file: /etc/hostname\nencoding"))
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            assert read_image_stack(path).pixels.size < 10**6
        except PolysegError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 5


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
@pytest.mark.parametrize("packed", [True, False])
def test_voxels_in_a_separate_file_are_read(tmp_path, suffix, packed):
    folder = tmp_path / "images"
    folder.mkdir()
    image = SimpleITK.GetImageFromArray(VOLUME)
    SimpleITK.WriteImage(image, str(folder / f"a{suffix}"), useCompression=packed)
    SimpleITK.WriteImage(image, str(tmp_path / "b.nii.gz"))
    found, expected = (
        read_image_stack(one) for one in (folder / f"a{suffix}", tmp_path / "b.nii.gz")
    )
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    labels = (found.pixels[..., 0] > 400).astype(np.uint8)
    path = write_labels(folder / f"a{suffix}", labels, tmp_path, name="m", plane="axial")
    assert path.suffix == {".nhdr": ".nrrd", ".mhd": ".mha"}[suffix]
    np.testing.assert_array_equal(read_label_stack(path).pixels, labels)
    listed = Folders().list(folder)
    assert [file.name for file in listed.files] == [f"a{suffix}"]
    assert not listed.unread
    before = _content(folder / f"a{suffix}")
    (voxels,) = folder.glob("a.*raw*")
    voxels.write_bytes(voxels.read_bytes() + b"x")
    assert _content(folder / f"a{suffix}") != before  # So decoded copies are never outdated.


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
@pytest.mark.parametrize(
    "name",
    ["/etc/hostname", "../a.raw", "LIST", "%03d.raw 1 4 1", "gone.raw", "", "a\x00.raw"],
)
def test_voxels_in_another_folder_are_refused_in_one_line(tmp_path, suffix, name):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOLUME), str(tmp_path / f"a{suffix}"))
    path = tmp_path / f"a{suffix}"
    path.write_text(path.read_text().replace("a.raw", name))
    (tmp_path / "LIST").write_text("/etc/hostname")
    with pytest.raises(PolysegError, match="save header and voxels in one file") as caught:
        read_image_stack(path)
    assert "\n" not in str(caught.value)


def test_truncated_voxels_are_refused_by_their_size(tmp_path):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOLUME), str(tmp_path / "a.mhd"))
    (tmp_path / "a.raw").write_bytes(bytes(100))
    with pytest.raises(PolysegError, match=r"a.mhd: .* 240 bytes of .* a.raw holds 100 "):
        read_image_stack(tmp_path / "a.mhd")


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nhdr", ".mhd"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "end of zeros"])
def test_damaged_compressed_voxels_are_refused(tmp_path, suffix, damage):
    """SimpleITK reads the intact part of some of these files without an error."""
    image = SimpleITK.GetImageFromArray(noise((4, 30, 30)))
    path = tmp_path / f"a{suffix}"
    SimpleITK.WriteImage(image, str(path), useCompression=True)
    (voxels,) = list(tmp_path.glob("a.*raw*")) or [path]
    whole = bytearray(voxels.read_bytes())
    if damage == "flipped":
        whole[-900] ^= 255
    elif damage == "cut":
        del whole[-900:]
    else:
        whole[-300:] = bytes(300)
    voxels.write_bytes(whole)
    with pytest.raises(PolysegError, match="is damaged or cut short") as caught:
        read_image_stack(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["", "CompressedDataSize = 9\n", "CompressedDataSize = 99999\n"])
def test_compressed_voxels_of_unknown_size_are_refused(tmp_path, size):
    """SimpleITK would return uninitialised memory."""
    path = tmp_path / "a.mha"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOLUME), str(path), useCompression=True)
    header, data, rest = path.read_bytes().partition(b"TransformMatrix")
    path.write_bytes(re.sub(rb"CompressedDataSize.*\n", size.encode(), header) + data + rest)
    with pytest.raises(PolysegError, match="is damaged or cut short: 240 bytes of voxels are"):
        read_image_stack(path)


def test_comment_in_the_header_does_not_hide_the_data_file(tmp_path):
    path = tmp_path / "a.mha"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOLUME), str(path))
    header = path.read_bytes().partition(b"ElementDataFile")[0]
    for line in (b"ElementDataFile = /etc/hostname", b" ElementDataFile : /etc/hostname"):
        path.write_bytes(header + b"Comment = ElementDataFile = LOCAL\n" + line + b"\n")
        with pytest.raises(PolysegError, match="not in one file beside it"):
            read_image_stack(path)


def test_webp_is_read(tmp_path):
    pixels = noise((20, 30, 3))
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True)
    np.testing.assert_array_equal(only(tmp_path / "a.webp"), pixels)


def test_format_is_detected_by_content_before_suffix(tmp_path):
    pixels = noise((6, 8))
    tifffile.imwrite(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(only(tmp_path / "a.png")[..., 0], pixels)
    dicom(tmp_path / "b.dcm", pixels)
    for name in ("b.IMA", "b.jpg", "b.scan"):
        (tmp_path / name).write_bytes((tmp_path / "b.dcm").read_bytes())
        np.testing.assert_array_equal(only(tmp_path / name)[..., 0], pixels)


def test_disguised_postscript_is_not_executed(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(PolysegError, match="cannot identify image file"):
        read_image_stack(tmp_path / "a.png")


def test_images_with_too_many_pixels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("polyseg.data.formats.stacks.LARGEST_IMAGE", 99)
    save(tmp_path / "a.png", np.zeros((10, 10), np.uint8))
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.zeros((3, 10, 10), np.uint8),
        photometric="rgb",
        planarconfig="separate",
    )
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((10, 10, 3), np.uint8), np.eye(4)), tmp_path / "a.nii"
    )
    dicom(tmp_path / "a.dcm", np.zeros((10, 10), np.uint8))
    for name in ("a.png", "a.tif", "a.nii", "a.dcm"):
        with pytest.raises(PolysegError, match="has 10 x 10 pixels; at most 99"):
            read_image_stack(tmp_path / name)


@pytest.mark.slow
def test_hostile_files_give_one_line_within_time_and_memory(tmp_path):
    warm_up(tmp_path)
    for path in hostile_files(tmp_path, 40, seed=11):
        assert faults(path) == [], path


def test_hostile_files_depend_on_the_seed_only(tmp_path):
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files = list(hostile_files(tmp_path / name, 6, seed=5))
        contents.append([path.read_bytes() for path in files])
    assert contents[0] == contents[1]

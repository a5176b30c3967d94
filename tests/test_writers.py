"""Writers: masks and maps are read back equal, with the geometry of their source."""

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image

from polyseg.data.formats.readers import read_image_stack, read_label_stack
from polyseg.data.formats.writers import write_labels, write_map
from polyseg.errors import PolysegError
from tests.test_readers import dicom, dicom_series, landmark, noise

PLANES = ("axial", "coronal", "sagittal")


def labels_for(source, plane="axial", kind=np.uint8):
    shape = read_image_stack(source, plane).pixels.shape[:3]
    return np.random.default_rng(1).integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)


def check_round_trip(source, folder, suffix, kind=np.uint8, plane="axial"):
    labels = labels_for(source, plane, kind)
    path = write_labels(source, labels, folder / "out", name="case 1", plane=plane)
    assert path == folder / f"out/case 1{suffix}"
    found = read_label_stack(path, plane).pixels
    assert found.dtype == kind
    np.testing.assert_array_equal(found, labels)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "suffix"),
    [
        ("a.png", np.uint8, ".png"),
        ("a.png", np.uint16, ".png"),
        ("a.bmp", np.uint8, ".bmp"),
        ("a.bmp", np.uint16, ".png"),
        ("a.jpg", np.uint8, ".png"),
        ("a.gif", np.uint16, ".png"),
        ("a.tif", np.uint8, ".tif"),
        ("a.TIFF", np.uint16, ".tiff"),
    ],
)
def test_image_masks_round_trip(tmp_path, name, kind, suffix):
    Image.fromarray(noise((20, 30))).save(tmp_path / name)
    check_round_trip(tmp_path / name, tmp_path, suffix, kind)


def test_mask_of_a_rotated_image_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise((20, 30))).save(tmp_path / "a.jpg", exif=exif)
    path = check_round_trip(tmp_path / "a.jpg", tmp_path, ".png")
    with Image.open(path) as image:
        assert image.size == (20, 30) and image.getexif().get(0x0112) is None


@pytest.mark.parametrize("shape", [(20, 30), (5, 20, 30), (5, 20, 3), (4, 3, 4), (1, 20, 30)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_tiff_keeps_pages_and_resolution(tmp_path, shape, kind):
    tifffile.imwrite(
        tmp_path / "a.tif",
        noise(shape),
        photometric="minisblack",
        resolution=(40, 20),
        resolutionunit="CENTIMETER",
    )
    path = check_round_trip(tmp_path / "a.tif", tmp_path, ".tif", kind)
    assert read_label_stack(path).spacing == pytest.approx((0.5, 0.25))
    with tifffile.TiffFile(path) as file:
        assert len(file.pages) == np.prod(shape[:-2])
        assert file.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE


@pytest.mark.parametrize("codes", ["RAS", "PIR", "LPS"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("plane", PLANES)
def test_nifti_keeps_its_geometry(tmp_path, codes, name, plane):
    image = landmark(codes)
    nibabel.save(image, tmp_path / name)
    suffix = name[1:]
    check_round_trip(tmp_path / name, tmp_path, suffix, np.uint16, plane)
    labels = (read_image_stack(tmp_path / name, plane).pixels[..., 0] > 0).astype(np.uint8)
    path = write_labels(tmp_path / name, labels, tmp_path, name="mask", plane=plane)
    mask = nibabel.load(path)
    np.testing.assert_array_equal(mask.affine, image.affine)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(image.dataobj) > 0)
    assert mask.get_data_dtype() == np.uint8
    assert mask.header.get_zooms() == image.header.get_zooms()
    assert int(mask.header["sform_code"]) == int(nibabel.load(tmp_path / name).header["sform_code"])


def test_nifti_mask_drops_channels_and_scaling_of_the_source(tmp_path):
    image = nibabel.Nifti2Image(noise((5, 6, 7, 2), np.int16), np.diag([-0.7, 0.8, 3, 1]))
    image.header.set_slope_inter(0.5, 3)
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, tmp_path / "a.nii.gz")
    path = check_round_trip(tmp_path / "a.nii.gz", tmp_path, ".nii.gz")
    mask = nibabel.load(path)
    assert mask.shape == (5, 6, 7) and isinstance(mask, nibabel.Nifti2Image)
    np.testing.assert_allclose(mask.affine, image.affine)
    assert mask.header.get_slope_inter() in ((None, None), (1, 0))


def test_nifti_of_one_slice_round_trips(tmp_path):
    for shape in ((5, 6), (5, 6, 1), (1, 6, 7)):
        nibabel.save(nibabel.Nifti1Image(noise(shape), np.eye(4)), tmp_path / "a.nii")
        path = check_round_trip(tmp_path / "a.nii", tmp_path, ".nii")
        assert nibabel.load(path).shape == (*shape, 1)[:3]


GEOMETRY = {
    "ImageOrientationPatient": [1, 0, 0, 0, 0, -1],
    "ImagePositionPatient": [1, 2, 3],
    "PixelSpacing": [0.8, 0.6],
}


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(6, 8), (4, 6, 8), (5, 7)])
def test_dicom_keeps_patient_and_geometry(tmp_path, kind, shape):
    source = dicom(
        tmp_path / "a.dcm",
        noise(shape, np.uint16),
        PhotometricInterpretation="MONOCHROME1",
        RescaleSlope=2,
        RescaleIntercept=-1024,
        **GEOMETRY,
    )
    path = check_round_trip(source, tmp_path, ".dcm", kind)
    before, after = pydicom.dcmread(source), pydicom.dcmread(path)
    for name in (*GEOMETRY, "PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality"):
        assert before[name].value == after[name].value
    for name in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert before[name].value != after[name].value
    assert "RescaleSlope" not in after and after.PhotometricInterpretation == "MONOCHROME2"
    assert list(after.ImageType) == ["DERIVED", "SECONDARY"] and "mask" in after.SeriesDescription
    assert after.BitsStored == after.BitsAllocated == np.dtype(kind).itemsize * 8
    assert not after.file_meta.TransferSyntaxUID.is_compressed


def test_dicom_without_suffix_round_trips(tmp_path):
    source = dicom(tmp_path / "IM0001", noise((6, 8)))
    check_round_trip(source, tmp_path, ".dcm")


def test_dicom_series_is_written_as_one_series(tmp_path):
    source = dicom_series(tmp_path / "series", count=12)
    labels = labels_for(source)
    folder = write_labels(source, labels, tmp_path / "out", name="case 1")
    assert folder == tmp_path / "out/case 1"
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in source.iterdir())
    np.testing.assert_array_equal(read_label_stack(folder).pixels, labels)
    written = [pydicom.dcmread(folder / name) for name in names]
    for name, after in zip(names, written, strict=True):
        before = pydicom.dcmread(source / name)
        assert before.ImagePositionPatient == after.ImagePositionPatient
        assert before.InstanceNumber == after.InstanceNumber
    assert len({one.SeriesInstanceUID for one in written}) == 1
    assert len({one.SOPInstanceUID for one in written}) == 12
    assert written[0].SeriesInstanceUID != "1.2.3.4"


def test_equal_masks_give_equal_bytes(tmp_path):
    nibabel.save(landmark("RAS"), tmp_path / "a.nii.gz")
    dicom(tmp_path / "a.dcm", noise((6, 8)))
    for name in ("a.nii.gz", "a.dcm"):
        labels = labels_for(tmp_path / name)
        first, second = (
            write_labels(tmp_path / name, labels, tmp_path / folder, name="b").read_bytes()
            for folder in ("one", "two")
        )
        assert first == second


@pytest.mark.parametrize("plane", PLANES)
def test_maps_round_trip(tmp_path, plane):
    Image.fromarray(noise((20, 30))).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", noise((5, 20, 30)))
    nibabel.save(landmark("PIR"), tmp_path / "a.nii.gz")
    dicom_series(tmp_path / "series")
    for name, suffix in (
        ("a.png", ".tif"),
        ("a.tif", ".tif"),
        ("a.nii.gz", ".nii.gz"),
        ("series", ".tif"),
    ):
        shape = read_image_stack(tmp_path / name, plane).pixels.shape[:3]
        values = np.random.default_rng(2).random(shape, np.float32)
        path = write_map(tmp_path / name, values, tmp_path / "out", name="entropy", plane=plane)
        assert path.name == f"entropy{suffix}"
        found = read_image_stack(path, plane)
        assert found.pixels.dtype == np.float32
        np.testing.assert_array_equal(found.pixels[..., 0], values)


def test_masks_of_wrong_shape_or_dtype_are_refused(tmp_path):
    Image.fromarray(noise((20, 30))).save(tmp_path / "a.png")
    nibabel.save(landmark("RAS"), tmp_path / "a.nii")
    dicom(tmp_path / "a.dcm", noise((6, 8)))
    for name in ("a.png", "a.nii", "a.dcm"):
        with pytest.raises(PolysegError, match=f"{name}: .*(values to write|not 3 slices)"):
            write_labels(tmp_path / name, np.zeros((3, 9, 9), np.uint8), tmp_path, name="b")
    with pytest.raises(ValueError, match="expected uint8 or uint16"):
        write_labels(tmp_path / "a.png", np.zeros((1, 20, 30)), tmp_path, name="b")


def test_failed_write_leaves_no_file(tmp_path):
    Image.fromarray(noise((20, 30))).save(tmp_path / "a.png")
    (tmp_path / "out").write_text("no folder")
    with pytest.raises(PolysegError, match="cannot be written"):
        write_labels(
            tmp_path / "a.png", np.zeros((1, 20, 30), np.uint8), tmp_path / "out", name="b"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "out"]

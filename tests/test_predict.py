"""`polyseg predict`: masks keep the size, spacing, orientation and format of the images."""

import csv

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image

from polyseg import INTENDED_USE
from polyseg.commands.train import train
from polyseg.data.phantoms.phantom_sets import make_phantoms
from tests.layout_copies import COPIES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run of the demo, trained long enough to segment most of a lesion."""
    from polyseg.config import load_config

    path = tmp_path_factory.mktemp("runs") / "run"
    settings = (
        "data.demo_images=24",
        "data.size=48",
        "network.kwargs={channels: [8, 16, 32], strides: [2, 2], num_res_units: 1}",
        "training.epochs=25",
        "training.learning_rate=0.01",
        "uncertainty.samples=3",
        "control.start=25",
        "output.figures=false",
        f"output.path={path}",
    )
    train(load_config(overrides=settings))
    return path


@pytest.fixture(scope="module")
def phantoms():
    return make_phantoms(6, seed=5, size=(72, 96))


def dice(mask, truth):
    mask, truth = np.asarray(mask) > 0, np.asarray(truth) > 0
    return 2 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1)


def predict(polyseg, run, source, out, *more):
    answer = polyseg("predict", run, source, "--out", out, "--quiet", *more)
    assert answer.code == 0, answer.err
    return answer


@pytest.mark.slow
def test_images_keep_size_and_format(run, phantoms, polyseg, tmp_path):
    (tmp_path / "in").mkdir()
    kinds = (".png", ".bmp", ".tif", ".png", ".jpg", ".png")
    for phantom, kind in zip(phantoms, kinds, strict=True):
        Image.fromarray(phantom.image).save(tmp_path / f"in/{phantom.id}{kind}")
    predict(polyseg, run, tmp_path / "in", tmp_path / "out")
    scores = []
    for phantom, kind in zip(phantoms, kinds, strict=True):
        # Lossy compression would change the values of a mask.
        written = {".jpg": ".png"}.get(kind, kind)
        with Image.open(tmp_path / f"out/{phantom.id}{written}") as mask:
            assert mask.size == (96, 72)
            assert set(np.unique(np.asarray(mask)).tolist()) <= {0, 255}
            scores.append(dice(mask, phantom.mask))
    # Rotated, flipped or shifted masks would not overlap the lesions.
    assert np.mean(scores) > 0.5
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    assert [row["id"] for row in rows] == sorted(phantom.id for phantom in phantoms)
    assert {row["intended_use"] for row in rows} == {INTENDED_USE}


def test_sixteen_bit_tiff_keeps_size_and_resolution(run, phantoms, polyseg, tmp_path):
    pixels = phantoms[0].image.astype(np.uint16) * 200
    source = tmp_path / "a.tif"
    tifffile.imwrite(source, pixels, resolution=(4000.0, 2000.0), resolutionunit="CENTIMETER")
    predict(polyseg, run, source, tmp_path / "out")
    with tifffile.TiffFile(tmp_path / "out/a.tif") as file:
        page = file.pages[0]
        assert page.shape == pixels.shape
        assert page.tags["XResolution"].value == (4000, 1)
        assert page.tags["YResolution"].value == (2000, 1)
        assert page.tags["ResolutionUnit"].value == 3
        assert dice(page.asarray(), phantoms[0].mask) > 0.3


@pytest.mark.parametrize(
    ("orientation", "suffix"), [("RAS", ".nii.gz"), ("LPS", ".nii"), ("PIR", ".nii.gz")]
)
def test_nifti_keeps_shape_spacing_and_orientation(
    run, phantoms, polyseg, tmp_path, orientation, suffix
):
    """The same anatomy stored in another axis order gets the same mask in that order."""
    # Axial slices as displayed: rows to posterior, columns to the patient's left.
    shown = np.stack([phantom.image for phantom in phantoms[:3]]).astype(np.int16)
    stored = nibabel.Nifti1Image(shown.transpose(2, 1, 0), np.diag([-0.5, -0.7, 3.0, 1.0]))
    change = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(stored.affine),
        nibabel.orientations.axcodes2ornt(orientation),
    )
    source = tmp_path / f"v{suffix}"
    nibabel.save(stored.as_reoriented(change), source)
    predict(polyseg, run, source, tmp_path / "out")
    before, after = nibabel.load(source), nibabel.load(tmp_path / f"out/v{suffix}")
    assert after.shape == before.shape
    np.testing.assert_allclose(after.affine, before.affine)
    np.testing.assert_allclose(after.header.get_zooms(), before.header.get_zooms())
    assert nibabel.aff2axcodes(after.affine) == tuple(orientation)
    assert set(np.unique(np.asarray(after.dataobj)).tolist()) <= {0, 1}
    truth = np.stack([phantom.mask for phantom in phantoms[:3]]).transpose(2, 1, 0)
    truth = nibabel.Nifti1Image(truth.astype(np.uint8), stored.affine).as_reoriented(change)
    assert dice(after.dataobj, truth.dataobj) > 0.4


def test_dicom_keeps_geometry(run, polyseg, tmp_path):
    data = COPIES["dicom_series"](tmp_path / "data")
    series = next(path for path in sorted((data / "images").iterdir()) if path.is_dir())
    predict(polyseg, run, series, tmp_path / "out")
    for path in sorted(series.iterdir()):
        before = pydicom.dcmread(path)
        after = pydicom.dcmread(tmp_path / "out" / series.name / path.name)
        for tag in (
            *("Rows", "Columns", "PixelSpacing", "ImagePositionPatient"),
            *("ImageOrientationPatient", "PatientID", "StudyInstanceUID"),
        ):
            assert after.get(tag) == before.get(tag), tag
        assert after.SOPInstanceUID != before.SOPInstanceUID
        assert after.SeriesInstanceUID != before.SeriesInstanceUID
        assert set(np.unique(after.pixel_array).tolist()) <= {0, 1}


def test_predict_writes_uncertainty_maps_and_difficulties(run, phantoms, polyseg, tmp_path):
    Image.fromarray(phantoms[0].image).save(tmp_path / "a.png")
    predict(polyseg, run, tmp_path / "a.png", tmp_path / "out", "--uncertainty", "--samples", 4)
    values = tifffile.imread(tmp_path / "out/a_uncertainty.tif")
    assert values.shape == (72, 96) and values.dtype == np.float32
    assert 0 <= values.min() < values.max() <= np.log(2)
    row = next(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    assert 0 < float(row["mutual_information"]) < float(row["entropy"])


def test_unreadable_images_are_named_and_others_predicted(run, phantoms, polyseg, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(phantoms[0].image).save(tmp_path / "in/good.png")
    (tmp_path / "in/bad.png").write_text("no image")
    answer = polyseg("predict", run, tmp_path / "in", "--out", tmp_path / "out", "--quiet")
    assert answer.code == 2
    assert "1 of 2 images are in" in answer.err and "bad.png" in answer.err
    assert (tmp_path / "out/good.png").is_file()
    again = polyseg("predict", run, tmp_path / "in", "--out", tmp_path / "out")
    assert again.code == 2 and "nothing is overwritten" in again.err


def test_images_with_another_number_of_channels_are_refused(run, polyseg, tmp_path):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
    answer = polyseg("predict", run, tmp_path / "a.png", "--out", tmp_path / "out")
    assert answer.code == 2 and "expected 1 in each" in answer.err
    assert not (tmp_path / "out").exists()

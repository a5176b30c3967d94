"""Metrics at the original size of images, against computations with other libraries."""

import csv
import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.metrics import brier_score_loss, f1_score

from polyseg.data.loading import load_images
from polyseg.errors import PolysegError
from polyseg.evaluation.comparison import compare
from polyseg.evaluation.scores import ImageScores, RunScores, pool
from polyseg.metrics.image_metrics import METRICS
from polyseg.report.run_files import EvaluationFiles
from polyseg.report.tables import refuse_other_sizes
from polyseg.runs.trained_model import open_model
from tests.test_image_metrics import brute_force
from tests.test_run_of_0_1 import HELD
from tests.test_train import run_of

SIZE, COUNT = 32, 10


def disc(seed, height, width):
    """Return an image with a bright disc, and the mask of the disc."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    cy, cx = generator.integers(height // 3, 2 * height // 3), generator.integers(20, width - 20)
    mask = ((y - cy) ** 2 + (x - cx) ** 2 < generator.integers(7, 14) ** 2).astype(np.uint8)
    return np.clip(generator.normal(90, 25, mask.shape) + 80 * mask, 0, 255).astype(np.uint8), mask


def write_pictures(folder, *, exif=False, labelled=False):
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(COUNT):
        pixels, mask = disc(i, 60, 84)
        picture = Image.fromarray(pixels)
        if exif:
            tags = picture.getexif()
            tags[0x112] = 6
            picture.save(folder / f"images/{i}.jpg", exif=tags, quality=100)
            mask = np.rot90(mask, -1)  # The mask has the orientation of the displayed image.
        else:
            picture.save(folder / f"images/{i}.png")
        if labelled:
            mask = mask * (1 + (np.arange(mask.shape[1]) > 42)).astype(np.uint8)
        Image.fromarray(mask if labelled else 255 * mask).save(folder / f"masks/{i}.png")


def write_volumes(folder):
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(COUNT):
        slices = [disc(10 * i + k, 60, 84) for k in range(2)]
        for part, kind, values in (
            ("images", np.float32, [pixels for pixels, _ in slices]),
            ("masks", np.uint8, [mask for _, mask in slices]),
        ):
            volume = nibabel.Nifti1Image(
                np.stack(values, axis=2).astype(kind), np.diag([0.4, 1.7, 5.0, 1.0])
            )
            nibabel.save(volume, folder / part / f"{i}.nii.gz")


SETS = {
    "non-square": (write_pictures, []),
    "rotated": (lambda folder: write_pictures(folder, exif=True), []),
    "labelled": (
        lambda folder: write_pictures(folder, labelled=True),
        ["data.foreground={left: 1, right: 2}"],
    ),
    "tiled": (write_pictures, ["data.fit=tile"]),
    "anisotropic": (write_volumes, []),
}


def by_hand(model, folder, identity, values):
    """Return probabilities (K, H, W), masks (K, H, W) and spacing, read without polyseg.

    Args:
        model: the network.
        folder: folder of the data set.
        identity: id of the image.
        values: mask values of the labels; None for any value above 0.
    """
    stem, _, number = identity.partition("#")
    (path,) = (folder / "images").glob(f"{stem}.*")
    (of_mask,) = (folder / "masks").glob(f"{stem}.*")
    if path.suffix == ".gz":
        # Radiological display: rows run along the second axis, from front to back.
        pixels, labels = (
            np.asarray(nibabel.load(one).dataobj)[:, :, int(number)] for one in (path, of_mask)
        )
        pixels, labels = (one.T[::-1, ::-1] for one in (pixels, labels))
        spacing = (1.7, 0.4)
    else:
        pixels, labels = (
            np.asarray(ImageOps.exif_transpose(Image.open(one))) for one in (path, of_mask)
        )
        spacing = None
    masks = np.stack([labels == value if value else labels > 0 for value in values])
    tiled = model.config.data.fit == "tile"
    size = pixels.shape if tiled else (SIZE, SIZE)
    seen = torch.from_numpy(np.array(pixels)).double()[None, None]
    if not tiled:
        seen = torch.nn.functional.interpolate(seen, size, mode="bilinear", antialias=True)
    seen = seen if pixels.dtype == np.float32 or tiled else seen.round()
    seen = ((seen - seen.mean()) / seen.std(correction=0)).float()
    if tiled:
        from monai.inferers import sliding_window_inference

        overlap = model.config.data.tile_overlap
        windows = {"overlap": overlap, "mode": "gaussian"}
        with torch.no_grad():
            logits = sliding_window_inference(
                seen, (SIZE, SIZE), 4, model.network.eval(), **windows
            )
    else:
        with torch.no_grad():
            logits = model.network.eval()(seen)
    found = torch.nn.functional.interpolate(
        logits.double().sigmoid(), pixels.shape, mode="bilinear", antialias=True
    )
    return found[0].numpy(), masks, spacing


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETS)
def test_metrics_at_original_size_equal_an_independent_computation(kind, tiny, tmp_path, polyseg):
    write, overrides = SETS[kind]
    write(tmp_path / "set")
    run = run_of(tiny("run", f"data.path={tmp_path / 'set'}", "loss.name=dice", *overrides)).path
    model = open_model(run, "cpu", trust=False)
    out = tmp_path / "all"
    answer = polyseg("evaluate", run, "--split", "all", "--no-figures", "--out", out)
    assert answer.code == 0, answer.err
    own, rows = (
        list(csv.DictReader((place / "per_image.csv").open()))
        for place in (run / "evaluation", out)
    )
    assert {row["at"] for row in rows} == {"original"}
    dice = {(row["id"], row.get("label")): float(row["dice"]) for row in rows}
    for row in own:
        # Passes in other batch sizes round differently.
        assert float(row["dice"]) == pytest.approx(dice[row["id"], row.get("label")], abs=1e-3)
    for row in rows:
        labels = ["left", "right"] if kind == "labelled" else [""]
        k = labels.index(row.get("label", ""))
        probability, masks, spacing = by_hand(
            model, tmp_path / "set", row["id"], [1, 2] if kind == "labelled" else [None]
        )
        predicted, truth = probability[k] >= 0.5, masks[k]
        assert int(row["mask_pixels"]) == truth.sum()
        expected = {
            "dice": f1_score(truth.ravel(), predicted.ravel(), zero_division=1),
            "brier": brier_score_loss(truth.ravel(), probability[k].ravel()),
        }
        if predicted.any() and truth.any():
            expected |= brute_force(predicted, truth, spacing, 2.0)
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(value, abs=1e-5), (row["id"], name)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["at"], summary["part"]) == ("original", "all")
    if kind == "anisotropic":
        assert summary["unit"] == "mm"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_mean_over_passes_and_threshold_apply_at_original_size(tiny, tmp_path, polyseg):
    write_pictures(tmp_path / "set")
    run = run_of(tiny("run", f"data.path={tmp_path / 'set'}", "loss.name=dice")).path
    asked = ("--threshold", "val", "--uncertainty", "--samples", "3", "--corrupt", "noise")
    found = {}
    for at in ("original", "network"):
        out = tmp_path / at
        answer = polyseg("evaluate", run, "--at", at, *asked, "--out", out)
        assert answer.code == 0, answer.err
        found[at] = list(csv.DictReader((out / "per_image.csv").open()))
        assert (out / "predictions_worst.png").is_file()
        text = (out / "table.md").read_text()
        assert ("own size" in text) == (at == "original") and "Masks are compared at" in text
    images = load_images(open_model(run, "cpu", trust=False).config.data)
    for row in found["original"]:
        assert int(row["mask_pixels"]) == (images.original(row["id"])[1] > 0).sum()
    for row in found["network"]:
        assert int(row["mask_pixels"]) == (images.masks(row["id"]) > 0).sum()
    assert {row["prediction"] for row in found["original"]} == {"plain", "mc_mean"}


def test_metrics_at_network_size_equal_those_of_version_0_1(tmp_path, polyseg):
    run = shutil.copytree(HELD, tmp_path / "run_of_0_1")
    out = tmp_path / "out"
    answer = polyseg("evaluate", run, "--at", "network", "--no-figures", "--out", out)
    assert answer.code == 0, answer.err
    before, after = (
        list(csv.DictReader((place / "per_image.csv").open()))
        for place in (HELD / "evaluation", out)
    )
    keys = list(METRICS)
    assert len(before) == len(after) > 0
    for old, new in zip(before, after, strict=True):
        assert [new[key] for key in ("id", "mask_pixels")] == [old["id"], old["mask_pixels"]]
        for key in keys:
            assert new[key] == old[key] or float(new[key]) == pytest.approx(float(old[key]), 1e-5)


def test_metrics_of_different_sizes_are_not_compared():
    image = ImageScores("a", dict.fromkeys(METRICS, 0.5), 4, 4)
    runs = [RunScores(at, [image], at=at) for at in ("original", "network")]
    said = "original .* network|network .* original"
    with pytest.raises(PolysegError, match=said):
        pool("arm", runs)
    with pytest.raises(PolysegError, match=said):
        compare(runs, "original")
    files = [EvaluationFiles(at, summary={"at": at, "runs": []}) for at in ("original", "network")]
    with pytest.raises(PolysegError, match="report: network has metrics at the network's size"):
        refuse_other_sizes(files)
    old = EvaluationFiles("old", summary={"runs": []})
    refuse_other_sizes([old, files[1]])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_report_of_runs_tested_at_different_sizes_is_refused(tiny, tmp_path, polyseg):
    old = shutil.copytree(HELD, tmp_path / "old")
    new = run_of(tiny("new", "loss.name=dice")).path
    answer = polyseg("report", old, new, "--out", tmp_path / "report.html")
    assert answer.code == 2 and "error: report: old has metrics at the network's size" in answer.err
    assert not (tmp_path / "report.html").exists()
    again = ("evaluate", old, "--no-figures", "--out", old / "evaluation", "--overwrite")
    assert polyseg(*again).code == 0
    assert polyseg("report", old, new, "--out", tmp_path / "report.html").code == 0


@pytest.mark.usefixtures("quick_figures")
def test_training_without_a_test_set_reports_validation_metrics(tiny, tmp_path, polyseg):
    for part, numbers in (("train", range(8)), ("val", range(8, 12))):
        for kind in ("images", "masks"):
            (tmp_path / "set" / part / kind).mkdir(parents=True)
        for i in numbers:
            for kind, values in zip(("images", "masks"), disc(i, 60, 84), strict=True):
                written = 255 * values if kind == "masks" else values
                Image.fromarray(written).save(tmp_path / "set" / part / kind / f"{i}.png")
    settings = ["--set", "data.size=32", "--set", "output.figures=false", "--epochs", "1"]
    small = "network.kwargs={channels: [4, 8], strides: [2], num_res_units: 1}"
    run = tmp_path / "run"
    answer = polyseg(
        *("train", "--data", tmp_path / "set", "--out", run, "--set", small, "--loss", "dice"),
        *settings,
    )
    assert answer.code == 0, answer.err
    assert "there is no test set" in " ".join(answer.err.split())
    assert "Validation metrics" in answer.out and "Test metrics" not in answer.out
    summary = json.loads((run / "evaluation/summary.json").read_text())
    assert summary["part"] == "val" and summary["runs"][0]["counts"]["images"] == 4
    refused = polyseg("evaluate", run)
    assert refused.code == 2 and "has no test images; choose another" in refused.err
    asked = ("evaluate", run, "--split", "val", "--no-figures", "--out", tmp_path / "val")
    assert polyseg(*asked).code == 0
    again = json.loads((tmp_path / "val/summary.json").read_text())
    assert again["part"] == "val" and again["runs"][0]["metrics"] == summary["runs"][0]["metrics"]
    page = tmp_path / "report.html"
    assert polyseg("report", run, "--out", page).code == 0
    assert "Validation metrics" in page.read_text() and "Test metrics" not in page.read_text()

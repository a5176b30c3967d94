"""`polyseg evaluate --predictions`: masks written by other tools."""

import csv
import json
import shutil

import nibabel
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score

from tests.test_evaluation_sizes import SETS
from tests.test_train import run_of

BY_MASKS = (
    "dice",
    "iou",
    "sensitivity",
    "specificity",
    "precision",
    "accuracy",
    "hd95",
    "asd",
    "nsd",
)
PARTS = ("images", "masks")
BY_PROBABILITIES = ("auc", "average_precision", "brier", "nll", "ece", "ace")


def rows_of(folder):
    return list(csv.DictReader((folder / "per_image.csv").open()))


@pytest.fixture
def exported(tiny, tmp_path, polyseg):
    """Return a function that trains on a set, exports masks of its images, and scores the run."""

    def make(kind):
        write, overrides = SETS[kind]
        data, masks, own = (tmp_path / name for name in ("set", "masks", "own"))
        write(data)
        run = run_of(tiny("run", f"data.path={data}", "loss.name=dice", *overrides)).path
        assert polyseg("predict", run, data / "images", "--out", masks).code == 0
        asked = ("evaluate", run, "--split", "all", "--no-figures", "--out", own)
        assert polyseg(*asked).code == 0
        sets = [word for one in overrides if "foreground" in one for word in ("--set", one)]
        return data, masks, rows_of(own), sets, run

    return make


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("kind", ["non-square", "rotated", "tiled", "anisotropic"])
def test_exported_masks_have_exactly_the_metrics_of_the_run(kind, exported, tmp_path, polyseg):
    data, masks, own, sets, _ = exported(kind)
    out = tmp_path / "out"
    answer = polyseg("evaluate", "--predictions", masks, "--data", data, *sets, "--out", out)
    assert answer.code == 0, answer.err
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [row["id"] for row in own] and len(rows) >= 10
    for mine, row in zip(own, rows, strict=True):
        for key in (*BY_MASKS, "mask_pixels", "predicted_pixels"):
            assert row[key] == mine[key], (row["id"], key)
        assert not any(row[key] for key in BY_PROBABILITIES)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["runs"][0]["name"] == "masks" and summary["at"] == "original"
    assert (summary["by"] == "patient") == (kind == "anisotropic")
    assert any(one["by"] == "size" for one in summary["runs"][0]["strata"])
    assert (out / "comparison.png").is_file() and (out / "predictions_worst.png").is_file()


@pytest.mark.slow
def test_labels_are_read_from_label_maps_and_separate_folders(exported, tmp_path, polyseg):
    data, masks, _, sets, _ = exported("labelled")
    for i in range(10):
        labels = np.asarray(Image.open(masks / f"{i}.png"))
        for value, name in ((1, "left"), (2, "right")):
            (tmp_path / "apart" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 * (labels == value).astype(np.uint8)).save(
                tmp_path / "apart" / name / f"{i}.png"
            )
    found = {}
    for folder in (masks, tmp_path / "apart"):
        out = tmp_path / f"of {folder.name}"
        answer = polyseg(
            *("evaluate", "--predictions", folder, "--data", data, *sets, "--out", out),
            *("--name", "other tool", "--no-figures"),
        )
        assert answer.code == 0, answer.err
        found[folder.name] = rows_of(out)
    assert found["masks"] == found["apart"]
    for row in found["masks"]:
        value = {"left": 1, "right": 2}[row["label"]]
        predicted, truth = (
            np.asarray(Image.open(folder / f"{row['id']}.png")) == value
            for folder in (masks, data / "masks")
        )
        dice = f1_score(truth.ravel(), predicted.ravel(), zero_division=1)
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_masks_can_be_compared_with_runs_and_reported(exported, tmp_path, polyseg):
    _, masks, _, _, run = exported("anisotropic")
    answer = polyseg(
        *("evaluate", run, "--predictions", masks, "--name", "nnunet", "--split", "all"),
        *("--baseline", "run", "--no-figures", "--out", tmp_path / "out"),
    )
    assert answer.code == 0, answer.err
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [one["name"] for one in summary["runs"]] == ["run", "nnunet"]
    dice = summary["comparisons"][0]["metrics"]["dice"]
    assert (dice["mean"], dice["p_value"], dice["equal"], dice["patients"]) == (0, 1, 10, 10)
    assert summary["comparisons"][0]["metrics"]["brier"]["images"] == 0
    page = tmp_path / "page.html"
    assert polyseg("report", run, "--evaluation", tmp_path / "out", "--out", page).code == 0
    assert "nnunet minus run" in page.read_text()


def test_missing_extra_and_wrong_size_masks_are_named(exported, tmp_path, polyseg):
    data, masks, *_ = exported("non-square")
    asked = ("evaluate", "--predictions", masks, "--data", data, "--no-figures")
    (masks / "3.png").rename(masks / "other.png")
    answer = polyseg(*asked, "--out", tmp_path / "a")
    assert answer.code == 2 and "has no mask for 1 image (3); name each" in answer.err
    assert "such as 3.png (not as other.png)" in answer.err
    assert not (tmp_path / "a").exists()
    shutil.copy(masks / "other.png", masks / "3.png")
    answer = polyseg(*asked, "--out", tmp_path / "b")
    assert answer.code == 0 and "left out 1 file (other.png)" in answer.err
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(masks / "3.png")
    answer = polyseg(*asked, "--out", tmp_path / "c")
    assert answer.code == 2 and "masks must have the size of the images" in answer.err
    shutil.copy(masks / "4.png", masks / "3.bmp")
    answer = polyseg(*asked, "--out", tmp_path / "d")
    assert answer.code == 2 and "are masks of 3" in answer.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--predictions", "gone"], "--predictions needs runs, or --data"),
        (
            ["--predictions", "gone", "--data", "demo"],
            "--predictions gone: there is no such folder",
        ),
        (["--predictions", "gone", "--data", "demo", "--at", "network"], "--at network: masks"),
        (["--name", "a"], "Missing argument: give runs, or --predictions with --data"),
    ],
)
def test_options_that_need_networks_are_refused_for_masks(
    polyseg, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    answer = polyseg("evaluate", *arguments)
    assert answer.code == 2 and answer.err.strip().splitlines()[-1].startswith(f"error: {said}")


@pytest.mark.slow
def test_volumes_of_masks_are_read_slice_by_slice(exported, tmp_path, polyseg):
    data, masks, own, _, _ = exported("anisotropic")
    first = nibabel.load(masks / "0.nii.gz")
    turned = np.asarray(first.dataobj)[:, :, ::-1]
    nibabel.save(nibabel.Nifti1Image(turned, first.affine), masks / "0.nii.gz")
    out = tmp_path / "out"
    asked = ("evaluate", "--predictions", masks, "--data", data, "--no-figures", "--out", out)
    assert polyseg(*asked).code == 0
    pixels = {row["id"]: row["predicted_pixels"] for row in rows_of(out)}
    before = {row["id"]: row["predicted_pixels"] for row in own}
    assert [pixels[f"0#00{k}"] for k in (0, 1)] == [before[f"0#00{k}"] for k in (1, 0)]


@pytest.fixture
def with_metadata():
    """Enable MONAI's metadata tracking, which polyseg disables for its own networks."""
    from monai.data import get_track_meta, set_track_meta

    before = get_track_meta()
    set_track_meta(True)
    yield
    set_track_meta(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "extension", "flat"),
    [
        ("non-square", ".png", False),
        ("non-square", ".nii.gz", False),
        ("non-square", ".nii.gz", True),
        ("anisotropic", ".nii.gz", False),
        ("anisotropic", ".nii.gz", True),
    ],
)
def test_masks_written_by_monai_are_scored(kind, extension, flat, tmp_path, polyseg, with_metadata):
    """MONAI names its files ID/ID_trans by default, or ID_seg."""
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import EnsureChannelFirst, LoadImage, SaveImage

    SETS[kind][0](tmp_path / "set")
    names = {"output_postfix": "seg", "separate_folder": False} if flat else {}
    save = SaveImage(tmp_path / "monai", output_ext=extension, print_log=False, **names)
    load, pixels = LoadImage(image_only=True), EnsureChannelFirst()
    for path in sorted((tmp_path / "set/images").iterdir()):
        image = pixels(load(path))
        patch = (32,) * (image.ndim - 1)
        inferer, level = SlidingWindowInferer(patch, overlap=0.25), float(image.mean())
        save(inferer(image[None], lambda one, level=level: (one > level).float())[0])
    out = tmp_path / "out"
    asked = ("--predictions", tmp_path / "monai", "--data", tmp_path / "set")
    answer = polyseg("evaluate", *asked, "--no-figures", "--out", out)
    assert answer.code == 0, answer.err
    assert f"the files named {'ID_seg' if flat else 'ID/ID_trans'}" in answer.err
    assert "left out" not in answer.err
    dice = {row["id"]: float(row["dice"]) for row in rows_of(out)}
    for path in sorted((tmp_path / "set/images").iterdir()):
        image, truth = (arrays_of(path.parents[1] / part / path.name) for part in PARTS)
        case = path.name.split(".")[0]
        keys = [case] if image.ndim == 2 else [f"{case}#00{k}" for k in range(image.shape[2])]
        predicted = (image > image.mean()).reshape(-1, len(keys))
        for key, one, mask in zip(keys, predicted.T, truth.reshape(-1, len(keys)).T, strict=True):
            assert dice[key] == pytest.approx(f1_score(mask > 0, one, zero_division=1), abs=1e-6)


def arrays_of(path):
    return np.asarray(Image.open(path) if path.suffix == ".png" else nibabel.load(path).dataobj)


def masks_named(folder, *patterns, cases=("1", "11", "12")):
    for case in cases:
        for kind in ("images", "masks"):
            (folder / "set" / kind).mkdir(parents=True, exist_ok=True)
            mask = np.pad(np.full((9, 7), 255, np.uint8), 4)
            Image.fromarray(mask).save(folder / "set" / kind / f"{case}.png")
        for pattern in patterns:
            path = folder / "tool" / f"{pattern.replace('ID', case)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    tool, data = folder / "tool", folder / "set"
    return ("evaluate", "--predictions", tool, "--data", data, "--no-figures")


@pytest.mark.parametrize("pattern", ["ID_pred", "seg-ID", "ID/mask", "out/ID", "ID/ID_0000"])
def test_common_pattern_of_mask_names_is_found(pattern, tmp_path, polyseg):
    answer = polyseg(*masks_named(tmp_path, pattern), "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert f"the files named {pattern}" in " ".join(answer.err.split())
    assert [float(row["dice"]) for row in rows_of(tmp_path / "out")] == [1, 1, 1]


def test_several_masks_for_an_image_need_one_with_its_exact_name(tmp_path, polyseg):
    asked = masks_named(tmp_path, "ID_a", "ID/b")
    answer = polyseg(*asked, "--out", tmp_path / "out")
    assert answer.code == 2
    assert "holds several masks for each image (ID/b, ID_a); give a folder" in answer.err
    masks_named(tmp_path, "ID")
    answer = polyseg(*asked, "--out", tmp_path / "out")
    assert answer.code == 0 and "6 files" in answer.err


def test_pattern_that_misses_an_image_is_an_error(tmp_path, polyseg):
    asked = masks_named(tmp_path, "ID_seg")
    (tmp_path / "tool/11_seg.png").unlink()
    answer = polyseg(*asked, "--out", tmp_path / "out")
    assert answer.code == 2 and "has no mask for 3 images (1, 11, 12)" in answer.err

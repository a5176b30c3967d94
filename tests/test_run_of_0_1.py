"""A run of version 0.1, which every later version can resume, evaluate, replay and report.

`run_of_0_1` was made by `polyseg train --set data.demo_images=12 --set data.size=32
--set "network.kwargs={channels: [4, 8], strides: [2], num_res_units: 1}"
--set training.batch_size=4 --epochs 4 --set uncertainty.samples=4 --set control.start=1
--set control.every=2 --set output.figures=false --set output.overlays=0`, on one thread. It must
not be regenerated. Other processors and versions of torch round differently, hence the tolerances.
"""

import csv
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

HELD = Path(__file__).parent / "run_of_0_1"


@pytest.fixture
def run(tmp_path):
    """Return a copy of the run, because commands may write to it."""
    return shutil.copytree(HELD, tmp_path / "run_of_0_1")


def epsilons(schedule):
    with h5py.File(schedule) as file:
        return file["epsilon"][:]


def test_run_of_0_1_can_be_resumed(polyseg, run):
    answer = polyseg("train", "--resume", "--accept-changes", "--out", run, "--epochs", "6")
    assert answer.code == 0, answer.err
    before, after = (list(csv.DictReader((place / "history.csv").open())) for place in (HELD, run))
    assert len(after) == 6
    for old, new in zip(before, after, strict=False):
        assert {name: new[name] for name in old} == old
    # A column that version 0.1 did not have.
    constant = [float(row["train_loss_constant"]) for row in after]
    assert np.isnan(constant[:4]).all() and np.isfinite(constant[4:]).all()
    np.testing.assert_array_equal(epsilons(run / "schedule.h5")[:4], epsilons(HELD / "schedule.h5"))
    assert sorted(path.name for path in (run / "uncertainty").iterdir()) == [
        "epoch_0001.h5",
        "epoch_0003.h5",
        "epoch_0005.h5",
    ]


def test_run_of_0_1_can_be_evaluated(polyseg, run, tmp_path):
    answer = polyseg("evaluate", run, "--no-figures", "--out", tmp_path / "evaluation")
    assert answer.code == 0, answer.err
    before, after = (
        list(csv.DictReader((place / "per_image.csv").open()))
        for place in (HELD / "evaluation", tmp_path / "evaluation")
    )
    assert [row["id"] for row in before] == [row["id"] for row in after]
    for old, new in zip(before, after, strict=True):
        assert float(new["dice"]) == pytest.approx(float(old["dice"]), abs=0.02)


def test_uncertainty_of_0_1_can_be_measured_again(polyseg, run, tmp_path):
    third = run / "checkpoints" / "previous.safetensors"
    answer = polyseg(
        *("estimate-uncertainty", third, "--split", "train", "--samples", "4"),
        *("--out", tmp_path / "again"),
    )
    assert answer.code == 0, answer.err
    again, then = (
        dict(zip(file["id"].asstr()[:], file["difficulty"][:], strict=True))
        for file in (
            h5py.File(next((tmp_path / "again").glob("*.h5"))),
            h5py.File(HELD / "uncertainty" / "epoch_0003.h5"),
        )
    )
    assert again == pytest.approx(then, rel=1e-3)


@pytest.mark.slow
def test_run_of_0_1_can_be_replayed(polyseg, run, tmp_path):
    answer = polyseg("train", "--replay", run, "--out", tmp_path / "replayed")
    assert answer.code == 0, answer.err
    np.testing.assert_array_equal(
        epsilons(tmp_path / "replayed" / "schedule.h5"), epsilons(HELD / "schedule.h5")
    )


def test_schedule_of_0_1_can_be_recomputed(polyseg, run):
    answer = polyseg("schedule", "recompute", run, "--json")
    assert answer.code == 0, answer.err
    rows = json.loads(answer.out)
    assert [(row["from_epoch"], row["to_epoch"]) for row in rows] == [(1, 1), (2, 3), (4, 4)]
    assert max(row["largest_change"] for row in rows) < 1e-6


def test_schedule_of_0_1_can_be_shown(polyseg, run):
    answer = polyseg("schedule", "show", run, "--image", "phantom_0007", "--json")
    assert answer.code == 0, answer.err
    assert len(json.loads(answer.out)) == 2


def test_missing_statistics_of_0_1_are_reported(polyseg, run):
    asked = ("schedule", "show", run, "--image", "phantom_0007")
    assert "not recorded from epoch 2 to 4" in " ".join(polyseg(*asked).out.split())
    rows = json.loads(polyseg(*asked, "--json").out)
    assert [row["sigma"] for row in rows] == [row["normalised"] for row in rows] == [None, None]
    polyseg("train", "--resume", "--accept-changes", "--out", run, "--epochs", "6")
    rows = json.loads(polyseg(*asked, "--json").out)
    known = {row["from_epoch"]: row["sigma"] is not None for row in rows}
    assert known == {2: False, 4: False, 5: True, 6: True}
    with h5py.File(run / "schedule.h5") as file:
        assert (file["group"][:4] == -1).all() and (file["group"][4:] >= 0).all()
        assert file.attrs["schema"] == 3


def test_validity_of_0_1_can_be_computed(polyseg, run):
    answer = polyseg("schedule", "validity", run, "--json")
    assert answer.code == 0, answer.err
    rows = {(row["epoch"], row["score"]): row for row in json.loads(answer.out)}
    assert rows[3, "mutual_information"]["with_error"] == pytest.approx(-0.8333, abs=1e-3)
    assert rows[3, "entropy"]["with_error"] == pytest.approx(0.6905, abs=1e-3)


def test_run_of_0_1_can_predict(polyseg, run, tmp_path):
    polyseg("data", "demo", tmp_path / "images", "--images", "8", "--size", "32")
    images = tmp_path / "images" / "images"
    answer = polyseg("predict", run, images, "--out", tmp_path / "masks")
    assert answer.code == 0, answer.err
    assert len(list((tmp_path / "masks").rglob("*.png"))) >= 8


def test_run_of_0_1_can_be_reported(polyseg, run, tmp_path):
    answer = polyseg("report", run, "--out", tmp_path / "report.html")
    assert answer.code == 0, answer.err
    assert "run_of_0_1" in (tmp_path / "report.html").read_text()

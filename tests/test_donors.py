"""Correlation of D with the errors of donor networks that were not trained on the image."""

import csv
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import stats

from polyseg.commands.train import train
from polyseg.config import load_config

from . import forks
from .conftest import TINY
from .test_schedule import partial_by_regression, two_labels
from .test_sweeps import EXAMPLES

SETTINGS = (*TINY, "data.demo_images=32", "training.epochs=2", "output.figures=false")
GROUPS = r"data.group=\d(\d)$"
"""Pattern that groups images by the last digit of their ids."""


def make_run(place, *overrides):
    train(load_config(overrides=[*SETTINGS, f"output.path={place}", *overrides]))
    return place


def make_donors(run, out, *overrides):
    """Train the donors of examples/donors.sh in this process."""
    arguments = sys.argv
    sys.argv = ["donor_splits.py", str(run), str(out)]
    try:
        runpy.run_path(str(EXAMPLES / "donor_splits.py"))
    finally:
        sys.argv = arguments
    for name in ("donor-a", "donor-b"):
        split = f"data.split_file={out / name}.json"
        make_run(out / name, *overrides, split, "control.enabled=false")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder that holds a run and its two donors."""
    folder = tmp_path_factory.mktemp("donors")
    make_donors(make_run(folder / "run", GROUPS), folder, GROUPS)
    return folder


def parts_of(run):
    split = json.loads((run / "split.json").read_text())
    return {part: {row["id"] for row in rows} for part, rows in split.items()}


def dice_of(run):
    with (run / "evaluation" / "per_image.csv").open() as file:
        return {
            (row["id"], row.get("label", "")): float(row["dice"]) for row in csv.DictReader(file)
        }


def unseen_error(folder, identity, label=""):
    """Return the error of the donor whose training part lacks an image."""
    (donor,) = (
        folder / name
        for name in ("donor-a", "donor-b")
        if identity not in parts_of(folder / name)["train"]
    )
    return 1 - dice_of(donor)[identity, label]


@pytest.mark.slow
def test_each_donor_trains_on_one_half_and_is_tested_on_the_other(runs):
    own, a, b = (parts_of(runs / name) for name in ("run", "donor-a", "donor-b"))
    assert a["train"] | b["train"] == own["train"] and not a["train"] & b["train"]
    assert a["test"] == b["train"] and b["test"] == a["train"]
    assert a["val"] == b["val"] == own["val"]
    assert not {one[-1] for one in a["train"]} & {one[-1] for one in b["train"]}  # groups


def test_correlations_with_unseen_errors_equal_scipy(runs, polyseg):
    donors = ("--donors", runs / "donor-a", runs / "donor-b")
    answer = polyseg("schedule", "validity", runs / "run", *donors, "--json")
    assert answer.code == 0, answer.err
    rows = [row for row in json.loads(answer.out) if row["score"] == "mutual_information"]
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        with h5py.File(runs / f"run/uncertainty/epoch_{row['epoch']:04d}.h5") as file:
            ids, d = file["id"].asstr()[:], file["difficulty"][:]
            size = file["mask_pixels"][:]
        error = np.array([unseen_error(runs, identity) for identity in ids])
        r, n = stats.spearmanr(d, error).statistic, len(ids)
        half = stats.norm.ppf(0.975) * math.sqrt((1 + r**2 / 2) / (n - 3))
        assert row["with_unseen_error"] == pytest.approx(r)
        z = math.atanh(r)
        assert row["with_unseen_error_low"] == pytest.approx(math.tanh(z - half))
        assert row["with_unseen_error_high"] == pytest.approx(math.tanh(z + half))
        partial = partial_by_regression(d, error, size)
        assert row["with_unseen_error_given_size"] == pytest.approx(partial)
        assert row["with_error"] != row["with_unseen_error"]


def test_terminal_shows_the_interval_of_the_last_assessment(runs, polyseg, tmp_path):
    donors = ("--donors", runs / "donor-b", runs / "donor-a")
    answer = polyseg("schedule", "validity", runs / "run", *donors, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    shown = " ".join(answer.out.split())
    error = "1 - Dice of the run that was not trained on the image"
    assert f"after epoch 2; {error}; interval over the images" in shown
    rows = json.loads(polyseg("schedule", "validity", runs / "run", *donors, "--json").out)
    low, high = (rows[-1][f"with_unseen_error_{end}"] for end in ("low", "high"))
    assert f"{low:.2f} to {high:.2f}" in shown


def test_without_donors_no_column_is_added(runs, polyseg):
    rows = json.loads(polyseg("schedule", "validity", runs / "run", "--json").out)
    assert not any("unseen" in key for key in rows[0])


def test_each_label_has_its_own_errors(tmp_path, polyseg):
    path = f"data.path={two_labels(tmp_path / 'images')}"
    settings = (path, "data.foreground={bright: 1, dark: 2}", "training.epochs=1")
    run = make_run(tmp_path / "run", *settings)
    make_donors(run, tmp_path, *settings)
    noise, expected = np.random.default_rng(0), {}
    for donor in (tmp_path / "donor-a", tmp_path / "donor-b"):
        table = donor / "evaluation" / "per_image.csv"
        dices = {place: noise.random() for place in dice_of(donor)}
        rows = [f"{identity},{label},{dice}" for (identity, label), dice in dices.items()]
        table.write_text("\n".join(["id,label,dice", *rows]) + "\n")
        expected |= {place: 1 - dice for place, dice in dices.items()}
    donors = ("--donors", tmp_path / "donor-a", tmp_path / "donor-b")
    rows = json.loads(polyseg("schedule", "validity", run, *donors, "--json").out)
    with h5py.File(run / "uncertainty/epoch_0001.h5") as file:
        labels, ids = file["label"].asstr()[:], file["id"].asstr()[:]
        d = file["scores/entropy"][:]
    for label in ("bright", "dark"):
        (row,) = (one for one in rows if (one["label"], one["score"]) == (label, "entropy"))
        own = labels == label
        error = [expected[identity, label] for identity in ids[own]]
        assert row["with_unseen_error"] == pytest.approx(stats.spearmanr(d[own], error).statistic)


@pytest.mark.slow
def test_script_makes_donors_and_shows_the_correlation(runs, tmp_path):
    program = tmp_path / "programs" / "polyseg"
    program.parent.mkdir()
    # The script uses the Python of the tests.
    path = f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with forks.program() as text:
        program.write_text(text)
        program.chmod(0o755)
        done = subprocess.run(
            [
                "bash",
                EXAMPLES / "donors.sh",
                runs / "run",
                tmp_path / "out",
                "control.enabled=false",
            ],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
    assert "1 - Dice of the run that was not trained" in " ".join(done.stdout.split())
    for name in ("donor-a", "donor-b"):
        assert parts_of(tmp_path / "out" / name) == parts_of(runs / name)
        assert dice_of(tmp_path / "out" / name) == dice_of(runs / name)


class TestRefusals:
    def refused(self, polyseg, run, *donors):
        answer = polyseg("schedule", "validity", run, "--donors", *donors, "--json")
        assert answer.code == 2 and answer.err.count("\n") == 1 and not answer.out
        return answer.err

    def test_images_in_training_of_both_donors_are_refused(self, runs, polyseg):
        a, train_part = runs / "donor-a", parts_of(runs / "donor-a")["train"]
        total = len(parts_of(runs / "run")["train"])
        error = self.refused(polyseg, runs / "run", a, runs / "run")
        assert f"both donors saw {len(train_part)} of {total} training images" in error
        assert "examples/donors.sh" in error

    def test_images_in_training_of_neither_donor_are_refused(self, runs, polyseg, tmp_path):
        copy, seen = tmp_path / "again", len(parts_of(runs / "donor-a")["train"])
        shutil.copytree(runs / "donor-a", copy)
        total = len(parts_of(runs / "run")["train"])
        error = self.refused(polyseg, runs / "run", runs / "donor-a", copy)
        assert f"both donors saw {seen} of {total}" in error
        # This run trains on the half on which neither donor was trained.
        record = make_run(tmp_path / "half", GROUPS, f"data.split_file={runs / 'donor-b.json'}")
        error = self.refused(polyseg, record, runs / "donor-a", copy)
        assert f"neither donor saw {total - seen} of {total - seen}" in error

    def test_folder_without_a_run_is_refused(self, runs, polyseg, tmp_path):
        error = self.refused(polyseg, runs / "run", runs / "donor-a", tmp_path)
        assert f"--donors: {tmp_path} is not a run" in error

    def test_donor_without_test_results_is_refused(self, runs, polyseg, tmp_path):
        copy = tmp_path / "untested"
        shutil.copytree(runs / "donor-b", copy)
        table = copy / "evaluation" / "per_image.csv"
        head, first, *rest = table.read_text().splitlines()
        table.write_text("\n".join([head, *rest]) + "\n")
        error = self.refused(polyseg, runs / "run", runs / "donor-a", copy)
        tested = dict(zip(head.split(","), first.split(","), strict=True))
        assert f"{copy} was not tested on {tested['id']}" in error
        table.write_text("something\nelse\n")
        assert "not a table" in self.refused(polyseg, runs / "run", runs / "donor-a", copy)
        table.unlink()
        error = self.refused(polyseg, runs / "run", runs / "donor-a", copy)
        assert "per_image.csv cannot be read: No such file" in error

    def test_different_images_with_equal_ids_are_refused(self, runs, polyseg, tmp_path):
        other = make_run(
            tmp_path / "other", "data.demo_modality=endoscopy", "control.enabled=false"
        )
        error = self.refused(polyseg, runs / "run", runs / "donor-a", other)
        assert "is another image in" in error

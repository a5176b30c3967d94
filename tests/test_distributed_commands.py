"""Estimates, evaluations and predictions by two processes equal those of one process."""

import csv
import json
import math
import sys

import nibabel
import numpy as np
import pytest
from PIL import Image

from polyseg.commands.predict import _predict_share
from polyseg.config import load_config
from polyseg.data.dataset import make_demo
from polyseg.data.layouts.unlabelled import find_unlabelled
from polyseg.data.phantoms.phantom_sets import make_phantoms
from polyseg.errors import PolysegError
from polyseg.evaluation import testing_networks as testing_module
from polyseg.evaluation.testing_networks import EvaluationSettings
from polyseg.montecarlo import choose_samples
from polyseg.records import no_progress
from polyseg.runs.record_files import read_assessment
from polyseg.runs.trained_model import Inputs, images_for, open_model
from polyseg.system.process_group import ALONE, Processes
from tests import together
from tests.conftest import TINY
from tests.test_train import run_of

SETTINGS = (*TINY, "output.figures=false", "loss.name=dice", "training.learning_rate=0.02")
IMAGES = 17
"""Number of images, which two processes cannot divide evenly."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a run with a fixed number of passes and one with an automatic number."""
    folder = tmp_path_factory.mktemp("runs")
    settings = (*SETTINGS, f"data.demo_images={IMAGES}", "training.epochs=1")
    return [
        run_of(
            load_config(
                overrides=[*settings, f"uncertainty.samples={n}", f"output.path={folder}/s{n}"]
            )
        ).path
        for n in (3, "auto")
    ]


@pytest.fixture
def in_two(tmp_path):
    """Return a function that runs a command in two processes and returns exit code and output."""

    def run(*arguments, **environment):
        log = tmp_path / "log"
        code = together.end(together.begin(2, *arguments, log=log, environment=environment))
        return code, log.read_text()

    return run


def assert_equal_to_rounding(one, other, where=""):
    """Check that texts are equal and numbers agree up to rounding."""
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key, value in one.items():
            assert_equal_to_rounding(value, other[key], f"{where} {key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal_to_rounding(*pair, f"{where} {i}")
    elif isinstance(one, str | bool | None):
        assert one == other, where
    else:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8, err_msg=where)


def rows_of(path):
    """Return the rows of a table with numbers converted."""

    def value(text):
        try:
            return float(text)
        except ValueError:
            return text

    with path.open() as stream:
        return [[value(text) for text in row] for row in csv.reader(stream)]


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_same_results(one, other):
    """Check that two folders have the same files with equal tables and records."""
    assert files_of(one) == files_of(other)
    for name in files_of(one):
        pair = one / name, other / name
        if name.endswith(".csv"):
            assert_equal_to_rounding(*map(rows_of, pair), name)
        elif name.endswith(".json"):
            assert_equal_to_rounding(*(json.loads(path.read_text()) for path in pair), name)
        elif name.endswith(".h5"):
            found = [vars(read_assessment(path, with_maps=True)) for path in pair]
            assert_equal_to_rounding(*found, name)


def entries_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "log")


@pytest.mark.slow
def test_two_processes_estimate_like_one(runs, polyseg, in_two, tmp_path):
    command = ("estimate-uncertainty", runs[1], "--maps", "--quiet", "--json", "--out")
    assert polyseg(*command, tmp_path / "one").code == 0
    code, said = in_two(*command, tmp_path / "two")
    assert code == 0, said
    assert_same_results(tmp_path / "one", tmp_path / "two")
    assert read_assessment(tmp_path / "two/assessment.h5").samples >= choose_samples.FEWEST
    assert said.count('"folder"') == 1
    assert entries_of(tmp_path) == ["one", "two"]


@pytest.mark.slow
def test_two_processes_evaluate_like_one(runs, polyseg, in_two, tmp_path):
    command = (
        *("evaluate", *runs, "--baseline", "s3", "--split", "all", "--threshold", "val"),
        *("--uncertainty", "--corrupt", "noise", "--quiet", "--json", "--out"),
    )
    assert polyseg(*command, tmp_path / "one").code == 0
    code, said = in_two(*command, tmp_path / "two")
    assert code == 0, said
    assert_same_results(tmp_path / "one", tmp_path / "two")
    record = json.loads((tmp_path / "two/summary.json").read_text())
    assert len(record["runs"]) == 4 and record["comparisons"] and record["robustness"]
    # Every image has a mask to draw, whichever process predicted it.
    for name in ("predictions_worst.png", "predictions_best.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert said.count('"folder"') == 1
    assert entries_of(tmp_path) == ["one", "two"]


def write_images(folder):
    """Write five pictures, two volumes, and unreadable files of both kinds."""
    folder.mkdir()
    phantoms = make_phantoms(7, seed=5, size=(40, 48))
    for i, phantom in enumerate(phantoms[:5]):
        Image.fromarray(phantom.image).save(folder / f"case{i}.png")
    volume = np.stack([phantom.image for phantom in phantoms[5:]]).astype(np.int16)
    for i in (5, 6):
        nibabel.save(
            nibabel.Nifti1Image(volume.T, np.diag([1, 1, i, 1.0])), folder / f"v{i}.nii.gz"
        )
    for name in ("case1a.png", "case2a.png", "v5a.nii.gz"):
        (folder / name).write_text("none")
    return folder


@pytest.mark.slow
def test_two_processes_predict_like_one(runs, polyseg, in_two, tmp_path):
    """Unreadable files are named once, in the order of the files."""
    command = (
        *("predict", runs[0], write_images(tmp_path / "in"), "--uncertainty", "--samples", 4),
        *("--quiet", "--out"),
    )
    one = polyseg(*command, tmp_path / "one")
    code, said = in_two(*command, tmp_path / "two")
    assert one.code == 2 and code != 0
    told = one.err.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert "7 of 10 images" in told and len(told.splitlines()) == 4 and told in said
    assert "process 1: " not in said
    assert_same_results(tmp_path / "one", tmp_path / "two")
    masks = [name for name in files_of(tmp_path / "one") if not name.endswith(".csv")]
    assert len(masks) == 14
    for name in masks:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len({(tmp_path / "two" / name).read_bytes() for name in masks}) == 14
    assert entries_of(tmp_path) == ["in", "one", "two"]


FAILING = """
import os
import torch
from polyseg.errors import PolysegError

class Network(torch.nn.Conv2d):
    def forward(self, images):
        # Images of zeros are shown to it when it is built.
        if os.environ.get("RANK") == "1" and images.any():
            raise PolysegError("images: too much for this one; choose others")
        return super().forward(images)

def make(in_channels, out_channels):
    return Network(in_channels, out_channels, 3, padding=1)
"""


@pytest.mark.slow
def test_failure_of_one_process_ends_all_without_output(in_two, tmp_path, monkeypatch):
    (tmp_path / "failing_module.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    of_it = ("network.name=failing_module:make", "network.kwargs={}", f"output.path={tmp_path}/run")
    run = run_of(load_config(overrides=[*SETTINGS, "control.enabled=false", *of_it])).path
    sys.modules.pop("failing_module")
    before = entries_of(tmp_path)
    code, said = in_two(
        *("evaluate", run, "--trust", "--out", tmp_path / "out"), PYTHONPATH=str(tmp_path)
    )
    assert code != 0
    assert "process 1: error: images: too much for this one; choose others" in said
    assert "Dice" not in said
    assert entries_of(tmp_path) == before


# Without child processes.


class FakeProcesses(Processes):
    """One of several processes, with given values for the parts of the others."""

    others = ()

    def gathered(self, mine):
        return [*self.others[: self.rank], mine, *self.others[self.rank :]]


def fake_processes(rank, *others):
    one = FakeProcesses(rank, len(others) + 1)
    object.__setattr__(one, "others", others)
    return one


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_results_of_shares_are_joined_in_order(count):
    for total in range(9):
        shares = [Processes(rank, count).share(range(total)) for rank in range(count)]
        for rank, mine in enumerate(shares):
            one = fake_processes(rank, *shares[:rank], *shares[rank + 1 :])
            assert one.joined(mine) == list(range(total))


def test_error_in_one_process_ends_all():
    with fake_processes(1, True).failing_together():
        pass
    with (
        pytest.raises(PolysegError, match="another process"),
        fake_processes(0, False).failing_together(),
    ):
        pass
    for one in (fake_processes(0, True), fake_processes(0, False), ALONE):
        with pytest.raises(KeyError, match="mine"), one.failing_together():
            raise KeyError("mine")


def test_each_process_computes_only_its_share(runs, tmp_path):
    model = open_model(runs[0], "cpu", trust=False)
    images, ids = images_for(model, Inputs(), "all")
    several = [Processes(rank, 3) for rank in range(3)]
    settings = EvaluationSettings(uncertainty=True, samples=2)
    cases = find_unlabelled([write_images(tmp_path / "in")])
    for one in several:
        test = testing_module.ImageTest("", images, ids, 4, settings, processes=one)
        plain, passes = (
            testing_module._plain(model.network, test),
            testing_module._passes(model, test),
        )
        assert [found.id for found in plain] == one.share(ids)
        assert [found.id for found in passes] == one.share(ids)
        folder = tmp_path / f"of{one.rank}"
        found = list(_predict_share(model, cases, folder, folder, None, one, no_progress))
        assert len(found) == len(one.share(cases))
        whole = [case for case, told in zip(one.share(cases), found, strict=True) if told.files]
        assert len(files_of(folder)) == len(whole) > 0


def test_images_for_choosing_passes_are_read_by_all_processes(monkeypatch):
    images = make_demo(load_config(overrides=["data.demo_images=60", "data.size=16"]).data)
    monkeypatch.setattr(testing_module, "_PIXELS_AT_ONCE", 20 * 16 * 16)
    count, ids = 3, images.ids
    parts = [
        list(testing_module._parts(images, ids, 7, Processes(rank, count))) for rank in range(count)
    ]
    assert [one[0] for one in parts] == [ids[:7]] * count
    rest = [identity for one in parts for part in one[1:] for identity in part]
    assert sorted(rest) == sorted(ids[7:])
    assert max(len(part) for one in parts for part in one) <= 20
    # Exactly the images by which one process would choose.
    assert next(testing_module._parts(images, ids, 50, Processes(1, count))) == ids[:20]
    assert list(testing_module._parts(images, ids, 7, ALONE)) == [ids[:20], ids[20:40], ids[40:]]
    assert testing_module._CHOOSING >= choose_samples._IMAGES
    # Fewer images than processes, and no passes to choose.
    assert list(testing_module._parts(images, ids[:1], 0, Processes(1, 2))) == []


def test_rounding_comparison_detects_differences():
    """Check that assert_equal_to_rounding can fail."""
    base = {"a": [1.0, "x", None, math.nan], "b": np.array([1.0, 2.0])}
    assert_equal_to_rounding(base, {"a": [1.0 + 1e-9, "x", None, math.nan], "b": base["b"]})
    for wrong in (
        {"a": [1.001, "x", None, math.nan], "b": base["b"]},
        {"a": [1.0, "y", None, math.nan], "b": base["b"]},
        {"a": [1.0, "x", None], "b": base["b"]},
        {"a": base["a"], "b": np.array([1.0, 2.1])},
        {"a": base["a"]},
    ):
        with pytest.raises(AssertionError):
            assert_equal_to_rounding(base, wrong)

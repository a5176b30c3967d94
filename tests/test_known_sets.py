"""Small generated copies of well-known data sets, used from the command line."""

import json

import pytest

from polyseg.runs.record_files import read_assessment
from tests.conftest import TINY
from tests.layout_copies import COPIES, FAULTY_FILES, PUBLIC, planted_faults

SETTINGS = [part for one in (*TINY, "output.figures=false") for part in ("--set", one)]

CHANNELS = {
    **dict.fromkeys(("kvasir", "cvc_clinicdb", "isic2018", "drive"), 3),
    **dict.fromkeys(("nnunet_png", "decathlon"), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COPIES)
def test_every_layout_trains(polyseg, tmp_path, name):
    data = COPIES[name](tmp_path / "data")
    run = tmp_path / "run"
    plan = polyseg("train", "--data", data, "--out", run, "--dry-run", "--json", *SETTINGS)
    assert plan.code == 0, plan.err
    planned = json.loads(plan.out)
    assert planned["channels"] == CHANNELS.get(name, planned["channels"])
    assert planned["images"]["train"] >= 2 and planned["images"]["val"] >= 1
    answer = polyseg("train", "--data", data, "--out", run, "--epochs", 1, *SETTINGS)
    assert answer.code == 0, answer.err
    assessment = read_assessment(run / "uncertainty/epoch_0001.h5")
    assert len(assessment.ids) == planned["images"]["train"]
    # A mask read as an image, or not read at all, would have all or no pixels.
    assert (assessment.foreground_pixels < 32 * 32).all()
    assert assessment.foreground_pixels.max() > 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_sets_load_by_path_or_with_the_setting_in_the_error(polyseg, tmp_path, name):
    make, settings = PUBLIC[name]
    data = make(tmp_path)
    flags = [part for one in settings for part in ("--set", one)]
    answer = polyseg("data", "check", data, "--json", *flags)
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    low, high = found["foreground, range"]
    assert 0 <= low < high < 0.8
    assert min(found["split"].values()) > 0
    if settings:
        plain = polyseg("data", "check", data)
        assert plain.code == 2
        assert all(one.partition("=")[0] in plain.err for one in settings)
        assert len(plain.err.strip().splitlines()) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dsb2018", "kaggle_3m", "kits19", "montgomery", "bids_lesions"])
def test_public_sets_train(polyseg, tmp_path, name):
    make, settings = PUBLIC[name]
    flags = [part for one in settings for part in ("--set", one)]
    out = tmp_path / "run"
    answer = polyseg(
        "train", "--data", make(tmp_path), "--out", out, "--epochs", 1, *SETTINGS, *flags
    )
    assert answer.code == 0, answer.err


def test_all_faults_are_reported_together(polyseg, tmp_path):
    folder = planted_faults(tmp_path / "data")
    answer = polyseg("data", "check", folder)
    assert answer.code == 2
    assert len(FAULTY_FILES) == 10
    for name in FAULTY_FILES:
        file = name.rpartition("/")[2]
        assert file in answer.err, name
    assert len(answer.err.strip().splitlines()) == 10

"""The runs of examples/study.py, with a small network on a few phantoms."""

import json

import numpy as np
import pytest

from examples import study
from polyseg.data.phantoms.phantom_sets import make_phantoms, write_phantoms
from polyseg.runs import read_schedule
from tests.conftest import TINY


@pytest.fixture
def runs(tmp_path, polyseg, monkeypatch):
    """Return a study of one set, whose commands run in this process."""
    write_phantoms(tmp_path / "data/phantoms", make_phantoms(16, size=(32, 32)))
    monkeypatch.setattr(study, "SETS", {"phantoms": ("phantoms", 32)})
    monkeypatch.setattr(study, "NETWORK", "{channels: [4, 8], strides: [2], num_res_units: 1}")
    monkeypatch.setattr(study, "EPOCHS", 3)
    more = [word for one in TINY if "control." in one for word in ("--set", one)]

    def command(_, *arguments):
        new = arguments[0] == "train" and "--resume" not in arguments
        answer = polyseg(*arguments, *(more if new else ()), "-q")
        assert answer.code == 0, answer.err
        return 0.0

    monkeypatch.setattr(study.Study, "_polyseg", command)
    chosen = ("uncertainty.metric=dispersion", "uncertainty.samples=2", "control.reduction=rank")
    return study.Study(tmp_path / "data", tmp_path / "runs", tmp_path / "rows.jsonl", chosen)


def row_of(runs, arm):
    run = study.Run("phantoms", 0, 0, arm)
    runs.go(run)
    return run, runs.done()[run.name]


def epsilons(runs, run):
    return read_schedule(runs.runs / run.name / "schedule.h5").epsilon


@pytest.mark.slow
def test_oracle_follows_out_of_fold_errors_and_permuted_has_the_same_epsilons(runs):
    halves = [{one[0] for one in row_of(runs, f"donor-{k}")[1]["images"]} for k in (0, 1)]
    assert not halves[0] & halves[1]
    oracle, _ = row_of(runs, "oracle-1")
    permuted, _ = row_of(runs, "permuted-1-1")
    schedule = read_schedule(runs.runs / oracle.name / "schedule.h5")
    assert set(schedule.ids) == halves[0] | halves[1]
    errors = study.out_of_fold_errors(runs.done(), oracle)
    by_error = sorted(schedule.ids, key=errors.get)
    of_image = dict(zip(schedule.ids, schedule.epsilon[0], strict=True))
    assert np.diff([of_image[one] for one in by_error]).min() >= 0
    assert (schedule.epsilon == schedule.epsilon[0]).all()
    assert (1 + 2 * schedule.epsilon[0]).mean() == pytest.approx(1, abs=1e-5)
    other = epsilons(runs, permuted)
    assert (other != schedule.epsilon).any()
    np.testing.assert_array_equal(np.sort(other), np.sort(schedule.epsilon))


@pytest.mark.slow
def test_arms_of_gate_c_are_trained_and_not_repeated(runs):
    for arm in ("dice", "epsilon-1", "thesis", "thesis-mean", "chosen", "chosen-permuted"):
        row_of(runs, arm)
    rows = runs.rows.read_text()
    assert {row["epsilon"][1] for row in map(json.loads, rows.splitlines())} > {1.0}
    run, _ = row_of(runs, "chosen")
    assert runs.rows.read_text() == rows
    permuted = study.Run("phantoms", 0, 0, "chosen-permuted")
    one, other = epsilons(runs, run), epsilons(runs, permuted)
    assert np.isnan(one[0]).all() or (one[0] == other[0]).all()
    assert (one[1:] != other[1:]).any()
    mean = epsilons(runs, study.Run("phantoms", 0, 0, "thesis-mean"))
    assert np.ptp(mean, axis=1).max() == pytest.approx(0, abs=1e-6)
    config = (runs.runs / run.name / "config.yaml").read_text()
    assert "metric: dispersion" in config and "reduction: rank" in config

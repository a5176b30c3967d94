"""Reductions and maps from difficulties to epsilons, against SciPy and in whole runs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize, stats

from polyseg.adaptive.controller import Adapted, EpsilonControl, Recorder
from polyseg.choices import PRESETS
from polyseg.commands import schedule as job
from polyseg.commands.train import train
from polyseg.config import Config, ControlConfig, load_config, template
from polyseg.difficulty import epsilon_from_weight, normalise_by_rank
from polyseg.errors import PolysegError
from polyseg.runs.record_files import read_schedule
from polyseg.system.yaml import parse_yaml

from .conftest import TINY
from .test_schedule import assessment, two_labels

RANK_AND_WEIGHT = ("control.reduction=rank", "control.map=weight", "control.epsilon_max=4")
difficulties = arrays(np.float64, st.integers(1, 30), elements=st.integers(0, 9).map(float))


def reference_epsilon(difficulty, low, high, sensitivity):
    """Return the epsilons of rank and weight as defined in study.md, using SciPy."""
    normalised = stats.norm.ppf((stats.rankdata(difficulty) - 0.5) / len(difficulty))

    def epsilon(log_c):
        return np.clip((np.exp(log_c + sensitivity * normalised) - 1) / 2, low, high)

    def excess(log_c):
        return np.mean(1 + 2 * epsilon(log_c)) - 1

    wide = sensitivity * np.abs(normalised).max() + 1
    return epsilon(optimize.brentq(excess, -wide, wide, xtol=1e-14, rtol=1e-14))


@given(difficulties)
def test_ranks_equal_scipy(values):
    expected = stats.norm.ppf((stats.rankdata(values) - 0.5) / len(values))
    np.testing.assert_allclose(normalise_by_rank(values), expected, atol=1e-12)


@given(difficulties, st.floats(-0.5, -0.01), st.floats(0.01, 9), st.floats(0, 3))
def test_weights_have_mean_one_within_their_range(values, low, high, sensitivity):
    epsilon = epsilon_from_weight(normalise_by_rank(values), low, high, sensitivity)
    assert np.mean(1 + 2 * epsilon) == pytest.approx(1, abs=1e-9)
    assert (epsilon >= low).all() and (epsilon <= high).all()
    assert (np.diff(epsilon[np.argsort(values)]) >= 0).all()
    expected = reference_epsilon(values, low, high, sensitivity)
    np.testing.assert_allclose(epsilon, expected, atol=1e-8)


def test_weights_of_extreme_difficulties_are_finite():
    epsilon = epsilon_from_weight(np.array([-1e6, 0.0, 1e6]), -0.5, 100, 1000.0)
    np.testing.assert_allclose(epsilon, [-0.5, -0.5, 1.0], atol=1e-6)


def test_equal_difficulties_have_weight_one():
    assert epsilon_from_weight(normalise_by_rank(np.ones(5)), -0.4, 1.0, 2.0).tolist() == [0.0] * 5


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.4, 0.0), (-0.6, 1.0)])
def test_epsilon_range_without_zero_is_refused(low, high):
    with pytest.raises(ValueError, match="0 must be between"):
        epsilon_from_weight(np.zeros(2), low, high, 1.0)


def test_error_about_range_without_zero_names_the_settings():
    with pytest.raises(
        PolysegError, match=r"control.map weight needs control.epsilon_min 0.1 .*epsilon_max 1.0"
    ):
        load_config(overrides=["control.map=weight", "control.epsilon_min=0.1"])
    load_config(overrides=["control.map=sigmoid", "control.epsilon_min=0.1"])


@pytest.mark.parametrize("statistics", ["batch", "dataset"])
def test_each_label_is_ranked_and_weighted_separately(statistics):
    difficulty = np.random.default_rng(0).random(12) + np.tile([0, 5], 6)
    config = ControlConfig(
        statistics=statistics, reduction="rank", map="weight", epsilon_max=4.0, sensitivity=0.7
    )
    found = assessment(1, difficulty, labels=["a", "b"] * 6)
    control = EpsilonControl(config, 0.0, found, labels=2)
    ids = ["i4", "i0", "i2"]
    adapted = control.epsilon(ids).reshape(-1, 2)
    for k in range(2):
        own = difficulty[k::2]
        chosen = [4, 0, 2]
        if statistics == "batch":
            expected = reference_epsilon(own[chosen], -0.4, 4, 0.7)
        else:
            expected = reference_epsilon(own, -0.4, 4, 0.7)[chosen]
        np.testing.assert_allclose(adapted[:, k], expected, atol=1e-8)


def test_batches_with_equal_statistics_have_separate_groups():
    statistics = np.array([[0.5, 0.1]])
    ids = ["a", "b", "c", "d"]
    recorder = Recorder(ids)
    halves = [ids[:2], ids[2:]]
    recorder.add((half, Adapted(np.zeros(2), statistics.copy())) for half in halves)
    recorder.add((half, Adapted(np.zeros(2), statistics)) for half in halves)
    groups = recorder.columns()["group"]
    assert len(set(groups[0])) == 2 and len(set(groups[1])) == 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder of runs with rank and weight, with batch and data-set statistics."""
    folder = tmp_path_factory.mktemp("runs")
    labels = (f"data.path={two_labels(folder / 'images')}", "data.foreground={bright: 1, dark: 2}")
    for name, *overrides in (
        ("batch", "control.every=2"),
        ("dataset", "control.statistics=dataset"),
        ("labels", *labels),
    ):
        place = (f"output.path={folder / name}", "output.figures=false")
        train(load_config(overrides=[*TINY, *place, *RANK_AND_WEIGHT, *overrides]))
    return folder


@pytest.mark.parametrize("name", ["batch", "dataset", "labels"])
class TestRunsWithRankAndWeight:
    @pytest.mark.slow
    def test_every_epsilon_follows_from_its_record(self, runs, name):
        record = job.read_record(runs / name)
        schedule = record.schedule
        seen = 0
        for k, found in enumerate(record.assessments):
            for epoch in np.flatnonzero(record.fed(k)):
                for group in np.unique(schedule.group[epoch]):
                    together = schedule.group[epoch] == group
                    expected = reference_epsilon(found.difficulty[together], -0.4, 4, 1)
                    met = schedule.epsilon[epoch, together]
                    np.testing.assert_allclose(met, expected, atol=1e-6)
                    seen += together.sum()
        assert seen and np.ptp(schedule.epsilon[-1]) > 0.1

    def test_recompute_gives_the_record_bit_for_bit(self, runs, name, tmp_path):
        job.recompute(runs / name, out=tmp_path / "again.h5")
        again, own = (
            read_schedule(tmp_path / "again.h5"),
            read_schedule(runs / name / "schedule.h5"),
        )
        for column in ("epsilon", "group", "statistics"):
            np.testing.assert_array_equal(getattr(again, column), getattr(own, column))
        rows = job.recompute(runs / name, ["control.reduction=sigma", "control.map=sigmoid"]).rows
        assert rows[-1]["largest_change"] > 0.01

    def test_show_prints_the_rank_behind_epsilon(self, runs, name):
        record = job.read_record(runs / name)
        found = job.show(runs / name, image=record.schedule.ids[0])
        notes = " ".join(found.notes)
        assert "control.reduction=rank" in notes and "control.map=weight" in notes
        assert "eq. 11" not in notes and "eq. 12" not in notes
        shown = [row for row in found.rows if np.isfinite(row["epsilon"])]
        for row in shown:
            part = record.of_label(row.get("label", ""))
            k = [one.epoch for one in part.assessments].index(row["epoch"])
            groups = part.schedule.group[row["from_epoch"] - 1]
            own = part.assessments[k].difficulty[groups == groups[0]]
            expected = stats.norm.ppf((stats.rankdata(own)[0] - 0.5) / len(own))
            assert row["normalised"] == pytest.approx(expected, abs=1e-9)
        assert len({row["normalised"] for row in shown}) > 1 or name == "dataset"

    def test_validity_and_export_accept_rank_reduction(self, runs, name):
        assert job.validity(runs / name).rows
        assert "normalised" in job.export(runs / name)


def test_thesis_preset_overrides_the_file_and_set_overrides_the_preset(tmp_path, polyseg):
    file = tmp_path / "mine.yaml"
    file.write_text("control: {map: weight, sensitivity: 3}\ntraining: {epochs: 7}\n")
    config = load_config(file, ["control.sensitivity=2"], preset="thesis")
    assert (config.control.map, config.control.sensitivity) == ("sigmoid", 2)
    assert config.training.epochs == 7
    answer = polyseg("config", "show", file, "--preset", "thesis")
    assert "map: sigmoid" in answer.out
    answer = polyseg("train", "--preset", "thesi", "--out", tmp_path / "run")
    assert answer.code == 2 and "did you mean thesis?" in answer.err.replace("\n", " ")


def test_thesis_preset_fixes_every_setting_of_the_thesis():
    config = load_config(preset="thesis")
    assert (config.loss.name, config.loss.scale, config.loss.scale_gradient) == (
        *("polydice1", "norms", "guarded"),
    )
    assert (config.uncertainty.metric, config.uncertainty.region) == ("mutual_information", "mask")
    control = config.control
    assert (control.statistics, control.reduction, control.map) == ("batch", "sigma", "sigmoid")
    named = {setting.partition("=")[0] for setting in PRESETS["thesis"].settings}
    decided = {f"control.{name}" for name in ControlConfig.model_fields}
    assert decided - named == {"control.replay", "control.replay_arm", "control.replay_seed"}


def test_template_of_a_preset_holds_its_settings():
    own = load_config(overrides=["control.map=weight", "loss.name=dice"])
    assert Config.model_validate(parse_yaml(template(own), "file")) == own

"""Recorded difficulties and epsilons: show, plot, export, validity and recompute."""

import csv
import io
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from polyseg.adaptive import recorded_schedule, replay, schedule_tables, score_correlations
from polyseg.commands import schedule as job
from polyseg.commands import schedule_figures as figures_job
from polyseg.commands.train import train
from polyseg.config import load_config
from polyseg.difficulty import FALLBACKS
from polyseg.errors import PolysegError
from polyseg.records import Assessment, Schedule
from polyseg.runs.checkpoints import read_checkpoint, write_checkpoint
from polyseg.runs.record_files import read_schedule
from polyseg.runs.run_folder import RunDirectory

from .conftest import TINY

FAST = (*TINY, "output.figures=false", "uncertainty.program=plain")


def assessment(epoch, difficulty, labels=None, **changes):
    """Return an assessment with the given D and invented other columns."""
    n = len(difficulty)
    noise = np.random.default_rng(epoch)
    images = n if labels is None else n // len(set(labels))
    names = [f"i{k}" for k in range(images) for _ in range(n // images)]
    given = {
        "epoch": epoch,
        "samples": 3,
        "rate": 0.2,
        "metric": "mutual_information",
        "region": "mask",
        "masks": "consistent",
        "seed": 0,
        "ids": names,
        "labels": labels,
        "scores": {
            "mutual_information": np.array(difficulty, float),
            "entropy": noise.random(n),
            "training_loss": noise.random(n),
        },
        "scores_se": {"mutual_information": noise.random(n)},
        "foreground_pixels": noise.integers(1, 100, n),
        "fallback": np.zeros(n, np.int8),
        "dice": noise.random(n),
        "rank_stability": {"mutual_information": 0.5 + epoch / 100},
    }
    return Assessment(**given | changes)


def make_record(difficulties, epochs, *overrides, labels=None, **changes):
    """Return a record with an assessment for each entry of {epoch: D} and invented epsilons."""
    config = load_config(overrides=[f"training.epochs={epochs}", *overrides])
    assessments = [assessment(e, d, labels, **changes) for e, d in difficulties.items()]
    n = len(assessments[0].ids)
    noise = np.random.default_rng(9)
    epsilon = noise.random((epochs, n)).astype(np.float32)
    # Statistics of two batches per epoch, equal for all labels.
    group = 2 * np.arange(epochs)[:, None] + noise.integers(0, 2, (epochs, n))
    schedule = Schedule(
        assessments[0].ids,
        np.arange(1, epochs + 1),
        epsilon,
        labels,
        group=group.astype(np.int32),
        statistics=noise.random((2 * epochs, 2)),
    )
    return recorded_schedule.RunRecord(
        "made", config, assessments, schedule, np.arange(epochs) / 10
    )


def random_difficulties(epochs, n, seed=0):
    noise = np.random.default_rng(seed)
    return {epoch: noise.random(n) for epoch in epochs}


class TestOverview:
    record = make_record(random_difficulties((2, 4, 7), 6), 7, "control.percentile=30")

    def test_overview_statistics_equal_numpy(self):
        for k, row in enumerate(schedule_tables.overview(self.record)):
            difficulty = self.record.assessments[k].difficulty
            assert row["difficulty_q05"] == np.quantile(difficulty, 0.05)
            assert row["difficulty_q50"] == np.median(difficulty)
            assert row["difficulty_percentile"] == np.quantile(difficulty, 0.3)
            assert row["sigma"] == np.sqrt(np.mean((difficulty - difficulty.mean()) ** 2))
            assert row["rank_stability"] == 0.5 + row["epoch"] / 100
        first, second, last = schedule_tables.overview(self.record)
        assert first["epsilon_q95"] == pytest.approx(
            np.quantile(self.record.schedule.epsilon[2], 0.95), rel=1e-6
        )
        assert second["epsilon_q50"] == pytest.approx(
            np.median(self.record.schedule.epsilon[4]), rel=1e-6
        )
        assert math.isnan(last["epsilon_q50"]) and math.isnan(last["wrong_sign_share"])

    def test_rank_correlations_equal_scipy(self):
        one, two, three = (a.difficulty for a in self.record.assessments)
        rows = schedule_tables.overview(self.record)
        assert math.isnan(rows[0]["spearman_previous"])
        assert rows[1]["spearman_previous"] == pytest.approx(stats.spearmanr(one, two).statistic)
        assert rows[2]["spearman_previous"] == pytest.approx(stats.spearmanr(two, three).statistic)
        assert rows[0]["largest_1"] == f"i{one.argmax()}"
        assert rows[0]["smallest_1"] == f"i{one.argmin()}"
        assert rows[0]["largest_2"] == f"i{one.argsort()[-2]}"

    def test_wrong_sign_share_covers_the_epochs_after_the_assessment(self):
        rows = schedule_tables.overview(self.record)  # shares 0, 0.1, ... of epochs 1, 2, ...
        assert rows[0]["wrong_sign_share"] == pytest.approx((0.2 + 0.3) / 2)  # epochs 3 and 4
        assert rows[1]["wrong_sign_share"] == pytest.approx((0.4 + 0.5 + 0.6) / 3)

    def test_fallbacks_are_counted(self):
        codes = np.array([0, 1, 2, 0, 1], np.int8)
        record = make_record({1: np.arange(5.0)}, 2, fallback=codes)
        assert schedule_tables.overview(record)[0]["fallbacks"] == 3

    def test_labels_are_told_apart(self):
        labels = ["bright", "dark"] * 5
        record = make_record(random_difficulties((1, 2), 10), 3, labels=labels)
        rows = schedule_tables.overview(record)
        assert [(row["epoch"], row["label"]) for row in rows] == [
            (1, "bright"),
            (1, "dark"),
            (2, "bright"),
            (2, "dark"),
        ]
        dark = record.assessments[0].difficulty[1::2]
        assert rows[1]["difficulty_q50"] == np.median(dark)
        assert rows[1]["largest_1"] == f"i{dark.argmax()}"
        assert rows[1]["epsilon_q50"] == pytest.approx(
            np.median(record.schedule.epsilon[1, 1::2]), rel=1e-6
        )

    def test_overview_of_one_image_has_no_ranks(self):
        row = schedule_tables.overview(make_record({1: np.array([0.3])}, 2))[0]
        assert row["largest_1"] == row["smallest_1"] == "i0" and row["sigma"] == 0
        assert "largest_2" not in row


TWO_RANKINGS = {1: np.array([0.1, 0.3, 0.3, 0.2, 0.5]), 3: np.array([0.5, 0.4, 0.3, 0.2, 0.1])}


class TestImageHistory:
    def test_rank_and_percentile_equal_scipy(self):
        record = make_record(TWO_RANKINGS, 4)
        for i in range(5):
            for row in schedule_tables.image_history(record, f"i{i}"):
                difficulty = TWO_RANKINGS[row["epoch"]]
                assert row["rank"] == stats.rankdata(-difficulty, method="min")[i]
                middle = stats.rankdata(difficulty, method="average")[i] - 0.5
                assert row["percentile"] == pytest.approx(100 * middle / 5)

    def test_image_history_equals_the_files(self):
        record = make_record(TWO_RANKINGS, 3)
        first, second, last = schedule_tables.image_history(record, "i2")
        assert (first["from_epoch"], first["to_epoch"], second["from_epoch"]) == (2, 2, 3)
        assert first["epsilon"] == record.schedule.epsilon[1, 2]
        assert second["epsilon"] == record.schedule.epsilon[2, 2]
        for name in ("from_epoch", "difficulty_percentile", "sigma", "normalised", "epsilon"):
            assert math.isnan(last[name])
        one = record.assessments[0]
        assert first["difficulty_se"] == one.scores_se["mutual_information"][2]
        assert first["dice"] == one.dice[2] and first["fallback"] == "none"
        schedule = record.schedule
        for epoch, row in ((2, first), (3, second)):
            center, sigma = schedule.statistics[schedule.group[epoch - 1, 2]]
            assert (row["difficulty_percentile"], row["sigma"]) == (center, sigma)
            assert row["normalised"] == pytest.approx((0.3 - center) / (sigma + 1e-9))

    def test_epochs_with_equal_statistics_share_one_row(self):
        record = make_record(TWO_RANKINGS, 5)
        group = np.repeat(np.array([-1, 0, 0, 1, 2], np.int32)[:, None], 5, axis=1)
        rows = schedule_tables.image_history(
            replace(record, schedule=replace(record.schedule, group=group)), "i0"
        )
        stretches = [(row["epoch"], row["from_epoch"], row["to_epoch"]) for row in rows]
        assert stretches == [(1, 2, 3), (3, 4, 4), (3, 5, 5)]

    def test_statistics_that_were_not_recorded_are_missing(self):
        record = make_record(TWO_RANKINGS, 4)
        old = replace(record, schedule=replace(record.schedule, group=None, statistics=None))
        rows = schedule_tables.image_history(old, "i0")
        assert [(row["from_epoch"], row["to_epoch"]) for row in rows] == [(2, 3), (4, 4)]
        assert all(math.isnan(row["normalised"]) and math.isnan(row["sigma"]) for row in rows)
        assert rows[0]["epsilon"] == old.schedule.epsilon[1, 0]

    def test_unknown_image_is_refused_with_a_suggestion(self):
        with pytest.raises(PolysegError, match=r"did you mean i2\?"):
            schedule_tables.image_history(make_record(TWO_RANKINGS, 3), "ii2")
        with pytest.raises(PolysegError, match="not a training image of made"):
            schedule_tables.image_history(make_record(TWO_RANKINGS, 3), "%%%")

    def test_beginning_of_ids_is_refused_with_the_ids(self):
        record = make_record(TWO_RANKINGS, 3)
        ids = ["p02-1", "p01-1", "p01-2", "p01-3", "p01-4"]
        renamed = replace(record, schedule=replace(record.schedule, ids=ids))
        for text, expected in (
            ("p01", r"; 4 images begin with it: p01-1, p01-2, p01-3, \.\.\.$"),
            ("p02", "; 1 image begins with it: p02-1$"),
            ("p03-1", r"; did you mean p0[12]-1\?$"),
        ):
            with pytest.raises(PolysegError, match=expected):
                schedule_tables.image_history(renamed, text)

    def test_image_history_has_one_row_per_label(self):
        record = make_record(random_difficulties((1, 2), 6), 3, labels=["a", "b"] * 3)
        rows = schedule_tables.image_history(record, "i1")
        assert [row["label"] for row in rows] == ["a", "b", "a", "b"]
        assert rows[1]["epsilon"] == record.schedule.epsilon[1, 3]
        assert all(1 <= row["rank"] <= 3 for row in rows)


class TestTidy:
    def test_rows_equal_the_records(self):
        record = make_record(random_difficulties((1, 3), 5), 3, "control.percentile=80")
        rows = schedule_tables.tidy(record)
        assert len(rows) == 10 and list(rows[0])[:3] == ["epoch", "id", "difficulty"]
        for k, one in enumerate(record.assessments):
            mine = rows[5 * k : 5 * k + 5]
            assert [row["difficulty"] for row in mine] == one.difficulty.tolist()
            for name in ("difficulty_percentile", "sigma", "normalised"):
                assert math.isnan(mine[0][name]) is (k == 1)  # no epoch followed
        schedule = record.schedule
        center, sigma = schedule.statistics[schedule.group[1]].T
        expected = (record.assessments[0].difficulty - center) / (sigma + 1e-9)
        np.testing.assert_allclose([row["normalised"] for row in rows[:5]], expected, rtol=1e-12)
        assert [row["difficulty_percentile"] for row in rows[:5]] == center.tolist()
        assert [row["sigma"] for row in rows[:5]] == sigma.tolist()
        assert [row["epsilon"] for row in rows[:5]] == record.schedule.epsilon[1].tolist()
        assert all(math.isnan(row["epsilon"]) for row in rows[5:])

    def test_labels_of_an_image_are_adjacent(self):
        record = make_record(random_difficulties((1,), 6), 2, labels=["a", "b"] * 3)
        rows = schedule_tables.tidy(record)
        assert [row["id"] for row in rows] == record.schedule.ids
        assert [row["label"] for row in rows] == record.schedule.labels
        assert [row["epsilon"] for row in rows] == record.schedule.epsilon[1].tolist()

    def test_scores_without_passes_have_no_standard_errors(self):
        one = {"metric": "training_loss", "scores_se": {}}
        rows = schedule_tables.tidy(make_record({1: np.arange(4.0)}, 2, **one))
        assert all(math.isnan(row["difficulty_se"]) for row in rows)

    def test_names_like_formulas_are_escaped(self):
        names = ['a"b', "=1+1", "c,d", "-e", "@f"]
        text = schedule_tables.csv_text(
            [{"id": name, "dice": dice} for name, dice in zip(names, range(5), strict=True)]
        )
        read = list(csv.DictReader(io.StringIO(text)))
        assert [row["id"] for row in read] == ['a"b', "'=1+1", "c,d", "'-e", "'@f"]

    @given(st.lists(st.floats(), min_size=1))
    def test_csv_numbers_round_trip_or_are_empty(self, values):
        read = csv.DictReader(
            io.StringIO(schedule_tables.csv_text([{"k": 1, "x": x} for x in values]))
        )
        for row, value in zip(read, values, strict=True):
            if math.isfinite(value):
                assert float(row["x"]) == pytest.approx(value, rel=1e-8)
            else:
                assert row["x"] == ""


def partial_by_regression(first, second, given):
    """Return the correlation of the rank residuals of two series after regression on `given`."""
    x, y, z = (stats.rankdata(values) for values in (first, second, given))
    design = np.stack([np.ones_like(z), z], axis=1)
    left = [one - design @ np.linalg.lstsq(design, one, rcond=None)[0] for one in (x, y)]
    return np.corrcoef(*left)[0, 1]


class TestValidity:
    def test_correlations_equal_scipy(self):
        record = make_record(random_difficulties((1, 2), 12), 2)
        rows = score_correlations.validity(record)
        assert [row["score"] for row in rows] == 2 * list(record.assessments[0].scores)
        for k, one in enumerate(record.assessments):
            for row in rows[3 * k : 3 * k + 3]:
                score, error = one.scores[row["score"]], 1 - one.dice
                size = one.foreground_pixels
                assert row["with_error"] == pytest.approx(stats.spearmanr(score, error).statistic)
                assert row["with_size"] == pytest.approx(stats.spearmanr(score, size).statistic)
                assert row["with_error_given_size"] == pytest.approx(
                    partial_by_regression(score, error, size)
                )
                assert row["images"] == 12
        before, after = (one.scores["entropy"] for one in record.assessments)
        assert math.isnan(rows[1]["with_previous"])
        assert rows[4]["with_previous"] == pytest.approx(stats.spearmanr(before, after).statistic)

    @pytest.mark.parametrize(("usable", "known"), [(3, False), (4, True)])
    def test_correlations_of_few_images_are_undefined(self, usable, known):
        dice = np.r_[np.random.default_rng(1).random(usable), np.full(5 - usable, math.nan)]
        row = score_correlations.validity(make_record(random_difficulties((1,), 5), 2, dice=dice))[
            0
        ]
        assert row["images"] == usable
        assert math.isfinite(row["with_error"]) is known
        assert math.isfinite(row["with_error_given_size"]) is known
        assert math.isfinite(row["with_size"])

    def test_sizes_are_those_of_the_masks(self):
        pixels = np.array([5, 6, 7], np.int64)
        one = assessment(1, np.arange(3.0), foreground_pixels=pixels)
        codes = replace(one, fallback=np.array([0, 1, 2], np.int8))
        assert replay.mask_sizes(codes).tolist() == [5, 0, 0]
        assert np.isnan(replay.mask_sizes(replace(one, region="image"))).all()
        known = replace(one, region="image", mask_pixels=np.array([1, 2, 3], np.int64))
        assert replay.mask_sizes(known).tolist() == [1, 2, 3]

    def test_summary_holds_the_last_value_and_the_mean_of_known_values(self):
        record = make_record(random_difficulties((1, 2, 3), 8), 3, labels=["a", "b"] * 4)
        rows = score_correlations.validity(record)
        summary = score_correlations.validity_summary(rows)
        assert [(row["label"], row["score"]) for row in summary[:3]] == [
            ("a", "mutual_information"),
            ("a", "entropy"),
            ("a", "training_loss"),
        ]
        own = [r for r in rows if r["label"] == "b" and r["score"] == "entropy"]
        (row,) = [r for r in summary if r["label"] == "b" and r["score"] == "entropy"]
        assert row["with_error_last"] == own[-1]["with_error"]
        assert row["with_previous_mean"] == pytest.approx(
            (own[1]["with_previous"] + own[2]["with_previous"]) / 2
        )
        assert row["with_size_mean"] == pytest.approx(np.mean([r["with_size"] for r in own]))

    def test_validity_curves_equal_the_rows(self):
        rows = score_correlations.validity(make_record(random_difficulties((1, 5), 8), 5))
        curves = score_correlations.validity_curves(rows, "")
        assert curves["with_size"]["entropy"].tolist() == [
            row["with_size"] for row in rows if row["score"] == "entropy"
        ]

    def test_stability_equals_scipy(self):
        record = make_record(random_difficulties((1, 2, 4), 9), 4)
        one, two, three = (a.difficulty for a in record.assessments)
        curves = score_correlations.stability(record)
        previous, last, expected = curves.values()
        rho = lambda x, y: stats.spearmanr(x, y).statistic  # noqa: E731
        np.testing.assert_allclose(previous, [math.nan, rho(one, two), rho(two, three)])
        np.testing.assert_allclose(last, [rho(one, three), rho(two, three), math.nan])
        np.testing.assert_allclose(expected, [0.51, 0.52, 0.54])


class TestRecompute:
    settings = ("control.statistics=dataset", "control.start=2", "control.every=2")

    def recomputed(self, record, *overrides):
        config = recorded_schedule.changed_settings(record.config, overrides)
        return recorded_schedule.recompute(record, config)

    def test_epsilon_follows_eq_11_and_12_of_the_previous_assessment(self):
        record = make_record(random_difficulties((2, 4, 6), 7), 6, *self.settings)
        changes = ("control.sensitivity=2", "control.percentile=25", "control.epsilon_max=0.7")
        new = self.recomputed(record, *changes, "loss.epsilon=0.25")
        assert new.epsilon.dtype == np.float32 and (new.epsilon[:2] == np.float32(0.25)).all()
        for epoch in (3, 4, 5, 6):
            d = record.assessments[0 if epoch < 5 else 1].difficulty
            x = (d - np.quantile(d, 0.25)) / (d.std() + 1e-9)
            expected = -0.4 + 1.1 / (1 + np.exp(-2 * x))
            np.testing.assert_allclose(new.epsilon[epoch - 1], expected, rtol=1e-6)
        assert new.assessed.tolist() == [-1, -1, 2, 2, 4, 4]
        assert new.ids == record.schedule.ids

    @given(st.integers(0, 1000), st.floats(0.1, 20), st.sampled_from(["batch", "dataset"]))
    def test_higher_sensitivity_never_moves_epsilon_to_the_middle(self, seed, factor, statistics):
        record = make_record(
            random_difficulties((1,), 9, seed), 2, "control.start=1", "training.batch_size=4"
        )
        kind = f"control.statistics={statistics}"
        before, after = (
            self.recomputed(record, kind, f"control.sensitivity={x}").epsilon[1].astype(float) - 0.3
            for x in (factor, 2 * factor)
        )
        assert (before * after >= -1e-12).all() and (abs(after) >= abs(before) - 1e-6).all()

    def test_zero_sensitivity_gives_the_middle_epsilon(self):
        record = make_record(random_difficulties((1,), 5), 3, "control.start=1")
        new = self.recomputed(record, "control.sensitivity=0")
        np.testing.assert_allclose(new.epsilon[1:], 0.3, rtol=1e-6)

    def test_recompute_with_another_recorded_score(self):
        record = make_record(random_difficulties((2, 4), 7), 4, *self.settings)
        entropies = {a.epoch: a.scores["entropy"] for a in record.assessments}
        other = make_record(entropies, 4, *self.settings)
        new = self.recomputed(record, "uncertainty.metric=entropy")
        assert np.array_equal(new.epsilon, self.recomputed(other).epsilon)
        assert not np.array_equal(new.epsilon, self.recomputed(record).epsilon)
        with pytest.raises(PolysegError, match=r"uncertainty.metric variance: made did not record"):
            self.recomputed(record, "uncertainty.metric=variance")

    def test_recompute_treats_each_label_separately(self):
        difficulties = random_difficulties((2,), 12)
        settings = (*self.settings, "data.foreground={a: 1, b: 2}")
        record = make_record(difficulties, 3, *settings, labels=["a", "b"] * 6)
        new = self.recomputed(record)
        for k in (0, 1):
            alone = make_record({2: difficulties[2][k::2]}, 3, *self.settings)
            assert np.array_equal(new.epsilon[:, k::2], self.recomputed(alone).epsilon)

    def test_recompute_allows_fewer_assessments_and_names_missing_ones(self):
        record = make_record(random_difficulties((2, 4, 6), 8), 8, *self.settings)
        new = self.recomputed(record, "control.every=4")
        assert new.assessed.tolist() == [-1, -1, 2, 2, 2, 2, 6, 6]
        later = self.recomputed(record, "control.start=4", "control.every=100")
        assert later.assessed.tolist() == [-1] * 4 + [4] * 4
        with pytest.raises(PolysegError, match="not assessed after epoch 3, only after 2, 4, 6"):
            self.recomputed(record, "control.every=1")
        with pytest.raises(PolysegError, match="not assessed after epoch 1,"):
            self.recomputed(record, "control.start=1", "control.every=3")
        # An assessment after epoch 8 would determine no epsilon.
        self.recomputed(record, "control.start=6", "control.every=2")

    @pytest.mark.parametrize(
        "override",
        [
            *("training.seed=1", "loss.name=dice", "control.enabled=false", "control.replay=x"),
            *("uncertainty.samples=3", "control.sensitivty=1", "x=1"),
        ],
    )
    def test_recompute_refuses_other_settings_by_name(self, override):
        key = override.partition("=")[0]
        only = "schedule recompute can change only control.reduction"
        with pytest.raises(PolysegError) as error:
            recorded_schedule.changed_settings(load_config(), [override])
        assert f"--set {key}: {only}" in str(error.value)

    @pytest.mark.parametrize(
        "override",
        [
            *("control.epsilon_min=-0.51", "loss.epsilon=-0.6", "control.percentile=101"),
            *("control.statistics=image", "control.epsilon_min=2", "control.delta"),
            "control.delta=[",
        ],
    )
    def test_recompute_checks_bounds_of_settings(self, override):
        with pytest.raises(PolysegError):
            recorded_schedule.changed_settings(load_config(), [override])

    def test_recompute_bounds_epsilon_by_the_number_of_terms(self):
        config = load_config(overrides=["loss.name=polydice", "control.epsilon_min=-0.2"])
        with pytest.raises(PolysegError, match="reward misalignment"):
            recorded_schedule.changed_settings(config, ["control.epsilon_min=-0.4"])


class TestCompare:
    def test_compare_equals_a_case_by_hand(self):
        record = make_record(random_difficulties((1, 3), 4), 4)
        old = np.array([[0, 0, 0, 0], [0, 1, 2, 3], [0, 1, 2, 3], [1, 1, 1, 1]], np.float32)
        new = np.array([[0, 0, 0, 0], [1, 1, 2, 3], [0, 1, 2, 7], [1, 0, 1, 1]], np.float32)
        record = replace(record, schedule=replace(record.schedule, epsilon=old))
        rows = schedule_tables.compare(record, replace(record.schedule, epsilon=new))
        assert [(row["from_epoch"], row["to_epoch"]) for row in rows] == [(1, 1), (2, 3), (4, 4)]
        assert [row["largest_change"] for row in rows] == [0, 4, 1]
        assert [row["raised_share"] for row in rows] == [0, 2 / 8, 0]
        assert rows[1]["recorded_q50"] == 1.5 and rows[1]["recomputed_q50"] == 1.5
        expected = stats.spearmanr(old[1:3].ravel(), new[1:3].ravel()).statistic
        assert rows[1]["spearman"] == pytest.approx(expected)
        assert math.isnan(rows[0]["spearman"])

    def test_compare_skips_assessments_without_epochs(self):
        record = make_record(random_difficulties((0, 2), 4), 2)
        rows = schedule_tables.compare(record, record.schedule)
        assert [(row["from_epoch"], row["to_epoch"]) for row in rows] == [(1, 2)]

    def test_labels_are_told_apart(self):
        record = make_record(random_difficulties((1,), 8), 2, labels=["a", "b"] * 4)
        epsilon = record.schedule.epsilon.copy()
        epsilon[:, 1::2] += 1
        rows = schedule_tables.compare(record, replace(record.schedule, epsilon=epsilon))
        assert [row["raised_share"] for row in rows] == [0, 1, 0, 1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of short runs: resumed, stopped early, with labels, plain."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, *overrides, resume=False):
        place = f"output.path={folder / name}"
        return train(load_config(overrides=[*FAST, place, *overrides]), resume=resume)

    batch = ("control.start=1", "control.every=2", "training.scheduler=constant")
    run("batch", "training.epochs=3", *batch)
    shutil.copytree(folder / "batch", folder / "earlier")
    run("batch", "training.epochs=6", *batch, resume=True)
    early = ("control.start=0", "training.epochs=9", "training.early_stopping=1")
    run("early", *early, "training.learning_rate=1e-12", "control.statistics=dataset")
    labels = (f"data.path={two_labels(folder / 'images')}", "data.foreground={bright: 1, dark: 2}")
    run("labels", *labels)
    run("labels-dataset", *labels, "control.statistics=dataset", "training.epochs=2")
    run("dice", "loss.name=dice", "training.epochs=1")
    return folder


def by_hand(run):
    """Return the recorded epsilons of adapted epochs and those of eq. 11 and 12, (E, n) each.

    Computed from the files of a run with h5py and NumPy only.
    """
    assessments = {}
    for path in (run / "uncertainty").glob("epoch_*.h5"):
        with h5py.File(path) as file:
            assessments[int(path.stem[6:])] = file["difficulty"][:]
    with h5py.File(run / "schedule.h5") as file:
        adapted = file["assessed"][:] >= 0
        difficulty = np.stack([assessments[epoch] for epoch in file["assessed"][:][adapted]])
        epsilon, group = file["epsilon"][:][adapted], file["group"][:][adapted]
        percentile, sigma = file["statistics"][:][group].transpose(2, 0, 1)
    control = yaml.safe_load((run / "config.yaml").read_text())["control"]
    low, high = control["epsilon_min"], control["epsilon_max"]
    normalised = (difficulty - percentile) / (sigma + control["delta"])
    return epsilon, low + (high - low) / (1 + np.exp(-control["sensitivity"] * normalised))


ADAPTIVE = ("batch", "early", "labels", "labels-dataset")


class TestStatistics:
    """Statistics of eq. 11 as used in training."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ADAPTIVE)
    def test_every_epsilon_follows_from_the_files(self, runs, name):
        epsilon, expected = by_hand(runs / name)
        largest = np.abs(epsilon - expected).max()
        print(f"{name}: {epsilon.size} epsilons, largest difference {largest:.2g}")
        assert np.ptp(epsilon) > 0.1 and largest <= 1e-6

    @pytest.mark.parametrize("name", ["batch", "labels"])
    def test_recorded_statistics_equal_those_of_the_batch(self, runs, name):
        """Images with equal group number form a batch: D_pct and sigma are median and deviation."""
        record = job.read_record(runs / name)
        difficulty = {one.epoch: one.difficulty for one in record.assessments}
        schedule, labels = record.schedule, len(record.labels)
        seen = 0
        for assessed, groups in zip(schedule.assessed, schedule.group, strict=True):
            for group in set(groups[groups >= 0]) if assessed >= 0 else ():
                members = np.flatnonzero(groups == group)
                assert len(members) <= record.config.training.batch_size
                assert len(set(members % labels)) == 1
                d = difficulty[assessed][members]
                expected = (np.quantile(d, 0.5), np.sqrt(np.mean((d - d.mean()) ** 2)))
                np.testing.assert_allclose(schedule.statistics[group], expected, rtol=1e-12)
                seen += len(members)
        assert seen == (schedule.assessed >= 0).sum() * len(schedule.ids) > 0

    def test_dataset_statistics_have_one_pair_per_assessment_and_label(self, runs):
        schedule = read_schedule(runs / "labels-dataset/schedule.h5")
        record = job.read_record(runs / "labels-dataset")
        fed = [one for k, one in enumerate(record.assessments) if record.fed(k).any()]
        expected = [
            (np.median(d), d.std())
            for one in fed
            for d in (one.difficulty[0::2], one.difficulty[1::2])
        ]
        np.testing.assert_allclose(schedule.statistics, expected, rtol=1e-12)

    @pytest.mark.parametrize("name", ADAPTIVE)
    def test_checkpoint_and_file_hold_the_same_schedule(self, runs, name):
        of_file = read_schedule(runs / name / "schedule.h5")
        of_checkpoint = read_checkpoint(RunDirectory(runs / name).last).schedule
        for one in ("group", "statistics", "epsilon"):
            np.testing.assert_array_equal(getattr(of_file, one), getattr(of_checkpoint, one))
        assert ((of_file.group >= 0).all(axis=1) == (of_file.assessed >= 0)).all()

    def test_constant_epsilon_has_no_statistics(self, runs):
        with h5py.File(runs / "dice/schedule.h5") as file:
            assert "group" not in file and "statistics" not in file


def two_labels(folder):
    """Write a set of images with a bright disc of label 1 and a dark one of label 2."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    noise = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    for i in range(12):
        image, mask = noise.normal(120, 20, (32, 32)), np.zeros((32, 32), np.uint8)
        for value, shift in ((1, 60), (2, -60)):
            row, column = noise.integers(8, 24, 2)
            disc = (rows - row) ** 2 + (columns - column) ** 2 < (4 + i % 3) ** 2
            image[disc] += shift
            mask[disc] = value
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"images/{i}.png")
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
    return folder


def rewrite_schedule(path, change):
    last = RunDirectory(path).last
    checkpoint = read_checkpoint(last)
    write_checkpoint(last, replace(checkpoint, schedule=change(checkpoint.schedule)))


class TestRealRuns:
    @pytest.mark.parametrize("name", ADAPTIVE)
    def test_recompute_without_changes_is_equal_bit_for_bit(self, runs, name, tmp_path):
        out = tmp_path / "new.h5"
        found = job.recompute(runs / name, [], out)
        old, new = read_schedule(runs / name / "schedule.h5"), read_schedule(out)
        assert old.epsilon.tobytes() == new.epsilon.tobytes()
        assert (new.ids, new.labels) == (old.ids, old.labels)
        assert np.array_equal(new.epochs, old.epochs)
        assert np.array_equal(new.assessed, old.assessed)
        assert np.array_equal(new.group, old.group)
        assert np.array_equal(new.statistics, old.statistics)
        assert all(row["largest_change"] == 0 for row in found.rows) and not found.notes

    def test_fixture_runs_have_the_intended_settings(self, runs):
        assert len(read_schedule(runs / "batch/schedule.h5").epochs) == 6
        early = job.read_record(runs / "early")
        epochs = early.schedule.epochs.tolist()
        assert len(epochs) < early.config.training.epochs
        assert [one.epoch for one in early.assessments] == [0, *epochs]
        assert job.read_record(runs / "labels").labels == ["bright", "dark"]
        # Epsilons must differ, or recomputing them would prove nothing.
        assert all(
            np.unique(job.read_record(runs / name).schedule.epsilon).size > 4 for name in ADAPTIVE
        )

    def test_recompute_uses_the_batches_of_the_run(self, runs):
        """Otherwise the bit-for-bit test would not show that the right batches were used."""
        record = job.read_record(runs / "batch")
        training = record.config.training.model_copy(update={"seed": 5})
        other = record.config.model_copy(update={"training": training})
        assert not np.array_equal(
            recorded_schedule.recompute(record, other).epsilon, record.schedule.epsilon
        )

    def test_existing_file_is_not_overwritten(self, runs, tmp_path):
        taken = tmp_path / "taken.h5"
        taken.write_text("mine")
        with pytest.raises(PolysegError, match="exists"):
            job.recompute(runs / "batch", [], taken)
        with pytest.raises(PolysegError, match="exists"):
            job.export(runs / "batch", taken)
        assert taken.read_text() == "mine"

    def test_running_training_can_be_read(self, runs, tmp_path):
        """History, schedule and assessments may be newer than the checkpoint, which is decisive."""
        copy = tmp_path / "training"
        shutil.copytree(runs / "batch", copy)
        for name in ("last", "best"):
            file = f"checkpoints/{name}.safetensors"
            shutil.copy(runs / "earlier" / file, copy / file)
        record = job.read_record(copy)
        assert [one.epoch for one in record.assessments] == [1, 3]
        assert record.schedule.epochs.tolist() == [1, 2, 3] and len(record.wrong_sign) == 3
        assert len(schedule_tables.overview(record)) == 2
        assert np.array_equal(
            recorded_schedule.recompute(record, record.config).epsilon,
            read_schedule(runs / "earlier/schedule.h5").epsilon,
        )

    @pytest.mark.slow
    def test_run_before_its_first_epoch(self, runs, tmp_path, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("polyseg.training.trainer.Trainer._run_epoch", stop)
        for name, start in (("assessed", 0), ("not", 2)):
            config = [*FAST, f"output.path={tmp_path / name}", f"control.start={start}"]
            with pytest.raises(KeyboardInterrupt):
                train(load_config(overrides=config))
        (row,) = job.show(tmp_path / "assessed").rows
        assert row["epoch"] == 0 and math.isnan(row["epsilon_q50"])
        assert figures_job.plot([tmp_path / "assessed"], tmp_path / "figures").files
        with pytest.raises(PolysegError, match="has no schedule before its first epoch"):
            job.recompute(tmp_path / "assessed")
        with pytest.raises(PolysegError, match="no assessment yet; the first follows epoch 2"):
            job.show(tmp_path / "not")

    def test_run_without_assessments_is_refused_in_one_line(self, runs, tmp_path):
        with pytest.raises(PolysegError, match=r"has no assessments, because its loss \(dice\)"):
            job.read_record(runs / "dice")
        with pytest.raises(PolysegError, match="is not a run"):
            job.read_record(tmp_path)

    def test_recomputed_schedule_can_be_replayed(self, runs, tmp_path):
        new, place = tmp_path / "new.h5", tmp_path / "replayed"
        job.recompute(runs / "labels", ["control.sensitivity=3"], new)
        recorded = RunDirectory(runs / "labels").checkpoint_to_resume().config
        control = recorded.control.model_copy(update={"replay": str(new)})
        output = recorded.output.model_copy(update={"path": str(place)})
        train(recorded.model_copy(update={"control": control, "output": output}))
        replayed = read_schedule(place / "schedule.h5")
        assert np.array_equal(replayed.epsilon, read_schedule(new).epsilon)
        with pytest.raises(
            PolysegError, match=r"it replayed another run; .* are in its schedule\.h5"
        ):
            job.show(place)

    def test_replaced_assessment_is_refused(self, runs, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(runs / "batch", copy)
        shutil.copy(copy / "uncertainty/epoch_0001.h5", copy / "uncertainty/epoch_0003.h5")
        with pytest.raises(PolysegError, match="sha256 differs"):
            job.show(copy)

    def test_schedule_of_other_images_is_refused(self, runs, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(runs / "batch", copy)
        rewrite_schedule(copy, lambda schedule: replace(schedule, ids=schedule.ids[::-1]))
        with pytest.raises(PolysegError, match="are of different images"):
            job.show(copy)

    def test_schedule_that_does_not_follow_from_the_record_gives_a_warning(
        self, runs, tmp_path, caplog
    ):
        copy = tmp_path / "copy"
        shutil.copytree(runs / "batch", copy)
        rewrite_schedule(
            copy, lambda schedule: replace(schedule, epsilon=schedule.epsilon[::-1].copy())
        )
        job.recompute(copy, ["control.sensitivity=2"])
        assert "its own settings give epsilons that differ" in caplog.text

    def test_schedule_is_read_from_the_checkpoint(self, runs, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(runs / "batch", copy)
        wanted = job.show(copy)
        (copy / "schedule.h5").write_bytes(b"of the epoch that is being committed")
        np.testing.assert_equal(asdict(job.show(copy)), asdict(wanted))

    def test_wrong_sign_shares_equal_the_history(self, runs):
        for name in ("batch", "labels"):
            record = job.read_record(runs / name)
            with (runs / name / "history.csv").open() as stream:
                counts = [float(row["wrong_sign_images"]) for row in csv.DictReader(stream)]
            np.testing.assert_allclose(
                record.wrong_sign, np.array(counts) / len(record.schedule.ids)
            )
            assert ((record.wrong_sign >= 0) & (record.wrong_sign <= 1)).all()


class TestCommands:
    def test_show_prints_table_json_and_csv(self, polyseg, runs):
        answer = polyseg("schedule", "show", runs / "batch")
        assert answer.code == 0, answer.err
        assert "D_pct" in answer.out and "control.statistics=batch" in answer.out
        rows = json.loads(polyseg("schedule", "show", runs / "batch", "--json").out)
        assert [row["epoch"] for row in rows] == [1, 3, 5]
        assert rows[0]["spearman_previous"] is None
        table = polyseg("schedule", "show", runs / "batch", "--csv").out
        read = list(csv.DictReader(io.StringIO(table)))
        assert float(read[1]["sigma"]) == pytest.approx(rows[1]["sigma"])

    def test_show_prints_labels(self, polyseg, runs):
        answer = polyseg("schedule", "show", runs / "labels")
        assert answer.code == 0 and "bright" in answer.out and "over all labels" in answer.out
        assert "statistics=batch" not in polyseg("schedule", "show", runs / "early").out

    def test_show_prints_the_history_of_an_image(self, polyseg, runs):
        identity = job.read_record(runs / "batch").schedule.ids[0]
        answer = polyseg("schedule", "show", runs / "batch", "--image", identity)
        assert answer.code == 0 and "rank" in answer.out and " ± " in answer.out
        assert "epsilon differs from epoch to epoch" in " ".join(answer.out.split())
        asked = ("schedule", "show", runs / "batch", "--image", identity)
        rows = json.loads(polyseg(*asked, "--json").out)
        # Assessed after epochs 1, 3 and 5 of 6; each batch has its own statistics.
        assert [row["from_epoch"] for row in rows] == [2, 3, 4, 5, 6]
        assert [row["epoch"] for row in rows] == [1, 1, 3, 3, 5]
        read = list(csv.DictReader(io.StringIO(polyseg(*asked, "--csv").out)))
        assert [float(row["sigma"]) for row in read] == pytest.approx([r["sigma"] for r in rows])

    def test_printed_numbers_of_an_image_give_its_epsilon(self, polyseg, runs):
        """The printed digits are enough for three digits of epsilon."""
        for name in ("batch", "early", "labels", "labels-dataset"):
            identity = job.read_record(runs / name).schedule.ids[0]
            text = polyseg("schedule", "show", runs / name, "--image", identity).out
            shown = [
                [float(cell) for cell in line.replace(" ", "").split("│")[2:-1]]
                for line in text.partition("D_norm")[2].splitlines()
                if line.count("│") == 7
            ]
            assert shown
            for d, center, sigma, normalised, epsilon in shown:
                assert (d - center) / (sigma + 1e-9) == pytest.approx(normalised, abs=5e-3)
                assert -0.4 + 1.4 / (1 + math.exp(-normalised)) == pytest.approx(epsilon, abs=1e-3)
        refused = polyseg("schedule", "show", runs / "batch", "--image", "nobody")
        assert refused.code == 2 and refused.err.startswith("error: --image nobody")

    def test_ids_are_not_cut_in_narrow_terminals(self, polyseg, monkeypatch):
        names = [f"{k}_" + "long" * 20 for k in range(2)]
        record = make_record({1: np.arange(2.0)}, 2)
        schedule_ = replace(record.schedule, ids=names)
        assessed = [replace(one, ids=names) for one in record.assessments]
        record = replace(record, assessments=assessed, schedule=schedule_)
        monkeypatch.setattr(job, "read_record", lambda _: record)
        for width in ("80", "40"):
            monkeypatch.setenv("COLUMNS", width)
            text = polyseg("schedule", "show", "somewhere").out
            row = next(line for line in text.splitlines() if names[0] in line)
            assert names[1] in row

    @pytest.mark.parametrize("command", ["show", "plot", "recompute", "export", "validity"])
    def test_file_of_a_run_is_refused_with_the_path_of_the_run(self, polyseg, runs, command):
        for inside in ("schedule.h5", "uncertainty/epoch_0001.h5"):
            answer = polyseg("schedule", command, runs / "batch" / inside)
            assert answer.code == 2 and answer.err.endswith(f"give the run, {runs / 'batch'}\n")

    def test_unknown_setting_is_refused_with_a_suggestion(self, polyseg, runs):
        asked = ("schedule", "recompute", runs / "batch", "--set")
        answer = polyseg(*asked, "control.sensitvity=3")
        assert answer.code == 2 and answer.err == (
            "error: --set control.sensitvity: there is no such setting; did you mean "
            "control.sensitivity?\n"
        )
        assert "polyseg config show" in polyseg(*asked, "qqqqq=3").err

    def test_recompute_writes_and_shows_the_new_schedule(self, polyseg, runs, tmp_path):
        out = tmp_path / "new.h5"
        asked = ("schedule", "recompute", runs / "batch", "--set", "control.sensitivity=3")
        answer = polyseg(*asked, "--out", out)
        assert answer.code == 0, answer.err
        assert "2–3" in answer.out and str(out) in answer.out
        assert "would measure other difficulties" in " ".join(answer.out.split())
        new, old = read_schedule(out), read_schedule(runs / "batch/schedule.h5")
        assert np.ptp(new.epsilon) > np.ptp(old.epsilon)
        rows = json.loads(polyseg(*asked, "--json").out)
        assert rows[1]["largest_change"] > 0
        assert polyseg(*asked, "--out", out).code == 2
        refused = polyseg("schedule", "recompute", runs / "batch", "--set", "training.seed=1")
        assert refused.code == 2 and "--set training.seed: schedule recompute" in refused.err

    @pytest.mark.parametrize("name", ADAPTIVE)
    def test_export_writes_one_row_per_image_and_assessment(self, polyseg, runs, tmp_path, name):
        out = tmp_path / "table.csv"
        assert polyseg("schedule", "export", runs / name, "--out", out).out.strip() == str(out)
        text = polyseg("schedule", "export", runs / name).out
        assert out.read_text() == text
        rows = list(csv.DictReader(io.StringIO(text)))
        record = job.read_record(runs / name)
        assert len(rows) == len(record.assessments) * len(record.schedule.ids)
        assert ("label" in rows[0]) == name.startswith("labels")
        assert {row["fallback"] for row in rows} <= set(FALLBACKS)
        assert (
            rows[-1]["epsilon"] == "" or record.assessments[-1].epoch < record.schedule.epochs[-1]
        )
        assert np.float32(rows[0]["epsilon"]) == record.next_epsilon(0)[0]

    def test_validity_prints_and_plots_correlations(self, polyseg, runs, tmp_path):
        out = tmp_path / "validity"
        answer = polyseg("schedule", "validity", runs / "batch", "--out", out)
        assert answer.code == 0, answer.err
        assert "mutual information" in answer.out and "training loss" in answer.out
        assert sorted(path.name for path in out.iterdir()) == ["validity.pdf", "validity.png"]
        # The figure shows the measures of the table.
        assert set(figures_job._PANELS) == set(score_correlations.MEASURES)
        rows = json.loads(polyseg("schedule", "validity", runs / "batch", "--json").out)
        assert {row["score"] for row in rows} == set(
            job.read_record(runs / "batch").assessments[0].scores
        )
        assert not list((runs / "batch").glob("validity-*"))  # --json alone writes no figure
        text = polyseg("schedule", "validity", runs / "batch", "--csv").out
        assert len(text.splitlines()) == len(rows) + 1

    @pytest.mark.usefixtures("quick_figures")
    def test_each_label_has_its_own_figures(self, polyseg, runs, tmp_path):
        polyseg("schedule", "validity", runs / "labels", "--out", tmp_path / "labels")
        assert (tmp_path / "labels/2_dark/validity.png").is_file()
        assert polyseg("schedule", "plot", runs / "labels-dataset", "-q").code == 0
        (folder,) = (runs / "labels-dataset").glob("schedule-2*")
        assert (folder / "1_bright/epsilon_map.pdf").is_file()

    @pytest.mark.slow
    def test_plot_writes_figures_of_one_run(self, polyseg, runs, tmp_path):
        answer = polyseg("schedule", "plot", runs / "batch", "--out", tmp_path / "one")
        assert answer.code == 0, answer.err
        names = {"epsilon", "epsilon_map", "difficulty_dice", "rank_stability"}
        assert {path.name for path in (tmp_path / "one").iterdir()} == {
            f"{name}.{kind}" for name in names for kind in ("png", "pdf")
        }

    @pytest.mark.usefixtures("quick_figures")
    def test_plot_writes_figures_of_several_runs(self, polyseg, runs, tmp_path):
        both = polyseg(
            "schedule", "plot", runs / "batch", runs / "early", "--out", tmp_path / "two"
        )
        assert both.code == 0, both.err
        folders = {path.name for path in (tmp_path / "two").iterdir() if path.is_dir()}
        assert folders == {"1_batch", "2_early"} and (tmp_path / "two/epsilon.png").is_file()
        mixed = polyseg("schedule", "plot", runs / "batch", runs / "labels")
        assert mixed.code == 2 and "other labels" in mixed.err

    @pytest.mark.parametrize("command", ["show", "validity"])
    def test_table_and_json_exclude_each_other(self, polyseg, runs, command):
        answer = polyseg("schedule", command, runs / "batch", "--json", "--csv")
        assert answer.code == 2 and "choose one" in answer.err

    @pytest.mark.parametrize("command", ["show", "plot", "recompute", "export", "validity"])
    def test_run_without_assessments_is_one_line(self, polyseg, runs, command):
        answer = polyseg("schedule", command, runs / "dice")
        assert answer.code == 2 and answer.err.count("\n") == 1 and not answer.out
        assert "has no assessments" in answer.err

    @pytest.mark.parametrize("name", ["[red]run", ":bee:"])
    def test_names_are_printed_without_markup_and_emoji(self, polyseg, runs, tmp_path, name):
        place = tmp_path / name
        shutil.copytree(runs / "early", place)
        assert name in "".join(polyseg("schedule", "show", place).out.split())


def test_schedule_commands_do_not_change_a_run(polyseg, runs):
    run = RunDirectory(Path(runs / "early"))
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    for command in (["show"], ["recompute", "--set", "control.delta=1e-6"], ["export"]):
        polyseg("schedule", command[0], run.path, *command[1:])
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}

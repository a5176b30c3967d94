"""Replay: training with a recorded schedule, and control arms that permute it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyseg.adaptive.replay import arm_of_difficulty, epsilon_of_batch, fit_schedule, replay_arm
from polyseg.choices import REPLAY_ARMS
from polyseg.commands import schedule as job
from polyseg.commands.train import plan, train
from polyseg.errors import PolysegError
from polyseg.records import Schedule
from polyseg.runs.record_files import read_schedule, write_schedule
from polyseg.runs.run_folder import RunDirectory
from polyseg.system.seeds import derive_seed
from tests.test_schedule import assessment, two_labels
from tests.test_train import assert_same_weights, history_of, run_of, weights_of

FIVE_EPOCHS = ("training.epochs=5", "control.start=1", "control.every=2")


def schedule_of(epsilon, assessed=None, labels=None):
    epsilon = np.asarray(epsilon, np.float32)
    ids = [f"image {i // len(set(labels or ['']))}" for i in range(epsilon.shape[1])]
    epochs = np.arange(1, len(epsilon) + 1)
    return Schedule(ids, epochs, epsilon, labels, None if assessed is None else np.array(assessed))


ARMS_OF_DIFFICULTY = [name for name, row in REPLAY_ARMS.items() if row.of_difficulty]


def replay_of(run, tiny, *more, name="replayed"):
    return run_of(tiny(name, *FIVE_EPOCHS, f"control.replay={run.path}", *more))


@pytest.mark.parametrize("statistics", ["batch", pytest.param("dataset", marks=pytest.mark.slow)])
def test_replay_equals_its_original_bit_for_bit(tiny, finished, statistics):
    settings = (f"control.statistics={statistics}", "training.seed=3")
    original = finished("original", *FIVE_EPOCHS, *settings)
    again = replay_of(original, tiny, *settings)
    for which in ("last", "best"):
        assert_same_weights(weights_of(original, which), weights_of(again, which))
    one, other = read_schedule(original.schedule), read_schedule(again.schedule)
    np.testing.assert_array_equal(one.epsilon, other.epsilon)
    assert one.assessed.tolist() == other.assessed.tolist() == [-1, 1, 1, 3, 3]
    assert len(np.unique(one.epsilon)) > 5
    for name in ("group", "statistics"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.group[1:] >= 0).all() and len(one.statistics) > 1
    assert not (again.path / "uncertainty").exists()
    without = [{k: v for k, v in row.items() if k != "assessed"} for row in history_of(original)]
    assert without == [
        {k: v for k, v in row.items() if k != "assessed"} for row in history_of(again)
    ]


@pytest.mark.slow
def test_replay_arm_trains_another_network_with_the_same_epsilons(tiny, finished):
    original = finished("original", *FIVE_EPOCHS)
    recorded = read_schedule(original.schedule).epsilon
    for arm in ("shuffled", "mean", "inverted"):
        run = replay_of(original, tiny, f"control.replay_arm={arm}", name=arm)
        used = read_schedule(run.schedule).epsilon
        assert not np.array_equal(used, recorded)
        np.testing.assert_array_equal(used, read_schedule(run.replay).epsilon)
        np.testing.assert_allclose(used.mean(axis=1), recorded.mean(axis=1), atol=1e-6)
        # The recorded statistics do not determine these epsilons.
        for path in (run.schedule, run.replay):
            assert read_schedule(path).group is None and read_schedule(path).statistics is None
        with pytest.raises(AssertionError):
            assert_same_weights(weights_of(original), weights_of(run))


@pytest.mark.slow
def test_resumed_replay_uses_its_own_schedule_copy(tiny, finished):
    original = finished("original", *FIVE_EPOCHS)
    settings = ("control.replay_arm=shuffled",)
    whole = replay_of(original, tiny, *settings, name="whole")
    first = tiny("parts", *FIVE_EPOCHS, f"control.replay={original.path}", *settings)
    two = first.model_copy(update={"training": first.training.model_copy(update={"epochs": 2})})
    parts = run_of(two)
    original.path.rename(original.path.with_name("gone"))
    with pytest.raises(PolysegError, match="original: there is no such file"):
        train(tiny("new", *FIVE_EPOCHS, f"control.replay={original.path}"))
    # The learning rate depends on the number of epochs, so only the epsilons can be equal.
    train(first, resume=True)
    np.testing.assert_array_equal(
        read_schedule(parts.schedule).epsilon, read_schedule(whole.schedule).epsilon
    )


def test_replaced_schedule_is_refused_on_resume(tiny, finished):
    original = finished("original", *FIVE_EPOCHS)
    config = tiny("run", *FIVE_EPOCHS, f"control.replay={original.path}", "training.epochs=3")
    run = run_of(config)
    schedule = read_schedule(run.replay)
    # An epsilon of a later epoch.
    schedule.epsilon[-1] += 0.01
    write_schedule(run.replay, schedule)
    longer = config.model_copy(
        update={"training": config.training.model_copy(update={"epochs": 5})}
    )
    with pytest.raises(PolysegError, match="is not the file that the run recorded"):
        train(longer, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["schedule.h5", "checkpoints"])
def test_run_is_replayed_from_its_file_or_its_checkpoint(tiny, finished, kept):
    original = finished("original", *FIVE_EPOCHS)
    first = replay_of(original, tiny, name="first")
    shutil.rmtree(original.path / "checkpoints") if kept != "checkpoints" else (
        original.schedule.unlink()
    )
    second = replay_of(original, tiny, name="second")
    np.testing.assert_array_equal(
        read_schedule(first.schedule).epsilon, read_schedule(second.schedule).epsilon
    )


def test_missing_epochs_and_images_of_a_schedule_are_named(tiny, finished):
    original = finished("original", *FIVE_EPOCHS)
    with pytest.raises(PolysegError, match=r"lacks epoch 6 of 7; .* --epochs 5"):
        train(tiny("long", f"control.replay={original.path}", "training.epochs=7"))
    seven = tiny("other", *FIVE_EPOCHS, f"control.replay={original.path}", "training.seed=9")
    split = json.loads(original.split.read_text())
    moved = split["test"][0]
    split["train"].append(moved)
    split["test"] = split["test"][1:]
    (original.path / "moved.json").write_text(json.dumps(split))
    data = seven.data.model_copy(update={"split_file": str(original.path / "moved.json")})
    with pytest.raises(PolysegError, match=f"has no epsilon for {moved['id']};"):
        train(seven.model_copy(update={"data": data}))
    assert not (original.path.parent / "other").exists()


def test_dry_run_of_a_replay_has_no_passes(tiny, finished):
    original = finished("original", *FIVE_EPOCHS)
    found = plan(tiny("next", *FIVE_EPOCHS, f"control.replay={original.path}"))
    assert found["MC Dropout passes, all images together"] == 0
    assert found["assessed after epochs"] == []


def test_replay_refuses_epsilons_that_reward_misalignment():
    schedule = schedule_of([[0.0, -0.6]])
    with pytest.raises(PolysegError, match="misalignment is rewarded"):
        fit_schedule(schedule, schedule.ids, [""], 1, 1, "file")
    endless = schedule_of([[0.0, np.nan]])
    with pytest.raises(PolysegError, match=r"epsilons from nan"):
        fit_schedule(endless, endless.ids, [""], 1, 1, "file")
    with pytest.raises(PolysegError, match="not 1, 2, 3"):
        fit_schedule(
            dataclasses.replace(schedule_of([[0.0, 1.0]]), epochs=np.array([4])),
            schedule.ids, [""], 1, 1, "file",
        )  # fmt: skip


def test_schedule_columns_are_reordered_for_the_run():
    schedule = schedule_of([[0.0, 0.1, 0.2, 0.3]], labels=["x", "y", "x", "y"])
    fitted = fit_schedule(schedule, ["image 1", "image 0"], ["y", "x"], 1, 1, "file")
    assert fitted.ids == ["image 1", "image 1", "image 0", "image 0"]
    assert fitted.labels == ["y", "x", "y", "x"]
    np.testing.assert_allclose(fitted.epsilon, [[0.3, 0.2, 0.1, 0.0]])
    explained = dataclasses.replace(
        schedule, group=np.array([[0, 1, 2, -1]], np.int32), statistics=np.arange(6.0).reshape(3, 2)
    )
    fitted_too = fit_schedule(explained, ["image 1", "image 0"], ["y"], 1, 1, "file")
    np.testing.assert_array_equal(fitted_too.percentile_and_sigma(), [[[np.nan] * 2, [2, 3]]])
    batch = epsilon_of_batch(fitted, ["image 0"], epoch=1, labels=2)
    np.testing.assert_allclose(batch, [0.1, 0.0])
    with pytest.raises(PolysegError, match="has no epsilon for z of image 0"):
        fit_schedule(schedule, ["image 0"], ["x", "z"], 1, 1, "file")


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_arms_keep_the_epsilons_of_each_epoch(images, epochs, seed):
    rng = np.random.default_rng(seed)
    schedule = schedule_of(rng.choice(rng.random(4), (epochs, images)), [0] * epochs)
    ordered = np.sort(schedule.epsilon, axis=1)
    for arm in ("shuffled", "inverted"):
        np.testing.assert_array_equal(
            np.sort(replay_arm(schedule, arm, seed).epsilon, axis=1), ordered
        )
    inverted = replay_arm(schedule, "inverted", seed).epsilon
    for before, after in zip(schedule.epsilon, inverted, strict=True):
        lower = before[:, None] < before[None]
        assert (after[:, None] >= after[None])[lower].all()
    mean = replay_arm(schedule, "mean", seed).epsilon
    np.testing.assert_allclose(mean, np.repeat(schedule.epsilon.mean(1)[:, None], images, 1), 1e-6)
    assert replay_arm(schedule, "recorded", seed) is schedule


def test_shuffled_arm_keeps_its_permutation_until_the_next_assessment():
    """Each column holds its own index, so that the values show the permutation."""
    epsilon = np.tile(np.arange(40, dtype=np.float32), (6, 1))
    schedule = schedule_of(epsilon, assessed=[-1, 1, 1, 3, 3, 5])
    shuffled = replay_arm(schedule, "shuffled", 0).epsilon
    for one, other in ((1, 2), (3, 4)):
        np.testing.assert_array_equal(shuffled[one], shuffled[other])
    for one, other in ((1, 3), (3, 5), (1, 5)):
        assert (shuffled[one] != shuffled[other]).any()
    assert (replay_arm(schedule, "shuffled", 1).epsilon != shuffled).any()


def test_labels_of_an_image_are_shuffled_together():
    epsilon = np.array([[10 * i + k for i in range(20) for k in range(2)]], np.float32)
    schedule = schedule_of(epsilon, labels=["x", "y"] * 20)
    shuffled = replay_arm(schedule, "shuffled", 0).epsilon.reshape(20, 2)
    assert (shuffled[:, 1] == shuffled[:, 0] + 1).all()
    assert (shuffled != epsilon.reshape(20, 2)).any()
    inverted = replay_arm(schedule, "inverted", 0).epsilon.reshape(20, 2)
    np.testing.assert_array_equal(inverted, epsilon.reshape(20, 2)[::-1])
    mean = replay_arm(schedule, "mean", 0).epsilon.reshape(20, 2)
    np.testing.assert_allclose(mean, [[95, 96]] * 20)


def test_permuted_arm_keeps_one_permutation_for_the_whole_run():
    labels = ["x", "y"] * 20
    found = [assessment(e, 100 * e + np.arange(40.0), labels=labels) for e in (1, 3)]
    one, other = (arm_of_difficulty(a, "permuted", 0).difficulty for a in found)
    np.testing.assert_array_equal(one - 100, other - 300)
    assert sorted(one - 100) == list(range(40)) and (one - 100 != np.arange(40)).any()
    # The labels of an image stay together.
    np.testing.assert_array_equal(one[1::2], one[::2] + 1)
    assert (one != arm_of_difficulty(found[0], "permuted", 1).difficulty).any()
    assert arm_of_difficulty(found[0], "shuffled", 0) is found[0]


def test_size_and_loss_arms_replace_the_difficulty():
    pixels = np.array([0, 1, 20, 5], np.int64)
    found = assessment(1, np.arange(4.0), mask_pixels=pixels)
    expected = [0, 0, -np.log(20), -np.log(5)]
    np.testing.assert_allclose(arm_of_difficulty(found, "size", 0).difficulty, expected)
    loss = arm_of_difficulty(found, "loss", 0).difficulty
    np.testing.assert_array_equal(loss, found.scores["training_loss"])
    unknown = dataclasses.replace(found, mask_pixels=None, region="image")
    with pytest.raises(PolysegError, match="size: the run did not record the sizes"):
        arm_of_difficulty(unknown, "size", 0)


def epsilons_by_hand(record, difficulty, batches):
    """Return eq. 11 and 12 with the defaults in NumPy, over the batches recorded as groups."""
    expected = np.full(batches.shape, np.nan)
    for k in range(len(record.assessments)):
        for epoch in np.flatnonzero(record.fed(k)):
            for batch in np.unique(batches[epoch]):
                together = batches[epoch] == batch
                d = difficulty[k][together]
                normalised = (d - np.median(d)) / (d.std() + 1e-9)
                expected[epoch, together] = -0.4 + 1.4 / (1 + np.exp(-normalised))
    return expected


@pytest.mark.parametrize("labels", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arm", ARMS_OF_DIFFICULTY)
def test_difficulty_arms_apply_the_equations_to_the_recorded_batches(
    tiny, trained_once, tmp_path_factory, tmp_path, arm, labels
):
    several = ()
    if labels == 2:
        folder = tmp_path_factory.getbasetemp() / "two labels"
        if not folder.exists():
            two_labels(folder)
        several = (f"data.path={folder}", "data.foreground={bright: 1, dark: 2}")
    original = RunDirectory(trained_once(*FIVE_EPOCHS, *several))
    settings = (f"control.replay_arm={arm}", "control.replay_seed=5", *several)
    run = replay_of(original, tiny, *settings, name=arm)
    record, found = job.read_record(original.path), read_schedule(run.replay)
    n = len(record.schedule.ids)
    generator = np.random.default_rng(derive_seed(5, "replay", "whole run"))
    order = generator.permutation(n // labels)
    given = {
        "permuted": [a.difficulty.reshape(-1, labels)[order].ravel() for a in record.assessments],
        "size": [-np.log(np.maximum(a.mask_pixels, 1)) for a in record.assessments],
        "loss": [a.scores["training_loss"] for a in record.assessments],
    }[arm]
    # Batches hold the same images as in the original.
    expected = epsilons_by_hand(record, given, record.schedule.group)
    adapted = found.assessed >= 0
    assert found.epsilon.shape == (5, n) and adapted.sum() == 4
    np.testing.assert_allclose(found.epsilon[adapted], expected[adapted], atol=1e-6)
    used = read_schedule(run.schedule)
    np.testing.assert_array_equal(used.epsilon, found.epsilon)
    np.testing.assert_array_equal(used.group, found.group)
    assert (found.epsilon != record.schedule.epsilon).any()
    told = job.recompute(original.path, settings[:2], tmp_path / "arm.h5")
    assert told.rows
    np.testing.assert_array_equal(read_schedule(tmp_path / "arm.h5").epsilon, found.epsilon)


def test_difficulty_arm_needs_the_assessments_of_the_run(tiny, finished):
    original = finished("original", *FIVE_EPOCHS)
    arm = ("control.replay_arm=permuted",)
    with pytest.raises(PolysegError, match="permuted needs the assessments of a run; name its fol"):
        train(tiny("new", *FIVE_EPOCHS, f"control.replay={original.schedule}", *arm))
    with pytest.raises(PolysegError, match="was not assessed after epoch 2"):
        train(tiny("new", *FIVE_EPOCHS, f"control.replay={original.path}", *arm, "control.start=2"))


@pytest.mark.slow
def test_replay_of_a_permuted_arm_equals_that_arm(tiny, finished):
    original = finished("original", *FIVE_EPOCHS)
    first = replay_of(original, tiny, "control.replay_arm=permuted", name="first")
    again = replay_of(first, tiny, name="again")
    assert_same_weights(weights_of(first), weights_of(again))


@pytest.mark.slow
def test_replay_seed_changes_the_arm_and_defaults_to_the_run_seed(tiny, finished):
    original = finished("original", *FIVE_EPOCHS)
    found = []
    for seed in ("null", "0", "1"):
        arm = ("control.replay_arm=permuted", f"control.replay_seed={seed}")
        run = replay_of(original, tiny, *arm, name=f"seed {seed}")
        found.append(read_schedule(run.replay).epsilon)
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()

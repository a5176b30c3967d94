"""Training runs: reproducibility, adaptive epsilons, interruption, resuming, and errors."""

import csv
import dataclasses
import functools
import itertools
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit

from polyseg.adaptive.controller import Adapted
from polyseg.commands.train import _describe_data, plan, train
from polyseg.config import TrainingConfig
from polyseg.data.dataset import arrays_as_set, make_demo
from polyseg.errors import Interrupted, PolysegError
from polyseg.metrics.significance import rank_correlation
from polyseg.networks.segmentation_network import hash_weights
from polyseg.runs import run_folder as run_folder_module
from polyseg.runs.assessment_text import describe_order
from polyseg.runs.checkpoints import read_checkpoint, write_checkpoint
from polyseg.runs.history import COLUMNS, row_of
from polyseg.runs.record_files import read_assessment, read_schedule
from polyseg.runs.run_folder import RunDirectory
from polyseg.runs.weights import network_of
from polyseg.system.files import sha256_of_file
from polyseg.training import nonfinite, optimizers
from polyseg.training import step as step_module
from polyseg.training import trainer as trainer_module
from polyseg.training.log_lines import epoch_line


def run_of(config):
    train(config)
    return RunDirectory(Path(config.output.path))


def history_of(run):
    with run.history.open() as stream:
        return [
            {key: value for key, value in row.items() if not key.startswith("seconds")}
            for row in csv.DictReader(stream)
        ]


def weights_of(run, which="last"):
    checkpoint = read_checkpoint(getattr(run, which))
    return {**checkpoint.weights, **{f"opt {k}": v for k, v in checkpoint.optimizer.items()}}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert torch.equal(values, second[name]), name


def assert_same_run(first, second):
    assert_same_weights(weights_of(first), weights_of(second))
    assert_same_weights(weights_of(first, "best"), weights_of(second, "best"))
    assert history_of(first) == history_of(second)
    one, other = read_schedule(first.schedule), read_schedule(second.schedule)
    assert one.ids == other.ids
    np.testing.assert_array_equal(one.epsilon, other.epsilon)
    names = sorted(path.name for path in (first.path / "uncertainty").glob("*.h5"))
    assert names == sorted(path.name for path in (second.path / "uncertainty").glob("*.h5"))
    for name in names:
        one = read_assessment(first.path / "uncertainty" / name)
        other = read_assessment(second.path / "uncertainty" / name)
        for metric, values in one.scores.items():
            np.testing.assert_array_equal(values, other.scores[metric])


def test_runs_are_equal_only_for_equal_seeds(tiny, finished):
    first = finished("one")
    assert_same_run(first, run_of(tiny("two")))
    assert history_of(first) != history_of(run_of(tiny("three", "training.seed=2")))


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["batch", "dataset"])
def test_adaptive_run_with_equal_bounds_equals_the_constant_run(tiny, finished, statistics):
    """Assessments change only epsilon."""
    plain = finished("plain", "control.enabled=false", "loss.epsilon=0.25")
    pinned = run_of(
        tiny(
            "pinned",
            f"control.statistics={statistics}",
            "loss.epsilon=0.25",
            "control.epsilon_min=0.25",
            "control.epsilon_max=0.25",
        )
    )
    assert len(list((pinned.path / "uncertainty").iterdir())) == 3
    assert not (plain.path / "uncertainty").exists()
    assert_same_weights(weights_of(plain), weights_of(pinned))
    assert (read_schedule(pinned.schedule).epsilon == np.float32(0.25)).all()


@pytest.mark.slow
def test_results_do_not_depend_on_workers(tiny, finished):
    assert_same_run(finished("none"), run_of(tiny("two", "training.workers=2")))


def expected_epsilon(difficulty):
    """Return eq. 11 and 12 with the default settings, using SciPy's logistic function."""
    normalised = (difficulty - np.median(difficulty)) / (np.std(difficulty) + 1e-9)
    return -0.4 + 1.4 * expit(normalised)


@pytest.mark.parametrize("statistics", ["batch", "dataset"])
def test_assessment_determines_epsilons_of_later_epochs(tiny, statistics):
    """With all images in one batch both kinds of statistics are those of all images."""
    run = run_of(
        tiny(
            "run",
            "training.batch_size=64",
            "training.epochs=5",
            "control.start=2",
            "control.every=2",
            f"control.statistics={statistics}",
            "loss.epsilon=0.1",
        )
    )
    schedule = read_schedule(run.schedule)
    assert schedule.epochs.tolist() == [1, 2, 3, 4, 5]
    assert (schedule.epsilon[:2] == np.float32(0.1)).all()
    for epoch, fed in ((2, (3, 4)), (4, (5,))):
        assessment = read_assessment(run.assessment(epoch))
        assert assessment.ids == schedule.ids
        expected = expected_epsilon(assessment.difficulty)
        for later in fed:
            np.testing.assert_allclose(schedule.epsilon[later - 1], expected, atol=1e-6)
        if statistics == "dataset":
            np.testing.assert_allclose(assessment.epsilon, expected, atol=1e-12)
        else:
            assert assessment.epsilon is None
    assert [row["assessed"] for row in history_of(run)] == ["0", "1", "0", "1", "0"]


@pytest.mark.slow
def test_log_explains_once_that_the_training_loss_changes_its_scale(tiny, caplog):
    caplog.set_level("INFO", "polyseg")
    run = run_of(tiny("run", "training.epochs=4", "control.start=2", "loss.epsilon=0.1"))
    said = [line for line in caplog.messages if "its own epsilon" in line]
    assert len(said) == 1 and said[0].startswith("from epoch 3 on")
    assert "at the constant epsilon 0.1" in said[0]
    differs = [row["train_loss"] != row["train_loss_constant"] for row in history_of(run)]
    assert differs == [False, False, True, True]
    caplog.clear()
    run_of(tiny("constant", "control.enabled=false"))
    run_of(tiny("from_the_start", "control.start=0"))
    assert not [line for line in caplog.messages if "its own epsilon" in line]


@pytest.mark.slow
def test_batch_statistics_use_the_images_of_the_batch(tiny):
    """The median image of an odd batch gets the middle of the range at any difficulty."""
    run = run_of(tiny("run", "training.batch_size=1"))
    epsilon = read_schedule(run.schedule).epsilon
    np.testing.assert_allclose(epsilon[1:], 0.3, atol=1e-6)


def test_checkpoint_and_assessments_record_matching_hashes(finished):
    run = finished()
    checkpoint = read_checkpoint(run.last)
    assessment = read_assessment(run.assessment(3))
    assert hash_weights(network_of(checkpoint)) == assessment.weights_sha256
    assert checkpoint.assessments == {
        path.name: sha256_of_file(path) for path in (run.path / "uncertainty").iterdir()
    }
    assert read_checkpoint(run.best).epoch == checkpoint.best_epoch


class Stop(Exception):
    """Raised in place of a crash of the machine."""


def stop_after(epoch):
    def progress(task, done, _):
        if task == "training" and done == epoch:
            raise Stop

    return progress


@pytest.mark.parametrize(
    ("optimizer", "epoch"),
    [
        ("adamw", 2),
        pytest.param("adamw", 1, marks=pytest.mark.slow),
        pytest.param("adam", 1, marks=pytest.mark.slow),
        pytest.param("sgd", 2, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_uninterrupted_run(tiny, finished, optimizer, epoch):
    whole = finished("whole", *[f"training.optimizer={optimizer}"] * (optimizer != "adamw"))
    config = tiny("stopped", f"training.optimizer={optimizer}")
    with pytest.raises(Stop):
        train(config, progress=stop_after(epoch))
    train(config, resume=True)
    assert_same_run(whole, RunDirectory(Path(config.output.path)))


def test_resume_after_a_crash_within_an_epoch_equals_uninterrupted_run(tiny, finished):
    whole = finished("whole")
    config = tiny("stopped")

    def progress(task, *_):
        if task.startswith("MC Dropout after epoch 2"):
            raise Stop

    with pytest.raises(Stop):
        train(config, progress=progress)
    stopped = RunDirectory(Path(config.output.path))
    assert read_checkpoint(stopped.last).epoch == 1
    # A crash between assessment and commit leaves such a file.
    (stopped.path / "uncertainty" / "epoch_0002.h5").write_bytes(b"torn")
    train(config, resume=True)
    assert_same_run(whole, stopped)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_ended_by_a_signal_can_be_resumed(tiny, finished, number):
    whole = finished("whole")
    config = tiny("stopped")

    def progress(task, done, _):
        if task == "epoch 2/3" and done == 4:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="after epoch 1; `polyseg train --resume") as end:
        train(config, progress=progress)
    assert end.value.number == number
    assert signal.getsignal(number) == before
    train(config, resume=True)
    assert_same_run(whole, RunDirectory(Path(config.output.path)))


@pytest.mark.slow
def test_more_epochs_continue_a_finished_run(tiny, finished):
    run = finished("run", "training.scheduler=constant")
    train(tiny("run", "training.scheduler=constant", "training.epochs=5"), resume=True)
    whole = run_of(tiny("whole", "training.scheduler=constant", "training.epochs=5"))
    assert_same_run(whole, run)
    assert "epochs: 5" in run.config.read_text()


def test_resume_error_names_the_settings_that_cannot_change(tiny, finished):
    finished()
    with pytest.raises(PolysegError, match=r"cannot change loss.epsilon 0.0 -> 0.5"):
        train(tiny("run", "loss.epsilon=0.5"), resume=True)


def files_of(run):
    return {path: path.read_bytes() for path in run.rglob("*.*") if path.name != "log.txt"}


@pytest.mark.parametrize("name", ["split.json", "environment.json", "uncertainty/epoch_0002.h5"])
@pytest.mark.parametrize("content", [None, b"changed"])
def test_resume_refuses_missing_or_changed_records_and_changes_no_file(
    tiny, finished, name, content
):
    run = finished().path
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    before = files_of(run)
    with pytest.raises(PolysegError, match=name):
        train(tiny("run", "training.epochs=5"), resume=True)
    assert before == files_of(run)


def test_lost_files_are_restored_from_the_checkpoint(tiny, finished):
    run = finished()
    train(tiny("run"), resume=True)  # The run now records the folder of the copy.
    before = files_of(run.path)
    names = ("history.csv", "schedule.h5", "config.yaml")
    for name in names:
        (run.path / name).unlink()
    train(tiny("run"), resume=True)
    for name in names:
        assert files_of(run.path)[run.path / name] == before[run.path / name]


def test_resume_uses_the_older_checkpoint_if_the_last_is_damaged(tiny, finished):
    whole, run = finished("whole"), finished()
    content = bytearray(run.last.read_bytes())
    content[-100] ^= 1
    run.last.write_bytes(content)
    train(tiny("run"), resume=True)
    assert_same_run(whole, run)
    assert run.last.with_suffix(".damaged").read_bytes() == bytes(content)


@pytest.mark.parametrize(
    ("damage", "optimizer"),
    [*((one, "adamw") for one in ("all", "name", "shape", "index", "dtype")), ("all", "sgd")],
)
def test_restore_optimizer_refuses_tensors_that_do_not_fit(tiny, finished, optimizer, damage):
    run = finished("run", f"training.optimizer={optimizer}", "training.epochs=1")
    checkpoint = read_checkpoint(run.last)
    tensors = dict(checkpoint.optimizer)
    name = next(key for key in tensors if not key.endswith("step"))
    value = tensors.pop(name)
    if damage == "all":
        tensors = {}
    elif damage == "name":
        tensors["x/y"] = value
    elif damage == "index":
        tensors["9999/step"] = value
    elif damage == "shape":
        tensors[name] = value[None]
    else:
        tensors[name] = value.double()
    write_checkpoint(run.last, dataclasses.replace(checkpoint, optimizer=tensors))
    with pytest.raises(PolysegError, match="checkpoint: "):
        train(tiny("run", f"training.optimizer={optimizer}", "training.epochs=2"), resume=True)


def test_folder_of_a_run_needs_resume(tiny, finished):
    finished()
    with pytest.raises(PolysegError, match="is not empty; add --resume to continue"):
        train(tiny("run"))
    with pytest.raises(PolysegError, match="holds no run to resume"):
        train(tiny("another"), resume=True)


def test_second_writer_of_a_run_is_refused(tiny):
    config = tiny("run")

    def progress(task, *_):
        if task == "training":
            with pytest.raises(PolysegError, match="is being written by another process"):
                train(config, resume=True)
            raise Stop

    with pytest.raises(Stop):
        train(config, progress=progress)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", ["polydice", "dice", "dice_bce", "bce", "tversky", "focal", "tvmf"]
)
def test_every_loss_trains(tiny, loss):
    run = run_of(
        tiny(
            "run",
            f"loss.name={loss}",
            "control.enabled=false",
            "training.epochs=10",
            "training.scheduler=polynomial",
            "training.optimizer=adam",
            "training.learning_rate=0.03",
            "data.augmentation=none",
        )
    )
    rows = history_of(run)
    assert float(rows[-1]["train_loss"]) < 0.97 * float(rows[0]["train_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["basic-unet", "attention-unet", "dynunet", "segresnet"])
def test_every_network_trains(tiny, name):
    few = ("training.epochs=1", "data.demo_images=10")
    run = run_of(tiny("run", f"network.name={name}", "network.kwargs={}", *few))
    assert run.assessment(1).is_file()


@pytest.mark.slow
def test_crash_between_the_two_checkpoints_is_repaired(tiny, finished, monkeypatch):
    whole = finished("whole")
    config = tiny("stopped")
    write = run_folder_module.write_checkpoint

    def crash_before_best(path, checkpoint):
        if path.name.startswith("best") and checkpoint.epoch == checkpoint.best_epoch == 2:
            raise Stop
        write(path, checkpoint)

    monkeypatch.setattr(run_folder_module, "write_checkpoint", crash_before_best)
    with pytest.raises(Stop):
        train(config)
    monkeypatch.undo()
    stopped = RunDirectory(Path(config.output.path))
    assert read_checkpoint(stopped.last).epoch == 2 != read_checkpoint(stopped.best).epoch
    (stopped.path / "checkpoints" / ".partial-last.abc.safetensors").touch()
    train(config, resume=True)
    assert_same_run(whole, stopped)
    assert not list(stopped.path.rglob(".partial*"))


@pytest.mark.slow
def test_run_interrupted_in_its_first_assessment_can_be_resumed(tiny):
    whole = run_of(tiny("whole", "control.start=0"))
    config = tiny("stopped", "control.start=0")

    def progress(task, *_):
        if task == "MC Dropout after epoch 0":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after epoch 0"):
        train(config, progress=progress)
    train(config, resume=True)
    assert_same_run(whole, RunDirectory(Path(config.output.path)))


def test_signal_during_an_assessment_names_the_committed_epoch(tiny):
    def progress(task, *_):
        if task == "MC Dropout after epoch 2":
            os.kill(os.getpid(), signal.SIGTERM)

    config = tiny("run")
    with pytest.raises(Interrupted, match="after epoch 1;"):
        train(config, progress=progress)
    assert read_checkpoint(RunDirectory(Path(config.output.path)).last).epoch == 1


@pytest.mark.slow
def test_run_resumed_with_more_epochs_keeps_its_first_assessment(tiny):
    """A start given as a share of the epochs is fixed when the run begins."""
    train(tiny("run", "control.start=0.4"))
    run = RunDirectory(Path(tiny("run", "control.start=0.4", "training.epochs=10").output.path))
    train(tiny("run", "control.start=0.4", "training.epochs=6"), resume=True)
    names = sorted(path.name for path in (run.path / "uncertainty").iterdir())
    assert names == [f"epoch_{epoch:04d}.h5" for epoch in range(1, 7)]
    assert "start: 1.0" in run.config.read_text()


def with_environment(run, **changes):
    record = json.loads(run.environment.read_text())
    run.environment.write_text(json.dumps({**record, **changes}))


def test_changed_environment_needs_accept_changes(tiny, finished, caplog):
    run = finished()
    with_environment(run, torch="1.0", threads=64, python="2.7")
    more = tiny("run", "training.epochs=4")
    with pytest.raises(PolysegError, match=r"torch 1.0 -> .*threads 64 -> 1.*--accept") as error:
        train(more, resume=True)
    assert "python" not in str(error.value) and len(history_of(run)) == 3
    train(more, resume=True, accept_changes=True)
    assert "threads 64 -> 1" in caplog.text and "python 2.7 -> " in caplog.text
    assert len(history_of(run)) == 4
    assert json.loads(run.environment.read_text())["resumed"][0]["after_epoch"] == 3
    train(tiny("run", "training.epochs=5"), resume=True)


def test_harmless_changes_are_only_logged(tiny, finished, caplog):
    run = finished()
    with_environment(run, platform="another", python="2.7")
    train(tiny("run", "training.epochs=4"), resume=True)
    assert "python 2.7 -> " in caplog.text


def test_learning_rate_change_needs_accept_changes(tiny, finished):
    run = finished()
    config = tiny("run", "training.epochs=4", "training.learning_rate=0.001")
    with pytest.raises(PolysegError, match=r"learning_rate .*--accept-changes allows it"):
        train(config, resume=True)
    train(config, resume=True, accept_changes=True)
    assert float(history_of(run)[-1]["learning_rate"]) < 0.001
    with pytest.raises(PolysegError, match=r"network.dropout .*start a new run"):
        train(tiny("run", "network.dropout=0.4"), resume=True, accept_changes=True)


def test_dry_run_of_a_resumed_run_shows_the_remaining_epochs(tiny, finished):
    finished()
    found = plan(tiny("run", "training.epochs=5"), resume=True)
    assert (found["epochs done"], found["epochs"]) == (3, 2)
    assert found["assessed after epochs"] == [4, 5]


def functional(in_channels, out_channels):
    class Network(torch.nn.Conv2d):
        def forward(self, x):
            return torch.nn.functional.dropout(super().forward(x), 0.5, self.training)

    return torch.nn.Sequential(
        torch.nn.Conv2d(in_channels, 4, 1), torch.nn.Dropout2d(0.2), Network(4, out_channels, 1)
    )


def test_unsupported_dropout_is_refused_before_files_are_written(tiny):
    config = tiny("run", f"network.name={__name__}:functional", "network.kwargs={}")
    with pytest.raises(PolysegError, match="calls of functional dropout"):
        train(config)
    assert not Path(config.output.path).exists()


@pytest.mark.parametrize(
    ("override", "match"),
    [("network.name=foo", "choose unet"), ("network.kwargs={nope: 1}", "refuses them")],
)
def test_dry_run_checks_the_network_and_the_folder(tiny, finished, override, match):
    with pytest.raises(PolysegError, match=match):
        plan(tiny("run", override))
    finished()
    with pytest.raises(PolysegError, match="is not empty"):
        plan(tiny("run"))


@pytest.mark.slow
def test_early_stopping_counts_epochs_without_a_better_dice(tiny):
    config = tiny(
        "run", "training.epochs=30", "training.early_stopping=2", "training.learning_rate=1e-7"
    )
    rows = history_of(run_of(config))
    dice = [float(row["validation_dice"]) for row in rows]
    best = int(np.argmax(dice))
    assert len(rows) == best + 1 + 2 < 30


@pytest.mark.parametrize("bad_step", [1, 2, 3])
@pytest.mark.parametrize("between_looks", [1, 2, 16])
def test_non_finite_loss_names_its_images(tiny, monkeypatch, between_looks, bad_step):
    """An epoch has three steps; the first bad one is reported, whenever they are checked."""
    shown, steps = [], itertools.count(1)
    batches = trainer_module.training_batches

    def broken(_):
        def objective(logits, mask, epsilon):
            losses = logits.mean(dim=(1, 2, 3)).clone()
            if next(steps) == bad_step:
                losses[1] = float("nan")
            return losses

        return objective

    def remembered(*arguments, **settings):
        for batch in batches(*arguments, **settings):
            shown.append(batch[0])
            yield batch

    monkeypatch.setattr(nonfinite, "_STEPS_BETWEEN_CHECKS", between_looks)
    monkeypatch.setattr(trainer_module, "training_batches", remembered)
    monkeypatch.setattr(step_module, "build_objective", broken)
    with pytest.raises(PolysegError, match=f"epoch 1, step {bad_step}: the loss of") as error:
        train(tiny("run"))
    assert f"loss of {shown[bad_step - 1][1]} is not finite" in str(error.value)
    assert len(shown) == min(-(-bad_step // between_looks) * between_looks, 3)


def spoiled_objective(bad_step, spoil):
    """Return a factory of an objective that spoils the losses of one step."""
    steps = itertools.count(1)

    def build(_):
        def objective(logits, mask, epsilon):
            losses = (logits.sigmoid() - mask).square().flatten(1).mean(1)
            return spoil(losses) if losses.requires_grad and next(steps) == bad_step else losses

        return objective

    return build


class Unbounded(torch.autograd.Function):
    """Return the losses unchanged, with an infinite gradient."""

    @staticmethod
    def forward(_, losses):
        return losses.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient * float("inf")


SPOILS = {"losses": lambda losses: losses * float("nan"), "gradients": Unbounded.apply}


def test_non_finite_gradients_end_the_run(tiny, monkeypatch):
    monkeypatch.setattr(step_module, "build_objective", spoiled_objective(5, SPOILS["gradients"]))
    with pytest.raises(PolysegError, match="epoch 2, step 2: the gradients of phantom"):
        train(tiny("run"))
    run = RunDirectory(Path(tiny("run").output.path))
    assert read_checkpoint(run.last).epoch == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", SPOILS)
def test_skipped_step_leaves_weights_and_statistics_unchanged(tiny, monkeypatch, what, caplog):
    settings = (
        "training.on_nonfinite=skip",
        "control.enabled=false",
        "network.dropout=0",
        "network.kwargs={channels: [4, 8], strides: [2], num_res_units: 1, norm: BATCH}",
        "data.augmentation=none",
    )
    monkeypatch.setattr(step_module, "build_objective", spoiled_objective(5, SPOILS[what]))
    skipping = run_of(tiny("skipping", *settings))
    assert [row["skipped_steps"] for row in history_of(skipping)] == ["0", "1", "0"]
    named = {"losses": "the loss of", "gradients": "the gradients of"}[what]
    assert f"epoch 2, step 2 is skipped: {named} phantom" in caplog.text

    taken, take = [], step_module.Steps.take

    def without_the_fifth(self, *batch):
        taken.append(taken[-1] if len(taken) == 4 else take(self, *batch))
        return taken[-1]

    monkeypatch.setattr(step_module.Steps, "take", without_the_fifth)
    monkeypatch.setattr(step_module, "build_objective", spoiled_objective(-1, None))
    assert_same_weights(weights_of(skipping), weights_of(run_of(tiny("without", *settings))))


def test_epoch_without_a_finite_step_ends_the_run(tiny, monkeypatch):
    def endless(logits, *_):
        return logits.mean(dim=(1, 2, 3)) / 0

    monkeypatch.setattr(step_module, "build_objective", lambda _: endless)
    with pytest.raises(PolysegError, match="epoch 1: no step had finite loss"):
        train(tiny("run", "training.on_nonfinite=skip"))


def trainer_of_two_labels(config):
    """Return a trainer on seven noise images with two labels."""
    generator = np.random.default_rng(0)
    ids = [f"image_{i}" for i in range(7)]
    pixels = generator.integers(0, 256, (7, 32, 32), dtype=np.uint8)
    masks = generator.integers(0, 2, (7, 2, 32, 32), dtype=np.uint8)
    images = arrays_as_set(ids, pixels, masks, config.data)
    split = {"train": ids, "val": [], "test": []}
    return trainer_module.Trainer(config, images, split, RunDirectory(Path(config.output.path)))


class Growing:
    """A controller that gives each image and label its own epsilon."""

    assessment = None

    def adapt(self, ids):
        epsilon = [int(name[-1]) + label for name in ids for label in (0.0, 0.5)]
        return Adapted(np.array(epsilon), None)


@pytest.mark.parametrize("constant", [True, False])
def test_recorded_losses_use_the_constant_epsilon(tiny, monkeypatch, constant):
    trainer = trainer_of_two_labels(
        tiny("run", "loss.epsilon=0.25", "data.foreground={one: 1, two: 2}")
    )
    if not constant:
        trainer.control = Growing()
    expected, taken, objective = {}, [], trainer.steps.objective

    def watched(logits, target, epsilon):
        taken.append(objective(logits, target, epsilon))
        at_constant = objective(logits, target, torch.full_like(epsilon, 0.25))
        expected[len(taken)] = at_constant.detach()
        return taken[-1]

    monkeypatch.setattr(trainer.steps, "objective", watched)
    for epoch in (1, 2):
        row = row_of(trainer._train(epoch))
        last = [expected.pop(step) for step in sorted(expected)]
        found = torch.tensor(list(trainer.losses.values())).flatten()
        torch.testing.assert_close(found, torch.cat(last))
        if constant:
            assert torch.equal(found, torch.cat(last))
            assert row["train_loss"] == row["train_loss_constant"]
        assert row["train_loss_constant"] == pytest.approx(float(found.mean()))
        batches = trainer_module.training_batches(
            trainer.images, trainer.split["train"], batch_size=4, seed=0, epoch=epoch
        )
        assert list(trainer.losses) == [name for names, *_ in batches for name in names]


def test_optimizer_state_is_saved_for_weights_without_early_gradients():
    for name in ("adamw", "adam", "sgd"):
        network = torch.nn.ModuleList([torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)])
        optimizer = optimizers.build_optimizer(TrainingConfig(optimizer=name), network)
        for reached in (network[:1], network):
            optimizer.zero_grad()
            sum(layer(torch.ones(2)).sum() for layer in reached).backward()
            optimizer.step()
        tensors = optimizers.optimizer_tensors(optimizer)
        steps = {key: value for key, value in tensors.items() if key.endswith("step")}
        assert all(value.dtype == torch.float32 for value in tensors.values())
        assert {key: value.tolist() for key, value in steps.items()} == (
            {} if name == "sgd" else {"0/step": 2.0, "1/step": 2.0, "2/step": 1.0, "3/step": 1.0}
        )
        optimizers.restore_optimizer(optimizer, tensors, name)


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.complex64, None)])
def test_adam_is_fused_where_supported(dtype, fused):
    network = torch.nn.Linear(2, 1, dtype=dtype)
    optimizer = optimizers.build_optimizer(TrainingConfig(), network)
    assert optimizer.defaults["fused"] is fused
    network(torch.ones(2, dtype=dtype)).abs().sum().backward()
    optimizer.step()


def compiling_by(monkeypatch, backend):
    """Let torch.compile trace networks as usual, but generate code by a Python backend."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


@pytest.mark.slow
def test_compilation_time_is_logged_once(tiny, finished, monkeypatch, caplog):
    plain = finished("plain")
    caplog.set_level("INFO")
    compiling_by(monkeypatch, "eager")
    compiled = run_of(tiny("compiled", "training.compile=true"))
    told = [message for message in caplog.messages if "compiled the network in" in message]
    assert len(told) == 1 and re.fullmatch(r"compiled the network in \d+ s", told[0])
    assert_same_weights(weights_of(compiled), weights_of(plain))


def no_compiler(*_):
    raise RuntimeError("No working C++ compiler found\nSee the manual")


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [True, False])
def test_failed_compilation_names_the_setting(tiny, monkeypatch, at_once):
    if at_once:
        monkeypatch.setattr(torch, "compile", no_compiler)
    else:
        compiling_by(monkeypatch, no_compiler)
    with pytest.raises(PolysegError) as error:
        train(tiny("run", "training.compile=true"))
    message = str(error.value)
    assert "No working C++ compiler found" in message and "\n" not in message
    assert message.endswith("set training.compile=false")


@pytest.mark.slow
def test_run_without_validation_images_has_a_best_checkpoint(tiny):
    run = run_of(tiny("run", "data.split=[0.7, 0, 0.3]"))
    assert read_checkpoint(run.best).epoch == 3


@pytest.mark.slow
def test_bfloat16_trains_close_to_float32(tiny, finished):
    single = history_of(finished("fp32"))
    reduced = history_of(run_of(tiny("bf16", "training.precision=bf16")))
    for row, other in zip(single, reduced, strict=True):
        assert float(other["train_loss"]) == pytest.approx(float(row["train_loss"]), rel=0.02)
    assert single != reduced


def test_dry_run_shows_the_assessments_and_passes_of_a_run(tiny, finished):
    planned, run = plan(tiny()), finished()
    assert planned["assessed after epochs"] == [1, 2, 3]
    assert planned["recorded only, because no epoch follows"] == [3]
    assert planned["MC Dropout passes, all images together"] == sum(
        assessment.samples * len(assessment.ids)
        for assessment in map(read_assessment, sorted((run.path / "uncertainty").iterdir()))
    )


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("polynomial", [1, 0.75**0.9, 0.5**0.9, 0.25**0.9]),
        ("cosine", [1, 0.01 + 0.99 * (1 + 0.5**0.5) / 2, 0.505, 0.01 + 0.99 * (1 - 0.5**0.5) / 2]),
    ],
)
def test_learning_rate_schedules(scheduler, expected):
    config = TrainingConfig(scheduler=scheduler, learning_rate=1.0, epochs=4)
    found = [optimizers.learning_rate(config, epoch) for epoch in range(1, 5)]
    assert found == pytest.approx(expected)


PLAIN = (
    "control.enabled=false",
    "network.dropout=0",
    "network.kwargs={channels: [4, 8], strides: [2], num_res_units: 1, norm: INSTANCE}",
)


@pytest.mark.slow
def test_accumulated_batch_equals_the_whole_batch(tiny):
    """Without batch normalisation and dropout."""
    whole = run_of(tiny("whole", *PLAIN))
    parts = run_of(tiny("parts", *PLAIN, "training.accumulate=3"))
    for name, values in weights_of(whole).items():
        torch.testing.assert_close(weights_of(parts)[name], values, rtol=1e-4, atol=1e-5, msg=name)
    assert [row["train_loss"][:5] for row in history_of(whole)] == [
        row["train_loss"][:5] for row in history_of(parts)
    ]


def test_accumulated_parts_keep_the_epsilon_of_each_image(tiny):
    """With two labels and more parts than images, so that some parts are empty."""
    settings = ("data.foreground={one: 1, two: 2}", "training.accumulate=5")
    trainer = trainer_of_two_labels(tiny("run", *settings))
    trainer.control = Growing()
    seen = []
    objective = trainer.steps.objective

    def watched(logits, target, epsilon):
        seen.append(epsilon)
        return objective(logits, target, epsilon)

    trainer.steps.objective = watched
    row = row_of(trainer._train(1))
    order = [name for name, *_ in trainer.losses.items()]
    wanted = [int(name[-1]) + label for name in order for label in (0.0, 0.5)]
    assert torch.cat(seen[::1]).tolist() == wanted and np.isfinite(row["train_loss"])


@pytest.mark.slow
def test_activation_checkpointing_is_equal_bit_for_bit(tiny):
    """Dropout masks and batch-normalisation statistics are equal too."""
    norm = "network.kwargs={channels: [4, 8, 8], strides: [2, 2], num_res_units: 2, norm: batch}"
    kept = run_of(tiny("kept", norm))
    assert_same_run(kept, run_of(tiny("anew", norm, "training.recompute=true")))


@pytest.mark.slow
def test_float16_trains_close_to_float32_and_resumes_bit_for_bit(tiny, finished):
    exact = finished("exact")
    whole = run_of(tiny("whole", "training.precision=fp16"))
    for column in ("train_loss", "validation_dice"):
        for row, other in zip(history_of(exact), history_of(whole), strict=True):
            assert float(row[column]) == pytest.approx(float(other[column]), abs=0.02)
    config = tiny("stopped", "training.precision=fp16")
    with pytest.raises(Stop):
        train(config, progress=stop_after(2))
    train(config, resume=True)
    assert_same_run(whole, RunDirectory(Path(config.output.path)))
    scaler = read_checkpoint(whole.last).scaler
    assert scaler["scale"] == 65536 and scaler["_growth_tracker"] == 9


def test_gradient_scale_too_large_for_float16_is_lowered(tiny, caplog):
    config = tiny("run", "training.precision=fp16", "training.epochs=1", "control.enabled=false")
    trainer = trainer_module.Trainer(*trainer_arguments(config))
    trainer.steps.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-10)
    row = row_of(trainer._train(1))
    assert row["skipped_steps"] >= 1 and "gradients of" in caplog.text
    assert trainer.steps.scaler.get_scale() in (2.0**20, 2.0**10)
    assert all(weights.isfinite().all() for weights in trainer.network.state_dict().values())


def trainer_arguments(config):
    images = make_demo(config.data)
    ids = images.ids
    return config, images, {"train": ids, "val": [], "test": []}, RunDirectory(Path("nowhere"))


@pytest.mark.slow
@pytest.mark.parametrize("what", SPOILS)
def test_run_with_skipped_steps_resumes_bit_for_bit(tiny, monkeypatch, what):
    """The recorded losses of the images are part of the resumed state."""
    settings = (
        "training.on_nonfinite=skip",
        "uncertainty.metric=training_loss",
        "training.epochs=4",
    )

    def build(_):
        def objective(logits, mask, epsilon):
            losses = (logits.sigmoid() - mask).square().flatten(1).mean(1)
            return SPOILS[what](losses) if losses.requires_grad and spoiled(logits) else losses

        return objective

    def spoiled(logits):
        # One batch of an epoch, recognised by its input, not by a count of calls.
        return trainer_epoch[0] == 3 and len(logits) == 3

    trainer_epoch = [0]
    run_epoch = trainer_module.Trainer._run_epoch

    def watched(self, epoch):
        trainer_epoch[0] = epoch
        run_epoch(self, epoch)

    monkeypatch.setattr(trainer_module.Trainer, "_run_epoch", watched)
    monkeypatch.setattr(step_module, "build_objective", build)
    whole = run_of(tiny("whole", *settings))
    assert [row["skipped_steps"] for row in history_of(whole)] == ["0", "0", "1", "0"]
    config = tiny("stopped", *settings)
    with pytest.raises(Stop):
        train(config, progress=stop_after(2))
    train(config, resume=True)
    assert_same_run(whole, RunDirectory(Path(config.output.path)))


def test_epoch_that_only_reduces_the_scale_does_not_end_training(tiny):
    config = tiny("run", "training.precision=fp16", "control.enabled=false", "training.epochs=2")
    trainer = trainer_module.Trainer(*trainer_arguments(config))
    trainer.steps.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    row = row_of(trainer._train(1))
    assert row["skipped_steps"] == 4 and np.isfinite(row["train_loss"])


def test_best_checkpoint_of_another_network_is_refused_before_it_is_built(tiny, finished):
    run = finished()
    best = read_checkpoint(run.best)
    # If the best epoch is not the last one, resuming does not rewrite the best checkpoint.
    write_checkpoint(run.last, dataclasses.replace(read_checkpoint(run.last), best_epoch=1))
    network = best.config.network.model_copy(update={"name": "os:getcwd"})
    config = best.config.model_copy(update={"network": network})
    write_checkpoint(run.best, dataclasses.replace(best, config=config))
    with pytest.raises(PolysegError, match="belongs to another network than this run"):
        train(tiny("run"), resume=True)


@pytest.fixture
def _with_log(caplog):
    """Configure logging as commands do."""
    caplog.set_level("INFO", "polyseg")


def epoch_lines(run):
    lines = [line.partition(" INFO ")[2] for line in run.log.read_text().splitlines()]
    return [line for line in lines if re.match(r"epoch \d+/\d+  ", line)]


@pytest.mark.slow
@pytest.mark.usefixtures("_with_log")
def test_epoch_lines_omit_a_constant_epsilon(tiny):
    adaptive = epoch_lines(run_of(tiny("run", "control.start=2")))
    assert ["ε" in line for line in adaptive] == [False, False, True]
    plain = epoch_lines(run_of(tiny("dice", "loss.name=dice")))
    assert len(plain) == 3 and not any("ε" in line for line in plain)
    replayed = epoch_lines(run_of(tiny("again", f"control.replay={tiny('run').output.path}")))
    assert ["ε" in line for line in replayed] == [False, False, True]
    alone = epoch_lines(run_of(tiny("alone", "data.split=[1, 0, 0]")))
    assert len(alone) == 3 and not any("Dice" in line for line in alone)


@pytest.mark.usefixtures("_with_log")
def test_epoch_lines_mark_the_best_epoch_so_far(tiny):
    run = run_of(tiny())
    best, marked = -1.0, []
    for row in history_of(run):
        marked.append(float(row["validation_dice"]) > best)
        best = max(best, float(row["validation_dice"]))
    assert [" best" in line for line in epoch_lines(run)] == marked and marked[0]


def test_longest_epoch_line_fits_a_terminal():
    """A terminal has 80 columns, of which the time takes 6."""
    row = dict.fromkeys(COLUMNS, 0.0)
    row |= {"epoch": 1000, "train_loss": 0.98765, "validation_dice": 0.98765}
    row |= {"epsilon_q05": -0.4987, "epsilon_q95": 9.876, "seconds_train": 9876.5}
    line = epoch_line(row, epochs=1000, best=True, adapts=True, validates=True)
    expected = "epoch 1000/1000  loss 0.988  val Dice 0.988 best  ε -0.50 to 9.88  9876 s"
    assert line == expected and len(line) <= 74


def test_run_prints_a_summary_of_the_data(tiny, tmp_path):
    sizes = {"a": (40, 60), "b": (30, 30), "c": (64, 64), "d": (64, 64)}
    images = arrays_as_set(
        list(sizes),
        [np.zeros((8, 8), np.uint8)] * 4,
        [np.ones((8, 8), np.uint8)] * 4,
        tiny().data,
    )
    items = [
        dataclasses.replace(item, original_size=sizes[item.id], group=group)
        for item, group in zip(images.items, ("x", "x", "y", None), strict=True)
    ]
    images = dataclasses.replace(images, items=items)
    split = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
    config = tiny("run", f"data.path={tmp_path}").data
    told = "4 images of 30 x 30 to 64 x 64 -> 8 x 8: 2 train, 1 val, 1 test; "
    told += "groups: 1 train, 1 val, 1 test"
    assert _describe_data(images, split, config) == told
    single = config.model_copy(update={"group": "(.)"})
    assert _describe_data(images, split, single).endswith("; groups: 2 train, 1 val, 1 test")


@pytest.mark.usefixtures("_with_log")
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ((), "16 phantoms of 32 x 32: 11 train, 3 val, 2 test"),
        (("data.fit=tile",), "16 phantoms of 128 x 128 -> tiles of 32 x 32: 11 train"),
    ],
)
def test_log_begins_with_a_summary_of_the_data(tiny, settings, told):
    few = ("training.epochs=1", "control.enabled=false", *settings)
    log = run_of(tiny("run", *few)).log.read_text()
    assert log.count(told) == 1


@pytest.mark.usefixtures("_with_log")
def test_log_reports_correlation_of_difficulty_with_error(tiny):
    config = tiny()
    outcome = train(config)
    run = RunDirectory(Path(config.output.path))
    log = run.log.read_text()
    for name in read_checkpoint(run.last).assessments:
        (line,) = describe_order(read_assessment(run.path / "uncertainty" / name))
        assert "95 % interval" in line and line in log
    assert outcome.notes == [line]
    assert outcome.correlations[0]["95 % interval"] == pytest.approx(
        list(
            rank_correlation(
                (last := read_assessment(run.path / "uncertainty" / name)).difficulty, 1 - last.dice
            ).interval
        )
    )

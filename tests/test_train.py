"""Training runs: what is equal bit for bit, what assessments feed, how a run ends and goes on."""

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

from polyseg import train as room
from polyseg.cache import read_assessment, read_schedule
from polyseg.config import TrainingConfig
from polyseg.data.dataset import arrays_as_set
from polyseg.errors import Interrupted, PolysegError
from polyseg.files import sha256_of_file
from polyseg.jobs.training import plan, train
from polyseg.networks import hash_weights
from polyseg.run import RunDirectory, read_checkpoint


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


def test_equal_seeds_give_equal_runs_and_others_do_not(tiny):
    first, second, third = (
        run_of(tiny(name, f"training.seed={seed}"))
        for name, seed in (("one", 1), ("two", 1), ("three", 2))
    )
    assert_same_run(first, second)
    assert history_of(first) != history_of(third)


@pytest.mark.parametrize("statistics", ["batch", "dataset"])
def test_a_pinned_epsilon_equals_the_plain_run(tiny, statistics):
    """Assessments change nothing but epsilon."""
    plain = run_of(tiny("plain", "control.enabled=false", "loss.epsilon=0.25"))
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


def test_workers_change_nothing(tiny):
    assert_same_run(run_of(tiny("none")), run_of(tiny("two", "training.workers=2")))


def expected_epsilon(difficulty):
    """Eq. 11 and 12 with the default settings, by SciPy's logistic function."""
    normalised = (difficulty - np.median(difficulty)) / (np.std(difficulty) + 1e-9)
    return -0.4 + 1.4 * expit(normalised)


@pytest.mark.parametrize("statistics", ["batch", "dataset"])
def test_an_assessment_feeds_the_epochs_after_it(tiny, statistics):
    """With all images in one batch both statistics are those of all images."""
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


def test_batch_statistics_are_of_the_batch(tiny):
    """The median image of an odd batch gets the middle of the range, whatever its difficulty."""
    run = run_of(tiny("run", "training.batch_size=1"))
    epsilon = read_schedule(run.schedule).epsilon
    np.testing.assert_allclose(epsilon[1:], 0.3, atol=1e-6)


def test_the_record_belongs_to_the_weights(tiny):
    config = tiny("run")
    run = run_of(config)
    checkpoint = read_checkpoint(run.last)
    assessment = read_assessment(run.assessment(3))
    assert hash_weights(checkpoint.build()) == assessment.weights_sha256
    assert checkpoint.assessments == {
        path.name: sha256_of_file(path) for path in (run.path / "uncertainty").iterdir()
    }
    assert read_checkpoint(run.best).epoch == checkpoint.best_epoch


class Stop(Exception):
    """The machine went down."""


def stop_after(epoch):
    def progress(task, done, _):
        if task == "training" and done == epoch:
            raise Stop

    return progress


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_resumed_run_equals_one_that_was_not_stopped(tiny, optimizer, epoch):
    whole = run_of(tiny("whole", f"training.optimizer={optimizer}"))
    config = tiny("stopped", f"training.optimizer={optimizer}")
    with pytest.raises(Stop):
        train(config, progress=stop_after(epoch))
    train(config, resume=True)
    assert_same_run(whole, RunDirectory(Path(config.output.path)))


def test_a_crash_in_the_middle_of_an_epoch_leaves_no_trace(tiny):
    whole = run_of(tiny("whole"))
    config = tiny("stopped")

    def progress(task, *_):
        if task.startswith("MC Dropout after epoch 2"):
            raise Stop

    with pytest.raises(Stop):
        train(config, progress=progress)
    stopped = RunDirectory(Path(config.output.path))
    assert read_checkpoint(stopped.last).epoch == 1
    # What a crash between the assessment and the commit leaves behind.
    (stopped.path / "uncertainty" / "epoch_0002.h5").write_bytes(b"torn")
    train(config, resume=True)
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_can_go_on(tiny, number):
    whole = run_of(tiny("whole"))
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


def test_more_epochs_continue_a_finished_run(tiny):
    config = tiny("run", "training.scheduler=constant")
    train(config)
    train(tiny("run", "training.scheduler=constant", "training.epochs=5"), resume=True)
    whole = run_of(tiny("whole", "training.scheduler=constant", "training.epochs=5"))
    run = RunDirectory(Path(config.output.path))
    assert_same_run(whole, run)
    assert "epochs: 5" in run.config.read_text()


def test_resuming_names_the_settings_that_it_cannot_change(tiny):
    train(tiny("run"))
    with pytest.raises(PolysegError, match=r"cannot change loss.epsilon 0.0 -> 0.5"):
        train(tiny("run", "loss.epsilon=0.5"), resume=True)


@pytest.mark.parametrize("name", ["history.csv", "schedule.h5", "split.json"])
def test_a_run_without_its_record_is_refused_and_left_alone(tiny, name):
    config = tiny("run")
    train(config)
    run = Path(config.output.path)
    (run / name).unlink()
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.name != "log.txt"}
    with pytest.raises(PolysegError, match=name):
        train(tiny("run", "training.epochs=5"), resume=True)
    assert before == {
        path: path.read_bytes() for path in run.rglob("*.*") if path.name != "log.txt"
    }


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("damage", ["all", "name", "shape", "index", "dtype"])
def test_an_optimizer_takes_up_only_what_fits(tiny, optimizer, damage):
    config = tiny("run", f"training.optimizer={optimizer}", "training.epochs=1")
    train(config)
    run = RunDirectory(Path(config.output.path))
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
    room.write_checkpoint(run.last, dataclasses.replace(checkpoint, optimizer=tensors))
    with pytest.raises(PolysegError, match="checkpoint: "):
        train(tiny("run", f"training.optimizer={optimizer}", "training.epochs=2"), resume=True)


def test_a_folder_holds_one_run(tiny):
    train(tiny("run"))
    with pytest.raises(PolysegError, match="is not empty; --resume continues"):
        train(tiny("run"))
    with pytest.raises(PolysegError, match="holds no run to resume"):
        train(tiny("another"), resume=True)


def test_two_writers_are_one_too_many(tiny):
    config = tiny("run")

    def progress(task, *_):
        if task == "training":
            with pytest.raises(PolysegError, match="is being written by another process"):
                train(config, resume=True)
            raise Stop

    with pytest.raises(Stop):
        train(config, progress=progress)


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


@pytest.mark.parametrize("name", ["basic-unet", "attention-unet", "dynunet", "segresnet"])
def test_every_network_trains(tiny, name):
    run = run_of(tiny("run", f"network.name={name}", "network.kwargs={}", "training.epochs=1"))
    assert run.assessment(1).is_file()


def test_a_crash_between_the_two_checkpoints_is_mended(tiny, monkeypatch):
    whole = run_of(tiny("whole"))
    config = tiny("stopped")
    write = room.write_checkpoint

    def crash_before_best(path, checkpoint):
        if path.name.startswith("best") and checkpoint.epoch == checkpoint.best_epoch == 2:
            raise Stop
        write(path, checkpoint)

    monkeypatch.setattr(room, "write_checkpoint", crash_before_best)
    with pytest.raises(Stop):
        train(config)
    monkeypatch.undo()
    stopped = RunDirectory(Path(config.output.path))
    assert read_checkpoint(stopped.last).epoch == 2 != read_checkpoint(stopped.best).epoch
    (stopped.path / "checkpoints" / ".partial-last.abc.safetensors").touch()
    train(config, resume=True)
    assert_same_run(whole, stopped)
    assert not list(stopped.path.rglob(".partial*"))


def test_a_run_that_ends_in_its_first_assessment_can_go_on(tiny):
    whole = run_of(tiny("whole", "control.start=0"))
    config = tiny("stopped", "control.start=0")

    def progress(task, *_):
        if task == "MC Dropout after epoch 0":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after epoch 0"):
        train(config, progress=progress)
    train(config, resume=True)
    assert_same_run(whole, RunDirectory(Path(config.output.path)))


def test_a_signal_in_an_assessment_names_the_epoch_that_is_committed(tiny):
    def progress(task, *_):
        if task == "MC Dropout after epoch 2":
            os.kill(os.getpid(), signal.SIGTERM)

    config = tiny("run")
    with pytest.raises(Interrupted, match="after epoch 1;"):
        train(config, progress=progress)
    assert read_checkpoint(RunDirectory(Path(config.output.path)).last).epoch == 1


def test_a_longer_run_keeps_its_first_assessment(tiny):
    """A share of the epochs is settled when the run begins."""
    train(tiny("run", "control.start=0.4"))
    run = RunDirectory(Path(tiny("run", "control.start=0.4", "training.epochs=10").output.path))
    train(tiny("run", "control.start=0.4", "training.epochs=6"), resume=True)
    names = sorted(path.name for path in (run.path / "uncertainty").iterdir())
    assert names == [f"epoch_{epoch:04d}.h5" for epoch in range(1, 7)]
    assert "start: 1.0" in run.config.read_text()


def test_what_changed_around_a_run_is_named(tiny, caplog):
    config = tiny("run")
    train(config)
    run = RunDirectory(Path(config.output.path))
    record = json.loads(run.environment.read_text())
    run.environment.write_text(json.dumps({**record, "torch": "1.0", "threads": 64}))
    train(tiny("run", "training.epochs=4"), resume=True)
    assert "last digits: torch 1.0 -> " in caplog.text and "threads 64 -> 1" in caplog.text


def functional(in_channels, out_channels):
    class Network(torch.nn.Conv2d):
        def forward(self, x):
            return torch.nn.functional.dropout(super().forward(x), 0.5, self.training)

    return torch.nn.Sequential(
        torch.nn.Conv2d(in_channels, 4, 1), torch.nn.Dropout2d(0.2), Network(4, out_channels, 1)
    )


def test_dropout_that_cannot_be_steered_is_refused_before_anything_is_written(tiny):
    config = tiny("run", f"network.name={__name__}:functional", "network.kwargs={}")
    with pytest.raises(PolysegError, match="calls of functional dropout"):
        train(config)
    assert not Path(config.output.path).exists()


@pytest.mark.parametrize(
    ("override", "match"),
    [("network.name=foo", "choose unet"), ("network.kwargs={nope: 1}", "refuses them")],
)
def test_the_plan_checks_the_network_and_the_folder(tiny, override, match):
    with pytest.raises(PolysegError, match=match):
        plan(tiny("run", override))
    train(tiny("run"))
    with pytest.raises(PolysegError, match="is not empty"):
        plan(tiny("run"))


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
def test_a_loss_that_is_not_finite_names_its_images(tiny, monkeypatch, between_looks, bad_step):
    """An epoch has three steps; whenever they are looked at, the first bad one is told."""
    shown, steps = [], itertools.count(1)
    batches = room.training_batches

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

    monkeypatch.setattr(room, "_STEPS_BETWEEN_LOOKS", between_looks)
    monkeypatch.setattr(room, "training_batches", remembered)
    monkeypatch.setattr(room, "build_objective", broken)
    with pytest.raises(PolysegError, match="epoch 1: the loss of phantom") as error:
        train(tiny("run"))
    assert f"loss of {shown[bad_step - 1][1]} is not finite" in str(error.value)
    assert len(shown) == min(-(-bad_step // between_looks) * between_looks, 3)


def trainer_of_two_labels(config):
    """Return a trainer of seven images of noise."""
    generator = np.random.default_rng(0)
    ids = [f"image_{i}" for i in range(7)]
    pixels = generator.integers(0, 256, (7, 32, 32), dtype=np.uint8)
    masks = generator.integers(0, 2, (7, 2, 32, 32), dtype=np.uint8)
    images = arrays_as_set(ids, pixels, masks, config.data)
    split = {"train": ids, "val": [], "test": []}
    return room.Trainer(config, images, split, RunDirectory(Path(config.output.path)))


class Growing:
    """Gives each image and label an epsilon of its own."""

    assessment = None

    def epsilon(self, ids):
        return np.array([int(name[-1]) + label for name in ids for label in (0.0, 0.5)])


@pytest.mark.parametrize("constant", [True, False])
def test_the_losses_kept_are_at_the_constant_epsilon(tiny, monkeypatch, constant):
    trainer = trainer_of_two_labels(
        tiny("run", "loss.epsilon=0.25", "data.foreground={one: 1, two: 2}")
    )
    if not constant:
        trainer.control = Growing()
    expected, taken, objective = {}, [], trainer.objective

    def watched(logits, target, epsilon):
        taken.append(objective(logits, target, epsilon))
        at_constant = objective(logits, target, torch.full_like(epsilon, 0.25))
        expected[len(taken)] = at_constant.detach()
        return taken[-1]

    monkeypatch.setattr(trainer, "objective", watched)
    for epoch in (1, 2):
        row = trainer._train(epoch)
        last = [expected.pop(step) for step in sorted(expected)]
        found = torch.tensor(list(trainer.losses.values())).flatten()
        torch.testing.assert_close(found, torch.cat(last))
        if constant:
            assert torch.equal(found, torch.cat(last))
            assert row["train_loss"] == pytest.approx(float(found.mean()))
        batches = room.training_batches(
            trainer.images, trainer.split["train"], batch_size=4, seed=0, epoch=epoch
        )
        assert list(trainer.losses) == [name for names, *_ in batches for name in names]


def test_each_optimizer_waits_for_weights_that_the_loss_reaches_late():
    for name in ("adamw", "adam", "sgd"):
        network = torch.nn.ModuleList([torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)])
        optimizer = room._build_optimizer(TrainingConfig(optimizer=name), network)
        for reached in (network[:1], network):
            optimizer.zero_grad()
            sum(layer(torch.ones(2)).sum() for layer in reached).backward()
            optimizer.step()
        tensors = room._optimizer_tensors(optimizer)
        steps = {key: value for key, value in tensors.items() if key.endswith("step")}
        assert all(value.dtype == torch.float32 for value in tensors.values())
        assert {key: value.tolist() for key, value in steps.items()} == (
            {} if name == "sgd" else {"0/step": 2.0, "1/step": 2.0, "2/step": 1.0, "3/step": 1.0}
        )
        room._restore_optimizer(optimizer, tensors)


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.complex64, None)])
def test_adam_takes_its_steps_at_once_where_it_can(dtype, fused):
    network = torch.nn.Linear(2, 1, dtype=dtype)
    optimizer = room._build_optimizer(TrainingConfig(), network)
    assert optimizer.defaults["fused"] is fused
    network(torch.ones(2, dtype=dtype)).abs().sum().backward()
    optimizer.step()


def compiling_by(monkeypatch, backend):
    """Let torch.compile trace networks as it does, and leave code to a backend of Python."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def test_a_compiled_run_tells_once_what_it_took(tiny, monkeypatch, caplog):
    caplog.set_level("INFO")
    compiling_by(monkeypatch, "eager")
    compiled = run_of(tiny("compiled", "training.compile=true"))
    told = [message for message in caplog.messages if "compiled the network in" in message]
    assert len(told) == 1 and re.fullmatch(r"compiled the network in \d+ s", told[0])
    assert_same_weights(weights_of(compiled), weights_of(run_of(tiny("plain"))))


def no_compiler(*_):
    raise RuntimeError("No working C++ compiler found\nSee the manual")


@pytest.mark.parametrize("at_once", [True, False])
def test_where_nothing_can_be_compiled_the_run_says_what_to_set(tiny, monkeypatch, at_once):
    if at_once:
        monkeypatch.setattr(torch, "compile", no_compiler)
    else:
        compiling_by(monkeypatch, no_compiler)
    with pytest.raises(PolysegError) as error:
        train(tiny("run", "training.compile=true"))
    message = str(error.value)
    assert "No working C++ compiler found" in message and "\n" not in message
    assert message.endswith("set training.compile=false")


def test_no_validation_images_still_leave_a_best_checkpoint(tiny):
    run = run_of(tiny("run", "data.split=[0.7, 0, 0.3]"))
    assert read_checkpoint(run.best).epoch == 3


def test_bfloat16_trains_close_to_float32(tiny):
    single, reduced = (
        history_of(run_of(tiny(name, f"training.precision={name}"))) for name in ("fp32", "bf16")
    )
    for row, other in zip(single, reduced, strict=True):
        assert float(other["train_loss"]) == pytest.approx(float(row["train_loss"]), rel=0.02)
    assert single != reduced


def test_the_plan_is_what_a_run_does(tiny):
    config = tiny("run")
    planned = plan(config)
    run = run_of(config)
    assert planned["assessed after epochs"] == [1, 2, 3]
    assert planned["MC-Dropout passes of an image"] == sum(
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
def test_learning_rates(scheduler, expected):
    config = TrainingConfig(scheduler=scheduler, learning_rate=1.0, epochs=4)
    found = [room.learning_rate(config, epoch) for epoch in range(1, 5)]
    assert found == pytest.approx(expected)

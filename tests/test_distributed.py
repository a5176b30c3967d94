"""Training in several processes: equal to one process, and errors that end all of them."""

import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing import start_processes

from polyseg.montecarlo.measurement import ScoreTable, Wanted
from polyseg.runs.checkpoints import read_checkpoint
from polyseg.runs.record_files import read_assessment
from polyseg.runs.run_folder import RunDirectory
from polyseg.system.process_group import ALONE, Processes
from polyseg.training.distributed import BatchNormTogether, DropoutTogether, normalise_together
from tests import forks, together
from tests.conftest import TINY
from tests.test_train import assert_same_run, history_of

MORE = ("training.epochs=4", "control.start=2")
SETTINGS = (*TINY, "output.figures=false", *MORE)


def training(run, *overrides):
    settings = [part for one in (*SETTINGS, *overrides) for part in ("--set", one)]
    return ["train", "--out", run, *settings]


@pytest.fixture(scope="module")
def alone(trained_once):
    """Return a run trained by the plain command in one process."""
    return RunDirectory(trained_once(*MORE))


def assert_equal_to_rounding(run, other):
    one, another = read_checkpoint(run.last), read_checkpoint(other.last)
    assert one.epoch == another.epoch
    for name, values in one.weights.items():
        difference = (values.double() - another.weights[name].double()).norm()
        assert difference <= 1e-4 * values.double().norm() + 1e-9, name
    assert one.schedule.ids == another.schedule.ids
    np.testing.assert_allclose(one.schedule.epsilon, another.schedule.epsilon, atol=1e-5)
    assert one.assessments.keys() == another.assessments.keys()
    for name in one.assessments:
        pair = [read_assessment(which.path / "uncertainty" / name) for which in (run, other)]
        assert pair[0].ids == pair[1].ids
        for metric, values in pair[0].scores.items():
            least = 1e-5 * np.abs(values).max()
            np.testing.assert_allclose(values, pair[1].scores[metric], rtol=1e-5, atol=least)
    for row, other_row in zip(history_of(run), history_of(other), strict=True):
        for column, value in row.items():
            assert float(value) == pytest.approx(float(other_row[column]), rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_three_processes_equal_one_process(alone, tmp_path):
    """A batch of 4 and the last batch of 3 are not divided evenly."""
    assert together.run(3, *training(tmp_path / "run"), log=tmp_path / "log") == 0
    assert_equal_to_rounding(alone, RunDirectory(tmp_path / "run"))
    said = (tmp_path / "log").read_text()
    assert said.count("best validation Dice") == 1 and "Traceback" not in said


@pytest.mark.slow
def test_resume_accepts_another_number_of_processes(tmp_path):
    run = RunDirectory(tmp_path / "run")
    constant = "training.scheduler=constant"
    for count, epochs in ((2, 2), (1, 4)):
        which = ["--resume", "--epochs", epochs] if count == 1 else ["--epochs", 2]
        # With figures, for which the first process reads images after the others have ended.
        command = [*training(run.path, constant, "output.figures=true"), *which]
        assert together.run(count, *command, log=tmp_path / "log") == 0
    assert (run.figures / "overlays_largest_d.png").is_file()
    assert "processes 2 -> 1" in (tmp_path / "log").read_text()
    whole = tmp_path / "whole"
    assert together.run(1, *training(whole, constant), log=tmp_path / "log") == 0
    assert_equal_to_rounding(RunDirectory(whole), run)


@pytest.mark.slow
def test_torchrun_with_one_process_equals_the_plain_command(alone, tmp_path):
    assert together.run(1, *training(tmp_path / "run"), log=tmp_path / "log") == 0
    assert_same_run(alone, RunDirectory(tmp_path / "run"))


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_process_ends_all_processes_and_run_can_be_resumed(tmp_path):
    run = RunDirectory(tmp_path / "run")
    settings = ("training.epochs=400", "training.scheduler=constant", "training.accumulate=3")
    command = training(run.path, *settings)
    started = together.begin(2, *command, log=tmp_path / "log")
    wait_for(run.assessment(2))
    started[1].kill()
    together.end(started)
    assert [process.exitcode for process in started] == [2, -signal.SIGKILL]
    said = (tmp_path / "log").read_text()
    assert re.search(r"another process of this command has ended.*--resume", said)
    done = read_checkpoint(run.last).epoch
    more = ["--resume", "--epochs", done + 1]
    assert together.run(2, *command, *more, log=tmp_path / "log") == 0
    last = read_checkpoint(run.last)
    assert last.epoch == done + 1
    assert all(bool(one.isfinite().all()) for one in last.weights.values())


@pytest.mark.slow
def test_two_torchrun_agents_train_one_run(alone, tmp_path):
    """As on two machines, each of which knows only the rendezvous address."""
    port, command = together.free_port(), training(tmp_path / "run")
    agents = [
        together.begin_agent(
            1, *command, log=tmp_path / f"log{node}", nodes=2, node=node, port=port
        )
        for node in (0, 1)
    ]
    assert [together.end_agent(agent) for agent in agents] == [0, 0]
    assert_equal_to_rounding(alone, RunDirectory(tmp_path / "run"))


# Without a training run.


def test_rows_and_shares_cover_each_item_once():
    for count in (1, 2, 3, 7):
        of_each = [Processes(rank, count) for rank in range(count)]
        for total in range(12):
            rows = [list(range(total))[one.rows(total)] for one in of_each]
            assert [row for part in rows for row in part] == list(range(total))
            assert max(map(len, rows)) - min(map(len, rows)) <= 1
            shares = [one.share(range(total)) for one in of_each]
            assert sorted(one for part in shares for one in part) == list(range(total))


def test_single_process_needs_no_communication():
    assert ALONE.leads and ALONE.gathered(3) == [3] and ALONE.from_leader(4) == 4
    assert ALONE.all(True) and not ALONE.all(False)


def test_merged_table_has_each_image_once():
    def table(*names):
        made = ScoreTable(Wanted("mask"))
        made.images, made.labels = list(names), ("x", "y")
        values = np.array([[ord(name), -ord(name)] for name in names], float).ravel()
        made.parts = {"entropy": [values[:2], values[2:]], "mask_pixels": [values[:1]]}
        made.halves = [np.stack([values, values])[None, :, None]]
        return made

    merged = ScoreTable.merged([table("a", "b"), ScoreTable(Wanted("mask")), table("b", "c")])
    assert merged.images == ["a", "b", "c"] and merged.labels == ("x", "y")
    wanted = [97, -97, 98, -98, 99, -99]
    np.testing.assert_array_equal(np.concatenate(merged.parts["entropy"]), wanted)
    np.testing.assert_array_equal(np.concatenate(merged.halves, axis=-1)[0, 1, 0], wanted)
    assert "mask_pixels" not in merged.parts  # Some images have no mask.


def network_of(rate, momentum):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3, momentum=momentum),
        nn.Dropout2d(rate),
        nn.Conv2d(3, 4, 3, bias=False),
        nn.Dropout(rate),
        nn.BatchNorm2d(4, affine=False),
    )


def step(network, dropout, images, rows):
    dropout.total, dropout.rows = len(images), rows
    torch.manual_seed(7)
    with dropout.taking_over():
        for _ in range(3):
            network(images[rows]).pow(3).sum().backward()


def together_in_two(rank, port, images, momentum, expected):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    network = network_of(0.5, momentum)
    processes = Processes(rank, 2)
    normalise_together(network)
    layers = {name: one for name, one in network.named_modules() if "Dropout" in str(type(one))}
    step(network, DropoutTogether(layers, processes), images, processes.rows(len(images)))
    for weights in network.parameters():
        distributed.all_reduce(weights.grad)
    state = network.state_dict() | {n: w.grad for n, w in network.named_parameters()}
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(state[name], values, rtol=1e-4, atol=1e-4, msg=name)
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "momentum"), [(5, 0.1), (1, None)])
def test_two_processes_have_equal_batch_norm_dropout_and_gradients(count, momentum):
    """The reference is torch's layers on the whole batch; of 1 image one process has none."""
    images = torch.rand(count, 2, 12, 10)
    network = network_of(0.5, momentum)
    step(network, DropoutTogether({}, ALONE), images, slice(None))
    expected = network.state_dict() | {n: w.grad for n, w in network.named_parameters()}
    forks.context()
    arguments = (together.free_port(), images, momentum, expected)
    start_processes(together_in_two, arguments, nprocs=2, start_method="forkserver")


def test_synchronised_batch_norm_equals_torch_in_evaluation_mode():
    network = network_of(0.0, 0.1)
    network(torch.rand(4, 2, 12, 10))
    images = torch.rand(2, 2, 12, 10)
    wanted = network.eval()(images)
    normalise_together(network)
    assert sum(isinstance(one, BatchNormTogether) for one in network.modules()) == 2
    assert torch.equal(network(images), wanted)

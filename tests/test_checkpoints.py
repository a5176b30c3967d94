"""Checkpoints: round trips, and refusal of damaged or forged files."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyseg.config import load_config
from polyseg.errors import PolysegError
from polyseg.records import Schedule
from polyseg.runs import checkpoints as checkpoints_module
from polyseg.runs.checkpoints import (
    Checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from polyseg.runs.weights import fit_weights, network_of, new_network

SMALL = "network.kwargs={channels: [4, 8], strides: [2], num_res_units: 1}"


@pytest.fixture
def checkpoint():
    config = load_config(overrides=[SMALL])
    network = new_network(config, 1)
    return Checkpoint(
        config=config,
        channels=1,
        epoch=7,
        weights=network.state_dict(),
        optimizer={"0/step": torch.tensor(3.0)},
        best_epoch=5,
        best_dice=0.75,
        assessments={"epoch_0005.h5": "0" * 64},
    )


def test_checkpoint_round_trip(tmp_path, checkpoint):
    path = tmp_path / "last.safetensors"
    write_checkpoint(path, checkpoint)
    again = read_checkpoint(path)
    assert again.config == checkpoint.config
    assert (again.epoch, again.best_epoch, again.best_dice) == (7, 5, 0.75)
    assert again.assessments == checkpoint.assessments
    assert torch.equal(again.optimizer["0/step"], torch.tensor(3.0))
    images = torch.rand(1, 1, 32, 32)
    network = new_network(checkpoint.config, 1)
    fit_weights(network, checkpoint.weights)
    assert torch.equal(network_of(again).eval()(images), network.eval()(images))


@pytest.mark.parametrize("labels", [{}, {"a": 1, "b": 2}])
def test_history_and_schedule_round_trip(tmp_path, checkpoint, labels):
    config = load_config(overrides=[SMALL, f"data.foreground={labels or 1}"])
    names = ["x", "y", "x", "y"] if labels else None
    ids = ["ä b", "ä b", "c", "c"] if labels else ["ä b", "c"]
    if labels:
        names = ["a", "b", "a", "b"]
    epsilon = np.arange(2 * len(ids), dtype=np.float32).reshape(2, -1) / 3
    group = np.full(epsilon.shape, -1, np.int32)
    group[1] = 0
    statistics = np.array([[0.25, 0.1]])
    schedule = Schedule(ids, np.array([1, 2]), epsilon, names, np.array([-1, 1]), group, statistics)
    history = [{"epoch": 1.0, "loss": 1 / 3}, {"epoch": 2.0, "loss": float("nan")}]
    whole = dataclasses.replace(
        checkpoint, config=config, epoch=2, best_epoch=2, history=history, schedule=schedule
    )
    write_checkpoint(tmp_path / "a", whole)
    again = read_checkpoint(tmp_path / "a")
    np.testing.assert_equal(again.history, history)
    assert again.schedule is not None
    assert (again.schedule.ids, again.schedule.labels) == (ids, names)
    np.testing.assert_array_equal(again.schedule.epsilon, epsilon)
    np.testing.assert_array_equal(again.schedule.assessed, [-1, 1])
    np.testing.assert_array_equal(again.schedule.group, group)
    np.testing.assert_array_equal(again.schedule.statistics, statistics)
    bare = dataclasses.replace(schedule, group=None, statistics=None)
    write_checkpoint(tmp_path / "a", dataclasses.replace(whole, schedule=bare))
    assert read_checkpoint(tmp_path / "a").schedule.group is None
    broken = dataclasses.replace(schedule, statistics=np.full((1, 2), np.inf))
    write_checkpoint(tmp_path / "a", dataclasses.replace(whole, schedule=broken))
    with pytest.raises(PolysegError, match="statistics that are not finite"):
        read_checkpoint(tmp_path / "a")


def test_checkpoint_can_be_read_without_weights(tmp_path, checkpoint):
    schedule = Schedule(["a"], np.array([1]), np.ones((1, 1), np.float32), None, np.array([-1]))
    history, losses = [{"epoch": 1.0, "train_loss": 0.5}], np.array([0.25])
    optimizer = {"0/step": torch.tensor(3.0), "0/none": torch.empty(0, 2, dtype=torch.bfloat16)}
    whole = dataclasses.replace(
        checkpoint,
        epoch=1,
        best_epoch=1,
        schedule=schedule,
        history=history,
        losses=losses,
        optimizer=optimizer,
    )
    write_checkpoint(tmp_path / "a", whole)
    record = read_checkpoint(tmp_path / "a", with_weights=False)
    assert record.weights == {} == record.optimizer
    assert record.history == history and record.losses.tolist() == [0.25]
    assert record.schedule.epsilon.tolist() == [[1.0]]
    again = read_checkpoint(tmp_path / "a")
    assert (
        again.optimizer.keys() == optimizer.keys() and again.weights.keys() == whole.weights.keys()
    )
    assert all(torch.equal(again.optimizer[name], one) for name, one in optimizer.items())
    content = bytearray((tmp_path / "a").read_bytes())
    content[-1] ^= 1  # A byte of a tensor.
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(PolysegError, match="its sha256 differs"):
        read_checkpoint(tmp_path / "a", with_weights=False)


def with_header(path, header):
    tensors = {"weights/a": torch.zeros(1)}
    # A forged header can carry a valid hash.
    stored = {name: checkpoints_module.stored_of(one) for name, one in tensors.items()}
    metadata = {"polyseg": header, "sha256": checkpoints_module.digest_of(header, stored)}
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("{}", "is not a polyseg checkpoint"),
        ("[]", "is not a polyseg checkpoint"),
        ("{", "cannot be read as a checkpoint"),
        ("[" * 100_000, "cannot be read as a checkpoint"),
        ('{"kind": "polyseg checkpoint", "schema": 99}', "has schema 99"),
        ('{"kind": "polyseg checkpoint", "schema": 2}', "cannot be read as a checkpoint"),
        (
            '{"kind": "polyseg checkpoint", "schema": 2, "epoch": 0, "best_epoch": 0, '
            '"channels": 1, "config": {"a": 1}}',
            "a: unknown key",
        ),
    ],
)
def test_invalid_headers_are_refused_in_one_line(tmp_path, header, match):
    path = tmp_path / "a.safetensors"
    with_header(path, header)
    with pytest.raises(PolysegError, match=match) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("epoch", -1), ("epoch", 10**30), ("epoch", "7"), ("best_epoch", 99), ("channels", 0)],
)
def test_impossible_numbers_are_refused(tmp_path, checkpoint, field, value):
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, dataclasses.replace(checkpoint, **{field: value}))
    with pytest.raises(PolysegError, match=field):
        read_checkpoint(path)


def test_non_finite_weights_are_refused(checkpoint):
    weights = dict(checkpoint.weights)
    name = next(key for key in weights if key.endswith("weight"))
    weights[name] = weights[name] * float("nan")
    with pytest.raises(PolysegError, match="not finite"):
        fit_weights(new_network(checkpoint.config, 1), weights)


@given(cut=st.integers(0, 3000), at=st.integers(0, 3000), bit=st.integers(0, 7))
def test_damaged_file_is_refused_in_one_line(tmp_path_factory, cut, at, bit):
    folder = tmp_path_factory.mktemp("damage")
    config = load_config(overrides=[SMALL])
    write_checkpoint(folder / "whole", Checkpoint(config, 1, 1, {"a": torch.arange(4.0)}))
    content = bytearray((folder / "whole").read_bytes())
    content[at % len(content)] ^= 1 << bit
    (folder / "bad").write_bytes(content[: len(content) - cut % len(content)])
    with pytest.raises(PolysegError) as error:
        read_checkpoint(folder / "bad")
    assert "\n" not in str(error.value)


def test_tensor_larger_than_the_file_is_refused(tmp_path):
    header = json.dumps({"weights/a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}})
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(16)
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(PolysegError, match="is damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_pickled_checkpoint_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(PolysegError, match="is damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "model.pt")


def test_checkpoint_code_is_imported_only_with_trust(tmp_path, monkeypatch, checkpoint):
    (tmp_path / "foreign.py").write_text(
        "import pathlib, torch\n"
        "pathlib.Path('ran').touch()\n"
        "def make(in_channels, out_channels):\n"
        "    return torch.nn.Sequential(\n"
        "        torch.nn.Dropout2d(0.5), torch.nn.Conv2d(in_channels, out_channels, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(overrides=["network.name=foreign:make"])
    weights = {"core.1.weight": torch.zeros(1, 1, 1, 1), "core.1.bias": torch.zeros(1)}
    write_checkpoint(tmp_path / "a.safetensors", Checkpoint(config, 1, 1, weights))
    read = read_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(PolysegError, match="--trust"):
        network_of(read)
    assert not (tmp_path / "ran").exists()
    network_of(read, trust=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_weights_that_do_not_fit_the_network_are_refused(checkpoint, change):
    weights = dict(checkpoint.weights)
    name = next(key for key in weights if key.endswith("weight"))
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights["another"] = torch.zeros(1)
    else:
        weights[name] = weights[name].double() if change == "dtype" else weights[name][:1]
    with pytest.raises(PolysegError, match="1 weights do not fit"):
        fit_weights(new_network(checkpoint.config, 1), weights)


@pytest.mark.parametrize(
    "setting",
    [
        "network.kwargs={channels: [4096, 4096, 4096, 4096, 4096], strides: [2, 2, 2, 2]}",
        "network={name: basic-unet, kwargs: {features: [4096, 4096, 4096, 4096, 4096, 4096]}}",
        "network={name: dynunet, kwargs: {filters: [4096, 4096, 4096, 4096, 4096]}}",
    ],
)
def test_network_larger_than_its_weights_is_refused_before_it_is_built(
    checkpoint, setting, monkeypatch
):
    """The networks of these settings would take many gigabytes."""
    made = []
    empty = torch.empty

    def watched(*arguments, **named):
        values = empty(*arguments, **named)
        made.append(0 if values.device.type == "meta" else values.numel())
        return values

    monkeypatch.setattr(torch, "empty", watched)
    huge = dataclasses.replace(checkpoint, config=load_config(overrides=[setting]))
    with pytest.raises(PolysegError, match="weights do not fit its configuration"):
        network_of(huge)
    assert made and max(made) < 1e6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "basic-unet", "attention-unet", "dynunet", "segresnet"])
def test_weights_of_every_network_are_checked(name):
    config = load_config(overrides=[f"network.name={name}"])
    network = new_network(config, 3)
    again = network_of(Checkpoint(config, 3, 1, network.state_dict()))
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other) and other.device.type == "cpu"


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
)
def test_tensors_of_any_dtype_are_read_by_safetensors(tmp_path, dtype):
    values = (torch.arange(6).reshape(2, 3) % 2).to(dtype).T
    config = load_config(overrides=[SMALL])
    write_checkpoint(tmp_path / "a", Checkpoint(config, 1, 1, {"a": values, "b": values[0, 0]}))
    again = safetensors.torch.load_file(tmp_path / "a")
    assert torch.equal(again["weights/a"], values) and again["weights/a"].dtype == dtype
    assert again["weights/b"].shape == ()


@pytest.mark.parametrize(
    "scaler",
    [{"x": 1}, {"scale": 0}, {"growth_factor": 1}, {"backoff_factor": 2}, {"scale": "1"}],
)
def test_invalid_gradient_scaler_state_is_refused(tmp_path, checkpoint, scaler):
    good = torch.amp.GradScaler("cpu").state_dict()
    path = tmp_path / "a"
    write_checkpoint(path, dataclasses.replace(checkpoint, scaler=good))
    assert read_checkpoint(path).scaler == good
    write_checkpoint(path, dataclasses.replace(checkpoint, scaler=good | scaler))
    with pytest.raises(PolysegError, match="state of the gradient scaler"):
        read_checkpoint(path)

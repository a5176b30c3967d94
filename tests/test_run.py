"""A run's folder and its checkpoints, also those that come from somebody else."""

import dataclasses
import json
import os

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyseg.config import load_config
from polyseg.errors import PolysegError
from polyseg.run import (
    Checkpoint,
    RunDirectory,
    find_checkpoint,
    fit_weights,
    new_network,
    read_checkpoint,
    write_checkpoint,
)

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


def test_a_checkpoint_comes_back_as_it_was(tmp_path, checkpoint):
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
    assert torch.equal(again.build().eval()(images), network.eval()(images))


def with_header(path, header):
    safetensors.torch.save_file({"weights/a": torch.zeros(1)}, path, {"polyseg": header})


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("{}", "is no polyseg checkpoint"),
        ("[]", "is no polyseg checkpoint"),
        ("{", "cannot be read as a checkpoint"),
        ("[" * 100_000, "cannot be read as a checkpoint"),
        ('{"kind": "polyseg checkpoint", "schema": 99}', "another polyseg"),
        ('{"kind": "polyseg checkpoint", "schema": 1}', "cannot be read as a checkpoint"),
        (
            '{"kind": "polyseg checkpoint", "schema": 1, "epoch": 0, "best_epoch": 0, '
            '"channels": 1, "config": {"a": 1}}',
            "a: unknown key",
        ),
    ],
)
def test_headers_that_are_not_ours_are_one_line(tmp_path, header, match):
    path = tmp_path / "a.safetensors"
    with_header(path, header)
    with pytest.raises(PolysegError, match=match) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("epoch", -1), ("epoch", 10**30), ("epoch", "7"), ("best_epoch", 99), ("channels", 0)],
)
def test_numbers_that_no_training_writes_are_refused(tmp_path, checkpoint, field, value):
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, dataclasses.replace(checkpoint, **{field: value}))
    with pytest.raises(PolysegError, match=field):
        read_checkpoint(path)


def test_weights_that_diverged_are_refused(checkpoint):
    weights = dict(checkpoint.weights)
    name = next(key for key in weights if key.endswith("weight"))
    weights[name] = weights[name] * float("nan")
    with pytest.raises(PolysegError, match="not finite"):
        fit_weights(new_network(checkpoint.config, 1), weights)


@given(cut=st.integers(0, 3000), flip=st.integers(0, 3000))
def test_damage_is_refused_or_harmless(tmp_path_factory, cut, flip):
    folder = tmp_path_factory.mktemp("damage")
    config = load_config(overrides=[SMALL])
    whole = Checkpoint(config, 1, 1, {"a": torch.arange(4.0)})
    write_checkpoint(folder / "whole", whole)
    content = bytearray((folder / "whole").read_bytes())
    content[flip % len(content)] ^= 0x40
    (folder / "bad").write_bytes(content[: len(content) - cut % len(content)])
    try:
        read_checkpoint(folder / "bad")
    except PolysegError as error:
        assert "\n" not in str(error)


def test_a_huge_tensor_that_is_not_there_takes_no_memory(tmp_path):
    header = json.dumps({"weights/a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}})
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(16)
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(PolysegError, match="is damaged or no checkpoint"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_a_pickle_is_not_opened(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(PolysegError, match="is damaged or no checkpoint"):
        read_checkpoint(tmp_path / "model.pt")


def test_foreign_code_is_imported_only_with_trust(tmp_path, monkeypatch, checkpoint):
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
        read.build()
    assert not (tmp_path / "ran").exists()
    read.build(trust=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_weights_must_fit_exactly(checkpoint, change):
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


def test_a_run_stands_for_its_best_checkpoint(tmp_path, checkpoint):
    run = RunDirectory(tmp_path)
    with pytest.raises(PolysegError, match="neither a checkpoint nor a run"):
        find_checkpoint(tmp_path)
    write_checkpoint(run.last, checkpoint)
    assert find_checkpoint(tmp_path) == run.last
    write_checkpoint(run.best, checkpoint)
    assert find_checkpoint(tmp_path) == run.best
    assert find_checkpoint(run.last) == run.last


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"train": [], "val": [], "test": []}',
        '{"train": 1}',
        '{"train": [{"id": "a"}]}',
        "[" * 9999,
    ],
)
def test_a_damaged_split_is_one_line(tmp_path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(PolysegError, match=r"split.json: cannot be read") as error:
        RunDirectory(tmp_path).read_split()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "epoch,train_loss\n1,abc\n", "epoch,train_loss\n1,0.5\n3,0.5\n", "epoch\n1\n"]
)
def test_a_damaged_history_is_one_line(tmp_path, text):
    (tmp_path / "history.csv").write_text(text)
    with pytest.raises(PolysegError, match=r"history.csv: cannot be read"):
        RunDirectory(tmp_path).read_history(3)


def test_a_pipe_in_place_of_a_record_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "split.json")
    os.mkfifo(tmp_path / "history.csv")
    with pytest.raises(PolysegError, match="is no file"):
        RunDirectory(tmp_path).read_split()
    with pytest.raises(PolysegError, match="is no file"):
        RunDirectory(tmp_path).read_history(3)


@pytest.mark.parametrize(
    "setting",
    [
        "network.kwargs={channels: [4096, 4096, 4096, 4096, 4096], strides: [2, 2, 2, 2]}",
        "network={name: basic-unet, kwargs: {features: [4096, 4096, 4096, 4096, 4096, 4096]}}",
        "network={name: dynunet, kwargs: {filters: [4096, 4096, 4096, 4096, 4096]}}",
    ],
)
def test_a_network_larger_than_its_weights_is_never_made(checkpoint, setting, monkeypatch):
    """These would take many gigabytes."""
    made = []
    empty = torch.empty

    def watched(*arguments, **named):
        values = empty(*arguments, **named)
        made.append(0 if values.device.type == "meta" else values.numel())
        return values

    monkeypatch.setattr(torch, "empty", watched)
    huge = dataclasses.replace(checkpoint, config=load_config(overrides=[setting]))
    with pytest.raises(PolysegError, match="weights do not fit its own configuration"):
        huge.build()
    assert made and max(made) < 1e6


@pytest.mark.parametrize("name", ["unet", "basic-unet", "attention-unet", "dynunet", "segresnet"])
def test_every_network_can_be_held_to_its_weights(name):
    config = load_config(overrides=[f"network.name={name}"])
    network = new_network(config, 3)
    again = Checkpoint(config, 3, 1, network.state_dict()).build()
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other) and other.device.type == "cpu"

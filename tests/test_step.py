"""Training steps with channels last and with deterministic algorithms."""

import os
from pathlib import Path

import pytest
import safetensors.numpy
import torch
from torch import nn

from polyseg.commands.train import train
from polyseg.errors import PolysegError
from polyseg.networks.dropout import stochastic_layers
from polyseg.networks.inference import choose_algorithms
from polyseg.networks.networks_by_name import build_network
from polyseg.runs.run_folder import RunDirectory
from polyseg.system.process_group import Processes
from polyseg.training.distributed import DropoutTogether
from polyseg.training.trainer import Trainer
from tests.test_train import (
    Stop,
    assert_same_run,
    history_of,
    run_of,
    stop_after,
    trainer_arguments,
    weights_of,
)

LAST, PLAIN = (f"training.channels_last={value}" for value in ("true", "false"))
WHERE = "CUBLAS_WORKSPACE_CONFIG"


def test_channels_last_changes_an_epoch_by_rounding_only(tiny):
    settings = ("training.epochs=1", "training.optimizer=sgd")
    plain, last = (run_of(tiny(*names, *settings)) for names in (("plain", PLAIN), ("last", LAST)))
    for name, values in weights_of(plain).items():
        torch.testing.assert_close(weights_of(last)[name], values, rtol=1e-4, atol=1e-6, msg=name)
    for row, other in zip(history_of(plain), history_of(last), strict=True):
        assert {name: float(value) for name, value in other.items()} == pytest.approx(
            {name: float(value) for name, value in row.items()}, rel=1e-5, abs=1e-6
        )


def is_channels_last_only(weights):
    return weights.is_contiguous(memory_format=torch.channels_last) and not weights.is_contiguous()


def test_channels_last_applies_to_kernels_feature_maps_and_gradients(tiny):
    trainer = Trainer(*trainer_arguments(tiny("run", LAST, "control.enabled=false")))
    layer = next(
        one
        for one in trainer.network.modules()
        if isinstance(one, nn.Conv2d) and min(one.in_channels, one.out_channels) > 1
    )
    seen = []
    layer.register_forward_hook(lambda _, given, made: seen.extend((given[0], made)))
    trainer._train(1)
    assert seen and all(is_channels_last_only(features) for features in seen)
    assert is_channels_last_only(layer.weight) and is_channels_last_only(layer.weight.grad)
    moments = trainer.steps.optimizer.state[layer.weight]
    assert is_channels_last_only(moments["exp_avg"]) and is_channels_last_only(
        moments["exp_avg_sq"]
    )
    plain = Trainer(*trainer_arguments(tiny("run", PLAIN, "control.enabled=false")))
    assert all(weights.is_contiguous() for weights in plain.network.parameters())


def test_checkpoint_stores_weights_in_contiguous_order(tiny):
    config, images, split, _ = trainer_arguments(tiny("run", LAST, "training.epochs=1"))
    run = RunDirectory(Path(config.output.path))
    trainer = Trainer(config, images, split, run)
    with run.writing(resume=False):
        trainer.fit()
    assert any(is_channels_last_only(one) for one in trainer.network.parameters() if one.dim() == 4)
    written = safetensors.numpy.load_file(run.last)
    for name, weights in trainer.network.state_dict().items():
        assert written[f"weights/{name}"].flags.c_contiguous
        assert written[f"weights/{name}"].tolist() == weights.tolist(), name


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_run_with_channels_last_resumes_bit_for_bit(tiny, optimizer):
    """Fused Adam depends on the memory order of its state, whatever that of the weights is."""
    settings = (LAST, f"training.optimizer={optimizer}")
    whole = run_of(tiny("whole", *settings))
    config = tiny("stopped", *settings)
    with pytest.raises(Stop):
        train(config, progress=stop_after(1))
    train(config, resume=True)
    assert_same_run(whole, RunDirectory(Path(config.output.path)))


@pytest.mark.parametrize("override", [PLAIN, "training.deterministic=false"])
def test_settings_that_change_rounding_need_accept_changes(tiny, finished, override):
    run = finished("run", "training.epochs=1")
    changed = tiny("run", "training.epochs=2", override)
    with pytest.raises(PolysegError, match=r"cannot change training\..*--accept-changes allows"):
        train(changed, resume=True)
    train(changed, resume=True, accept_changes=True)
    assert len(history_of(run)) == 2


def viewing(in_channels, out_channels):
    class Viewing(nn.Conv2d):
        def forward(self, x):
            features = super().forward(x)
            return features.view(len(x), -1).view(features.shape)

    return nn.Sequential(Viewing(in_channels, 4, 3, padding=1), nn.Conv2d(4, out_channels, 1))


def test_view_on_channels_last_names_the_setting(tiny):
    settings = (f"network.name={__name__}:viewing", "network.kwargs={}", "control.enabled=false")
    run_of(tiny("plain", *settings))
    with pytest.raises(PolysegError, match=r"^training\.channels_last: .*channels_last=false$"):
        train(tiny("last", *settings, LAST))


def test_channels_last_is_automatic_on_cpu_for_suitable_built_in_networks_only(tiny):
    ours = Trainer(*trainer_arguments(tiny("ours", "control.enabled=false")))
    assert ours.steps.channels_last
    assert any(is_channels_last_only(one) for one in ours.network.parameters() if one.dim() == 4)
    settings = (f"network.name={__name__}:viewing", "network.kwargs={}", "control.enabled=false")
    assert not Trainer(*trainer_arguments(tiny("other", *settings))).steps.channels_last
    normalised = tiny("third", "network.kwargs.norm=instance", "control.enabled=false")
    assert not Trainer(*trainer_arguments(normalised)).steps.channels_last


@pytest.mark.parametrize("kind", ["channel", "element"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_processes_draw_the_dropout_of_torch_in_each_memory_format(kind, order):
    network = build_network("unet", in_channels=1, dropout=0.5, dropout_kind=kind)
    layer = next(iter(stochastic_layers(network).values())).train()
    features = torch.randn(4, 6, 5, 5).contiguous(memory_format=order)
    torch.manual_seed(1)
    expected = layer(features)
    together = DropoutTogether({"layer": layer}, Processes(rank=1, count=2))
    together.total, together.rows = 4, slice(2, 4)
    torch.manual_seed(1)
    with together.taking_over():
        found = layer(features[2:])
    assert torch.equal(found, expected[2:]) and 0 < int((found == 0).sum()) < found.numel()


@pytest.fixture
def torch_settings_restored(monkeypatch):
    """Restore torch's global settings after the test."""
    cudnn, utils = torch.backends.cudnn, torch.utils.deterministic
    flags = cudnn.deterministic, cudnn.benchmark, utils.fill_uninitialized_memory
    asked = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.setenv(WHERE, "so that it is as it was afterwards")
    monkeypatch.delenv(WHERE)
    yield
    cudnn.deterministic, cudnn.benchmark, utils.fill_uninitialized_memory = flags
    torch.use_deterministic_algorithms(asked, warn_only=warns)


def torch_settings():
    return {
        "deterministic": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "everywhere": torch.are_deterministic_algorithms_enabled(),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "cuBLAS": os.environ.get(WHERE),
    }


@pytest.mark.usefixtures("torch_settings_restored")
def test_deterministic_sets_gpu_algorithms():
    choose_algorithms(torch.device("cuda"), deterministic=True)
    everywhere = dict.fromkeys(("deterministic", "everywhere", "only warns"), True)
    same_bits = {"benchmark": False, "fills": False, "cuBLAS": ":4096:8", **everywhere}
    assert torch_settings() == same_bits
    choose_algorithms(torch.device("cuda:1"), deterministic=False)
    fast = dict.fromkeys(everywhere, False)
    assert torch_settings() == {"benchmark": True, "fills": False, "cuBLAS": ":4096:8", **fast}


@pytest.mark.usefixtures("torch_settings_restored")
def test_cublas_environment_variable_is_kept(monkeypatch):
    monkeypatch.setenv(WHERE, ":16:8")
    choose_algorithms(torch.device("cuda"), deterministic=True)
    assert torch_settings()["cuBLAS"] == ":16:8"


@pytest.mark.usefixtures("torch_settings_restored")
@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_other_devices_do_not_change_torch_settings(device, deterministic):
    before = torch_settings()
    choose_algorithms(torch.device(device), deterministic=deterministic)
    assert torch_settings() == before


@pytest.mark.slow
def test_cpu_training_is_equal_without_deterministic(tiny, finished):
    assert_same_run(finished("one"), run_of(tiny("two", "training.deterministic=false")))

"""Networks by name: image sizes, selection of dropout layers, and refused networks."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from polyseg.choices import NETWORKS
from polyseg.data.phantoms.phantom_sets import make_phantom
from polyseg.errors import PolysegError
from polyseg.losses import dice_loss
from polyseg.networks import dropout
from polyseg.networks.dropout import refuse_hidden_dropout, stochastic_layers
from polyseg.networks.networks_by_name import build_network
from polyseg.networks.segmentation_network import (
    SegmentationNetwork,
    hash_weights,
    refuse_untrainable,
)
from polyseg.system import memory


class WithFunctionalDropout(nn.Module):
    def __init__(self, in_channels: int = 1, out_channels: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.dropout = nn.Dropout2d(0.3)
        self.head = nn.Conv2d(4, out_channels, 1)

    def forward(self, x):
        x = self.dropout(self.convolution(x))
        return self.head(functional.dropout(x, 0.5, self.training))


class OnlyInTraining(nn.Module):
    def forward(self, x):
        return functional.dropout2d(x, 0.5) if self.training else x


class AttentionDropout(nn.Module):
    def forward(self, x):
        rate = 0.1 if self.training else 0.0
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=rate)


def plain_factory(in_channels, out_channels, width=4):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.Dropout2d(0.4),
        nn.Conv2d(width, out_channels, 1),
    )


def wrong_shape(in_channels, out_channels):
    return nn.Conv2d(in_channels, out_channels + 1, 1)


def not_a_module(in_channels, out_channels):
    return "no network"


@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_accepts_any_size_and_keeps_it(name):
    network = build_network(name, in_channels=3).eval()
    for size in ((64, 64), (33, 50), (16, 130)):
        with torch.no_grad():
            assert network(torch.rand(1, 3, *size)).shape == (1, 1, *size)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_default_dropout_begins_at_the_bottleneck_and_spares_the_output(name):
    """The first stochastic layer has the smallest feature map of all."""
    network = build_network(name, in_channels=1, dropout=0.3)
    seen = []
    for layer in stochastic_layers(network).values():
        assert isinstance(layer, nn.Dropout2d) and layer.p == 0.3
        layer.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[1:])))
    with torch.no_grad():
        network.eval()(torch.rand(1, 1, 64, 64))
    areas = [height * width for _, height, width in seen]
    assert areas[0] == min(areas) < max(areas)
    assert min(channels for channels, _, _ in seen) > 1


@pytest.mark.parametrize("name", list(NETWORKS))
def test_dropout_kind_and_rate_are_applied(name):
    network = build_network(name, in_channels=1, dropout=0.1, dropout_kind="element")
    kinds = {type(layer) for layer in stochastic_layers(network).values()}
    assert kinds == {nn.Dropout}
    assert not stochastic_layers(build_network(name, in_channels=1, dropout=0.0))


def test_dropout_layers_setting_selects_layers():
    def count(choice):
        return len(stochastic_layers(build_network("unet", in_channels=1, dropout_layers=choice)))

    assert 0 < count("bottleneck") < count("decoder") < count("all")
    assert count(["*adn.D"]) == count("all")
    with pytest.raises(PolysegError, match=r"'nothing\*' matches none of the dropout layers: core"):
        count(["nothing*"])


def narrow_factory(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 1, 1), nn.Dropout(0.5), nn.Conv2d(1, out_channels, 1)
    )


def test_dropout_on_a_single_channel_is_active_only_if_named():
    name = f"{__name__}:narrow_factory"
    assert not stochastic_layers(build_network(name, in_channels=1))
    named = build_network(name, in_channels=1, dropout_layers=["core.1"])
    assert list(stochastic_layers(named)) == ["core.1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_can_overfit_one_image(name):
    """A network that normalises or squashes its output could not: probabilities stay near 0.5."""
    torch.manual_seed(0)
    phantom = make_phantom(0, 0, difficulty=0.0, size=(32, 32))
    image = torch.from_numpy(phantom.image / 255).float()[None, None].repeat(2, 1, 1, 1)
    mask = torch.from_numpy(phantom.mask)[None, None].repeat(2, 1, 1, 1)
    network = build_network(name, in_channels=1, dropout=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(60):
        loss = dice_loss(network((image - image.mean()) / image.std()).sigmoid(), mask).mean()
        if loss.item() < 0.15:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"the loss is {loss.item()} after 60 steps")


def test_choosing_layers_does_not_change_the_initial_weights():
    hashes = set()
    for choice in ("decoder", "all"):
        torch.manual_seed(1)
        hashes.add(hash_weights(build_network("unet", in_channels=1, dropout_layers=choice)))
    assert len(hashes) == 1


def test_padding_does_not_change_the_centre_of_the_output():
    """Far from the border a padded crop has the same output as the larger image."""
    core = nn.Conv2d(1, 1, 3, padding=1)
    image = torch.rand(1, 1, 20, 30)
    with torch.no_grad():
        padded = SegmentationNetwork(core, 16)(image)
    torch.testing.assert_close(padded[..., 1:-1, 1:-1], core(image)[..., 1:-1, 1:-1])


def test_user_network_keeps_its_dropout():
    network = build_network(
        f"{__name__}:plain_factory", in_channels=2, settings={"width": 6}, multiple_of=4
    )
    assert [layer.p for layer in stochastic_layers(network).values()] == [0.4]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet", "is not a network: choose unet, basic-unet"),
        ("no_such_module:factory", "No module named"),
        (f"{__name__}:nothing", "no attribute 'nothing'"),
        (f"{__name__}:wrong_shape", r"must return logits of shape \(B, 1, H, W\), gave \(2, 2"),
        (f"{__name__}:not_a_module", "must return a torch.nn.Module"),
    ],
)
def test_invalid_network_name_error_states_the_cause(name, match):
    with pytest.raises(PolysegError, match=match):
        build_network(name, in_channels=1)


def test_invalid_network_argument_error_states_the_cause():
    with pytest.raises(PolysegError, match=r"network\.kwargs: unet refuses them"):
        build_network("unet", in_channels=1, settings={"colour": "red"})


@pytest.mark.parametrize("network", [WithFunctionalDropout(), OnlyInTraining()])
def test_functional_dropout_is_refused(network):
    images = torch.rand(2, 1, 8, 8)
    before = torch.random.get_rng_state()
    with pytest.raises(PolysegError, match="1 calls of functional dropout"):
        refuse_hidden_dropout(network, images)
    assert torch.equal(before, torch.random.get_rng_state())


class ReusesItsDropout(nn.Module):
    """A network that uses one dropout layer at two depths."""

    def __init__(self, in_channels: int = 1, out_channels: int = 1) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(in_channels, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, out_channels, 1)
        self.drop = nn.Dropout2d(0.3, inplace=True)
        self.again = self.drop

    def forward(self, x):
        return self.head(self.drop(self.wide(self.drop(self.narrow(x)))))


def test_dropout_layer_used_twice_is_accepted():
    network = build_network(f"{__name__}:ReusesItsDropout", in_channels=1)
    (layer,) = stochastic_layers(network).values()
    assert layer.p == 0.3 and not layer.inplace
    refuse_hidden_dropout(network, torch.rand(2, 1, 8, 8))


def test_dropout_layer_with_two_names_is_removed_under_both():
    network = build_network(f"{__name__}:ReusesItsDropout", in_channels=1, dropout_layers=[])
    assert not stochastic_layers(network)


class SkipsItsDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(0.3)

    def forward(self, x):
        return self.drop(x) if self.training else x


def test_dropout_layer_skipped_in_evaluation_mode_is_refused():
    with pytest.raises(
        PolysegError, match="drop: is called 1 times in training and 0 times in eval"
    ):
        refuse_hidden_dropout(SkipsItsDropout(), torch.rand(2, 1, 8, 8))


def test_network_whose_dropout_is_never_called_is_refused():
    network = nn.Conv2d(1, 1, 1)
    network.drop = nn.Dropout(0.5)
    with pytest.raises(PolysegError, match="none of its active dropout layers is called"):
        refuse_hidden_dropout(network, torch.rand(2, 1, 8, 8))


def test_dropout_whose_first_dimension_is_not_the_batch_is_refused():
    windows = nn.Sequential(nn.Flatten(0, 1), nn.Dropout(0.5))
    with pytest.raises(PolysegError, match="first dimension of its output is 6 for 2 images"):
        refuse_hidden_dropout(windows, torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    "layer", [nn.MultiheadAttention(4, 2, dropout=0.1), nn.LSTM(4, 4, 2, dropout=0.1)]
)
def test_layers_with_internal_dropout_are_refused(layer):
    with pytest.raises(PolysegError, match="drops inside itself"):
        stochastic_layers(nn.Sequential(layer))


def test_dropout_set_during_an_attention_call_is_detected():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, dropout=0.0)

        def forward(self, x):
            self.inner.dropout = 0.5 if self.training else 0.0
            attended, _ = self.inner(x, x, x)
            self.inner.dropout = 0.0
            return attended

    with pytest.raises(PolysegError, match="functional dropout"):
        refuse_hidden_dropout(Attention(), torch.rand(2, 4, 8))


def raising_factory(in_channels, out_channels):
    raise KeyError("weights")


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("unet", {"dropout": 0.1}, "dropout cannot be set there"),
        ("unet", {"in_channels": 1}, "in_channels cannot be set there"),
        ("dynunet", {"deep_supervision": True}, "deep_supervision cannot be set there"),
        ("unet", {"channels": 5}, "unet refuses them"),
        ("unet", {"channels": []}, "unet refuses them"),
        ("unet", {"strides": [0, 2, 2, 2]}, "network"),
        ("unet", {"kernel_size": 2}, "network"),
        ("unet", {"strides": [3000, 2, 2, 2]}, "multiples of 24000; use at most 512"),
        ("unet", {"num_res_units": 100_000}, "num_res_units 100000: at most 16"),
        ("segresnet", {"blocks_down": [99, 1, 1, 1]}, "blocks_down 99: at most 16"),
        (f"{__name__}:plain_factory", {"in_channels": 1}, "refuses them"),
        (f"{__name__}:raising_factory", {}, "weights"),
        (":f", {}, "give package.module:factory"),
        (".x:f", {}, "give package.module:factory"),
    ],
)
def test_invalid_network_settings_give_one_line(name, settings, match):
    with pytest.raises(PolysegError, match=match) as error:
        build_network(name, in_channels=1, settings=settings)
    assert "\n" not in str(error.value)


def test_dropout_inside_attention_is_refused():
    with pytest.raises(PolysegError, match="functional dropout"):
        refuse_hidden_dropout(AttentionDropout(), torch.rand(2, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["channel", "element"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_built_in_networks_are_random_by_dropout_layers_only(name, kind):
    network = build_network(name, in_channels=1, dropout_kind=kind)
    before = hash_weights(network)
    refuse_hidden_dropout(network, torch.rand(2, 1, 32, 32))
    assert hash_weights(network) == before


def image_by_image(x):
    return len(x), 1, 1, 1


# Random operations on features in training, by the name in the error message.
RANDOM = {
    "bernoulli": lambda x: x * torch.bernoulli(torch.full(image_by_image(x), 0.9)) / 0.9,
    "bernoulli_": lambda x: x * x.new_empty(image_by_image(x)).bernoulli_(0.95),
    "rand": lambda x: x if torch.rand(()) < 0.95 else torch.zeros_like(x),
    "rand_like": lambda x: x * (torch.rand_like(x) < 0.9),
    # As behind the residual scale of 1e-6 in ConvNeXt.
    "randn_like": lambda x: x + 1e-6 * torch.randn_like(x),
    "rrelu": lambda x: functional.rrelu(x, training=True),
    "Python's random": lambda x: x if random.random() < 0.95 else torch.zeros_like(x),
    "numpy.random": lambda x: x * float(np.random.rand() < 0.95),  # noqa: NPY002
    "its own generator": lambda x: x * torch.rand(image_by_image(x), generator=OWN),
}
OWN = torch.Generator()


class RandomInTraining(nn.Module):
    """A network with dropout, batch normalisation, and another random operation."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw
        self.convolution, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.dropout, self.head = nn.Dropout2d(0.3), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        x = self.dropout(self.norm(self.convolution(x)))
        return self.head(self.draw(x) if self.training else x)


def states():
    numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
    return torch.random.get_rng_state().tolist(), random.getstate(), numpy_state


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_outside_dropout_layers_is_refused_by_name(name):
    network, images = RandomInTraining(RANDOM[name]), torch.rand(2, 1, 8, 8)
    weights, before = hash_weights(network), states()
    with pytest.raises(PolysegError, match=rf"random even without .*, by .*{name}, .* by nn\.Dro"):
        refuse_hidden_dropout(network, images)
    assert states() == before and hash_weights(network) == weights
    assert all(module.training for module in network.modules())


def test_random_numbers_without_an_effect_on_the_output_are_accepted():
    refuse_hidden_dropout(RandomInTraining(lambda x: (torch.rand(3), x)[1]), torch.rand(2, 1, 8, 8))


class MovesItsBuffers(nn.Module):
    """A network that subtracts a running mean, replaced by each training pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.dropout = nn.Dropout2d(0.3)
        self.norm = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3, padding=1))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
        return self.dropout(self.norm(x - self.mean))


def test_check_restores_running_statistics():
    network = MovesItsBuffers()
    mean, before = network.mean, hash_weights(network)
    refuse_hidden_dropout(network, torch.rand(2, 1, 8, 8))
    assert network.mean is mean and hash_weights(network) == before


def test_all_outputs_in_training_are_checked_for_randomness():
    class Deep(RandomInTraining):
        def forward(self, x):
            output = self.head(self.dropout(self.convolution(x)))
            return {"out": output, "aux": [self.draw(output)]} if self.training else output

    refuse_hidden_dropout(Deep(lambda x: x), torch.rand(2, 1, 8, 8))
    with pytest.raises(PolysegError, match="rand_like"):
        refuse_hidden_dropout(Deep(RANDOM["rand_like"]), torch.rand(2, 1, 8, 8))


def test_non_finite_weights_are_not_reported_as_random():
    network = RandomInTraining(lambda x: x)
    nn.init.constant_(network.head.weight, float("nan"))
    refuse_hidden_dropout(network, torch.rand(2, 1, 8, 8))


def test_network_is_checked_for_randomness_once(monkeypatch):
    network = RandomInTraining(lambda x: x)
    refuse_hidden_dropout(network, torch.rand(2, 1, 8, 8))
    monkeypatch.setattr(dropout, "_pass_without_dropout", None)
    refuse_hidden_dropout(network, torch.rand(2, 1, 8, 8))
    with pytest.raises(TypeError):
        refuse_hidden_dropout(copy.deepcopy(network), torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("layer", [nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1)])
def test_alpha_dropout_is_refused_with_its_reason(layer):
    with pytest.raises(PolysegError, match="changes the mean"):
        stochastic_layers(nn.Sequential(layer))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NETWORKS))
def test_network_on_meta_device_has_the_same_shapes(name):
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        planned = build_network(name, in_channels=3, out_channels=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    made = build_network(name, in_channels=3, out_channels=2)
    shapes = {key: values.shape for key, values in made.state_dict().items()}
    assert {key: values.shape for key, values in planned.state_dict().items()} == shapes


def test_network_too_large_for_memory_is_refused(monkeypatch):
    network = build_network("unet", in_channels=1)
    needed = 16 * sum(weights.numel() for weights in network.parameters())
    monkeypatch.setattr(memory, "memory_of", lambda device: needed)
    refuse_untrainable(network, torch.device("cpu"))
    monkeypatch.setattr(memory, "memory_of", lambda device: needed - 1)
    with pytest.raises(PolysegError, match=r"network: its [0-9,]+ parameters, .* network\.kwargs"):
        refuse_untrainable(network, torch.device("cpu"))


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_only_biases_cancelled_by_normalisation_are_omitted(norm):
    """Omitted biases would have a zero gradient up to rounding; all other parameters have one."""
    setting = ("group", {"num_groups": 2}) if norm == "group" else norm
    sizes = {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": setting}
    network = build_network("unet", in_channels=1, dropout=0.0, settings=sizes).train()
    network(torch.rand(4, 1, 32, 32)).square().mean().backward()
    biases = [one for name, one in network.named_parameters() if name.endswith("conv.bias")]
    assert len(biases) == (4 if norm == "group" else 1)  # The last layer has no norm.
    scale = max(float(one.grad.abs().max()) for one in network.parameters())
    for name, one in network.named_parameters():
        assert float(one.grad.abs().max()) > 1e-6 * scale, name

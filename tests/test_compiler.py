"""Compiled programs: scores equal those of plain passes, and the program is really used."""

import dataclasses
import gc
import hashlib
import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from polyseg.choices import NETWORKS
from polyseg.config import UncertaintyConfig
from polyseg.data.dataset import Repeatable
from polyseg.montecarlo import assessment, passes
from polyseg.montecarlo.assessment import assess
from polyseg.montecarlo.compiler import operations, rewrite, window, winograd
from polyseg.montecarlo.compiler.run import PreparedBatch, Program
from polyseg.montecarlo.compiler.trace import UntraceableError
from polyseg.networks.dropout import active_layers
from polyseg.networks.networks_by_name import build_network
from polyseg.networks.segmentation_network import SlidingWindow
from polyseg.records import Batch
from polyseg.system.process_group import Processes

NEEDS_PADDING = (30, 42)
SMALL = {
    "unet": {"channels": [4, 8], "strides": [2], "num_res_units": 2},
    "basic-unet": {"features": [8, 8, 8, 8, 8, 8]},
    "attention-unet": {"channels": [4, 8], "strides": [2]},
    "dynunet": {
        "filters": [4, 8, 16],
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
    },
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
}
SCORES = ("mutual_information", "entropy", "variance")
CLOSE = 1e-5
CHANNELS, ELEMENTS = ("channel", "consistent"), ("element", "independent")
"""Two combinations that contain each kind of dropout and each kind of masks once."""
AS_IT_IS = assessment._FEWEST_COMPILED


@pytest.fixture(autouse=True)
def _always_compile(monkeypatch):
    """Compile networks even for the few small images of these tests."""
    monkeypatch.setattr(assessment, "_FEWEST_COMPILED", 0)


TRACED = {}
"""Cache of programs by network, weights and settings: tracing takes most of an assessment."""


def program_of(core, layers, images, *, kind=torch.float32):
    """Return the program of a network, from the cache if layers and weights are equal."""
    weights = hashlib.sha256()
    for name, values in core.state_dict().items():
        weights.update(name.encode() + values.numpy().tobytes())
    key = (type(core), repr(core), weights.digest(), *layers, images.shape[1:], kind)
    if key not in TRACED:
        TRACED[key] = Program(core, layers, images, kind=kind)
    return TRACED[key]


@pytest.fixture(autouse=True)
def _trace_each_network_once(request, monkeypatch):
    if "fresh_programs" not in request.fixturenames:
        monkeypatch.setattr(passes, "Program", program_of)


@pytest.fixture
def fresh_programs():
    """Make each assessment compile its own program, as it does outside these tests."""


class OwnNet(nn.Module):
    """A user's network with element dropout, spatial normalisation and skip connections."""

    def __init__(self, in_channels, out_channels, norm="group"):
        super().__init__()
        norms = {
            "group": lambda: nn.GroupNorm(2, 8),
            "instance": lambda: nn.InstanceNorm2d(8),
            "none": nn.Identity,
        }
        self.enter = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm, self.other = norms[norm](), norms[norm]()
        self.drop, self.again = nn.Dropout(0.3), nn.Dropout(0.2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.join = nn.Conv2d(16, 8, 3, padding=1)
        self.leave = nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, images):
        top = self.norm(self.enter(images)).relu()
        low = self.drop(self.down(top).relu())
        joined = self.join(torch.cat([self.up(low), top], dim=1))
        return self.leave(self.again(self.other(joined).relu()))


def moved(network, channels=1):
    """Change weights and running statistics from their initial values by training passes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        network.train()
        for _ in range(3):
            network(torch.randn(2, channels, 64, 64, generator=generator))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    sharpen(network.eval(), torch.randn(2, channels, 64, 64, generator=generator))
    return network


def sharpen(network, images, deviation=3.0):
    """Scale logits to the spread of those of a trained network.

    Otherwise the passes agree so closely that float32 hardly resolves their differences.
    """
    seen = {}
    convolutions = [one for one in network.modules() if isinstance(one, nn.Conv2d)]
    hooks = [
        one.register_forward_hook(lambda layer, _, output: seen.update({layer: output}))
        for one in convolutions
    ]
    with torch.no_grad():
        logits = network(images)
        head = next(layer for layer, output in seen.items() if torch.equal(output, logits))
        head.weight.mul_(deviation / logits.std())
        head.bias.sub_(network(images).mean(dim=(0, 2, 3)))
    for hook in hooks:
        hook.remove()


def build(name, labels=1, **settings):
    torch.manual_seed(5)
    if name == "own":
        settings = {"multiple_of": 2} | settings
        return moved(build_network(f"{__name__}:OwnNet", in_channels=1, **settings))
    settings = {"settings": SMALL[name]} | settings
    return moved(build_network(name, in_channels=1, out_channels=labels, **settings))


def make_batch(n=3, size=NEEDS_PADDING, labels=1, names=("",), seed=0, prefix="image"):
    """Return images whose foregrounds are in a corner, at a border, in the middle, or small."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, *size, generator=generator)
    masks = torch.zeros(n, labels, *size, dtype=torch.uint8)
    for i in range(n):
        for k in range(labels):
            top, left = [(0, 0), (size[0] - 6, 20), (17, 11), (20, size[1] - 1)][(i + k) % 4]
            masks[i, k, top : top + 6, left : left + 9] = 1
    return Batch([f"{prefix}{i}" for i in range(n)], images, masks, names)


def check(network, batches, caplog, used=True, **how):
    """Assess by the program and by plain passes, compare, and return the former."""
    caplog.set_level(logging.INFO, "polyseg")
    how = {"samples": 4} | how
    plain = assess(network, batches, UncertaintyConfig(program="plain", **how))
    caplog.clear()
    ours = assess(network, batches, UncertaintyConfig(**how))
    for name in SCORES:
        expected = plain.scores[name]
        assert expected.max() > 1e-6
        # Relative to the largest score, because a difference of entropies may be almost zero.
        apart = np.abs(ours.scores[name] - expected) / np.maximum(expected, 0.01 * expected.max())
        assert apart.max() < CLOSE, f"{name}: relative difference {apart.max():.1e}"
    for field in ("foreground_pixels", "fallback", "dice"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(plain, field), field)
    np.testing.assert_allclose(
        ours.scores["deterministic_entropy"], plain.scores["deterministic_entropy"], rtol=CLOSE
    )
    assert ours.ids == plain.ids
    told = "network is not compiled" in caplog.text or "compiled passes failed" in caplog.text
    assert told is not used, caplog.text
    return ours


# Comparison with plain passes.


@pytest.mark.parametrize(
    ("kind", "masks"), [CHANNELS, pytest.param(*ELEMENTS, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", list(NETWORKS))
def test_program_scores_equal_plain_passes(name, kind, masks, caplog):
    network = build(name, dropout_kind=kind, dropout=0.3)
    check(network, [make_batch()], caplog, masks=masks)


@pytest.mark.parametrize(
    "masks", ["consistent", pytest.param("independent", marks=pytest.mark.slow)]
)
def test_wide_network_uses_winograd(masks, caplog):
    wide = {"channels": [8, 256], "strides": [2], "num_res_units": 2}
    network, batch = build("unet", settings=wide, dropout=0.3), make_batch()
    check(network, [batch], caplog, masks=masks)
    program = make_program(network, batch.images)
    targets = [node.target for node in program.suffix.function.graph.nodes]
    assert winograd.convolve in targets


@pytest.mark.parametrize(
    ("norm", "masks"),
    [("group", "consistent"), ("instance", "independent"), ("none", "consistent")],
)
def test_user_network_is_compiled(norm, masks, caplog):
    network = build("own", settings={"norm": norm})
    check(network, [make_batch()], caplog, masks=masks)


def test_unwrapped_network_is_compiled(caplog):
    check(moved(OwnNet(1, 1)), [make_batch(size=(32, 48))], caplog)


@pytest.mark.parametrize("region", ["mask", "boundary", "prediction", "union", "image"])
def test_program_equals_plain_passes_for_each_region(region, caplog):
    check(build("unet"), [make_batch()], caplog, region=region)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("region", "kind"), [("mask", "channel"), ("boundary", "element"), ("prediction", "channel")]
)
def test_program_equals_plain_passes_for_several_labels(region, kind, caplog):
    network = build("unet", labels=3, dropout_kind=kind)
    batch = make_batch(labels=3, names=("a", "b", "c"))
    result = check(network, [batch], caplog, region=region)
    assert len(result.difficulty) == 9


@pytest.mark.parametrize("region", ["mask", "boundary"])
def test_program_accepts_an_empty_mask(region, caplog):
    batch = make_batch()
    batch.masks[1] = 0
    result = check(build("unet"), [batch, make_batch(prefix="other")], caplog, region=region)
    assert result.fallback[1] != 0
    assert not result.fallback[[0, 2, 3, 4, 5]].any()


def test_program_accepts_images_without_masks(caplog):
    check(build("unet"), [make_batch()._replace(masks=None)], caplog)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "masks"), [("unet", "consistent"), ("own", "independent")])
def test_program_accepts_batches_of_several_sizes(name, masks, caplog):
    sizes = [(1, (32, 32)), (3, (32, 32)), (2, (40, 72)), (1, (72, 40)), (2, (32, 32))]
    batches = [make_batch(n, size, prefix=f"of{i}-", seed=i) for i, (n, size) in enumerate(sizes)]
    check(build(name), batches, caplog, masks=masks)


def test_saved_maps_equal_plain_passes(caplog):
    network, batch = build("unet"), make_batch()
    ours = check(network, [batch], caplog, save_maps=True)
    plain = assess(network, [batch], UncertaintyConfig(samples=4, program="plain", save_maps=True))
    for name, maps in plain.maps.items():
        np.testing.assert_allclose(ours.maps[name], maps, atol=1e-3)


def test_next_assessment_uses_changed_weights(caplog, fresh_programs):
    network, batch = build("unet"), make_batch()
    check(network, [batch], caplog)
    with torch.no_grad():
        for weights in network.parameters():
            weights.mul_(1.1)
    check(moved(network), [batch], caplog)


def test_large_batch_is_divided(caplog, monkeypatch):
    monkeypatch.setattr(passes, "_BYTES_AT_ONCE", 1)
    check(build("unet"), [make_batch(4)], caplog, masks="independent")


@pytest.mark.parametrize("masks", ["consistent", "independent"])
@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Conv2d(1, 8, 2, 2), nn.Dropout2d(0.3), nn.ConvTranspose2d(8, 1, 2, 2)],
        lambda: [nn.Dropout(0.3), nn.Conv2d(1, 1, 3, padding=1)],
        lambda: [nn.Conv2d(1, 4, 3, padding=1), nn.Dropout2d(0.3), nn.ReLU(), nn.Conv2d(4, 1, 1)],
    ],
    ids=["dropout before upsampling", "images", "one level"],
)
def test_program_equals_plain_passes_for_small_networks(layers, masks, caplog):
    torch.manual_seed(3)
    check(nn.Sequential(*layers()).eval(), [make_batch(size=(32, 48))], caplog, masks=masks)


class Gated(nn.Module):
    """A network with a gate per channel, whose dropout acts on vectors instead of maps."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        self.weigh, self.drop = nn.Linear(8, 8), nn.Dropout(0.3)

    def forward(self, images):
        features = self.enter(images)
        weights = self.weigh(self.drop(features.mean(dim=(2, 3)))).sigmoid()
        return self.leave(features.relu() * weights[:, :, None, None])


class Tokens(nn.Module):
    """A network on a sequence of pixels, as in transformers."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(1, 8, 4, stride=4), nn.ConvTranspose2d(8, 1, 4, 4)
        self.mix, self.drop = nn.Linear(8, 8), nn.Dropout(0.3)

    def forward(self, images):
        features = self.enter(images)
        tokens = self.mix(self.drop(features.flatten(2).transpose(1, 2))).relu()
        return self.leave(tokens.transpose(1, 2).reshape(features.shape))


class Placed(nn.Module):
    """A network with a learned feature for each position."""

    def __init__(self):
        super().__init__()
        self.where = nn.Parameter(torch.randn(1, 1, 32, 48))
        self.enter, self.leave = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        self.drop = nn.Dropout2d(0.3)

    def forward(self, images):
        return self.leave(self.drop(self.enter(self.where) + self.enter(images)).relu())


class Writing(nn.Module):
    """A network that writes to a part of a tensor."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.drop = nn.Dropout2d(0.3)

    def forward(self, images):
        features = self.drop(self.enter(images))
        features[:, :4].relu_()
        features[:, 5] = 0
        return self.leave(features)


class Branching(nn.Module):
    """A network with a branch that depends on data."""

    def __init__(self):
        super().__init__()
        self.leave, self.drop = nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.3)

    def forward(self, images):
        return self.leave(self.drop(images)) if images.mean() > -9 else images


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["consistent", "independent"])
@pytest.mark.parametrize("network", [Gated, Tokens, Placed, Writing, Branching])
def test_networks_that_cannot_be_split_equal_plain_passes(network, masks):
    torch.manual_seed(3)
    network = network().eval()
    batches = [make_batch(n, (32, 48), prefix=f"of{n}-") for n in (1, 3)]
    plain = assess(network, batches, UncertaintyConfig(samples=4, program="plain", masks=masks))
    ours = assess(network, batches, UncertaintyConfig(samples=4, masks=masks))
    for name in SCORES:
        np.testing.assert_allclose(ours.scores[name], plain.scores[name], rtol=1e-4)


# Windows.


def chosen_of(where, size):
    chosen = torch.zeros(2, 1, *size, dtype=torch.bool)
    for image in range(2):
        chosen[image, 0][where] = True
    return chosen


PLACES = {
    "corner": (slice(0, 9), slice(0, 7)),
    "other corner": (slice(88, 96), slice(120, 128)),
    "border": (slice(0, 5), slice(50, 70)),
    "pixel": (50, 61),
    "pixel in the corner": (95, 127),
    "middle": (slice(40, 60), slice(50, 70)),
    "all": (slice(None), slice(None)),
}


def make_program(network, images):
    with torch.no_grad():
        return program_of(network.core, active_layers(network.core), images)


def masks_of(program, network, images, kind, shared):
    """Draw masks of whole channels or of single values, shared by all images or one for each."""
    shapes = {}

    def remember(name, output):
        shapes[name] = output.shape[1:]

    layers = active_layers(network.core)
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, name=name: remember(name, out))
        for name, layer in layers.items()
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    masks = {}
    for one in program.masks:
        shape = shapes[one.layer] if kind == "element" else (one.channels, 1, 1)
        masks[one.node] = (torch.rand(1 if shared else len(images), *shape) < 0.7) / 0.7
    return masks


def masked_reference(network, program, masks, images):
    """Run the network with each dropout layer replaced by its mask."""
    by_layer = {one.layer: masks[one.node] for one in program.masks}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, name=name: out * by_layer[name])
        for name, layer in active_layers(network.core).items()
    ]
    try:
        return network(images)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("name", "kind", "shared"),
    [
        ("unet", "channel", True),
        ("unet", "element", False),
        pytest.param("dynunet", "channel", False, marks=pytest.mark.slow),
        pytest.param("basic-unet", "element", True, marks=pytest.mark.slow),
    ],
)
def test_selected_pixels_equal_those_of_the_whole_pass(name, kind, shared):
    network = build(name, dropout_kind=kind)
    images = torch.randn(2, 1, 96, 128)
    with torch.no_grad():
        program = make_program(network, images)
        masks = masks_of(program, network, images, kind, shared)
        expected = masked_reference(network, program, masks, images)
        largest = expected.abs().max()
        everywhere = PreparedBatch(program, images, None)(masks)
        assert (everywhere - expected).abs().max() / largest < CLOSE
        cropped = set()
        for place, where in PLACES.items():
            chosen = chosen_of(where, (96, 128))
            for crop in (True, False):
                look = PreparedBatch(program, images, chosen, crop=crop)
                apart = (look(masks) - expected[chosen]).abs().max() / largest
                assert apart < CLOSE, f"{place}, crop={crop}: relative difference {apart:.1e}"
                if look.share < 1:
                    cropped.add((place, crop))
    small = set(PLACES) - {"all"}
    assert {(place, True) for place in small} >= cropped
    assert ("pixel in the corner", True) in cropped
    assert ("all", True) not in cropped


def test_pixels_can_be_selected_in_some_images_only():
    """The images of a batch have different selections, one of them empty."""
    network = build("unet")
    images = torch.randn(3, 1, 64, 64)
    chosen = torch.zeros(3, 1, 64, 64, dtype=torch.bool)
    chosen[0, 0, 60:, 60:] = True
    chosen[2, 0, 30, ::9] = True
    with torch.no_grad():
        program = make_program(network, images)
        masks = masks_of(program, network, images, "channel", True)
        found = PreparedBatch(program, images, chosen)(masks)
        expected = masked_reference(network, program, masks, images)[chosen]
    assert (found - expected).abs().max() / expected.abs().max() < CLOSE


def test_assessment_computes_only_a_part_of_the_images(monkeypatch, caplog):
    ways = []

    def look(*arguments, **settings):
        ways.append(PreparedBatch(*arguments, **settings))
        return ways[-1]

    monkeypatch.setattr(passes, "PreparedBatch", look)
    batch = make_batch(4, (96, 96))
    check(build("unet"), [batch], caplog)
    assert ways and all(way.share < 0.9 for way in ways)


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_normalisation_over_space_runs_on_whole_images(norm):
    network, images = build("own", settings={"norm": norm}), torch.randn(2, 1, 96, 96)
    program = make_program(network, images)
    parts = [program.suffix, *(end.end for end in program.ends)]
    normalising = [
        sum(
            "norm" in str(node.target)
            for node in part.function.graph.nodes
            if node.op == "call_function"
        )
        for part in parts
    ]
    assert normalising[0] > 0 and len(parts) > 1 and not any(normalising[1:])


# Wrong programs.


def broken_masks(self, like):
    return {one.node: 0.9 * like.new_ones(1, one.channels, 1, 1) for one in self.masks}


def broken_fold(network):
    for node in operations.calls_to(network, (operations.aten.batch_norm.default,)):
        node.replace_all_uses_with(node.args[0])


def broken_sizes(self, masks):
    raise RuntimeError("sizes do not fit")


def broken_logits(self, masks, count):
    return PreparedBatch.original(self, masks, count) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (rewrite, "fold_batch_norms", broken_fold),
        (PreparedBatch, "__call__", broken_logits),
        (PreparedBatch, "everywhere", broken_sizes),
    ],
    ids=["rewrite", "numbers", "sizes"],
)
def test_wrong_program_is_detected(owner, name, wrong, monkeypatch, caplog, fresh_programs):
    monkeypatch.setattr(PreparedBatch, "original", PreparedBatch.__call__, raising=False)
    monkeypatch.setattr(owner, name, wrong)
    network, batches = build("unet"), [make_batch(), make_batch(prefix="other", seed=1)]
    ours = assess(network, batches, UncertaintyConfig(samples=4))
    warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "compiled passes failed" in warnings[0].message
    plain = assess(network, batches, UncertaintyConfig(samples=4, program="plain"))
    for field in SCORES:
        np.testing.assert_allclose(ours.scores[field], plain.scores[field], rtol=1e-9)


@pytest.mark.parametrize(
    ("samples", "error"), [(4, RuntimeError("sizes do not fit")), ("auto", LookupError("mask_0"))]
)
def test_failing_program_leaves_no_results(samples, error, monkeypatch, caplog):
    """The program fails in the third pass of the second batch, after a complete first batch."""
    network, batches = build("unet"), [make_batch(), make_batch(prefix="other", seed=1)]
    plain = assess(network, batches, UncertaintyConfig(samples=samples, program="plain"))
    original, calls = PreparedBatch.__call__, []

    def fails_later(self, masks, count=1):
        calls.append(count)
        if len(calls) == 9:
            raise error
        return original(self, masks, count)

    monkeypatch.setattr(PreparedBatch, "__call__", fails_later)
    ours = assess(network, batches, UncertaintyConfig(samples=samples))
    assert len(calls) == 9
    warnings = [one.message for one in caplog.records if one.levelno >= logging.WARNING]
    assert (
        len(warnings) == 1 and str(error) in warnings[0] and "compiled passes failed" in warnings[0]
    )
    np.testing.assert_equal(dataclasses.asdict(ours), dataclasses.asdict(plain))


def test_batches_that_can_be_read_once_use_plain_passes(caplog):
    caplog.set_level(logging.INFO, "polyseg")
    network, batches = build("unet"), [make_batch(), make_batch(prefix="other", seed=1)]
    ours = assess(network, iter(batches), UncertaintyConfig(samples=4))
    assert "can be read only once" in caplog.text
    plain = assess(network, batches, UncertaintyConfig(samples=4, program="plain"))
    np.testing.assert_equal(dataclasses.asdict(ours), dataclasses.asdict(plain))


def test_program_failure_in_another_process_stops_this_one():
    class Two(Processes):
        def gathered(self, mine):
            return [mine, False]

    with pytest.raises(passes.ProgramFailedError), assessment._failing_in_all(Two(0, 2)):
        pass
    with assessment._failing_in_all(Processes()):
        pass


def test_too_small_windows_are_detected(monkeypatch, caplog, fresh_programs):
    caplog.set_level(logging.INFO, "polyseg")
    monkeypatch.setattr(window, "_strided", lambda *_: 0)
    network, batches = build("unet"), [make_batch(size=(96, 96))]
    ours = assess(network, batches, UncertaintyConfig(samples=4))
    assert "network is not compiled" in caplog.text and "window" in caplog.text
    plain = assess(network, batches, UncertaintyConfig(samples=4, program="plain"))
    np.testing.assert_equal(dataclasses.asdict(ours), dataclasses.asdict(plain))


def test_wrong_masks_without_dropout_are_detected(monkeypatch, fresh_programs):
    monkeypatch.setattr(Program, "all_kept", broken_masks)
    network, batches = build("unet"), [make_batch()]
    ours = assess(network, batches, UncertaintyConfig(samples=2))
    plain = assess(network, batches, UncertaintyConfig(samples=2, program="plain"))
    np.testing.assert_allclose(
        ours.scores["deterministic_entropy"], plain.scores["deterministic_entropy"], rtol=CLOSE
    )


def test_confident_network_still_uses_its_program(caplog):
    """Probabilities close to 1 are coarse in float32 and determine the logits poorly."""
    network = build("dynunet")
    sharpen(network, torch.randn(2, 1, 64, 64), deviation=16.0)
    batch = make_batch(4, (64, 64))
    batch.masks[:] = 1
    check(network, [batch], caplog)


def test_plain_passes_can_be_chosen(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("taken apart")

    monkeypatch.setattr(passes, "Program", refuse)
    assess(build("unet"), [make_batch()], UncertaintyConfig(samples=2, program="plain"))


# Choice between compiling and plain passes.

WORTH = 3 * NEEDS_PADDING[0] * NEEDS_PADDING[1] * 2


def in_batches(batch, sizes):
    return [
        Batch(batch.ids[start:end], batch.images[start:end], batch.masks[start:end], batch.labels)
        for start, end in pairwise(np.cumsum([0, *sizes]))
    ]


@pytest.fixture
def compiled(monkeypatch):
    """List the compiled networks, with a threshold that three images and two passes reach."""
    made = []

    def refuse(core, *_, **__):
        made.append(core)
        raise UntraceableError("this is a test")

    monkeypatch.setattr(passes, "Program", refuse)
    monkeypatch.setattr(assessment, "_FEWEST_COMPILED", WORTH)
    return made


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1, 1], [2, 4], [6]])
@pytest.mark.parametrize(
    ("images", "samples", "worth"), [(3, 2, 1), (2, 2, 0), (1, 5, 0), (1, 6, 1), (6, 4, 1)]
)
def test_pixels_times_passes_decide_whether_to_compile(sizes, images, samples, worth, compiled):
    sizes = np.diff(np.minimum(np.cumsum([0, *sizes]), images))
    batches = in_batches(make_batch(images), sizes[sizes > 0])
    result = assess(build("unet"), batches, UncertaintyConfig(samples=samples))
    assert len(compiled) == worth
    assert result.ids == [f"image{i}" for i in range(images)]


@pytest.mark.parametrize(("bound", "worth"), [(WORTH * 50, 1), (WORTH * 50 + 1, 0)])
def test_unknown_number_of_passes_counts_as_the_largest(bound, worth, compiled, monkeypatch):
    monkeypatch.setattr(assessment, "_FEWEST_COMPILED", bound)
    assess(build("unet"), [make_batch(3)], UncertaintyConfig(samples="auto", rank_target=0.51))
    assert len(compiled) == worth


def test_assessment_reads_ahead_only_what_the_choice_needs(compiled):
    read = []

    def batches():
        for one in in_batches(make_batch(9), [1] * 9):
            read.append(one.ids)
            yield one

    done = []

    def progress(_, images, __):
        done.append((images, len(read)))

    result = assess(
        build("unet"), Repeatable(batches), UncertaintyConfig(samples=2), progress=progress
    )
    assert done[0] == (0, 3) and len(read) == 9
    assert result.ids == make_batch(9).ids


def test_few_small_images_use_plain_passes(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "polyseg")
    monkeypatch.setattr(assessment, "_FEWEST_COMPILED", AS_IT_IS)
    network, batches = build("unet"), [make_batch(), make_batch(prefix="other", seed=1)]
    ours = assess(network, batches, UncertaintyConfig(samples=4))
    assert [one.levelname for one in caplog.records] == ["DEBUG"]
    plain = assess(network, batches, UncertaintyConfig(samples=4, program="plain"))
    np.testing.assert_equal(dataclasses.asdict(ours), dataclasses.asdict(plain))


def test_assessment_of_common_size_is_compiled(monkeypatch):
    monkeypatch.setattr(assessment, "_FEWEST_COMPILED", AS_IT_IS)
    images = torch.zeros(1).expand(8, 3, 256, 256)
    batches = [Batch([str(i)] * 8, images, None) for i in range(3)]
    worth, again = assessment._is_worth_compiling(batches, UncertaintyConfig())
    assert worth and [batch.ids[0] for batch in again] == ["0", "1", "2"]


def test_scores_without_passes_are_not_compiled(compiled):
    assess(
        build("unet"),
        [make_batch(9)],
        UncertaintyConfig(metric="deterministic_entropy", samples=20),
    )
    assert not compiled


# Memory.


def bytes_of_tensors():
    """Return the bytes of all live tensors, counting each storage once."""
    gc.collect()
    found = (one.untyped_storage() for one in gc.get_objects() if type(one) is torch.Tensor)
    return sum({one.data_ptr(): one.nbytes() for one in found}.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "save_maps"), [("auto", False), ("auto", True), ("plain", False)]
)
def test_memory_does_not_grow_with_the_number_of_passes(program, save_maps):
    held, calls = [], iter(range(41))

    def progress(*_):
        # Once each group of passes has some.
        if next(calls) in (11, 39):
            held.append(bytes_of_tensors())

    settings = UncertaintyConfig(samples=40, program=program, save_maps=save_maps)
    assess(build("unet"), [make_batch(2)], settings, progress=progress)
    assert len(held) == 2 and held[1] <= held[0]


# Several passes in one batch, as on an accelerator.


@pytest.fixture
def together(monkeypatch):
    """Allow three passes over three images in one batch, and list the number of joined passes."""
    counts, run = [], passes.BatchPasses.together

    def count(self, numbers):
        found = run(self, numbers)
        counts.append(len(numbers))
        return found

    def begin():
        pixels = 3 * 3 * NEEDS_PADDING[0] * NEEDS_PADDING[1]
        monkeypatch.setattr(passes.BatchPasses, "together", count)
        monkeypatch.setattr(passes, "_most_pixels_together", lambda _: pixels)
        return counts

    return begin


@pytest.mark.slow
@pytest.mark.parametrize("program", ["auto", "plain"])
@pytest.mark.parametrize(
    ("region", "kind", "masks"),
    [("mask", *CHANNELS), ("prediction", *ELEMENTS), ("mask", "element", "consistent")],
)
def test_joined_passes_equal_single_passes(region, masks, kind, program, together):
    network, batch = (
        build("unet", labels=2, dropout_kind=kind),
        make_batch(labels=2, names=("a", "b")),
    )
    how = {"samples": 7, "masks": masks, "region": region}
    alone = assess(network, [batch], UncertaintyConfig(program="plain", **how))
    counts = together()
    ours = assess(network, [batch], UncertaintyConfig(program=program, **how))
    assert counts[-3:] == [3, 3, 1]
    for name in SCORES:
        largest = alone.scores[name].max()
        assert np.abs(ours.scores[name] - alone.scores[name]).max() < CLOSE * largest


def test_out_of_memory_reduces_the_number_of_joined_passes(together, monkeypatch):
    network, batch = build("unet"), make_batch()
    expected = assess(network, [batch], UncertaintyConfig(samples=7))
    counts, inputs = together(), Program.inputs

    def too_much(self, features, masks, count=1):
        if count > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs(self, features, masks, count)

    monkeypatch.setattr(Program, "inputs", too_much)
    found = assess(network, [batch], UncertaintyConfig(samples=7))
    assert counts[-7:] == [1] * 7
    np.testing.assert_allclose(found.difficulty, expected.difficulty, rtol=CLOSE)


class Placed(nn.Module):
    """A network whose features depend on parameters only and have no row for each image."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.gate, self.scale = nn.Parameter(torch.randn(8)), nn.Parameter(torch.tensor(0.1))
        self.enter, self.drop = nn.Conv2d(in_channels, 8, 3, padding=1), nn.Dropout2d(0.3)
        self.leave = nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, images):
        features = self.drop(self.enter(images).relu()) * self.gate.sigmoid().view(1, -1, 1, 1)
        return self.leave(features * self.scale.exp())


class OfBatch(nn.Module):
    """A network that normalises over its batch, so that results depend on the other images."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.enter, self.drop = nn.Conv2d(in_channels, 8, 3, padding=1), nn.Dropout2d(0.3)
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)
        self.leave = nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, images):
        return self.leave(self.norm(self.drop(self.enter(images).relu())))


@pytest.mark.parametrize("program", ["auto", "plain"])
@pytest.mark.parametrize(("kind", "joins"), [(Placed, True), (OfBatch, False)])
def test_passes_are_joined_only_if_results_stay_equal(kind, joins, program, together):
    torch.manual_seed(2)
    network, batch = kind(1, 1), make_batch()
    alone = assess(network, [batch], UncertaintyConfig(samples=7, program=program))
    counts = together()
    found = assess(network, [batch], UncertaintyConfig(samples=7, program=program))
    assert (counts[-3:] == [3, 3, 1]) is joins and (counts[-7:] == [1] * 7) is not joins
    np.testing.assert_allclose(found.difficulty, alone.difficulty, rtol=CLOSE)


def test_sliding_window_passes_are_not_joined(together):
    network = build("unet")
    network.window = SlidingWindow((32, 32), 0.5)
    batch = make_batch(size=(64, 64))
    alone = assess(network, [batch], UncertaintyConfig(samples=7))
    counts = together()
    found = assess(network, [batch], UncertaintyConfig(samples=7))
    assert set(counts) == {1}
    np.testing.assert_array_equal(found.difficulty, alone.difficulty)


# bfloat16.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "masks"),
    [("unet", "consistent"), ("attention-unet", "independent"), ("own", "consistent")],
)
def test_bfloat16_gives_the_same_ranking(name, masks, caplog):
    caplog.set_level(logging.INFO, "polyseg")
    network, batch = build(name), make_batch(12)
    exact = assess(network, [batch], UncertaintyConfig(samples=6, masks=masks))
    caplog.clear()
    for program in ("auto", "plain"):
        found = assess(
            network,
            [batch],
            UncertaintyConfig(samples=6, masks=masks, precision="bf16", program=program),
        )
        assert not np.array_equal(found.difficulty, exact.difficulty)
        np.testing.assert_allclose(found.difficulty, exact.difficulty, rtol=0.1)
        np.testing.assert_allclose(found.dice, exact.dice, atol=0.05)
    assert "compiled passes failed" not in caplog.text and "not compiled" not in caplog.text


@pytest.mark.parametrize("deviation", [3.0, 16.0])
def test_wrong_program_is_detected_with_bfloat16(deviation, monkeypatch, caplog, fresh_programs):
    network = build("unet")
    sharpen(network, torch.randn(2, 1, 64, 64), deviation=deviation)
    monkeypatch.setattr(rewrite, "fold_batch_norms", broken_fold)
    assess(network, [make_batch()], UncertaintyConfig(samples=2, precision="bf16"))
    assert "compiled passes failed" in caplog.text


def test_network_weights_stay_float32():
    network = build("unet")
    before = {name: values.clone() for name, values in network.state_dict().items()}
    assess(network, [make_batch()], UncertaintyConfig(samples=2, precision="bf16"))
    for name, values in network.state_dict().items():
        assert values.dtype == before[name].dtype and torch.equal(values, before[name])


class Chooses(nn.Module):
    """A network with a boolean map in the part that all passes share."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.enter, self.drop = nn.Conv2d(in_channels, 8, 3, padding=1), nn.Dropout2d(0.3)
        self.leave = nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, images):
        features = self.drop(self.enter(images).relu())
        return self.leave(torch.where(images > 0, features, -features))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_integer_tensors_keep_their_type(precision, caplog):
    caplog.set_level(logging.INFO, "polyseg")
    network, batch = Chooses(1, 1), make_batch()
    exact = assess(network, [batch], UncertaintyConfig(samples=4, program="plain"))
    found = assess(network, [batch], UncertaintyConfig(samples=4, precision=precision))
    rtol = CLOSE if precision == "fp32" else 0.1
    np.testing.assert_allclose(found.difficulty, exact.difficulty, rtol=rtol)
    assert "compiled passes failed" not in caplog.text and "not compiled" not in caplog.text

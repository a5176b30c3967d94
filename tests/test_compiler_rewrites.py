"""Rewrites of a graph: each keeps the result, changes the graph, and skips invalid cases."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from polyseg.montecarlo.compiler import operations, rewrite, split, trace
from polyseg.montecarlo.compiler.trace import UntraceableError
from polyseg.networks.dropout import stochastic_layers

SIZE = (6, 8)
REWRITES = (
    rewrite.fold_batch_norms,
    rewrite.fold_identities,
    rewrite.merge_pointwise,
    rewrite.split_concatenations,
)


class Flow(nn.Module):
    """A network of named layers and a function of these layers and the images."""

    def __init__(self, flow, **layers):
        super().__init__()
        self.flow = flow
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, images):
        return self.flow(self, images)


def conv(inputs=4, outputs=4, side=3, **settings):
    return nn.Conv2d(inputs, outputs, side, **{"padding": side // 2} | settings)


def up(inputs=4, outputs=4, side=2, **settings):
    return nn.ConvTranspose2d(inputs, outputs, side, **{"stride": 2} | settings)


def drop(kind=nn.Dropout2d):
    return kind(0.3)


def prepare(core):
    """Change parameters that start as 0 or 1, so that results do not agree by chance."""
    core.double().eval()
    for module in core.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.data.normal_()
                module.bias.data.normal_()
    return core


def kinds(network):
    """Count the operations of each kind."""
    return Counter(kind_of(node) for node in network.graph.nodes if node.op == "call_function")


def kind_of(node):
    return str(node.target).split(".")[1] if node.op == "call_function" else node.op


def sources(network, kind):
    """Return the kind of the first input of each operation of a kind."""
    return [kind_of(node.args[0]) for node in network.graph.nodes if kind_of(node) == kind]


def run(network, values):
    copied = fx.Graph()
    copied.output(copied.graph_copy(network.graph, {}))
    function = fx.GraphModule(network, copied)
    with torch.no_grad():
        return function(*(values[name] for name in trace.input_names(network)))[0]


def begin(core, shared=False):
    """Return the graph of a network with masks, and the values of its inputs."""
    return begin_with_inputs(core, shared)[:2]


def begin_with_inputs(core, shared=False):
    images = torch.randn(3, 4, *SIZE, dtype=torch.float64)
    network = trace.trace(prepare(core), images[:2])
    inputs = trace.insert_masks(network, core, stochastic_layers(core))
    values = {trace.input_names(network)[0]: images}
    for one in inputs:
        node = next(node for node in network.graph.nodes if node.name == one.node)
        shape = next(iter(node.users)).args[0].meta["val"].shape[1:]
        if node.meta["channelwise"]:
            shape = (shape[0], 1, 1)
        kept = torch.rand(1 if shared else 3, *shape) < 0.7
        values[one.node] = kept.double() / 0.7
    return network, values, inputs


def worst(found, expected):
    """Return the largest difference relative to the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def check(core, rewrite, *before, **how):
    """Apply rewrites; return the kinds before and after the last one, and the graph."""
    network, values = begin(core, **how)
    expected = run(network, values)
    assert expected.abs().max() > 1e-3
    for earlier in before:
        earlier(network)
    count = kinds(network)
    rewrite(network)
    network.graph.lint()
    assert worst(run(network, values), expected) < 1e-12
    return count, kinds(network), network


def check_unchanged(core, rewrite, *before, **how):
    count, after, _ = check(core, rewrite, *before, **how)
    assert after == count


# Batch normalisation.


@pytest.mark.parametrize(
    "layer",
    [
        conv(),
        conv(bias=False),
        conv(groups=2),
        conv(stride=2, dilation=2),
        up(),
        up(4, 6, 3, output_padding=1, bias=False),
    ],
    ids=["plain", "no bias", "grouped", "strided, dilated", "transposed", "transposed, odd"],
)
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_folded_into_the_convolution(layer, affine):
    norm = nn.BatchNorm2d(layer.out_channels, affine=affine)
    before, after, _ = check(nn.Sequential(layer, norm), rewrite.fold_batch_norms)
    assert before["batch_norm"] == 1
    assert after == before - Counter(["batch_norm"])


def test_shared_convolution_is_folded_with_each_batch_norm():
    core = Flow(
        lambda s, x: s.b(s.c(s.a(s.c(x)).relu())),
        c=conv(),
        a=nn.BatchNorm2d(4),
        b=nn.BatchNorm2d(4),
    )
    _, after, _ = check(core, rewrite.fold_batch_norms)
    assert "batch_norm" not in after


@pytest.mark.parametrize(
    "core",
    [
        nn.Sequential(up(groups=2), nn.BatchNorm2d(4)),
        nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
        Flow(lambda s, x: s.n(y := s.c(x)) + y, c=conv(), n=nn.BatchNorm2d(4)),
        Flow(lambda s, x: s.n(y := s.d(s.c(x))) + y, c=conv(), n=nn.BatchNorm2d(4), d=drop()),
        Flow(lambda s, x: s.n(s.d(y := s.c(x))) + y, c=conv(), n=nn.BatchNorm2d(4), d=drop()),
    ],
    ids=["grouped transposed", "relu between", "no statistics", "used", "product used", "masked"],
)
def test_batch_norm_is_kept_if_it_cannot_be_folded(core):
    check_unchanged(core, rewrite.fold_batch_norms)


# Masks behind activations.


# Identities.


@pytest.mark.parametrize(
    "layer",
    [
        conv(),
        conv(side=1),
        conv(side=5),
        conv(dilation=2, padding=2),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0), bias=False),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_residual_sum_is_folded_into_the_kernel(layer, first):
    def flow(s, x):
        u = x.tanh()
        return s.c(u) + u if first else u + s.c(u)

    before, after, _ = check(Flow(flow, c=layer), rewrite.fold_identities)
    assert after == before - Counter(["add"])


@pytest.mark.parametrize(
    "core",
    [
        Flow(lambda s, x: s.c(x) + x, c=conv(dilation=2, side=2, padding=1)),
        Flow(lambda s, x: s.c(x) + x, c=conv(stride=2, padding=(4, 5))),
        Flow(lambda s, x: s.c(x) + x, c=conv(groups=2)),
        Flow(lambda s, x: s.c(x) + x, c=up(side=3, stride=1, padding=1)),
        Flow(lambda s, x: s.c(x[:, :1]) + x[:, :1], c=conv(1, 4)),
        Flow(lambda s, x: torch.add(s.c(x), x, alpha=2), c=conv()),
        Flow(lambda s, x: s.c(x.tanh()) + x, c=conv()),
        Flow(lambda s, x: ((y := s.c(x)) + x) * y, c=conv()),
        Flow(lambda s, x: s.c(x) + x, c=conv(padding_mode="circular")),
    ],
    ids=[
        "not centred",
        "stride 2",
        "groups",
        "transposed",
        "other channels",
        "alpha",
        "other",
        "used",
        "circular",
    ],
)
def test_other_sums_are_kept(core):
    check_unchanged(core, rewrite.fold_identities)


# Pointwise convolutions.


@pytest.mark.slow
@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    "inner",
    [
        lambda bias: conv(4, 5, bias=bias),
        lambda bias: conv(4, 5, stride=2, dilation=2, bias=bias),
        lambda bias: up(4, 5, bias=bias),
        lambda bias: up(4, 5, 3, padding=1, output_padding=1, bias=bias),
    ],
    ids=["plain", "strided, dilated", "transposed", "transposed, padded"],
)
def test_pointwise_convolution_is_merged(inner, bias):
    core = nn.Sequential(inner(bias[0]), conv(5, 3, 1, bias=bias[1]))
    before, after, _ = check(core, rewrite.merge_pointwise)
    assert before.total() == 2
    assert after.total() == 1


def test_consecutive_pointwise_convolutions_are_merged():
    core = nn.Sequential(conv(4, 6), conv(6, 5, 1), conv(5, 1, 1))
    _, after, _ = check(core, rewrite.merge_pointwise)
    assert after == Counter(["conv2d"])


@pytest.mark.parametrize(
    "core",
    [
        nn.Sequential(conv(4, 3), conv(3, 4, 1)),
        nn.Sequential(conv(), conv(side=3)),
        nn.Sequential(conv(), conv(side=1, stride=2)),
        nn.Sequential(conv(), conv(side=1, padding=1)),
        nn.Sequential(conv(), conv(side=1, groups=2)),
        nn.Sequential(conv(groups=2), conv(side=1)),
        nn.Sequential(up(groups=2), conv(side=1)),
        nn.Sequential(conv(), nn.ReLU(), conv(side=1)),
        nn.Sequential(conv(), drop(), conv(side=1)),
        nn.Sequential(conv(), up(side=1, stride=1)),
        Flow(lambda s, x: s.b(y := s.a(x)) + y, a=conv(), b=conv(side=1)),
    ],
    ids=[
        "costs more",
        "3 x 3",
        "stride 2",
        "padded",
        "groups",
        "groups inside",
        "groups transposed",
        "relu between",
        "mask between",
        "transposed outside",
        "used",
    ],
)
def test_convolutions_that_cannot_be_merged_are_kept(core):
    check_unchanged(core, rewrite.merge_pointwise)


# Concatenations.


def joining(layer, flow=lambda s, x: torch.cat([s.d(s.a(x)), s.b(x)], 1), **more):
    """Return a network that concatenates features and convolves them."""
    layers = {"a": conv(4, 3), "b": conv(4, 5), "d": drop(), "c": layer} | more
    return Flow(lambda s, x: s.c(flow(s, x)), **layers)


@pytest.mark.parametrize(
    "layer",
    [conv(8, 2), conv(8, 2, bias=False, stride=2, dilation=2), up(8, 2), up(8, 2, bias=False)],
    ids=["plain", "strided, dilated", "transposed", "transposed, no bias"],
)
@pytest.mark.parametrize("turned", [False, True])
def test_parts_without_masks_are_convolved_separately(layer, turned):
    def flow(s, x):
        parts = [s.d(s.a(x)), s.b(x)]
        return torch.cat(parts[::-1] if turned else parts, 1)

    before, after, network = check(joining(layer, flow), rewrite.split_concatenations)
    kind = "conv2d" if isinstance(layer, nn.Conv2d) else "conv_transpose2d"
    assert after == before - Counter(["cat"]) + Counter([kind, "add"])
    moving = [kind_of(node) for node in split.stochastic_nodes(network)]
    assert moving.count(kind) == 1


def test_split_groups_separated_parts_with_and_without_masks():
    def flow(s, x):
        return torch.cat([s.b(x), s.d(s.a(x)), x, s.d(x)], 1)

    core = joining(conv(16, 2), flow, d=drop(nn.Dropout))
    before, after, network = check(core, rewrite.split_concatenations)
    assert after == before + Counter(["conv2d", "add", "cat"])
    assert sources(network, "conv2d")[-2:] == ["cat", "cat"]


@pytest.mark.parametrize(
    "core",
    [
        joining(conv(8, 2), lambda s, x: torch.cat([s.d(x), s.d(x)], 1)),
        joining(conv(8, 2), lambda s, x: torch.cat([x, s.b(x)[:, :4]], 1) + 0 * s.d(x)[:, :1]),
        joining(conv(8, 2, groups=2)),
        joining(up(8, 2, groups=2)),
        joining(conv(4, 2), lambda s, x: torch.cat([s.d(x), x], 2)),
        joining(nn.Sequential(nn.ReLU(), conv(8, 2))),
    ],
    ids=["all moving", "sum moving", "groups", "groups transposed", "along rows", "relu between"],
)
def test_concatenations_are_kept_if_splitting_saves_nothing(core):
    check_unchanged(core, rewrite.split_concatenations)


# Masks into weights.


# The last convolution.


def parts_of(network):
    still = set(network.graph.nodes) - split.stochastic_nodes(network)
    return split.cut(network, still)


def run_parts(parts, values):
    """Run the parts in order, twice, and check that inputs are not overwritten."""
    values = dict(values)
    with torch.no_grad():
        parts[0].run(values)
        before = {name: values[name].clone() for name in values}
        for _ in range(2):
            made = dict(values)
            parts[1].run(made)
            for name, copied in before.items():
                assert torch.equal(values[name], copied), name
    return made[parts[1].outputs[0]]


SKIP = {"a": conv(), "b": conv(), "d": drop(), "c": conv(8, 2)}


@pytest.mark.parametrize(
    "core",
    [
        Flow(lambda s, x: s.c(torch.cat([s.d(s.b(y := s.a(x))), y], 1)), **SKIP),
        Flow(lambda s, x: s.d(x) + x, d=drop()),
        nn.Sequential(drop(), conv()),
        nn.Sequential(conv(), drop(nn.Dropout), nn.Softplus()),
    ],
    ids=["skip", "images only", "mask first", "mask last"],
)
def test_prefix_and_suffix_equal_the_whole_graph(core):
    network, values = begin(core)
    expected = run(network, values)
    prefix, suffix = parts_of(network)
    assert not any(name.startswith("mask_") for name in prefix.inputs)
    assert kinds(prefix.function) + kinds(suffix.function) == kinds(network)
    assert set(suffix.inputs) <= set(values) | set(prefix.outputs)
    assert worst(run_parts((prefix, suffix), values), expected) < 1e-12


def test_graph_without_masks_has_an_empty_suffix():
    network, values = begin(nn.Sequential(conv(), nn.ReLU()))
    prefix, suffix = parts_of(network)
    assert kinds(suffix.function) == Counter()
    assert worst(run_parts((prefix, suffix), values), run(network, values)) < 1e-12


def check_in_place(core, **how):
    """Return the operation kinds of the suffix before and after the in-place rewrite."""
    network, values = begin(core, **how)
    expected = run(network, values)
    parts = parts_of(network)
    before = kinds(parts[1].function)
    for part in parts:
        rewrite.work_in_place(part)
        part.function.graph.lint()
    assert worst(run_parts(parts, values), expected) < 1e-12
    return before, kinds(parts[1].function)


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        (lambda s, x: s.a(s.d(x)).relu(), ["mul", "conv2d", "relu_"]),
        (lambda s, x: functional.leaky_relu(s.a(s.d(x))), ["mul", "conv2d", "leaky_relu_"]),
        (lambda s, x: s.p(s.a(s.d(x))), ["mul", "conv2d", "leaky_relu_"]),
        (lambda s, x: s.d(s.a(s.d(x))), ["mul", "conv2d", "mul_"]),
        (lambda s, x: s.a(s.d(x)) + x, ["mul", "conv2d", "add_"]),
        (lambda s, x: x + s.a(s.d(x)), ["mul", "conv2d", "add_"]),
        (lambda s, x: s.b(s.d(x)) + s.d(x), ["mul", "conv2d", "addcmul_"]),
        (lambda s, x: s.d(x) + s.b(s.d(x)), ["mul", "conv2d", "addcmul_"]),
        (lambda s, x: s.d(x) + x, ["addcmul"]),
        (
            lambda s, x: s.b(y := s.a(s.d(x))).tanh() - s.d(y),
            ["mul", "conv2d", "conv2d", "tanh", "mul_", "sub"],
        ),
    ],
    ids=[
        *("relu", "leaky", "prelu", "product", "sum", "sum turned", "addcmul", "turned", "inputs"),
        "convolved before",
    ],
)
def test_unused_inputs_are_overwritten(flow, expected):
    core = Flow(flow, a=conv(), b=conv(), d=drop(nn.Dropout), p=nn.PReLU(init=-0.3))
    _, after = check_in_place(core)
    assert after == Counter(expected)


@pytest.mark.parametrize(
    "flow",
    [
        lambda s, x: (y := s.a(s.d(x))).relu() + 0.5 * y.relu().tanh() - y,
        lambda s, x: (y := s.d(x).relu().tanh()) * y.relu(),
        lambda s, x: s.one(s.d(x)) - x * s.one(s.d(x)),
        lambda s, x: s.d(x).tanh().relu(),
        lambda s, x: s.d(y := s.a(s.d(x))).tanh() - s.b(y),
        lambda s, x: (y := s.a(s.d(x))).flatten(2).unflatten(2, x.shape[2:]) - s.d(y).tanh() * x,
    ],
    ids=[
        *("used twice", "used with itself", "broadcast", "not newly made", "convolved later"),
        "seen through a view",
    ],
)
def test_inputs_with_later_users_are_not_overwritten(flow):
    check_in_place(Flow(flow, a=conv(), b=conv(), d=drop(), one=conv(4, 1)))


def test_input_of_a_transposed_convolution_is_not_overwritten():
    """The graph may be cut there, and operations on smaller maps run first."""
    core = Flow(
        lambda s, x: s.up(y := s.a(s.d(x))) + functional.interpolate(y.relu(), scale_factor=2.0),
        a=conv(),
        up=up(4, 4),
        d=drop(),
    )
    _, after = check_in_place(core)
    assert after["relu"] == 1 and after["relu_"] == 0


def prelu(slopes):
    layer = nn.PReLU(len(slopes))
    layer.weight.data = torch.tensor(slopes)
    return layer


def test_prelu_with_several_slopes_is_kept():
    core = nn.Sequential(drop(), conv(), prelu([-0.5, 0.2, 0.0, 1.5]))
    _, after = check_in_place(core)
    assert after["prelu"] == 1


@pytest.mark.parametrize(
    "flow",
    [
        lambda s, x: torch.add(x, s.a(s.d(x)), alpha=2),
        lambda s, x: torch.add(s.a(s.d(x)), x, alpha=2),
        lambda s, x: torch.add(x, s.d(x.tanh()), alpha=2),
        lambda s, x: torch.add(s.a(s.d(x)), s.d(x), alpha=-1),
    ],
    ids=["second masked", "first masked", "activation", "both masked"],
)
def test_alpha_of_add_stays_with_the_second_summand(flow):
    check_in_place(Flow(flow, a=conv(), d=drop()))


def test_tensor_without_batch_dimension_is_not_overwritten():
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.where = nn.Parameter(torch.randn(1, 4, *SIZE))
            self.conv, self.drop = conv(), drop()

        def forward(self, images):
            return self.conv(self.where) + self.conv(self.drop(self.conv(self.where) + images))

    check_in_place(Placed())


def test_all_rewrites_in_sequence():
    """Apply them to a small residual U-Net in the order that a program uses."""

    def flow(s, x):
        top = s.n1(s.c1(x)).relu_()
        low = s.act(s.d1(s.n2(s.c2(top))))
        low = s.act(s.d2(s.c3(low)) + low)
        joined = torch.cat([s.up(low), top], 1)
        out = s.act(s.d3(s.n3(s.c4(joined))))
        return s.head(s.c5(out) + out)

    core = Flow(
        flow,
        c1=conv(4, 4, bias=False),
        n1=nn.BatchNorm2d(4),
        c2=conv(4, 6, stride=2),
        n2=nn.BatchNorm2d(6),
        d1=drop(),
        act=nn.PReLU(),
        c3=conv(6, 6),
        d2=drop(),
        up=up(6, 4),
        c4=conv(8, 5),
        d3=drop(),
        n3=nn.BatchNorm2d(5),
        c5=conv(5, 5),
        head=conv(5, 2, 1),
    )
    network, values = begin(core, shared=True)
    expected = run(network, values)
    before = kinds(network)
    for apply in REWRITES:
        apply(network)
        network.graph.lint()
        assert worst(run(network, values), expected) < 1e-12, apply.__name__
    assert "batch_norm" not in kinds(network)
    assert kinds(network)["conv2d"] == before["conv2d"]  # one split, one merged
    parts = parts_of(network)
    for part in parts:
        rewrite.work_in_place(part)
    assert worst(run_parts(parts, values), expected) < 1e-12


# Tracing.


def masked_pass(core, masks, images):
    """Run a network with hooks that multiply the output of each dropout call by a mask."""
    calls = Counter()

    def hook(layer, _, output):
        calls[layer] += 1
        return output * masks[layer, calls[layer]]

    layers = dict.fromkeys(stochastic_layers(core).values())
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        with torch.no_grad():
            return core(images.clone())
    finally:
        for one in hooks:
            one.remove()


def check_traced(core):
    """Check that the graph equals the network under the same masks."""
    network, values, inputs = begin_with_inputs(core)
    layers = stochastic_layers(core)
    images = values[trace.input_names(network)[0]]
    masks = {(layers[one.layer], one.call): values[one.node] for one in inputs}
    found = run(network, values)
    assert worst(found, masked_pass(core, masks, images)) < 1e-12
    return network, inputs


@pytest.mark.parametrize(
    "flow",
    [
        lambda s, x: s.a(s.d(x)).relu_() + 1,
        lambda s, x: (y := s.a(x)).add_(s.d(x)).relu() + y,
        lambda s, x: s.b((y := s.a(s.d(x))).relu()) + y.mul_(2),
        lambda s, x: (y := s.a(s.d(x))).tanh() + s.b(y.relu_()) + y,
        lambda s, x: (z := s.a(s.d(x)).clone()).mul_(3) + z.add_(1) + z,
        lambda s, x: s.e(s.a(s.d(x))).relu_(),
        lambda s, x: s.f(y := s.a(s.d(x))) + y,
    ],
    ids=[
        "relu",
        "sum used later",
        "old read before",
        "old used later",
        "copy",
        "identity between",
        "activation used later",
    ],
)
def test_in_place_operations_are_replaced(flow):
    core = Flow(flow, a=conv(), b=conv(), d=drop(), e=nn.Identity(), f=nn.ReLU(inplace=True))
    network, _ = check_traced(core)
    assert not any(kind.endswith("_") for kind in kinds(network))


@pytest.mark.parametrize(
    "kind",
    [
        nn.Dropout2d,
        nn.Dropout,
    ],
)
@pytest.mark.parametrize(
    "flow",
    [
        lambda s, x: s.a(s.d(x)) + x,
        lambda s, x: s.a(s.d(y := s.b(x))) * y,
        lambda s, x: (y := s.b(x)) + s.a(s.d(y)),
        lambda s, x: torch.cat([y := s.b(x), s.d(y), y], 1),
    ],
    ids=["images", "used later", "used before", "concatenated"],
)
def test_dropout_affects_only_its_own_output(flow, kind):
    """In evaluation mode the layer returns its input tensor, which can mislead the exporter."""
    check_traced(Flow(flow, a=conv(), b=conv(), d=drop(kind)))


def test_layer_called_twice_has_two_masks():
    core = Flow(lambda s, x: s.d(s.a(s.d(x))), a=conv(), d=drop())
    _, inputs = check_traced(core)
    assert [(one.layer, one.call, one.channels) for one in inputs] == [("d", 1, 4), ("d", 2, 4)]


def test_layer_with_two_names_is_one_layer():
    shared = drop()
    core = Flow(lambda s, x: s.e(s.a(s.d(x))), a=conv(), d=shared, e=shared)
    _, inputs = check_traced(core)
    assert [(one.layer, one.call) for one in inputs] == [("d", 1), ("d", 2)]


def test_functional_dropout_is_removed_in_evaluation_mode():
    def flow(s, x):
        twice = functional.dropout(s.d(x), 0.5, s.training)
        return functional.dropout2d(s.a(twice), 0.5, s.training)

    core = Flow(flow, a=conv(), d=drop())
    network, inputs = check_traced(core)
    assert len(inputs) == 1
    assert kinds(network) == Counter(["mul", "conv2d"])


def test_inactive_dropout_is_removed():
    core = nn.Sequential(conv(), nn.Dropout(0.0), drop(), nn.Dropout2d(0.0))
    network, inputs = check_traced(core)
    assert [one.layer for one in inputs] == ["2"]
    assert kinds(network) == Counter(["conv2d", "mul"])


def test_active_layer_that_is_never_run_is_refused():
    core = Flow(lambda s, x: s.a(x), a=conv(), d=drop())
    with pytest.raises(UntraceableError, match="graph lacks a dropout layer"):
        begin(core)


@pytest.mark.parametrize(
    "flow",
    [
        lambda s, x: s.a(x) if x.mean() > 0 else x,
        lambda s, x: s.a(x) * float(x.max()),
        lambda s, x: s.a(x) if len(x) > 2 else x,
        lambda s, x: (s.a(x), x),
        lambda s, x: s.a(x).numpy(),
    ],
    ids=["branch", "number", "by batch", "two results", "numpy"],
)
def test_networks_without_a_graph_are_refused_with_the_reason(flow):
    core = Flow(flow, a=conv(), d=drop())
    with pytest.raises(UntraceableError, match=r"."):
        begin(core)


def test_next_trace_uses_changed_weights():
    core = nn.Sequential(conv(), nn.BatchNorm2d(4), drop(), conv(4, 1))
    network, values = begin(core)
    rewrite.fold_batch_norms(network)
    before = run(network, values)
    with torch.no_grad():
        core[0].weight.mul_(2)
        core[1].running_mean.add_(1)
        core[3].weight.copy_(torch.randn_like(core[3].weight))
    images = values[trace.input_names(network)[0]]
    again = trace.trace(core, images[:2])
    inputs = trace.insert_masks(again, core, stochastic_layers(core))
    rewrite.fold_batch_norms(again)
    masks = {(core[2], one.call): values[one.node] for one in inputs}
    found = run(again, values)
    assert worst(found, masked_pass(core, masks, images)) < 1e-12
    assert worst(found, before) > 0.1


def test_rewrites_do_not_change_the_network_or_the_next_trace():
    core = prepare(nn.Sequential(conv(), nn.BatchNorm2d(4), drop(), nn.ReLU(), conv()))
    state = {name: values.clone() for name, values in core.state_dict().items()}
    first, _ = begin(core)
    for apply in REWRITES:
        apply(first)
    second, _ = begin(core)
    assert kinds(second) == Counter(["conv2d", "batch_norm", "mul", "relu", "conv2d"])
    for name, values in core.state_dict().items():
        if not name.startswith("1."):  # running statistics that the test changes itself
            assert torch.equal(values, state[name])


def test_traced_network_can_be_freed():
    core = nn.Sequential(conv(), drop())
    begin(core)
    alive = weakref.ref(core)
    del core
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("layer", "expected"),
    [(nn.InstanceNorm2d(4), True), (nn.GroupNorm(2, 4), True), (nn.BatchNorm2d(4), False)],
)
def test_normalisation_over_space_is_detected(layer, expected):
    network, _ = begin(nn.Sequential(conv(), layer, drop()))
    assert trace.normalises_over_space(network) is expected


def test_new_constant_gets_an_unused_name():
    network, _ = begin(nn.Sequential(drop(), conv()))
    first = next(iter(network.graph.nodes))
    names = [operations.add_constant(network, first, torch.full((), i)).target for i in range(3)]
    delattr(network, names[0])
    again = operations.add_constant(network, first, torch.full((), 3))
    assert [float(operations.tensor_of(network, again)), float(getattr(network, names[2]))] == [
        3,
        2,
    ]

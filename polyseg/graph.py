"""A network as a graph of tensor operations, and rewrites of it that change only what it costs.

Each rewrite takes a traced network and leaves one that computes the same, up to the rounding of
floating-point sums. A dropout layer is a multiplication by a mask, which is an input of the graph:
what does not hang on any mask is the same in all passes of MC Dropout, and a mask that images share
can be moved and absorbed like any factor.
"""
# torch.fx types what a node is called with as all that it could be.
# mypy: disable-error-code="union-attr, arg-type, assignment, index, misc"
# mypy: disable-error-code="no-any-return, return-value"

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from polyseg.dropout import DROPOUT_LAYERS

_aten = torch.ops.aten

_ADD, _MULTIPLY, _CONCATENATE = _aten.add.Tensor, _aten.mul.Tensor, _aten.cat.default
_DROPOUTS = (_aten.dropout.default, _aten.feature_dropout.default)
_CONVOLUTIONS = (_aten.conv2d.default, _aten.conv_transpose2d.input)
_COPIES = (_aten.clone.default, _aten.detach.default, _aten.contiguous.default, _aten.alias.default)
# f(m x) = m f(x) for every m >= 0.
_ACTIVATIONS = (_aten.relu.default, _aten.leaky_relu.default, _aten.prelu.default)
_IN_PLACE = {
    _aten.relu.default: _aten.relu_.default,
    _aten.leaky_relu.default: _aten.leaky_relu_.default,
    _aten.addcmul.default: _aten.addcmul_.default,
    _MULTIPLY: _aten.mul_.Tensor,
    _ADD: _aten.add_.Tensor,
}
_MAKES_A_TENSOR = (*_CONVOLUTIONS, *_IN_PLACE, *_IN_PLACE.values())


class UntraceableError(Exception):
    """The network is no graph that could be taken apart; the message says why."""


@dataclass(frozen=True)
class MaskInput:
    """An input of the graph: what a dropout layer multiplies by."""

    node: str
    """Its name; of shape (1 or B, C, 1, 1) or (1 or B, C, H, W)."""
    layer: str
    call: int
    """Which call of the layer in a pass, from 1."""
    channels: int


_traced: "WeakKeyDictionary[nn.Module, tuple[Any, fx.GraphModule | str]]" = WeakKeyDictionary()


def trace(core: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return a network as a graph of functions without side effects, with its weights of now.

    The graph is made once, and again where a setting of one of the network's modules has changed.

    Args:
        core: maps (B, C, H, W) to (B, K, H, W); in evaluation mode.
        images: an example, of two images at least.

    Raises:
        UntraceableError: what it does hangs on more than shapes, or it is no such network.
    """
    settings = _settings_of(core)
    known, traced = _traced.get(core, (None, ""))
    if known != settings:
        try:
            traced = _export(core, images)
        except UntraceableError as error:
            traced = str(error)
        _traced[core] = (settings, traced)
    if isinstance(traced, str):
        raise UntraceableError(traced)
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    network = fx.GraphModule(traced, graph)
    _take_weights(network, core)
    return network


def _settings_of(core: nn.Module) -> list[Any]:
    """Return what a module's behaviour may hang on besides its input and its tensors."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return [
        (name, type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain)})
        for name, module in core.named_modules()
    ]


def _take_weights(network: fx.GraphModule, core: nn.Module) -> None:
    """Let a graph use the tensors that the network has now."""
    for node in network.graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        try:
            value = getattr(core.get_submodule(owner), name)
        except AttributeError:
            continue  # A constant of the graph's own.
        setattr(network.get_submodule(owner), name, value)


def _export(core: nn.Module, images: Tensor) -> fx.GraphModule:
    # In evaluation mode a layer may return its very input, which the exporter would then take, also
    # where others read it, for the output.
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))
        for layer in core.modules()
        if isinstance(layer, DROPOUT_LAYERS)
    ]
    try:
        with torch.no_grad():
            exported = torch.export.export(
                core,
                (images,),
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                strict=False,
            )
        network: fx.GraphModule = exported.module()
    except Exception as error:  # Somebody's code, read by torch's exporter.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UntraceableError(reason[:200]) from error
    finally:
        for hook in hooks:
            hook.remove()
    for node in list(network.graph.nodes):
        if node.op == "call_module" and not node.users:
            network.graph.erase_node(node)  # Guards that torch puts in.
    odd = {node.op for node in network.graph.nodes}
    odd -= {"placeholder", "get_attr", "call_function", "output"}
    results = next(node for node in network.graph.nodes if node.op == "output").args[0]
    if odd or not isinstance(results, (tuple, list)) or len(results) != 1:
        raise UntraceableError("it is more than operations on tensors")
    _refuse_what_is_no_operation(network)
    _without_side_effects(network)
    for node in _nodes(network, _COPIES):
        node.replace_all_uses_with(node.args[0])
    network.graph.eliminate_dead_code()
    return network


def insert_masks(
    network: fx.GraphModule, core: nn.Module, layers: Mapping[str, nn.Module]
) -> list[MaskInput]:
    """Replace the dropout of these layers of `core` by products with inputs; other dropout goes."""
    # By module, because one may be registered under several names.
    active, calls = {layer: name for name, layer in layers.items()}, Counter[str]()
    inputs: list[MaskInput] = []
    first = next(node for node in network.graph.nodes if node.op == "placeholder")
    for node in _nodes(network, _DROPOUTS):
        source = _bound(node)["input"]
        path = list(node.meta["nn_module_stack"].values())[-1][0]
        layer = active.get(core.get_submodule(path))
        if layer is None:
            node.replace_all_uses_with(source)
            network.graph.erase_node(node)
            continue
        calls[layer] += 1
        with network.graph.inserting_after(first):
            mask = network.graph.placeholder(f"mask_{len(inputs)}")
        mask.meta["channelwise"] = node.target is _aten.feature_dropout.default
        _replace(node, _MULTIPLY, source, mask)
        network.graph.erase_node(node)  # Dead, but as random as that is to torch, not removed.
        inputs.append(MaskInput(mask.name, layer, calls[layer], _channels(source)))
    if {one.layer for one in inputs} != set(layers):
        raise UntraceableError("a dropout layer is not in its graph")
    network.graph.eliminate_dead_code()
    return inputs


def fold_batch_norms(network: fx.GraphModule) -> None:
    """Fold batch normalisation in evaluation mode into the convolution before it.

    Across a mask m, s (m z) + t = m (s z) + t: the convolution takes the scale s, t is added.
    """
    for node in _nodes(network, (_aten.batch_norm.default,)):
        norm = _bound(node)
        mask = _mask_of(norm["input"]) if len(norm["input"].users) == 1 else None
        conv = _Convolution.of(norm["input"].args[0] if mask else norm["input"])
        if norm["training"] or norm["running_mean"] is None or not (conv and conv.is_own(network)):
            continue
        mean, variance, gamma, beta = (
            _value(network, norm[name])
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        if mask is None:
            folded = conv.with_batch_norm(network, mean, variance, norm["eps"], gamma, beta)
            node.replace_all_uses_with(folded)
            continue
        nothing = torch.zeros_like(mean)
        scaled = conv.with_batch_norm(network, nothing, variance, norm["eps"], gamma, nothing)
        shift = nn.functional.batch_norm(
            nothing[None], mean, variance, gamma, beta, eps=norm["eps"]
        ).reshape(1, -1, 1, 1)
        with network.graph.inserting_before(node):
            masked = network.graph.call_function(_MULTIPLY, (scaled, mask))
        _replace(node, _ADD, masked, _constant(network, node, shift))
        _keep_shape(node, scaled, masked)
    network.graph.eliminate_dead_code()


def move_masks_behind_activations(network: fx.GraphModule) -> None:
    """Apply each mask behind the activation that follows it, f(m x) = m f(x) for m >= 0."""
    for node in _nodes(network, _ACTIVATIONS):
        mask = _mask_of(node.args[0])
        if mask is None:
            continue
        source = node.args[0].args[0]
        with network.graph.inserting_before(node):
            bare = network.graph.call_function(node.target, (source, *node.args[1:]), node.kwargs)
        _keep_shape(node, bare)
        _replace(node, _MULTIPLY, bare, mask)
    network.graph.eliminate_dead_code()


def fold_identities(network: fx.GraphModule) -> None:
    """Add a one to the kernel instead of the input to the output, conv(u) + u = conv'(u)."""
    for node in _nodes(network, (_ADD,)):
        if _bound(node)["alpha"] != 1:
            continue
        for one, other in (node.args[:2], node.args[1::-1]):
            conv = _Convolution.of(one)
            if conv and conv.input is other and conv.is_own(network) and conv.keeps_shape(network):
                weight = _value(network, conv.weight).clone()
                middle = [side // 2 for side in weight.shape[2:]]
                weight[:, :, middle[0], middle[1]] += torch.eye(len(weight)).to(weight)
                node.replace_all_uses_with(conv.with_weight(network, weight))
                break
    network.graph.eliminate_dead_code()


def merge_pointwise(network: fx.GraphModule) -> None:
    """Make one of a convolution and the 1 x 1 convolution right behind it, if that costs less."""
    for node in _nodes(network, (_aten.conv2d.default,)):
        outer = _Convolution.of(node)
        inner = outer and _Convolution.of(outer.input)
        if not (inner and inner.is_own(network) and outer.is_pointwise(network)):
            continue
        head = _value(network, outer.weight)[:, :, 0, 0]
        weight = _value(network, inner.weight)
        if len(head) > head.shape[1] or inner.settings["groups"] != 1:
            continue
        pattern = "ko,iohw->ikhw" if inner.transposed else "ko,oihw->kihw"
        bias = _value(network, outer.bias)
        if inner.bias is not None:
            carried = head @ _value(network, inner.bias)
            bias = carried if bias is None else carried + bias
        merged = inner.with_weight(network, torch.einsum(pattern, head, weight), bias)
        node.replace_all_uses_with(merged)
        _keep_shape(node, merged)
    network.graph.eliminate_dead_code()


def split_concatenations(network: fx.GraphModule) -> None:
    """Convolve what no mask reaches apart, conv(cat(a, b)) = conv(a) + conv(b)."""
    stochastic = stochastic_nodes(network)
    for node in _nodes(network, _CONVOLUTIONS):
        conv = _Convolution.of(node)
        joined = conv.input
        if joined.target is not _CONCATENATE or _bound(joined)["dim"] != 1:
            continue
        parts = joined.args[0]
        moving = [part in stochastic for part in parts]
        if all(moving) or not any(moving) or conv.settings["groups"] != 1:
            continue
        if not conv.has_constant_weight(network):
            continue
        weights = _value(network, conv.weight).split(
            [_channels(part) for part in parts], dim=0 if conv.transposed else 1
        )
        still = conv.over_parts(network, parts, weights, [not one for one in moving], conv.bias)
        changing = conv.over_parts(network, parts, weights, moving, None)
        _replace(node, _ADD, changing, still)
    network.graph.eliminate_dead_code()


def absorb_masks(network: fx.GraphModule) -> None:
    """Multiply masks into the weights next to them: conv(m x) and m conv(x) are convolutions of x.

    For masks of whole channels that all images share. A convolution of what hangs on no mask is
    left alone, for it is done once.
    """
    stochastic = stochastic_nodes(network)
    for node in _nodes(network, (*_CONVOLUTIONS, _MULTIPLY)):
        conv = _Convolution.of(node)
        mask = _mask_of(conv.input if conv else node)
        if mask is None or not mask.meta["channelwise"]:
            continue
        if conv:
            if conv.settings["groups"] == 1:
                node.replace_all_uses_with(conv.with_masked_input(network, mask))
            continue
        source = _Convolution.of(node.args[0])
        if source and source.input in stochastic and source.is_own(network):
            node.replace_all_uses_with(source.with_masked_output(network, mask))
    network.graph.eliminate_dead_code()


def work_in_place(part: "Part") -> None:
    """Let activations, products and sums overwrite what was made for them alone."""
    network = part.function
    for node in _nodes(network, (_aten.prelu.default,)):
        slope = _value(network, node.args[1])
        if slope is not None and slope.numel() == 1:
            node.target = _aten.leaky_relu.default
            node.args = (node.args[0], float(slope))
    for node in _nodes(network, (_ADD,)):
        _add_product(node)
    network.graph.eliminate_dead_code()
    for node in _nodes(network, tuple(_IN_PLACE)):
        if node.target is _ADD and not _is_spare(node.args[0], node):
            _swap_summands(node)
        if _is_spare(node.args[0], node):
            node.target = _IN_PLACE[node.target]
    network.recompile()


def _add_product(node: Node) -> None:
    """Make x + y m one operation, if the product is used nowhere else."""
    if _bound(node)["alpha"] != 1:
        return
    for product, other in (node.args, node.args[::-1]):
        mask = _mask_of(product)
        spare = mask is not None and len(product.users) == 1
        if spare and isinstance(other, Node) and product is not other:
            node.target = _aten.addcmul.default
            node.args = (other, product.args[0], mask)
            return


def _swap_summands(node: Node) -> None:
    if _bound(node)["alpha"] == 1 and isinstance(node.args[1], Node):
        node.args = node.args[::-1]


def stochastic_nodes(network: fx.GraphModule) -> set[Node]:
    """Return the masks and all that hangs on them."""
    found: set[Node] = set()
    for node in network.graph.nodes:
        if node.name.startswith("mask_") or found.intersection(node.all_input_nodes):
            found.add(node)
    return found


@dataclass(frozen=True)
class Taps:
    """What the last convolution adds up at a pixel, its products one by one."""

    rows: tuple[int, ...]
    """Of each tap, where it looks relative to the pixel."""
    columns: tuple[int, ...]
    bias: Tensor | None
    """(K,)"""


def open_last_convolution(network: fx.GraphModule) -> Taps:
    """Leave out the sum that ends the network, so that it need be made at chosen pixels only.

    The output becomes (B, T K, H, W), tap by tap, and a 1 x 1 convolution of what enters the last
    one; a network that does not end in such a convolution keeps its output, which is one tap.
    """
    node = next(node for node in network.graph.nodes if node.op == "output").args[0][0]
    conv = _Convolution.of(node)
    if not (conv and conv.has_constant_weight(network) and conv.is_centred(network)):
        return Taps((0,), (0,), None)
    weight = _value(network, conv.weight)
    height, width = weight.shape[2:]
    spread = weight.permute(2, 3, 0, 1).flatten(0, 2)[:, :, None, None]
    down, across = _pair(conv.settings["dilation"])
    opened = _replace(
        node, _aten.conv2d.default, conv.input, _constant(network, node, spread.contiguous())
    )
    opened.meta["val"] = node.meta["val"].repeat(1, height * width, 1, 1)
    network.graph.eliminate_dead_code()
    return Taps(
        tuple(down * (i - height // 2) for i in range(height) for _ in range(width)),
        tuple(across * (j - width // 2) for _ in range(height) for j in range(width)),
        _value(network, conv.bias),
    )


@dataclass(frozen=True)
class Part:
    """Some of the operations of a graph, which read and write tensors by name."""

    function: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, values: dict[str, Tensor]) -> None:
        """Take the inputs from `values` and add the outputs to it."""
        results = self.function(*(values[name] for name in self.inputs))
        values.update(zip(self.outputs, results, strict=True))

    def lay_out(self, layout: torch.memory_format) -> None:
        """Keep weights in this order."""
        for name, values in self.function.named_buffers():
            if values.dim() == 4:
                setattr(self.function, name, values.contiguous(memory_format=layout))

    @cached_property
    def cost(self) -> float:
        """Return about how much there is to compute for an image, in multiplications."""
        return float(sum(_cost(node) for node in self.function.graph.nodes))

    def most_values(self) -> int:
        """Return how many values the largest feature map of an image has, as traced."""
        nodes = [node for node in self.function.graph.nodes if _sides(node)]
        return max(_channels(node) * _sides(node)[0] * _sides(node)[1] for node in nodes)

    def widths(self) -> list[int]:
        """Return the widths that occur, the smallest first."""
        return sorted({_sides(node)[1] for node in self.function.graph.nodes if _sides(node)})

    def narrow(self, width: int) -> set[Node]:
        """Return the operations up to the last that is no wider, and what they hang on."""
        nodes = list(self.function.graph.nodes)
        small = [i for i, node in enumerate(nodes) if _sides(node) and _sides(node)[1] <= width]
        small = [i for i in small if nodes[i].op == "call_function"]
        if not small:
            return set()
        wanted = {node for i, node in enumerate(nodes) if _sides(node) and i <= max(small)}
        for node in reversed(nodes):
            if node in wanted:
                wanted.update(node.all_input_nodes)
        return {node for node in wanted if node.op == "call_function"}


def cut(network: fx.GraphModule, early: Collection[Node]) -> tuple[Part, Part]:
    """Part a graph in two, of which the first holds these operations."""
    calls = [node for node in network.graph.nodes if node.op == "call_function"]
    output = next(node for node in network.graph.nodes if node.op == "output")
    results = list(output.args[0])
    first = [node for node in calls if node in early]
    frontier = [
        node for node in first if node in results or any(user not in early for user in node.users)
    ]
    second = [node for node in calls if node not in early]
    return _part(network, first, frontier), _part(network, second, results)


def _part(network: fx.GraphModule, nodes: list[Node], results: list[Node]) -> Part:
    made, graph = set(nodes), fx.Graph()
    inputs = dict.fromkeys(
        source
        for node in nodes
        for source in node.all_input_nodes
        if source not in made and source.op != "get_attr"
    )
    inputs |= dict.fromkeys(node for node in results if node not in made)
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        for constant in node.all_input_nodes:
            if constant.op == "get_attr" and constant not in copies:
                copies[constant] = graph.node_copy(constant)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    function = fx.GraphModule(network, graph)
    return Part(function, tuple(node.name for node in inputs), tuple(node.name for node in results))


def _sides(node: Node) -> tuple[int, int] | None:
    """Return the height and width of a feature map, None for what is none."""
    shape = getattr(node.meta.get("val"), "shape", ())
    is_map = node.op in ("call_function", "placeholder") and len(shape) == 4
    return (int(shape[2]), int(shape[3])) if is_map and shape[3] > 1 else None


def _cost(node: Node) -> float:
    sides = _sides(node)
    if sides is None or node.op != "call_function":
        return 0.0
    values = _channels(node) * sides[0] * sides[1]
    conv = _Convolution.of(node)
    if conv is None:
        return 4.0 * values
    weight = conv.weight
    while weight.op != "get_attr":
        weight = weight.args[0]
    shape = weight.meta["val"].shape
    inputs = shape[0] if conv.transposed else shape[1]
    stride = _pair(conv.settings["stride"]) if conv.transposed else (1, 1)
    return values * inputs * shape[2] * shape[3] / (stride[0] * stride[1]) + 4.0 * values


def input_names(network: fx.GraphModule) -> list[str]:
    """Return the names of the inputs, the images first."""
    return [node.name for node in network.graph.nodes if node.op == "placeholder"]


def output_channels(network: fx.GraphModule) -> int:
    """Return K, the channels of the output."""
    output = next(node for node in network.graph.nodes if node.op == "output")
    return _channels(output.args[0][0])


def normalises_over_space(network: fx.GraphModule) -> bool:
    """Return whether there is a layer whose every output hangs on all of its input."""
    kinds = (_aten.instance_norm.default, _aten.group_norm.default, _aten.layer_norm.default)
    return any(True for _ in _nodes(network, kinds))


@dataclass(frozen=True)
class _Convolution:
    """A convolution in the graph, transposed or not."""

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    settings: dict[str, Any]

    @classmethod
    def of(cls, node: Any) -> "_Convolution | None":
        if not isinstance(node, Node) or node.target not in _CONVOLUTIONS:
            return None
        given = _bound(node)
        return cls(node, given.pop("input"), given.pop("weight"), given.pop("bias"), given)

    @property
    def transposed(self) -> bool:
        return self.node.target is _aten.conv_transpose2d.input

    def has_constant_weight(self, network: fx.GraphModule) -> bool:
        return _value(network, self.weight) is not None

    def is_own(self, network: fx.GraphModule) -> bool:
        """Whether it may be changed for the sake of the one node that uses it."""
        simple = not self.transposed or self.settings["groups"] == 1
        return len(self.node.users) == 1 and simple and self.has_constant_weight(network)

    def keeps_shape(self, network: fx.GraphModule) -> bool:
        """Whether its output has the shape of its input, channels included."""
        weight = _value(network, self.weight)
        return self.is_centred(network) and weight.shape[0] == weight.shape[1]

    def is_centred(self, network: fx.GraphModule) -> bool:
        """Whether each output looks at as many inputs on either side."""
        given = self.settings
        if self.transposed or given["groups"] != 1:
            return False
        sides = _value(network, self.weight).shape[2:]
        centred = all(
            side % 2 == 1 and 2 * padding == dilation * (side - 1)
            for side, padding, dilation in zip(
                sides, _pair(given["padding"]), _pair(given["dilation"]), strict=True
            )
        )
        return centred and _pair(given["stride"]) == (1, 1)

    def is_pointwise(self, network: fx.GraphModule) -> bool:
        if self.transposed or not self.has_constant_weight(network):
            return False
        still = _pair(self.settings["stride"]) == (1, 1) and self.settings["groups"] == 1
        sides = _value(network, self.weight).shape[2:]
        return still and tuple(sides) == (1, 1) and _pair(self.settings["padding"]) == (0, 0)

    def with_weight(
        self, network: fx.GraphModule, weight: Tensor, bias: Tensor | None = None
    ) -> Node:
        kept = self.bias if bias is None else _constant(network, self.node, bias)
        return self.rebuilt(network, self.input, _constant(network, self.node, weight), kept)

    def with_batch_norm(self, network: fx.GraphModule, *statistics: Any) -> Node:
        weight, bias = fuse_conv_bn_weights(
            _value(network, self.weight),
            _value(network, self.bias),
            *statistics,
            transpose=self.transposed,
        )
        return self.with_weight(network, weight.detach(), bias.detach())

    def over_parts(
        self,
        network: fx.GraphModule,
        parts: list[Node],
        weights: tuple[Tensor, ...],
        chosen: list[bool],
        bias: Node | None,
    ) -> Node:
        """Return the convolution of some of the parts that make its input."""
        inputs = [part for part, one in zip(parts, chosen, strict=True) if one]
        slices = [weight for weight, one in zip(weights, chosen, strict=True) if one]
        joined = inputs[0]
        if len(inputs) > 1:
            with network.graph.inserting_before(self.node):
                joined = network.graph.call_function(_CONCATENATE, (inputs, 1))
        weight = torch.cat(slices, dim=0 if self.transposed else 1)
        return self.rebuilt(network, joined, _constant(network, self.node, weight), bias)

    def with_masked_input(self, network: fx.GraphModule, mask: Node) -> Node:
        with network.graph.inserting_before(self.node):
            # (1, C, 1, 1) stands along the axis of the input's channels.
            along = self._across(network, mask) if self.transposed else mask
            weight = network.graph.call_function(_MULTIPLY, (self.weight, along))
        return self.rebuilt(network, self.input.args[0], weight, self.bias)

    def with_masked_output(self, network: fx.GraphModule, mask: Node) -> Node:
        bias = self.bias
        with network.graph.inserting_before(self.node):
            along = mask if self.transposed else self._across(network, mask)
            weight = network.graph.call_function(_MULTIPLY, (self.weight, along))
            if bias is not None:
                flat = network.graph.call_function(_aten.flatten.using_ints, (mask,))
                bias = network.graph.call_function(_MULTIPLY, (bias, flat))
        return self.rebuilt(network, self.input, weight, bias)

    @staticmethod
    def _across(network: fx.GraphModule, mask: Node) -> Node:
        return network.graph.call_function(_aten.transpose.int, (mask, 0, 1))

    def rebuilt(
        self, network: fx.GraphModule, source: Node, weight: Node, bias: Node | None
    ) -> Node:
        given = {"input": source, "weight": weight, "bias": bias} | self.settings
        with network.graph.inserting_before(self.node):
            node = network.graph.call_function(self.node.target, tuple(given.values()))
        _keep_shape(self.node, node)
        return node


def _refuse_what_is_no_operation(network: fx.GraphModule) -> None:
    for node in network.graph.nodes:
        known = node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload)
        if not known and getattr(node.target, "__module__", "") != "_operator":
            raise UntraceableError(f"it holds {node.target}, which is no plain operation")


def _without_side_effects(network: fx.GraphModule) -> None:
    """Replace operations that overwrite their input by those that do not."""
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    for node in list(network.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        packet, overload = schema.name.split("::")[1], schema.overload_name or "default"
        if packet == "batch_norm":
            continue  # In evaluation mode it changes nothing.
        pure = getattr(getattr(_aten, packet.removesuffix("_"), None), overload, None)
        if not packet.endswith("_") or pure is None:
            raise UntraceableError(f"it holds {node.target}, which overwrites its input")
        node.target = pure
        node.args[0].replace_all_uses_with(
            node, delete_user_cb=lambda user, node=node: order[user] > order[node]
        )


def _nodes(network: fx.GraphModule, targets: tuple[Any, ...]) -> list[Node]:
    return [node for node in network.graph.nodes if node.target in targets]


def _bound(node: Node) -> dict[str, Any]:
    """Return all arguments of a call by name, defaults included."""
    arguments = node.target._schema.arguments
    given = {one.name: one.default_value for one in arguments}
    given.update(zip(given, node.args, strict=False))
    return given | node.kwargs


def _value(network: fx.GraphModule, node: Node | None) -> Any:
    """Return the tensor that a node stands for; None where it stands for none, or is computed."""
    if node is None or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(network.get_submodule(owner), name).detach()


def _mask_of(node: Any) -> Node | None:
    """Return the mask if a node is the product of something with it."""
    if not isinstance(node, Node) or node.target is not _MULTIPLY or len(node.args) != 2:
        return None
    mask = node.args[1]
    is_mask = isinstance(mask, Node) and "channelwise" in mask.meta
    return mask if is_mask else None


def _is_spare(node: Any, user: Node) -> bool:
    """Whether a tensor was newly made for this user alone, and is of its result's shape."""
    return (
        isinstance(node, Node)
        and node.target in _MAKES_A_TENSOR
        and len(node.users) == 1
        and user.args.count(node) == 1
        and _sides(node) is not None
        # By their names, for the number of images is one.
        and str(_shape(node)) == str(_shape(user))
    )


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _channels(node: Node) -> int:
    return int(_shape(node)[1])


def _keep_shape(old: Node, *new: Node) -> None:
    for node in new:
        node.meta["val"] = old.meta["val"]


def _replace(node: Node, target: Any, *arguments: Any) -> Node:
    """Put another call in the place of a node."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, arguments)
    _keep_shape(node, new)
    node.replace_all_uses_with(new)
    return new


def _constant(network: fx.GraphModule, before: Node, value: Tensor) -> Node:
    """Return a node that holds a tensor."""
    name = f"folded_{sum(1 for _ in network.buffers(recurse=False))}"
    network.register_buffer(name, value)
    with network.graph.inserting_before(before):
        node = network.graph.get_attr(name)
    node.meta["val"] = value
    return node


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return (values[0], values[-1])

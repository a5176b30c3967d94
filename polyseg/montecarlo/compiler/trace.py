"""Convert a network to a graph of tensor operations, with its dropout masks as inputs.

A dropout layer becomes a multiplication by a mask. Operations that do not depend on a mask have the
same result in all passes of MC Dropout.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from polyseg.errors import first_line
from polyseg.montecarlo.compiler.operations import (
    MULTIPLY,
    arguments_of,
    aten,
    calls_to,
    channels_of,
    is_pointwise,
    replace_call,
    results_of,
)
from polyseg.networks.dropout import dropout_types

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)
_DISCONTINUOUS = (
    *(aten.sign, aten.sgn, aten.round, aten.floor, aten.ceil, aten.trunc, aten.fix, aten.frac),
    *(aten.fmod, aten.remainder, aten.floor_divide, aten.heaviside, aten.hardshrink),
    aten.threshold,
)
"""Functions with jumps, where two ways of computation may differ by more than rounding."""
_COPIES = (aten.clone.default, aten.detach.default, aten.contiguous.default, aten.alias.default)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)


class UntraceableError(Exception):
    """The network cannot be converted to a graph; the message gives the reason."""


@dataclass(frozen=True)
class MaskInput:
    """An input of the graph: the mask that a dropout layer multiplies by."""

    node: str
    """Name of the input, of shape (1 or B, C, 1, 1) or (1 or B, C, H, W)."""
    layer: str
    call: int
    """Number of the call of the layer in a pass, from 1."""
    channels: int


_traced: "WeakKeyDictionary[nn.Module, tuple[Any, fx.GraphModule | str]]" = WeakKeyDictionary()


def trace(core: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return a network as a graph of functions without side effects, with its current weights.

    The graph is made once, and again if a setting of one of the network's modules has changed. The
    network is in evaluation mode and maps (B, C, H, W) to (B, K, H, W); the example has at least
    two images. Operations that depend on values, and other inputs or outputs, raise
    UntraceableError.
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
    """Return the attributes of a network's modules that its operations may depend on."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return [
        (name, type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain)})
        for name, module in core.named_modules()
    ]


def _take_weights(network: fx.GraphModule, core: nn.Module) -> None:
    """Replace the weights of a graph by the current tensors of the network."""
    for node in network.graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        try:
            value = getattr(core.get_submodule(owner), name)
        except AttributeError:
            continue  # The graph's own constant.
        setattr(network.get_submodule(owner), name, value)


def _export(core: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return the graph from torch's exporter, without copies and side effects."""
    network = _exported(core, images)
    for node in list(network.graph.nodes):
        if node.op == "call_module" and not node.users:
            network.graph.erase_node(node)  # Guards that torch inserts.
    odd = {node.op for node in network.graph.nodes}
    odd -= {"placeholder", "get_attr", "call_function", "output"}
    if odd or len(results_of(network)) != 1:
        raise UntraceableError("it is not a graph of tensor operations with one output")
    _refuse_unknown_operations(network)
    _refuse_discontinuities(network)
    _without_side_effects(network)
    for node in calls_to(network, (*_COPIES, *_PADS)):
        if node.target in _COPIES or not any(arguments_of(node)["pad"]):
            node.replace_all_uses_with(node.args[0])
    network.graph.eliminate_dead_code()
    return network


def _exported(core: nn.Module, images: Tensor) -> fx.GraphModule:
    # In evaluation mode a layer may return its input itself, which the exporter would then replace
    # by the output everywhere. A copy prevents this.
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))
        for layer in core.modules()
        if isinstance(layer, dropout_types())
    ]
    batch = {0: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad():
            exported = torch.export.export(core, (images,), dynamic_shapes=(batch,), strict=False)
        return exported.module()
    except Exception as error:  # A user's network may fail in any way.
        raise UntraceableError(first_line(error)[:200]) from error
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_unknown_operations(network: fx.GraphModule) -> None:
    for node in network.graph.nodes:
        known = node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload)
        if not known and getattr(node.target, "__module__", "") != "_operator":
            raise UntraceableError(f"it contains {node.target}, which is not a tensor operation")


def _refuse_discontinuities(network: fx.GraphModule) -> None:
    """Raise if rounding of a computed value could change a result by more than rounding.

    An example is a comparison, whose result is not floating point. Comparisons of the images, or of
    values that follow from single pixels, are allowed.
    """
    exact: set[Node] = set()
    for node in network.graph.nodes:
        called = node.op == "call_function"
        same_bits = called and (is_pointwise(node) or not node.all_input_nodes)
        given = node.op in ("placeholder", "get_attr")
        if given or (same_bits and exact.issuperset(node.all_input_nodes)):
            exact.add(node)
        elif called and _is_discontinuous(node):
            raise UntraceableError(
                f"it contains {node.target}, where rounding may change a decision"
            )


def _is_discontinuous(node: Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not value.is_floating_point():
        return True
    return getattr(node.target, "overloadpacket", None) in _DISCONTINUOUS


def _without_side_effects(network: fx.GraphModule) -> None:
    """Replace in-place operations by those with a new output."""
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    for node in list(network.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        packet, overload = schema.name.split("::")[1], schema.overload_name or "default"
        if packet == "batch_norm":
            continue  # It changes nothing in evaluation mode.
        pure = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
        if not packet.endswith("_") or pure is None:
            raise UntraceableError(f"it contains {node.target}, which overwrites its input")
        node.target = pure
        node.args[0].replace_all_uses_with(
            node, delete_user_cb=lambda user, node=node: order[user] > order[node]
        )


def insert_masks(
    network: fx.GraphModule, core: nn.Module, layers: Mapping[str, nn.Module]
) -> list[MaskInput]:
    """Replace these dropout layers of `core` by products with inputs, and remove the others."""
    # By module, because a module may have several names.
    active, calls = {layer: name for name, layer in layers.items()}, Counter[str]()
    inputs: list[MaskInput] = []
    first = network.graph.find_nodes(op="placeholder")[0]
    for node in calls_to(network, _DROPOUTS):
        source = arguments_of(node)["input"]
        path = list(node.meta["nn_module_stack"].values())[-1][0]
        layer = active.get(core.get_submodule(path))
        if layer is None:
            node.replace_all_uses_with(source)
            network.graph.erase_node(node)
            continue
        calls[layer] += 1
        with network.graph.inserting_after(first):
            mask = network.graph.placeholder(f"mask_{len(inputs)}")
        mask.meta["channelwise"] = node.target is aten.feature_dropout.default
        replace_call(node, MULTIPLY, source, mask)
        network.graph.erase_node(node)  # Torch does not remove dead nodes that are random.
        inputs.append(MaskInput(mask.name, layer, calls[layer], channels_of(source)))
    if {one.layer for one in inputs} != set(layers):
        raise UntraceableError("its graph lacks a dropout layer")
    network.graph.eliminate_dead_code()
    return inputs


def input_names(network: fx.GraphModule) -> list[str]:
    """Return the names of the inputs, the images first."""
    return [node.name for node in network.graph.find_nodes(op="placeholder")]


def normalises_over_space(network: fx.GraphModule) -> bool:
    """Return whether a layer normalises by statistics over the whole image."""
    kinds = (aten.instance_norm.default, aten.group_norm.default, aten.layer_norm.default)
    return bool(calls_to(network, kinds))

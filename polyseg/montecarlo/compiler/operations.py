"""Read single operations of a torch.fx graph, and replace them by others."""

from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

aten = torch.ops.aten

ADD, MULTIPLY, CONCATENATE = aten.add.Tensor, aten.mul.Tensor, aten.cat.default
CONVOLUTIONS = (aten.conv2d.default, aten.conv_transpose2d.input)


def calls_to(network: fx.GraphModule, targets: tuple[Any, ...]) -> list[Node]:
    """Return the calls of any of these functions, in the order of the graph."""
    return [node for node in network.graph.nodes if node.target in targets]


def arguments_of(node: Node) -> dict[str, Any]:
    """Return all arguments of a call by name, defaults included."""
    arguments = node.target._schema.arguments
    given = {one.name: one.default_value for one in arguments}
    given.update(zip(given, node.args, strict=False))
    return given | node.kwargs


def results_of(network: fx.GraphModule) -> list[Node]:
    """Return the nodes that a graph returns."""
    return list(next(reversed(network.graph.nodes)).args[0])


def tensor_of(network: fx.GraphModule, node: Node | None) -> Any:
    """Return the tensor of a node that is a weight or constant; None for other nodes."""
    if node is None or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(network.get_submodule(owner), name).detach()


def mask_of(node: Any) -> Node | None:
    """Return the mask if a node is a product with a mask, else None."""
    if not isinstance(node, Node) or node.target is not MULTIPLY or len(node.args) != 2:
        return None
    mask = node.args[1]
    is_mask = isinstance(mask, Node) and "channelwise" in mask.meta
    return mask if is_mask else None


def shape_of(node: Node) -> tuple[Any, ...]:
    """Return the shape of a node's result, where the number of images is a symbol."""
    return tuple(node.meta["val"].shape)


def channels_of(node: Node) -> int:
    """Return the second dimension of a node's result."""
    return int(shape_of(node)[1])


def sides_of(node: Node) -> tuple[int, int] | None:
    """Return the height and width of a feature map, None for other results."""
    shape = getattr(node.meta.get("val"), "shape", ())
    is_map = node.op in ("call_function", "placeholder") and len(shape) == 4
    return (int(shape[2]), int(shape[3])) if is_map and shape[3] > 1 else None


def is_pointwise(node: Node) -> bool:
    """Return whether each value of the result depends only on input values at the same place."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def replace_call(node: Node, target: Any, *arguments: Any) -> Node:
    """Replace a node by another call, and return the new node."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, arguments)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    return new


def add_constant(network: fx.GraphModule, before: Node, value: Tensor) -> Node:
    """Add a constant tensor to the graph, and return its node."""
    # Some numbers may be in use, because a part of a graph has some of its constants.
    name = next(name for i in count() if not hasattr(network, name := f"folded_{i}"))
    network.register_buffer(name, value)
    with network.graph.inserting_before(before):
        node = network.graph.get_attr(name)
    node.meta["val"] = value
    return node


def pair(value: Any) -> tuple[int, int]:
    """Return a setting of a convolution as (height, width), also from a single number."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return (values[0], values[-1])


@dataclass(frozen=True)
class Convolution:
    """A convolution in the graph, transposed or not."""

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    settings: dict[str, Any]

    @classmethod
    def of(cls, node: Any) -> "Convolution | None":
        """Return a node as a convolution, or None if it is another operation."""
        if not isinstance(node, Node) or node.target not in CONVOLUTIONS:
            return None
        given = arguments_of(node)
        return cls(node, given.pop("input"), given.pop("weight"), given.pop("bias"), given)

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.node.target is aten.conv_transpose2d.input

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of its kernel, (K, C, h, w)."""
        return tuple(self.weight.meta["val"].shape)

    def has_constant_weight(self, network: fx.GraphModule) -> bool:
        """Return whether its kernel is a weight, not a computed tensor."""
        return tensor_of(network, self.weight) is not None

    def is_own(self, network: fx.GraphModule) -> bool:
        """Return whether it may be changed, because a single node uses it."""
        simple = not self.transposed or self.settings["groups"] == 1
        return len(self.node.users) == 1 and simple and self.has_constant_weight(network)

    def is_centred(self) -> bool:
        """Return whether its kernel is centred, with stride 1, so that sides keep their size."""
        given = self.settings
        if self.transposed or given["groups"] != 1 or pair(given["stride"]) != (1, 1):
            return False
        sides, padding, dilation = self.kernel_shape[2:], given["padding"], given["dilation"]
        axes = zip(sides, pair(padding), pair(dilation), strict=True)
        return all(side % 2 == 1 and 2 * pad == step * (side - 1) for side, pad, step in axes)

    def with_weight(
        self, network: fx.GraphModule, weight: Tensor, bias: Tensor | None = None
    ) -> Node:
        """Return the convolution with another kernel, and with another bias if one is given."""
        kept = self.bias if bias is None else add_constant(network, self.node, bias)
        return self.rebuilt(network, self.input, add_constant(network, self.node, weight), kept)

    def with_batch_norm(self, network: fx.GraphModule, *statistics: Any) -> Node:
        """Return it combined with the mean, variance, eps, scale and shift of a batch norm."""
        weight, bias = fuse_conv_bn_weights(
            tensor_of(network, self.weight),
            tensor_of(network, self.bias),
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
        """Return the convolution of some parts of its concatenated input."""
        inputs = [part for part, one in zip(parts, chosen, strict=True) if one]
        slices = [weight for weight, one in zip(weights, chosen, strict=True) if one]
        joined = inputs[0]
        if len(inputs) > 1:
            with network.graph.inserting_before(self.node):
                joined = network.graph.call_function(CONCATENATE, (inputs, 1))
        weight = torch.cat(slices, dim=0 if self.transposed else 1)
        return self.rebuilt(network, joined, add_constant(network, self.node, weight), bias)

    def rebuilt(
        self, network: fx.GraphModule, source: Node, weight: Node, bias: Node | None
    ) -> Node:
        """Return a convolution with the same settings, inserted before this one."""
        given = {"input": source, "weight": weight, "bias": bias} | self.settings
        with network.graph.inserting_before(self.node):
            node = network.graph.call_function(self.node.target, tuple(given.values()))
        node.meta["val"] = self.node.meta["val"]
        return node

"""Split a graph into the part that all passes have in common, and the part of each pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, fx
from torch.fx import Node

from polyseg.montecarlo.compiler import winograd
from polyseg.montecarlo.compiler.operations import (
    Convolution,
    channels_of,
    pair,
    results_of,
    sides_of,
)


def stochastic_nodes(network: fx.GraphModule) -> set[Node]:
    """Return the masks, and all operations that depend on one."""
    found: set[Node] = set()
    for node in network.graph.nodes:
        if node.name.startswith("mask_") or found.intersection(node.all_input_nodes):
            found.add(node)
    return found


@dataclass(frozen=True)
class Part:
    """Some operations of a graph, as a function of named tensors that returns named tensors."""

    function: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, values: dict[str, Tensor]) -> None:
        """Read the inputs from `values` and add the outputs to it."""
        results = self.function(*(values[name] for name in self.inputs))
        values.update(zip(self.outputs, results, strict=True))

    def result(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the first output for these inputs."""
        output: Tensor = self.function(*(values[name] for name in self.inputs))[0]
        return output

    def lay_out(self, layout: torch.memory_format, kind: torch.dtype) -> None:
        """Copy the weights to this memory layout and type; the network's own do not change."""
        for node in self.function.graph.find_nodes(op="get_attr"):
            path, _, name = str(node.target).rpartition(".")
            owner = self.function.get_submodule(path)
            values = getattr(owner, name).detach()
            if values.is_floating_point():
                values = values.to(kind)
            if values.dim() == 4:
                values = values.contiguous(memory_format=layout)
            delattr(owner, name)
            owner.register_buffer(name, values)

    def of_images(self) -> set[str]:
        """Return the names of the inputs that have a row for each image."""
        nodes = self.function.graph.find_nodes(op="placeholder")
        shapes = [getattr(node.meta.get("val"), "shape", ()) for node in nodes]
        # The number of images is a symbol; other sizes are integers.
        return {
            name
            for name, shape in zip(self.inputs, shapes, strict=True)
            if shape and not isinstance(shape[0], int)
        }

    @cached_property
    def cost(self) -> float:
        """Approximate number of multiplications for an image."""
        return float(sum(_cost(node) for node in self.function.graph.nodes))

    def most_values(self) -> int:
        """Return the number of values in the largest feature map of an image."""
        return max((channels_of(node) * prod(sides_of(node)) for node in self._maps()), default=1)

    def widths(self) -> list[int]:
        """Return the widths of the maps, the smallest first."""
        return sorted({sides_of(node)[1] for node in self._maps()})

    def up_to_width(self, width: int) -> set[Node]:
        """Return the operations on feature maps up to the last one of at most this width."""
        calls = [node for node in self._maps() if node.op == "call_function"]
        last = max((i for i, node in enumerate(calls) if sides_of(node)[1] <= width), default=-1)
        return set(calls[: last + 1])

    def _maps(self) -> list[Node]:
        return [node for node in self.function.graph.nodes if sides_of(node)]


def cut(network: fx.GraphModule, early: set[Node]) -> tuple[Part, Part]:
    """Split a graph into two parts: the early operations and the others."""
    calls = [node for node in network.graph.nodes if node.op == "call_function"]
    results = results_of(network)
    first = [node for node in calls if node in early]
    frontier = [node for node in first if node in results or not node.users.keys() <= early]
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


def _cost(node: Node) -> float:
    sides = sides_of(node)
    if sides is None or node.op != "call_function":
        return 0.0
    values = channels_of(node) * prod(sides)
    if node.target is winograd.convolve:
        return winograd.products(node.args[1].meta["val"]) * prod(sides) + 4.0 * values
    conv = Convolution.of(node)
    if conv is None:
        return 4.0 * values
    products = values * prod(conv.kernel_shape[1:])
    if conv.transposed:
        products = values * conv.kernel_shape[0] * prod(conv.kernel_shape[2:])
        products /= prod(pair(conv.settings["stride"]))
    return products + 4.0 * values

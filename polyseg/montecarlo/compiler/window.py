"""Run the last operations of a network on windows around the pixels that are needed.

A window is exact if every operation between it and the output commutes with cropping. `_RULES`
lists the operations that do, and how many pixels at the edge of a window each of them makes wrong.
All other operations run on whole images before the window is cut out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx import Node

from polyseg.montecarlo.compiler import winograd
from polyseg.montecarlo.compiler.operations import (
    CONCATENATE,
    Convolution,
    arguments_of,
    aten,
    is_pointwise,
    pair,
    results_of,
    sides_of,
)
from polyseg.montecarlo.compiler.split import Part, cut

_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Largest difference between a window and the whole image, relative to the largest value."""

Frame = tuple[int, int]
"""Height and width of the output."""


class Window(NamedTuple):
    """The part of an image to compute, in pixels of the output."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class WindowedEnd:
    """The last operations of a network, `end`, which may run on windows, image by image.

    `head` computes the inputs of `end` for the whole batch.
    """

    head: Part
    end: Part
    frame: Frame
    cell: int
    """Number of pixels whose multiples are the edges of windows."""
    margin: int
    """Number of pixels at the edge of a window that may be wrong."""

    @classmethod
    def of(
        cls, whole: Part, width: int, frame: Frame, prepare: Callable[[Part], None]
    ) -> "WindowedEnd | None":
        """Return a network whose end follows its last map of at most this width, or None.

        `width` is in pixels, `frame` the size of the output; `prepare` is applied to both parts.
        """
        network = whole.function
        output = results_of(network)[0]
        early = _with_dependencies(whole.up_to_width(width))
        calls = [node for node in network.graph.nodes if node.op == "call_function"]
        while True:
            late = [node for node in calls if node not in early]
            if not late or sides_of(output) != frame or output in early:
                return None
            margins = _margins(network, set(late), frame)
            barred = {node for node in late if margins[node] is None}
            if not barred:
                break
            early |= _with_dependencies(barred)
        steps = [_step(node, frame) for node in margins if sides_of(node) is not None]
        head, end = cut(network, early)
        for part in (head, end):
            prepare(part)
        return cls(head, end, frame, lcm(*steps), margins[output])

    def windows(self, wanted: Tensor) -> list[Window]:
        """Return the smallest window of each image that gives the wanted pixels, (B, H, W).

        Each image has at least one wanted pixel.
        """
        edges = []
        for axis, size in zip((2, 1), self.frame, strict=True):
            touched = wanted.any(dim=axis).byte()
            least, most = touched.argmax(dim=1), size - 1 - touched.flip(1).argmax(dim=1)
            first = (least - self.margin).clamp(min=0) // self.cell * self.cell
            last = (most + self.margin).clamp(max=size - 1) // self.cell * self.cell + self.cell
            edges += [first, last]
        return [
            Window(top, left, bottom - top, right - left)
            for top, bottom, left, right in zip(*(edge.tolist() for edge in edges), strict=True)
        ]

    def share(self, wanted: Tensor) -> float:
        """Return the cost of a pass for these pixels as a share of one without windows."""
        windows = self.windows(wanted)
        area = sum(one.height * one.width for one in windows) / len(windows)
        area /= self.frame[0] * self.frame[1]
        return (self.head.cost + self.end.cost * area) / (self.head.cost + self.end.cost)

    def crop(self, values: Mapping[str, Tensor], image: int, window: Window) -> dict[str, Tensor]:
        """Return the inputs of the end for one image, with maps cropped to the window."""
        return {name: self._crop(one, image, window) for name, one in values.items()}

    def _crop(self, values: Tensor, image: int, window: Window) -> Tensor:
        if values.dim() != 4:
            return values
        image %= len(values)  # Masks may be shared by the images.
        part = values[image : image + 1]
        if values.shape[2:] == (1, 1):
            return part
        step = self.frame[0] // values.shape[2]
        top, left, height, width = (size // step for size in window)
        channels_last = values.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return part[..., top : top + height, left : left + width].contiguous(memory_format=layout)

    def is_exact(self, values: Mapping[str, Tensor], kind: torch.dtype) -> bool:
        """Return whether small windows at borders, corners and off centre equal the whole image.

        `values` are the inputs of a pass over one image by name, `kind` is the precision.
        """
        reached = dict(values)
        self.head.run(reached)
        inputs = {name: reached[name] for name in self.end.inputs}
        whole = self.end.result(inputs)
        bound = _TOLERANCES[kind] * float(whole.abs().max())
        height, width = self.frame
        for row in (0, int(0.4 * height), height - 1):
            for column in (0, int(0.4 * width), width - 1):
                wanted = torch.zeros(1, height, width, dtype=torch.bool)
                wanted[0, row, column] = True
                (window,) = self.windows(wanted)
                part = self.end.result(self.crop(inputs, 0, window))
                apart = (part - self._crop(whole, 0, window)).abs()
                if not bool((self._inside(apart, window) <= bound).all()):
                    return False
        return True

    def _inside(self, values: Tensor, window: Window) -> Tensor:
        """Return a window without the edges that may be wrong."""
        for axis, first, size in ((2, window.top, window.height), (3, window.left, window.width)):
            start = self.margin if first else 0
            end = self.margin if first + size < self.frame[axis - 2] else 0
            values = values.narrow(axis, start, size - start - end)
        return values


def _with_dependencies(nodes: set[Node]) -> set[Node]:
    """Return operations together with all operations that they depend on."""
    found, waiting = set(nodes), list(nodes)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source.op == "call_function" and source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _step(node: Node, frame: Frame) -> int | None:
    """Return the number of output pixels per pixel of a map; None if it is not an integer."""
    height, width = sides_of(node)
    step = frame[0] // height
    return step if (height * step, width * step) == frame else None


def _margins(network: fx.GraphModule, late: set[Node], frame: Frame) -> dict[Node, int | None]:
    """Return the number of wrong pixels at a window's edge in each map of the late operations.

    The inputs of the late operations are right everywhere. None marks an operation that does not
    commute with cropping.
    """
    margins: dict[Node, int | None] = {}
    constants = {node for node in network.graph.nodes if node.op == "get_attr"}
    constants |= {node for node in network.graph.nodes if "channelwise" in node.meta}
    for node in network.graph.nodes:
        if node.op == "call_function" and constants.issuperset(node.all_input_nodes):
            constants.add(node)  # Such as a kernel that a mask was multiplied into.
        if node not in late:
            continue
        for source in node.all_input_nodes:
            margins.setdefault(source, 0)
        if node in constants and sides_of(node) is None:
            margins[node] = 0
        else:
            margins[node] = _margin(node, margins, frame)
    return margins


def _margin(node: Node, margins: Mapping[Node, int | None], frame: Frame) -> int | None:
    maps = [one for one in node.all_input_nodes if sides_of(one) is not None]
    if not maps or any(sides_of(one) is None or not _step(one, frame) for one in (node, *maps)):
        return None
    rule = _RULES.get(node.target, _pointwise if is_pointwise(node) else None)
    return rule and rule(node, max(margins[one] or 0 for one in maps))


# Each rule takes an operation and the number of wrong pixels at the edges of its inputs. It returns
# the number for its output, or None if the operation does not commute with cropping.


def _pointwise(node: Node, margin: int) -> int | None:
    """Activations, sums and products of maps of the same size, or with one value for all pixels."""
    for one in node.all_input_nodes:
        shape = tuple(one.meta["val"].shape) if hasattr(one.meta.get("val"), "shape") else ()
        alike = sides_of(one) == sides_of(node) and one.op != "get_attr"
        if not alike and any(size != 1 for size in (shape[2:] if len(shape) == 4 else shape)):
            return None
    return margin


def _batch_norm(node: Node, margin: int) -> int | None:
    given = arguments_of(node)
    return margin if not given["training"] and given["running_mean"] is not None else None


def _concatenate(node: Node, margin: int) -> int | None:
    return margin if arguments_of(node)["dim"] == 1 else None


def _strided(size: int, stride: int, padding: int, dilation: int, margin: int) -> int | None:
    """Return the number of wrong outputs at an edge of a convolution or pooling along one axis.

    Output o reads inputs o stride - padding to o stride - padding + span.
    """
    span = dilation * (size - 1)
    if not span + 1 - stride <= 2 * padding <= span:
        return None  # The output is not 1 / stride times the input's size.
    first = -(-(margin + padding) // stride)
    last = (margin + span - padding) // stride
    return max(first, last)


def _transposed(
    size: int, stride: int, padding: int, dilation: int, more: int, margin: int
) -> int | None:
    """Return the number of wrong outputs at an edge of a transposed convolution along one axis.

    Input i adds to outputs i stride - padding to i stride - padding + span.
    """
    span = dilation * (size - 1)
    if 2 * padding != span + 1 + more - stride:
        return None  # The output is not stride times the input's size.
    first = (margin - 1) * stride - padding + span + 1
    last = margin * stride + padding
    return max(first, last, 0)


def _largest(margins: list[int | None]) -> int | None:
    return None if None in margins else max(margins)


def _convolution(node: Node, margin: int) -> int | None:
    conv = Convolution.of(node)
    if sides_of(conv.input) is None or sides_of(conv.weight) is not None:
        return None
    sizes, given = conv.kernel_shape[2:], conv.settings
    names = ("stride", "padding", "dilation", *(("output_padding",) if conv.transposed else ()))
    axes = zip(sizes, *(pair(given[name]) for name in names), strict=True)
    rule = _transposed if conv.transposed else _strided
    return _largest([rule(*axis, margin) for axis in axes])


def _pooling(node: Node, margin: int) -> int | None:
    given = arguments_of(node)
    if given["ceil_mode"]:
        return None
    stride = given["stride"] or given["kernel_size"]
    settings = (given["kernel_size"], stride, given["padding"], given.get("dilation", 1))
    return _largest([_strided(*axis, margin) for axis in zip(*map(pair, settings), strict=True)])


def _upsampling(node: Node, margin: int) -> int | None:
    """Nearest or bilinear upsampling by an integer factor."""
    given = arguments_of(node)
    if given.get("align_corners") or not given["scale_factors"]:
        return None
    down, across = given["scale_factors"]
    if down != across or down != int(down):
        return None
    between = 0 if node.target is aten.upsample_nearest2d.vec else int(down) // 2
    return margin * int(down) + between


_RULES: dict[Any, Callable[[Node, int], int | None]] = {
    aten.conv2d.default: _convolution,
    aten.conv_transpose2d.input: _convolution,
    winograd.convolve: lambda _, margin: margin + 1,
    aten.max_pool2d.default: _pooling,
    aten.avg_pool2d.default: _pooling,
    aten.upsample_nearest2d.vec: _upsampling,
    aten.upsample_bilinear2d.vec: _upsampling,
    aten.batch_norm.default: _batch_norm,
    aten.prelu.default: lambda _, margin: margin,
    CONCATENATE: _concatenate,
}

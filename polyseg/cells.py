"""The end of a network at chosen pixels only, which stand in a row instead of on a map.

Behind its last transposed convolution of stride s a network often looks at each pixel alone. Then
only those cells of s x s pixels need be made that hold a pixel of interest, each from the few
pixels of the smaller map that it hangs on.
"""
# torch.fx types what a node is called with as all that it could be.
# mypy: disable-error-code="union-attr, arg-type, assignment, index, misc"

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from polyseg import graph, rewrites
from polyseg.graph import Part
from polyseg.nodes import (
    Convolution,
    add_constant,
    aten,
    calls_to,
    pair,
    sides_of,
    tensor_of,
)

_ELEMENTWISE = (*rewrites.IN_PLACE, *rewrites.IN_PLACE.values(), aten.prelu.default)


@dataclass(frozen=True)
class Patch:
    """What a cell of s x s pixels hangs on: pixels of the smaller map, from an offset on."""

    stride: int
    first: tuple[int, int]
    """Row and column, relative to the pixel that the cell stands above."""
    size: tuple[int, int]

    @classmethod
    def of(cls, network: fx.GraphModule, conv: Convolution) -> "Patch | None":
        """Return what a transposed convolution makes cells from, None if it makes none."""
        given = conv.settings
        down, across = pair(given["stride"])
        known = conv.transposed and conv.has_constant_weight(network) and given["groups"] == 1
        if not known or down != across or down == 1 or pair(given["dilation"]) != (1, 1):
            return None
        sides = tuple(tensor_of(network, conv.weight).shape[2:])
        first, last = zip(
            *(
                # Output o hangs on input i by the kernel's element o + padding - i stride.
                (-((side - 1 - padding) // down), (down - 1 + padding) // down)
                for side, padding in zip(sides, pair(given["padding"]), strict=True)
            ),
            strict=True,
        )
        if max(first) > 0:
            return None
        return cls(down, first, (last[0] - first[0] + 1, last[1] - first[1] + 1))

    def kernel(self, network: fx.GraphModule, conv: Convolution) -> Tensor:
        """Return the transposed convolution as a matrix from patches to cells, (s s K, n C)."""
        weight = tensor_of(network, conv.weight)
        channels, stride = len(weight), self.stride
        rows, columns = self.size
        # Each column is what a single one makes of it.
        ones = torch.eye(rows * columns * channels).to(weight)
        ones = ones.view(-1, rows, columns, channels).permute(0, 3, 1, 2)
        made = nn.functional.conv_transpose2d(
            nn.functional.pad(ones, (0, 1, 0, 1)),
            weight,
            stride=stride,
            padding=conv.settings["padding"],
        )
        top, left = -self.first[0] * stride, -self.first[1] * stride
        cell = made[:, :, top : top + stride, left : left + stride]
        return cell.permute(2, 3, 1, 0).reshape(-1, len(ones))


@dataclass(frozen=True)
class CellEnd:
    """The end of a network, which may be run on cells of an image."""

    head: Part
    """What comes before."""
    end: Part
    """Of pixels in a row, cell by cell."""
    source: str
    """The input that it takes patches of; of other maps it takes pixels."""
    patch: Patch
    cost: float
    """Of the end for an image, if it were run on all of it."""

    @classmethod
    def of(cls, whole: Part, frame: tuple[int, int]) -> "CellEnd | None":
        """Return the end behind the last transposed convolution, if it looks at pixels alone."""
        network = whole.function
        ups = calls_to(network, (aten.conv_transpose2d.input,))
        conv = Convolution.of(ups[-1]) if ups else None
        patch = conv and Patch.of(network, conv)
        if not patch or sides_of(conv.node) != frame:
            return None
        if tuple(side * patch.stride for side in sides_of(conv.input)) != frame:
            return None
        behind = _behind(network, conv.node)
        if not all(_is_pointwise(node, frame) for node in behind - {conv.node}):
            return None
        late = behind | _weights_of(network, behind)
        calls = {node for node in network.graph.nodes if node.op == "call_function"}
        head, end = graph.cut(network, calls - late)
        cost = end.cost
        _take_patches(end.function, patch)
        return cls(head, end, conv.input.name, patch, cost)

    def grid(self, wanted: Tensor) -> Tensor:
        """Return which cells hold pixels that are wanted, (B, rows, columns) of (B, H, W)."""
        return nn.functional.max_pool2d(wanted[:, None].float(), self.patch.stride)[:, 0] > 0


class Cells:
    """Those cells of an image, or of a window of one, that are made."""

    def __init__(self, end: CellEnd, wanted: Tensor) -> None:
        """Number the cells with pixels that are wanted, of (H, W); there is one at least."""
        grid = end.grid(wanted[None])[0]
        self.end, self.patch = end, end.patch
        self.number = (grid.flatten().cumsum(0, dtype=torch.int32) - 1).view_as(grid)
        row, column = grid.nonzero(as_tuple=True)
        side, (top, left) = self.patch.stride, self.patch.first
        self.pixels, _ = _window(row * side, column * side, (side, side), wanted.shape)
        self.sources, self.outside = _window(row + top, column + left, self.patch.size, grid.shape)

    def crop(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the end takes of these values, maps as (1, C, 1, n)."""
        return {
            name: self._crop(name, values[name]) for name in self.end.end.inputs if name in values
        }

    def _crop(self, name: str, values: Tensor) -> Tensor:
        if name != self.end.source and values.shape[-1] == 1:
            return values
        rows = values[0].permute(1, 2, 0).flatten(0, 1)
        if name != self.end.source:
            return _in_a_row(rows.index_select(0, self.pixels))
        patches = rows.index_select(0, self.sources).index_fill_(0, self.outside, 0)
        return _in_a_row(patches.view(len(self.pixels) // self.patch.stride**2, -1))

    def locate(self, row: Tensor, column: Tensor) -> Tensor:
        """Return where pixels stand in the row of all."""
        side = self.patch.stride
        cell = self.number[row // side, column // side]
        return (cell * side + row % side) * side + column % side


def _window(
    top: Tensor, left: Tensor, size: tuple[int, int], frame: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return the numbers of pixels of windows, and which of these lie outside the frame."""
    rows = top[:, None, None] + torch.arange(size[0], device=top.device)[:, None]
    columns = left[:, None, None] + torch.arange(size[1], device=top.device)
    outside = (rows < 0) | (rows >= frame[0]) | (columns < 0) | (columns >= frame[1])
    number = rows.clamp(0, frame[0] - 1) * frame[1] + columns.clamp(0, frame[1] - 1)
    return number.flatten(), outside.flatten().nonzero().flatten()


def _in_a_row(rows: Tensor) -> Tensor:
    """Return (n, C) as a map of one row, (1, C, 1, n), channels last in memory."""
    return rows[None, None].permute(0, 3, 1, 2)


def _pixels_of_cells(cells: Tensor, pixels: int) -> Tensor:
    """Return (1, p K, 1, n) as (1, K, 1, n p)."""
    return _in_a_row(cells.permute(0, 2, 3, 1).reshape(-1, cells.shape[1] // pixels))


def _take_patches(network: fx.GraphModule, patch: Patch) -> None:
    """Let an end take patches in place of the map that its transposed convolution takes."""
    (node,) = calls_to(network, (aten.conv_transpose2d.input,))
    conv, pixels = Convolution.of(node), patch.stride**2
    bias = tensor_of(network, conv.bias)
    if bias is not None:
        bias = add_constant(network, node, bias.repeat(pixels))
    kernel = patch.kernel(network, conv)[:, :, None, None]
    weight = add_constant(network, node, kernel.contiguous(memory_format=torch.channels_last))
    with network.graph.inserting_before(node):
        cells = network.graph.call_function(aten.conv2d.default, (conv.input, weight, bias))
        row = network.graph.call_function(_pixels_of_cells, (cells, pixels))
    node.replace_all_uses_with(row)
    network.graph.eliminate_dead_code()
    network.recompile()


def _behind(network: fx.GraphModule, first: Node) -> set[Node]:
    """Return an operation and all that hang on it."""
    found = {first}
    for node in network.graph.nodes:
        if node.op == "call_function" and found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def _weights_of(network: fx.GraphModule, late: set[Node]) -> set[Node]:
    """Return what is computed for these operations alone and is no map: masked weights."""
    found: set[Node] = set()
    for node in reversed(network.graph.nodes):
        is_weight = node.op == "call_function" and "val" not in node.meta
        if is_weight and (late | found).issuperset(node.users):
            found.add(node)
    return found


def _is_pointwise(node: Node, frame: tuple[int, int]) -> bool:
    """Whether an operation that makes a map of the frame's size looks at each pixel alone."""
    if sides_of(node) != frame:
        return False
    conv = Convolution.of(node)
    if conv:
        still = pair(conv.settings["stride"]) == (1, 1) and not conv.transposed
        unpadded = pair(conv.settings["padding"]) == (0, 0)
        return still and unpadded and conv.kernel_shape[2:] == (1, 1)
    shapes = [one.meta["val"].shape for one in node.all_input_nodes if "val" in one.meta]
    # What has no channels, or a value for each place of its own, does not fit in a row.
    fits = node.target is aten.prelu.default or all(len(shape) in (0, 4) for shape in shapes)
    placed = [one for one in node.all_input_nodes if one.op == "get_attr" and "val" in one.meta]
    return (
        node.target in _ELEMENTWISE
        and fits
        and not any(max(one.meta["val"].shape[2:], default=1) > 1 for one in placed)
    )

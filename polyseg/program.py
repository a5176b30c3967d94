"""The passes of MC Dropout as a program: what they have in common is computed once an image.

The network's graph is cut in two: the prefix, which hangs on no mask, and the suffix, which is run
once a pass. Where the pixels that count are known before, the last convolution is summed up at
these alone, and the suffix's last levels are run on a window around them, or its last one on cells
that hold them.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from polyseg import graph, rewrites
from polyseg.cells import CellEnd, Cells
from polyseg.graph import MaskInput, Part
from polyseg.rewrites import Taps

_WORTHWHILE = 0.85
"""Share of the cost of a pass below which a longer tail pays for running image by image."""

Masks = Mapping[str, Tensor]
"""By name of the inputs."""


@dataclass(frozen=True)
class Points:
    """Pixels of a batch, image after image."""

    image: Tensor
    """(n,) which image of the batch."""
    label: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def of(cls, chosen: Tensor) -> "Points":
        """Return the pixels where (B, K, H, W) is true."""
        # Half as wide as numbers of pixels commonly are, for they are read in each pass.
        return cls(*(where.int() for where in chosen.nonzero(as_tuple=True)))

    def moved(self, rows: int, columns: int) -> "Points":
        """Return the pixels in a frame that begins so much before."""
        return Points(self.image, self.label, self.row + rows, self.column + columns)


class Program:
    """A network taken apart into prefix and suffix, with its weights as they are now."""

    def __init__(
        self,
        core: nn.Module,
        layers: Mapping[str, nn.Module],
        images: Tensor,
        *,
        shared: bool,
        kind: torch.dtype = torch.float32,
    ) -> None:
        """Take a network apart.

        Args:
            core: maps (B, C, H, W) to (B, K, H, W); in evaluation mode.
            layers: its active dropout layers by name.
            images: an example.
            shared: whether the images of a batch have one mask a pass.
            kind: of numbers that the passes compute with; what they have in common is float32.

        Raises:
            UntraceableError: the network cannot be taken apart.
        """
        network = graph.trace(core, images[:1].repeat(2, 1, 1, 1))
        self.masks: list[MaskInput] = graph.insert_masks(network, core, layers)
        rewrites.fold_batch_norms(network)
        rewrites.move_masks_behind_activations(network)
        rewrites.fold_identities(network)
        rewrites.merge_pointwise(network)
        rewrites.split_concatenations(network)
        if images.device.type == "cpu" and kind == torch.float32:
            rewrites.use_winograd(network)
        opened = copy.deepcopy(network)
        self.taps: Taps = rewrites.open_last_convolution(opened)
        self.labels = graph.output_channels(network)
        self.channels = graph.output_channels(opened)
        self.input = graph.input_names(network)[0]
        self.prefix, self.suffix = _prefix_and_suffix(network, shared, kind)
        _, self.opened = _prefix_and_suffix(opened, shared, kind)
        # With batch norm folded, this layout spares convolutions their copies; layers that
        # normalise over space are slower in it.
        over_space = graph.normalises_over_space(network)
        self.layout = torch.contiguous_format if over_space else torch.channels_last
        self.kind = kind
        self.prefix.lay_out(self.layout, torch.float32)
        for part in (self.suffix, self.opened):
            part.lay_out(self.layout, kind)
        self.of_images = self.suffix.of_images() | self.opened.of_images()
        """Names of inputs that have a row for each image."""
        self.frame = (int(images.shape[2]), int(images.shape[3]))
        self.tails = self._find_tails(self.begin(images[:1]))

    @property
    def bytes_a_pixel(self) -> float:
        """Bytes of the largest feature map that a whole batch has, for a pixel of the images."""
        whole = self.tails[-1].head if self.tails else self.opened
        return 4 * whole.most_values() / (self.frame[0] * self.frame[1])

    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Return what all passes over (B, C, H, W) images have in common, by name."""
        features = {self.input: images.contiguous(memory_format=self.layout)}
        self.prefix.run(features)
        wanted = {self.input, *self.suffix.inputs}
        return {name: self._cast(one) for name, one in features.items() if name in wanted}

    def _cast(self, values: Tensor) -> Tensor:
        return values.to(self.kind) if values.is_floating_point() else values

    def inputs(
        self, features: Mapping[str, Tensor], masks: Masks, count: int = 1
    ) -> dict[str, Tensor]:
        """Return what passes begin with: what all have in common, so many times, and masks."""
        if count > 1:
            features = {
                name: torch.cat([one] * count) if name in self.of_images else one
                for name, one in features.items()
            }
        return {**features, **{name: mask.to(self.kind) for name, mask in masks.items()}}

    def logits(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of passes that begin with these values, (passes B, K, H, W)."""
        return _result(self.suffix, values)

    def all_kept(self, like: Tensor) -> Masks:
        """Return the masks that drop nothing."""
        return {one.node: like.new_ones(1, one.channels, 1, 1) for one in self.masks}

    def _find_tails(self, features: dict[str, Tensor]) -> list["Tail"]:
        """Return the ends of the suffix that can be run on a window, the longest first."""
        values = self.inputs(features, self.all_kept(features[self.input]))
        tails = []
        for width in self.opened.widths()[:-1]:
            narrow = self.opened.narrow(width)
            if not narrow:
                continue
            head, end = graph.cut(self.opened.function, narrow)
            for part in (head, end):
                rewrites.work_in_place(part, self.kind)
                part.lay_out(self.layout, self.kind)
            reached = dict(values)
            head.run(reached)
            tail = Tail.of(head, end, reached, self.frame)
            if tail is not None:
                tails.append(tail)
        return tails


@dataclass(frozen=True)
class Tail:
    """The last levels of a suffix, which may be run image by image, and on windows.

    On windows where every output hangs on a neighbourhood only: nothing that normalises over space.
    """

    head: Part
    end: Part
    frame: tuple[int, int]
    """Height and width of the output."""
    cell: int
    """Output pixels a side that one pixel of the coarsest input stands for."""
    halo: int | None
    """Output pixels that the neighbourhood reaches beyond a cell; None where it has no bound."""

    cells: CellEnd | None
    """What of it may be run on cells."""

    @classmethod
    def of(
        cls, head: Part, end: Part, values: dict[str, Tensor], frame: tuple[int, int]
    ) -> "Tail | None":
        """Return the tail, if its inputs are in step; NaN in a cell tells its halo."""
        sides = {values[name].shape[-2:] for name in end.inputs if _is_map(values[name])}
        cells = {size // side for each in sides for size, side in zip(frame, each, strict=True)}
        cell = max(cells, default=0)
        fits = all(
            (rows * (frame[0] // rows), columns * (frame[1] // columns)) == frame
            and frame[0] // rows == frame[1] // columns
            for rows, columns in sides
        )
        if not cell or not fits or any(cell % one for one in cells):
            return None
        corner = tuple(size // cell // 2 * cell for size in frame)
        planted = dict(values)
        for name in end.inputs:
            if _is_map(values[name]):
                planted[name] = values[name].clone()
                step = frame[0] // values[name].shape[2]
                rows, columns = (slice(one // step, (one + cell) // step) for one in corner)
                planted[name][..., rows, columns] = torch.nan
        reached = _result(end, planted).isnan().flatten(0, 1).any(dim=0)
        in_cells, halo = CellEnd.of(end, frame), 0
        for axis in (0, 1):
            touched = reached.any(dim=1 - axis).nonzero().flatten()
            if len(touched) == 0 or touched[0] == 0 or touched[-1] == frame[axis] - 1:
                return cls(head, end, frame, cell, None, in_cells)
            first, last = int(touched[0]), int(touched[-1])
            halo = max(halo, corner[axis] - first, last + 1 - corner[axis] - cell)
        return cls(head, end, frame, cell, halo, in_cells)

    def windows(self, wanted: Tensor) -> list["Window"]:
        """Return for each image the least window that holds what pixels, (B, H, W), hang on."""
        if self.halo is None:
            return [Window(0, 0, *self.frame)] * len(wanted)
        edges = []
        for axis, size in zip((2, 1), self.frame, strict=True):
            touched = wanted.any(dim=axis).byte()
            least, most = touched.argmax(dim=1), size - 1 - touched.flip(1).argmax(dim=1)
            first = (least - self.halo).clamp(min=0) // self.cell * self.cell
            last = (most + self.halo).clamp(max=size - 1) // self.cell * self.cell + self.cell
            edges += [first, last]
        return [
            Window(top, left, bottom - top, right - left)
            for top, bottom, left, right in zip(*(edge.tolist() for edge in edges), strict=True)
        ]

    def share(self, wanted: Tensor) -> float:
        """Return the cost of a pass for these pixels as a share of one without."""
        windows = self.windows(wanted)
        area = sum(one.height * one.width for one in windows) / len(windows)
        area /= self.frame[0] * self.frame[1]
        head, end, last = self.head.cost, self.end.cost, 0.0
        cost = head + end * area
        if self.cells is not None:
            last = self.cells.cost
            cost += last * (float(self.cells.grid(wanted).float().mean()) - area)
        return cost / (head + end)


class Window(NamedTuple):
    """Where the last levels are run for an image."""

    top: int
    left: int
    height: int
    width: int


class Place:
    """The part of an image that a tail is run on: a window, and cells of it."""

    def __init__(
        self, tail: Tail, image: int, window: Window, wanted: Tensor, features: Mapping[str, Tensor]
    ) -> None:
        """Take what all passes have in common.

        Args:
            tail: to be run.
            image: which of the batch.
            window: of the image.
            wanted: (H, W), the pixels of the image; there is one at least.
            features: of the batch.
        """
        self.tail, self.image, self.window = tail, image, window
        still = self._crop({name: features[name] for name in tail.end.inputs if name in features})
        self.moving = [name for name in tail.end.inputs if name not in still]
        self.first, self.cells = tail.end, None
        self.still_cells: dict[str, Tensor] = {}
        if tail.cells is not None:
            rows = slice(window.top, window.top + window.height)
            columns = slice(window.left, window.left + window.width)
            self.first, self.cells = tail.cells.head, Cells(tail.cells, wanted[rows, columns])
            self.still_cells = self.cells.crop(still)
        self.still = {name: still[name] for name in self.first.inputs if name in still}

    def run(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the tail's output for what enters it of the batch."""
        inputs = self.still | self._crop({name: values[name] for name in self.moving})
        if self.cells is None:
            return _result(self.tail.end, inputs)
        self.first.run(inputs)
        return _result(self.cells.end.end, self.cells.crop(inputs) | self.still_cells)

    def _crop(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs of the tail for the image, maps cut down to the window."""
        return {name: self._cut(one) for name, one in values.items()}

    def _cut(self, values: Tensor) -> Tensor:
        if values.dim() != 4:
            return values
        image = self.image % len(values)
        part = values[image : image + 1]
        if not _is_map(values):
            return part
        step = self.tail.frame[0] // values.shape[2]
        top, left, height, width = (size // step for size in self.window)
        channels_last = values.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return part[..., top : top + height, left : left + width].contiguous(memory_format=layout)

    def locate(self, row: Tensor, column: Tensor) -> Tensor:
        """Return where pixels of the image stand in the output, row by row or cell by cell."""
        row, column = row - self.window.top, column - self.window.left
        if self.cells is not None:
            return self.cells.locate(row, column)
        return row * self.window.width + column


class Look:
    """A batch of images as the passes look at them, at chosen pixels or at all.

    For chosen pixels the last levels are run image by image, each on its window: what they make is
    large, and stays near a processor's caches so.
    """

    def __init__(
        self, program: Program, images: Tensor, points: Points | None, *, crop: bool = True
    ) -> None:
        """Prepare the passes over (B, C, H, W) images.

        Args:
            program: of the network.
            images: padded as the core wants them.
            points: in these; None for all pixels.
            crop: whether the last levels may be run on windows.
        """
        self.program, self.points = program, points
        self.features = program.begin(images)
        self.tail: Tail | None = None
        self.tail_number: int | None = None
        self.share = 1.0
        """Cost of a pass as a share of one over all pixels."""
        self.places: list[Place] = []
        if points is not None:
            self._find_taps(points, crop=crop and images.shape[2:] == program.frame)

    @property
    def cropped(self) -> bool:
        """Whether less than the images is run."""
        return self.share < 1

    def __call__(self, masks: Masks, count: int = 1) -> Tensor:
        """Return the logits of passes: (passes n,) at the points, or (passes B, K, H, W).

        Args:
            masks: of one pass, or of several as those of images, pass after pass.
            count: of the passes; several only where nothing is cropped.
        """
        values = self.program.inputs(self.features, masks, count)
        if self.points is None:
            return self.program.logits(values)
        each = [self._add_taps(image, one) for image, one in self._opened(values, count)]
        logits, bias = torch.cat(each, dim=1), self.program.taps.bias
        return (logits if bias is None else logits + bias[self.points.label]).flatten()

    def _add_taps(self, image: int, opened: Tensor) -> Tensor:
        """Return the sums of the taps of an image's points, (passes, n)."""
        index = self.index[image]
        found = opened.permute(0, 2, 3, 1).flatten(1).index_select(1, index.flatten())
        return found.float().view(len(found), *index.shape).sum(dim=2)

    def everywhere(self, masks: Masks) -> Tensor:
        """Return the logits of a pass at all pixels, (B, K, H, W)."""
        return self.program.logits(self.program.inputs(self.features, masks))

    def _opened(self, values: dict[str, Tensor], count: int) -> Iterator[tuple[int, Tensor]]:
        """Yield each image with its taps, (passes, T K, H, W) of its place."""
        if self.tail is None:
            opened = _result(self.program.opened, values)
            yield from enumerate(opened.view(count, -1, *opened.shape[1:]).unbind(1))
            return
        self.tail.head.run(values)
        for image, place in enumerate(self.places):
            yield image, place.run(values)

    def _find_taps(self, points: Points, *, crop: bool) -> None:
        """Settle where each of the taps of each point lies in what `_opened` yields, (n, T)."""
        taps, channels = self.program.taps, self.program.channels
        count, _, height, width = self.features[self.program.input].shape
        offsets = points.row.new_tensor([taps.rows, taps.columns])
        rows, columns = points.row[:, None] + offsets[0], points.column[:, None] + offsets[1]
        outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        sizes = points.image.bincount(minlength=count).tolist()
        if crop:
            wanted = torch.zeros(count, height, width, dtype=torch.bool, device=rows.device)
            wanted[points.image[:, None], rows, columns] = True
            self._choose_tail(wanted)
        pixel = rows * width + columns
        if self.places:
            each = zip(
                self.places, torch.split(rows, sizes), torch.split(columns, sizes), strict=True
            )
            pixel = torch.cat([place.locate(row, column) for place, row, column in each])
        tap = torch.arange(len(taps.rows), device=rows.device, dtype=torch.int32)
        channel = tap * self.program.labels + points.label[:, None]
        # The last channel of several taps is 0, as what lies outside.
        index = pixel * channels + channel.masked_fill(outside, channels - 1)
        self.index = torch.split(index, sizes)

    def _choose_tail(self, wanted: Tensor) -> None:
        """Choose the cheapest way to the pixels; without much of a gain, the shortest tail."""
        # What is empty cannot be convolved.
        wanted[:, 0, 0] |= ~wanted.flatten(1).any(dim=1)
        tails = self.program.tails
        if not tails:
            return
        shares = [tail.share(wanted) for tail in tails]
        self.share = min(shares)
        if self.share >= _WORTHWHILE * shares[-1]:
            self.share = shares[-1]
        self.tail_number = shares.index(self.share)
        self.tail = tails[self.tail_number]
        self.places = [
            Place(self.tail, image, window, wanted[image], self.features)
            for image, window in enumerate(self.tail.windows(wanted))
        ]


def _prefix_and_suffix(
    network: fx.GraphModule, shared: bool, kind: torch.dtype
) -> tuple[Part, Part]:
    if shared:
        rewrites.absorb_masks(network)
    stochastic = graph.stochastic_nodes(network)
    still = {node for node in network.graph.nodes if node not in stochastic}
    prefix, suffix = graph.cut(network, still)
    rewrites.work_in_place(prefix)
    rewrites.work_in_place(suffix, kind)
    return prefix, suffix


def _result(part: Part, values: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = part.function(*(values[name] for name in part.inputs))[0]
    return result


def _is_map(values: Tensor) -> bool:
    return values.dim() == 4 and values.shape[-1] > 1

"""The passes of MC Dropout as a program: what they have in common is computed once an image.

The network's graph is cut in two: the prefix, which hangs on no mask, and the suffix, which is run
once a pass. Where the pixels that count are known before, the last convolution is summed up at
these alone, and the suffix's last levels are run on a window around them.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from polyseg import graph, rewrites
from polyseg.graph import MaskInput, Part
from polyseg.rewrites import Taps

_WORTHWHILE = 0.85
"""Share of the cost of a pass below which a window pays for being cut out."""

Masks = Mapping[str, Tensor]
"""By name of the inputs."""


@dataclass(frozen=True)
class Points:
    """Pixels of a batch."""

    image: Tensor
    """(n,) which image of the batch."""
    label: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def of(cls, chosen: Tensor) -> "Points":
        """Return the pixels where (B, K, H, W) is true."""
        image, label, row, column = chosen.nonzero(as_tuple=True)
        return cls(image, label, row, column)

    def moved(self, rows: int, columns: int) -> "Points":
        """Return the pixels in a frame that begins so much before."""
        return Points(self.image, self.label, self.row + rows, self.column + columns)


class Program:
    """A network taken apart into prefix and suffix, with its weights as they are now."""

    def __init__(
        self, core: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, *, shared: bool
    ) -> None:
        """Take a network apart.

        Args:
            core: maps (B, C, H, W) to (B, K, H, W); in evaluation mode.
            layers: its active dropout layers by name.
            images: an example.
            shared: whether the images of a batch have one mask a pass.

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
        opened = copy.deepcopy(network)
        self.taps: Taps = rewrites.open_last_convolution(opened)
        self.labels = graph.output_channels(network)
        self.input = graph.input_names(network)[0]
        self.prefix, self.suffix = _prefix_and_suffix(network, shared)
        _, self.opened = _prefix_and_suffix(opened, shared)
        # With batch norm folded, this layout spares convolutions their copies; layers that
        # normalise over space are slower in it.
        over_space = graph.normalises_over_space(network)
        self.layout = torch.contiguous_format if over_space else torch.channels_last
        for part in (self.prefix, self.suffix, self.opened):
            part.lay_out(self.layout)
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
        return {name: values for name, values in features.items() if name in wanted}

    def logits(self, features: Mapping[str, Tensor], masks: Masks) -> Tensor:
        """Return the logits of a pass, (B, K, H, W)."""
        return _result(self.suffix, {**features, **masks})

    def all_kept(self, like: Tensor) -> Masks:
        """Return the masks that drop nothing."""
        return {one.node: like.new_ones(1, one.channels, 1, 1) for one in self.masks}

    def _find_tails(self, features: dict[str, Tensor]) -> list["Tail"]:
        """Return the ends of the suffix that can be run on a window, the longest first."""
        masks = self.all_kept(features[self.input])
        tails = []
        for width in self.opened.widths()[:-1]:
            narrow = self.opened.narrow(width)
            if not narrow:
                continue
            head, end = graph.cut(self.opened.function, narrow)
            rewrites.work_in_place(head)
            rewrites.work_in_place(end)
            for part in (head, end):
                part.lay_out(self.layout)
            values = {**features, **masks}
            head.run(values)
            tail = Tail.of(head, end, values, self.frame)
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
        halo = 0
        for axis in (0, 1):
            touched = reached.any(dim=1 - axis).nonzero().flatten()
            if len(touched) == 0 or touched[0] == 0 or touched[-1] == frame[axis] - 1:
                return cls(head, end, frame, cell, None)
            first, last = int(touched[0]), int(touched[-1])
            halo = max(halo, corner[axis] - first, last + 1 - corner[axis] - cell)
        return cls(head, end, frame, cell, halo)

    def windows(self, points: Points, images: int, reach: int) -> list["Window"]:
        """Return for each image the least window that holds what its points hang on."""
        if self.halo is None:
            return [Window(0, 0, *self.frame)] * images
        margin = self.halo + reach
        edges = []
        for where, size in zip((points.row, points.column), self.frame, strict=True):
            least = where.new_full((images,), size).scatter_reduce_(0, points.image, where, "amin")
            most = where.new_zeros(images).scatter_reduce_(0, points.image, where, "amax")
            first = (least - margin).clamp(0, size - 1) // self.cell * self.cell
            last = (most + margin).clamp(max=size - 1) // self.cell * self.cell + self.cell
            edges += [first, last.maximum(first + self.cell)]
        return [
            Window(top, left, bottom - top, right - left)
            for top, bottom, left, right in zip(*(edge.tolist() for edge in edges), strict=True)
        ]

    def share(self, windows: Sequence["Window"]) -> float:
        """Return the cost of a pass with these windows as a share of one without."""
        area = sum(one.height * one.width for one in windows) / len(windows)
        head, end = self.head.cost, self.end.cost
        return (head + end * area / (self.frame[0] * self.frame[1])) / (head + end)

    def crop(self, values: Tensor, image: int, window: "Window") -> Tensor:
        """Return an input of the tail for one image, cut down to its window."""
        if not _is_map(values):
            return values[image : image + 1] if values.dim() == 4 and len(values) > 1 else values
        image = image % len(values)
        step = self.frame[0] // values.shape[2]
        top, left = window.top // step, window.left // step
        rows, columns = window.height // step, window.width // step
        part = values[image : image + 1, :, top : top + rows, left : left + columns]
        channels_last = values.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return part.contiguous(memory_format=layout)


class Window(NamedTuple):
    """Where the last levels are run for an image."""

    top: int
    left: int
    height: int
    width: int


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
        self.windows = [Window(0, 0, *images.shape[2:])] * len(images)
        self.still: list[dict[str, Tensor]] = []
        if points is not None:
            if crop and images.shape[2:] == program.frame:
                self._choose_tail(points, len(images))
            self._find_taps(points)

    @property
    def cropped(self) -> bool:
        """Whether some windows are less than the image."""
        return self.tail is not None and self.tail.share(self.windows) < 1

    def __call__(self, masks: Masks) -> Tensor:
        """Return the logits of a pass: (n,) at the points, or (B, K, H, W)."""
        if self.points is None:
            return self.program.logits(self.features, masks)
        flat = self._opened({**self.features, **masks})
        logits: Tensor = flat.index_select(0, self.index.flatten()).view_as(self.index)
        if self.outside is not None:
            logits = logits.masked_fill(self.outside, 0)
        bias = self.program.taps.bias
        return logits.sum(dim=0) + (0 if bias is None else bias[self.points.label])

    def everywhere(self, masks: Masks) -> Tensor:
        """Return the logits of a pass at all pixels, (B, K, H, W)."""
        return self.program.logits(self.features, masks)

    def _opened(self, values: dict[str, Tensor]) -> Tensor:
        """Return the taps of all windows one after another, pixel by pixel."""
        if self.tail is None:
            return _result(self.program.opened, values).permute(0, 2, 3, 1).flatten()
        self.tail.head.run(values)
        parts = []
        for image, (window, still) in enumerate(zip(self.windows, self.still, strict=True)):
            moving = {
                name: self.tail.crop(values[name], image, window)
                for name in self.tail.end.inputs
                if name not in still
            }
            opened = _result(self.tail.end, {**still, **moving})
            parts.append(opened.permute(0, 2, 3, 1).flatten())
        return torch.cat(parts)

    def _choose_tail(self, points: Points, images: int) -> None:
        """Choose the cheapest way to the points; without a gain, the shortest tail."""
        reach = max(map(abs, (*self.program.taps.rows, *self.program.taps.columns)))
        least = _WORTHWHILE
        for tail in self.program.tails:
            windows = tail.windows(points, images, reach)
            if tail.share(windows) < least or (
                tail is self.program.tails[-1] and least == _WORTHWHILE
            ):
                least, self.tail, self.windows = tail.share(windows), tail, windows
        if self.tail is not None:
            self.still = [
                {
                    name: self.tail.crop(self.features[name], image, window)
                    for name in self.tail.end.inputs
                    if name in self.features
                }
                for image, window in enumerate(self.windows)
            ]

    def _find_taps(self, points: Points) -> None:
        """Settle where each of the taps of each point lies in what `_opened` returns."""
        taps, device = self.program.taps, points.row.device
        height, width = self.features[self.program.input].shape[-2:]
        offsets = points.row.new_tensor([taps.rows, taps.columns])
        rows, columns = (
            where + offset[:, None]
            for where, offset in zip((points.row, points.column), offsets, strict=True)
        )
        outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
        self.outside = outside if bool(outside.any()) else None
        top, left, high, wide = torch.tensor(self.windows, device=device).T
        start = (high * wide).cumsum(0) - high * wide
        image = points.image
        rows = (rows - top[image]).clamp(min=0).minimum(high[image] - 1)
        columns = (columns - left[image]).clamp(min=0).minimum(wide[image] - 1)
        pixel = start[image] + rows * wide[image] + columns
        tap = torch.arange(len(taps.rows), device=device)[:, None]
        channels = len(taps.rows) * self.program.labels
        self.index = pixel * channels + tap * self.program.labels + points.label


def _prefix_and_suffix(network: fx.GraphModule, shared: bool) -> tuple[Part, Part]:
    if shared:
        rewrites.absorb_masks(network)
    stochastic = graph.stochastic_nodes(network)
    still = {node for node in network.graph.nodes if node not in stochastic}
    prefix, suffix = graph.cut(network, still)
    rewrites.work_in_place(prefix)
    rewrites.work_in_place(suffix)
    return prefix, suffix


def _result(part: Part, values: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = part.function(*(values[name] for name in part.inputs))[0]
    return result


def _is_map(values: Tensor) -> bool:
    return values.dim() == 4 and values.shape[-1] > 1

"""The passes of MC Dropout as a program: what they have in common is computed once an image.

The network's graph is cut in two: the prefix, which hangs on no mask, and the suffix, which is run
once a pass. Where the pixels that count are known before, the last convolution is summed up at
these alone, and the suffix's last levels are run on a window around them.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from polyseg import graph
from polyseg.graph import MaskInput, Part, Taps

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
        graph.fold_batch_norms(network)
        graph.move_masks_behind_activations(network)
        graph.fold_identities(network)
        graph.merge_pointwise(network)
        graph.split_concatenations(network)
        opened = copy.deepcopy(network)
        self.taps: Taps = graph.open_last_convolution(opened)
        self.labels = graph.output_channels(network)
        self.input = graph.input_names(network)[0]
        self.prefix, self.suffix = _prefix_and_suffix(network, shared)
        _, self.opened = _prefix_and_suffix(opened, shared)
        # With batch norm folded, this layout spares convolutions their copies; layers that
        # normalise over space are slower in it.
        over_space = graph.normalises_over_space(network)
        self.layout = torch.contiguous_format if over_space else torch.channels_last
        self.frame = (int(images.shape[2]), int(images.shape[3]))
        self.tails = self._find_tails(self.begin(images[:1]))

    @property
    def bytes_a_pixel(self) -> float:
        """Bytes of the largest feature map, for a pixel of the images."""
        return 4 * self.opened.most_values() / (self.frame[0] * self.frame[1])

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
            head, end = graph.cut(self.opened.function, self.opened.narrow(width))
            graph.work_in_place(head)
            graph.work_in_place(end)
            values = {**features, **masks}
            head.run(values)
            tail = Tail.of(head, end, values, self.frame)
            if tail is not None:
                tails.append(tail)
        return tails


@dataclass(frozen=True)
class Tail:
    """The last levels of a suffix, whose every output hangs on a neighbourhood only."""

    head: Part
    end: Part
    frame: tuple[int, int]
    """Height and width of the output."""
    cell: int
    """Output pixels a side that one pixel of the coarsest input stands for."""
    halo: int
    """Output pixels that the neighbourhood reaches beyond a cell."""

    @classmethod
    def of(
        cls, head: Part, end: Part, values: dict[str, Tensor], frame: tuple[int, int]
    ) -> "Tail | None":
        """Return the tail if it is one: what is no number in one cell must not reach far."""
        sides = {values[name].shape[-2:] for name in end.inputs if _is_map(values[name])}
        cells = {size // side for each in sides for size, side in zip(frame, each, strict=True)}
        cell = max(cells, default=0)
        fits = all((rows * (frame[0] // rows), columns * (frame[1] // columns)) == frame
                   and frame[0] // rows == frame[1] // columns for rows, columns in sides)
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
                return None
            first, last = int(touched[0]), int(touched[-1])
            halo = max(halo, corner[axis] - first, last + 1 - corner[axis] - cell)
        return cls(head, end, frame, cell, halo)

    def windows(self, points: Points, images: int, reach: int) -> "Windows":
        """Return the least windows that hold what the points hang on."""
        margin = self.halo + reach
        starts, ends = [], []
        for where, size in zip((points.row, points.column), self.frame, strict=True):
            least = where.new_full((images,), size).scatter_reduce_(0, points.image, where, "amin")
            most = where.new_zeros(images).scatter_reduce_(0, points.image, where, "amax")
            starts.append((least - margin).clamp(0, size - 1) // self.cell * self.cell)
            ends.append((most + margin + self.cell).clamp(max=size + self.cell - 1)
                        // self.cell * self.cell)
        sides = [max(int((end - start).max()), self.cell) for start, end in zip(starts, ends, strict=True)]
        top, left = (
            start.clamp(max=size - side).clamp(min=0)
            for start, size, side in zip(starts, self.frame, sides, strict=True)
        )
        return Windows(top, left, (sides[0], sides[1]))

    def share(self, windows: "Windows") -> float:
        """Return the cost of a pass with these windows as a share of one without."""
        area = windows.size[0] * windows.size[1] / (self.frame[0] * self.frame[1])
        head, end = self.head.cost(), self.end.cost()
        return (head + end * area) / (head + end)

    def cropped(self, values: Mapping[str, Tensor], windows: "Windows") -> dict[str, Tensor]:
        """Return the inputs of the tail that are there, cut down to the windows."""
        return {
            name: self._crop(values[name], windows) for name in self.end.inputs if name in values
        }

    def _crop(self, values: Tensor, windows: "Windows") -> Tensor:
        if not _is_map(values):
            return values
        step = self.frame[0] // values.shape[2]
        height, width = (side // step for side in windows.size)
        parts = [
            values[i % len(values)][None, :, top : top + height, left : left + width]
            for i, (top, left) in enumerate(
                zip((windows.top // step).tolist(), (windows.left // step).tolist(), strict=True)
            )
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class Windows:
    """Where the last levels are run: for each image one window, all of one size."""

    top: Tensor
    left: Tensor
    size: tuple[int, int]


class Look:
    """A batch of images as the passes look at them, at chosen pixels or at all."""

    def __init__(
        self, program: Program, images: Tensor, points: Points | None, *, crop: bool = True
    ) -> None:
        self.program, self.points = program, points
        self.features = program.begin(images)
        self.tail: Tail | None = None
        self.windows: Windows | None = None
        self.window: dict[str, Tensor] = {}
        if points is not None:
            self._choose(points, len(images), crop and images.shape[2:] == program.frame)

    def __call__(self, masks: Masks) -> Tensor:
        """Return the logits of a pass: (n,) at the points, or (B, K, H, W)."""
        if self.points is None:
            return self.program.logits(self.features, masks)
        values = {**self.features, **masks}
        if self.tail is None or self.windows is None:
            opened = _result(self.program.opened, values)
        else:
            self.tail.head.run(values)
            fresh = {name: values[name] for name in self.tail.end.inputs if name not in self.window}
            opened = _result(
                self.tail.end, {**self.window, **self.tail.cropped(fresh, self.windows)}
            )
        flat = opened.permute(0, 2, 3, 1).reshape(-1)
        logits: Tensor = flat.index_select(0, self.index.flatten()).view_as(self.index)
        if self.outside is not None:
            logits = logits.masked_fill(self.outside, 0)
        bias = self.program.taps.bias
        return logits.sum(dim=0) + (0 if bias is None else bias[self.points.label])

    def everywhere(self, masks: Masks) -> Tensor:
        """Return the logits of a pass at all pixels, (B, K, H, W)."""
        return self.program.logits(self.features, masks)

    def _choose(self, points: Points, images: int, crop: bool) -> None:
        """Choose the cheapest way to the points, and settle where its output holds them."""
        taps = self.program.taps
        reach = max(map(abs, (*taps.rows, *taps.columns)))
        ways = [(tail.windows(points, images, reach), tail) for tail in self.program.tails if crop]
        share = 1.0
        for windows, tail in ways:
            if tail.share(windows) < min(share, _WORTHWHILE):
                share, self.windows, self.tail = tail.share(windows), windows, tail
        if self.tail is not None and self.windows is not None:
            self.window = self.tail.cropped(self.features, self.windows)
        height, width = self.features[self.program.input].shape[-2:]
        frame = (height, width) if self.windows is None else self.windows.size
        offsets = points.row.new_tensor([taps.rows, taps.columns])
        rows, columns = (
            where + offset[:, None]
            for where, offset in zip((points.row, points.column), offsets, strict=True)
        )
        outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
        self.outside = outside if bool(outside.any()) else None
        if self.windows is not None:
            rows = rows - self.windows.top[points.image]
            columns = columns - self.windows.left[points.image]
        rows, columns = rows.clamp(0, frame[0] - 1), columns.clamp(0, frame[1] - 1)
        labels = self.program.labels
        channel = torch.arange(len(taps.rows), device=rows.device)[:, None] * labels + points.label
        pixel = (points.image * frame[0] + rows) * frame[1] + columns
        self.index = pixel * (len(taps.rows) * labels) + channel


def _prefix_and_suffix(network: fx.GraphModule, shared: bool) -> tuple[Part, Part]:
    if shared:
        graph.absorb_masks(network)
    stochastic = graph.stochastic_nodes(network)
    still = {node for node in network.graph.nodes if node not in stochastic}
    prefix, suffix = graph.cut(network, still)
    graph.work_in_place(prefix)
    graph.work_in_place(suffix)
    return prefix, suffix


def _result(part: Part, values: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = part.function(*(values[name] for name in part.inputs))[0]
    return result


def _is_map(values: Tensor) -> bool:
    return values.dim() == 4 and values.shape[-1] > 1

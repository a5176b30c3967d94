"""Run the passes of MC Dropout as a program that computes their common part once.

The network's graph is split into the prefix, which does not depend on dropout masks and runs once
for a batch, and the suffix, which runs in each pass. If the wanted pixels are known beforehand, the
last operations run on windows around them.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, fx, nn

from polyseg.montecarlo.compiler import rewrite, trace
from polyseg.montecarlo.compiler.split import Part, cut, stochastic_nodes
from polyseg.montecarlo.compiler.trace import MaskInput, UntraceableError
from polyseg.montecarlo.compiler.window import Window, WindowedEnd

_WORTHWHILE = 0.85
"""Largest cost at which a longer windowed end is used, as a share of that of the shortest."""

Masks = Mapping[str, Tensor]
"""Dropout masks by the names of the graph's inputs."""


class Program:
    """A network as prefix and suffix, with its current weights."""

    def __init__(
        self,
        core: nn.Module,
        layers: Mapping[str, nn.Module],
        images: Tensor,
        *,
        kind: torch.dtype = torch.float32,
    ) -> None:
        """Make the program of a network.

        Args:
            core: network in evaluation mode, which maps (B, C, H, W) to (B, K, H, W).
            layers: its active dropout layers by name.
            images: an example.
            kind: precision of the suffix; the prefix is computed in float32.

        Raises:
            UntraceableError: the network cannot be converted to a program.
        """
        network = trace.trace(core, images[:1].repeat(2, 1, 1, 1))
        self.masks: list[MaskInput] = trace.insert_masks(network, core, layers)
        rewrite.apply_all(network, wide=images.device.type == "cpu" and kind == torch.float32)
        self.input = trace.input_names(network)[0]
        self.kind = kind
        # Convolutions are fastest with channels last, but layers that normalise over the image are
        # slower.
        over_space = trace.normalises_over_space(network)
        self.layout = torch.contiguous_format if over_space else torch.channels_last
        self.prefix, self.suffix = self._split(network)
        self.of_images = self.suffix.of_images()
        """Names of the suffix's inputs that have a row for each image."""
        self.frame = (int(images.shape[2]), int(images.shape[3]))
        self.ends = self._find_ends(self.begin(images[:1]))

    def _split(self, network: fx.GraphModule) -> tuple[Part, Part]:
        stochastic = stochastic_nodes(network)
        still = {node for node in network.graph.nodes if node not in stochastic}
        prefix, suffix = cut(network, still)
        self._finish(prefix, torch.float32)
        self._finish(suffix, self.kind)
        return prefix, suffix

    def _finish(self, part: Part, kind: torch.dtype) -> None:
        rewrite.work_in_place(part, kind)
        part.lay_out(self.layout, kind)

    def _find_ends(self, features: dict[str, Tensor]) -> list[WindowedEnd]:
        """Return the ends of the suffix that can run on windows, the longest first."""
        values = self.inputs(features, self.all_kept(features[self.input]))
        finish = partial(self._finish, kind=self.kind)
        ends: list[WindowedEnd] = []
        for width in self.suffix.widths()[:-1]:
            end = WindowedEnd.of(self.suffix, width, self.frame, finish)
            if end is None or (ends and end.end.cost >= ends[-1].end.cost):
                continue
            if not end.is_exact(values, self.kind):
                raise UntraceableError("the result in a window differs from that in a whole image")
            ends.append(end)
        return ends

    @property
    def bytes_a_pixel(self) -> float:
        """Size of the largest feature map of a batch in bytes per pixel of the images."""
        whole = self.ends[-1].head if self.ends else self.suffix
        return 4 * whole.most_values() / (self.frame[0] * self.frame[1])

    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Return the common results of all passes over (B, C, H, W) images, by name."""
        features = {self.input: images.contiguous(memory_format=self.layout)}
        self.prefix.run(features)
        wanted = {self.input, *self.suffix.inputs}
        return {name: self._cast(one) for name, one in features.items() if name in wanted}

    def _cast(self, values: Tensor) -> Tensor:
        return values.to(self.kind) if values.is_floating_point() else values

    def inputs(
        self, features: Mapping[str, Tensor], masks: Masks, count: int = 1
    ) -> dict[str, Tensor]:
        """Return the inputs of `count` passes: the repeated features, and the masks."""
        if count > 1:
            features = {
                name: torch.cat([one] * count) if name in self.of_images else one
                for name, one in features.items()
            }
        return {**features, **{name: mask.to(self.kind) for name, mask in masks.items()}}

    def all_kept(self, like: Tensor) -> Masks:
        """Return the masks that drop nothing."""
        return {one.node: like.new_ones(1, one.channels, 1, 1) for one in self.masks}


class PreparedBatch:
    """A batch with the common results of its passes.

    For chosen pixels the last operations run on a window of each image, one image at a time, so
    that their large feature maps stay in a CPU's caches.
    """

    def __init__(
        self, program: Program, images: Tensor, chosen: Tensor | None, *, crop: bool = True
    ) -> None:
        """Compute the common results of all passes over padded images, (B, C, H, W).

        `chosen` are the wanted pixels, (B, K, H, W) bool, None for all; with `crop` the last
        operations may run on windows.
        """
        self.program, self.chosen = program, chosen
        self.features = program.begin(images)
        self.end: WindowedEnd | None = None
        self.share = 1.0
        """Cost of a pass as a share of one over all pixels."""
        self.windows: list[Window] = []
        if chosen is None:
            return
        if crop and program.ends and images.shape[2:] == program.frame:
            self._choose_end(chosen.any(dim=1))
        parts = [chosen]
        if self.end is not None:
            crops = (self.end.crop({"": chosen}, i, one) for i, one in enumerate(self.windows))
            parts = [part[""] for part in crops]
        self.wanted = [part.flatten().nonzero().flatten() for part in parts]
        """Indices into the logits of the batch, or of each image's window."""

    def __call__(self, masks: Masks, count: int = 1) -> Tensor:
        """Return the logits of passes: (passes n,) at the n chosen pixels, or (passes B, K, H, W).

        Args:
            masks: masks of one pass, or of several with their rows pass after pass.
            count: number of passes; more than one only without windows.
        """
        values = self.program.inputs(self.features, masks, count)
        if self.chosen is None:
            return self.program.suffix.result(values)
        if self.end is None:
            logits = self.program.suffix.result(values).reshape(count, -1)
            return logits.index_select(1, self.wanted[0]).flatten()
        self.end.head.run(values)
        changing = {name: values[name] for name in self.changing}
        each = []
        for image, window in enumerate(self.windows):
            moving = self.end.crop(changing, image, window)
            logits = self.end.end.result(self.still[image] | moving)
            each.append(logits.flatten().index_select(0, self.wanted[image]))
        return torch.cat(each)

    def everywhere(self, masks: Masks) -> Tensor:
        """Return the logits of a pass at all pixels, (B, K, H, W)."""
        return self.program.suffix.result(self.program.inputs(self.features, masks))

    def _choose_end(self, wanted: Tensor) -> None:
        """Choose the cheapest end for (B, H, W) pixels, or the shortest one if it costs as much."""
        # An image without wanted pixels would have an empty window.
        wanted[:, 0, 0] |= ~wanted.flatten(1).any(dim=1)
        ends = self.program.ends
        shares = [end.share(wanted) for end in ends]
        self.share = min(shares)
        if self.share >= _WORTHWHILE * shares[-1]:
            self.share = shares[-1]
        end = self.end = ends[shares.index(self.share)]
        self.windows = end.windows(wanted)
        still = {name: self.features[name] for name in end.end.inputs if name in self.features}
        self.changing = [name for name in end.end.inputs if name not in still]
        self.still = [end.crop(still, image, one) for image, one in enumerate(self.windows)]

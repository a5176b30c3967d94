"""Run the passes of MC Dropout over batches, by a network's program or as plain passes.

A program computes the common part of all passes once. Its first batch is compared with plain
passes, for each image size and each way of computation. Networks without a program use plain
passes.
"""

import contextlib
import logging
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from polyseg.errors import PolysegError, first_line
from polyseg.montecarlo.compiler.run import Masks, PreparedBatch, Program
from polyseg.montecarlo.compiler.trace import UntraceableError
from polyseg.montecarlo.dropout_masks import MaskStreams
from polyseg.networks.dropout import refuse_hidden_dropout
from polyseg.networks.inference import device_of, images_of
from polyseg.networks.segmentation_network import SegmentationNetwork
from polyseg.records import Batch
from polyseg.system.memory import is_out_of_memory

log = logging.getLogger(__name__)

_TRIAL_SIDE = 512
"""Largest height and width of the image by which a network is checked, in pixels."""
_TOLERANCE = 1e-4
"""Largest difference of a probability between a program and plain passes, far above rounding."""
_TIMES_ROUNDING = 4
"""Largest difference in a lower precision, as a multiple of the maximum and the mean difference
between that precision and float32."""
_BYTES_AT_ONCE = 2**24
"""Size of feature maps that stay in a CPU's caches, in bytes."""
_PIXELS_AT_ONCE = 2**22
"""Number of pixels that passes on a GPU process together, enough to keep it busy."""


class ProgramFailedError(Exception):
    """The program of a network failed, or its result differs from the network's."""


class Passes:
    """The passes of one network over batches, by its program if it has one."""

    def __init__(
        self,
        network: nn.Module,
        layers: dict[str, Any],
        streams: MaskStreams,
        *,
        compiled: bool,
        kind: torch.dtype = torch.float32,
    ) -> None:
        """Prepare the passes of a network in evaluation mode without running any.

        `layers` are its active dropout layers by name, `streams` their masks; `compiled` says
        whether to try to compile the network, and `kind` is the precision of the computation.
        """
        self.network, self.layers, self.streams = network, layers, streams
        self.compiled, self.kind = compiled, kind
        self.program: Program | None = None
        self.device = device_of(network)
        # A network that works window by window would treat passes as windows.
        windows = getattr(network, "window", None) is not None
        self.most_pixels = 0 if windows else _most_pixels_together(self.device)
        """Largest number of pixels of passes that run together; 0 to run each pass alone."""
        self.checked: set[tuple[Any, ...]] = set()
        self.joinable: dict[tuple[Any, ...], bool] = {}
        """Whether passes that run together give the same results, for each way of computation."""
        self.tried = False

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """Divide a batch into parts that are computed fastest."""
        for part in _split_by_foreground(batch):
            self._prepare(part.images[:1].to(self.device))
            yield from self._cache_sized(part)

    def _cache_sized(self, batch: Batch) -> Iterator[Batch]:
        at_once = len(batch.ids)
        if self.program is not None and self.device.type == "cpu":
            pixels = batch.images.shape[2] * batch.images.shape[3]
            at_once = max(1, _BYTES_AT_ONCE // int(self.program.bytes_a_pixel * pixels))
        for start in range(0, len(batch.ids), at_once):
            yield images_of(batch, slice(start, start + at_once))

    def plain_passes(self, images: Tensor, ids: list[str], passes: range) -> Tensor:
        """Return the probabilities of passes of the whole network, (passes B K, H, W)."""
        streams = self.streams.of(ids, images.shape[2:])
        with self._autocast():
            return stochastic_pass(self.network, self.layers, images, streams, passes)

    def without_dropout(self, images: Tensor) -> Tensor:
        """Return the probabilities of the network without dropout, (B K, H, W)."""
        with self._autocast():
            logits: Tensor = self.network(images)
        return logits.float().sigmoid().flatten(0, 1)

    def _autocast(self) -> torch.autocast:
        reduced = self.kind != torch.float32
        return torch.autocast(self.device.type, self.kind if reduced else None, enabled=reduced)

    def over(self, images: Tensor, ids: list[str], chosen: Tensor | None) -> "BatchPasses":
        """Return the passes over a batch; `chosen` are the pixels, (B, K, H, W), None for all.

        A program that fails, or whose result differs from the network's, raises ProgramFailedError.
        """
        images = images.to(self.device)
        if self.program is None:
            return BatchPasses(self, images, ids, chosen, None)
        with _program_failing():
            ours = BatchPasses(self, images, ids, chosen, self.program)
            if ours.way not in self.checked and not self._agrees_with_network(ours):
                raise ProgramFailedError("its result differs from the network's")
        self.checked.add(ours.way)
        return ours

    def mask_inputs(self, images: Tensor, ids: list[str], passes: range) -> Masks:
        """Return the masks of passes by the names of the program's inputs."""
        streams = self.streams.of(ids, images.shape[2:])
        assert self.program is not None
        masks = {}
        for one in self.program.masks:
            shape, rate = streams.known_shape(one.layer, one.call), self.layers[one.layer].p
            drawn = streams.mask(passes, one.layer, one.call, shape, rate)
            masks[one.node] = drawn.to(self.device)
        return masks

    def _prepare(self, images: Tensor) -> None:
        """Check the network for hidden dropout and compile it, at the first images."""
        if self.tried:
            return
        self.tried = True
        window = getattr(self.network, "window", None)
        height, width = window.size if window else (_TRIAL_SIDE, _TRIAL_SIDE)
        part = images[..., :height, :width]
        if self.layers:
            refuse_hidden_dropout(self.network, part.repeat(2, 1, 1, 1))
        if not self.compiled:
            return
        try:
            if window is not None:
                raise UntraceableError("it reads images window by window")
            example, _, _ = _padded(self.network, images)
            core = getattr(self.network, "core", self.network)
            with torch.inference_mode(mode=False), torch.no_grad():
                self.program = Program(core, self.layers, example.clone(), kind=self.kind)
        except Exception as error:  # A user's network may fail in any way; plain passes remain.
            log.info("MC Dropout: the network is not compiled, because %s", first_line(error)[:200])

    def _agrees_with_network(self, ours: "BatchPasses") -> bool:
        """Compare a program with the whole network, in a pass and without dropout.

        The first and the last image of the batch are enough to find a wrong program.
        """
        rows = sorted({0, len(ours.ids) - 1})
        ids = [ours.ids[i] for i in rows]
        chosen = None if ours.chosen is None else ours.chosen[rows]
        whole = BatchPasses(self, ours.images[rows], ids, chosen, None)
        # The plain pass comes first, because it determines the shapes of the masks.
        plain = whole.sample(0)
        pairs = (
            (ours.part_of(ours.sample(0), rows), plain),
            (_of_images(ours.without_dropout, len(ours.ids), rows), whole.without_dropout),
        )
        return all(
            _are_close(found, wanted, rounding)
            for (found, wanted), rounding in zip(pairs, self._rounding(whole), strict=True)
        )

    def can_run_together(self, ours: "BatchPasses") -> bool:
        """Return whether passes over a batch give the same results together as one by one."""
        if ours.way not in self.joinable:
            try:
                together, alone = ours.together(range(2)), [ours.sample(0), ours.sample(1)]
            except (RuntimeError, ProgramFailedError) as error:
                if is_out_of_memory(error):
                    self.most_pixels = 1  # Do not try it again.
                    return False
                log.debug("MC Dropout: passes cannot run together: %s", error)
                together, alone = (), []
            rounding, _ = self._rounding(ours)
            self.joinable[ours.way] = len(together) == 2 and all(
                _are_close(one, other, rounding) for one, other in zip(together, alone, strict=True)
            )
        return self.joinable[ours.way]

    def _rounding(self, ours: "BatchPasses") -> tuple[Tensor, Tensor]:
        """Return the changes of probabilities by a lower precision, at chosen and all pixels."""
        if self.kind == torch.float32:
            return torch.zeros(1), torch.zeros(1)
        single: Tensor = self.network(ours.images).float().sigmoid().flatten(0, 1)
        moved = (self.without_dropout(ours.images) - single).abs().nan_to_num().cpu()
        return moved if ours.chosen is None else moved[ours.chosen.flatten(0, 1)], moved


@contextlib.contextmanager
def _program_failing() -> Iterator[None]:
    """Turn errors of a program into ProgramFailedError, except for lack of memory."""
    try:
        yield
    except (ProgramFailedError, PolysegError):
        raise
    except Exception as error:  # A user's network may fail in any way.
        if is_out_of_memory(error):
            raise
        raise ProgramFailedError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def stochastic_pass(
    network: nn.Module, layers: dict[str, Any], images: Tensor, streams: MaskStreams, passes: range
) -> Tensor:
    """Return the probabilities of passes with dropout masks, p_n = f(x; z_n) (eq. 7).

    z_n is Bernoulli(1 - rate), and kept values are divided by 1 - rate, so means are preserved. The
    result is (passes B K, H, W): pass after pass, with the K labels of an image next to each other.
    """
    calls = dict.fromkeys(layers, 0)

    def begin(*_: Any) -> None:
        # A network that works window by window uses the same masks in all windows.
        calls.update(dict.fromkeys(layers, 0))

    def drop(name: str, layer: Any, features: Tensor) -> Tensor:
        calls[name] += 1
        shape = streams.shape_of(name, calls[name], layer, features)
        mask = streams.mask(passes, name, calls[name], shape, layer.p)
        dropped: Tensor = features * mask.to(features)
        return dropped

    hooks = [
        layer.register_forward_hook(
            lambda _module, _inputs, output, name=name, layer=layer: drop(name, layer, output)
        )
        for name, layer in layers.items()
    ]
    hooks.append(getattr(network, "core", network).register_forward_pre_hook(begin))
    try:
        logits: Tensor = network(images.repeat(len(passes), 1, 1, 1))
        return logits.float().sigmoid().flatten(0, 1)
    finally:
        for hook in hooks:
            hook.remove()


class BatchPasses:
    """The passes over one batch."""

    def __init__(
        self,
        passes: Passes,
        images: Tensor,
        ids: list[str],
        chosen: Tensor | None,
        program: Program | None,
    ) -> None:
        self.passes, self.images, self.ids, self.chosen = passes, images, ids, chosen
        self.inside: PreparedBatch | None = None
        if program is not None:
            padded, self.top, self.left = _padded(passes.network, images)
            # Windows are computed image by image, which is fast on CPUs only.
            self.inside = PreparedBatch(
                program, padded, self._chosen_in_padded(chosen, padded), crop=not passes.most_pixels
            )

    def _chosen_in_padded(self, chosen: Tensor | None, padded: Tensor) -> Tensor | None:
        """Return the chosen pixels as pixels of the padded images."""
        if chosen is None:
            return None
        placed = chosen.new_zeros(*chosen.shape[:2], *padded.shape[2:], device=padded.device)
        height, width = chosen.shape[2:]
        placed[..., self.top : self.top + height, self.left : self.left + width] = chosen
        return placed

    @property
    def way(self) -> tuple[Any, ...]:
        """The way of computation: image size, chosen pixels, program, windowed end."""
        end = self.inside and self.inside.end
        return (*self.images.shape[2:], self.chosen is not None, self.inside is not None, end)

    def sample(self, index: int) -> Tensor:
        """Return the probabilities of a pass, on the CPU; (n,) if pixels are chosen."""
        (found,) = self.together(range(index, index + 1))
        return found

    def samples(self, passes: range) -> Iterator[Tensor]:
        """Yield the probabilities of one pass after another; several may run together."""
        pixels, first = self.images[:, 0].numel(), passes.start
        while first < passes.stop:
            count = max(1, min(self.passes.most_pixels // pixels, passes.stop - first))
            if count > 1 and not self.passes.can_run_together(self):
                count = 1
            try:
                found = self.together(range(first, first + count))
            except RuntimeError as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                self.passes.most_pixels = count // 2 * pixels
                continue
            yield from found
            first += count

    def together(self, passes: range) -> tuple[Tensor, ...]:
        """Return the probabilities of passes that run together, each as `sample` does."""
        if self.inside is None:
            whole = self.passes.plain_passes(self.images, self.ids, passes).cpu()
            each = whole.chunk(len(passes))
            if self.chosen is None:
                return each
            chosen = self.chosen.flatten(0, 1)
            return tuple(one[chosen] for one in each)
        with _program_failing():
            masks = self.passes.mask_inputs(self.images, self.ids, passes)
            logits = self.inside(masks, len(passes))
        if self.chosen is None:
            logits = self._cut(logits)
        return logits.float().sigmoid().cpu().chunk(len(passes))

    def part_of(self, sample: Tensor, rows: list[int]) -> Tensor:
        """Return the part of a result of `sample` that belongs to some of the images."""
        if self.chosen is None:
            return _of_images(sample, len(self.ids), rows)
        ours = torch.zeros_like(self.chosen)
        ours[rows] = True
        return sample[ours[self.chosen]]

    @cached_property
    def without_dropout(self) -> Tensor:
        """The probabilities of the network without dropout, (B K, H, W) on the CPU."""
        if self.inside is None:
            return self.passes.without_dropout(self.images).cpu()
        with _program_failing():
            logits = self.inside.everywhere(self.inside.program.all_kept(self.images))
        return self._cut(logits).float().sigmoid().cpu()

    def _cut(self, logits: Tensor) -> Tensor:
        """Return the logits without padding, (B K, H, W)."""
        height, width = self.images.shape[2:]
        rows = slice(self.top, self.top + height)
        return logits[..., rows, self.left : self.left + width].flatten(0, 1)


def _most_pixels_together(device: torch.device) -> int:
    # CPUs are faster with few feature maps, which stay in their caches.
    return 0 if device.type == "cpu" else _PIXELS_AT_ONCE


def _split_by_foreground(batch: Batch) -> list[Batch]:
    """Divide a batch into images with foreground of every label, and other images.

    The region of the other images depends on the passes, which therefore need all pixels.
    """
    if batch.masks is None:
        return [batch]
    full = (batch.masks > 0).flatten(2).any(dim=2).all(dim=1).tolist()
    rows = ([i for i, one in enumerate(full) if one is kind] for kind in (True, False))
    return [images_of(batch, some) for some in rows if some]


def _are_close(found: Tensor, wanted: Tensor, rounding: Tensor) -> bool:
    """Return whether probabilities are equal up to rounding, also in a lower precision."""
    if found.shape != wanted.shape:
        return False
    # Values that are not finite come from diverged weights, not from the program.
    apart = (found - wanted).abs()[wanted.isfinite()]
    if apart.numel() == 0:
        return True
    return bool(
        apart.max() <= _TOLERANCE + _TIMES_ROUNDING * rounding.max()
        and apart.mean() <= _TOLERANCE + _TIMES_ROUNDING * rounding.mean()
    )


def _of_images(values: Tensor, count: int, rows: list[int]) -> Tensor:
    """Return the rows of some of the images from values of `count` images, (B K, H, W)."""
    return values.reshape(count, -1, *values.shape[1:])[rows].flatten(0, 1)


def _padded(network: nn.Module, images: Tensor) -> tuple[Tensor, int, int]:
    if isinstance(network, SegmentationNetwork):
        return network.padded(images)
    return images, 0, 0

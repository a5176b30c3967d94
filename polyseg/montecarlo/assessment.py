"""Measure uncertainty by MC Dropout: N passes in which only the active dropout layers are random.

All layers stay in evaluation mode, and the output of each active one is multiplied by a mask from a
separate generator, so normalisation statistics and torch's random state do not change. For larger
assessments the network is compiled to a program that computes the common part of all passes once.
Programs are checked against plain passes, which are also used if no program can be made or it
fails.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from polyseg.choices import score_of
from polyseg.config import UncertaintyConfig
from polyseg.errors import PolysegError
from polyseg.montecarlo.choose_samples import MOST, choose_samples
from polyseg.montecarlo.dropout_masks import MaskStreams
from polyseg.montecarlo.measurement import Measurement, ScoreTable, Wanted, extended
from polyseg.montecarlo.passes import Passes, ProgramFailedError
from polyseg.networks.dropout import active_layers
from polyseg.networks.inference import LESS_MEMORY, held_in_mode, images_of
from polyseg.networks.segmentation_network import hash_weights
from polyseg.records import Assessment, Batch, Progress, no_progress
from polyseg.system.memory import Portions, explaining_memory
from polyseg.system.process_group import ALONE, Processes

log = logging.getLogger(__name__)

_KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FEWEST_COMPILED = 2_000_000
"""Smallest number of pixels times passes for which compiling, about a second, saves time."""


def assess(
    network: nn.Module,
    batches: Iterable[Batch],
    settings: UncertaintyConfig = UncertaintyConfig(),  # noqa: B008 - it is frozen
    *,
    seed: int = 0,
    epoch: int = 0,
    progress: Progress = no_progress,
    total: int = 0,
    processes: Processes = ALONE,
    also: Sequence[str] = (),
    **changes: Any,
) -> Assessment:
    """Measure by MC Dropout how uncertain the network is about each image.

    The network, its modes and torch's random state are not changed. "consistent" masks are equal
    for all images of a pass, so results do not depend on batch size or order; "independent" masks
    depend on the id of the image.

    Args:
        network: maps (B, C, H, W) to logits (B, K, H, W); has active dropout layers.
        batches: images, on any device, of the same size within a batch. With a list, or another
            iterable that can be read twice, passes may be compiled, and are repeated as plain ones
            if that fails. An iterator is read once, by plain passes.
        settings: number of passes, metric, region and so on. Standard errors and rank stability
            are NaN below 4 passes. Samples "auto" is the least N, from 6 to 100, whose rank
            stability reaches `rank_target`, judged from the first images. The result has all
            scores, and `metric` names the difficulty among them; if it needs no passes, none are
            run. The training loss is not computed here.
        seed: random seed of the masks, together with epoch, pass and layer.
        epoch: number of epochs that the network was trained for.
        progress: called with the number of finished images before each pass and after each batch.
        total: number of images, for progress.
        processes: processes that share the images; all give the same batches and get all results.
        also: further scores of the whole image, of `choices.WHOLE_SCORES`, `choices.PAIR_SCORES`,
            or "size".
        changes: settings by name that replace those of `settings`, such as samples=3.

    Raises:
        PolysegError: there are no active dropout layers, no images, or dropout that polyseg cannot
            control; a result is not finite; or memory is too small for one image (if it is too
            small for a batch, the batch is divided).

    >>> batch = Batch(["a", "b"], torch.rand(2, 1, 8, 8), torch.ones(2, 1, 8, 8))
    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))
    >>> assess(network, [batch], samples=3).difficulty.shape
    (2,)
    """
    if changes:
        settings = UncertaintyConfig(**settings.model_dump() | changes)
    layers = active_layers(network) if settings.takes_passes else {}
    streams = MaskStreams(settings.masks, seed, epoch)
    kind = _KINDS[settings.precision]

    def attempt(batches: Iterable[Batch], *, compiled: bool) -> _Attempt:
        passes = Passes(network, layers, streams, compiled=compiled, kind=kind)
        found = _Attempt(passes, settings, _wanted_of(settings, also), processes, progress, total)
        found.measure(batches)
        return found

    memory = explaining_memory("MC Dropout", LESS_MEMORY)
    with held_in_mode(network, training=False), torch.inference_mode(), memory:
        found = _with_fallback(attempt, batches, settings)
    if not found.table.images:
        raise PolysegError("MC Dropout: there are no images to assess")
    return Assessment(
        weights_sha256=hash_weights(network),
        epoch=epoch,
        samples=found.samples,
        rate=max((layer.p for layer in layers.values()), default=0.0),
        metric=settings.metric,
        region=settings.region,
        masks=settings.masks,
        seed=seed,
        **found.table.columns(),
    ).in_order(found.given)


def _with_fallback(
    attempt: Callable[..., "_Attempt"], batches: Iterable[Batch], settings: UncertaintyConfig
) -> "_Attempt":
    """Return the result of compiled passes, or of plain passes if those fail."""
    compiled, first = _is_worth_compiling(batches, settings)
    try:
        return attempt(first, compiled=compiled)
    except ProgramFailedError as error:
        log.warning(
            "MC Dropout: the compiled passes failed (%s); all passes are repeated without "
            "compilation, which is slower",
            str(error)[:200],
        )
        return attempt(batches, compiled=False)


def _wanted_of(settings: UncertaintyConfig, also: Sequence[str]) -> Wanted:
    own = [settings.metric] if score_of(settings.metric).of != "pixels" else []
    names = tuple(dict.fromkeys([*own, *also]))
    return Wanted(settings.region, settings.boundary_width, settings.save_maps, names)


@dataclass
class _Attempt:
    """The measurement of all images by compiled or plain passes."""

    passes: Passes
    settings: UncertaintyConfig
    wanted: Wanted
    processes: Processes
    progress: Progress
    total: int
    given: list[str] = field(default_factory=list)
    """Ids of the images in the order of the batches."""
    samples: int = 0
    """Number of passes."""

    def measure(self, batches: Iterable[Batch]) -> None:
        """Fill the table with all images of all processes.

        Raises:
            ProgramFailedError: the program failed in one of the processes; raised in all of them.
        """
        portions = Portions("MC Dropout", LESS_MEMORY)
        extend = partial(extended, portions=portions, report=self._report)
        self.table = ScoreTable(self.wanted)
        each, pilot = self._measurements(batches), list[Measurement]()
        self.divided = self.processes
        wanted = self.settings.samples if self.settings.takes_passes else 0
        if wanted == "auto":
            # All processes measure the images from which N is chosen, and choose the same N.
            self.divided = ALONE
            metric = self.wanted.streamed.index(self.settings.metric)
            with _failing_in_all(self.processes):
                found, pilot = choose_samples(each, self.settings.rank_target, metric, extend)
            self.samples = self.processes.from_leader(found)
            self.divided = self.processes
        else:
            self.samples = wanted
        with _failing_in_all(self.processes):
            for measurement in extend(chain(pilot, each), self.samples):
                self.table.add(measurement)
                self._report()
        self.table = ScoreTable.merged(self.processes.gathered(self.table))

    def _measurements(self, batches: Iterable[Batch]) -> Iterator[Measurement]:
        """Yield a measurement, without passes yet, for each batch of this process's images."""
        for batch in batches:
            places = range(len(self.given), len(self.given) + len(batch.ids))
            self.given.extend(batch.ids)
            count, rank = self.divided.count, self.divided.rank
            mine = [i for i, place in enumerate(places) if place % count == rank]
            if mine:
                alone = len(mine) == len(batch.ids)
                for part in self.passes.parts(batch if alone else images_of(batch, mine)):
                    yield Measurement(self.passes, part, self.wanted)

    def _report(self) -> None:
        done = self.processes.count * len(self.table.images)
        self.progress("MC Dropout", min(self.total, done), self.total)


@contextlib.contextmanager
def _failing_in_all(processes: Processes) -> Iterator[None]:
    """Raise ProgramFailedError in all processes if one of them raises it in the block."""
    error: ProgramFailedError | None = None
    try:
        yield
    except ProgramFailedError as found:
        error = found
    if not processes.all(error is None):
        raise error or ProgramFailedError("in another process")


def spread(ids: Sequence[str]) -> list[str]:
    """Return ids in an order whose first ones are spread evenly over the given order.

    >>> spread(["a", "b", "c", "d", "e"])
    ['a', 'c', 'e', 'b', 'd']
    """
    # Multiples of the golden ratio leave no large gaps.
    return [ids[i] for i in np.argsort(np.arange(len(ids)) * 0.6180339887 % 1, kind="stable")]


def _is_worth_compiling(
    batches: Iterable[Batch], settings: UncertaintyConfig
) -> tuple[bool, Iterable[Batch]]:
    """Return whether compiling saves time, and the batches, including those read to decide.

    The decision depends on the images only: a repeated assessment is computed in the same way.
    """
    if settings.program == "plain" or not settings.takes_passes:
        return False, batches
    following, read, work = iter(batches), list[Batch](), 0
    if following is batches:
        log.info("MC Dropout: passes are not compiled, because the batches can be read only once")
        return False, batches
    # An unknown N counts as the largest: unnecessary compilation costs about a second.
    passes = MOST if settings.samples == "auto" else settings.samples
    for batch in following:
        read.append(batch)
        work += batch.images[:, 0].numel() * passes
        if work >= _FEWEST_COMPILED:
            return True, chain(read, following)
    log.debug("MC Dropout: passes are not compiled, because there are few pixels")
    return False, read

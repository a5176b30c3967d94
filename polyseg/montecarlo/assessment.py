"""Measure uncertainty by MC Dropout: N passes with only the active dropout layers on.

Layers stay in evaluation mode and each active one multiplies by its mask, drawn from a generator of
its own, so normalisation statistics do not move and torch's random stream is not advanced. Where
there is enough to compute, the network is made a program, which computes once what the passes have
in common. The plain pass is the reference that a program is checked against, and what is run where
none can be made, or where it fails.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyseg.choices import score_of
from polyseg.config import UncertaintyConfig
from polyseg.errors import PolysegError
from polyseg.montecarlo.choose_samples import MOST, choose_samples
from polyseg.montecarlo.dropout_masks import MaskStreams
from polyseg.montecarlo.passes import Passes, ProgramFailedError
from polyseg.montecarlo.scores import Measurement, Table, Wanted, extended
from polyseg.networks.dropout import active_layers, stochastic_layers
from polyseg.networks.inference import LESS_MEMORY, held_in_mode, images_of
from polyseg.networks.networks_by_name import hash_weights
from polyseg.records import Assessment, Batch, Progress, no_progress
from polyseg.system.memory import Portions, explaining_memory
from polyseg.system.process_group import ALONE, Processes

__all__ = [
    "assess",
    "spread",
    "stochastic_layers",
    "stochastic_pass",
]

log = logging.getLogger(__name__)

_KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WORTH_TAKING_APART = 2_000_000
"""Pixels of all images times passes from which a program repays the second that making it takes."""


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

    The network, its modes and torch's random stream are afterwards as they were before. With
    "consistent" masks pass n drops the same for every image, so the result does not depend on
    batch size or order; "independent" masks differ from image to image, by its id.

    Args:
        network: maps (B, C, H, W) to logits (B, K, H, W); has active dropout layers.
        batches: images, on any device, of one size within a batch. A list, or anything else that
            can be read twice: should the fast passes fail, all is measured anew by plain ones. An
            iterator is read once, by plain passes.
        settings: number of passes, metric, region and so on. Standard errors and rank stability
            are NaN below 4 passes. Samples "auto" is the least N, from 6 to 100, whose rank
            stability reaches `rank_target`, judged from the first images. All scores are kept,
            and `metric` names the one that is the difficulty; without passes for a metric that
            takes none. The training loss is known to the training alone, which adds it.
        seed: of the masks, together with epoch, pass and layer.
        epoch: the epochs the network was trained for.
        progress: told before each pass and after each batch how many images are done.
        total: the number of images, for progress.
        processes: that share the images; all give the same batches, and all get the whole.
        also: scores of the whole image to measure besides, of `choices.WHOLE_SCORES`,
            `choices.PAIR_SCORES`, or "size".
        changes: settings by name that replace those of `settings`, such as samples=3.

    Raises:
        PolysegError: no active dropout, dropout that cannot be steered, no images, a result that
            is not finite, or too little memory for one image. Where it is too little for a batch
            only, the batch is divided.

    >>> batch = Batch(["a", "b"], torch.rand(2, 1, 8, 8), torch.ones(2, 1, 8, 8))
    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))
    >>> assess(network, [batch], samples=3).difficulty.shape
    (2,)
    """
    if changes:
        settings = UncertaintyConfig(**settings.model_dump() | changes)
    layers = active_layers(network) if settings.takes_passes else {}
    streams = MaskStreams(settings.masks, seed, epoch)
    wanted = wanted_of(settings, also)

    def attempt(batches: Iterable[Batch], *, take_apart: bool) -> _Attempt:
        kind, plain_pass = _KINDS[settings.precision], partial(stochastic_pass, network, layers)
        passes = Passes(network, layers, streams, plain_pass, take_apart=take_apart, kind=kind)
        found = _Attempt(passes, settings, wanted, processes, progress, total)
        found.measure(batches)
        return found

    whole = explaining_memory("MC Dropout", LESS_MEMORY)
    with held_in_mode(network, training=False), torch.inference_mode(), whole:
        take_apart, first = _worth_taking_apart(batches, settings)
        try:
            found = attempt(first, take_apart=take_apart)
        except ProgramFailedError as error:
            log.warning(
                "MC Dropout: the fast passes failed (%s); all passes are run plainly, "
                "which is slower",
                str(error)[:200],
            )
            found = attempt(batches, take_apart=False)
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


def wanted_of(settings: UncertaintyConfig, also: Sequence[str] = ()) -> Wanted:
    """Return what is measured by some settings, and scores besides."""
    own = [settings.metric] if score_of(settings.metric).of != "pixels" else []
    names = tuple(dict.fromkeys([*own, *also]))
    return Wanted(settings.region, settings.boundary_width, settings.save_maps, names)


class _Attempt:
    """The measuring of all images by fast or by plain passes."""

    def __init__(
        self,
        passes: Passes,
        settings: UncertaintyConfig,
        wanted: Wanted,
        processes: Processes,
        progress: Progress,
        total: int,
    ) -> None:
        self.passes, self.settings, self.processes = passes, settings, processes
        self.wanted = wanted
        self.progress, self.total = progress, total
        self.table = Table(wanted)
        self.given = list[str]()
        """Ids in the order of the batches."""
        self.samples = 0
        """Number of passes."""

    def measure(self, batches: Iterable[Batch]) -> None:
        """Fill the table with all images of all processes.

        Raises:
            ProgramFailedError: in all processes, if the program fails in one of them.
        """
        extend = partial(extended, portions=Portions("MC Dropout", LESS_MEMORY), tell=self._tell)
        settings = self.settings
        wanted = settings.samples if settings.takes_passes else 0
        # Images that choose N are measured by all processes, which must agree.
        self.divided = ALONE if wanted == "auto" else self.processes
        each, pilot = self._measurements(batches), list[Measurement]()
        if wanted == "auto":
            target = settings.rank_target
            metric = self.wanted.streamed.index(settings.metric)
            with _failing_in_all(self.processes):
                found, pilot = choose_samples(each, target, metric, extend)
            self.samples = self.processes.from_leader(found)
            self.divided = self.processes
        else:
            self.samples = wanted
        with _failing_in_all(self.processes):
            for measurement in extend(chain(pilot, each), self.samples):
                self.table.add(measurement)
                self._tell()
        self.table = Table.merged(self.processes.gathered(self.table))

    def _measurements(self, batches: Iterable[Batch]) -> Iterator[Measurement]:
        """Yield what is to be measured of the images of this process."""
        for batch in batches:
            places = range(len(self.given), len(self.given) + len(batch.ids))
            self.given.extend(batch.ids)
            count, rank = self.divided.count, self.divided.rank
            mine = [i for i, place in enumerate(places) if place % count == rank]
            if mine:
                alone = len(mine) == len(batch.ids)
                for part in self.passes.parts(batch if alone else images_of(batch, mine)):
                    yield Measurement(self.passes, part, self.wanted)

    def _tell(self) -> None:
        done = self.processes.count * len(self.table.images)
        self.progress("MC Dropout", min(self.total, done), self.total)


@contextlib.contextmanager
def _failing_in_all(processes: Processes) -> Iterator[None]:
    """Let the failure of a program in one process end the block in all of them.

    Raises:
        ProgramFailedError: the program failed here, or in another process.
    """
    error: ProgramFailedError | None = None
    try:
        yield
    except ProgramFailedError as found:
        error = found
    if not processes.all(error is None):
        raise error or ProgramFailedError("in another process")


def stochastic_pass(
    network: nn.Module, layers: dict[str, Any], images: Tensor, streams: MaskStreams, passes: range
) -> Tensor:
    """Return the probabilities of thinned networks, p_n = f(x; z_n) (eq. 7).

    z_n is Bernoulli(1 - rate) and what is kept is divided by 1 - rate, so means are preserved. The
    result is (passes B K, H, W), pass after pass, the K labels of an image one after another.
    """
    calls = dict.fromkeys(layers, 0)

    def begin(*_: Any) -> None:
        # Window by window, a large image meets one thinned network, not one a window.
        calls.update(dict.fromkeys(layers, 0))

    def drop(name: str, layer: Any, features: Tensor) -> Tensor:
        calls[name] += 1
        shape = streams.shape_of(name, calls[name], layer, features)
        mask = streams.mask(passes, name, calls[name], shape, layer.p)
        thinned: Tensor = features * mask.to(features)
        return thinned

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


def spread(ids: Sequence[str]) -> list[str]:
    """Return ids in an order whose beginning stands for all, whatever order they come in.

    >>> spread(["a", "b", "c", "d", "e"])
    ['a', 'c', 'e', 'b', 'd']
    """
    # Steps of the golden ratio leave no large gap.
    return [ids[i] for i in np.argsort(np.arange(len(ids)) * 0.6180339887 % 1, kind="stable")]


def _worth_taking_apart(
    batches: Iterable[Batch], settings: UncertaintyConfig
) -> tuple[bool, Iterable[Batch]]:
    """Return whether a program is worth being made, and the batches, of which the first are read.

    Only the images decide, so that the same assessment always runs the same way.
    """
    if settings.program == "plain" or not settings.takes_passes:
        return False, batches
    following = iter(batches)
    if following is batches:
        log.info("MC Dropout: the batches can be read once only, so that all passes are plain")
        return False, batches
    # Of two ways to be wrong about N, the one that costs no more than making a program.
    passes = MOST if settings.samples == "auto" else settings.samples
    read: list[Batch] = []
    work = 0
    for batch in following:
        read.append(batch)
        work += batch.images[:, 0].numel() * passes
        if work >= _WORTH_TAKING_APART:
            return True, chain(read, following)
    log.debug("MC Dropout: so few pixels that the network is run whole each pass")
    return False, read

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
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from polyseg.choices import FREE_SCORES, UNCERTAINTIES
from polyseg.difficulty import Region
from polyseg.errors import PolysegError
from polyseg.metrics.rank_stability import FEWEST_JUDGED
from polyseg.metrics.significance import rank_correlation
from polyseg.montecarlo.choose_samples import MOST, choose_samples
from polyseg.montecarlo.dropout_masks import MaskStreams, Sharing
from polyseg.montecarlo.passes import Passes, ProgramFailedError
from polyseg.montecarlo.scores import Measurement, Table, extended
from polyseg.networks.dropout import active_layers, stochastic_layers
from polyseg.networks.inference import LESS_MEMORY, held_in_mode, images_of
from polyseg.networks.networks_by_name import hash_weights
from polyseg.records import Assessment, Batch, Metric, Progress, no_progress
from polyseg.system.memory import Portions, explaining_memory
from polyseg.system.process_group import ALONE, Processes

__all__ = [
    "assess",
    "describe",
    "describe_order",
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
    *,
    samples: int | Literal["auto"] = 20,
    rank_target: float = 0.95,
    metric: Metric = "mutual_information",
    region: Region = "mask",
    boundary_width: int = 3,
    masks: Sharing = "consistent",
    program: Literal["auto", "plain"] = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    epoch: int = 0,
    save_maps: bool = False,
    progress: Progress = no_progress,
    total: int = 0,
    processes: Processes = ALONE,
) -> Assessment:
    """Measure by MC Dropout how unsure the network is about each image.

    The network, its modes and torch's random stream are afterwards as they were before. With
    "consistent" masks pass n drops the same for every image, so the result does not depend on
    batch size or order; "independent" masks differ from image to image, by its id.

    Args:
        network: maps (B, C, H, W) to logits (B, K, H, W); has active dropout layers.
        batches: images, on any device, of one size within a batch. A list, or anything else that
            can be read twice: should the fast passes fail, all is measured anew by plain ones. An
            iterator is read once, by plain passes.
        samples: N, at least 2, since a single pass has nothing to disagree with; standard errors
            and rank stability are NaN below 4. "auto" is the
            least N, from 6 to 100, whose rank stability reaches `rank_target`, judged from the
            first images. It has no meaning for a metric that takes no passes.
        rank_target: in (0, 1).
        metric: the score that is the difficulty; all that are measured are kept. The training loss
            is known to the training alone, which adds it.
        region: the pixels that count, see `select_region`.
        boundary_width: pixels, for region "boundary".
        masks: "consistent" or "independent".
        program: "plain" runs the whole network each pass, and so does "auto" where pixels of all
            images times passes are too few to repay taking it apart.
        precision: of the network in a pass; scores are float32 or wider whatever it is.
        seed: of the masks, together with epoch, pass and layer.
        epoch: the epochs the network was trained for.
        save_maps: keep the pixel maps as well.
        progress: told before each pass and after each batch how many images are done.
        total: the number of images, for progress.
        processes: that share the images; all give the same batches, and all get the whole.

    Raises:
        PolysegError: no active dropout, dropout that cannot be steered, no images, a result that
            is not finite, or too little memory for one image. Where it is too little for a batch
            only, the batch is divided.

    >>> batch = Batch(["a", "b"], torch.rand(2, 1, 8, 8), torch.ones(2, 1, 8, 8))
    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))
    >>> assess(network, [batch], samples=3).difficulty.shape
    (2,)
    """
    free = metric in FREE_SCORES
    if not free and samples != "auto" and samples < 2:
        raise PolysegError(f"uncertainty.samples = {samples}: MC Dropout takes at least 2 passes")
    layers = {} if free else active_layers(network)
    streams = MaskStreams(masks, seed, epoch)

    def attempt(batches: Iterable[Batch], *, take_apart: bool) -> tuple[Table, list[str], int]:
        """Return what is measured, the ids in the order given, and N."""
        wanted = 0 if free else samples
        table, given = Table(save_maps), list[str]()
        divided = processes if wanted != "auto" else ALONE
        passes = Passes(
            network,
            layers,
            streams,
            partial(stochastic_pass, network, layers),
            take_apart=take_apart,
            kind=_KINDS[precision],
        )

        def tell() -> None:
            progress("MC Dropout", min(total, processes.count * len(table.images)), total)

        def measurements() -> Iterator[Measurement]:
            for batch in batches:
                places = range(len(given), len(given) + len(batch.ids))
                given.extend(batch.ids)
                # Those that choose N are measured by all processes, which must agree.
                mine = [
                    i for i, place in enumerate(places) if place % divided.count == divided.rank
                ]
                if mine:
                    alone = len(mine) == len(batch.ids)
                    for part in passes.parts(batch if alone else images_of(batch, mine)):
                        yield Measurement(passes, part, region, boundary_width, save_maps)

        extend = partial(extended, portions=Portions("MC Dropout", LESS_MEMORY), tell=tell)
        each, pilot = measurements(), list[Measurement]()
        if wanted == "auto":
            with _failing_in_all(processes):
                found, pilot = choose_samples(
                    each, rank_target, list(UNCERTAINTIES).index(metric), extend
                )
            chosen: int = processes.from_leader(found)
            divided = processes
        else:
            chosen = wanted
        with _failing_in_all(processes):
            for measurement in extend(chain(pilot, each), chosen):
                table.add(measurement)
                tell()
        return Table.merged(processes.gathered(table)), given, chosen

    whole = explaining_memory("MC Dropout", LESS_MEMORY)
    with held_in_mode(network, training=False), torch.inference_mode(), whole:
        take_apart, first = program == "auto" and not free, batches
        if take_apart and iter(batches) is batches:
            take_apart = False
            log.info("MC Dropout: the batches can be read once only, so that all passes are plain")
        if take_apart:
            take_apart, first = _worth_taking_apart(iter(batches), samples)
        try:
            table, given, count = attempt(first, take_apart=take_apart)
        except ProgramFailedError as error:
            log.warning(
                "MC Dropout: the fast passes failed (%s); all passes are run plainly, "
                "which is slower",
                str(error)[:200],
            )
            table, given, count = attempt(batches, take_apart=False)
    if not table.images:
        raise PolysegError("MC Dropout: there are no images to assess")
    return Assessment(
        weights_sha256=hash_weights(network),
        epoch=epoch,
        samples=count,
        rate=max((layer.p for layer in layers.values()), default=0.0),
        metric=metric,
        region=region,
        masks=masks,
        seed=seed,
        **table.columns(),
    ).in_order(given)


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


def describe(assessment: Assessment) -> str:
    """Return in a line the difficulties of an assessment and how certain they are.

    What is not known, such as a standard error from fewer than 4 passes, is a dash.
    """
    quartiles = "/".join(f"{q:.4f}" for q in np.percentile(assessment.difficulty, (25, 50, 75)))
    text = f"difficulty by {assessment.metric}: quartiles {quartiles}"
    errors = assessment.scores_se.get(assessment.metric)
    if errors is None:
        return text
    error, stability = np.median(errors), assessment.rank_stability[assessment.metric]
    text += f"; {assessment.samples} passes, "
    text += f"standard error {error:.4f}, rank stability {stability:.3f}".replace("nan", "-")
    if assessment.samples < FEWEST_JUDGED:
        text += f" (known from {FEWEST_JUDGED} passes on)"
    return text


def describe_order(assessment: Assessment) -> list[str]:
    """Return a line for each label: how D correlates with 1 - Dice; none without masks."""
    lines = []
    for label in assessment.label_names:
        part = assessment.of_label(label)
        found = rank_correlation(part.difficulty, 1 - part.dice)
        if not np.isfinite(found.interval).all():
            continue
        name = f"D of {label}" if label else "D"
        low, high = found.interval
        verdict = f": {name} is {found.order}" if found.order else ""
        more = "; see `polyseg schedule validity`" if verdict else ""
        lines.append(
            f"Spearman's correlation of {name} with 1 - Dice: {found.value:.2f} (95 % interval "
            f"{low:.2f} to {high:.2f}, {found.images} images){verdict}{more}"
        )
    return lines


def _worth_taking_apart(
    batches: Iterator[Batch], samples: int | Literal["auto"]
) -> tuple[bool, Iterator[Batch]]:
    """Return whether a program is worth being made, and the batches, of which the first are read.

    It goes by the images alone, so that the same assessment always runs the same way.
    """
    # Of two ways to be wrong about N, the one that costs no more than making a program.
    passes = MOST if samples == "auto" else samples
    read: list[Batch] = []
    work = 0
    for batch in batches:
        read.append(batch)
        work += batch.images[:, 0].numel() * passes
        if work >= _WORTH_TAKING_APART:
            return True, chain(read, batches)
    log.debug("MC Dropout: so few pixels that the network is run whole each pass")
    return False, iter(read)

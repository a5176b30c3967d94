"""MC Dropout: N passes with only the active dropout layers on, and what they say of each image.

Layers stay in evaluation mode and each active one multiplies by its mask, drawn from a generator of
its own, so normalisation statistics do not move and torch's random stream is not advanced. Networks
that can be taken apart run as a program that does once what the passes have in common; the plain
pass is the reference that it is checked against, and what all others run.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseg.difficulty import Region, foreground_mean, mean_by_image, select_region
from polyseg.dropout import active_layers, refuse_hidden_dropout, stochastic_layers
from polyseg.errors import PolysegError
from polyseg.graph import UntraceableError
from polyseg.inference import device_of, held_in_mode
from polyseg.networks import SegmentationNetwork, hash_weights
from polyseg.overlap import dice_coefficient
from polyseg.program import Look, Masks, Points, Program
from polyseg.ranks import jackknife_error, passes_needed, rank_stability
from polyseg.records import (
    FREE_METRICS,
    MAPS,
    METRICS,
    Assessment,
    Batch,
    Metric,
    Progress,
    no_progress,
)
from polyseg.seeds import derive_seed
from polyseg.uncertainty import UncertaintyAccumulator, binary_entropy

__all__ = ["assess", "stochastic_layers", "stochastic_pass"]

log = logging.getLogger(__name__)

Sharing = Literal["consistent", "independent"]

_TRIAL_SIDE = 512
_GROUPS, _GROUPS_OF_MAPS = 10, 4
"""Passes are recorded in so many groups, from which errors and stability are judged."""
_FEWEST, _MOST = 6, 100
"""Bounds of N where it is chosen by the passes themselves."""
_PILOT_IMAGES, _PILOT_BYTES = 48, 2**28
_TOLERANCE = 1e-4
"""Of probabilities, between a program and the plain pass; rounding makes far less of it."""
_BYTES_AT_ONCE = 2**24
"""Feature maps of this size stay near a processor's caches."""


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
    seed: int = 0,
    epoch: int = 0,
    save_maps: bool = False,
    progress: Progress = no_progress,
    total: int = 0,
) -> Assessment:
    """Measure by MC Dropout how unsure the network is about each image.

    The network, its modes and torch's random stream are afterwards as they were before. With
    "consistent" masks pass n drops the same for every image, so the result does not depend on
    batch size or order; "independent" masks differ from image to image, by its id.

    Args:
        network: maps (B, C, H, W) to logits (B, K, H, W); has active dropout layers.
        batches: images, on any device, of one size within a batch.
        samples: N, at least 2 (what a single pass disagrees with, nobody knows). "auto" is the
            least N, from 6 to 100, whose rank stability reaches `rank_target`, judged from the
            first images. It has no meaning for a metric that takes no passes.
        rank_target: in (0, 1).
        metric: the score that is the difficulty; all that are measured are kept. The training loss
            is known to the training alone, which adds it.
        region: the pixels that count, see `select_region`.
        boundary_width: pixels, for region "boundary".
        masks: "consistent" or "independent".
        program: "plain" runs the whole network each pass.
        seed: of the masks, together with epoch, pass and layer.
        epoch: the epochs the network was trained for.
        save_maps: keep the pixel maps as well.
        progress: told before each pass and after each batch how many images are done.
        total: the number of images, for progress.

    Raises:
        PolysegError: no active dropout, dropout that cannot be steered, no images, or a result
            that is not finite.

    >>> batch = Batch(["a", "b"], torch.rand(2, 1, 8, 8), torch.ones(2, 1, 8, 8))
    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))
    >>> assess(network, [batch], samples=3).difficulty.shape
    (2,)
    """
    free = metric in FREE_METRICS
    if not free and samples != "auto" and samples < 2:
        raise PolysegError(f"uncertainty.samples = {samples}: MC Dropout takes at least 2 passes")
    layers = {} if free else active_layers(network)
    passes = _Passes(network, layers, masks, seed, epoch, plain=program == "plain" or free)
    table = _Table(save_maps)
    wanted = 0 if free else samples

    def tell() -> None:
        progress("MC Dropout", len(table.images), total)

    given: list[str] = []

    def parts() -> Iterator[Batch]:
        for batch in batches:
            given.extend(batch.ids)
            for part in _by_emptiness(batch):
                yield from passes.parts(part)

    with held_in_mode(network, training=False), torch.inference_mode():
        measurements = (
            _Measurement(passes, part, region, boundary_width, save_maps) for part in parts()
        )
        pilot: list[_Measurement] = []
        if wanted == "auto":
            pilot = _pilot(measurements)
            wanted = _choose_samples(pilot, rank_target, METRICS.index(metric), tell)
        for measurement in chain(pilot, measurements):
            measurement.extend(wanted, tell)
            table.add(measurement)
            tell()
    if not table.images:
        raise PolysegError("MC Dropout: there are no images to assess")
    return Assessment(
        weights_sha256=hash_weights(network),
        epoch=epoch,
        samples=wanted,
        rate=max((layer.p for layer in layers.values()), default=0.0),
        metric=metric,
        region=region,
        masks=masks,
        seed=seed,
        **table.columns(),
    ).in_order(given)


def stochastic_pass(
    network: nn.Module, layers: dict[str, Any], images: Tensor, streams: "_MaskStreams", index: int
) -> Tensor:
    """Return the probabilities of one thinned network, p_n = f(x; z_n) (eq. 7).

    z_n is Bernoulli(1 - rate) and what is kept is divided by 1 - rate, so means are preserved. The
    result is (B K, H, W), the K labels of an image one after another.
    """
    calls = dict.fromkeys(layers, 0)

    def begin(*_: Any) -> None:
        # Window by window, a large image meets one thinned network, not one a window.
        calls.update(dict.fromkeys(layers, 0))

    def drop(name: str, layer: Any, features: Tensor) -> Tensor:
        calls[name] += 1
        shape = streams.shape_of(name, calls[name], layer, features)
        mask = streams.mask(index, name, calls[name], shape, layer.p)
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
        probability: Tensor = network(images).float().sigmoid().flatten(0, 1)
        return probability
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
    """Return in a line how sure an assessment is."""
    quartiles = "/".join(f"{q:.4f}" for q in np.percentile(assessment.difficulty, (25, 50, 75)))
    text = f"difficulty by {assessment.metric}: quartiles {quartiles}"
    errors = assessment.scores_se.get(assessment.metric)
    if errors is None:
        return text
    return (
        f"{text}; {assessment.samples} passes, standard error {np.median(errors):.4f}, "
        f"rank stability {assessment.rank_stability[assessment.metric]:.3f}"
    )


class _Passes:
    """The passes of one network over batches, by its program where it has one."""

    def __init__(
        self,
        network: nn.Module,
        layers: dict[str, Any],
        masks: Sharing,
        seed: int,
        epoch: int,
        *,
        plain: bool,
    ) -> None:
        self.network, self.layers = network, layers
        self.masks, self.seed, self.epoch = masks, seed, epoch
        self.program: Program | None = None
        self.undecided = not plain
        self.device = device_of(network)
        self.checked: set[tuple[Any, ...]] = set()
        self.shapes: dict[tuple[Any, ...], torch.Size] = {}
        self.tried = False

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """Divide a batch as it is fastest."""
        self._prepare(batch.images.to(self.device))
        at_once = len(batch.ids)
        if self.program is not None and self.device.type == "cpu":
            pixels = batch.images.shape[2] * batch.images.shape[3]
            at_once = max(1, _BYTES_AT_ONCE // int(self.program.bytes_a_pixel * pixels))
        for start in range(0, len(batch.ids), at_once):
            chosen = slice(start, start + at_once)
            masks = None if batch.masks is None else batch.masks[chosen]
            yield Batch(batch.ids[chosen], batch.images[chosen], masks, batch.labels)

    def plainly(self, images: Tensor, ids: list[str], index: int) -> Tensor:
        """Return the probabilities of a pass of the whole network, (B K, H, W)."""
        streams = self._streams(images, ids)
        return stochastic_pass(self.network, self.layers, images, streams, index)

    def look(self, images: Tensor, ids: list[str], chosen: Tensor | None) -> "_Sight":
        """Return what gives the probabilities of one pass after another.

        Args:
            images: (B, C, H, W).
            ids: theirs.
            chosen: (B, K, H, W), the only pixels that are wanted; None for all.
        """
        images = images.to(self.device)
        if self.program is not None:
            sight = self._programmed(images, ids, chosen)
            if sight is not None:
                return sight
            log.warning(
                "MC Dropout: the network's program does not give what the network gives; its "
                "passes are run the plain way, which is slower"
            )
            self.program = None
        return _Sight(self, images, ids, chosen, None)

    def mask_inputs(self, images: Tensor, ids: list[str], index: int) -> Masks:
        """Return the masks of a pass by the names of the program's inputs."""
        streams = self._streams(images, ids)
        assert self.program is not None
        return {
            one.node: streams.mask(
                index,
                one.layer,
                one.call,
                self.shapes[(*images.shape[2:], one.layer, one.call)],
                self.layers[one.layer].p,
            ).to(self.device)
            for one in self.program.masks
        }

    def _streams(self, images: Tensor, ids: list[str]) -> "_MaskStreams":
        return _MaskStreams(
            self.masks, self.seed, self.epoch, ids, self.shapes, tuple(images.shape[2:])
        )

    def _prepare(self, images: Tensor) -> None:
        """Try the network, and take it apart, when the first images come."""
        if self.tried:
            return
        self.tried = True
        window = getattr(self.network, "window", None)
        height, width = window.size if window else (_TRIAL_SIDE, _TRIAL_SIDE)
        part = images[:1, :, :height, :width]
        if self.layers:
            refuse_hidden_dropout(self.network, part.repeat(2, 1, 1, 1))
        if not self.undecided:
            return
        try:
            if window is not None:
                raise UntraceableError("it looks at images window by window")
            example, _, _ = _padded(self.network, images)
            core = getattr(self.network, "core", self.network)
            with torch.inference_mode(mode=False), torch.no_grad():
                shared = self.masks == "consistent"
                self.program = Program(core, self.layers, example.clone(), shared=shared)
        except Exception as error:  # A network may be anything, and anything is run the plain way.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.info("MC Dropout: the network is run whole each pass, because %s", reason[:200])

    def _programmed(self, images: Tensor, ids: list[str], chosen: Tensor | None) -> "_Sight | None":
        """Return how the program looks at images; None where it fails, or gives something else."""
        try:
            sight = _Sight(self, images, ids, chosen, self.program)
            key = (*images.shape[2:], *sight.way)
            if key not in self.checked and not self._is_sound(sight):
                return None
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            log.debug("MC Dropout: the program fails: %s", error)
            return None
        self.checked.add(key)
        return sight

    def _is_sound(self, sight: "_Sight") -> bool:
        """Compare a program with the whole network, in a pass and without dropout."""
        # Which first of all tells the masks' shapes.
        plain = self.plainly(sight.images, sight.ids, 0)
        if sight.chosen is not None:
            plain = plain[sight.chosen.flatten(0, 1)]
        whole = _Sight(self, sight.images, sight.ids, None, None)
        pairs = (
            (sight.sample(0), plain.cpu()),
            (sight.without_dropout(), whole.without_dropout()),
        )
        # Weights that diverged are not the program's fault.
        return all(
            found.shape == wanted.shape
            and bool((~wanted.isfinite() | ((found - wanted).abs() <= _TOLERANCE)).all())
            for found, wanted in pairs
        )


class _Sight:
    """A batch on its way through pass after pass."""

    def __init__(
        self,
        passes: _Passes,
        images: Tensor,
        ids: list[str],
        chosen: Tensor | None,
        program: Program | None,
    ) -> None:
        self.passes, self.images, self.ids, self.chosen = passes, images, ids, chosen
        self.inside: Look | None = None
        if program is not None:
            padded, self.top, self.left = _padded(passes.network, images)
            points = None
            if chosen is not None:
                points = Points.of(chosen.to(images.device)).moved(self.top, self.left)
            # Image by image on a processor; all at once they fill an accelerator.
            self.inside = Look(program, padded, points, crop=images.device.type == "cpu")

    @property
    def way(self) -> tuple[bool, bool]:
        """Whether it looks at points, and at windows around them."""
        return (self.chosen is not None, self.inside is not None and self.inside.cropped)

    def sample(self, index: int) -> Tensor:
        """Return the probabilities of a pass, on the CPU: (n,) where pixels are chosen."""
        if self.inside is None:
            whole = self.passes.plainly(self.images, self.ids, index).cpu()
            return whole if self.chosen is None else whole[self.chosen.flatten(0, 1)]
        logits = self.inside(self.passes.mask_inputs(self.images, self.ids, index))
        if self.chosen is None:
            logits = self._cut(logits)
        return logits.float().sigmoid().cpu()

    def without_dropout(self) -> Tensor:
        """Return the probabilities of the network as it is, (B K, H, W) on the CPU."""
        if self.inside is None:
            logits: Tensor = self.passes.network(self.images).flatten(0, 1)
        else:
            kept = self.inside.program.all_kept(self.images)
            logits = self._cut(self.inside.everywhere(kept))
        return logits.float().sigmoid().cpu()

    def _cut(self, logits: Tensor) -> Tensor:
        """Return the logits without what the network was padded by, (B K, H, W)."""
        height, width = self.images.shape[2:]
        rows = slice(self.top, self.top + height)
        return logits[..., rows, self.left : self.left + width].flatten(0, 1)


class _Measurement:
    """What is known of a batch after so many passes."""

    def __init__(
        self,
        passes: _Passes,
        batch: Batch,
        region: Region,
        boundary_width: int,
        save_maps: bool,
    ) -> None:
        self.passes, self.batch = passes, batch
        self.region, self.width = region, boundary_width
        self.truth = None if batch.masks is None else batch.masks.cpu().flatten(0, 1)
        self.known = None if save_maps else self._known_region()
        count = _GROUPS if self.known is not None else _GROUPS_OF_MAPS
        self.groups = [UncertaintyAccumulator() for _ in range(count)]
        self.done = 0
        self.plain: Tensor | None = None

    def extend(self, samples: int, tell: Callable[[], None]) -> None:
        """Run the passes up to so many."""
        if self.plain is not None and samples <= self.done:
            return
        chosen = None
        if self.known is not None:
            chosen = self.known.reshape(len(self.batch.ids), -1, *self.known.shape[1:])
        sight = self.passes.look(self.batch.images, self.batch.ids, chosen)
        if self.plain is None:
            self.plain = sight.without_dropout()
        for index in range(self.done, samples):
            tell()  # Before each pass, so that who listens can end it between any two.
            self.groups[index % len(self.groups)].update(sight.sample(index))
        self.done = samples

    def results(self) -> "_Results":
        """Return the scores of each row, and what tells how sure they are."""
        assert self.plain is not None
        groups = [group for group in self.groups if group.count]
        whole = UncertaintyAccumulator.merged(groups) if groups else None
        if self.known is None:
            mean = self.plain if whole is None else whole.mean
            chosen, fallback = select_region(
                self.region, self.truth, mean, boundary_width=self.width
            )
            groups = [group.at(chosen) for group in groups]
        else:
            chosen, fallback = self.known, torch.zeros(len(self.known), dtype=torch.int8)
        owner = chosen.nonzero()[:, 0].numpy()
        return _Results(self, whole, groups, chosen, fallback, owner)

    def _known_region(self) -> Tensor | None:
        """Return the region, if no pass is needed to know it."""
        if self.truth is None or self.region not in ("mask", "boundary"):
            return None
        nothing = torch.zeros(self.truth.shape)
        chosen, fallback = select_region(
            self.region, self.truth, nothing, boundary_width=self.width
        )
        return None if fallback.any() else chosen


@dataclass(frozen=True)
class _Results:
    """The passes over a batch, pixel by pixel of the region, and in groups."""

    measurement: _Measurement
    whole: UncertaintyAccumulator | None
    groups: list[UncertaintyAccumulator]
    chosen: Tensor
    fallback: Tensor
    owner: NDArray[np.int64]

    def scores(self, record: UncertaintyAccumulator | None = None) -> NDArray[np.float64]:
        """Return the scores from the passes of a record, or from all: (metrics, rows)."""
        record = record or self.everything
        maps = (one.numpy() for one in record.maps().values())
        return np.stack([mean_by_image(one, self.owner, len(self.chosen)) for one in maps])

    @cached_property
    def everything(self) -> UncertaintyAccumulator:
        """All passes at the pixels of the region."""
        return UncertaintyAccumulator.merged(self.groups)

    def errors(self) -> NDArray[np.float64]:
        """Return the standard errors of the scores, (metrics, rows)."""
        left_out = [self.scores(self.everything.without(group)) for group in self.groups]
        return jackknife_error(np.stack(left_out))

    def halves(self) -> NDArray[np.float64]:
        """Return the scores of either half of the passes, (ways of halving, 2, metrics, rows)."""
        middle = len(self.groups) // 2
        ways = []
        for i in range(0, middle, 2):
            half = UncertaintyAccumulator.merged(self.groups[i : i + middle])
            ways.append(np.stack([self.scores(half), self.scores(self.everything.without(half))]))
        return np.stack(ways)

    def deterministic(self) -> dict[str, Tensor]:
        """Return what the pass without dropout says of each row."""
        plain, truth = self.measurement.plain, self.measurement.truth
        assert plain is not None
        dice = torch.full((len(plain),), torch.nan, dtype=torch.float64)
        if truth is not None:
            dice = dice_coefficient(plain >= 0.5, truth)
        entropy = foreground_mean(binary_entropy(plain), self.chosen)
        return {"deterministic_entropy": entropy, "dice": dice}


def _pilot(measurements: Iterator[_Measurement]) -> list[_Measurement]:
    """Take the first of the measurements, as many as judge the ranking of all."""
    taken: list[_Measurement] = []
    images = held = 0
    for measurement in measurements:
        taken.append(measurement)
        images += len(measurement.batch.ids)
        pixels = measurement.batch.images[:, 0].numel()
        if measurement.known is not None:
            pixels = int(measurement.known.sum())
        held += 24 * pixels * len(measurement.groups)
        if images >= _PILOT_IMAGES or held >= _PILOT_BYTES:
            break
    return taken


def _choose_samples(
    pilot: list[_Measurement], target: float, metric: int, tell: Callable[[], None]
) -> int:
    """Return the least N that is expected to rank the images as stably as is wished."""
    samples = _FEWEST
    while pilot:
        for measurement in pilot:
            measurement.extend(samples, tell)
        parts = [measurement.results().halves() for measurement in pilot]
        labels = len(pilot[0].batch.labels)
        stability = _stability_of(_joined(parts)[:, :, metric], labels)
        if not stability < target or samples >= _MOST:  # No number is not below either.
            break
        more = passes_needed(stability, samples, target) if stability > 0 else 2 * samples
        samples = min(max(samples + 1, more), 2 * samples, _MOST)
    return samples


def _joined(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Join the halves of several batches, as many ways of halving as all have."""
    ways = min(len(part) for part in parts)
    return np.concatenate([part[:ways] for part in parts], axis=-1)


def _stability_of(halves: NDArray[np.float64], labels: int) -> float:
    """Return the rank stability within the label that has least of it."""
    several = [rank_stability(halves[..., k::labels]) for k in range(labels)]
    return float(np.min(several))


def _by_emptiness(batch: Batch) -> list[Batch]:
    """Divide a batch into images with foreground of every label, and others.

    The others' foreground is known when all passes are done, which takes all pixels of each.
    """
    if batch.masks is None:
        return [batch]
    full = (batch.masks > 0).flatten(2).any(dim=2).all(dim=1).tolist()
    rows = ([i for i, one in enumerate(full) if one is kind] for kind in (True, False))
    return [
        Batch([batch.ids[i] for i in some], batch.images[some], batch.masks[some], batch.labels)
        for some in rows
        if some
    ]


def _padded(network: nn.Module, images: Tensor) -> tuple[Tensor, int, int]:
    if isinstance(network, SegmentationNetwork):
        return network.padded(images)
    return images, 0, 0


@dataclass(frozen=True)
class _MaskStreams:
    """Masks that belong to (seed, epoch, pass, layer), and to the image if independent.

    They are drawn on the CPU, so every device sees the same masks.
    """

    masks: Sharing
    seed: int
    epoch: int
    ids: list[str]
    shapes: dict[tuple[Any, ...], torch.Size] = field(default_factory=dict)
    """What `shape_of` was asked for, by size of the images, layer and call."""
    size: tuple[int, ...] = ()

    def shape_of(self, name: str, call: int, layer: Any, features: Tensor) -> torch.Size:
        """Return the shape of the mask of (B, C, H, W) features: of single values, or channels."""
        shape = features.shape[1:]
        if not isinstance(layer, nn.Dropout):
            shape = torch.Size((shape[0], *(1 for _ in shape[1:])))
        self.shapes[(*self.size, name, call)] = shape
        return shape

    def mask(self, index: int, name: str, call: int, shape: torch.Size, rate: float) -> Tensor:
        """Return (1, *shape) for all images alike, or (B, *shape): 0 or 1 / (1 - rate)."""
        owners: list[tuple[str, ...]] = (
            [()] if self.masks == "consistent" else [(identity,) for identity in self.ids]
        )
        drawn = torch.stack([self._draw((index, name, call, *owner), shape) for owner in owners])
        return (drawn >= rate).float() / (1 - rate)

    def _draw(self, key: tuple[int | str, ...], shape: torch.Size) -> Tensor:
        seed = derive_seed(self.seed, self.epoch, "mc-dropout", *key)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class _Table:
    """The columns of an assessment, filled batch by batch."""

    save_maps: bool
    images: list[str] = field(default_factory=list)
    labels: tuple[str, ...] = ("",)
    parts: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    halves: list[NDArray[np.float64]] = field(default_factory=list)
    maps: dict[str, list[NDArray[np.float16]]] = field(default_factory=dict)

    def add(self, measurement: _Measurement) -> None:
        """Take in what was measured of a batch."""
        results = measurement.results()
        self.images.extend(measurement.batch.ids)
        self.labels = measurement.batch.labels
        columns = {
            "foreground_pixels": results.chosen.flatten(1).sum(dim=1),
            "fallback": results.fallback,
            **results.deterministic(),
        }
        for name, values in columns.items():
            self._append(name, values.numpy())
        if results.groups:
            for name, values, errors in zip(
                METRICS, results.scores(), results.errors(), strict=True
            ):
                self._append(name, values)
                self._append(f"{name}_se", errors)
            self.halves.append(results.halves())
        self._refuse_what_is_not_finite(measurement.batch)
        if self.save_maps and results.whole is not None:
            for name in MAPS:
                values = getattr(results.whole, name).numpy().astype(np.float16)
                self.maps.setdefault(name, []).extend(values)

    def columns(self) -> dict[str, Any]:
        """Return the fields of the assessment that are one value a row."""
        joined = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        errors = {name: joined.pop(f"{name}_se") for name in METRICS if f"{name}_se" in joined}
        measured = [name for name in (*METRICS, *FREE_METRICS) if name in joined]
        several = len(self.labels)
        stability = {}
        if self.halves:
            together = _joined(self.halves)
            stability = {
                name: _stability_of(together[:, :, i], several) for i, name in enumerate(METRICS)
            }
        return {
            "ids": [identity for identity in self.images for _ in self.labels],
            "labels": list(self.labels) * len(self.images) if any(self.labels) else None,
            "scores": {name: joined.pop(name) for name in measured},
            "scores_se": errors,
            "rank_stability": stability,
            "maps": self.maps,
            **joined,
        }

    def _append(self, name: str, values: NDArray[Any]) -> None:
        self.parts.setdefault(name, []).append(values)

    def _refuse_what_is_not_finite(self, batch: Batch) -> None:
        for name in (*METRICS, "deterministic_entropy"):
            finite = np.isfinite(self.parts[name][-1]) if name in self.parts else np.ones(1)
            if not finite.all():
                bad = batch.ids[int(finite.argmin()) // len(batch.labels)]
                raise PolysegError(
                    f"image {bad}: its {name} is not finite; the weights have probably diverged, "
                    "train with a lower training.learning_rate"
                )

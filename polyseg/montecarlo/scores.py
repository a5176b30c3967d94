"""What the passes say of each image: scores over its region, and how sure those are."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyseg.choices import FREE_SCORES, REGIONS, UNCERTAINTIES, Score, score_names, score_of
from polyseg.difficulty import foreground_mean, mean_by_image
from polyseg.errors import PolysegError
from polyseg.metrics.dice import dice_coefficient
from polyseg.metrics.rank_stability import FEWEST_JUDGED, jackknife_error, rank_stability
from polyseg.montecarlo.passes import Passes
from polyseg.montecarlo.regions import select_region
from polyseg.networks.inference import images_of, shown
from polyseg.records import Batch, Metric
from polyseg.registry import is_own
from polyseg.system.memory import Portions
from polyseg.uncertainty import UncertaintyAccumulator

_GROUPS, _GROUPS_OF_MAPS = 10, 4
"""Passes are recorded in so many groups, from which errors and stability are judged."""


@dataclass(frozen=True)
class Wanted:
    """What is measured of the images."""

    region: str
    boundary_width: int = 3
    save_maps: bool = False
    also: tuple[str, ...] = ()
    """Names of scores to measure besides `UNCERTAINTIES` and the free ones of the prediction."""

    @property
    def streamed(self) -> tuple[Metric, ...]:
        """The scores that are judged from parts of the passes."""
        whole = (name for name in self.also if score_of(name).of in ("moments", "pass"))
        return (*UNCERTAINTIES, *whole)

    def also_of(self, kind: str) -> dict[Metric, Score]:
        """Return the rows of a kind among those to measure besides."""
        return {name: score_of(name) for name in self.also if score_of(name).of == kind}

    @property
    def whole_frame(self) -> bool:
        """Whether every pixel counts, whatever the region."""
        return self.save_maps or any(score_of(name).of != "mask" for name in self.also)


@dataclass
class Group:
    """The record of some of the passes over a batch."""

    pixels: UncertaintyAccumulator = field(default_factory=UncertaintyAccumulator)
    """At the pixels that scores are averaged over."""
    frame: UncertaintyAccumulator | None = None
    """At all pixels, where a score needs them."""
    sums: dict[Metric, Tensor] = field(default_factory=dict)
    """Sums over the passes of scores of a pass, (rows,) each."""

    @property
    def count(self) -> int:
        """Number of passes."""
        return self.pixels.count

    @classmethod
    def merged(cls, groups: "Sequence[Group]") -> "Group":
        """Return the record of the passes of several groups."""
        frames = [group.frame for group in groups if group.frame is not None]
        return cls(
            UncertaintyAccumulator.merged([group.pixels for group in groups]),
            UncertaintyAccumulator.merged(frames) if frames else None,
            {
                name: torch.stack([group.sums[name] for group in groups]).sum(dim=0)
                for name in groups[0].sums
            },
        )

    def without(self, part: "Group") -> "Group":
        """Return the record of the passes that `part`, of some of them, did not take in."""
        frame = None
        if self.frame is not None and part.frame is not None:
            frame = self.frame.without(part.frame)
        return Group(
            self.pixels.without(part.pixels),
            frame,
            {name: values - part.sums[name] for name, values in self.sums.items()},
        )


class Measurement:
    """What is known of a batch after so many passes."""

    def __init__(self, passes: Passes, batch: Batch, wanted: Wanted) -> None:
        self.passes, self.batch, self.wanted = passes, batch, wanted
        self.truth = None if batch.masks is None else batch.masks.cpu().flatten(0, 1)
        self._refuse_missing_masks()
        self.known = None if wanted.whole_frame else self._known_region()
        count = _GROUPS if self.known is not None else _GROUPS_OF_MAPS
        self.groups = [UncertaintyAccumulator() for _ in range(count)]
        self.sums: list[dict[Metric, Tensor]] = [{} for _ in range(count)]
        self.pairs = {name: row.resolve()() for name, row in wanted.also_of("passes").items()}
        self.done = 0
        self.plain: Tensor | None = None

    def extend(self, samples: int, tell: Callable[[], None]) -> None:
        """Run the passes up to so many."""
        if self.plain is not None and samples <= self.done:
            return
        chosen = None
        if self.known is not None:
            chosen = self.known.reshape(len(self.batch.ids), -1, *self.known.shape[1:])
        passes = self.passes.over(self.batch.images, self.batch.ids, chosen)
        if self.plain is None:
            self.plain = passes.without_dropout()
        each = passes.samples(range(self.done, samples))
        for index in range(self.done, samples):
            tell()  # Before each pass, so that who listens can end it between those that run apart.
            self._take_in(next(each), index % len(self.groups))
        self.done = samples

    def _take_in(self, sample: Tensor, group: int) -> None:
        self.groups[group].update(sample)
        for name, row in self.wanted.also_of("pass").items():
            found = row.resolve()(sample, self.mask).double()
            self.sums[group][name] = found + self.sums[group].get(name, 0)
        for pairs in self.pairs.values():
            pairs.update(sample)

    @cached_property
    def mask(self) -> Tensor | None:
        """The masks, (rows, H, W) bool; None without any."""
        return None if self.truth is None else self.truth > 0

    def _refuse_missing_masks(self) -> None:
        needing = [name for name in self.wanted.also if score_of(name).needs_mask]
        if self.truth is None and needing:
            raise PolysegError(
                f"{needing[0]}: is measured against the mask, and image {self.batch.ids[0]} has "
                "none; choose another score"
            )

    def of(self, rows: slice) -> "Measurement":
        """Return this, or where fewer images are wanted a new one of those, without a pass yet."""
        if rows == slice(0, len(self.batch.ids)):
            return self
        part = images_of(self.batch, rows)
        return Measurement(self.passes, part, self.wanted)

    @property
    def held(self) -> int:
        """About how many bytes its records take."""
        pixels = self.batch.images[:, 0].numel()
        if self.known is not None:
            pixels = int(self.known.sum())
        pairs = pixels * self.done // 8 if self.pairs else 0
        return 24 * pixels * len(self.groups) + pairs

    def results(self) -> "Results":
        """Return the scores of each row, and what tells how sure they are."""
        assert self.plain is not None
        records = [record for record in self.groups if record.count]
        whole = UncertaintyAccumulator.merged(records) if records else None
        if self.known is None:
            mean = self.plain if whole is None else whole.mean
            chosen, fallback = select_region(
                self.wanted.region, self.truth, mean, boundary_width=self.wanted.boundary_width
            )
            groups = [Group(record.at(chosen)) for record in records]
        else:
            chosen, fallback = self.known, torch.zeros(len(self.known), dtype=torch.int8)
            groups = [Group(record) for record in records]
        for group, record, sums in zip(groups, records, self.sums, strict=False):
            group.frame = record if self.wanted.also_of("moments") else None
            group.sums = sums
        owner = chosen.nonzero()[:, 0].numpy()
        return Results(self, whole, groups, chosen, fallback, owner)

    def _known_region(self) -> Tensor | None:
        """Return the region, if no pass is needed to know it."""
        region, width = self.wanted.region, self.wanted.boundary_width
        if self.truth is None or not REGIONS[region].of_mask:
            return None
        nothing = torch.zeros(self.truth.shape)
        chosen, fallback = select_region(region, self.truth, nothing, boundary_width=width)
        return None if fallback.any() else chosen


def extended(
    measurements: Iterable[Measurement], samples: int, portions: Portions, tell: Callable[[], None]
) -> Iterator[Measurement]:
    """Yield measurements with their passes run up to so many, of as many images as memory allows.

    Those that do not fit are begun anew in parts, which see the same masks.
    """
    for one in measurements:
        extend = partial(_extend, one, samples, tell)
        yield from portions.run(len(one.batch.ids), extend, shown(one.batch))


def _extend(whole: Measurement, samples: int, tell: Callable[[], None], rows: slice) -> Measurement:
    part = whole.of(rows)
    part.extend(samples, tell)
    return part


@dataclass(frozen=True)
class Results:
    """The passes over a batch, pixel by pixel of the region, and in groups."""

    measurement: Measurement
    whole: UncertaintyAccumulator | None
    groups: list[Group]
    chosen: Tensor
    fallback: Tensor
    owner: NDArray[np.int64]

    def scores(self, record: Group | None = None) -> NDArray[np.float64]:
        """Return the scores from the passes of a record, or from all: (metrics, rows)."""
        record = record or self.everything
        maps = (one.numpy() for one in record.pixels.maps().values())
        found = [mean_by_image(one, self.owner, len(self.chosen)) for one in maps]
        measured, also = self.measurement, self.measurement.wanted.also
        for row in (score_of(name) for name in also):
            if row.of == "moments" and record.frame is not None:
                found.append(row.resolve()(record.frame.moments, measured.mask).double().numpy())
            elif row.of == "pass":
                found.append((record.sums[row.name] / record.count).numpy())
        return np.stack(found)

    @cached_property
    def everything(self) -> Group:
        """All passes."""
        return Group.merged(self.groups)

    def errors(self) -> NDArray[np.float64]:
        """Return the standard errors of the scores, (metrics, rows); NaN from too few passes."""
        if self.everything.count < FEWEST_JUDGED:
            return np.full_like(self.scores(), np.nan)
        left_out = [self.scores(self.everything.without(group)) for group in self.groups]
        return jackknife_error(np.stack(left_out))

    def halves(self) -> NDArray[np.float64]:
        """Return the scores of either half of the passes, (ways of halving, 2, metrics, rows).

        NaN from too few passes.
        """
        if self.everything.count < FEWEST_JUDGED:
            return np.full((1, 2, *self.scores().shape), np.nan)
        middle = len(self.groups) // 2
        ways = []
        for i in range(0, middle, 2):
            half = Group.merged(self.groups[i : i + middle])
            ways.append(np.stack([self.scores(half), self.scores(self.everything.without(half))]))
        return np.stack(ways)

    def deterministic(self) -> dict[str, Tensor]:
        """Return what the pass without dropout, and the masks, say of each row."""
        plain, truth = self.measurement.plain, self.measurement.truth
        assert plain is not None
        found = {
            name: foreground_mean(row.resolve()(plain), self.chosen)
            for name, row in FREE_SCORES.items()
            if row.function and row.of == "pixels"
        }
        found |= {name: one.value for name, one in self.measurement.pairs.items()}
        dice = torch.full((len(plain),), torch.nan, dtype=torch.float64)
        if truth is None:
            return {**found, "dice": dice}
        size = (truth > 0).flatten(1).sum(dim=1)
        dice = dice_coefficient(plain >= 0.5, truth)
        for name, row in self.measurement.wanted.also_of("mask").items():
            found[name] = torch.from_numpy(row.resolve()(size.numpy()))
        return {**found, "dice": dice, "mask_pixels": size}


@dataclass
class Table:
    """The columns of an assessment, filled batch by batch."""

    wanted: Wanted
    images: list[str] = field(default_factory=list)
    labels: tuple[str, ...] = ("",)
    parts: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    halves: list[NDArray[np.float64]] = field(default_factory=list)
    maps: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)

    def add(self, measurement: Measurement) -> None:
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
                self.wanted.streamed, results.scores(), results.errors(), strict=True
            ):
                self._append(name, values)
                self._append(f"{name}_se", errors)
            self.halves.append(results.halves())
        self._refuse_what_is_not_finite(measurement.batch)
        if self.wanted.save_maps and results.whole is not None:
            for name, values in {"mean": results.whole.mean, **results.whole.maps()}.items():
                self.maps.setdefault(name, []).extend(values.numpy().astype(np.float32))

    @classmethod
    def merged(cls, tables: Sequence["Table"]) -> "Table":
        """Return what several tables hold; of an image that is in several, the first one's row."""
        merged = cls(tables[0].wanted)
        seen: set[str] = set()
        for table in tables:
            new = [i for i, identity in enumerate(table.images) if identity not in seen]
            if not new:
                continue
            rows = [i * len(table.labels) + k for i in new for k in range(len(table.labels))]
            merged.labels = table.labels
            merged.images += [table.images[i] for i in new]
            for name, parts in table.parts.items():
                values = np.concatenate(parts)
                if len(values) == len(table.images) * len(table.labels):  # Some have no mask.
                    merged._append(name, values[rows])
            if table.halves:
                merged.halves.append(join_halves(table.halves)[..., rows])
            for name, maps in table.maps.items():
                merged.maps.setdefault(name, []).extend(maps[row] for row in rows)
            seen.update(table.images)
        return merged

    def columns(self) -> dict[str, Any]:
        """Return the fields of the assessment that are one value a row."""
        found: dict[str, Any] = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        if len(found.get("mask_pixels", ())) < len(found["dice"]):
            found["mask_pixels"] = None  # Some images have no mask.
        streamed = self.wanted.streamed
        errors = {name: found.pop(f"{name}_se") for name in streamed if f"{name}_se" in found}
        measured = [name for name in self._names if name in found]
        return {
            "ids": [identity for identity in self.images for _ in self.labels],
            "labels": list(self.labels) * len(self.images) if any(self.labels) else None,
            "scores": {name: found.pop(name) for name in measured},
            "scores_se": errors,
            "rank_stability": self._stability(),
            "maps": self.maps,
            **found,
        }

    def _stability(self) -> dict[Metric, float]:
        if not self.halves:
            return {}
        together, several = join_halves(self.halves), len(self.labels)
        return {
            name: stability_of(together[:, :, i], several)
            for i, name in enumerate(self.wanted.streamed)
        }

    @property
    def _names(self) -> list[Metric]:
        """The scores that may be measured."""
        return list(dict.fromkeys([*score_names(), *self.wanted.also]))

    def _append(self, name: str, values: NDArray[Any]) -> None:
        self.parts.setdefault(name, []).append(values)

    def _refuse_what_is_not_finite(self, batch: Batch) -> None:
        for name in self._names:
            finite = np.isfinite(self.parts[name][-1]) if name in self.parts else np.ones(1)
            if not finite.all():
                bad = batch.ids[int(finite.argmin()) // len(batch.labels)]
                if is_own(name):
                    raise PolysegError(f"image {bad}: {name} returned a number that is not finite")
                raise PolysegError(
                    f"image {bad}: its {name} is not finite; the weights have probably diverged, "
                    "train with a lower training.learning_rate"
                )


def join_halves(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Join the halves of several batches, as many ways of halving as all have."""
    ways = min(len(part) for part in parts)
    return np.concatenate([part[:ways] for part in parts], axis=-1)


def stability_of(halves: NDArray[np.float64], labels: int) -> float:
    """Return the rank stability within the label that has least of it."""
    several = [rank_stability(halves[..., k::labels]) for k in range(labels)]
    return float(np.min(several))

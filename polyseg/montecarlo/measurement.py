"""Compute the scores of each image from passes, their standard errors and rank stability.

The scores are rows of `choices` (`UNCERTAINTIES`, `WHOLE_SCORES` and others), not of this module.
"""

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
from polyseg.metrics.rank_stability import FEWEST_PASSES, jackknife_error, rank_stability
from polyseg.montecarlo.passes import Passes
from polyseg.montecarlo.regions import select_region
from polyseg.networks.inference import images_of, size_text
from polyseg.records import Batch, ScoreName
from polyseg.registry import is_own
from polyseg.system.memory import Portions
from polyseg.uncertainty import UncertaintyAccumulator

_GROUPS, _GROUPS_OF_MAPS = 10, 4
"""Numbers of groups of passes, for errors and stability, with a known region and without."""


@dataclass(frozen=True)
class Wanted:
    """The scores to compute."""

    region: str
    boundary_width: int = 3
    save_maps: bool = False
    also: tuple[str, ...] = ()
    """Names of scores to compute in addition to `UNCERTAINTIES` and those without passes."""

    @property
    def streamed(self) -> tuple[ScoreName, ...]:
        """The scores that have standard errors, computed from parts of the passes."""
        whole = (name for name in self.also if score_of(name).of in ("moments", "pass"))
        return (*UNCERTAINTIES, *whole)

    def also_of(self, kind: str) -> dict[ScoreName, Score]:
        """Return the rows of the additional scores that are functions of `kind`."""
        return {name: score_of(name) for name in self.also if score_of(name).of == kind}

    @property
    def whole_frame(self) -> bool:
        """Whether all pixels are needed, for any region."""
        return self.save_maps or any(score_of(name).of != "mask" for name in self.also)


@dataclass
class Group:
    """The record of some of the passes over a batch."""

    pixels: UncertaintyAccumulator = field(default_factory=UncertaintyAccumulator)
    """Record of the pixels over which scores are averaged."""
    frame: UncertaintyAccumulator | None = None
    """Record of all pixels, if a score needs them."""
    sums: dict[ScoreName, Tensor] = field(default_factory=dict)
    """Sums over the passes of scores of a pass, (rows,) each."""

    @property
    def count(self) -> int:
        """Number of passes."""
        return self.pixels.count

    @classmethod
    def merged(cls, groups: "Sequence[Group]") -> "Group":
        """Return the record of the passes of several groups."""
        frames = [group.frame for group in groups if group.frame is not None]
        sums = {name: [group.sums[name] for group in groups] for name in groups[0].sums}
        return cls(
            UncertaintyAccumulator.merged([group.pixels for group in groups]),
            UncertaintyAccumulator.merged(frames) if frames else None,
            {name: torch.stack(each).sum(dim=0) for name, each in sums.items()},
        )

    def without(self, part: "Group") -> "Group":
        """Return the record without the passes of `part`, which holds some of them."""
        frame = None
        if self.frame is not None and part.frame is not None:
            frame = self.frame.without(part.frame)
        return Group(
            self.pixels.without(part.pixels),
            frame,
            {name: values - part.sums[name] for name, values in self.sums.items()},
        )


class Measurement:
    """The record of a batch after some passes."""

    def __init__(self, passes: Passes, batch: Batch, wanted: Wanted) -> None:
        self.passes, self.batch, self.wanted = passes, batch, wanted
        self.truth = None if batch.masks is None else batch.masks.cpu().flatten(0, 1)
        needing = [name for name in wanted.also if score_of(name).needs_mask]
        if self.truth is None and needing:
            raise PolysegError(
                f"{needing[0]}: needs masks, and image {batch.ids[0]} has none; choose "
                "another score"
            )
        self.known = None if wanted.whole_frame else self._known_region()
        count = _GROUPS if self.known is not None else _GROUPS_OF_MAPS
        self.groups = [Group() for _ in range(count)]
        self.pairs = {name: row.resolve()() for name, row in wanted.also_of("passes").items()}
        self.done = 0
        self.plain: Tensor | None = None

    def extend(self, samples: int, report: Callable[[], None]) -> None:
        """Run further passes, up to `samples` in all, and call `report` before each."""
        if self.plain is not None and samples <= self.done:
            return
        chosen = self.known
        if chosen is not None:
            chosen = chosen.reshape(len(self.batch.ids), -1, *chosen.shape[1:])
        passes = self.passes.over(self.batch.images, self.batch.ids, chosen)
        if self.plain is None:
            self.plain = passes.without_dropout
        each = passes.samples(range(self.done, samples))
        for index in range(self.done, samples):
            report()
            self._add(next(each), self.groups[index % len(self.groups)])
        self.done = samples

    def _add(self, sample: Tensor, group: Group) -> None:
        group.pixels.update(sample)
        for name, row in self.wanted.also_of("pass").items():
            found = row.resolve()(sample, self.mask).double()
            group.sums[name] = found + group.sums.get(name, 0)
        for pairs in self.pairs.values():
            pairs.update(sample)

    @cached_property
    def mask(self) -> Tensor | None:
        """The masks, (rows, H, W) bool; None without any."""
        return None if self.truth is None else self.truth > 0

    def of(self, rows: slice) -> "Measurement":
        """Return this record if it has just these images, else a new one without passes."""
        if rows == slice(0, len(self.batch.ids)):
            return self
        return Measurement(self.passes, images_of(self.batch, rows), self.wanted)

    @property
    def held(self) -> int:
        """Approximate size of the record, in bytes."""
        known = self.known
        pixels = self.batch.images[:, 0].numel() if known is None else int(known.sum())
        pairs = pixels * self.done // 8 if self.pairs else 0
        return 24 * pixels * len(self.groups) + pairs

    def _known_region(self) -> Tensor | None:
        """Return the region, or None if it depends on the passes."""
        region, width = self.wanted.region, self.wanted.boundary_width
        if self.truth is None or not REGIONS[region].of_mask:
            return None
        nothing = torch.zeros(self.truth.shape)
        chosen, fallback = select_region(region, self.truth, nothing, boundary_width=width)
        return None if fallback.any() else chosen


def extended(
    measurements: Iterable[Measurement],
    samples: int,
    portions: Portions,
    report: Callable[[], None],
) -> Iterator[Measurement]:
    """Yield measurements with `samples` passes, of as many images at once as memory allows.

    Those that do not fit are started again in parts, with the same masks.
    """

    def extend(whole: Measurement, rows: slice) -> Measurement:
        part = whole.of(rows)
        part.extend(samples, report)
        return part

    for one in measurements:
        yield from portions.run(len(one.batch.ids), partial(extend, one), size_text(one.batch))


class Results:
    """The results of all passes over a batch."""

    def __init__(self, measurement: Measurement) -> None:
        assert measurement.plain is not None
        self.measurement, wanted = measurement, measurement.wanted
        groups = [group for group in measurement.groups if group.count]
        records = [group.pixels for group in groups]
        self.whole = UncertaintyAccumulator.merged(records) if records else None
        if measurement.known is None:
            mean = measurement.plain if self.whole is None else self.whole.mean
            self.chosen, self.fallback = select_region(
                wanted.region, measurement.truth, mean, boundary_width=wanted.boundary_width
            )
            framed = wanted.also_of("moments")
            groups = [
                Group(one.pixels.at(self.chosen), one.pixels if framed else None, one.sums)
                for one in groups
            ]
        else:
            self.chosen = measurement.known
            self.fallback = torch.zeros(len(self.chosen), dtype=torch.int8)
        self.groups = groups
        self.owner = self.chosen.nonzero()[:, 0].numpy()

    def scores(self, record: Group | None = None) -> NDArray[np.float64]:
        """Return the scores from the passes of a group, or from all passes, (metrics, rows)."""
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
        """The group of all passes."""
        return Group.merged(self.groups)

    def errors(self) -> NDArray[np.float64]:
        """Return the standard errors of the scores, (metrics, rows); NaN for too few passes."""
        if self.everything.count < FEWEST_PASSES:
            return np.full_like(self.scores(), np.nan)
        left_out = [self.scores(self.everything.without(group)) for group in self.groups]
        return jackknife_error(np.stack(left_out))

    def halves(self) -> NDArray[np.float64]:
        """Return the scores of both halves of the passes, (ways of halving, 2, metrics, rows).

        They are NaN for too few passes.
        """
        if self.everything.count < FEWEST_PASSES:
            return np.full((1, 2, *self.scores().shape), np.nan)
        middle = len(self.groups) // 2
        ways = []
        for i in range(0, middle, 2):
            half = Group.merged(self.groups[i : i + middle])
            ways.append(np.stack([self.scores(half), self.scores(self.everything.without(half))]))
        return np.stack(ways)

    def deterministic(self) -> dict[str, Tensor]:
        """Return the scores of each row that need no samples, with its Dice and mask size."""
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
class ScoreTable:
    """The columns of an assessment, filled batch by batch."""

    wanted: Wanted
    images: list[str] = field(default_factory=list)
    labels: tuple[str, ...] = ("",)
    parts: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    halves: list[NDArray[np.float64]] = field(default_factory=list)
    maps: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)

    def add(self, measurement: Measurement) -> None:
        """Add the results of a batch."""
        results = Results(measurement)
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
        self._refuse_nonfinite(measurement.batch)
        if self.wanted.save_maps and results.whole is not None:
            for name, values in {"mean": results.whole.mean, **results.whole.maps()}.items():
                self.maps.setdefault(name, []).extend(values.numpy().astype(np.float32))

    @classmethod
    def merged(cls, tables: Sequence["ScoreTable"]) -> "ScoreTable":
        """Return a table of all images; one that is in several has the row of the first."""
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
        """Return the columns as arguments of an `Assessment`."""
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

    def _stability(self) -> dict[ScoreName, float]:
        if not self.halves:
            return {}
        by_score = np.moveaxis(join_halves(self.halves), 2, 0)
        each = zip(self.wanted.streamed, by_score, strict=True)
        return {name: stability_of(halves, len(self.labels)) for name, halves in each}

    @property
    def _names(self) -> list[ScoreName]:
        """The names of all scores that may have been computed."""
        return list(dict.fromkeys([*score_names(), *self.wanted.also]))

    def _append(self, name: str, values: NDArray[Any]) -> None:
        self.parts.setdefault(name, []).append(values)

    def _refuse_nonfinite(self, batch: Batch) -> None:
        for name in self._names:
            finite = np.isfinite(self.parts[name][-1]) if name in self.parts else np.ones(1)
            if not finite.all():
                bad = batch.ids[int(finite.argmin()) // len(batch.labels)]
                if is_own(name):
                    raise PolysegError(f"image {bad}: {name} returned a number that is not finite")
                raise PolysegError(
                    f"image {bad}: its {name} is not finite, probably because the weights have "
                    "diverged; train with a lower training.learning_rate"
                )


def join_halves(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Join the halves of several batches, with the ways of halving that all have."""
    ways = min(len(part) for part in parts)
    return np.concatenate([part[:ways] for part in parts], axis=-1)


def stability_of(halves: NDArray[np.float64], labels: int) -> float:
    """Return the smallest rank stability of a label."""
    several = [rank_stability(halves[..., k::labels]) for k in range(labels)]
    return float(np.min(several))

"""What the passes say of each image: scores over its region, and how sure those are."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyseg.choices import FREE_SCORES, REGIONS, UNCERTAINTIES
from polyseg.difficulty import foreground_mean, mean_by_image
from polyseg.errors import PolysegError
from polyseg.metrics.dice import dice_coefficient
from polyseg.metrics.rank_stability import FEWEST_JUDGED, jackknife_error, rank_stability
from polyseg.montecarlo.passes import Passes
from polyseg.montecarlo.regions import select_region
from polyseg.networks.inference import images_of, shown
from polyseg.records import Batch, Metric
from polyseg.system.memory import Portions
from polyseg.uncertainty import UncertaintyAccumulator

_GROUPS, _GROUPS_OF_MAPS = 10, 4
"""Passes are recorded in so many groups, from which errors and stability are judged."""


class Measurement:
    """What is known of a batch after so many passes."""

    def __init__(
        self,
        passes: Passes,
        batch: Batch,
        region: str,
        boundary_width: int,
        save_maps: bool,
    ) -> None:
        self.passes, self.batch = passes, batch
        self.region, self.width, self.save_maps = region, boundary_width, save_maps
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
        passes = self.passes.over(self.batch.images, self.batch.ids, chosen)
        if self.plain is None:
            self.plain = passes.without_dropout()
        each = passes.samples(range(self.done, samples))
        for index in range(self.done, samples):
            tell()  # Before each pass, so that who listens can end it between those that run apart.
            self.groups[index % len(self.groups)].update(next(each))
        self.done = samples

    def of(self, rows: slice) -> "Measurement":
        """Return this, or where fewer images are wanted a new one of those, without a pass yet."""
        if rows == slice(0, len(self.batch.ids)):
            return self
        part = images_of(self.batch, rows)
        return Measurement(self.passes, part, self.region, self.width, self.save_maps)

    @property
    def held(self) -> int:
        """About how many bytes its records take."""
        pixels = self.batch.images[:, 0].numel()
        if self.known is not None:
            pixels = int(self.known.sum())
        return 24 * pixels * len(self.groups)

    def results(self) -> "Results":
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
        return Results(self, whole, groups, chosen, fallback, owner)

    def _known_region(self) -> Tensor | None:
        """Return the region, if no pass is needed to know it."""
        if self.truth is None or not REGIONS[self.region].of_mask:
            return None
        nothing = torch.zeros(self.truth.shape)
        chosen, fallback = select_region(
            self.region, self.truth, nothing, boundary_width=self.width
        )
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
            half = UncertaintyAccumulator.merged(self.groups[i : i + middle])
            ways.append(np.stack([self.scores(half), self.scores(self.everything.without(half))]))
        return np.stack(ways)

    def deterministic(self) -> dict[str, Tensor]:
        """Return what the pass without dropout, and the masks, say of each row."""
        plain, truth = self.measurement.plain, self.measurement.truth
        assert plain is not None
        found = {
            name: foreground_mean(row.resolve()(plain), self.chosen)
            for name, row in FREE_SCORES.items()
            if row.function
        }
        dice = torch.full((len(plain),), torch.nan, dtype=torch.float64)
        if truth is None:
            return {**found, "dice": dice}
        size = (truth > 0).flatten(1).sum(dim=1)
        dice = dice_coefficient(plain >= 0.5, truth)
        return {**found, "dice": dice, "mask_pixels": size}


@dataclass
class Table:
    """The columns of an assessment, filled batch by batch."""

    save_maps: bool
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
                UNCERTAINTIES, results.scores(), results.errors(), strict=True
            ):
                self._append(name, values)
                self._append(f"{name}_se", errors)
            self.halves.append(results.halves())
        self._refuse_what_is_not_finite(measurement.batch)
        if self.save_maps and results.whole is not None:
            for name, values in {"mean": results.whole.mean, **results.whole.maps()}.items():
                self.maps.setdefault(name, []).extend(values.numpy().astype(np.float32))

    @classmethod
    def merged(cls, tables: Sequence["Table"]) -> "Table":
        """Return what several tables hold; of an image that is in several, the first one's row."""
        merged = cls(tables[0].save_maps)
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
        errors = {name: found.pop(f"{name}_se") for name in UNCERTAINTIES if f"{name}_se" in found}
        measured = [name for name in (*UNCERTAINTIES, *FREE_SCORES) if name in found]
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
            name: stability_of(together[:, :, i], several) for i, name in enumerate(UNCERTAINTIES)
        }

    def _append(self, name: str, values: NDArray[Any]) -> None:
        self.parts.setdefault(name, []).append(values)

    def _refuse_what_is_not_finite(self, batch: Batch) -> None:
        for name in (*UNCERTAINTIES, *FREE_SCORES):
            finite = np.isfinite(self.parts[name][-1]) if name in self.parts else np.ones(1)
            if not finite.all():
                bad = batch.ids[int(finite.argmin()) // len(batch.labels)]
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

"""Compute the epsilon of each image: a constant before the first assessment, then by difficulty.

With several labels each image has one epsilon for each label, and eq. 11 compares difficulties
within a label, because labels are separate binary tasks and one may be harder in all images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyseg.choices import REDUCTIONS, map_of
from polyseg.config import ControlConfig
from polyseg.difficulty import percentile_and_sigma
from polyseg.records import Assessment, Difficulties, Schedule


class Adapted(NamedTuple):
    """The epsilons of a batch, and the statistics of eq. 11 that they were computed with."""

    epsilon: NDArray[np.float64]
    """Epsilons, (n,), or (n K,) with the labels of an image next to each other."""
    statistics: NDArray[np.float64] | None
    """D_pct and sigma_D of each label, (K, 2); None if epsilon is the constant."""


@dataclass(frozen=True)
class EpsilonControl:
    """The computation of epsilons between two assessments.

    >>> EpsilonControl(ControlConfig(), constant=0.0).epsilon(["a", "b"])
    array([0., 0.])
    """

    config: ControlConfig
    constant: float
    """Epsilon before the first assessment."""
    assessment: Assessment | Difficulties | None = None
    labels: int = 1
    """Number K of labels."""

    def epsilon(self, ids: Sequence[str]) -> NDArray[np.float64]:
        """Return the epsilons of the images of a batch, as `adapt` does."""
        return self.adapt(ids).epsilon

    def adapt(self, ids: Sequence[str]) -> Adapted:
        """Return the epsilons of the images of a batch, and their statistics.

        "batch" statistics normalise these images together, "dataset" statistics all assessed ones.
        """
        if self.assessment is None:
            return Adapted(np.full(len(ids) * self.labels, self.constant), None)
        rows = [row for identity in ids for row in self._rows[identity]]
        if self.config.statistics == "batch":
            return self._from_difficulty(self.assessment.difficulty[rows])
        return Adapted(self.over_data_set[rows], self._data_set.statistics)

    @property
    def over_data_set(self) -> NDArray[np.float64]:
        """The epsilons of all assessed images, with the statistics of all of them."""
        return self._data_set.epsilon

    @cached_property
    def _data_set(self) -> Adapted:
        assert self.assessment is not None
        return self._from_difficulty(self.assessment.difficulty)

    def _from_difficulty(self, difficulty: NDArray[np.float64]) -> Adapted:
        columns = difficulty.reshape(-1, self.labels)
        statistics = np.array(
            [percentile_and_sigma(column, self.config.percentile) for column in columns.T]
        )
        epsilon = [
            epsilon_of(normalised_by_setting(column, found, self.config), self.config)
            for column, found in zip(columns.T, statistics, strict=True)
        ]
        return Adapted(np.stack(epsilon, axis=1).ravel(), statistics)

    @cached_property
    def _rows(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for i, identity in enumerate(self.assessment.ids if self.assessment else []):
            rows.setdefault(identity, []).append(i)
        return rows


def normalised_by_setting(
    difficulty: NDArray[np.float64], statistics: NDArray[np.float64], config: ControlConfig
) -> NDArray[np.float64]:
    """Return the normalised difficulties, (n,), of images that are normalised together.

    `statistics` are their D_pct and sigma_D; `config.reduction` names the normalisation.

    >>> config = ControlConfig(delta=1e-12)
    >>> normalised_by_setting(np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0]), config)
    array([-1.,  0.,  1.])
    """
    normalised: NDArray[np.float64] = REDUCTIONS[config.reduction].resolve()(
        difficulty, *statistics, config.delta
    )
    return normalised


def epsilon_of(normalised: NDArray[np.float64], config: ControlConfig) -> NDArray[np.float64]:
    """Return the epsilons, (n,), of images of one label that were normalised together.

    >>> epsilon_of(np.zeros(2), ControlConfig(map="weight"))
    array([0., 0.])
    """
    epsilon: NDArray[np.float64] = map_of(config.map).resolve()(
        normalised, config.epsilon_min, config.epsilon_max, config.sensitivity
    )
    return epsilon


@dataclass
class Recorder:
    """The columns of a schedule, which grow by one epoch at a time.

    >>> recorder = Recorder(["a", "b"])
    >>> recorder.add([(["b", "a"], Adapted(np.array([0.5, 1.0]), np.array([[0.1, 0.2]])))])
    >>> recorder.columns()["epsilon"].tolist(), recorder.columns()["group"].tolist()
    ([[1.0, 0.5]], [[0, 0]])
    """

    ids: Sequence[str]
    """Ids of the n images, in the order of the columns."""
    labels: int = 1
    """Number K of labels."""
    epsilon: list[NDArray[np.float32]] = field(default_factory=list)
    """Epsilons of each epoch, (n K,)."""
    group: list[NDArray[np.int32]] = field(default_factory=list)
    """Rows of `statistics` used for the epsilons of each epoch, (n K,)."""
    statistics: list[NDArray[np.float64]] = field(default_factory=list)
    """D_pct and sigma_D, (2,) each."""

    def restore(self, schedule: Schedule) -> None:
        """Continue a schedule with these columns; those of older files have no statistics."""
        none = np.full(schedule.epsilon.shape, -1, np.int32)
        self.epsilon = list(schedule.epsilon)
        self.group = list(none if schedule.group is None else schedule.group)
        if schedule.statistics is not None:
            self.statistics = list(schedule.statistics)

    def add(self, batches: Iterable[tuple[Sequence[str], Adapted]]) -> None:
        """Add an epoch: the images of its batches, with their epsilons and statistics."""
        places = {identity: i for i, identity in enumerate(self.ids)}
        epsilon = np.empty((len(self.ids), self.labels), np.float32)
        group = np.full(epsilon.shape, -1, np.int32)
        before: NDArray[np.float64] | None = None
        for names, adapted in batches:
            rows = [places[name] for name in names]
            epsilon[rows] = adapted.epsilon.reshape(-1, self.labels)
            if adapted.statistics is not None:
                group[rows] = self._row_of(adapted.statistics, before)
            before = adapted.statistics
        self.epsilon.append(epsilon.ravel())
        self.group.append(group.ravel())

    def columns(self) -> dict[str, Any]:
        """Return epsilon, group and statistics as the arguments of a `Schedule`."""
        return {
            "epsilon": np.stack(self.epsilon),
            "group": np.stack(self.group) if self.statistics else None,
            "statistics": np.stack(self.statistics) if self.statistics else None,
        }

    def _row_of(
        self, statistics: NDArray[np.float64], before: NDArray[np.float64] | None
    ) -> NDArray[np.int32]:
        """Return the rows of the statistics, (K,); those of the data set are stored once.

        Equal statistics of two batches of an epoch are two rows, because a row identifies the
        images that were normalised together.
        """
        kept = np.array_equal(self.statistics[-self.labels :], statistics)
        if not kept or (before is not None and before is not statistics):
            self.statistics += list(statistics)
        start = len(self.statistics) - self.labels
        return np.arange(start, start + self.labels, dtype=np.int32)

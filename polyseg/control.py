"""Which epsilon an image meets: a constant until the first assessment, then by its difficulty.

With several labels each image has one epsilon a label, and eq. 11 compares difficulties within a
label: they are binary tasks of their own, of which one may be harder throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from polyseg.config import ControlConfig
from polyseg.difficulty import epsilon_from_difficulty, normalise
from polyseg.records import Assessment


@dataclass(frozen=True)
class EpsilonControl:
    """The rule in force between two assessments.

    >>> EpsilonControl(ControlConfig(), constant=0.0).epsilon(["a", "b"])
    array([0., 0.])
    """

    config: ControlConfig
    constant: float
    """epsilon while there is no assessment."""
    assessment: Assessment | None = None
    labels: int = 1
    """K, labels of each image."""

    def epsilon(self, ids: Sequence[str]) -> NDArray[np.float64]:
        """Return epsilon for the images of a batch, (n,), or (n K,), an image's one after another.

        With "batch" statistics percentile and sigma are those of these images, with "dataset"
        statistics those of all that were assessed.
        """
        if self.assessment is None:
            return np.full(len(ids) * self.labels, self.constant)
        rows = [row for identity in ids for row in self._rows[identity]]
        if self.config.statistics == "batch":
            return self._from_difficulty(self.assessment.difficulty[rows])
        return self.over_data_set[rows]

    @cached_property
    def over_data_set(self) -> NDArray[np.float64]:
        """Epsilon of every assessed image, with the statistics of all of them."""
        if self.assessment is None:
            raise ValueError("there is no assessment yet")
        return self._from_difficulty(self.assessment.difficulty)

    def _from_difficulty(self, difficulty: NDArray[np.float64]) -> NDArray[np.float64]:
        columns = difficulty.reshape(-1, self.labels).T
        normalised = [
            normalise(column, self.config.percentile, self.config.delta) for column in columns
        ]
        return epsilon_from_difficulty(
            np.stack(normalised, axis=1).ravel(),
            self.config.epsilon_min,
            self.config.epsilon_max,
            self.config.sensitivity,
        )

    @cached_property
    def _rows(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for i, identity in enumerate(self.assessment.ids if self.assessment else []):
            rows.setdefault(identity, []).append(i)
        return rows

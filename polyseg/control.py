"""Which epsilon an image meets: a constant until the first assessment, then by its difficulty."""

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

    def epsilon(self, ids: Sequence[str]) -> NDArray[np.float64]:
        """Return epsilon for the images of a batch, (n,).

        With "batch" statistics percentile and sigma are those of these images, with "dataset"
        statistics those of all that were assessed.
        """
        if self.assessment is None:
            return np.full(len(ids), self.constant)
        rows = [self._row[identity] for identity in ids]
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
        return epsilon_from_difficulty(
            normalise(difficulty, self.config.percentile, self.config.delta),
            self.config.epsilon_min,
            self.config.epsilon_max,
            self.config.sensitivity,
        )

    @cached_property
    def _row(self) -> dict[str, int]:
        ids = self.assessment.ids if self.assessment else []
        return {identity: i for i, identity in enumerate(ids)}

"""Plain records that packages exchange; nothing here computes or writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

ScoreName = str
"""Name of a row of `choices.UNCERTAINTIES` or `choices.FREE_SCORES`."""

Progress = Callable[[str, int, int], None]
"""A function that is called with a task, the amount done and the total."""


def no_progress(task: str, done: int, total: int) -> None:
    """Ignore progress."""


class Batch(NamedTuple):
    """Images of one size for the network."""

    ids: list[str]
    images: "Tensor"
    """(B, C, H, W) float32, normalised."""
    masks: "Tensor | None"
    """(B, K, H, W) uint8 in {0, 1}, or None."""
    labels: tuple[str, ...] = ("",)
    """Names of the K labels; a single one is ""."""


class Difficulties(NamedTuple):
    """The fields of an assessment that determine the epsilons."""

    epoch: int
    """Epochs that the network was trained for."""
    ids: list[str]
    """Ids of the images; with K labels each is repeated K times in a row."""
    difficulty: NDArray[np.float64]
    """(n,), or (n K,), difficulties D."""


@dataclass(frozen=True)
class Assessment:
    """The scores of n images after `epoch` epochs.

    With several labels, each image has one row for each label, one after another.
    """

    epoch: int
    samples: int
    """Number of passes N; 0 for a difficulty that takes none."""
    rate: float
    """Largest dropout rate of the layers."""
    metric: ScoreName
    """Name of the score that is the difficulty."""
    region: str
    masks: str
    """Whether images share dropout masks: "consistent" or "independent"."""
    seed: int
    ids: list[str]
    scores: Mapping[ScoreName, NDArray[np.float64]]
    """The measured scores, (n,) each, before eq. 11."""
    scores_se: Mapping[ScoreName, NDArray[np.float64]]
    """Standard errors of `UNCERTAINTIES` over the passes, (n,) each; NaN below 4 passes."""
    foreground_pixels: NDArray[np.int64]
    """(n,) number of pixels in the region."""
    fallback: NDArray[np.int8]
    """(n,) indices into `difficulty.FALLBACKS`."""
    dice: NDArray[np.float64]
    """(n,) Dice of the prediction without dropout at 0.5; NaN without a mask."""
    rank_stability: Mapping[ScoreName, float] = field(default_factory=dict)
    """Expected rank correlation of each of `UNCERTAINTIES` with its value from infinitely many
    passes; NaN below 4 passes, and where all values are equal."""
    mask_pixels: NDArray[np.int64] | None = None
    """(n,) foreground pixels of the ground-truth masks; None without masks."""
    epsilon: NDArray[np.float64] | None = None
    """(n,) epsilons; None unless eq. 11 uses the statistics of the data set."""
    labels: list[str] | None = None
    """(n,) label of each row; None if there is only one label."""
    maps: Mapping[str, list[NDArray[np.floating]]] = field(default_factory=dict)
    """Pixel maps by name of `choices.map_names`, (H, W) for each row."""
    weights_sha256: str = ""
    config_yaml: str = ""

    @property
    def difficulty(self) -> NDArray[np.float64]:
        """(n,) values of the score that is the difficulty."""
        return self.scores[self.metric]

    @property
    def label_names(self) -> list[str]:
        """The labels in the order of the network's channels."""
        return [""] if self.labels is None else list(dict.fromkeys(self.labels))

    def of_label(self, label: str) -> "Assessment":
        """Return the rows of one label."""
        if self.labels is None:
            return self
        rows = [i for i, one in enumerate(self.labels) if one == label]
        return replace(self._at(rows), labels=None)

    def in_order(self, ids: Sequence[str]) -> "Assessment":
        """Return the rows in the given order of the images."""
        rows: dict[str, list[int]] = {}
        for i, identity in enumerate(self.ids):
            rows.setdefault(identity, []).append(i)
        return self._at([row for identity in ids for row in rows[identity]])

    def _at(self, rows: list[int]) -> "Assessment":
        return replace(
            self,
            ids=[self.ids[i] for i in rows],
            labels=None if self.labels is None else [self.labels[i] for i in rows],
            scores={name: values[rows] for name, values in self.scores.items()},
            scores_se={name: values[rows] for name, values in self.scores_se.items()},
            foreground_pixels=self.foreground_pixels[rows],
            fallback=self.fallback[rows],
            dice=self.dice[rows],
            mask_pixels=None if self.mask_pixels is None else self.mask_pixels[rows],
            epsilon=None if self.epsilon is None else self.epsilon[rows],
            maps={name: [maps[i] for i in rows] for name, maps in self.maps.items()},
        )


@dataclass(frozen=True)
class Schedule:
    """The epsilon of each image, or of each label of each image, in each epoch."""

    ids: list[str]
    epochs: NDArray[np.int64]
    """(E,) numbers of the epochs, from 1."""
    epsilon: NDArray[np.float32]
    """(E, n) epsilons as the loss used them."""
    labels: list[str] | None = None
    """(n,) label of each column, as in `Assessment`."""
    assessed: NDArray[np.int64] | None = None
    """(E,) epoch of the assessment that each epoch uses; -1 before the first assessment."""
    group: NDArray[np.int32] | None = None
    """(E, n) row of `statistics` used for each epsilon, -1 for none; None without statistics."""
    statistics: NDArray[np.float64] | None = None
    """(S, 2) D_pct and sigma_D of eq. 11, a row for each batch (or data set) and label."""

    def of_label(self, label: str) -> "Schedule":
        """Return the columns of one label.

        >>> schedule = Schedule(["a", "a"], np.array([1]), np.array([[0.0, 1.0]]), ["x", "y"])
        >>> schedule.of_label("y").epsilon.tolist()
        [[1.0]]
        """
        if self.labels is None:
            return self
        columns = [i for i, one in enumerate(self.labels) if one == label]
        ids, epsilon = [self.ids[i] for i in columns], self.epsilon[:, columns]
        group = None if self.group is None else self.group[:, columns]
        return replace(self, ids=ids, epsilon=epsilon, labels=None, group=group)

    def __post_init__(self) -> None:
        """Raise ValueError unless `group` refers to rows of `statistics`."""
        if self.group is None and self.statistics is None:
            return
        group, statistics = np.asarray(self.group), np.asarray(self.statistics)
        fits = group.shape == self.epsilon.shape and statistics.shape[1:] == (2,)
        plain = group.dtype == np.int32 and statistics.dtype == np.float64
        if not (fits and plain and ((group >= -1) & (group < len(statistics))).all()):
            raise ValueError(
                f"group {group.shape} {group.dtype} and statistics {statistics.shape} "
                f"{statistics.dtype} must be {self.epsilon.shape} int32, rows of (S, 2) float64"
            )

    def percentile_and_sigma(self) -> NDArray[np.float64]:
        """Return D_pct and sigma_D used for each epsilon, (E, n, 2), NaN where not recorded.

        >>> Schedule(["a"], np.array([1]), np.zeros((1, 1), np.float32)).percentile_and_sigma()
        array([[[nan, nan]]])
        """
        if self.group is None or self.statistics is None:
            return np.full((*self.epsilon.shape, 2), np.nan)
        # Index -1 selects the row of NaN.
        return np.vstack([self.statistics, np.full(2, np.nan)])[self.group]

"""Plain records that packages hand to each other; nothing here computes or writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Metric = str
"""Name of a score, of `choices.UNCERTAINTIES` or `choices.FREE_SCORES`."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def no_progress(task: str, done: int, total: int) -> None:
    """Ignore progress, for callers who show none."""


class Batch(NamedTuple):
    """Some images of one size on their way to the network."""

    ids: list[str]
    images: "Tensor"
    """(B, C, H, W) float32, normalised."""
    masks: "Tensor | None"
    """(B, K, H, W) uint8 in {0, 1}, or None where there are none."""
    labels: tuple[str, ...] = ("",)
    """Names of the K channels; a single one has none."""


class Difficulties(NamedTuple):
    """The part of an assessment that epsilons follow from."""

    epoch: int
    """Epochs that the network was trained for."""
    ids: list[str]
    """The images; with K labels, each K times in a row."""
    difficulty: NDArray[np.float64]
    """(n,), or (n K,)."""


@dataclass(frozen=True)
class Assessment:
    """What the passes of MC Dropout said of each of n images after `epoch` epochs.

    With several labels each image has a row for each of them, one after another.
    """

    epoch: int
    samples: int
    """N, the passes; 0 where the difficulty is one that takes none."""
    rate: float
    """The dropout rate, the largest where layers differ."""
    metric: Metric
    """The score that is the difficulty."""
    region: str
    masks: str
    """"consistent" or "independent" dropout masks over the images."""
    seed: int
    ids: list[str]
    scores: Mapping[Metric, NDArray[np.float64]]
    """Each (n,), raw, before eq. 11; those that were measured."""
    scores_se: Mapping[Metric, NDArray[np.float64]]
    """Each (n,), standard error over the passes, NaN below 4 passes; of `UNCERTAINTIES` only."""
    foreground_pixels: NDArray[np.int64]
    """(n,) pixels that the scores were averaged over."""
    fallback: NDArray[np.int8]
    """(n,) codes into `difficulty.FALLBACKS`."""
    dice: NDArray[np.float64]
    """(n,) of the prediction without dropout at 0.5 against the mask; NaN without a mask."""
    rank_stability: Mapping[Metric, float] = field(default_factory=dict)
    """The rank correlation that each of `UNCERTAINTIES` is expected to have with endless passes;
    NaN below 4 passes, and where ranks have no meaning."""
    mask_pixels: NDArray[np.int64] | None = None
    """(n,) foreground pixels of the ground-truth mask, whatever the region; None without masks."""
    epsilon: NDArray[np.float64] | None = None
    """(n,) where the statistics are those of the data set."""
    labels: list[str] | None = None
    """(n,) the label of each row; None where there is one label, and a row is an image."""
    maps: Mapping[str, list[NDArray[np.floating]]] = field(default_factory=dict)
    """By name of `map_names`, one (H, W) an image."""
    weights_sha256: str = ""
    config_yaml: str = ""

    @property
    def difficulty(self) -> NDArray[np.float64]:
        """(n,) the chosen score."""
        return self.scores[self.metric]

    @property
    def label_names(self) -> list[str]:
        """The labels, in the order of the network's channels."""
        return [""] if self.labels is None else list(dict.fromkeys(self.labels))

    def of_label(self, label: str) -> "Assessment":
        """Return the rows of one label."""
        if self.labels is None:
            return self
        rows = [i for i, one in enumerate(self.labels) if one == label]
        return replace(self._at(rows), labels=None)

    def in_order(self, ids: Sequence[str]) -> "Assessment":
        """Return the rows with the images in another order."""
        places: dict[str, list[int]] = {}
        for i, identity in enumerate(self.ids):
            places.setdefault(identity, []).append(i)
        return self._at([row for identity in ids for row in places[identity]])

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
    """The epsilon that each image, or each label of each image, met in each epoch."""

    ids: list[str]
    epochs: NDArray[np.int64]
    """(E,) the epochs trained, from 1."""
    epsilon: NDArray[np.float32]
    """(E, n), as the loss used it."""
    labels: list[str] | None = None
    """(n,), as in an assessment."""
    assessed: NDArray[np.int64] | None = None
    """(E,) the epoch after which was assessed what each epoch goes by, -1 before there is one."""
    group: NDArray[np.int32] | None = None
    """(E, n) row of `statistics` that gave each epsilon, -1 for none; None if no epoch has any."""
    statistics: NDArray[np.float64] | None = None
    """(S, 2) D_pct and sigma_D of eq. 11, a row for each batch, or data set, and label."""

    def epsilon_of(self, label: str) -> NDArray[np.float32]:
        """Return the epsilons of one label, (E, n), of all images where there are no labels.

        >>> schedule = Schedule(["a", "a"], np.array([1]), np.array([[0.0, 1.0]]), ["x", "y"])
        >>> schedule.epsilon_of("y").tolist()
        [[1.0]]
        """
        if self.labels is None:
            return self.epsilon
        return self.epsilon[:, [one == label for one in self.labels]]

    def __post_init__(self) -> None:
        """Check that the groups are rows of the statistics.

        Raises:
            ValueError: they are not.
        """
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
        """Return D_pct and sigma_D behind each epsilon, (E, n, 2), NaN where none is recorded.

        >>> Schedule(["a"], np.array([1]), np.zeros((1, 1), np.float32)).percentile_and_sigma()
        array([[[nan, nan]]])
        """
        if self.group is None or self.statistics is None:
            return np.full((*self.epsilon.shape, 2), np.nan)
        # The last row, which is that of -1.
        return np.vstack([self.statistics, np.full(2, np.nan)])[self.group]

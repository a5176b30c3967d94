"""The plain records that one room hands to the next; nothing here computes or writes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Metric = Literal["mutual_information", "entropy", "variance"]
METRICS: tuple[Metric, ...] = ("mutual_information", "entropy", "variance")
MAPS = ("mean", *METRICS)

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
    """(B, H, W) uint8 in {0, 1}, or None where there are none."""


@dataclass(frozen=True)
class Assessment:
    """What the passes of MC Dropout said of each of n images after `epoch` epochs."""

    epoch: int
    samples: int
    """N, the passes."""
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
    """Each (n,), raw, before eq. 11."""
    scores_sd: Mapping[Metric, NDArray[np.float64]]
    """Each (n,), standard deviation over the passes; NaN, or no entry, where it is not defined."""
    foreground_pixels: NDArray[np.int64]
    """(n,) pixels that the scores were averaged over."""
    fallback: NDArray[np.int8]
    """(n,) codes into `difficulty.FALLBACKS`."""
    dice: NDArray[np.float64]
    """(n,) of the mean prediction at 0.5 against the mask; NaN without a mask."""
    epsilon: NDArray[np.float64] | None = None
    """(n,) where the statistics are those of the data set."""
    maps: Mapping[str, list[NDArray[np.float16]]] = field(default_factory=dict)
    """By name of `MAPS`, one (H, W) an image."""
    weights_sha256: str = ""
    config_yaml: str = ""

    @property
    def difficulty(self) -> NDArray[np.float64]:
        """(n,) the chosen score."""
        return self.scores[self.metric]


@dataclass(frozen=True)
class Schedule:
    """The epsilon that each image met in each epoch."""

    ids: list[str]
    epochs: NDArray[np.int64]
    """(E,) the epochs trained, from 1."""
    epsilon: NDArray[np.float32]
    """(E, n), as the loss used it."""

"""The columns of history.csv: add a row to `COLUMNS` for a new one.

Runs of versions without a column still resume, with NaN for their earlier epochs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from polyseg.registry import Registry, Row

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Epoch:
    """The results of an epoch, from which the columns are computed."""

    number: int
    """Number of the epoch, from 1."""
    learning_rate: float
    losses: "Tensor"
    """(n,) losses of the images, or of each label of each image, in the steps that were taken."""
    losses_at_constant: "Tensor"
    """(n,) losses of the same steps at the constant `loss.epsilon`."""
    epsilon: NDArray[np.float32]
    """(n,) epsilons of all training images and labels."""
    wrong_sign: int
    """Number of images and labels whose PolyDice loss rises with s."""
    skipped: int
    """Number of steps skipped because loss or gradients were not finite."""
    validation_losses: "Tensor | None" = None
    """(images, labels) losses at the constant epsilon; None without validation images."""
    validation_dice: "Tensor | None" = None
    """(images, labels) Dice coefficients."""
    assessed: bool = False
    """Whether an assessment followed."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration by phase: train, validation, assessment."""


@dataclass(frozen=True)
class Column(Row):
    """A column of history.csv."""

    unit: str = ""
    value: Callable[[Epoch], float] = lambda _: math.nan


def _quantile(q: int) -> Column:
    return Column(
        f"epsilon_q{q:02d}",
        f"{q}th percentile of epsilon over the training images",
        # A list, because NumPy computes the percentile for a single float in float32.
        value=lambda epoch: float(np.percentile(epoch.epsilon, [q])[0]),
    )


def _duration(phase: str) -> Column:
    return Column(
        f"seconds_{phase}",
        f"duration of the {phase} phase",
        unit="s",
        value=lambda epoch: epoch.seconds.get(phase, math.nan),
    )


def _mean(values: "Tensor | None") -> float:
    return math.nan if values is None else float(values.mean())


COLUMNS = Registry(
    "column of history.csv",
    Column("epoch", "number of the epoch, from 1", value=lambda epoch: epoch.number),
    Column("learning_rate", "learning rate of the epoch", value=lambda epoch: epoch.learning_rate),
    Column(
        "train_loss",
        "mean loss of the training images, each at its own epsilon",
        value=lambda epoch: _mean(epoch.losses),
    ),
    *(_quantile(q) for q in (5, 25, 50, 75, 95)),
    Column(
        "wrong_sign_images",
        "number of images whose loss rises with s",
        unit="images",
        value=lambda epoch: epoch.wrong_sign,
    ),
    Column(
        "skipped_steps",
        "number of skipped steps; above 0 only with `training.on_nonfinite=skip`",
        unit="steps",
        value=lambda epoch: epoch.skipped,
    ),
    Column(
        "validation_loss",
        "mean loss of the validation images at the constant `loss.epsilon`, in all epochs",
        value=lambda epoch: _mean(epoch.validation_losses),
    ),
    Column(
        "validation_dice",
        "mean Dice coefficient of the validation images",
        value=lambda epoch: _mean(epoch.validation_dice),
    ),
    Column(
        "validation_iou",
        "mean intersection over union of the validation images",
        value=lambda epoch: _mean(
            epoch.validation_dice
            if epoch.validation_dice is None
            else epoch.validation_dice / (2 - epoch.validation_dice)
        ),
    ),
    Column("assessed", "1 if an assessment followed, else 0", value=lambda epoch: epoch.assessed),
    *(_duration(phase) for phase in ("train", "validation", "assessment")),
    Column(
        "train_loss_constant",
        "mean loss of the training images at the constant `loss.epsilon`, as `validation_loss`",
        value=lambda epoch: _mean(epoch.losses_at_constant),
    ),
)


def row_of(epoch: Epoch) -> dict[str, float]:
    """Return the row of history.csv for an epoch."""
    return {name: float(column.value(epoch)) for name, column in COLUMNS.items()}


def completed(row: Mapping[str, float]) -> dict[str, float]:
    """Return a row with all columns in order, with NaN for missing ones.

    Other columns raise ValueError.

    >>> completed({"epoch": 1.0})["train_loss"]
    nan
    """
    if others := row.keys() - COLUMNS.keys():
        raise ValueError(f"{', '.join(sorted(others))}: not a column of history.csv")
    return {name: row.get(name, math.nan) for name in COLUMNS}

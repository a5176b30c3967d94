"""Write the lines that training logs about its epochs and assessments."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from polyseg.records import Assessment
from polyseg.runs.assessment_text import describe, describe_order

log = logging.getLogger(__name__)

_HARDLY_SEGMENTS = 0.1
"""Median Dice of the training images below which D is warned of."""


def epoch_line(
    row: Mapping[str, float], *, epochs: int, best: bool, adapts: bool, validates: bool
) -> str:
    """Return the log line of an epoch in 74 columns, because a terminal puts the time before it.

    If epsilon is adapted, the line shows its 5th and 95th percentiles.
    """
    low, high = row["epsilon_q05"], row["epsilon_q95"]
    seconds = sum(value for name, value in row.items() if name.startswith("seconds"))
    parts = [
        f"epoch {row['epoch']:.0f}/{epochs}",
        f"loss {row['train_loss']:.3f}",
        f"val Dice {row['validation_dice']:.3f}{' best' if best else ''}" if validates else "",
        f"ε {low:.2f} to {high:.2f}" if adapts or low < high else "",
        f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s",
    ]
    return "  ".join(filter(None, parts))


def log_assessment(assessment: Assessment, *, is_last: bool) -> None:
    """Log the difficulties, their order, and whether an epoch uses them."""
    for line in (describe(assessment), *describe_order(assessment)):
        log.info("%s", line)
    dice = assessment.dice[np.isfinite(assessment.dice)]
    if dice.size and np.median(dice) < _HARDLY_SEGMENTS:
        log.warning(
            "the network hardly segments the training images yet (median Dice %.3f), so D says "
            "little: raise control.start",
            np.median(dice),
        )
    if is_last:
        log.info("this assessment only records the final weights, because no epoch follows it")


def log_first_adaptive_epoch(epoch: int, constant: float) -> None:
    """Log why the training loss changes its scale; `constant` is the constant epsilon."""
    log.info(
        "from epoch %d on each image has its own epsilon: the training loss changes its scale "
        "(history.csv also has it at the constant epsilon %g, as train_loss_constant), and "
        "validation Dice may fall for some epochs",
        *(epoch, constant),
    )


def warn_if_best_is_early(assessed: Sequence[int], best_epoch: int) -> None:
    """Warn if the best epoch is from before the first with adapted epsilons.

    `assessed` is the epoch of the assessment that each epoch used, or -1.
    """
    adapted = [epoch for epoch, after in enumerate(assessed, start=1) if after >= 0]
    if adapted and best_epoch < adapted[0]:
        log.warning(
            "the best checkpoint is from before epoch %d, the first with adapted epsilons, so "
            "its test does not show their effect: train for longer, or lower control.start",
            adapted[0],
        )

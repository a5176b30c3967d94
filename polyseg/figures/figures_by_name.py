"""Tables of the figures of a run and of an evaluation.

Each is saved as a file of the row's name, and the report shows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polyseg.records import Assessment, Schedule
from polyseg.registry import Registry, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RunRecords:
    """The records of a run from which its figures are drawn; missing ones are empty."""

    history: Sequence[Mapping[str, float]] = ()
    """Rows of history.csv, one for each epoch."""
    schedule: Schedule | None = None
    assessments: Sequence[Assessment] = ()
    """Assessments in order of epochs."""
    limits: tuple[float | None, float | None] = (None, None)
    """`control.epsilon_min` and `control.epsilon_max`; None: the least or largest epsilon."""

    @property
    def labels(self) -> list[str]:
        """The names of the labels; a single one has none."""
        if self.assessments:
            return self.assessments[-1].label_names
        labels = None if self.schedule is None else self.schedule.labels
        return list(dict.fromkeys(labels or [""]))


@dataclass(frozen=True)
class Drawn:
    """A figure with its texts for the report."""

    figure: "Figure"
    caption: str
    alternative: str
    """Description for readers who cannot see it."""


@dataclass(frozen=True)
class RunFigure(Row):
    """A figure of a run.

    Its function takes `RunRecords` and a label, and returns `Drawn`, or None if there is nothing to
    show.
    """

    source: Literal["history", "schedule", "assessments"] = "history"
    """The record that it needs; figures of the history have no label."""


_RUN = "polyseg.figures.run_figures"

RUN_FIGURES = Registry(
    "figure of a run",
    RunFigure("curves", "losses, validation Dice and IoU, and learning rate", f"{_RUN}:curves"),
    RunFigure(
        "epsilon",
        "quantiles of epsilon over the training images",
        f"{_RUN}:epsilon",
        source="schedule",
    ),
    RunFigure(
        "difficulty",
        "distribution of the difficulty at each assessment",
        f"{_RUN}:difficulty",
        source="assessments",
    ),
    RunFigure(
        "difficulty_dice",
        "Dice over difficulty at the last assessment",
        f"{_RUN}:difficulty_dice",
        source="assessments",
    ),
)

_EVALUATION = "polyseg.figures.evaluation_files"

EVALUATION_FIGURES = Registry(
    "figure of an evaluation",
    Row(
        "differences",
        "mean differences from the baseline with 95 % bootstrap intervals, over patients if the "
        "evaluation is by patient and otherwise over images; stars, if any, show p after Holm's "
        "method",
        f"{_EVALUATION}:draw_differences",
    ),
    Row(
        "comparison",
        "one point for each image, for an arm the mean over its runs that tested it; boxes show "
        "the quartiles, whiskers reach from 5 to 95 %, diamonds are means over the images, even "
        "where tables and tests are by patient",
        f"{_EVALUATION}:draw_comparison",
    ),
    Row(
        "reliability",
        "observed share of foreground over its predicted probability, and numbers of pixels; the "
        "diagonal is perfect calibration; the ECE above is that of all pixels together, and the "
        "one in the tables is the mean over single images or patients",
        f"{_EVALUATION}:draw_reliability",
    ),
    Row(
        "risk_coverage",
        "mean risk, 1 − Dice, of the images that remain when the least certain are left out",
        f"{_EVALUATION}:draw_risk_coverage",
    ),
    Row(
        "robustness",
        "mean Dice over the strength of corruption, from 0 (unchanged images) to 5 (severe); bands "
        "are 95 % bootstrap intervals over the images",
        f"{_EVALUATION}:draw_robustness",
    ),
)
"""Functions of an `Evaluation` that return a figure, or None if there is nothing to show.

The help is the caption in the report.
"""

_OVERLAYS = (
    "difficulty D in the last assessment; mean prediction, uncertainty, D and Dice shown are of "
    "the network after the last epoch"
)
_OUTLINED = "mean Dice, with the outlines of mask and prediction"

IMAGE_FIGURES = Registry(
    "figure of images",
    Row("overlays_largest_d", f"the images with the largest {_OVERLAYS}"),
    Row("overlays_smallest_d", f"the images with the smallest {_OVERLAYS}"),
    # Names of version 0.1.
    Row("overlays_hardest", f"the images with the largest {_OVERLAYS}"),
    Row("overlays_easiest", f"the images with the smallest {_OVERLAYS}"),
    Row("predictions_worst", f"the images with the lowest {_OUTLINED}"),
    Row("predictions_best", f"the images with the highest {_OUTLINED}"),
)
"""Figures that need images, which the report takes from files; the help is the caption."""

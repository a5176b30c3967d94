"""Figures of a training: losses, epsilon and difficulties over the epochs."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from polyseg.figures import style
from polyseg.figures.style import Numbers, styled

_LINES = ("-", "--", ":", "-.")


@styled
def training_curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the losses, validation Dice and IoU, and the learning rate over the epochs.

    Args:
        rows: one for each epoch, with `epoch` and other columns of history.csv; NaN leaves a gap.
            `train_loss_constant`, which compares with `validation_loss`, is drawn instead of
            `train_loss` if it exists. The first epoch with the highest Dice is marked, and
            `first_assessment`, E0, by a dashed line.
    """

    column = partial(_column, rows)

    figure = Figure(figsize=(style.TWO_COLUMNS, 2.4))
    losses, overlap, rate = figure.subplots(1, 3)
    epochs, dice = column("epoch"), column("validation_dice")
    constant = column("train_loss_constant")
    training = constant if np.isfinite(constant).any() else column("train_loss")
    # Without epsilon, or before it changes, both columns are equal.
    other = bool(np.any(np.isfinite(training) & (training != column("train_loss"))))
    _plot(losses, epochs, training, color=style.BLUE, label="training")
    _plot(losses, epochs, column("validation_loss"), color=style.RED, label="validation")
    _plot(overlap, epochs, dice, color=style.RED, label="Dice")
    _plot(overlap, epochs, column("validation_iou"), color=style.PURPLE, label="IoU")
    _plot(rate, epochs, column("learning_rate"), color=style.BLACK)
    if np.isfinite(dice).any():
        best = np.nanargmax(dice)
        label = f"best Dice {dice[best]:.3f},\nepoch {epochs[best]:g}"
        overlap.plot(
            epochs[best], dice[best], "o", color=style.BLACK, fillstyle="none", label=label
        )
    assessed = epochs[column("assessed") == 1]
    if assessed.size:
        foot = {"ymin": 0, "ymax": 0.04, "transform": losses.get_xaxis_transform()}
        losses.vlines(assessed, **foot, color=style.GRAY, linewidth=0.8, label="assessment")
    if (start := first_assessment(rows)) is not None:
        for axes in (losses, overlap):
            axes.axvline(start, color=style.GRAY, linestyle="--", linewidth=0.8, label="E0")
    loss = "loss at constant ε" if other else "loss"
    for axes, ylabel in ((losses, loss), (overlap, "validation"), (rate, "learning rate")):
        axes.set_ylabel(ylabel)
        style.epochs_axis(axes, epochs, legend=False)
        _legend_above(axes)
    rate.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return figure


def first_assessment(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Return E0, the epoch of the first assessment, from the rows of history.csv.

    A replay has no assessments: E0 is then the last epoch before the epsilons change. None if there
    is none, or no change.

    >>> [first_assessment([{"epoch": 1, "assessed": k}, {"epoch": 2}]) for k in (0, 1)]
    [None, 1.0]
    """
    epochs = _column(rows, "epoch")
    assessed = epochs[_column(rows, "assessed") == 1]
    if assessed.size:
        return float(assessed[0])
    names = [name for name in (rows[0] if rows else ()) if name.startswith("epsilon_q")]
    quantiles = np.array([_column(rows, name) for name in names]).reshape(len(names), len(rows))
    changed = np.any(np.isfinite(quantiles) & (quantiles != quantiles[:, :1]), axis=0)
    return float(epochs[np.argmax(changed) - 1]) if changed.any() else None


@styled
def validation_curves(
    names: Sequence[str], epochs: Sequence[Numbers], dice: Sequence[Numbers]
) -> Figure:
    """Draw the validation Dice of several runs over the epochs, the best epoch of each marked.

    `epochs` and `dice` hold an array (E_r,) for each run; NaN leaves a gap.
    """
    lines = math.ceil(len(names) / 3)
    figure = Figure(figsize=(style.TWO_COLUMNS, 2.6 + 0.17 * lines))
    axes = figure.add_subplot(ylabel="validation Dice")
    for i, (name, x, y) in enumerate(zip(names, epochs, dice, strict=True)):
        line = {"color": style.run_colour(i), "label": style.shorten(name, 32)}
        # Runs of equal colour differ in their line style.
        _plot(axes, x, y, linestyle=_LINES[i // len(style.RUN_COLOURS) % len(_LINES)], **line)
        if np.isfinite(y).any():
            best = np.nanargmax(np.where(np.isfinite(y), y, np.nan))
            axes.plot(x[best], y[best], "o", color=line["color"], fillstyle="none")
    style.epochs_axis(axes, np.concatenate([*epochs, np.empty(0)]), legend=False)
    figure.legend(loc="outside upper center", ncols=3, handlelength=1.8)
    return figure


@styled
def epsilon_quantiles(epochs: Numbers, epsilon: Numbers, *, limits: tuple[float, float]) -> Figure:
    """Draw quantiles of epsilon, (E, n), over the images as steps, one epoch wide.

    NaN is left out; an epoch of NaN alone is a gap. `limits`, eps_min and eps_max, are dashed.

    >>> epsilon = np.array([[0.0, 0.2], [0.0, 1.0]])
    >>> figure = epsilon_quantiles(np.array([1, 2]), epsilon, limits=(-0.4, 1.0))
    >>> figure.axes[0].lines[0].get_ydata().round(2).tolist()
    [0.1, 0.1, 0.5, 0.5]
    """
    figure = Figure(figsize=(style.ONE_COLUMN, 2.6))
    axes = figure.add_subplot(ylabel="ε")
    quantiles = np.full((len(epochs), 5), np.nan)
    for row, values in zip(quantiles, epsilon, strict=True):
        if (finite := style.finite_values(values)).size:
            row[:] = np.percentile(finite, (50, 5, 95, 25, 75))
    steps = np.add.outer(epochs, (-0.5, 0.5)).ravel()
    median, low, high, lower, upper = quantiles.repeat(2, axis=0).T
    axes.plot(steps, median, color=style.BLUE, label="median")
    axes.fill_between(steps, lower, upper, color=style.BLUE, alpha=0.35, lw=0, label="25–75 %")
    axes.fill_between(steps, low, high, color=style.BLUE, alpha=0.15, lw=0, label="5–95 %")
    for limit, label in zip(limits, ("limits", None), strict=True):
        axes.axhline(limit, color=style.GRAY, linestyle="--", linewidth=0.8, label=label)
    style.epochs_axis(axes, steps, legend=False)
    figure.legend(loc="outside upper center", ncols=4, columnspacing=1.2, handlelength=1.4)
    return figure


@styled
def difficulty_distribution(
    epochs: Sequence[int], difficulties: Sequence[Numbers], *, metric: str | None = None
) -> Figure:
    """Draw the distribution of D at each assessment as boxes with whiskers from 5 to 95 %.

    `difficulties` are arrays (n,), at least 0, of the score `metric`; NaN is left out. The axis is
    logarithmic if all values are positive and the largest is above 30 times the smallest.
    """
    figure = Figure(figsize=(style.ONE_COLUMN, 2.6))
    name = f"\n{style.metric_name(metric)}" if metric else ""
    axes = figure.add_subplot(ylabel=f"difficulty D{name}")
    samples = [style.finite_values(values) for values in difficulties]
    axes.set_title("box: quartiles; whiskers: 5 to 95 %", fontsize=8)
    width = 0.6 * min(np.diff(epochs), default=1)
    style.boxes(axes, samples, epochs, [style.BLUE] * len(samples), width=width)
    style.epochs_axis(axes, np.add.outer(epochs, (-width / 2, width / 2)))
    everything = np.concatenate([*samples, np.empty(0)])
    if everything.size and everything.max() > 30 * everything.min() > 0:
        axes.set_yscale("log", subs=[])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return figure


def _column(rows: Sequence[Mapping[str, float]], name: str) -> Numbers:
    """Return a column of the history, (E,), NaN where it is missing."""
    return np.array([row.get(name, math.nan) for row in rows], dtype=float)


def _legend_above(axes: Axes) -> None:
    """Put the legend above a panel, where it hides no curve."""
    if axes.get_legend_handles_labels()[0]:
        above = {"bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "borderpad": 0}
        spacing = {"columnspacing": 0.8, "handlelength": 1, "handletextpad": 0.5}
        axes.legend(loc="lower left", ncols=2, **above, **spacing)


def _plot(axes: Axes, x: Numbers, y: Numbers, **line: Any) -> None:
    """Draw a line with gaps at NaN, and a dot for a value without neighbours."""
    finite = np.isfinite(y)
    if finite.any():
        left, right = np.append(False, finite[:-1]), np.append(finite[1:], False)
        alone = np.flatnonzero(finite & ~left & ~right)
        axes.plot(x, y, marker="." if alone.size else "", markevery=alone, **line)

"""Figures of schedules, and of the validity of their difficulties."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polyseg.data.layouts.cases import counted
from polyseg.figures import style
from polyseg.figures.style import Numbers, styled

_MARKERS = "osD^vP"
_COLUMNS = 3
_LONGEST_OF_TWO = 16
"""Largest length of a name with which two names fit side by side into a legend."""
_MOST_IDS, _LONGEST_ID = 40, 32


@styled
def epsilon_bands(runs: Mapping[str, tuple[Numbers, Numbers]]) -> Figure:
    """Draw the epsilons of several runs over the epochs: medians, and bands from 5 to 95 %.

    `runs` maps names to epochs, (E,), and epsilon, (E, n).

    >>> runs = {"a": (np.array([1, 2]), np.array([[0.0, 0.2], [0.0, 1.0]]))}
    >>> epsilon_bands(runs).axes[0].lines[0].get_ydata().round(2).tolist()
    [0.1, 0.1, 0.5, 0.5]
    """
    columns = 2 if max(map(len, runs)) <= _LONGEST_OF_TWO else 1
    lines = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(style.ONE_COLUMN, 2.5 + 0.17 * lines))
    axes = figure.add_subplot(ylabel="ε")
    edges = []
    for i, (name, (epochs, epsilon)) in enumerate(runs.items()):
        steps = np.add.outer(epochs, (-0.5, 0.5)).ravel()
        low, median, high = np.percentile(epsilon, (5, 50, 95), axis=1).repeat(2, axis=1)
        colour = style.run_colour(i)
        axes.plot(steps, median, color=colour, label=style.shorten(name, 24))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        for edge in (low, high):
            axes.plot(steps, edge, color=colour, linewidth=0.6)
        edges.append(steps)
    style.epochs_axis(axes, np.concatenate(edges), legend=False)
    title = "median, and band from 5 to 95 % of the images"
    figure.legend(loc="outside upper center", ncols=columns, handlelength=1.4, title=title)
    return figure


@styled
def epsilon_map(
    epochs: Numbers,
    epsilon: Numbers,
    difficulty: Numbers,
    *,
    limits: tuple[float, float],
    assessed: Sequence[int] = (),
    ids: Sequence[str] = (),
) -> Figure:
    """Draw the epsilon, (E, n), of every image in every epoch, the largest `difficulty` on top.

    Args:
        epochs: (E,) from 1.
        epsilon: (E, n).
        difficulty: (n,), by which the images are sorted.
        limits: eps_min and eps_max, which the colours reach at least.
        assessed: the epochs after which the difficulties were measured, marked above.
        ids: (n,), written beside the rows: all of up to 40, otherwise a regular selection.

    >>> epsilon = np.array([[0.0, 0.5]])
    >>> figure = epsilon_map(np.array([1]), epsilon, np.array([0.1, 0.2]), limits=(-0.4, 1.0))
    >>> figure.axes[0].images[0].get_array().tolist()
    [[0.5], [0.0]]
    """
    order = np.argsort(-difficulty, kind="stable")
    named = range(0, len(ids), math.ceil(len(ids) / _MOST_IDS) or 1)
    names = style.without_common_start([ids[order[row]] for row in named], _LONGEST_ID)
    names = [style.shorten(name, _LONGEST_ID) for name in names]
    width = style.ONE_COLUMN + 0.05 * max(map(len, names), default=0)
    figure = Figure(figsize=(width, max(3.2, 1 + 0.11 * len(named))))
    axes = figure.add_subplot(ylabel="image (largest D at the end on top)")
    shown = axes.imshow(
        epsilon[:, order].T,
        extent=(epochs[0] - 0.5, epochs[-1] + 0.5, len(difficulty) + 0.5, 0.5),
        vmin=min(limits[0], epsilon.min()),
        vmax=max(limits[1], epsilon.max()),
        cmap="viridis",
        aspect="auto",
        interpolation="nearest",
    )
    figure.colorbar(shown, label="ε", aspect=30)
    axes.set_xlabel("epoch")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if ids:
        axes.set_yticks([row + 1 for row in named], names, fontsize=6)
    marks = [epoch + 0.5 for epoch in assessed if epochs[0] - 1 <= epoch <= epochs[-1]]
    axes.secondary_xaxis("top", xlabel="assessments").set_xticks(marks, [""] * len(marks))
    return figure


class Panel(NamedTuple):
    """One assessment in `difficulty_panels`."""

    epoch: int
    difficulty: Numbers
    """Difficulties D, (n,)."""
    dice: Numbers
    """Dice, (n,) in [0, 1]; NaN without a mask."""
    correlation: float
    """Spearman's correlation of D with 1 - Dice."""


@styled
def difficulty_panels(panels: Sequence[Panel], *, metric: str) -> Figure:
    """Draw Dice over difficulty at several assessments, each with its own scale of D.

    `metric` is the name of the score that is D.
    """
    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    width = style.ONE_COLUMN if columns == 1 else style.TWO_COLUMNS
    figure = Figure(figsize=(width, 0.9 + 1.6 * rows + 0.4 * (columns == 1)))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid, panels, strict=False):
        axes.scatter(panel.difficulty, panel.dice, s=9, color=style.BLUE, alpha=0.5, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        known = (
            style.formatted(panel.correlation, ".2f") if math.isfinite(panel.correlation) else "–"
        )
        axes.set_title(f"epoch {panel.epoch}: {known}")
    images, joint = counted(len(panels[0].difficulty), "image"), "\n" if columns == 1 else " "
    title = f"{images}; Spearman's correlation{joint}of D with 1 − Dice"
    figure.suptitle(title, fontsize=9)
    figure.supxlabel(f"difficulty D, {style.metric_name(metric)}", fontsize=9)
    figure.supylabel("Dice", fontsize=9)
    return figure


@styled
def rank_curves(epochs: Sequence[int], curves: Mapping[str, Numbers]) -> Figure:
    """Draw rank correlations of D at each assessment with other D.

    `curves` maps the name of the other D to correlations, (A,), at A epochs; NaN leaves a gap.

    >>> rank_curves([1, 2], {"last assessment": np.array([0.5, np.nan])}).axes[0].get_ylabel()
    'rank correlation of D with'
    """
    figure = Figure(figsize=(style.ONE_COLUMN, 2.8))
    axes = figure.add_subplot(ylabel="rank correlation of D with")
    _correlations(axes, epochs, curves)
    lowest = min(
        (style.finite_values(values).min(initial=0) for values in curves.values()), default=0
    )
    axes.set_ylim(-1.05 if lowest < -0.5 else min(1.1 * lowest, 0) - 0.05, 1.05)
    figure.legend(loc="outside upper center", ncols=2, handlelength=1.6)
    return figure


@styled
def validity_curves(epochs: Sequence[int], panels: Mapping[str, Mapping[str, Numbers]]) -> Figure:
    """Draw the correlations of several scores over the assessments, in several panels.

    `panels` maps titles to scores to correlations, (A,), at A epochs; NaN leaves a gap.

    >>> panels = {"with 1 − Dice": {"entropy": np.array([0.5, 0.7])}}
    >>> [text.get_text() for text in validity_curves([1, 2], panels).legends[0].get_texts()]
    ['entropy']
    """
    figure = Figure(figsize=(style.TWO_COLUMNS, 3))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False).ravel()
    for axes, (title, curves) in zip(grid, panels.items(), strict=True):
        named = {name.replace("_", " "): values for name, values in curves.items()}
        _correlations(axes, epochs, named)
        axes.set_title(title)
    grid[0].set_ylim(-1.05, 1.05)  # the panels share it
    grid[0].set_ylabel("Spearman's correlation")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, handlelength=1.6)
    return figure


def _correlations(axes: Axes, epochs: Sequence[int], curves: Mapping[str, Numbers]) -> None:
    """Draw lines with markers, all different in colour and shape."""
    axes.axhline(0, color=style.GRAY, linewidth=0.6)
    for i, (name, values) in enumerate(curves.items()):
        colour, marker = style.run_colour(i), _MARKERS[i % len(_MARKERS)]
        # Each smaller than the one before, so that equal values stay visible.
        size = max(6 - 0.8 * i, 2.5)
        axes.plot(epochs, values, color=colour, marker=marker, markersize=size, label=name)
    style.epochs_axis(axes, np.asarray(epochs), legend=False)

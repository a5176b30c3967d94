"""Runs side by side, and their differences from a baseline."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from polyseg.data.layouts.cases import counted
from polyseg.figures import style
from polyseg.figures.style import Numbers, styled

_STARS = "* p < 0.05   ** p < 0.01   *** p < 0.001"


@styled
def comparison(names: Sequence[str], values: Mapping[str, Sequence[Numbers]]) -> Figure:
    """Draw the values of all images for several runs side by side, a panel for each metric.

    `values` maps titles of metrics to an array (n_i,) for each run. Points are images, boxes the
    quartiles, whiskers 5 to 95 %, diamonds the means. The number of values that are not finite is
    written below.
    """
    figure, panels = _panels(names, list(values), height=0.35)
    for axes, runs in zip(panels, values.values(), strict=True):
        _draw_values(axes, runs)
    joint = "\n" if figure.get_figwidth() == style.ONE_COLUMN else "; "
    note = f"point: image; diamond: mean; box: quartiles{joint}whiskers: 5 to 95 % of the images"
    figure.supxlabel(note, fontsize=8)
    return figure


@styled
def differences(
    names: Sequence[str],
    intervals: Mapping[str, Numbers],
    *,
    stars: Mapping[str, Sequence[str]],
    higher_is_better: Mapping[str, bool],
    baseline: str,
) -> Figure:
    """Draw the differences of R runs from a baseline as a forest plot, a panel for each metric.

    Points are mean differences, bars their 95 % intervals; the shaded side is better than the
    baseline. Values that are not finite are left out.

    By title of the metric, `intervals` are (3, R) means, lower and upper ends, `stars` R texts such
    as `significance.stars` returns, and `higher_is_better` is the better side.
    """
    figure, panels = _panels(names, list(intervals), height=0.85)
    for axes, (metric, found) in zip(panels, intervals.items(), strict=True):
        _draw_differences(axes, found, stars[metric])
        _shade_better(axes, found, higher_is_better[metric])
    below = f"mean difference from {style.shorten(baseline, 32)}"
    joint = "\n" if figure.get_figwidth() == style.ONE_COLUMN else ", "
    figure.supxlabel(f"{below}{joint}and its 95 % interval", fontsize=9)
    patch = Patch(facecolor=style.SHADE, label="better than the baseline")
    title = _STARS if any(map(any, stars.values())) else None
    figure.legend(handles=[patch], loc="outside upper center", title=title)
    return figure


def _panels(
    names: Sequence[str], metrics: Sequence[str], height: float
) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure of `height` inches and the rows, with a titled panel for each metric."""
    columns = min(len(metrics), 3) or 1
    lines = math.ceil(len(metrics) / columns) or 1
    width = style.ONE_COLUMN if columns == 1 else style.TWO_COLUMNS
    labels = [style.wrapped(name) for name in names]
    # Few rows get more space than their names need.
    needed = 0.04 + 0.14 * max((label.count("\n") + 1 for label in labels), default=1)
    rows = max(needed, 0.35 - 0.015 * len(names)) * len(names)
    figure = Figure(figsize=(width, height + lines * (0.6 + rows)))
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes in panels[len(metrics) :]:
        axes.remove()
    for axes, metric in zip(panels, metrics, strict=False):
        axes.set_title(metric)
        axes.set_yticks(range(len(names)), labels)
        axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    return figure, list(panels[: len(metrics)])


def _draw_values(axes: Axes, runs: Sequence[Numbers]) -> None:
    samples = [style.finite_values(values) for values in runs]
    rows = list(axes.get_yticks())
    colours = [style.run_colour(row) for row in range(len(rows))]
    for row, values, colour in zip(rows, samples, colours, strict=True):
        # Multiples of the golden ratio spread the points evenly and reproducibly.
        jitter = 0.5 * ((0.618034 * np.arange(values.size)) % 1 - 0.5)
        axes.scatter(values, row + jitter, s=3, color=colour, linewidth=0, rasterized=True)
        if values.size:
            axes.plot(values.mean(), row, "D", color="white", markeredgecolor=style.BLACK, zorder=4)
    style.boxes(axes, samples, rows, colours, width=0.6, horizontal=True)
    if lost := sum(np.size(values) for values in runs) - sum(values.size for values in samples):
        axes.set_xlabel(f"{counted(lost, 'value')} not finite")


def _draw_differences(axes: Axes, found: Numbers, stars: Sequence[str]) -> None:
    for row, mean, low, high, mark in zip(axes.get_yticks(), *found, stars, strict=True):
        axes.plot([low, high], [row, row], color=style.BLACK)
        axes.plot(mean, row, "o", color=style.BLACK)
        axes.annotate(mark, (mean, row), (0, 3), textcoords="offset points", ha="center")


def _shade_better(axes: Axes, found: Numbers, higher_is_better: bool) -> None:
    """Shade the better side of zero; both sides are always visible."""
    ends = style.finite_values(np.concatenate(found))
    low, high = min(0.0, ends.min(initial=0)), max(0.0, ends.max(initial=0))
    margin = 0.1 * (high - low) or 1.0
    low, high = low - margin, high + margin
    axes.axvspan(
        *((0, high) if higher_is_better else (low, 0)), color=style.SHADE, linewidth=0, zorder=0
    )
    axes.axvline(0, color=style.GRAY, linewidth=0.8, zorder=1)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(3))

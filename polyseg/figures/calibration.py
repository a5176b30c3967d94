"""Reliability diagrams and risk-coverage curves.

Up to four runs share a panel; of more runs each has its own panel, with the others in gray.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MultipleLocator, NullLocator

from polyseg.figures import style
from polyseg.figures.style import Numbers, styled

Curve = tuple[Numbers, Numbers]
"""x and y, (n,) each."""

_TOGETHER, _COLUMNS = 4, 4
_OTHERS = "0.85"


@styled
def reliability_diagram(
    names: Sequence[str],
    mean_predicted: Sequence[Numbers],
    observed: Sequence[Numbers],
    counts: Sequence[Numbers],
    errors: Sequence[float],
) -> Figure:
    """Draw the observed share of foreground over its predicted probability for R runs.

    The dashed diagonal is perfect calibration; below it a network predicts too much foreground. The
    lower panels show the numbers of pixels with each probability, on a logarithmic scale.

    `mean_predicted` and `observed` (NaN in empty bins) and `counts` hold an array (bins,) for each
    run, for bins of equal width; `errors` are the expected calibration errors.
    """
    figure, panels = _panels(len(names), heights=(3.3, 2.4))
    curves = list(zip(mean_predicted, observed, strict=True))
    most = max(np.max(values, initial=1) for values in counts)
    for axes, runs in panels:
        axes.plot([0, 1], [0, 1], color=style.GRAY, linestyle="--", linewidth=0.8)
        _draw_runs(axes, runs, curves, spacing=0)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.tick_params(labelbottom=False)
        below = axes.inset_axes((0, -0.36, 1, 0.3), sharex=axes)
        _draw_counts(below, [counts[i] for i in runs], most)
        place = axes.get_subplotspec()
        if place and place.is_first_col():
            axes.set_ylabel("share of foreground")
            below.set_ylabel("pixels")
    figure.supxlabel("predicted probability of foreground", fontsize=9)
    _name_runs(figure, panels, names, "ECE of all pixels", errors)
    return figure


@styled
def risk_coverage_curves(
    names: Sequence[str],
    curves: Sequence[Curve],
    *,
    best: Sequence[Curve] | None = None,
    uncertainty: str = "",
) -> Figure:
    """Draw the mean risk, 1 - Dice, of the most certain images over the share that is kept.

    `curves` hold for each run coverage, (n,) rising to 1, and selective risk, (n,), whose mean is
    AURC; `best` the same in the order of the risk itself, drawn dotted. The dashed line is the mean
    risk of all images, which a random order has at any coverage. `uncertainty` is its name, if it
    is the same for all runs.
    """
    figure, panels = _panels(len(names), heights=(2.6, 1.9))
    percent = [(100 * coverage, risk) for coverage, risk in curves]
    for axes, runs in panels:
        _draw_runs(axes, runs, percent, spacing=0.1)
        for i, colour in zip(runs, style.RUN_COLOURS, strict=False):
            axes.axhline(curves[i][1][-1], color=colour, linestyle="--", linewidth=0.8)
            if best is not None:
                axes.plot(100 * best[i][0], best[i][1], color=colour, linestyle=":")
        axes.set(xlim=(0, 103))
        axes.xaxis.set_major_locator(MultipleLocator(25))
        axes.tick_params(labelbottom=True)
    panels[0][0].set_ylim(bottom=0)
    by = f", by {uncertainty}" if uncertainty else ""
    figure.supxlabel(f"coverage: images kept (%){by}", fontsize=9)
    figure.supylabel("risk: their mean 1 − Dice", fontsize=9)
    others = [Line2D([], [], color=style.GRAY, linestyle="--", label="all images, or random order")]
    if best is not None:
        others.append(Line2D([], [], color=style.GRAY, linestyle=":", label="best order"))
    areas = [float(np.mean(risk)) for _, risk in curves]
    _name_runs(figure, panels, names, "AURC", areas, others)
    return figure


def _panels(
    runs: int, heights: tuple[float, float]
) -> tuple[Figure, list[tuple[Axes, Sequence[int]]]]:
    """Return a figure, and its panels with the indices of their runs.

    `heights`, in inches, are that of a shared panel and that of each panel of many runs.
    """
    together = runs <= _TOGETHER
    shown = [range(runs)] if together else [range(i, i + 1) for i in range(runs)]
    lines = math.ceil(len(shown) / _COLUMNS)
    columns = math.ceil(len(shown) / lines)
    if together:
        size = style.ONE_COLUMN, heights[0] + 0.17 * (runs + 2)
    else:
        size = style.TWO_COLUMNS, 0.5 + heights[1] * lines
    figure = Figure(figsize=size)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[len(shown) :]:
        axes.remove()
    return figure, list(zip(grid, shown, strict=False))


def _draw_runs(axes: Axes, runs: Sequence[int], curves: Sequence[Curve], *, spacing: float) -> None:
    """Draw the other runs' curves in gray, and the panel's own on top with markers."""
    for i, curve in enumerate(curves):
        if i not in runs:
            axes.plot(*curve, color=_OTHERS, linewidth=0.8, zorder=1)
    for i, colour, marker in zip(runs, style.RUN_COLOURS, style.MARKERS, strict=False):
        step = max(math.ceil(spacing * len(curves[i][0])), 1)
        marks = (step * i // _TOGETHER % step, step)  # not above those of the other curves
        axes.plot(*curves[i], color=colour, marker=marker, markevery=marks, label=str(i))


def _draw_counts(axes: Axes, counts: Sequence[Numbers], most: float) -> None:
    for values, colour in zip(counts, style.RUN_COLOURS, strict=False):
        edges = np.linspace(0, 1, len(values) + 1)
        axes.stairs(values, edges, color=colour, linewidth=0.8)
    axes.set_ylim(0.5, 3 * most)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=3))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_locator(NullLocator())


def _name_runs(
    figure: Figure,
    panels: Sequence[tuple[Axes, Sequence[int]]],
    names: Sequence[str],
    title: str,
    values: Sequence[float],
    others: Sequence[Line2D] = (),
) -> None:
    """Show the names and values of the runs, in the legend of a shared panel or above each."""
    shown = [style.formatted(value, ".3f").replace("nan", "–") for value in values]
    if len(names) > _TOGETHER:
        for (axes, _), name, value in zip(panels, names, shown, strict=True):
            axes.set_title(f"{style.wrapped(name)}\n{title} {value}", fontsize=8)
        if others:
            figure.legend(handles=others, loc="outside upper center", ncols=2)
        return
    handles = panels[0][0].get_legend_handles_labels()[0]
    for handle, name, value in zip(handles, names, shown, strict=True):
        handle.set_label(f"{value}  {style.shorten(name, 34)}")
    handles += others
    figure.legend(handles=handles, loc="outside upper center", title=title, alignment="left")

"""Metrics on corrupted images."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polyseg.data.layouts.cases import counted
from polyseg.figures import style
from polyseg.figures.style import Numbers, styled
from polyseg.metrics.significance import mean_interval


@styled
def robustness_curves(
    strengths: Sequence[int], values: Mapping[str, Mapping[str, Numbers]]
) -> Figure:
    """Draw the mean Dice over the strength of corruptions, a panel for each corruption.

    `values` maps corruptions to names of runs to values, (S, n); all have the same runs and images.
    Bands are 95 % bootstrap intervals over at least two images. An image whose value is not finite
    anywhere in a panel is left out of all its lines; the number of these is in the title.

    >>> dice = {"noise": {"adaptive": np.array([[0.9, 0.8], [0.7, 0.5]])}}
    >>> robustness_curves([0, 1], dice).axes[0].lines[0].get_ydata().round(2).tolist()
    [0.85, 0.6]
    """
    columns = min(len(values), 3)
    lines = math.ceil(len(values) / columns)
    width, entries = (style.ONE_COLUMN, 1) if columns == 1 else (style.TWO_COLUMNS, 3)
    legend_lines = math.ceil(max(map(len, values.values())) / entries)
    figure = Figure(figsize=(width, 0.4 + 0.17 * legend_lines + 1.6 * lines))
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(values) :]:
        axes.remove()
    for axes, (corruption, runs) in zip(panels, values.items(), strict=False):
        _panel(axes, corruption, strengths, runs)
    figure.supxlabel("strength of the corruption", fontsize=9)
    figure.supylabel("mean Dice", fontsize=9)
    handles = panels[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside upper center", ncols=entries)
    return figure


def _panel(axes: Axes, title: str, strengths: Sequence[int], runs: Mapping[str, Numbers]) -> None:
    whole = np.isfinite(list(runs.values())).all(axis=(0, 1))
    for i, (name, values) in enumerate(runs.items()):
        known = values[:, whole]
        colour, marker = style.run_colour(i), style.MARKERS[i % len(style.MARKERS)]
        if known.size:
            low, high = zip(*map(mean_interval, known), strict=True)
            axes.fill_between(strengths, low, high, color=colour, alpha=0.15, linewidth=0)
        mean = known.mean(axis=1) if known.size else np.full(len(strengths), math.nan)
        axes.plot(strengths, mean, color=colour, marker=marker, label=style.shorten(name))
    lost = int((~whole).sum())
    axes.set_title(f"{title} ({counted(lost, 'image')} left out)" if lost else title)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.tick_params(labelbottom=True)

"""The loss over the angle between prediction and mask."""

import math
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from polyseg.figures.style import BLACK, ONE_COLUMN, SHADE, Numbers, formatted, styled


@styled
def loss_curves(
    theta: Numbers,
    curves: Mapping[float, Numbers],
    dice: Numbers,
    *,
    s: float,
    ylabel: str = "loss",
    wrong_above: Numbers | None = None,
) -> Figure:
    """Draw the loss, or its gradient, over the angle for several epsilon, and that of true Dice.

    `theta`, (T,), rises within [0, pi/2] rad; `curves` maps epsilon to (T,) values with the ratio
    of norms `s`; `dice`, (T,), belongs to true Dice, 1 - s cos(theta), and is dashed. Above
    `wrong_above`, (T,), the loss rises with s, (1/2 + epsilon) theta^2 > 1, which is shaded.
    """
    legend_lines = math.ceil((len(curves) + 2) / 3)
    figure = Figure(figsize=(ONE_COLUMN, 2.8 + 0.17 * legend_lines))
    axes = figure.add_subplot(xlabel="angle θ (rad)", ylabel=ylabel)
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(curves)))  # without its light end
    for epsilon, colour in zip(sorted(curves, reverse=True), colours, strict=True):
        axes.plot(theta, curves[epsilon], color=colour, label=f"ε = {formatted(epsilon)}")
    axes.plot(theta, dice, color=BLACK, linestyle="--", label="true Dice")
    bottom, top = axes.get_ylim()
    if wrong_above is not None and (wrong_above < top).any():
        low = np.clip(wrong_above, bottom, top)
        axes.fill_between(theta, low, top, color=SHADE, linewidth=0, label="loss rises with s")
        axes.set_ylim(bottom, top)
    quarters = ["0", "π/8", "π/4", "3π/8", "π/2"]
    axes.set_xticks(np.linspace(0, np.pi / 2, len(quarters)), quarters)
    axes.set_xlim(0, np.pi / 2)
    figure.legend(loc="outside lower center", ncols=3, title=f"s = {formatted(s)}")
    return figure

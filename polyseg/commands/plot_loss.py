"""`polyseg plot-loss`: draw the loss over the angle, as in Fig. 2 of the thesis."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from polyseg.curves import polydice1_curve
from polyseg.errors import PolysegError
from polyseg.figures.losses import loss_curves
from polyseg.figures.style import save_figure
from polyseg.system.output_folder import refuse_existing_figure


def plot_loss(
    *,
    s: float,
    epsilons: Sequence[float],
    terms: int,
    gradient: bool,
    out: Path,
    overwrite: bool = False,
) -> list[Path]:
    """Draw the loss, or its derivative, over the angle, and return the files."""
    refuse_existing_figure(out, overwrite=overwrite)
    if not 0 < s <= 1:
        raise PolysegError(f"--s {s:g}: a scale is above 0 and at most 1")
    if not 1 <= terms <= 10:
        raise PolysegError(f"--terms {terms}: from 1 to 10")
    if not all(math.isfinite(epsilon) and epsilon >= -0.5 for epsilon in epsilons):
        raise PolysegError("--epsilon: give numbers of at least -0.5, separated by commas")
    if len(set(epsilons)) > 12:
        raise PolysegError(f"--epsilon: {len(set(epsilons))} curves are too many; give at most 12")
    theta = np.linspace(0, math.pi / 2, 1001)
    curves = {e: polydice1_curve(theta, e, s, terms=terms) for e in epsilons}
    dice = 1 - s * np.cos(theta)
    # The loss rises with s where the sum of eq. 5 exceeds 1; there the loss exceeds 1 for every s.
    wrong_above = np.ones_like(theta)
    if gradient:
        curves = {e: np.gradient(curve, theta, edge_order=2) for e, curve in curves.items()}
        dice = s * np.sin(theta)
        wrong_above = s * _derivative_where_the_sum_is_one(theta, terms)
    figure = loss_curves(
        theta,
        curves,
        dice,
        s=s,
        ylabel="d loss / d θ" if gradient else "loss",
        wrong_above=wrong_above,
    )
    return save_figure(figure, out)


def _derivative_where_the_sum_is_one(theta: NDArray[np.float64], terms: int) -> NDArray[np.float64]:
    """Return the derivative of eq. 5's sum by theta, with the epsilon for which the sum is 1."""
    # At s = 1 the loss is the sum, and at epsilon = -1/2 it is the sum without its first term.
    rest = polydice1_curve(theta, -0.5, 1.0, terms=terms)
    with np.errstate(divide="ignore"):
        return np.asarray(2 * (1 - rest) / theta + np.gradient(rest, theta))

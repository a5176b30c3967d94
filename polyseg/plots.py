"""Every figure, from plain arrays: nothing here knows of networks, settings or stored formats.

Figures are drawn without pyplot, so they need no display and leave no global state behind, and in
one style, whatever the user's matplotlibrc says. Equal data give equal files, byte for byte.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from polyseg.errors import PolysegError
from polyseg.files import atomic_path

Numbers = NDArray[Any]
P = ParamSpec("P")

ONE_COLUMN, TWO_COLUMNS = 3.5, 7.0
LABELS, CELL, GAP = 1.2, 1.39, 0.07
"""Widths in inches: of figures, and of what stands in a row of `overlays`."""

# The colours of Okabe and Ito, which stay apart for colour-blind readers.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
RED, PURPLE, SKY, YELLOW = "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"
RUN_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
GRAY, SHADE = "0.6", "0.92"

STYLE: dict[str, Any] = {
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it along: the same on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "figure.titlesize": 10,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "text.parse_math": False,  # a "$" in the name of an image is no formula
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # embedded as TrueType, which publishers ask for
    "svg.hashsalt": "polyseg",
}

# The entries that would tell the date or the version, and so differ between equal figures.
METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Date": None, "Creator": None},
}

UNITS = {"mutual_information": " (nats)", "entropy": " (nats)"}


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(STYLE, after_reset=True):
            return draw(*args, **kwargs)

    return styled


@dataclass(frozen=True, eq=False)
class OverlayCase:
    """One image of `overlays`, all of one height H and width W.

    >>> blank = np.zeros((4, 6))
    >>> OverlayCase("a", blank, None, blank, blank, difficulty=0.1, dice=math.nan).id
    'a'
    """

    id: str
    image: Numbers
    """(H, W), shown from its lowest to its highest value, or (H, W, 3), uint8 or [0, 1]."""
    mask: Numbers | None
    """(H, W) in {0, 1}, or None where there is none."""
    mean: Numbers
    """(H, W) in [0, 1], the mean prediction."""
    uncertainty: Numbers
    """(H, W) at least 0."""
    difficulty: float
    dice: float
    """In [0, 1]; NaN without a mask."""


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write a figure whole or not at all, and return the paths of what was written.

    Args:
        figure: any figure of this room.
        path: with suffix .png (200 dpi), .pdf or .svg; without one, PNG and PDF are written.

    Raises:
        PolysegError: another suffix, or the folder cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in save_figure(Figure(), Path(folder) / "curves")]
    ['curves.png', 'curves.pdf']
    """
    if not path.name or path.is_dir():
        raise PolysegError(f"{path}: is no name of a file for the figure")
    if not path.suffix:
        return [
            *save_figure(figure, path.with_suffix(".png")),
            *save_figure(figure, path.with_suffix(".pdf")),
        ]
    suffix = path.suffix.lower()
    if suffix not in METADATA:
        raise PolysegError(f"{path}: figures are saved as .png, .pdf or .svg, not {path.suffix}")
    with matplotlib.style.context(STYLE, after_reset=True), atomic_path(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], metadata=METADATA[suffix])
    return [path]


@dataclass(frozen=True)
class Sample:
    """A picture with its masks, as `samples_sheet` shows it.

    >>> Sample("a", np.zeros((2, 2)), np.zeros((1, 2, 2))).title
    'a'
    """

    title: str
    image: Numbers
    """(H, W), or (H, W, 3) in [0, 1]."""
    masks: Numbers
    """(K, H, W) in {0, 1}; each is outlined in a colour of its own."""


@_styled
def samples_sheet(rows: Sequence[Sequence[Sample]], *, title: str) -> Figure:
    """Draw pictures in rows, each with the outlines of its masks.

    Args:
        rows: at least one, of equal length.
        title: of the sheet.

    >>> sample = Sample("a", np.zeros((4, 4)), np.zeros((1, 4, 4)))
    >>> len(samples_sheet([[sample, sample]], title="light").axes)
    2
    """
    columns = len(rows[0])
    cell = max(TWO_COLUMNS / columns, 0.9)
    figure = Figure(figsize=(cell * columns, (cell + 0.2) * len(rows) + 0.3))
    figure.suptitle(title)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for axes, sample in zip(panels.ravel(), (one for row in rows for one in row), strict=True):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.imshow(_displayable(sample.image), cmap="gray")
        for k, mask in enumerate(sample.masks):
            _outline(axes, mask, (YELLOW, *RUN_COLOURS)[k % (len(RUN_COLOURS) + 1)])
        axes.set_title(_shorten(sample.title, 16), fontsize=7)
    return figure


@_styled
def headed(figure: Figure, heading: str) -> Figure:
    """Put a heading before the title of a figure's first panel, if there is one.

    >>> figure = Figure()
    >>> _ = figure.add_subplot().set_title("epoch 3")
    >>> headed(figure, "tumour").axes[0].get_title()
    'tumour, epoch 3'
    """
    if heading:
        axes = figure.axes[0]
        axes.set_title(", ".join(filter(None, (heading, axes.get_title()))))
    return figure


@_styled
def loss_curves(
    theta: Numbers,
    curves: Mapping[float, Numbers],
    dice: Numbers,
    *,
    s: float,
    ylabel: str = "loss",
    wrong_above: Numbers | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the loss, or its gradient, over the angle for several epsilon, beside true Dice.

    Args:
        theta: (T,) rising, within [0, pi/2] rad.
        curves: epsilon to (T,) values.
        dice: (T,) the same of true Dice, 1 - s cos(theta), drawn dashed.
        s: the ratio of norms that all curves share, in [0, 1].
        ylabel: what the values are.
        wrong_above: (T,) the values above which the loss rises with s, which are shaded: there
            (1/2 + epsilon) theta^2 > 1.
        title: of the figure.

    >>> theta = np.linspace(0, np.pi / 2, 50)
    >>> figure = loss_curves(theta, {0.0: 0.9 + 0.05 * theta**2}, 1 - 0.1 * np.cos(theta), s=0.1)
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['ε = 0', 'true Dice']
    """
    legend_lines = math.ceil((len(curves) + 2) / 3)
    figure = Figure(figsize=(ONE_COLUMN, 2.8 + 0.17 * legend_lines))
    axes = figure.add_subplot(xlabel="angle θ (rad)", ylabel=ylabel, title=title or "")
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(curves)))  # its light end left out
    for epsilon, colour in zip(sorted(curves, reverse=True), colours, strict=True):
        axes.plot(theta, curves[epsilon], color=colour, label=f"ε = {_number(epsilon)}")
    axes.plot(theta, dice, color=BLACK, linestyle="--", label="true Dice")
    bottom, top = axes.get_ylim()
    if wrong_above is not None and (wrong_above < top).any():
        low = np.clip(wrong_above, bottom, top)
        axes.fill_between(theta, low, top, color=SHADE, linewidth=0, label="loss rises with s")
        axes.set_ylim(bottom, top)
    quarters = ["0", "π/8", "π/4", "3π/8", "π/2"]
    axes.set_xticks(np.linspace(0, np.pi / 2, len(quarters)), quarters)
    axes.set_xlim(0, np.pi / 2)
    figure.legend(loc="outside lower center", ncols=3, title=f"s = {_number(s)}")
    return figure


@_styled
def training_curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the losses, the validation overlap and the learning rate over the epochs.

    Args:
        rows: one an epoch, with `epoch` and any of `train_loss`, `validation_loss`,
            `validation_dice` and `validation_iou` (in [0, 1]), `learning_rate` and `assessed`
            (1 after an assessment); NaN leaves a gap. The first epoch of the highest Dice is
            marked.

    >>> figure = training_curves([{"epoch": 1, "train_loss": 0.6}, {"epoch": 2, "train_loss": 0.4}])
    >>> figure.axes[0].lines[0].get_ydata().tolist()
    [0.6, 0.4]
    """

    def column(name: str) -> Numbers:
        return np.array([row.get(name, math.nan) for row in rows], dtype=float)

    figure = Figure(figsize=(TWO_COLUMNS, 2.4))
    losses, overlap, rate = figure.subplots(1, 3)
    epochs, dice = column("epoch"), column("validation_dice")
    _plot(losses, epochs, column("train_loss"), color=BLUE, label="training")
    _plot(losses, epochs, column("validation_loss"), color=RED, label="validation")
    _plot(overlap, epochs, dice, color=RED, label="Dice")
    _plot(overlap, epochs, column("validation_iou"), color=PURPLE, label="IoU")
    _plot(rate, epochs, column("learning_rate"), color=BLACK)
    if np.isfinite(dice).any():
        best = np.nanargmax(dice)
        label = f"best Dice {dice[best]:.3f},\nepoch {epochs[best]:g}"
        overlap.plot(epochs[best], dice[best], "o", color=BLACK, fillstyle="none", label=label)
    assessed = epochs[column("assessed") == 1]
    if assessed.size:
        foot = {"ymin": 0, "ymax": 0.04, "transform": losses.get_xaxis_transform()}
        losses.vlines(assessed, **foot, color=GRAY, linewidth=0.8, label="assessment")
    for axes, ylabel in ((losses, "loss"), (overlap, "validation"), (rate, "learning rate")):
        axes.set_ylabel(ylabel)
        _finish_epochs(axes, epochs)
    rate.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return figure


@_styled
def epsilon_quantiles(epochs: Numbers, epsilon: Numbers, *, limits: tuple[float, float]) -> Figure:
    """Draw how epsilon spreads over the images, epoch by epoch, as steps an epoch wide.

    Args:
        epochs: (E,) from 1.
        epsilon: (E, n) of n images; NaN values are left out, an epoch without others is a gap.
        limits: eps_min and eps_max, drawn dashed.

    >>> epsilon = np.array([[0.0, 0.2], [0.0, 1.0]])
    >>> figure = epsilon_quantiles(np.array([1, 2]), epsilon, limits=(-0.4, 1.0))
    >>> figure.axes[0].lines[0].get_ydata().round(2).tolist()
    [0.1, 0.1, 0.5, 0.5]
    """
    figure = Figure(figsize=(ONE_COLUMN, 2.6))
    axes = figure.add_subplot(ylabel="ε")
    quantiles = np.full((len(epochs), 5), np.nan)
    for row, values in zip(quantiles, epsilon, strict=True):
        if (finite := _finite(values)).size:
            row[:] = np.percentile(finite, (50, 5, 95, 25, 75))
    steps = np.add.outer(epochs, (-0.5, 0.5)).ravel()
    median, low, high, lower, upper = quantiles.repeat(2, axis=0).T
    axes.plot(steps, median, color=BLUE, label="median")
    axes.fill_between(steps, lower, upper, color=BLUE, alpha=0.35, lw=0, label="25–75 %")
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.15, lw=0, label="5–95 %")
    for limit, label in zip(limits, ("limits", None), strict=True):
        axes.axhline(limit, color=GRAY, linestyle="--", linewidth=0.8, label=label)
    _finish_epochs(axes, steps, legend=False)
    figure.legend(loc="outside upper center", ncols=4, columnspacing=1.2, handlelength=1.4)
    return figure


@_styled
def difficulty_against_dice(
    difficulty: Numbers, dice: Numbers, *, metric: str, correlation: float | None, epoch: int
) -> Figure:
    """Draw each image's Dice over its difficulty: does D know which images are segmented badly?

    Args:
        difficulty: (n,) at least 0; images with NaN here or in `dice` are left out.
        dice: (n,) in [0, 1].
        metric: the pixel map that D averages.
        correlation: Spearman's of D with 1 - Dice, written in the corner; None or NaN: nothing is.
        epoch: of the assessment.

    >>> figure = difficulty_against_dice(
    ...     np.array([0.1, 0.3]), np.array([0.9, 0.7]), metric="variance", correlation=-1.0, epoch=5
    ... )
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['Spearman with 1 − Dice: −1.00']
    """
    shown = np.isfinite(difficulty) & np.isfinite(dice)
    figure = Figure(figsize=(ONE_COLUMN, 2.8))
    axes = figure.add_subplot(xlabel=_difficulty_label(metric), ylabel="Dice")
    axes.set_title(f"epoch {epoch}, {_count(shown.sum(), 'image')}")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.scatter(difficulty[shown], dice[shown], s=12, color=BLUE, alpha=0.5, linewidth=0)
    if correlation is not None and math.isfinite(correlation):
        # Where the points are not: above a cloud that falls, below one that rises.
        y, va = (0.98, "top") if correlation > 0 else (0.02, "bottom")
        text = f"Spearman with 1 − Dice: {correlation:.2f}".replace("-", "−")
        axes.text(0.98, y, text, transform=axes.transAxes, ha="right", va=va)
    return figure


@_styled
def difficulty_distribution(
    epochs: Sequence[int], difficulties: Sequence[Numbers], *, metric: str | None = None
) -> Figure:
    """Draw D's distribution at each assessment as boxes: quartiles, whiskers from 5 to 95 %.

    Args:
        epochs: of the E assessments, rising.
        difficulties: E arrays (n,), at least 0; NaN values are left out. The axis is logarithmic
            where all are positive and spread over more than a factor of 30.
        metric: the pixel map that D averages.

    >>> figure = difficulty_distribution([5, 10], [np.array([1.0, 2, 3]), np.array([1.0, 1, 2])])
    >>> figure.axes[0].get_ylabel(), figure.axes[0].get_yscale()
    ('difficulty D', 'linear')
    """
    figure = Figure(figsize=(ONE_COLUMN, 2.6))
    axes = figure.add_subplot(ylabel=_difficulty_label(metric))
    samples = [_finite(values) for values in difficulties]
    width = 0.6 * min(np.diff(epochs), default=1)
    _boxes(axes, samples, epochs, [BLUE] * len(samples), width=width)
    _finish_epochs(axes, np.add.outer(epochs, (-width / 2, width / 2)))
    everything = np.concatenate([*samples, np.empty(0)])
    if everything.size and everything.max() > 30 * everything.min() > 0:
        axes.set_yscale("log", subs=[])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return figure


@_styled
def overlays(cases: Sequence[OverlayCase], *, metric: str, title: str) -> Figure:
    """Draw a row an image: the image, its mask, the mean prediction and the uncertainty.

    Args:
        cases: at least one. Heights are cut to between 0.4 and 2 widths, with room beside.
        metric: what the uncertainty is; its colours are the same in all rows, from 0 on.
        title: of the figure.

    >>> blank = np.zeros((4, 6))
    >>> case = OverlayCase("a", blank, None, blank, blank, difficulty=0.1, dice=math.nan)
    >>> figure = overlays([case], metric="entropy", title="the hardest")
    >>> [axes.get_title() for axes in figure.axes[:4]]
    ['image', 'mask', 'mean prediction', 'uncertainty']
    """
    shapes = [case.mean.shape for case in cases]
    heights = [CELL * float(np.clip(height / width, 0.4, 2)) for height, width in shapes]
    highest = max(_finite(case.uncertainty).max(initial=0) for case in cases) or 1.0
    lefts = [LABELS + column * (CELL + GAP) for column in range(4)]
    top = 0.55  # room for the title and the columns' names, as 0.75 below is for the colour bars
    figure = Figure(figsize=(TWO_COLUMNS, top + sum(heights) + GAP * len(cases) + 0.75))
    figure.set_layout_engine("none")
    figure.suptitle(title, y=1 - 0.08 / figure.get_figheight(), va="top")
    for case, height in zip(cases, heights, strict=True):
        row = [_place(figure, left, top, CELL, height) for left in lefts]
        mean, uncertainty = _overlay_row(row, case, highest)
        top += height + GAP
    names = ("image", "mask", "mean prediction", "uncertainty")
    for axes, name in zip(figure.axes[:4], names, strict=True):
        axes.set_title(name)
    for left, shown, label in (
        (lefts[2], mean, "probability"),
        (lefts[3], uncertainty, _metric_name(metric).replace(" (", "\n(")),
    ):
        bar = _place(figure, left + 0.1 * CELL, top + 0.05, 0.8 * CELL, 0.08)
        figure.colorbar(shown, cax=bar, orientation="horizontal", label=label)
    return figure


@_styled
def comparison(names: Sequence[str], values: Mapping[str, Sequence[Numbers]]) -> Figure:
    """Draw the per-image values of several runs side by side, a panel a metric.

    Each point is an image; boxes show the quartiles, whiskers reach from 5 to 95 %, the diamond
    is the mean. Values that are not finite are left out, and their number is written below.

    Args:
        names: of the runs.
        values: the metric's title to an array (n_i,) a run.

    Raises:
        ValueError: a metric has not one array a run.

    >>> dice = [np.array([0.8, 0.9]), np.array([0.7, math.nan])]
    >>> comparison(["adaptive", "fixed"], {"Dice": dice}).axes[0].get_xlabel()
    '1 value not finite'
    """
    columns = min(len(values), 3) or 1
    lines = math.ceil(len(values) / columns) or 1
    width = ONE_COLUMN if columns == 1 else TWO_COLUMNS
    figure = Figure(figsize=(width, lines * (0.7 + 0.35 * len(names))))
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes in panels[len(values) :]:
        axes.remove()
    for axes, (metric, runs) in zip(panels, values.items(), strict=False):
        _comparison_panel(axes, names, runs)
        axes.set_title(metric)
    return figure


def _plot(axes: Axes, x: Numbers, y: Numbers, **style: Any) -> None:
    """Draw a line with gaps at NaN; a value without neighbours, which no line shows, is a dot."""
    finite = np.isfinite(y)
    if finite.any():
        left, right = np.append(False, finite[:-1]), np.append(finite[1:], False)
        alone = np.flatnonzero(finite & ~left & ~right)
        axes.plot(x, y, marker="." if alone.size else "", markevery=alone, **style)


def _finish_epochs(axes: Axes, epochs: Numbers, *, legend: bool = True) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if epochs.size:
        margin = 0.5 + 0.02 * np.ptp(epochs)
        axes.set_xlim(epochs.min() - margin, epochs.max() + margin)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend()


def _boxes(
    axes: Axes,
    samples: Sequence[Numbers],
    positions: Sequence[float],
    colours: Sequence[str],
    *,
    width: float,
    horizontal: bool = False,
) -> None:
    """Draw quartiles as boxes, whiskers from 5 to 95 %; matplotlib's boxplot imports pyplot."""
    upright: tuple[Callable[..., Any], ...] = (axes.bar, axes.vlines, axes.hlines)
    lying: tuple[Callable[..., Any], ...] = (axes.barh, axes.hlines, axes.vlines)
    bar, along, across = lying if horizontal else upright
    axes.use_sticky_edges = False  # or a box that starts at the lowest value touches the frame
    edge = {"edgecolor": BLACK, "linewidth": 0.8}
    for values, position, colour in zip(samples, positions, colours, strict=True):
        if values.size:
            low, lower, median, upper, high = np.percentile(values, (5, 25, 50, 75, 95))
            bar(position, upper - lower, width, lower, facecolor=(colour, 0.35), **edge)
            along([position, position], [low, upper], [lower, high], **edge)
            ends = position - width / 2, position + width / 2
            across(median, *ends, colors=BLACK, linewidth=1.6)


def _comparison_panel(axes: Axes, names: Sequence[str], runs: Sequence[Numbers]) -> None:
    samples = [_finite(values) for values in runs]
    rows = range(len(names))
    colours = [RUN_COLOURS[row % len(RUN_COLOURS)] for row in rows]
    for row, values, colour in zip(rows, samples, colours, strict=True):
        # Multiples of the golden ratio spread the points evenly, and always in the same way.
        jitter = 0.5 * ((0.618034 * np.arange(values.size)) % 1 - 0.5)
        axes.scatter(values, row + jitter, s=3, color=colour, linewidth=0, rasterized=True)
        if values.size:
            axes.plot(values.mean(), row, "D", color="white", markeredgecolor=BLACK, zorder=4)
    _boxes(axes, samples, rows, colours, width=0.6, horizontal=True)
    axes.set_yticks(rows, [_shorten(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    if lost := sum(np.size(values) for values in runs) - sum(values.size for values in samples):
        axes.set_xlabel(f"{_count(lost, 'value')} not finite")


def _place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes at a place in inches from the upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes(
        (left / across, 1 - (top + height) / down, width / across, height / down)
    )


def _overlay_row(axes: Sequence[Axes], case: OverlayCase, highest: float) -> list[AxesImage]:
    """Draw one row and return the images that the two colour bars explain."""
    for panel in axes:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    scores = f"D = {case.difficulty:.3g}\nDice = {case.dice:.3f}".replace("nan", "–")
    label = f"{_shorten(case.id, 16)}\n{scores}"
    axes[0].annotate(
        label, (0, 0.5), (-82, 0), "axes fraction", "offset points", va="center", fontsize=8
    )
    for panel in axes[:2]:
        panel.imshow(_displayable(case.image), cmap="gray")
    for panel in axes[1:3]:
        _outline(panel, case.mask)
    if case.mask is None or not np.any(case.mask):
        note = "no mask" if case.mask is None else "empty mask"
        box = {"facecolor": "white", "linewidth": 0, "pad": 1.5}
        axes[1].text(0.03, 0.97, note, transform=axes[1].transAxes, va="top", fontsize=7, bbox=box)
    return [
        axes[2].imshow(np.float32(case.mean), cmap="gray", vmin=0, vmax=1),
        axes[3].imshow(np.float32(case.uncertainty), cmap="magma", vmin=0, vmax=highest),
    ]


def _outline(axes: Axes, mask: Numbers | None, colour: str = YELLOW) -> None:
    """Draw a mask's edge: in a black seam, to be seen on any image."""
    if mask is not None and np.any(mask) and not np.all(mask):
        edge = axes.contour(np.asarray(mask, dtype=float), levels=[0.5], colors=colour)
        edge.set(linewidth=0.6, path_effects=[withStroke(linewidth=1.3, foreground=BLACK)])


def _displayable(image: Numbers) -> Numbers:
    """Return an image as imshow takes it: colours beyond [0, 1] are brought into it."""
    if image.ndim == 2 or image.dtype == np.uint8:
        return image
    finite = _finite(image)
    low, high = finite.min(initial=0), finite.max(initial=1)
    return np.asarray(np.nan_to_num((image - low) / (high - low)))


def _finite(values: Numbers) -> Numbers:
    values = np.asarray(values, dtype=float)
    return values[np.isfinite(values)]


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _shorten(name: str, length: int = 20) -> str:
    """Return a name with its middle left out where it is long: both ends tell files apart."""
    half = length // 2
    return name if len(name) <= length else f"{name[: half - 1]}…{name[-half:]}"


def _metric_name(metric: str) -> str:
    return metric.replace("_", " ") + UNITS.get(metric, "")


def _difficulty_label(metric: str | None) -> str:
    return f"difficulty D\n{_metric_name(metric)}" if metric else "difficulty D"

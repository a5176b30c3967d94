"""Images with masks, predictions and uncertainty maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from polyseg.figures import style
from polyseg.figures.style import Numbers, styled

LABELS, CELL, GAP = 1.2, 1.39, 0.07
"""Widths of the parts of a row of `overlays`, in inches."""
_LONGEST_OF_OVERLAYS, _LONGEST_OF_PREDICTIONS, _LONGEST_OF_SAMPLES = 28, 40, 26
"""Largest lengths of an id, which is shown in two lines."""

_OVERLAY_NOTE = (
    "Yellow outline: mask. Colours of the uncertainty\n"
    "end at the 99th percentile of all maps shown,\n"
    "in both figures, of largest and smallest D."
)

_LINES: dict[str, tuple[str, float, withStroke]] = {
    "mask": (style.YELLOW, 0.9, withStroke(linewidth=1.4, foreground=style.BLACK)),
    "prediction": (style.BLUE, 0.5, withStroke(linewidth=0.8, foreground="white")),
}
"""Colour, width and border of the outlines in `predictions`; both are visible if they agree."""


@dataclass(frozen=True)
class OutlinedImage:
    """An image with its masks in `samples_sheet`."""

    title: str
    image: Numbers
    """Image, (H, W), or (H, W, 3) in [0, 1]."""
    masks: Numbers
    """Masks, (K, H, W) in {0, 1}, each outlined in its own colour."""


@styled
def samples_sheet(rows: Sequence[Sequence[OutlinedImage]], *, title: str) -> Figure:
    """Draw rows of images, at least one and of equal length, with the outlines of their masks."""
    columns = len(rows[0])
    cell = max(style.TWO_COLUMNS / columns, 0.9)
    figure = Figure(figsize=(cell * columns, (cell + 0.32) * len(rows) + 0.3))
    figure.suptitle(title)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for axes, sample in zip(panels.ravel(), (one for row in rows for one in row), strict=True):
        _show(axes, sample.image)
        for k, mask in enumerate(sample.masks):
            _outline(
                axes, mask, (style.YELLOW, *style.RUN_COLOURS)[k % (len(style.RUN_COLOURS) + 1)]
            )
        axes.set_title(style.wrapped(sample.title, _LONGEST_OF_SAMPLES), fontsize=7)
    return figure


@dataclass(frozen=True, eq=False)
class OverlayCase:
    """One image of `overlays`, with arrays of equal height and width."""

    id: str
    image: Numbers
    """(H, W), or (H, W, 3) uint8 or in [0, 1]; gray values are stretched to the full range."""
    mask: Numbers | None
    """(H, W) in {0, 1}, or None."""
    mean: Numbers
    """(H, W) mean prediction in [0, 1]."""
    uncertainty: Numbers
    """(H, W) uncertainty, at least 0."""
    difficulty: float
    dice: float
    """Dice in [0, 1]; NaN without a mask."""


@styled
def overlays(
    cases: Sequence[OverlayCase], *, metric: str, title: str, highest: float | None = None
) -> Figure:
    """Draw a row for each image: the image, its mask, the mean prediction and the uncertainty.

    Args:
        cases: at least one. Heights are limited to between 0.4 and 2 widths.
        metric: name of the uncertainty.
        title: of the figure.
        highest: uncertainty at the upper end of the colours, which start at 0; by default
            `highest_uncertainty` of the cases. Figures with the same value can be compared.
    """
    shapes = [case.mean.shape for case in cases]
    heights = [CELL * float(np.clip(height / width, 0.4, 2)) for height, width in shapes]
    if highest is None:
        highest = highest_uncertainty([case.uncertainty for case in cases])
    lefts = [LABELS + column * (CELL + GAP) for column in range(4)]
    top = 0.55  # space for the titles; 0.75 below is for the colour bars
    figure = Figure(figsize=(style.TWO_COLUMNS, top + sum(heights) + GAP * len(cases) + 0.75))
    figure.set_layout_engine("none")
    figure.suptitle(title, y=1 - 0.08 / figure.get_figheight(), va="top")
    names = style.without_common_start([case.id for case in cases], _LONGEST_OF_OVERLAYS)
    for case, name, height in zip(cases, names, heights, strict=True):
        row = [style.place_axes(figure, left, top, CELL, height) for left in lefts]
        mean, uncertainty = _overlay_row(row, case, name, highest)
        top += height + GAP
    heads = ("image", "mask", "mean prediction", "uncertainty")
    for axes, head in zip(figure.axes[:4], heads, strict=True):
        axes.set_title(head)
    for left, shown, label in (
        (lefts[2], mean, "probability"),
        (lefts[3], uncertainty, style.metric_name(metric).replace(" (", "\n(")),
    ):
        bar = style.place_axes(figure, left + 0.1 * CELL, top + 0.05, 0.8 * CELL, 0.08)
        end = "max" if shown is uncertainty else "neither"
        figure.colorbar(shown, cax=bar, orientation="horizontal", label=label, extend=end)
    note = figure.text(0.02, 0.1 / figure.get_figheight(), _OVERLAY_NOTE, fontsize=8)
    note.set_linespacing(1.3)
    return figure


def highest_uncertainty(maps: Sequence[Numbers]) -> float:
    """Return the upper end of a colour scale for uncertainty maps: their 99th percentile.

    Their maximum would be that of a few pixels, and leave all others nearly black.

    >>> highest_uncertainty([np.arange(101.0)])
    99.0
    """
    values = np.concatenate([style.finite_values(one).ravel() for one in maps])
    return float(np.percentile(values, 99)) or 1.0 if values.size else 1.0


@dataclass(frozen=True, eq=False)
class PredictionCase:
    """One image of `predictions`, with the predictions of R runs."""

    id: str
    image: Numbers
    """As in `OverlayCase`."""
    mask: Numbers
    """(H, W) in {0, 1}."""
    predictions: Sequence[Numbers]
    """R arrays, (H, W) bool."""
    dice: Sequence[float]
    """R values in [0, 1]."""


@styled
def predictions(cases: Sequence[PredictionCase], names: Sequence[str], *, title: str) -> Figure:
    """Draw a row for each image: its mask, then each run's prediction over the mask as outlines.

    `names` are those of the runs, at least one. Heights are limited to between 0.4 and 1.25 widths.
    """
    columns = 1 + len(names)
    cell = float(np.clip(style.TWO_COLUMNS / columns, 1.2, style.ONE_COLUMN / 2))
    shapes = [case.mask.shape for case in cases]
    heights = [cell * float(np.clip(height / width, 0.4, 1.25)) for height, width in shapes]
    heads = ["mask", *(style.wrapped(name) for name in names)]
    ids = style.without_common_start([case.id for case in cases], _LONGEST_OF_PREDICTIONS)
    ids = [style.wrapped(one, _LONGEST_OF_PREDICTIONS) for one in ids]
    top, below, bottom = 0.6, 0.36 if any("\n" in one for one in ids) else 0.24, 0.25
    size = cell * columns, top + sum(heights) + below * len(cases) + bottom
    figure = Figure(figsize=size)
    figure.set_layout_engine("none")
    figure.suptitle(title, y=1 - 0.08 / size[1], va="top")
    for case, name, height in zip(cases, ids, heights, strict=True):
        lefts = cell * np.arange(columns) + GAP / 2
        row = [style.place_axes(figure, left, top, cell - GAP, height) for left in lefts]
        _prediction_row(row, case, name)
        top += height + below
    for axes, head in zip(figure.axes, heads, strict=False):
        axes.set_title(head, fontsize=7)
    handles = [
        Line2D([], [], color=colour, linewidth=width, path_effects=[seam], label=label)
        for label, (colour, width, seam) in _LINES.items()
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2)
    return figure


def _overlay_row(
    axes: Sequence[Axes], case: OverlayCase, name: str, highest: float
) -> list[AxesImage]:
    """Draw one row, and return the images for the two colour bars."""
    scores = f"D = {case.difficulty:.3g}\nDice = {case.dice:.3f}".replace("nan", "–")
    label = f"{style.wrapped(name, _LONGEST_OF_OVERLAYS)}\n{scores}"
    axes[0].annotate(
        label, (0, 0.5), (-82, 0), "axes fraction", "offset points", va="center", fontsize=8
    )
    for panel in axes[:2]:
        _show(panel, case.image)
    for panel in axes[1:3]:
        _outline(panel, case.mask)
    if case.mask is None or not np.any(case.mask):
        _note(axes[1], "no mask" if case.mask is None else "empty mask")
    return [
        _show(axes[2], case.mean.astype(np.float32), vmin=0, vmax=1),
        _show(axes[3], case.uncertainty.astype(np.float32), cmap="magma", vmin=0, vmax=highest),
    ]


def _prediction_row(axes: Sequence[Axes], case: PredictionCase, name: str) -> None:
    texts = [name, *(f"Dice {dice:.3f}".replace("nan", "–") for dice in case.dice)]
    for panel, predicted, text in zip(axes, [None, *case.predictions], texts, strict=True):
        _show(panel, case.image)
        _edge(panel, case.mask, *_LINES["mask"])
        _edge(panel, predicted, *_LINES["prediction"])
        panel.set_xlabel(text, fontsize=7, labelpad=2)
    if not np.any(case.mask):
        _note(axes[0], "empty mask")
    for panel, predicted in zip(axes[1:], case.predictions, strict=True):
        if not np.any(predicted):
            _note(panel, "nothing predicted")


def _show(axes: Axes, image: Numbers, cmap: str = "gray", **limits: Any) -> AxesImage:
    """Show an image without ticks and frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes.imshow(_displayable(image), cmap=cmap, **limits)


def _outline(axes: Axes, mask: Numbers | None, colour: str = style.YELLOW) -> None:
    """Draw the outline of a mask with a black border, visible on any image."""
    _edge(axes, mask, colour, 0.5, withStroke(linewidth=0.8, foreground=style.BLACK))


def _edge(axes: Axes, mask: Numbers | None, colour: str, width: float, seam: withStroke) -> None:
    if mask is not None and np.any(mask) and not np.all(mask):
        edge = axes.contour(np.asarray(mask, dtype=float), levels=[0.5], colors=colour)
        edge.set(linewidth=width, path_effects=[seam])


def _note(axes: Axes, text: str) -> None:
    box = {"facecolor": "white", "linewidth": 0, "pad": 1.5}
    axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=7, bbox=box)


def _displayable(image: Numbers) -> Numbers:
    """Return an image for imshow, with colours scaled to [0, 1] if they exceed it."""
    if image.ndim == 2 or image.dtype == np.uint8:
        return image
    finite = style.finite_values(image)
    low, high = finite.min(initial=0), finite.max(initial=1)
    return np.asarray(np.nan_to_num((image - low) / (high - low)))

"""The style of all figures, and functions that several of them use.

Figures are drawn without pyplot, which has global state and may need a display, and without the
user's matplotlibrc. Equal data give equal files, byte for byte.
"""

import functools
import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from polyseg.choices import score_names, score_of
from polyseg.errors import PolysegError
from polyseg.system.files import atomic_path

Numbers = NDArray[Any]
P = ParamSpec("P")

ONE_COLUMN, TWO_COLUMNS = 3.5, 7.0
"""Widths of figures, in inches."""

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
RED, PURPLE, SKY, YELLOW = "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"
RUN_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
MARKERS = "osD^vPX"
"""Markers; their number and that of the colours have no common divisor, so pairs rarely repeat."""
GRAY, SHADE = "0.6", "0.92"

STYLE: dict[str, Any] = {
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # part of matplotlib, so the same on every machine
    "figure.titlesize": 10,
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 9),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 8),
    **dict.fromkeys(("legend.fontsize", "legend.title_fontsize"), 8),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False),
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "text.parse_math": False,  # names of images may contain "$"
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "svg.hashsalt": "polyseg",
}

# Entries with a date or a version, in which equal figures would differ.
METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Date": None, "Creator": None},
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a function draw its figure in the common style."""

    @functools.wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(STYLE, after_reset=True):
            return draw(*args, **kwargs)

    return in_style


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure atomically as .png (200 dpi), .pdf or .svg, and return the paths of the files.

    A path without suffix gives PNG and PDF. Another suffix, or a folder that cannot be written,
    raises PolysegError.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in save_figure(Figure(), Path(folder) / "curves")]
    ['curves.png', 'curves.pdf']
    """
    path = Path(path)
    if not path.name or path.is_dir():
        raise PolysegError(f"{path}: is not a file name for a figure")
    if not path.suffix:
        places = path.with_suffix(".png"), path.with_suffix(".pdf")
        return [file for place in places for file in save_figure(figure, place)]
    suffix = path.suffix.lower()
    if suffix not in METADATA:
        raise PolysegError(f"{path}: figures are saved as .png, .pdf or .svg, not {path.suffix}")
    with matplotlib.style.context(STYLE, after_reset=True), atomic_path(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], metadata=METADATA[suffix])
    return [path]


@styled
def headed(figure: Figure, heading: str) -> Figure:
    """Put a heading in front of the title of a figure's first panel."""
    if heading:
        axes = figure.axes[0]
        axes.set_title(", ".join(filter(None, (heading, axes.get_title()))))
    return figure


def place_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes at a position in inches from the upper left corner of a figure."""
    across, down = figure.get_size_inches()
    return figure.add_axes(
        (left / across, 1 - (top + height) / down, width / across, height / down)
    )


def epochs_axis(axes: Axes, epochs: Numbers, *, legend: bool = True) -> None:
    """Make x an axis of epochs: whole numbers, wide enough for all, with a legend if needed."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if epochs.size:
        margin = 0.5 + 0.02 * np.ptp(epochs)
        axes.set_xlim(epochs.min() - margin, epochs.max() + margin)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend()


def boxes(
    axes: Axes,
    samples: Sequence[Numbers],
    positions: Sequence[float],
    colours: Sequence[str],
    *,
    width: float,
    horizontal: bool = False,
) -> None:
    """Draw quartiles as boxes, medians as lines and whiskers from 5 to 95 %.

    `samples` are arrays (n_i,) of finite values; empty ones get no box. `positions` are the centres
    of the boxes, and `width` has the same unit. `horizontal` puts the values along x.
    """
    # Not by matplotlib's boxplot, which imports pyplot.
    upright: tuple[Callable[..., Any], ...] = (axes.bar, axes.vlines, axes.hlines)
    lying: tuple[Callable[..., Any], ...] = (axes.barh, axes.hlines, axes.vlines)
    bar, along, across = lying if horizontal else upright
    axes.use_sticky_edges = False  # or a box at the lowest value would touch the frame
    edge = {"edgecolor": BLACK, "linewidth": 0.8}
    for values, position, colour in zip(samples, positions, colours, strict=True):
        if values.size:
            low, lower, median, upper, high = np.percentile(values, (5, 25, 50, 75, 95))
            bar(position, upper - lower, width, lower, facecolor=(colour, 0.35), **edge)
            along([position, position], [low, upper], [lower, high], **edge)
            ends = position - width / 2, position + width / 2
            across(median, *ends, colors=BLACK, linewidth=1.6)


def run_colour(number: int) -> str:
    """Return the colour of a run by its number; colours repeat."""
    return RUN_COLOURS[number % len(RUN_COLOURS)]


def finite_values(values: Numbers) -> Numbers:
    """Return the finite values, (m,), as floats."""
    values = np.asarray(values, dtype=float)
    return values[np.isfinite(values)]


def formatted(value: float, form: str = "g") -> str:
    """Return a number as text with a minus sign instead of a hyphen.

    >>> formatted(-0.5), formatted(-0.5, ".2f")
    ('−0.5', '−0.50')
    """
    return f"{value:{form}}".replace("-", "−")


def shorten(name: str, length: int = 20) -> str:
    """Return a name without its middle if it is long, because names mostly differ at their ends.

    >>> shorten("case_0001_left_view", 10)
    'case…_view'
    """
    half = length // 2
    return name if len(name) <= length else f"{name[: half - 1]}…{name[-half:]}"


def wrapped(name: str, longest: int = 40) -> str:
    """Return up to `longest` characters of a name, in two lines if there are more than 55 %.

    >>> wrapped("adaptive"), wrapped("adaptive_polydice_entropy_seed_3")
    ('adaptive', 'adaptive_polydice_\\nentropy_seed_3')
    """
    name = shorten(name, longest)
    if len(name) <= 0.55 * longest:
        return name
    middle = len(name) // 2
    ends = [match.end() for match in re.finditer(r"[\s_,-]", name)]
    # Between words, unless the lines would differ much in length.
    ends = [end for end in ends if abs(end - middle) <= 0.15 * longest] or [middle]
    cut = min(ends, key=lambda end: abs(end - middle))
    return f"{name[:cut].rstrip()}\n{name[cut:]}"


def without_common_start(names: Sequence[str], longest: int) -> list[str]:
    """Return names without the words with which all begin, if one is longer than `longest`.

    >>> without_common_start(["trial_of_2020_p1_left", "trial_of_2020_p2_left"], 20)
    ['…p1_left', '…p2_left']
    >>> without_common_start(["p1", "p2"], 20), without_common_start(["a_long_name"], 5)
    (['p1', 'p2'], ['a_long_name'])
    """
    if len(set(names)) < 2 or max(map(len, names)) <= longest:
        return list(names)
    words = [re.findall(r"[^\s_,-]*[\s_,-]?", name) for name in names]
    equal = takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    start = len("".join(column[0] for column in equal))
    return [f"…{name[start:]}" if start else name for name in names]


def metric_name(metric: str) -> str:
    """Return the name of a score for figures, with its unit.

    >>> metric_name("mutual_information"), metric_name("variance")
    ('mutual information (nats)', 'variance')
    """
    row = score_of(metric) if metric in score_names() else None
    unit = f" ({row.unit})" if row and row.unit else ""
    return metric.replace("_", " ") + unit

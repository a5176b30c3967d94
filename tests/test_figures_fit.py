"""All texts and legends of all figures are inside their figure."""

import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

TOLERANCE = 1.0
"""Pixels by which the box of a text may leave the figure, because boxes are wider than letters."""


def cut_off(figure):
    """Return the texts and legends that are partly outside the figure."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    page = figure.bbox
    found = []
    # Labels of ticks outside the limits exist, and are not drawn.
    ticks = {label for axis in figure.findobj(Axis) for label in axis.get_ticklabels(which="both")}
    for artist in [*figure.findobj(Text), *figure.findobj(Legend)]:
        empty = isinstance(artist, Text) and not artist.get_text().strip()
        if empty or artist in ticks or not artist.get_visible():
            continue
        box = artist.get_window_extent(renderer)
        if (
            min(box.x0, box.y0) < -TOLERANCE
            or box.x1 > page.x1 + TOLERANCE
            or box.y1 > page.y1 + TOLERANCE
        ):
            found.append(artist.get_text() if isinstance(artist, Text) else "legend")
    return found


@pytest.fixture
def saved(monkeypatch):
    """Return a dictionary of the texts that each saved figure cuts off, by the name of its file."""
    found = {}

    def save(figure, path, **how):
        path.write_bytes(b"")  # Only the drawing matters.
        if str(how.get("format")) == "png":
            found[f"{len(found)}: {path.name}"] = cut_off(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return found


def test_cut_off_texts_are_found():
    figure = Figure(figsize=(2, 2))
    figure.text(0.9, 0.5, "far too long for this figure")
    figure.text(0.1, 0.5, "inside")
    assert cut_off(figure) == ["far too long for this figure"]


@pytest.mark.slow
def test_no_text_of_any_figure_is_cut_off(saved, finished, polyseg, tmp_path):
    run = finished("a-run-with-a-long-name").path
    other = finished("another-run-of-another-loss").path
    for command in (
        ("evaluate", run, other, "--baseline", run, "--uncertainty", "--corrupt", "noise"),
        ("schedule", "plot", run, other, "--out", tmp_path / "plot"),
        ("schedule", "validity", run, "--out", tmp_path / "validity"),
        ("estimate-uncertainty", run, "--out", tmp_path / "estimate"),
        ("report", run, other, "--out", tmp_path / "report.html"),
        ("plot-loss", "--out", tmp_path / "loss.png"),
        ("data", "preview", "demo", "--out", tmp_path / "preview.png"),
        ("train", "--resume", "--out", run, "--epochs", 4, "--set", "output.figures=true"),
    ):
        answer = polyseg(*command)
        assert answer.code == 0, answer.err
    assert len(saved) > 15
    assert {name: texts for name, texts in saved.items() if texts} == {}

"""Figures of schedules: drawn values equal the given ones, also in degenerate cases."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from polyseg.figures.schedules import (
    Panel,
    difficulty_panels,
    epsilon_bands,
    epsilon_map,
    rank_curves,
    validity_curves,
)
from polyseg.figures.style import save_figure


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def test_epsilon_bands_show_quantiles_of_each_run():
    runs = {f"r{k}": (np.arange(1, 4), noise(3, 50, seed=k)) for k in range(3)}
    axes = epsilon_bands(runs).axes[0]
    for line, band, (_, epsilon) in zip(
        axes.lines[::3], axes.collections, runs.values(), strict=True
    ):
        np.testing.assert_allclose(line.get_ydata()[::2], np.median(epsilon, axis=1))
        low, high = np.quantile(epsilon, (0.05, 0.95))
        ys = band.get_paths()[0].vertices[:, 1]
        assert ys.min() == pytest.approx(np.quantile(epsilon, 0.05, axis=1).min())
        assert ys.max() == pytest.approx(np.quantile(epsilon, 0.95, axis=1).max())
        assert low <= high
    assert len({to_hex(line.get_color()) for line in axes.lines}) == 3


def test_epsilon_bands_of_runs_of_different_length_share_the_axis():
    runs = {"short": (np.arange(1, 3), noise(2, 4)), "long": (np.arange(1, 9), noise(8, 5))}
    assert epsilon_bands(runs).axes[0].get_xlim()[1] > 8.5


def test_epsilon_map_shows_the_most_difficult_image_on_top():
    epsilon, difficulty = noise(4, 6), noise(6, seed=1)
    figure = epsilon_map(
        np.arange(1, 5), epsilon, difficulty, limits=(-0.4, 1.0), assessed=[0, 2, 9]
    )
    shown = figure.axes[0].images[0]
    drawn = np.asarray(shown.get_array())
    assert drawn.shape == (6, 4)
    np.testing.assert_array_equal(drawn[0], epsilon[:, difficulty.argmax()])
    np.testing.assert_array_equal(drawn[-1], epsilon[:, difficulty.argmin()])
    assert shown.get_clim() == (-0.4, 1.0)
    assert figure.axes[0].get_ylim() == (6.5, 0.5)  # the first row is at the top
    (top,) = figure.axes[0].child_axes
    assert top.get_xticks().tolist() == [0.5, 2.5]


def test_epsilon_map_extends_colours_beyond_the_limits():
    figure = epsilon_map(np.array([1]), np.array([[2.0, -0.5]]), np.arange(2.0), limits=(-0.4, 1))
    assert figure.axes[0].images[0].get_clim() == (-0.5, 2.0)


def test_difficulty_panels_show_every_image_and_the_correlation():
    panels = [Panel(e, noise(8, seed=e), noise(8, seed=e + 1), 0.25 - e) for e in range(1, 6)]
    figure = difficulty_panels(panels, metric="entropy")
    assert [axes.get_title() for axes in figure.axes][:2] == ["epoch 1: −0.75", "epoch 2: −1.75"]
    for axes, panel in zip(figure.axes, panels, strict=True):
        points = axes.collections[0].get_offsets()
        np.testing.assert_allclose(points, np.stack([panel.difficulty, panel.dice], axis=1))
    assert "8 images" in figure.get_suptitle()


def test_difficulty_panel_without_masks_shows_a_note():
    panel = Panel(3, noise(4), np.full(4, math.nan), math.nan)
    assert difficulty_panels([panel], metric="variance").axes[0].get_title() == "epoch 3: –"


def test_rank_curves_show_all_values_within_the_axis():
    values = np.array([math.nan, -0.9, 0.3])
    axes = rank_curves([1, 2, 3], {"last assessment": values}).axes[0]
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), values)
    assert axes.get_ylim()[0] < -0.9 and axes.get_ylim()[1] > 1


def test_validity_figure_has_a_panel_per_reference_and_one_legend():
    scores = ("mutual_information", "entropy", "variance", "deterministic_entropy", "training_loss")
    panels = {
        title: {score: noise(4, seed=k) for k, score in enumerate(scores)}
        for title in ("with 1 − Dice", "with the size of the mask", "with 1 − Dice at equal size")
    }
    figure = validity_curves([1, 2, 3, 4], panels)
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    assert len({to_hex(line.get_color()) for line in figure.axes[0].lines[1:]}) == 5
    assert len(figure.legends) == 1 and not any(axes.get_legend() for axes in figure.axes)


def test_rows_of_the_epsilon_map_have_the_ids_of_their_images():
    difficulty = np.arange(100.0)
    names = [f"image_{k}" for k in range(100)]
    for count in (3, 100):
        figure = epsilon_map(
            np.array([1]),
            difficulty[None, :count] / 100,
            difficulty[:count],
            limits=(-0.4, 1.0),
            ids=names[:count],
        )
        axes = figure.axes[0]
        shown = {
            int(tick): text.get_text()
            for tick, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        }
        assert shown[1] == names[count - 1] and len(shown) <= 40
        assert all(text == names[count - row] for row, text in shown.items())


def test_ids_of_the_epsilon_map_keep_the_number_of_the_patient():
    names = [f"{'AB'[k % 2]}C-HYP-{k:02d}-IM-0001-0128" for k in range(9)]
    for start in ("", "a_long_name_of_a_study_"):
        ids = [f"{start}{name}" for name in names]
        figure = epsilon_map(np.array([1]), noise(1, 9), -np.arange(9), limits=(0, 1), ids=ids)
        shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert shown == [f"…{name}" if start else name for name in names]
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
        assert all(box.x0 >= 0 for box in boxes)
        assert figure.axes[0].get_window_extent().width > 0.4 * figure.bbox.width


@pytest.mark.parametrize("order", [1, -1])
def test_validity_panels_share_an_axis_that_holds_all_values(order):
    panels = {"low": {"a": np.array([-1.0, 1.0])}, "high": {"a": np.array([0.9, math.nan])}}
    figure = validity_curves([1, 2], dict(list(panels.items())[::order]))
    for axes in figure.axes:
        assert axes.get_ylim() == (-1.05, 1.05)
        assert axes.lines[1].get_marker() != ""  # so that a single value is visible


def test_equal_curves_have_markers_of_different_size():
    curves = {name: np.array([0.5, 0.6]) for name in "abcde"}
    lines = validity_curves([1, 2], {"with size": curves}).axes[0].lines[1:]
    sizes = [line.get_markersize() for line in lines]
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw",
    [
        lambda: epsilon_bands({"$a_1$": (np.array([1]), np.array([[0.0]]))}),
        lambda: epsilon_map(np.array([1]), np.array([[0.0]]), np.zeros(1), limits=(0, 0)),
        lambda: difficulty_panels([Panel(0, np.zeros(1), np.ones(1), math.nan)], metric="entropy"),
        lambda: rank_curves([0], {"a": np.array([math.nan])}),
        lambda: validity_curves([0], {"a": {"b": np.array([math.nan])}}),
    ],
)
def test_smallest_inputs_are_drawn_and_give_equal_files(draw, tmp_path):
    first = save_figure(draw(), tmp_path / "first")
    again = save_figure(draw(), tmp_path / "again")
    assert [path.suffix for path in first] == [".png", ".pdf"]
    assert [one.read_bytes() for one in first] == [two.read_bytes() for two in again]
    with Image.open(first[0]) as image:
        assert min(image.size) > 300

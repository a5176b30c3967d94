"""Robustness curves: drawn values equal the given ones."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from polyseg.figures.robustness import robustness_curves
from polyseg.figures.style import ONE_COLUMN, TWO_COLUMNS, save_figure

pytestmark = pytest.mark.filterwarnings("error")

STRENGTHS = range(6)
DICE = np.random.default_rng(0).beta(8, 2, (6, 40)) - 0.1 * np.arange(6)[:, None]


def curves(*corruptions, runs=2):
    return {name: {f"run {i}": DICE - 0.01 * i for i in range(runs)} for name in corruptions}


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_each_corruption_has_a_panel_and_each_run_a_line():
    figure = robustness_curves(STRENGTHS, curves("noise", "blur", "jpeg", "gamma"))
    assert titles(figure) == ["noise", "blur", "jpeg", "gamma"]
    for axes in figure.axes:
        for i, line in enumerate(axes.lines):
            assert line.get_xdata().tolist() == list(STRENGTHS)
            np.testing.assert_allclose(line.get_ydata(), DICE.mean(axis=1) - 0.01 * i)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["run 0", "run 1"]
    assert figure.get_supylabel() == "mean Dice"


def test_bands_are_bootstrap_intervals_of_the_mean():
    (band,) = robustness_curves(STRENGTHS, curves("noise", runs=1)).axes[0].collections
    vertices = band.get_paths()[0].vertices
    expected = bootstrap((DICE,), np.mean, axis=1, random_state=1).confidence_interval
    for strength in STRENGTHS:
        ends = vertices[vertices[:, 0] == strength, 1]
        np.testing.assert_allclose(ends.min(), expected.low[strength], atol=0.004)
        np.testing.assert_allclose(ends.max(), expected.high[strength], atol=0.004)


def test_images_with_undefined_values_are_excluded_and_counted():
    values = curves("noise", "blur")
    values["noise"]["run 1"] = values["noise"]["run 1"].copy()
    values["noise"]["run 1"][2, 3] = np.nan
    figure = robustness_curves(STRENGTHS, values)
    assert titles(figure) == ["noise (1 image left out)", "blur"]
    rest = np.delete(DICE, 3, axis=1)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), rest.mean(axis=1))
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), rest.mean(axis=1) - 0.01)


@pytest.mark.parametrize(
    "values",
    [
        {"noise": {"a": np.full((6, 3), np.nan)}},
        {"noise": {"a": np.empty((6, 0))}},
        {"noise": {"a": np.ones((6, 1))}},
        curves("noise", runs=15),
    ],
    ids=["undefined", "no image", "one image", "many runs"],
)
def test_degenerate_values_give_no_warning(values, tmp_path):
    figure = robustness_curves(STRENGTHS, values)
    assert save_figure(figure, tmp_path / "a.png")[0].stat().st_size > 1000


def test_single_strength_is_drawn(tmp_path):
    figure = robustness_curves([3], {"noise": {"a": DICE[:1]}})
    save_figure(figure, tmp_path / "a.png")
    assert figure.axes[0].lines[0].get_xdata().tolist() == [3]


def test_lines_of_many_runs_differ_in_style():
    axes = robustness_curves(STRENGTHS, curves("noise", runs=20)).axes[0]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 20


def test_width_follows_panels_and_equal_data_give_equal_files(tmp_path):
    figures = [robustness_curves(STRENGTHS, curves(*names)) for names in ("a", "abcde")]
    assert [figure.get_figwidth() for figure in figures] == [ONE_COLUMN, TWO_COLUMNS]
    contents = []
    for name in "xy":
        figure = robustness_curves(STRENGTHS, curves("noise"))
        contents.append(save_figure(figure, tmp_path / f"{name}.pdf")[0].read_bytes())
    assert contents[0] == contents[1]

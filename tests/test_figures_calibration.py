"""Figures of evaluations: drawn values equal the given ones, and nothing overlaps."""

import itertools

import numpy as np
import pytest

from polyseg.figures.calibration import reliability_diagram, risk_coverage_curves
from polyseg.figures.evaluation import comparison, differences
from polyseg.figures.pictures import PredictionCase, predictions
from polyseg.figures.style import BLUE, ONE_COLUMN, TWO_COLUMNS, YELLOW, save_figure, wrapped
from polyseg.metrics.calibration import (
    ReliabilityCurve,
    area_under_risk_coverage,
    risk_coverage,
)

pytestmark = pytest.mark.filterwarnings("error")

RANDOM = np.random.default_rng(0)
LONG = "adaptive_polydice_mutual_information_s{:02d}"


def names(runs):
    return [LONG.format(i) for i in range(runs)]


def reliability(runs, elements=500):
    curves = []
    for _ in range(runs):
        curve = ReliabilityCurve(10)
        probability = RANDOM.beta(0.3, 0.9, elements)
        probability = probability[(probability < 0.4) | (probability > 0.5)]
        curve.add(probability, RANDOM.random(probability.size) < probability)
        curves.append(curve)
    return curves


def diagram(curves):
    columns = [
        [getattr(curve, name) for curve in curves]
        for name in ("mean_predicted", "observed", "count", "calibration_error")
    ]
    return reliability_diagram(names(len(curves)), *columns)


def risks(runs, images=60):
    return [(RANDOM.random(images), RANDOM.random(images)) for _ in range(runs)]


def curves_of(pairs, *, best=True):
    curves = [risk_coverage(risk, uncertainty) for risk, uncertainty in pairs]
    perfect = [risk_coverage(risk, risk) for risk, _ in pairs] if best else None
    return risk_coverage_curves(names(len(pairs)), curves, best=perfect)


def forest(runs, metrics=("Dice", "HD95 (px)"), mark="", **changes):
    found = {
        metric: (RANDOM.normal(size=runs) + np.array([[0.0], [-1.0], [1.0]])[:, [0] * runs])
        for metric in metrics
    }
    fields = {
        "stars": {metric: [mark] * runs for metric in metrics},
        "higher_is_better": {metric: "HD" not in metric for metric in metrics},
        "baseline": "Dice loss",
    }
    intervals = changes.pop("intervals", {metric: tuple(found[metric]) for metric in metrics})
    return differences(names(runs), intervals, **{**fields, **changes})


def disc(shape, radius, shift=0):
    centre = np.array(shape)[:, None, None] / 2 + shift
    return np.hypot(*(np.indices(shape) - centre)) < radius


def case(runs=2, shape=(24, 32), **changes):
    fields = {
        "id": "image_with_a_very_long_name_slice_0042",
        "image": RANDOM.integers(0, 256, (*shape, 3)).astype(np.uint8),
        "mask": disc(shape, 7),
        "predictions": [disc(shape, 5, shift) for shift in range(runs)],
        "dice": [0.5 + 0.01 * run for run in range(runs)],
    }
    return PredictionCase(**{**fields, **changes})


def own_lines(axes):
    return [line for line in axes.lines if line.get_marker() != "None"]


def test_reliability_diagram_shows_curve_and_counts():
    curves = reliability(3)
    (axes,) = diagram(curves).axes
    assert axes.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]
    (below,) = axes.child_axes
    for line, stairs, curve in zip(own_lines(axes), below.patches, curves, strict=True):
        assert np.isnan(curve.observed).any()
        np.testing.assert_array_equal(line.get_xdata(), curve.mean_predicted)
        np.testing.assert_array_equal(line.get_ydata(), curve.observed)
        np.testing.assert_array_equal(stairs.get_data().values, curve.count)
        np.testing.assert_allclose(stairs.get_data().edges, np.linspace(0, 1, 11))
        np.testing.assert_allclose(stairs.get_edgecolor(), to_rgba(line.get_color()))
    assert below.get_yscale() == "log"
    assert below.get_ylim()[1] > max(curve.count.max() for curve in curves)


def test_reliability_legend_shows_the_errors():
    figure = reliability_diagram(["a", "b"], *[[np.array([0.5])] * 2] * 3, [0.25, np.nan])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["0.250  a", "–  b"]
    assert legend.get_title().get_text() == "ECE of all pixels"


def test_each_of_many_runs_has_a_panel_with_the_others_in_gray():
    curves = reliability(6)
    panels = diagram(curves).axes
    assert len(panels) == 6
    for i, (axes, curve) in enumerate(zip(panels, curves, strict=True)):
        assert (
            axes.get_title()
            == f"{wrapped(LONG.format(i))}\nECE of all pixels {curve.calibration_error:.3f}"
        )
        (own,) = own_lines(axes)
        np.testing.assert_array_equal(own.get_ydata(), curve.observed)
        others = [line.get_ydata() for line in axes.lines if line.get_color() == "0.85"]
        expected = [other.observed for other in curves if other is not curve]
        np.testing.assert_array_equal(others, expected)


def test_risk_curves_show_values_and_reference_lines():
    pairs = risks(2)
    figure = curves_of(pairs)
    (axes,) = figure.axes
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    for i, (risk, uncertainty) in enumerate(pairs):
        coverage, selective = risk_coverage(risk, uncertainty)
        np.testing.assert_array_equal(own_lines(axes)[i].get_xdata(), 100 * coverage)
        np.testing.assert_array_equal(own_lines(axes)[i].get_ydata(), selective)
        np.testing.assert_allclose(dotted[i].get_ydata()[-1], risk.mean())
        assert np.all(np.diff(dotted[i].get_ydata()) >= 0)
        np.testing.assert_allclose(dashed[i].get_ydata(), risk.mean())
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    areas = [f"{area_under_risk_coverage(*pair):.3f}" for pair in pairs]
    assert [text.split()[0] for text in texts[:2]] == areas
    assert texts[2:] == ["all images, or random order", "best order"]


def test_risk_curves_omit_a_missing_best_order():
    figure = curves_of(risks(1), best=False)
    assert not [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert len(figure.legends[0].get_texts()) == 2


def test_differences_are_drawn_as_points_with_intervals():
    found = (np.array([0.5, -2.0]), np.array([0.2, -3.0]), np.array([0.7, -1.0]))
    intervals = {"Dice": found, "HD95": found}
    figure = forest(
        2,
        ("Dice", "HD95"),
        intervals=intervals,
        stars={"Dice": ["*", ""], "HD95": ["", "***"]},
        higher_is_better={"Dice": True, "HD95": False},
    )
    for axes, marks in zip(figure.axes, (["*", ""], ["", "***"]), strict=True):
        ends, points = axes.lines[:4:2], axes.lines[1:4:2]
        assert [line.get_xdata().tolist() for line in ends] == [[0.2, 0.7], [-3, -1]]
        assert [line.get_xdata().tolist() for line in points] == [[0.5], [-2]]
        assert [line.get_ydata().tolist() for line in points] == [[0], [1]]
        assert axes.lines[4].get_xdata() == [0, 0]
        assert [text.get_text() for text in axes.texts] == marks
    better, worse = (axes.patches[0].get_extents() for axes in figure.axes)
    zeros = [axes.transData.transform((0, 0))[0] for axes in figure.axes]
    np.testing.assert_allclose([better.x0, worse.x1], zeros)
    assert figure.legends[0].get_title().get_text().startswith("* p < 0.05")


def test_stars_are_explained_only_if_drawn():
    assert forest(2).legends[0].get_title().get_text() == ""


def test_differences_check_lengths():
    with pytest.raises(ValueError):
        forest(2, ("Dice",), intervals={"Dice": (np.zeros(1),) * 3})


def test_predictions_are_outlined_over_the_mask():
    given = case()
    figure = predictions([given], ["adaptive", "Dice"], title="The worst")
    assert [axes.get_title() for axes in figure.axes] == ["mask", "adaptive", "Dice"]
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["image_with_a_very_\nlong_name_slice_0042", "Dice 0.500", "Dice 0.510"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mask", "prediction"]
    for axes, predicted in zip(figure.axes, [None, *given.predictions], strict=True):
        assert np.array_equal(axes.images[0].get_array(), given.image)
        drawn = [given.mask] if predicted is None else [given.mask, predicted]
        for edge, region in zip(axes.collections, drawn, strict=True):
            path = edge.get_paths()[0]
            pixels = np.argwhere(np.ones_like(region))[:, ::-1]
            assert np.array_equal(path.contains_points(pixels), region.ravel())
    colours = [edge.get_edgecolor()[0].tolist() for edge in figure.axes[1].collections]
    assert colours == [to_rgba(YELLOW), to_rgba(BLUE)]


def to_rgba(colour):
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [1]


def test_empty_outlines_get_a_note():
    blank = np.zeros((24, 32), dtype=bool)
    given = case(mask=blank, predictions=[blank, ~blank], dice=[1.0, np.nan])
    figure = predictions([given], ["a", "b"], title="x")
    notes = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert notes == [["empty mask"], ["nothing predicted"], []]
    assert figure.axes[2].get_xlabel() == "Dice –"


def test_predictions_need_one_mask_and_one_dice_per_run():
    for changes in ({"dice": [0.5]}, {"predictions": []}):
        with pytest.raises(ValueError):
            predictions([case(**changes)], ["a", "b"], title="x")
    with pytest.raises(ValueError):
        predictions([case()], ["a", "b", "c"], title="x")


@pytest.mark.parametrize("name", ["a" * 22, "a" * 23, "a" * 90, LONG.format(7), "one two " * 5])
def test_long_names_are_wrapped_and_keep_both_ends(name):
    lines = wrapped(name).split("\n")
    assert len(lines) == (1 if len(name) <= 22 else 2)
    assert max(map(len, lines)) <= 26
    assert name.startswith(lines[0][:10]) and name.endswith(lines[-1][-10:])


FIGURES = {
    "reliability": lambda runs: diagram(reliability(runs)),
    "risk": lambda runs: curves_of(risks(runs)),
    "comparison, a metric": lambda runs: comparison(
        names(runs), {"Dice": RANDOM.random((runs, 9))}
    ),
    "comparison": lambda runs: comparison(
        names(runs), {metric: RANDOM.random((runs, 9)) for metric in "abcd"}
    ),
    "differences, a metric": lambda runs: forest(runs, ("Dice",), "***"),
    "differences": lambda runs: forest(runs, "abcd", "***"),
    "predictions": lambda runs: predictions(
        [case(min(runs, 4), shape) for shape in ((20, 50), (30, 30), (60, 20))],
        names(min(runs, 4)),
        title="The 3 worst images",
    ),
}


def pieces(figure):
    texts = [text for text in (figure._suptitle, figure._supxlabel, figure._supylabel) if text]
    return [*figure.axes, *figure.legends, *texts]


@pytest.mark.slow
@pytest.mark.parametrize("runs", [1, 12])
@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES.keys())
def test_nothing_overlaps_or_is_cut(draw, runs):
    figure = draw(runs)
    figure.draw_without_rendering()
    assert round(figure.get_figwidth(), 2) <= TWO_COLUMNS
    assert figure.get_figheight() < 10
    found = [piece.get_tightbbox().padded(-0.5) for piece in pieces(figure)]
    for box in found:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    assert not any(one.overlaps(other) for one, other in itertools.combinations(found, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["comparison", "differences"])
def test_row_labels_do_not_overlap(name):
    figure = FIGURES[name](12)
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(labels))


DEGENERATE = {
    "nothing predicted": lambda: reliability_diagram(
        ["a"], [np.full(3, np.nan)], [np.full(3, np.nan)], [np.zeros(3, int)], [np.nan]
    ),
    "one bin": lambda: reliability_diagram(
        ["a"], [np.array([0.5])], [np.array([0.5])], [np.array([1])], [0.0]
    ),
    "one image": lambda: curves_of([(np.array([0.1]), np.array([0.2]))]),
    "no risk": lambda: curves_of([(np.zeros(5), np.ones(5))]),
    "no difference": lambda: forest(1, ("Dice",), intervals={"Dice": (np.zeros(1),) * 3}),
    "no interval": lambda: forest(1, ("Dice",), intervals={"Dice": (np.full(1, np.nan),) * 3}),
    "no run": lambda: forest(0),
    "constant image": lambda: predictions([case(image=np.zeros((24, 32)))], ["a", "b"], title="x"),
}


@pytest.mark.parametrize("draw", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_values_give_no_warning(draw, tmp_path):
    save_figure(draw(), tmp_path / "figure.png")


def test_few_runs_fit_one_column():
    assert diagram(reliability(4)).get_figwidth() == ONE_COLUMN
    assert curves_of(risks(4)).get_figwidth() == ONE_COLUMN
    assert predictions([case(1)], ["a"], title="x").get_figwidth() == ONE_COLUMN


@pytest.mark.slow
@pytest.mark.parametrize("name", ["risk", "differences", "predictions"])
def test_equal_data_give_equal_files(name, tmp_path, monkeypatch):
    contents = []
    for file in ("x.pdf", "y.pdf"):
        monkeypatch.setitem(globals(), "RANDOM", np.random.default_rng(0))
        contents.append(save_figure(FIGURES[name](2), tmp_path / file)[0].read_bytes())
    assert contents[0] == contents[1]

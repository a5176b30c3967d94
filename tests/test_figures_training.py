"""Figures of training: drawn values equal the given ones, and equal data give equal files."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from polyseg.errors import PolysegError
from polyseg.figures import run_figures
from polyseg.figures.evaluation import comparison
from polyseg.figures.figures_by_name import RunRecords
from polyseg.figures.losses import loss_curves
from polyseg.figures.pictures import OutlinedImage, OverlayCase, overlays, samples_sheet
from polyseg.figures.run_figures import curves
from polyseg.figures.style import save_figure
from polyseg.figures.training import (
    difficulty_distribution,
    epsilon_quantiles,
    training_curves,
)
from polyseg.networks import segmentation_network

pytestmark = pytest.mark.filterwarnings("error")

RANDOM = np.random.default_rng(0)
THETA = np.linspace(0, np.pi / 2, 60)
DICE = 1 - 0.1 * np.cos(THETA)
NOTHING = np.full(4, np.nan)


def curve(epsilon):
    return 0.9 + 0.1 * (0.5 + epsilon) * THETA**2


def history(epochs):
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "validation_loss": 1.1 / epoch,
            "validation_dice": 1 - 1 / epoch,
            "validation_iou": 1 - 1.2 / epoch,
            "learning_rate": 1e-3,
            "assessed": float(epoch % 5 == 0),
        }
        for epoch in range(1, epochs + 1)
    ]


def case(name="a", shape=(24, 32), *, colours=(), masked=True, **changes):
    disc = np.hypot(*np.indices(shape) - np.array(shape)[:, None, None] / 2) < 6
    fields = {
        "id": name,
        "image": RANDOM.integers(0, 256, (*shape, *colours)).astype(np.uint8),
        "mask": disc if masked else None,
        "mean": RANDOM.random(shape).astype(np.float16),
        "uncertainty": 0.1 * RANDOM.random(shape),
        "difficulty": 0.0123,
        "dice": 0.9 if masked else math.nan,
    }
    return OverlayCase(**{**fields, **changes})


def show(*cases):
    return overlays(cases, metric="mutual_information", title="hard images")


def test_overlay_figures_can_share_colour_limits():
    for one in (case("first"), case("second")):
        figure = overlays([one], metric="variance", title="images", highest=0.25)
        assert figure.axes[3].images[0].get_clim() == (0, 0.25)
        assert "99th percentile" in figure.texts[-1].get_text()


DEGENERATE = {
    "one curve": lambda: loss_curves(THETA, {0.5: curve(0.5)}, DICE, s=0.1),
    "no curve": lambda: loss_curves(THETA, {}, DICE, s=0.1),
    "wrong from the start": lambda: loss_curves(
        THETA, {1.0: curve(1)}, DICE, s=0.1, wrong_above=np.zeros_like(THETA)
    ),
    "no epoch": lambda: training_curves([]),
    "one epoch": lambda: training_curves(history(1)),
    "only the epoch known": lambda: training_curves([{"epoch": 1}, {"epoch": 2}]),
    "diverged": lambda: training_curves([{"epoch": 1, "train_loss": math.inf}]),
    "one epsilon": lambda: epsilon_quantiles(np.array([1]), np.ones((1, 1)), limits=(1, 1)),
    "no epsilon": lambda: epsilon_quantiles(
        np.arange(4), np.tile(NOTHING, (4, 1)), limits=(-0.4, 1)
    ),
    "no epochs": lambda: epsilon_quantiles(np.empty(0), np.empty((0, 3)), limits=(0, 1)),
    "no assessment": lambda: difficulty_distribution([], []),
    "one assessment": lambda: difficulty_distribution([5], [np.zeros(3)]),
    "empty assessments": lambda: difficulty_distribution([5, 9], [NOTHING, np.empty(0)]),
    "one pair of values": lambda: show(case()),
    "constant images": lambda: show(
        case(image=np.zeros((24, 32)), uncertainty=np.zeros((24, 32)), mean=np.ones((24, 32)))
    ),
    "no mask": lambda: show(case(masked=False), case(masked=False, colours=(3,))),
    "nothing finite": lambda: show(
        case(image=np.full((24, 32, 3), np.nan), uncertainty=np.full((24, 32), np.nan))
    ),
    "all foreground": lambda: show(case(image=np.full((24, 32), np.nan), mask=np.ones((24, 32)))),
    "no runs": lambda: comparison([], {}),
    "runs without values": lambda: comparison(["a", "b"], {"Dice": [NOTHING, np.empty(0)]}),
    "one value": lambda: comparison(["a"], {"Dice": [np.ones(1)]}),
}


@pytest.mark.parametrize("draw", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_inputs_neither_crash_nor_warn(draw, tmp_path):
    save_figure(draw(), tmp_path / "figure.png")


def test_loss_curves_show_values_and_shade_the_wrong_sign_region():
    given = {0.0: curve(0.0), 1.0: curve(1.0)}
    above = np.where(THETA > 1, 1.0, np.inf)
    axes = loss_curves(THETA, given, DICE, s=0.1, wrong_above=above).axes[0]
    steep, gentle, dice = axes.lines
    assert np.array_equal(steep.get_ydata(), given[1.0])
    assert np.array_equal(gentle.get_ydata(), given[0.0])
    assert np.array_equal(dice.get_ydata(), DICE)
    assert (dice.get_linestyle(), dice.get_color()) == ("--", "#000000")
    (shade,) = axes.collections
    outline = shade.get_paths()[0]
    inside = outline.contains_points([[1.2, 1.01], [1.2, 0.99], [0.9, 1.01]])
    assert inside.tolist() == [True, False, False]


def test_loss_curves_have_no_shading_outside_the_wrong_sign_region():
    figure = loss_curves(
        THETA, {-0.4: curve(-0.4)}, DICE, s=0.1, wrong_above=2 * np.ones_like(THETA)
    )
    assert not figure.axes[0].collections


def test_loss_curves_have_legend_title_and_labels():
    figure = loss_curves(
        THETA,
        {-0.4: curve(-0.4), 1.0: curve(1)},
        DICE,
        s=0.1,
        wrong_above=np.ones_like(THETA),
        ylabel="d loss / dθ",
    )
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["ε = 1", "ε = −0.4", "true Dice", "loss rises with s"]
    assert legend.get_title().get_text() == "s = 0.1"
    (axes,) = figure.axes
    assert axes.get_ylabel() == "d loss / dθ"
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "0",
        "π/8",
        "π/4",
        "3π/8",
        "π/2",
    ]


def test_training_curves_show_the_history():
    rows = history(12)
    rows[3] = {**rows[3], "validation_dice": math.nan}
    del rows[5]["train_loss"]
    losses, overlap, rate = training_curves(rows).axes
    training = losses.lines[0].get_ydata()
    assert np.flatnonzero(np.isnan(training)).tolist() == [5]
    assert training[11] == rows[11]["train_loss"]
    assert losses.lines[1].get_ydata().tolist() == [row["validation_loss"] for row in rows]
    assert overlap.lines[1].get_ydata().tolist() == [row["validation_iou"] for row in rows]
    assert rate.lines[0].get_ydata().tolist() == [1e-3] * 12
    assert [path[0, 0] for path in losses.collections[0].get_segments()] == [5, 10]


def test_training_curves_compare_the_losses_at_one_epsilon():
    rows = [{**row, "train_loss_constant": 0.9 * row["train_loss"]} for row in history(12)]
    losses = training_curves(rows).axes[0]
    assert losses.get_ylabel() == "loss at constant ε"
    wanted = [row["train_loss_constant"] for row in rows]
    assert losses.lines[0].get_ydata().tolist() == wanted
    # Histories of version 0.1 have no such column.
    older = training_curves(history(12)).axes[0]
    assert older.get_ylabel() == "loss"
    # Without epsilon both losses are equal, and the label names none.
    equal = [{**row, "train_loss_constant": row["train_loss"]} for row in history(12)]
    assert training_curves(equal).axes[0].get_ylabel() == "loss"
    assert older.lines[0].get_ydata().tolist() == [row["train_loss"] for row in history(12)]


def test_training_curves_mark_the_first_assessment():
    for axes in training_curves(history(12)).axes[:2]:
        (mark,) = [line for line in axes.lines if line.get_label() == "E0"]
        assert list(mark.get_xdata()) == [5, 5]
    for axes in training_curves(history(4)).axes:
        assert "E0" not in [line.get_label() for line in axes.lines]


def replayed(spread):
    """Return the history of a replay: without assessments, with other epsilons after epoch 3."""
    rows = [{**row, "assessed": 0.0, "epsilon_q05": 0.1, "epsilon_q95": 0.1} for row in history(6)]
    for row in rows[3:]:
        row |= {"epsilon_q05": 0.3 - spread, "epsilon_q95": 0.3 + spread}
        row["train_loss_constant"] = 0.9 * row["train_loss"]
    return rows


@pytest.mark.parametrize("spread", [0.2, 0.0])  # of each image, or of the mean arm
def test_curves_of_a_replay_name_the_constant_epsilon_and_mark_e0_of_the_recorded_run(spread):
    drawn = curves(RunRecords(replayed(spread)), "")
    assert drawn.figure.axes[0].get_ylabel() == "loss at constant ε"
    for axes in drawn.figure.axes[:2]:
        (mark,) = [line for line in axes.lines if line.get_label() == "E0"]
        assert list(mark.get_xdata()) == [3, 3]
    assert "The dashed line is E0 of the recorded run" in drawn.caption
    assert "Ticks" not in drawn.caption


def test_training_curves_mark_no_e0_at_constant_epsilon():
    drawn = curves(RunRecords(replayed(0.2)[3:]), "")
    assert "E0" not in [line.get_label() for line in drawn.figure.axes[0].lines]
    assert drawn.caption == "loss, validation Dice and IoU, and learning rate."


def test_training_curves_mark_the_first_best_epoch():
    dice = [0.2, 0.7, math.nan, 0.7]
    rows = [{"epoch": epoch, "validation_dice": value} for epoch, value in enumerate(dice, 1)]
    best = training_curves(rows).axes[1].lines[-1]
    assert best.get_xydata().tolist() == [[2, 0.7]]
    assert best.get_label() == "best Dice 0.700,\nepoch 2"


def test_single_values_between_gaps_are_dots():
    values = [0.5, math.nan, 0.4, 0.3, math.nan, 0.2]
    rows = [{"epoch": epoch, "train_loss": value} for epoch, value in enumerate(values, 1)]
    line = training_curves(rows).axes[0].lines[0]
    assert (line.get_marker(), line.get_markevery().tolist()) == (".", [0, 5])


def test_epsilon_bands_show_the_percentiles():
    epsilon = RANDOM.uniform(-0.4, 1, (5, 40))
    epsilon[2], epsilon[3, :7] = np.nan, np.nan
    axes = epsilon_quantiles(np.arange(1, 6), epsilon, limits=(-0.4, 1.0)).axes[0]
    median, low_limit, high_limit = axes.lines
    assert np.allclose(median.get_ydata()[::2], [*np.median(epsilon[:2], axis=1), np.nan,
        np.nanmedian(epsilon[3]), np.median(epsilon[4])], equal_nan=True)  # fmt: skip
    assert median.get_xdata()[:4].tolist() == [0.5, 1.5, 1.5, 2.5]
    for band, percentages in zip(axes.collections, ((25, 75), (5, 95)), strict=True):
        before, after = (path.vertices for path in band.get_paths())  # the gap splits the band
        first, last = before[before[:, 0] < 1], after[after[:, 0] > 5]
        for edge, values in ((first, epsilon[0]), (last, epsilon[4])):
            assert np.allclose(
                (edge[:, 1].min(), edge[:, 1].max()), np.percentile(values, percentages)
            )
    assert (low_limit.get_ydata()[0], high_limit.get_ydata()[0]) == (-0.4, 1.0)


def test_boxes_show_quartiles_at_their_epochs():
    values = [RANDOM.random(50), np.append(RANDOM.random(30), np.nan)]
    (axes,) = difficulty_distribution([5, 10], values, metric="variance").axes
    for box, epoch, sample in zip(axes.patches, (5, 10), values, strict=True):
        place = box.get_bbox()
        assert (place.x0 + place.x1) / 2 == pytest.approx(epoch)
        assert np.allclose((place.y0, place.y1), np.nanpercentile(sample, (25, 75)))
    whiskers, median = (lines.get_segments() for lines in axes.collections[:2])
    assert np.allclose(
        np.array(whiskers)[:, :, 1].ravel(), np.percentile(values[0], (5, 25, 75, 95))
    )
    assert np.allclose(np.array(median)[0, :, 1], np.median(values[0]))
    assert axes.get_ylabel() == "difficulty D\nvariance"


@pytest.mark.parametrize(
    ("values", "scale"), [([1, 40], "log"), ([1, 20], "linear"), ([0, 40], "linear")]
)
def test_difficulty_axis_is_logarithmic_for_positive_wide_ranges(values, scale):
    (axes,) = difficulty_distribution([5], [np.array(values)]).axes
    assert axes.get_yscale() == scale


def test_overlays_show_the_arrays_with_shared_colour_limits():
    cases = [case("first", colours=(3,)), case("second", shape=(40, 20))]
    cases[1].uncertainty[3, 4] = 0.6
    ranked = np.sort(np.concatenate([one.uncertainty.ravel() for one in cases]))
    place = 0.99 * (ranked.size - 1)
    end = np.interp(place, np.arange(ranked.size), ranked)
    figure = show(*cases)
    for row, given in enumerate(cases):
        image, mask, mean, uncertainty = figure.axes[4 * row : 4 * row + 4]
        assert np.array_equal(image.images[0].get_array(), given.image)
        assert np.array_equal(mask.images[0].get_array(), given.image)
        assert np.array_equal(mean.images[0].get_array(), given.mean)
        assert np.allclose(uncertainty.images[0].get_array(), given.uncertainty)
        assert mean.images[0].get_clim() == (0, 1)
        assert uncertainty.images[0].get_clim() == pytest.approx((0, end))
        assert (len(mask.collections), len(mean.collections)) == (1, 1)
        edge = np.concatenate(mask.collections[0].get_paths()[0].to_polygons())
        centre = np.array(given.mean.shape[::-1]) / 2
        assert np.allclose(np.hypot(*(edge - centre).T), 6, atol=1)
    labels = [axes.get_xlabel() for axes in figure.axes[-2:]]
    assert labels == ["probability", "mutual information\n(nats)"]


def test_overlay_labels_show_name_difficulty_dice_and_notes():
    name = "SC-HYP-03-IM-0001-0128"
    figure = show(case(name), case("$a$", masked=False), case(mask=np.zeros((24, 32))))
    first, second = (figure.axes[index].texts[0] for index in (0, 4))
    assert first.get_text() == "SC-HYP-03-\nIM-0001-0128\nD = 0.0123\nDice = 0.900"
    assert second.get_text() == "$a$\nD = 0.0123\nDice = –"
    notes = [figure.axes[index].texts[0].get_text() for index in (5, 9)]
    assert notes == ["no mask", "empty mask"]


def test_long_ids_of_overlays_lose_their_common_start_first():
    start = "trial_of_the_hospital_in_2020_"
    figure = show(case(f"{start}SC-HYP-03-IM-0001-0128"), case(f"{start}SC-N-05-IM-0001-0128"))
    labels = [figure.axes[index].texts[0].get_text().split("\nD")[0] for index in (0, 4)]
    assert labels == ["…HYP-03-IM-\n0001-0128", "…N-05-IM-\n0001-0128"]


def assessed(epoch, weights):
    return SimpleNamespace(
        metric="entropy",
        difficulty=np.arange(30.0),
        epoch=epoch,
        weights_sha256=weights,
        maps={"entropy": np.zeros((30, 2, 2))},
    )


@pytest.mark.parametrize("weights", ["then", "now"])
def test_title_of_overlays_names_the_network_of_d_and_dice_and_fits(monkeypatch, weights):
    titles = []
    monkeypatch.setattr(segmentation_network, "hash_weights", lambda _: "now")
    monkeypatch.setattr(run_figures, "_measured_again", lambda *given: (given[3], [0]))
    monkeypatch.setattr(run_figures, "_draw_overlays", lambda *given: [titles.append(given[4])])
    config = SimpleNamespace(output=SimpleNamespace(overlays=12))
    run_figures.draw_extremes(None, config, None, assessed(1000, weights), Path())
    then = " at epoch 1000; D and Dice shown are of the final network"
    since = "" if weights == "now" else then
    assert titles == [f"The 12 images of {which} D{since}" for which in ("largest", "smallest")]
    figure = overlays([case()], metric="entropy", title=titles[1])
    figure.draw_without_rendering()
    assert figure._suptitle.get_window_extent().x0 >= 0


@pytest.mark.parametrize("columns", [2, 21])
def test_titles_of_samples_keep_the_number_of_the_patient_and_stay_in_the_figure(columns):
    sample = OutlinedImage("SC-HF-NI-03-IM-0001-0089", np.ones((8, 8)), np.zeros((0, 8, 8)))
    figure = samples_sheet([[sample] * columns] * 2, title="x")
    figure.draw_without_rendering()
    title = figure.axes[0].title
    assert title.get_text() == "SC-HF-NI-03-\nIM-0001-0089"
    assert title.get_window_extent().x0 >= 0


@pytest.mark.parametrize("shape", [(10, 90), (30, 30), (90, 10)])
def test_overlays_keep_proportions_and_do_not_overlap(shape):
    figure = show(
        case("SC-HF-NI-03-IM-0001-0089", shape=shape),
        case("patient_0042_of_the_hospital_slice_17", shape=(20, 30)),
    )
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for index, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
    for axes in (figure.axes[0], figure.axes[4]):
        for text in axes.texts:
            label = text.get_window_extent()
            assert label.x0 >= 0 and label.x1 <= axes.get_window_extent().x0
    place = figure.axes[0].get_window_extent()
    assert place.height / place.width == pytest.approx(shape[0] / shape[1])


def test_colours_beyond_their_range_are_clipped():
    image = RANDOM.normal(size=(24, 32, 3))
    shown = show(case(image=image)).axes[0].images[0].get_array()
    assert (shown.min(), shown.max()) == (0, 1)
    assert np.allclose(np.corrcoef(shown.ravel(), image.ravel()), 1)


def test_overlays_need_at_least_one_case():
    with pytest.raises(ValueError):
        show()


def test_comparison_shows_every_finite_value():
    dice = [RANDOM.random(9), np.array([0.5, np.inf, np.nan, 0.7])]
    figure = comparison(["adaptive", "Dice"], {"Dice": dice, "IoU": dice})
    assert [axes.get_title() for axes in figure.axes] == ["Dice", "IoU"]
    axes = figure.axes[0]
    for row, (points, values) in enumerate(zip(axes.collections[:2], dice, strict=True)):
        offsets = points.get_offsets()
        assert offsets[:, 0].tolist() == values[np.isfinite(values)].tolist()
        assert np.all(np.abs(offsets[:, 1] - row) < 0.3)
    assert axes.lines[0].get_xdata()[0] == dice[0].mean()
    assert axes.get_xlabel() == "2 values not finite"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["adaptive", "Dice"]


def test_comparison_wraps_names_and_checks_lengths():
    five = {str(index): [np.ones(2)] for index in range(5)}
    assert len(comparison(["a"], five).axes) == 5
    with pytest.raises(ValueError):
        comparison(["a", "b"], five)


def test_without_a_suffix_png_and_pdf_are_written(tmp_path):
    png, pdf = save_figure(training_curves(history(3)), tmp_path / "new" / "curves")
    with Image.open(png) as image:
        assert image.size == (1400, 480)
        assert "Software" not in image.info
    assert pdf.read_bytes().startswith(b"%PDF")
    assert b"/FontFile2" in pdf.read_bytes()  # TrueType, embedded
    assert {path.name for path in png.parent.iterdir()} == {"curves.png", "curves.pdf"}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ".PNG"])
def test_equal_figures_give_equal_files(suffix, tmp_path):
    def save(name, figure):
        (path,) = save_figure(figure, tmp_path / f"{name}{suffix}")
        return path.read_bytes()

    runs = {"Dice": [np.linspace(0, 1, 20), np.linspace(0.2, 1, 20)]}
    figure = comparison(["a", "b"], runs)
    first = save("first", figure)
    assert save("again", figure) == first
    assert save("other", comparison(["a", "b"], runs)) == first


@pytest.mark.parametrize("name", ["figure.jpg", "figure.csv"])
def test_unknown_suffix_is_refused_in_one_line(name, tmp_path):
    with pytest.raises(PolysegError, match=r"\.png, \.pdf or \.svg") as error:
        save_figure(Figure(), tmp_path / name)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    figure = Figure()
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_figure(figure, path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(path.name, b"old")]


def test_matplotlib_settings_of_the_user_have_no_effect(tmp_path):
    def save(name):
        (path,) = save_figure(training_curves(history(4)), tmp_path / name)
        return path.read_bytes()

    plain = save("plain.png")
    with mpl.rc_context({"lines.linewidth": 9, "font.size": 30, "axes.grid": True}):
        before = mpl.rcParams.copy()
        assert save("styled.png") == plain
        assert mpl.rcParams.copy() == before


def test_figures_do_not_import_pyplot(tmp_path):
    script = (
        "import sys, numpy; from pathlib import Path;"
        "from polyseg.figures.evaluation import comparison;"
        "from polyseg.figures.style import save_figure;"
        "figure = comparison(['a'], {'Dice': [numpy.ones(3)]});"
        f"save_figure(figure, Path({str(tmp_path / 'figure')!r}));"
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])

"""Registries: a row added at run time appears and works everywhere."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from polyseg import choices
from polyseg.choices import (
    FREE_SCORES,
    LOSSES,
    NETWORKS,
    NORMALISATIONS,
    OPTIMIZERS,
    REGIONS,
    REPLAY_ARMS,
    SCHEDULERS,
    UNCERTAINTIES,
    Arm,
    Loss,
    Normalisation,
    Optimizer,
    Region,
    Score,
)
from polyseg.cli.options import help_of
from polyseg.commands.report import make_page, page_of
from polyseg.commands.train import train
from polyseg.config import Config, settings_of, template
from polyseg.data.augmentation import PRESETS
from polyseg.data.formats.file_formats import FORMATS, Format
from polyseg.data.formats.stacks import Stack
from polyseg.data.layouts.public_sets import PUBLIC_SETS, PublicSet
from polyseg.data.preprocessing import Levels
from polyseg.errors import PolysegError
from polyseg.evaluation.comparison import compare
from polyseg.evaluation.scores import Evaluation, RunScores, image_scores
from polyseg.figures import evaluation_files
from polyseg.figures.figures_by_name import (
    EVALUATION_FIGURES,
    IMAGE_FIGURES,
    RUN_FIGURES,
    Drawn,
    RunFigure,
)
from polyseg.figures.style import metric_name
from polyseg.metrics.image_metrics import METRICS, Metric
from polyseg.montecarlo.dropout_masks import MaskStreams
from polyseg.montecarlo.passes import stochastic_pass
from polyseg.networks.dropout import (
    DROPOUT_LAYERS,
    DropoutLayer,
    dropout_types,
    stochastic_layers,
)
from polyseg.registry import Registry, Row
from polyseg.report.document import Gallery
from polyseg.report.run_files import read_evaluation, read_run
from polyseg.report.tables import metric_tables
from polyseg.runs.history import COLUMNS, Column
from polyseg.runs.record_files import read_assessment, read_schedule
from tests import reference
from tests.conftest import TINY

HERE = "tests.test_registries"

FOUR = ("uncertainty.samples=4",)
"""Setting for the smallest number of passes that gives a rank stability."""

REGISTRIES = {name: one for name, one in vars(choices).items() if isinstance(one, Registry)}
REGISTRIES |= {
    "COLUMNS": COLUMNS,
    "FORMATS": FORMATS,
    "DROPOUT_LAYERS": DROPOUT_LAYERS,
    "PUBLIC_SETS": PUBLIC_SETS,
    "METRICS": METRICS,
    "RUN_FIGURES": RUN_FIGURES,
    "EVALUATION_FIGURES": EVALUATION_FIGURES,
    "IMAGE_FIGURES": IMAGE_FIGURES,
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_every_row_names_an_existing_function_and_has_help(name):
    for row in REGISTRIES[name].values():
        assert row.help and not row.help.endswith(".")
        assert not row.function or callable(row.resolve())


def test_mc_dropout_supports_every_kind_of_dropout_of_the_settings():
    for kind in choices.DROPOUT_KINDS.values():
        assert issubclass(kind.resolve(), dropout_types())


def choices_of(key):
    return next(one["choices"] for one in settings_of() if one["key"] == key)


def assert_listed(key, name, text):
    """Check that the choices, template, schema and page of a setting contain a value."""
    assert choices_of(key)[name] == text
    assert f"#   {name}: {text}" in template()
    assert f"`{name}`: {text}" in reference.configuration_page()
    assert json.dumps(name) in json.dumps(Config.model_json_schema())


def history_of(run):
    with (run / "history.csv").open() as stream:
        return list(csv.DictReader(stream))


def steep(config):
    """Return a loss with an epsilon that is not one of polyseg's."""
    return lambda logits, mask, epsilon: (
        (1 + epsilon) * (logits.sigmoid() - mask).square().flatten(1).mean(dim=1)
    )


def test_loss_is_added_by_one_row(monkeypatch, tiny, tmp_path):
    with pytest.raises(PolysegError, match="'stepe' is not a loss: choose polydice1"):
        tiny("run", "loss.name=stepe")
    row = Loss("steep", "weighted Brier score", "tests.test_registries:steep", has_epsilon=True)
    monkeypatch.setitem(LOSSES, "steep", row)
    assert_listed("loss.name", "steep", "weighted Brier score")
    assert "steep (weighted Brier score)" in help_of(LOSSES.choices())
    with pytest.raises(PolysegError, match="did you mean steep"):
        tiny("run", "loss.name=stepe")
    train(config := tiny("run", "loss.name=steep", "loss.epsilon=0.5", "control.start=1"))
    assert config.adaptive
    rows = history_of(tmp_path / "run")
    assert 0 < float(rows[-1]["train_loss"]) < 2
    # The constant epsilon is 0.5 until the assessment, and different after it.
    assert rows[0]["epsilon_q05"] == rows[0]["epsilon_q95"] == "0.5" != rows[-1]["epsilon_q95"]


def spread(moments):
    """Return the standard deviation of the passes at each pixel."""
    return moments.variance.sqrt()


def blur(probability):
    return probability * (1 - probability)


def test_pixel_wise_uncertainty_is_added_by_one_row(monkeypatch, tiny, tmp_path):
    row = Score("spread", "standard deviation of the passes", "tests.test_registries:spread", "p")
    monkeypatch.setitem(UNCERTAINTIES, "spread", row)
    assert_listed("uncertainty.metric", "spread", "standard deviation of the passes")
    assert metric_name("spread") == "spread (p)"
    train(tiny("run", "uncertainty.metric=spread", "uncertainty.save_maps=true", *FOUR))
    file = tmp_path / "run" / "uncertainty" / "epoch_0003.h5"
    found = read_assessment(file, with_maps=True)
    assert found.metric == "spread" and 0 < found.rank_stability["spread"] <= 1
    assert (found.difficulty == found.scores["spread"]).all() and (found.difficulty > 0).all()
    assert (found.scores["spread"] ** 2 <= found.scores["variance"] * (1 + 1e-6)).all()
    for deviation, variance in zip(found.maps["spread"], found.maps["variance"], strict=True):
        np.testing.assert_allclose(deviation, np.sqrt(variance), atol=2e-3)
    # A version without the row reports it.
    monkeypatch.delitem(UNCERTAINTIES, "spread")
    with pytest.raises(PolysegError, match="metric 'spread' is unknown"):
        read_assessment(file)


def test_score_without_passes_is_added_by_one_row(monkeypatch, tiny, tmp_path):
    row = Score("blur", "p (1 - p) without dropout", "tests.test_registries:blur")
    monkeypatch.setitem(FREE_SCORES, "blur", row)
    assert_listed("uncertainty.metric", "blur", "p (1 - p) without dropout")
    train(tiny("run", "uncertainty.metric=blur"))
    found = read_assessment(tmp_path / "run" / "uncertainty" / "epoch_0003.h5")
    assert found.samples == 0 and (found.difficulty == found.scores["blur"]).all()
    assert (found.difficulty > 0).all() and (found.difficulty <= 0.25).all()


def test_assessments_without_a_new_uncertainty_stay_readable(monkeypatch, tiny, tmp_path):
    train(tiny("run", "uncertainty.save_maps=true"))
    before = {"mean", *UNCERTAINTIES}
    row = Score("spread", "standard deviation of the passes", "tests.test_registries:spread")
    monkeypatch.setitem(UNCERTAINTIES, "spread", row)
    file = tmp_path / "run" / "uncertainty" / "epoch_0003.h5"
    found = read_assessment(file, with_maps=True)
    assert set(found.maps) == before
    assert "spread" not in found.scores


def test_history_column_is_added_by_one_row_and_older_runs_resume(monkeypatch, tiny, tmp_path):
    config = tiny("run", "training.epochs=1", "control.start=0")
    train(config)
    before = history_of(tmp_path / "run")
    largest = Column("largest_loss", "largest loss of an image", value=lambda e: e.losses.max())
    monkeypatch.setitem(COLUMNS, "largest_loss", largest)
    assert "| `largest_loss` |  | largest loss of an image |" in reference.files_page()
    train(tiny("run", "training.epochs=3", "control.start=0"), resume=True, accept_changes=True)
    rows = history_of(tmp_path / "run")
    assert rows[0] == {**before[0], "largest_loss": "nan"}
    for row in rows[1:]:
        assert float(row["largest_loss"]) > float(row["train_loss"])
    assert [row["largest_loss"] for row in read_run(tmp_path / "run", "run").history][1:] == [
        float(row["largest_loss"]) for row in rows[1:]
    ]
    # A version without the column refuses to resume such a run.
    monkeypatch.delitem(COLUMNS, "largest_loss")
    with pytest.raises(PolysegError, match="largest_loss: not a column"):
        train(tiny("run", "training.epochs=4", "control.start=0"), resume=True, accept_changes=True)


def test_metric_is_added_by_one_row(monkeypatch, tmp_path):
    def evaluation():
        mask = np.eye(4)
        runs = [
            RunScores(name, [image_scores(str(i), p + 0.1 * i, mask) for i in range(3)])
            for name, p in (("a", 0.6 * mask), ("b", 0.7 * mask.T[::-1]))
        ]
        return Evaluation(runs, compare(runs, "a"))

    evaluation_files.write_evaluation(evaluation(), tmp_path / "before", figures=False)
    row = Metric(
        "area",
        "predicted pixels",
        title="Area",
        value=lambda case: case.predicted.sum(),
        decimals=1,
        higher_is_better=False,
        unit="{length}²",
        in_figures=True,
    )
    monkeypatch.setitem(METRICS, "area", row)
    assert (
        "| Area | `area` | low | predicted mask | predicted pixels |" in reference.evaluation_page()
    )
    drawn = {}
    monkeypatch.setattr(
        evaluation_files,
        "save_figure",
        lambda figure, path: drawn.update({path.name: figure}) or [],
    )
    evaluation_files.write_evaluation(evaluation(), tmp_path / "after", figures=True)
    for name in ("comparison", "differences"):
        assert "Area (px²)" in [axes.get_title() for axes in drawn[name].axes]
    with (tmp_path / "after" / "per_image.csv").open() as stream:
        assert [row["area"] for row in csv.DictReader(stream)] == ["4"] * 6
    summary = json.loads((tmp_path / "after" / "summary.json").read_text())
    assert summary["runs"][1]["metrics"]["area"]["mean"] == 4
    assert summary["comparisons"][0]["metrics"]["area"]["equal"] == 3
    for name in ("table.md", "table.tex"):
        table = (tmp_path / "after" / name).read_text()
        assert table.count("Area (px²)") == 2 and "4.0" in table
    (table,) = metric_tables([read_evaluation(tmp_path / "after", "after")])
    assert table.rows[-1][0] == "Area (px²)"
    # Evaluations of versions with and without the metric stay readable.
    (table,) = metric_tables([read_evaluation(tmp_path / "before", "before")])
    assert len(table.rows) == len(METRICS) - 1
    monkeypatch.delitem(METRICS, "area")
    (table,) = metric_tables([read_evaluation(tmp_path / "after", "after")])
    assert table.rows[-1][0] == "Area (px²)"


def draw_skipped(records, _):
    figure = Figure()
    figure.add_subplot().plot([row["skipped_steps"] for row in records.history])
    return Drawn(figure, "steps that were left out.", "A curve.")


def draw_spread(records, label):
    figure = Figure()
    figure.add_subplot().hist(records.assessments[-1].of_label(label).difficulty)
    return Drawn(figure, "histogram of D.", "A histogram.")


def draw_nothing(*_):
    return None


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_run_figure_is_added_by_one_row(monkeypatch, tiny, tmp_path):
    for name in list(RUN_FIGURES):
        monkeypatch.delitem(RUN_FIGURES, name)  # They take longer to draw.
    for row in (
        RunFigure("skipped", "skipped steps", f"{HERE}:draw_skipped"),
        RunFigure("spread", "spread of D", f"{HERE}:draw_spread", source="assessments"),
        RunFigure("nothing", "nothing", f"{HERE}:draw_nothing", source="schedule"),
    ):
        monkeypatch.setitem(RUN_FIGURES, row.name, row)
    outcome = train(tiny("run", "output.figures=true", "output.overlays=0"))
    figures = tmp_path / "run" / "figures"
    assert {path.name for path in figures.iterdir() if path.suffix == ".png"} == {
        "skipped.png",
        "spread.png",
    }
    assert figures / "spread.pdf" in outcome.files
    page = make_page([tmp_path / "run"], out=tmp_path / "page.html").read_text()
    assert page.index("run: steps that were left out.") < page.index("run: histogram of D.")


def draw_areas(evaluation):
    figure = Figure()
    figure.add_subplot().plot([run.scores[0].mask_pixels for run in evaluation.runs])
    return figure


def test_evaluation_figure_is_added_by_one_row(monkeypatch, tmp_path):
    for name in list(EVALUATION_FIGURES):
        monkeypatch.delitem(EVALUATION_FIGURES, name)
    for row in (
        Row("areas", "area of the first mask", f"{HERE}:draw_areas"),
        Row("nothing", "nothing", f"{HERE}:draw_nothing"),
    ):
        monkeypatch.setitem(EVALUATION_FIGURES, row.name, row)
    evaluation = Evaluation([RunScores("a", [image_scores("1", np.eye(4), np.eye(4))])])
    files = evaluation_files.write_evaluation(evaluation, tmp_path / "cmp", figures=True)
    assert [path.name for path in files if path.suffix in (".png", ".pdf")] == [
        "areas.png",
        "areas.pdf",
    ]
    page = page_of([], [read_evaluation(tmp_path / "cmp", "cmp")])
    (gallery,) = [one for one in page.sections[1].blocks if isinstance(one, Gallery)]
    assert [one.caption for one in gallery.pictures] == ["cmp: area of the first mask."]


def reversed_images(epsilon, _):
    return epsilon[::-1]


def test_replay_arm_is_added_by_one_row(monkeypatch, tiny, tmp_path, polyseg):
    train(tiny("first", "control.start=1"))
    row = Arm("reversed", "the images in reverse", "tests.test_registries:reversed_images")
    monkeypatch.setitem(REPLAY_ARMS, "reversed", row)
    assert_listed("control.replay_arm", "reversed", "the images in reverse")
    replay = ("--replay", tmp_path / "first", "--replay-arm")
    answer = polyseg("train", *replay, "revers", "--out", tmp_path / "second")
    assert answer.code == 2 and "did you mean reversed?" in answer.err.replace("\n", " ")
    answer = polyseg("train", *replay, "reversed", "--out", tmp_path / "second")
    assert answer.code == 0, answer.err
    first, second = (read_schedule(tmp_path / run / "schedule.h5") for run in ("first", "second"))
    assert np.unique(first.epsilon[-1]).size > 1
    np.testing.assert_array_equal(second.epsilon, first.epsilon[:, ::-1])


def small_network(in_channels, out_channels, dropout, **settings):
    first = nn.Conv2d(in_channels, 4, 3, padding=1)
    return nn.Sequential(first, nn.Dropout2d(dropout), nn.Conv2d(4, out_channels, 1)), 1


def rmsprop(weights, config):
    return torch.optim.RMSprop(weights, lr=config.learning_rate)


def halved(done):
    return 1.0 if done < 0.5 else 0.5


def inverted(image, _):
    return Levels((255.0,) * image.shape[2], (255.0,) * image.shape[2])


def of_upper_half(mask, predicted, _):
    half = torch.zeros_like(mask)
    half[:, : half.shape[1] // 2] = True
    return [half]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "registry", "row"),
    [
        ("network.name", NETWORKS, Row("small", "two layers", f"{HERE}:small_network")),
        (
            "training.optimizer",
            OPTIMIZERS,
            Optimizer("rmsprop", "RMSprop", f"{HERE}:rmsprop", ("step", "square_avg")),
        ),
        ("training.scheduler", SCHEDULERS, Row("halved", "halved half way", f"{HERE}:halved")),
        (
            "data.normalise",
            NORMALISATIONS,
            Normalisation("inverted", "0 to -1", f"{HERE}:inverted", pooled=True),
        ),
        ("uncertainty.region", REGIONS, Region("upper", "upper half", f"{HERE}:of_upper_half")),
    ],
)
def test_choice_is_added_by_one_row_and_its_run_resumes(
    monkeypatch, tiny, tmp_path, key, registry, row
):
    with pytest.raises(PolysegError, match=f"{row.name}' is not a"):
        tiny("run", f"{key}={row.name}")
    monkeypatch.setitem(registry, row.name, row)
    assert_listed(key, row.name, row.help)
    settings = [f"{key}={row.name}", "control.start=1"]
    # The small network has no settings; those of `tiny` belong to another network.
    settings += ["network.kwargs={}"] if registry is NETWORKS else []
    train(tiny("run", *settings, "training.epochs=2"))
    train(tiny("run", *settings, "training.epochs=3"), resume=True, accept_changes=True)
    assert len(history_of(tmp_path / "run")) == 3
    rates = [float(one["learning_rate"]) for one in history_of(tmp_path / "run")]
    assert (rates[0] == 2 * rates[-1]) == (row.name == "halved")
    found = read_assessment(tmp_path / "run" / "uncertainty" / "epoch_0003.h5")
    assert (found.difficulty > 0).all()


def test_every_augmentation_preset_is_explained():
    assert list(choices_of("data.augmentation")) == list(PRESETS)


def read_text_image(path, *, labels):
    pixels = np.loadtxt(path, np.uint8, ndmin=2)[None]
    return Stack(pixels if labels else pixels[..., None], None)


def write_text_image(source, values, path, plane, description):
    path = path.with_name(f"{path.name}.grid")
    np.savetxt(path, values[0], fmt="%d")
    return path


def test_file_format_is_added_by_one_row(monkeypatch, tmp_path, polyseg):
    for folder in ("images", "masks"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for i in range(8):
        mask = np.zeros((32, 32), np.uint8)
        mask[i : i + 9, 5 : 8 + i] = 1
        noise = np.random.default_rng(i).integers(0, 50, mask.shape)
        np.savetxt(tmp_path / "set" / "images" / f"{i}.grid", noise + 200 * mask, fmt="%d")
        np.savetxt(tmp_path / "set" / "masks" / f"{i}.grid", mask, fmt="%d")
    assert polyseg("data", "check", tmp_path / "set").code == 2
    read, write = f"{HERE}:read_text_image", f"{HERE}:write_text_image"
    row = Format("grid", "numbers as text", read, (".grid",), write=write)
    monkeypatch.setitem(FORMATS, "grid", row)
    assert polyseg("data", "check", tmp_path / "set").code == 0
    small = [word for one in TINY if "kwargs" in one or "batch" in one for word in ("--set", one)]
    answer = polyseg(
        *("train", "--data", tmp_path / "set", "--out", tmp_path / "run", "--epochs", "1"),
        *(*small, "--loss", "bce", "--set", "data.size=32", "--set", "output.figures=false"),
    )
    assert answer.code == 0, answer.err
    images = tmp_path / "set" / "images"
    answer = polyseg("predict", tmp_path / "run", images, "--out", tmp_path / "predicted")
    assert answer.code == 0, answer.err
    predicted = sorted((tmp_path / "predicted").glob("*.grid"))
    assert [path.stem for path in predicted] == [f"{i}" for i in range(8)]
    assert np.loadtxt(predicted[0]).shape == (32, 32)


class DropPath(nn.Module):
    """Dropout of all features of an image at once."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, features):
        if not self.training:
            return features
        kept = torch.rand(len(features), 1, 1, 1) >= self.p
        return features * kept / (1 - self.p)


def with_drop_path(in_channels, out_channels):
    first = nn.Conv2d(in_channels, 4, 3, padding=1)
    return nn.Sequential(first, DropPath(0.5), nn.Conv2d(4, out_channels, 1))


def test_public_data_set_is_added_by_one_row(monkeypatch, tmp_path, polyseg):
    """The set has four subjects with two views each, and masks in a separate folder."""
    for subject, view in itertools.product("abcd", (1, 2)):
        pixels = np.random.default_rng(ord(subject) * view).integers(0, 255, (40, 40), np.uint8)
        for name, values in ((f"v{view}", pixels), (f"drawn/{view}_x", 255 * (pixels > 99))):
            path = tmp_path / "set" / f"subject_{subject}" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(path)
    (tmp_path / "set/subject_a/more.png").touch()
    refused = polyseg("data", "check", tmp_path / "set")
    assert refused.code == 2
    images, masks = "{group}/v{view}", "{group}/drawn/{view}_x"
    row = PublicSet("four", "four subjects", images=images, masks=masks)
    monkeypatch.setitem(PUBLIC_SETS, "four", row)
    answer = polyseg("data", "check", tmp_path / "set", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert (found["layout"], found["images"]) == ("four", 8)
    assert found["groups"].startswith("4 (subject_a, subject_b")
    assert found["notes"] == [f"{tmp_path / 'set'}: 1 file (more.png) with other names left out"]
    (tmp_path / "set/subject_b/drawn/1_x.png").rename(tmp_path / "set/subject_b/drawn/3_x.png")
    refused = polyseg("data", "check", tmp_path / "set")
    assert "1 mask (3_x.png) without an image" in refused.err
    assert "1 image (v1.png) without a mask" in refused.err


def test_kind_of_dropout_is_added_by_one_row(monkeypatch, tiny, tmp_path):
    settings = ("network.name=tests.test_registries:with_drop_path", "network.kwargs={}")
    with pytest.raises(PolysegError, match="no active dropout layer"):
        train(tiny("before", *settings))
    row = DropoutLayer(
        "DropPath", "drops images", "tests.test_registries:DropPath", lambda shape: (1, 1, 1)
    )
    monkeypatch.setitem(DROPOUT_LAYERS, "DropPath", row)
    train(tiny("run", *settings))
    assert read_assessment(tmp_path / "run" / "uncertainty" / "epoch_0003.h5").difficulty.max() > 0
    # Each pass keeps all features, doubled, or none, so that only the bias is left.
    network, images = with_drop_path(1, 1), torch.rand(2, 1, 8, 8)
    first, _, last = network.eval()
    kept = last(2 * first(images)).sigmoid().flatten(0, 1)
    none = last.bias.sigmoid().expand(8, 8)
    streams = MaskStreams("independent", 0, 0, ["a", "b"], size=(8, 8))
    found = stochastic_pass(network, stochastic_layers(network), images, streams, range(8))
    which = [torch.allclose(one, kept[i % 2]) for i, one in enumerate(found)]
    for one, is_kept in zip(found, which, strict=True):
        assert is_kept or torch.allclose(one, none)
    assert 0 < sum(which) < 16

"""`polyseg evaluate`: thresholds, passes, corruptions, arms, millimetres, and errors."""

import csv
import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from polyseg.commands import evaluate as job
from polyseg.commands.estimate_uncertainty import estimate_uncertainty
from polyseg.commands.predict import predict_images
from polyseg.commands.train import train
from polyseg.config import Config, load_config
from polyseg.data.dataset import make_demo
from polyseg.data.loading import load_images
from polyseg.errors import PolysegError
from polyseg.evaluation import testing_networks as testing_module
from polyseg.evaluation.arms import arms_of
from polyseg.evaluation.testing_networks import (
    THRESHOLDS,
    EvaluationSettings,
    ImageTest,
    choose_thresholds,
)
from polyseg.metrics.dice import dice_coefficient
from polyseg.runs import checkpoints, trained_model
from polyseg.runs.trained_model import Inputs
from tests.conftest import TINY
from tests.test_train import run_of


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Return two runs with the Dice loss on the same images, with different seeds."""
    folder = tmp_path_factory.mktemp("two")
    settings = [*TINY, "output.figures=false", "loss.name=dice", "training.epochs=2"]
    return [
        run_of(
            load_config(
                overrides=[*settings, f"training.seed={i}", f"output.path={folder}/dice_s{i}"]
            )
        ).path
        for i in (0, 1)
    ]


def evaluate_runs(*arguments, inputs=None, figures=False, **how):
    comparison = job.ComparisonSettings(figures=figures, **how)
    named = {} if inputs is None else {"inputs": inputs}
    return job.evaluate_runs(*arguments, **named, comparison=comparison)


def summary_of(outcome):
    return json.loads((outcome.folder / "summary.json").read_text())


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_empty_list_of_corruptions_is_refused(text):
    assert job.corruption_names(None) == ()
    with pytest.raises(PolysegError, match=r"--corrupt: the list is empty; choose .*noise"):
        job.corruption_names(text)


@pytest.mark.slow
def test_comparison_writes_tables_and_figures(two_runs, tmp_path):
    outcome = evaluate_runs(
        two_runs,
        EvaluationSettings(corruptions=("noise",), uncertainty=True, samples=3, tolerance=1.5),
        baseline=str(two_runs[0]),
        out=tmp_path / "out",
        figures=True,
    )
    record = summary_of(outcome)
    assert [one["run"] for one in record["comparisons"]] == ["dice_s1", "dice_s1 (MC mean)"]
    means = [run["metrics"]["dice"]["mean"] for run in record["runs"][::2]]
    assert record["comparisons"][0]["metrics"]["dice"]["mean"] == pytest.approx(means[1] - means[0])
    assert record["metrics"]["nsd"]["title"].startswith("NSD") and record["tolerance"] == 1.5
    for name in (
        "comparison",
        "reliability",
        "differences",
        "robustness",
        "risk_coverage",
        "predictions_worst",
    ):
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert min(image.size) > 200
    assert {path.name for path in outcome.files} == {
        path.name for path in (tmp_path / "out").iterdir()
    }
    rows = list(csv.DictReader((tmp_path / "out" / "robustness.csv").open()))
    assert [(row["run"], int(row["strength"])) for row in rows] == [
        (name, strength) for name in ("dice_s0", "dice_s1") for strength in range(6)
    ]
    assert float(rows[0]["dice"]) == pytest.approx(means[0])


@pytest.mark.slow
def test_runs_with_different_seeds_are_one_arm(two_runs, finished, tmp_path):
    other = finished("plain", "control.enabled=false", "training.epochs=2").path
    record = summary_of(evaluate_runs([*two_runs, other], group=True, out=tmp_path / "arms"))
    alone = summary_of(evaluate_runs([*two_runs, other], out=tmp_path / "alone"))
    assert [(run["name"], run["members"]) for run in record["runs"]] == [
        ("dice", ["dice_s0", "dice_s1"]), ("plain", ["plain"]),
    ]  # fmt: skip
    means = [run["metrics"]["dice"]["mean"] for run in alone["runs"]]
    arm = record["runs"][0]["metrics"]["dice"]
    assert arm["mean"] == pytest.approx(np.mean(means[:2]))
    assert arm["seed_deviation"] == pytest.approx(np.std(means[:2], ddof=1))
    assert record["runs"][1]["metrics"]["dice"]["seed_deviation"] is None


@pytest.mark.slow
def test_folds_must_be_grouped_and_complete(tiny, tmp_path):
    folds = [
        run_of(tiny(f"f{i}", "loss.name=dice", "data.folds=4", f"data.fold={i}")).path
        for i in (0, 1)
    ]
    with pytest.raises(
        PolysegError, match=r"f1: would be tested on other images, or .* f0; .*--group"
    ):
        evaluate_runs(folds, out=tmp_path / "out")
    record = summary_of(evaluate_runs(folds, group=True, out=tmp_path / "out"))
    tested = [json.loads((fold / "split.json").read_text())["test"] for fold in folds]
    assert record["runs"][0]["counts"]["images"] == sum(map(len, tested))
    other = run_of(tiny("other", "loss.name=bce", "data.folds=4", "data.fold=0")).path
    with pytest.raises(PolysegError, match="other: would be tested on other images"):
        evaluate_runs([*folds, other], group=True, out=tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_mean_over_passes_is_evaluated_beside_the_plain_prediction(finished, tmp_path):
    run = finished().path
    settings = EvaluationSettings(uncertainty=True, samples=4)
    outcome = evaluate_runs([run], settings, out=tmp_path / "out")
    record = summary_of(outcome)
    plain, passes = record["runs"]
    assert (plain["prediction"], passes["prediction"]) == ("plain", "mc_mean")
    assert plain["metrics"]["brier"]["mean"] != passes["metrics"]["brier"]["mean"]
    names = [one["uncertainty"] for one in plain["failure_detection"]]
    assert names == [
        *("mutual_information", "entropy", "variance", "deterministic_entropy"),
        *("dispersion", "pairwise_dice"),
    ]
    assert sum(one["by"] == "difficulty" for one in plain["strata"]) == 3
    rows = list(csv.DictReader((tmp_path / "out" / "per_image.csv").open()))
    assert {row["prediction"] for row in rows} == {"plain", "mc_mean"}
    assert all(float(row["mutual_information"]) >= 0 for row in rows)


def test_mean_over_passes_does_not_depend_on_batch_division(finished, tmp_path, monkeypatch):
    run = finished().path
    settings = EvaluationSettings(uncertainty=True, samples=3)
    whole = summary_of(evaluate_runs([run], settings, out=tmp_path / "whole"))
    monkeypatch.setattr(testing_module, "_PIXELS_AT_ONCE", 32 * 32)
    parts = summary_of(evaluate_runs([run], settings, out=tmp_path / "parts"))
    for one, other in zip(whole["runs"], parts["runs"], strict=True):
        for key, found in one["metrics"].items():
            assert found["mean"] == pytest.approx(other["metrics"][key]["mean"], rel=1e-3), key


class Blurred(torch.nn.Module):
    """A network that predicts `peak` for foreground pixels and 0 for all others."""

    def __init__(self, masks, peak):
        super().__init__()
        self.masks, self.peak, self.turn = masks, peak, 0

    def forward(self, images):
        masks = torch.stack(self.masks[self.turn : self.turn + len(images)]).float()
        self.turn += len(images)
        return torch.logit(0.01 + (self.peak - 0.01) * masks)


def test_chosen_threshold_maximises_dice():
    images = make_demo(Config().data.model_copy(update={"demo_images": 8, "size": 32}))
    masks = [images.sample(identity)[1] for identity in images.ids]
    for peak, expected in ((0.33, 0.3), (0.9, 0.5), (0.12, 0.1)):
        network = Blurred(masks, peak)
        # Of all thresholds that separate the two, the one closest to 0.5.
        assert choose_thresholds(network, ImageTest("", images, images.ids, 3)) == {"": expected}
    probability = torch.rand(1, 9, 9, dtype=torch.float64)
    mask = torch.rand(1, 9, 9) > 0.5
    dices = testing_module._dice_curve(probability[0].numpy(), mask[0].numpy())
    for threshold, dice in zip(THRESHOLDS, dices, strict=True):
        expected = dice_coefficient(probability >= threshold, mask)
        assert dice == pytest.approx(float(expected))


def test_chosen_threshold_is_computed_on_validation_images(two_runs, tmp_path):
    outcome = evaluate_runs(two_runs[:1], EvaluationSettings(threshold="val"), out=tmp_path / "out")
    threshold = summary_of(outcome)["runs"][0]["threshold"]
    fixed = evaluate_runs(
        two_runs[:1], EvaluationSettings(threshold=threshold), out=tmp_path / "two"
    )
    assert summary_of(outcome)["runs"][0]["metrics"] == summary_of(fixed)["runs"][0]["metrics"]


def write_volumes(folder, spacing):
    """Write twelve slices with one box each as NIfTI."""
    rng = np.random.default_rng(0)
    for i in range(12):
        mask = np.zeros((32, 32, 1), np.uint8)
        mask[4 : 12 + i, 6:20] = 1
        pixels = (80 * mask + 60 * rng.random(mask.shape)).astype(np.float32)
        for name, values in (("images", pixels), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            volume = nibabel.Nifti1Image(values, np.diag([spacing, spacing, 5.0, 1.0]))
            nibabel.save(volume, folder / name / f"case{i}.nii.gz")
    return folder


def test_distances_are_in_millimetres_if_spacing_is_known(tmp_path, tiny):
    fine, coarse = (write_volumes(tmp_path / f"set{size}", float(size)) for size in (1, 3))
    run = run_of(tiny("run", f"data.path={fine}", "loss.name=dice")).path
    found = [
        summary_of(
            evaluate_runs([run], inputs=Inputs(data, "all"), out=tmp_path / f"out {data.name}")
        )
        for data in (fine, coarse)
    ]
    assert found[1]["unit"] == "mm" and found[1]["metrics"]["hd95"]["title"] == "HD95 (mm)"
    for key in ("hd95", "asd"):
        means = [record["runs"][0]["metrics"][key]["mean"] for record in found]
        assert means[1] == pytest.approx(3 * means[0], rel=1e-4) and means[0] > 0
    alike = [record["runs"][0]["metrics"]["dice"] for record in found]
    assert alike[0] == alike[1]


def test_networks_trained_on_different_labels_are_not_compared(tiny, tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for i in range(12):
        values = rng.integers(0, 3, (32, 32)).astype(np.uint8)
        Image.fromarray(80 * values).save(tmp_path / "set" / "images" / f"case{i}.png")
        Image.fromarray(values).save(tmp_path / "set" / "masks" / f"case{i}.png")
    settings = (f"data.path={tmp_path / 'set'}", "training.epochs=1", "loss.name=dice")
    runs = [run_of(tiny(f"of{k}", *settings, f"data.foreground={k}")).path for k in (1, 2)]
    with pytest.raises(PolysegError, match=r"of2: was trained on other labels than of1 \("):
        evaluate_runs(runs, out=tmp_path / "out")


def test_errors_are_raised_before_networks_are_tested(two_runs, tiny, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("tested")

    monkeypatch.setattr(job, "measure_network", never)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(PolysegError, match="full: is not empty"):
        evaluate_runs(two_runs, out=full)
    with pytest.raises(PolysegError, match="dice_s0: is given twice"):
        evaluate_runs([two_runs[0], two_runs[0]], out=tmp_path / "out")
    with pytest.raises(PolysegError, match="nowhere: there is no such file or folder"):
        evaluate_runs([two_runs[0], tmp_path / "nowhere"], out=tmp_path / "out")
    monkeypatch.undo()
    other = run_of(tiny("other", "loss.name=dice", "data.split_seed=3")).path
    monkeypatch.setattr(trained_model.Trained, "build", never)
    with pytest.raises(PolysegError, match="other: would be tested on other images"):
        evaluate_runs([*two_runs, other], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threshold", "1.5"], "--threshold 1.5: choose a number above 0 and below 1, or"),
        (["--threshold", "best"], "--threshold best: choose a number above 0"),
        (["--samples", "5"], "--samples needs --uncertainty"),
        (["--uncertainty", "--samples", "1"], "--samples 1: choose 2 to 10,000 passes"),
        (["--corrupt", "fog"], "fog: is not a corruption; choose noise"),
        (["--tolerance", "0"], "--tolerance 0: choose a number above 0"),
        (["--failure", "2"], "--failure 2: choose a Dice above 0 and at most 1"),
        (["--baseline", "dice_s0"], "--baseline: there is only one run"),
    ],
)
def test_invalid_options_give_one_line(polyseg, two_runs, tmp_path, arguments, said):
    answer = polyseg("evaluate", two_runs[0], "--out", tmp_path / "out", *arguments)
    assert answer.code == 2 and answer.err.strip().splitlines()[-1].startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


def test_evaluate_command_prints_its_tables(polyseg, two_runs, tmp_path):
    answer = polyseg(
        "evaluate", *two_runs, "--baseline", "dice_s1", "--out", tmp_path / "out",
        "--threshold", "0.4", "--no-figures",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    for text in (
        "Test metrics",
        "dice_s0 minus dice_s1",
        "Dice by size",
        "table.md",
        "NSD (2 px)",
    ):
        assert text in answer.out
    assert polyseg("evaluate", two_runs[0], "--baseline", "x", "--out", tmp_path / "b").code == 2
    wrong = polyseg("evaluate", *two_runs, "--baseline", "x", "--out", tmp_path / "b")
    assert (
        "error: --baseline 'x' is not a tested run or arm: choose dice_s0 or dice_s1" in wrong.err
    )


def test_arms_differ_by_relevant_settings_only():
    def of(seed, **sections):
        training = {"seed": seed} | sections.pop("training", {})
        return Config.model_validate({"training": training, **sections})

    replay = {"replay": "/somewhere/s0", "replay_arm": "shuffled"}
    configs = {
        "x/adaptive_0": of(0),
        "x/adaptive_1": of(1, output={"path": "x/adaptive_1"}),
        "x/steep_0": of(0, control={"sensitivity": 2.0}),
        "x/shuffled-seed0": of(0, control=replay),
        "x/shuffled-seed1": of(1, control=replay | {"replay": "/somewhere/s1"}),
        "x/mean": of(0, control=replay | {"replay_arm": "mean"}),
    }
    assert arms_of(configs) == {
        "adaptive": ["x/adaptive_0", "x/adaptive_1"],
        "steep": ["x/steep_0"],
        "shuffled": ["x/shuffled-seed0", "x/shuffled-seed1"],
        "mean": ["x/mean"],
    }
    same_folder = {"s0/dice": of(0), "s1/dice": of(1), "s0/bce": of(0, loss={"name": "bce"})}
    assert list(arms_of(same_folder)) == ["dice", "bce"]
    folds = {f"f{n}": of(0, data={"folds": n, "fold": 0}) for n in (5, 10)}
    assert len(arms_of(folds)) == 2
    assert arms_of({"a": of(0, data={"path": "/one/set"}), "b": of(1, data={"path": "/two/set"})})
    alike = {"x/run_0": of(0), "x/run_1": of(1, loss={"name": "bce"})}
    assert arms_of(alike) == {"x/run_0": ["x/run_0"], "x/run_1": ["x/run_1"]}


def test_moved_run_is_recognised(two_runs, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(two_runs[0], moved)
    record = summary_of(evaluate_runs([two_runs[0], moved], out=tmp_path / "out"))
    assert record["runs"][0]["metrics"] == record["runs"][1]["metrics"]


@pytest.mark.slow
def test_runs_on_the_same_images_read_them_once(two_runs, tiny, tmp_path, monkeypatch):
    read = []

    def counted(config, progress):
        read.append(config)
        return load_images(config, progress)

    monkeypatch.setattr(trained_model, "load_images", counted)
    cached = Inputs(cache=tmp_path / "cache")
    evaluate_runs(two_runs, EvaluationSettings(threshold="val"), cached, out=tmp_path / "one")
    assert len(read) == 1
    other = run_of(tiny("other", "loss.name=dice", "data.normalise=unit")).path
    evaluate_runs([*two_runs, other], out=tmp_path / "two")
    assert len(read) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_commands_read_each_checkpoint_once(two_runs, tmp_path, monkeypatch):
    read, content = [], checkpoints._content

    def counted(path):
        read.append(path.parent.parent.name + "/" + path.stem)
        return content(path)

    monkeypatch.setattr(checkpoints, "_content", counted)
    evaluate_runs(
        two_runs, EvaluationSettings(threshold="val"), baseline="dice_s0", out=tmp_path / "a"
    )
    assert read == ["dice_s0/best", "dice_s1/best"]
    read.clear()
    estimate_uncertainty(two_runs[0], Inputs(part="test"), samples=2, out=tmp_path / "b")
    assert read == ["dice_s0/best"]
    read.clear()
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "image.png")
    predict_images(two_runs[0], [tmp_path / "image.png"], out=tmp_path / "c")
    assert read == ["dice_s0/best"]
    read.clear()
    shutil.copytree(two_runs[0], tmp_path / "again")
    settings = [f"output.path={tmp_path / 'again'}", "training.epochs=3"]
    train(load_config(two_runs[0] / "config.yaml", settings), resume=True)
    assert read == ["again/last", "again/best"]


@pytest.mark.parametrize(("start", "is_early"), [(1, False), (3, True)])
def test_weights_from_before_adapted_epsilons_are_warned_of(finished, polyseg, start, is_early):
    run = finished("run", f"control.start={start}")
    answer = polyseg("evaluate", run.last, "--no-figures", "--out", run.path.parent / "out")
    warning = f"of epoch 3, before the first with adapted epsilons ({start + 1})"
    assert answer.code == 0 and (warning in " ".join(answer.err.split())) == is_early

"""Means, intervals and tests by patient, spreads over folds, and the folder of a comparison."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from polyseg.evaluation.comparison import compare
from polyseg.evaluation.export import per_image_csv, summary
from polyseg.evaluation.scores import Evaluation, ImageScores, RunScores, pool
from polyseg.evaluation.tables import sheets
from polyseg.metrics.image_metrics import METRICS
from polyseg.metrics.significance import group_means, mean_interval, paired_difference
from polyseg.runs.trained_model import Inputs
from tests.benchmarks import correlated_slices
from tests.test_evaluation_sizes import write_pictures, write_volumes
from tests.test_testing_networks import evaluate_runs, summary_of
from tests.test_train import run_of


def slices(seed, patients=14, most=9):
    """Return two metrics, with some undefined values, and the patient of each image."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, most, patients)
    groups = [f"p{k}" for k, count in enumerate(counts) for _ in range(count)]
    level = np.repeat(rng.normal(0.7, 0.1, patients), counts)
    first = level + rng.normal(0, 0.02, len(groups))
    second = first + np.repeat(rng.normal(0.02, 0.03, patients), counts)
    first[3], second[5] = np.nan, np.nan
    order = rng.permutation(len(groups))
    return first[order], second[order], [groups[i] for i in order]


def scored(name, values, groups, **more):
    empty = dict.fromkeys(METRICS, math.nan)
    scores = [
        ImageScores(f"im{i}", empty | {"dice": value}, 9, 9, group=group)
        for i, (value, group) in enumerate(zip(values, groups, strict=True))
    ]
    return RunScores(name, scores, **more)


def means_by_patient(values, groups):
    """Return the means of patients with at least one value, by plain loops."""
    found = []
    for name in dict.fromkeys(groups):
        own = [v for v, g in zip(values, groups, strict=True) if g == name and not np.isnan(v)]
        found += [sum(own) / len(own)] if own else []
    return np.array(found)


@pytest.mark.parametrize("seed", range(4))
def test_means_and_tests_by_patient_equal_numpy_and_scipy(seed):
    first, second, groups = slices(seed)
    run = scored("b", second, groups)
    by_patient = means_by_patient(second, groups)
    assert run.patients == len(by_patient)
    assert run.mean("dice") == pytest.approx(by_patient.mean())
    assert run.deviation("dice") == pytest.approx(by_patient.std(ddof=1))
    difference = compare([scored("a", first, groups), run], "a")[0].differences["dice"]
    expected = means_by_patient(second - first, groups)
    assert (difference.patients, difference.images) == (len(expected), len(groups) - 2)
    assert difference.mean == pytest.approx(expected.mean())
    assert difference.p_value == pytest.approx(stats.wilcoxon(expected).pvalue)
    assert difference.better == (expected > 0).sum()
    assert difference.better + difference.worse + difference.equal == difference.patients


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_intervals_by_patient_equal_a_cluster_bootstrap(seed):
    """The means of patients are resampled, and each counts once."""
    _, second, groups = slices(seed, patients=40)
    means = means_by_patient(second, groups)
    rng = np.random.default_rng(1)
    drawn = means[rng.integers(0, means.size, (6000, means.size))].mean(axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    interval = scored("b", second, groups).interval("dice")
    width = high - low
    assert interval.low == pytest.approx(low, abs=0.06 * width)
    assert interval.high == pytest.approx(high, abs=0.06 * width)
    by_image = scored("b", second, [None] * len(groups)).interval("dice")
    assert by_image == mean_interval(second)


def test_image_without_a_group_counts_as_one_patient():
    values, groups = [0.2, 0.4, 0.8, 0.9], ["a", "a", None, None]
    assert group_means(values, groups) == pytest.approx([0.3, 0.8, 0.9])
    assert scored("a", values, groups).patients == 3
    assert scored("a", values, [None] * 4).patients is None
    found = paired_difference([0.1] * 4, values, groups=groups)
    assert (found.patients, found.images) == (3, 4)
    # Opposite differences of a patient cancel exactly, without rounding error.
    found = paired_difference([0.1, 0.3, 0.5], [0.2, 0.2, 0.6], groups=["a", "a", "b"])
    assert (found.better, found.equal) == (1, 1)


def test_tables_state_the_numbers_of_patients_and_images():
    first, second, groups = slices(0)
    runs = [scored("a", first, groups), scored("b", second, groups)]
    evaluation = Evaluation(runs, compare(runs, "a"))
    record = summary(evaluation)
    assert record["by"] == "patient" and record["runs"][0]["patients"] == 14
    metrics, comparison = sheets(record)[:2]
    count = f"14 patients, {len(groups)} images"
    assert metrics.heads[1] == f"a ({count})" and "over the patients" in metrics.notes[0]
    assert f"14 patients, {len(groups) - 2} images" in comparison.title
    assert "Wilcoxon's signed-rank test over the patients" in comparison.notes[0]
    rows = list(csv.DictReader(per_image_csv(runs).splitlines()))
    assert [row["group"] for row in rows[: len(groups)]] == groups
    alone = [scored(name, first, [None] * len(groups)) for name in "ab"]
    record = summary(Evaluation(alone, compare(alone, "a")))
    metrics, comparison = sheets(record)[:2]
    assert record["by"] == "image" and "patient" not in metrics.heads[1]
    assert "over the images, taken as independent" in comparison.notes[0]


def test_arm_over_folds_tests_each_image_once_and_shows_both_spreads():
    first, second, groups = slices(1, patients=20)
    names = list(dict.fromkeys(groups))
    members = []
    for seed, values in enumerate((first, second)):
        whole = scored("x", values, groups)
        for fold in range(4):
            inside = [one for one in whole.scores if names.index(one.group) % 4 == fold]
            members.append(RunScores(f"s{seed}f{fold}", inside, seed=seed, fold=fold))
    arm = pool("arm", members)
    assert sorted(one.id for one in arm.scores) == sorted(one.id for one in whole.scores)
    both = np.nanmean([first, second], axis=0)
    assert arm.mean("dice") == pytest.approx(means_by_patient(both, groups).mean())
    folds = []
    for fold in range(4):
        rows = [i for i, group in enumerate(groups) if names.index(group) % 4 == fold]
        folds.append(means_by_patient(both[rows], [groups[i] for i in rows]).mean())
    assert arm.fold_deviation("dice") == pytest.approx(np.std(folds, ddof=1))
    seeds = [means_by_patient(values, groups).mean() for values in (first, second)]
    assert arm.seed_deviation("dice") == pytest.approx(np.std(seeds, ddof=1))
    sheet = sheets(summary(Evaluation([arm])))[0]
    dice = next(row for row in sheet.rows if row[0].text == "Dice")
    spreads = (np.std(seeds, ddof=1), np.std(folds, ddof=1))
    assert dice[1].text.endswith("(seeds {:.3f}, folds {:.3f})".format(*spreads))
    other = pool(
        "other", [RunScores(f"o{m.name}", m.scores, seed=m.seed, fold=m.fold) for m in members]
    )
    evaluation = Evaluation([arm, other], compare([arm, other], "arm"))
    notes = " ".join(sheets(summary(evaluation))[1].notes)
    for said in ("p: Wilcoxon's", "p runs: their paired t-test", "Holm: the larger of the two p"):
        assert said in notes


@pytest.mark.slow
def test_slices_of_a_volume_are_one_patient(tiny, tmp_path, monkeypatch):
    write_volumes(tmp_path / "set")
    data = f"data.path={tmp_path / 'set'}"
    runs = [
        run_of(tiny(name, data, "loss.name=dice", f"training.seed={k}")).path
        for k, name in enumerate("ab")
    ]
    monkeypatch.chdir(tmp_path)
    own = json.loads((runs[0] / "evaluation/summary.json").read_text())
    assert own["by"] == "patient" and own["runs"][0]["counts"]["images"] == 2
    inputs = Inputs(part="all")
    found = evaluate_runs(runs, inputs=inputs, baseline="a")
    record = summary_of(found)
    assert [run["patients"] for run in record["runs"]] == [10, 10]
    assert record["comparisons"][0]["metrics"]["dice"]["patients"] == 10
    assert found.folder.parent == tmp_path and found.folder.name.startswith("comparison-")
    assert {(found.folder / one).resolve() for one in record["sources"]} == set(runs)
    rows = list(csv.DictReader((found.folder / "per_image.csv").open()))
    assert {row["group"] for row in rows} == {str(i) for i in range(10)}
    from polyseg.evaluation.testing_networks import EvaluationSettings

    by_image = EvaluationSettings(by="image")
    record = summary_of(evaluate_runs(runs[:1], by_image, inputs, out=tmp_path / "by image"))
    assert record["by"] == "image" and record["runs"][0]["patients"] is None


def test_patients_of_a_manifest_are_used_in_runs_and_comparisons(tiny, tmp_path, polyseg):
    """The column "group" decides the split, the test of a run, and the tables."""
    write_pictures(tmp_path / "set")
    names = sorted(path.stem for path in (tmp_path / "set/images").iterdir())
    patient = {name: f"patient {k // 2}" for k, name in enumerate(names)}
    manifest = tmp_path / "set/groups.csv"
    lines = [f"images/{name}.png,masks/{name}.png,{patient[name]}" for name in names]
    manifest.write_text("\n".join(["image,mask,group", *lines]) + "\n")
    data = f"data.path={manifest}"
    runs = [
        run_of(tiny(name, data, f"loss.name={name}", "training.epochs=1"))
        for name in ("dice", "bce")
    ]
    split, _ = runs[0].read_split()
    parts = [{patient[one] for one in ids} for ids in split.values()]
    assert sum(map(len, parts)) == len(set(patient.values())) == 5
    own = json.loads((runs[0].path / "evaluation/summary.json").read_text())
    assert own["by"] == "patient" and own["runs"][0]["patients"] == len(split["test"]) // 2
    out = tmp_path / "out"
    asked = ("--split", "all", "--baseline", "dice", "--no-figures", "--out", out)
    answer = polyseg("evaluate", *(run.path for run in runs), *asked)
    assert answer.code == 0, answer.err
    table = (out / "table.md").read_text()
    assert "dice (5 patients, 10 images)" in table
    assert "bce minus dice (5 patients, 10 images)" in table
    assert "Wilcoxon's signed-rank test over the patients" in table
    with (out / "per_image.csv").open() as file:
        assert {row["id"]: row["group"] for row in csv.DictReader(file)} == patient


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_report_finds_the_comparison_of_its_runs(finished, tmp_path, polyseg):
    runs = [finished("a").path, finished("b").path, finished("c").path]
    asked = ("evaluate", *runs[:2], "--baseline", "a", "--no-figures", "--quiet")
    assert polyseg(*asked).code == 0
    (folder,) = tmp_path.glob("comparison-*")
    assert not list(runs[0].glob("evaluation-*"))
    page = tmp_path / "page.html"
    answer = polyseg("report", *runs[:2], "--out", page)
    assert answer.code == 0 and folder.name in " ".join(answer.err.split()).replace(" ", "")
    assert "b minus a" in page.read_text()
    # A comparison of other runs, or a damaged one, is ignored.
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/summary.json").write_text("{")
    assert polyseg("report", *runs, "--out", page, "--overwrite").code == 0
    assert "b minus a" not in page.read_text()


def test_documented_error_rates_equal_the_simulation():
    text = (Path(__file__).parents[1] / "docs/evaluation.md").read_text()
    for row in correlated_slices.rows():
        assert f"| {' | '.join(row[:3])} |" in text
    rng = np.random.default_rng(0)
    values = correlated_slices.differences(0.5, rng)[:50, :, 0]
    expected = [stats.wilcoxon(one, method="approx").pvalue < 0.05 for one in values]
    assert correlated_slices.rejected_by_wilcoxon(values).tolist() == expected

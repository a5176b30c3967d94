"""Tables and files of an evaluation against the values they were made from."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from polyseg.evaluation.comparison import compare
from polyseg.evaluation.export import latex, markdown, per_image_csv, robustness_csv, summary
from polyseg.evaluation.scores import Evaluation, RobustnessPoint, RunScores, image_scores, pool
from polyseg.evaluation.tables import sheets
from polyseg.metrics.image_metrics import METRICS
from tests.test_evaluation_patients import scored

EMPTY, PIXEL = np.zeros((3, 4)), np.eye(3, 4) * np.array([1, 0, 0, 0])


def case(seed, size=(24, 31)):
    generator = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    y, x = generator.integers(2, 10, 2)
    mask[y : y + generator.integers(3, 12), x : x + generator.integers(3, 15)] = 1
    probability = np.clip(0.45 * mask + 0.7 * generator.random(size), 0, 1)
    return probability, mask


@pytest.fixture
def runs():
    first = [image_scores(f"im{seed}", *case(seed)) for seed in range(4)]
    second = [
        image_scores("im0", *case(0)),
        image_scores("im1", EMPTY, EMPTY.astype(np.uint8)),
        image_scores("im2", EMPTY, PIXEL.astype(np.uint8)),
    ]
    return [RunScores("a_run", first), RunScores("b|50%", second)]


@pytest.fixture
def compared():
    """Return two runs on twelve images, with the second run better on all of them."""
    cases = [case(seed) for seed in range(12)]
    worse = [image_scores(f"im{i}", *one) for i, one in enumerate(cases)]
    better = [
        image_scores(f"im{i}", np.where(mask, 0.8, 0.7 * probability), mask)
        for i, (probability, mask) in enumerate(cases)
    ]
    found = [RunScores("plain", worse), RunScores("new", better)]
    return Evaluation(found, compare(found, "plain"))


def test_stars_and_the_advice_on_seeds_are_noted_where_they_apply():
    rng = np.random.default_rng(0)
    low, high = (
        scored(name, rng.uniform(0, 0.1, 30) + k / 2, [None] * 30)
        for k, name in enumerate(("low", "high"))
    )

    def notes(*runs):
        found = Evaluation(runs, compare(runs, runs[0].name))
        return " ".join(sheets(summary(found))[0].notes)

    assert "*** p < 0.001" in notes(low, high) and "train several seeds" in notes(low, high)
    same = replace(low, name="same")
    assert "p < 0.05" not in notes(low, same) and "train several seeds" in notes(low, same)
    arms = [pool(one.name, [one, replace(one, seed=1)]) for one in (low, same)]
    assert "train several seeds" not in notes(*arms)


def test_notes_report_empty_masks_and_undefined_metrics(runs):
    _, better, *notes = sheets(summary(Evaluation(runs)))[0].notes
    assert better == "Lower is better: HD95, ASD, Brier, NLL, ECE, ACE."
    assert notes == [
        "b|50%: of 3 images 1 with both empty, 1 with prediction empty.",
        "b|50%: left out as undefined: Sensitivity of 1, AUC-ROC of 1, AP of 1.",
    ]


def test_csv_holds_every_value(runs):
    rows = list(csv.DictReader(io.StringIO(per_image_csv(runs))))
    assert len(rows) == 7 and "label" not in rows[0]
    for row, image in zip(rows, [image for run in runs for image in run.scores], strict=True):
        assert row["id"] == image.id
        for metric in METRICS.values():
            value = float(row[metric.name]) if row[metric.name] else math.nan
            np.testing.assert_allclose(value, image.values[metric.name], rtol=1e-8)


def test_csv_of_an_arm_holds_its_runs(runs):
    runs = [replace(run, seed=seed) for seed, run in enumerate(runs)]
    found, alone = (
        list(csv.DictReader(io.StringIO(per_image_csv(one)))) for one in ([pool("arm", runs)], runs)
    )
    assert [(row.pop("arm"), row.pop("seed")) for row in found] == [("arm", "0")] * 4 + [
        ("arm", "1")
    ] * 3
    assert found == alone


def test_summary_is_plain_json(runs):
    record = json.loads(json.dumps(summary(Evaluation(runs))), parse_constant=pytest.fail)
    metrics = record["runs"][0]["metrics"]
    assert set(metrics) == set(record["metrics"]) == set(METRICS)
    dice = runs[0].column("dice")
    assert metrics["dice"]["mean"] == pytest.approx(dice.mean())
    assert metrics["dice"]["n"] == 4
    assert dice.min() <= metrics["dice"]["low"] <= dice.mean() <= metrics["dice"]["high"]
    assert record["runs"][1]["metrics"]["sensitivity"]["n"] == 2


def test_tables_have_one_row_per_metric_and_escaped_names(runs):
    lines = markdown(summary(Evaluation(runs))).splitlines()
    table = [line for line in lines if line.startswith("|")][: 2 + len(METRICS)]
    assert {line.replace("\\|", "").count("|") for line in table} == {4}
    assert f"{runs[0].mean('dice'):.3f} ± {runs[0].deviation('dice'):.3f}" in table[2]
    assert "b\\|50% (3 images)" in table[0]
    body = [line for line in latex(summary(Evaluation(runs))).splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in body[: 1 + len(METRICS)]} == {2}
    assert r"a\_run" in body[0] and r"b\textbar{}50\%" in body[0]


def test_best_value_is_bold_and_significant_difference_is_marked(compared):
    assert compared.runs[1].mean("dice") > compared.runs[0].mean("dice")
    rows = {row[0].text: row for row in sheets(summary(compared))[0].rows}
    assert [cell.best for cell in rows["Dice"]] == [False, False, True]
    assert [cell.best for cell in rows["HD95 (px)"]] == [False, False, True]
    # Twelve differences of one sign: p = 2 / 2^12, exactly.
    assert compared.comparisons[0].differences["dice"].adjusted == pytest.approx(2 / 2**12)
    assert rows["Dice"][2].marks == "***" and rows["Dice"][1].marks == ""
    text = markdown(summary(compared))
    mean = f"{compared.runs[1].mean('dice'):.3f}"
    assert re.search(rf"\*\*{mean} ± [\d.]+\*\*\\\*\\\*\\\*", text)
    assert rf"\textbf{{{mean} $\pm$" in latex(summary(compared)) and "$^{***}$" in latex(
        summary(compared)
    )


def test_equal_means_are_not_marked_as_best(runs):
    twice = [runs[0], RunScores("again", runs[0].scores)]
    for row in sheets(summary(Evaluation(twice)))[0].rows:
        assert not any(cell.best for cell in row)


def test_comparison_table_shows_difference_interval_and_counts(compared):
    sheet = next(
        one for one in sheets(summary(compared)) if one.title.startswith("new minus plain")
    )
    row = next(row for row in sheet.rows if row[0].text == "Dice")
    found = compared.comparisons[0].differences["dice"]
    texts = [cell.text for cell in row]
    low, high = found.interval
    assert texts[1] == f"{found.mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    assert texts[2:] == ["12/0/0", "< 0.001", "< 0.001"] and "(12 images)" in sheet.title
    record = summary(compared)["comparisons"][0]["metrics"]["dice"]
    assert record["mean"] == pytest.approx(found.mean)
    assert record["low"] == pytest.approx(found.interval.low)


def test_robustness_table_has_one_row_per_strength():
    points = [
        RobustnessPoint("run", "noise", strength, [image_scores("a", *case(strength))])
        for strength in (0, 1, 2)
    ]
    evaluation = Evaluation([RunScores("run", points[0].scores)], robustness=points)
    rows = list(csv.DictReader(io.StringIO(robustness_csv(evaluation))))
    assert [row["strength"] for row in rows] == ["0", "1", "2"]
    assert float(rows[1]["dice"]) == pytest.approx(points[1].scores[0].values["dice"])
    sheet = next(
        one for one in sheets(summary(evaluation)) if one.title == "Dice on corrupted images"
    )
    assert len(sheet.rows[0]) == len(sheet.heads) == 5


def test_csv_holds_uncertainties_beside_the_metrics():
    images = [
        image_scores(f"im{seed}", *case(seed), uncertainty={"entropy": 0.1 * seed})
        for seed in range(6)
    ]
    evaluation = Evaluation([RunScores("run", images)], failure=0.5)
    titles = [sheet.title for sheet in sheets(summary(evaluation))]
    assert titles == [
        "Test metrics", "Dice by size", "Dice by difficulty", "Does the uncertainty find failures?",
    ]  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(per_image_csv(evaluation.runs))))
    assert [float(row["entropy"]) for row in rows] == pytest.approx([0.1 * i for i in range(6)])


def test_markup_in_names_is_escaped():
    hostile = "<script>x</script> **b** [l](http://e) a_b `c` \n\\input{/etc/passwd}"
    run = RunScores(hostile, [image_scores("im", *case(0))])
    text = markdown(summary(Evaluation([run])))
    assert "<script>" not in text.replace("\\<", "") and "](http" not in text
    assert "\\*\\*b\\*\\*" in text
    written = latex(summary(Evaluation([run])))
    assert "\\input{" not in written
    assert all(
        line.startswith(("%", "\\", "{}", "metric", "run")) for line in written.splitlines() if line
    )

"""The metrics against scikit-learn, SciPy and hand calculations, and the tables of them."""

import csv
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from sklearn import metrics as peer

from polyseg.evaluate import (
    METRICS,
    RunScores,
    area_under_roc,
    image_scores,
    latex_table,
    markdown_table,
    notes,
    per_image_csv,
    summary_json,
)


def case(seed, size=(24, 31)):
    generator = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    y, x = generator.integers(2, 10, 2)
    mask[y : y + generator.integers(3, 12), x : x + generator.integers(3, 15)] = 1
    probability = np.clip(0.45 * mask + 0.7 * generator.random(size), 0, 1)
    return probability, mask


def surface_distances(first, second):
    """By brute force: from every edge pixel of one to the nearest edge pixel of the other."""
    edges = [np.argwhere(one & ~binary_erosion(one)) for one in (first, second)]
    between = cdist(*edges)
    return between.min(axis=1), between.min(axis=0)


@pytest.mark.parametrize("seed", range(8))
def test_overlap_and_ranking_against_scikit_learn(seed):
    probability, mask = case(seed)
    values = image_scores("a", probability, mask).values
    truth, predicted = mask.ravel(), (probability >= 0.5).ravel()
    expected = {
        "accuracy": peer.accuracy_score(truth, predicted),
        "sensitivity": peer.recall_score(truth, predicted),
        "specificity": peer.recall_score(truth, predicted, pos_label=0),
        "precision": peer.precision_score(truth, predicted),
        "dice": peer.f1_score(truth, predicted),
        "iou": peer.jaccard_score(truth, predicted),
        "auc": peer.roc_auc_score(truth, probability.ravel()),
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("seed", range(8))
def test_distances_against_brute_force(seed):
    probability, mask = case(seed)
    values = image_scores("a", probability, mask).values
    there, back = surface_distances(probability >= 0.5, mask > 0)
    assert values["hd95"] == pytest.approx(
        max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5
    )
    assert values["asd"] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=60))
def test_the_area_under_roc_with_ties(pixels):
    score, truth = (np.array(values) for values in zip(*pixels, strict=True))
    area = area_under_roc(score.astype(float), truth.astype(bool))
    if truth.all() or not truth.any():
        assert math.isnan(area)
    else:
        assert area == pytest.approx(peer.roc_auc_score(truth, score))


EMPTY, FULL, PIXEL = np.zeros((3, 4)), np.ones((3, 4)), np.eye(3, 4) * np.array([1, 0, 0, 0])


@pytest.mark.parametrize(
    ("predicted", "mask", "expected"),
    [
        (EMPTY, EMPTY, {"dice": 1, "iou": 1, "precision": 1, "hd95": 0, "asd": 0, "accuracy": 1}),
        (EMPTY, PIXEL, {"dice": 0, "iou": 0, "precision": 0, "hd95": 5, "asd": 5}),
        (PIXEL, EMPTY, {"dice": 0, "iou": 0, "precision": 0, "hd95": 5, "asd": 5}),
        (PIXEL, PIXEL, {"dice": 1, "sensitivity": 1, "specificity": 1, "hd95": 0, "asd": 0}),
        (FULL, FULL, {"dice": 1, "sensitivity": 1, "accuracy": 1, "hd95": 0, "asd": 0}),
        (FULL, PIXEL, {"dice": 2 / 13, "specificity": 0, "precision": 1 / 12}),
    ],
)
def test_degenerate_cases_follow_the_rule(predicted, mask, expected):
    values = image_scores("a", predicted, mask.astype(np.uint8)).values
    for name, value in expected.items():
        assert values[name] == pytest.approx(value), name
    undefined = {name for name, value in values.items() if math.isnan(value)}
    assert undefined == (
        ({"sensitivity", "auc"} if not mask.any() else set())
        | ({"specificity", "auc"} if mask.all() else set())
    )


def test_half_is_foreground():
    mask = np.array([[1, 0]])
    assert image_scores("a", np.array([[0.5, 0.49999]]), mask).values["dice"] == 1


@pytest.fixture
def runs():
    first = [image_scores(f"im{seed}", *case(seed)) for seed in range(4)]
    second = [
        image_scores("im0", *case(0)),
        image_scores("im1", EMPTY, EMPTY.astype(np.uint8)),
        image_scores("im2", EMPTY, PIXEL.astype(np.uint8)),
    ]
    return [RunScores("a_run", first), RunScores("b|50%", second)]


def test_means_leave_out_and_count_what_is_undefined(runs):
    run = runs[1]
    assert run.defined("sensitivity").size == 2
    assert run.mean("sensitivity") == pytest.approx(run.scores[0].values["sensitivity"] / 2)
    assert run.deviation("sensitivity") == pytest.approx(run.mean("sensitivity") * 2**0.5)
    assert run.counts() == {"images": 3, "both empty": 1, "mask empty": 0, "prediction empty": 1}
    assert notes(runs) == [
        "b|50%: of 3 images 1 with both empty, 1 with prediction empty.",
        "b|50%: left out as undefined: Sensitivity of 1, AUC-ROC of 1.",
    ]


def test_the_csv_holds_every_value(runs):
    rows = list(csv.DictReader(io.StringIO(per_image_csv(runs))))
    assert len(rows) == 7
    for row, image in zip(rows, [image for run in runs for image in run.scores], strict=True):
        assert row["id"] == image.id
        for metric in METRICS:
            value = float(row[metric.key]) if row[metric.key] else math.nan
            np.testing.assert_allclose(value, image.values[metric.key], rtol=1e-8)


def test_the_summary_is_plain_json(runs):
    record = json.loads(summary_json(runs), parse_constant=pytest.fail)
    metrics = record["runs"][0]["metrics"]
    assert set(metrics) == {metric.key for metric in METRICS}
    assert metrics["dice"]["mean"] == pytest.approx(runs[0].column("dice").mean())
    assert metrics["dice"]["n"] == 4


def test_tables_have_a_row_a_run_and_keep_their_columns(runs):
    lines = markdown_table(runs).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines[:4]}) == 1
    assert f"{runs[0].mean('dice'):.3f} ± {runs[0].deviation('dice'):.3f}" in lines[2]
    body = [line for line in latex_table(runs).splitlines() if line.endswith(r"\\")]
    assert len(body) == 3 and {line.count("&") for line in body} == {len(METRICS)}
    assert r"a\_run" in body[1] and r"b|50\%" in body[2]

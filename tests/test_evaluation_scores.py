"""Summaries of metrics: means, arms, comparisons, terciles, failures."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as peer

from polyseg.errors import PolysegError
from polyseg.evaluation.comparison import compare
from polyseg.evaluation.scores import (
    ImageScores,
    RunScores,
    failure_detection,
    image_scores,
    pool,
    strata,
)
from polyseg.metrics.image_metrics import METRICS
from polyseg.metrics.significance import holm

EMPTY, PIXEL = np.zeros((3, 4)), np.eye(3, 4) * np.array([1, 0, 0, 0])


def scored(identity, dice, *, size=10, **uncertainty):
    values = dict.fromkeys(METRICS, math.nan)
    return ImageScores(identity, values | {"dice": dice}, size, size, uncertainty)


def run_of(name, dices, ids=None, label="", seed=None, fold=None):
    ids = ids or [f"im{i}" for i in range(len(dices))]
    scores = [scored(i, dice) for i, dice in zip(ids, dices, strict=True)]
    return RunScores(name, scores, label, seed=seed, fold=fold)


def test_default_threshold_is_one_half():
    probability, mask = np.array([[0.5, 0.49999]]), np.array([[1, 0]])
    assert image_scores("a", probability, mask).values["dice"] == 1
    found = image_scores("a", probability, mask, threshold=0.4)
    assert found.values["dice"] == pytest.approx(2 / 3)
    assert found.predicted_pixels == 2 and found.mask_pixels == 1


def test_means_exclude_and_count_undefined_values():
    probability = np.array([[0.9, 0.2], [0.1, 0.4]])
    run = RunScores(
        "run",
        [
            image_scores("a", probability, np.array([[1, 1], [0, 0]])),
            image_scores("b", EMPTY, EMPTY.astype(np.uint8)),
            image_scores("c", EMPTY, PIXEL.astype(np.uint8)),
        ],
    )
    assert run.defined("sensitivity").tolist() == [0.5, 0.0]
    assert run.mean("sensitivity") == pytest.approx(0.25)
    assert run.deviation("sensitivity") == pytest.approx(np.std([0.5, 0], ddof=1))
    assert run.counts() == {"images": 3, "both empty": 1, "mask empty": 0, "prediction empty": 1}


def test_arm_separates_spread_over_seeds_from_spread_over_images():
    table = np.array([[0.9, 0.5, 0.7], [0.8, 0.6, 0.4]])
    arm = pool("arm", [run_of(f"s{i}", row, seed=i) for i, row in enumerate(table)])
    assert arm.column("dice") == pytest.approx(table.mean(axis=0))
    assert arm.deviation("dice") == pytest.approx(table.mean(axis=0).std(ddof=1))
    assert arm.seed_deviation("dice") == pytest.approx(table.mean(axis=1).std(ddof=1))
    assert math.isnan(arm.members[0].seed_deviation("dice"))


def test_folds_of_an_arm_cover_all_images():
    folds = [
        run_of("f0", [0.9, 0.8], ["a", "b"], seed=0, fold=0),
        run_of("f1", [0.5], ["c"], seed=0, fold=1),
    ]
    arm = pool("arm", folds)
    assert [image.id for image in arm.scores] == ["a", "b", "c"]
    assert arm.column("dice").tolist() == [0.9, 0.8, 0.5]
    # Folds differ by their images, so they show no spread over seeds.
    assert math.isnan(arm.seed_deviation("dice"))
    again = [
        replace(run, seed=1, scores=[scored(one.id, 0.6) for one in run.scores]) for run in folds
    ]
    both = pool("arm", [*folds, *again])
    means = [np.mean([0.9, 0.8, 0.5]), 0.6]
    assert both.seed_deviation("dice") == pytest.approx(np.std(means, ddof=1))
    uneven = pool("arm", [*folds, again[0]])
    assert math.isnan(uneven.seed_deviation("dice"))


def test_comparison_is_paired_by_image_id():
    rng = np.random.default_rng(0)
    base, other, third = rng.random((3, 12))
    ids = [f"im{i}" for i in range(12)]
    turned = run_of("other", other[::-1], ids[::-1])
    found = compare([run_of("base", base, ids), turned, run_of("third", third, ids)], "base")
    assert [(one.run, one.baseline) for one in found] == [("other", "base"), ("third", "base")]
    p_values = [stats.wilcoxon(values - base).pvalue for values in (other, third)]
    for one, values, p, adjusted in zip(
        found, (other, third), p_values, holm(p_values), strict=False
    ):
        difference = one.differences["dice"]
        assert difference.mean == pytest.approx((values - base).mean())
        assert difference.p_value == pytest.approx(p)
        assert difference.adjusted == pytest.approx(adjusted)
        assert difference.better == (values > base).sum()
        assert difference.interval.low < difference.mean < difference.interval.high


def test_arms_are_compared_over_images_and_over_seeds():
    """Equal seeds are paired in any order."""
    rng = np.random.default_rng(2)
    first, second = rng.random((2, 3, 15))
    arms = [
        pool(name, [run_of(f"{name}{seed}", rows[seed], seed=seed) for seed in order])
        for name, rows, order in (("a", first, (0, 1, 2)), ("b", second, (2, 0, 1)))
    ]
    found = compare(arms, "a")[0].differences["dice"]
    pairs = (second - first).mean(axis=1)
    assert found.runs == 3
    assert found.deviation_over_runs == pytest.approx(pairs.std(ddof=1))
    assert found.p_over_runs == pytest.approx(stats.ttest_1samp(pairs, 0).pvalue)
    images = stats.wilcoxon(second.mean(axis=0) - first.mean(axis=0)).pvalue
    assert found.p == found.adjusted == pytest.approx(max(images, found.p_over_runs))


@pytest.mark.slow
def test_equal_arms_are_rarely_significant():
    """Each seed shifts all images of an arm, so a test over images alone would be significant."""
    rng = np.random.default_rng(3)
    rejected, by_images = 0, 0
    for _ in range(60):
        images = rng.normal(0.8, 0.05, 40)
        lifts, noise = rng.normal(0, 0.006, (2, 3, 1)), rng.normal(0, 0.01, (2, 3, 40))
        arms = [
            pool(name, [run_of(f"{name}{seed}", row, seed=seed) for seed, row in enumerate(rows)])
            for name, rows in zip("ab", images + lifts + noise, strict=True)
        ]
        found = compare(arms, "a")[0].differences["dice"]
        rejected += found.p < 0.05
        by_images += found.p_value < 0.05
    assert rejected <= 8 < by_images


def test_each_label_is_compared_separately():
    runs = [
        run_of(name, [shift + 0.1 * i for i in range(5)], label=label)
        for name, label, shift in (
            ("a", "x", 0.1), ("a", "y", 0.3), ("b", "x", 0.2), ("b", "y", 0.2),
        )
    ]  # fmt: skip
    found = {one.label: one.differences["dice"].mean for one in compare(runs, "a")}
    assert found == pytest.approx({"x": 0.1, "y": -0.1})
    with pytest.raises(PolysegError, match="--baseline c: is not one of the runs; choose a, b"):
        compare(runs, "c")


def test_terciles_by_size_exclude_images_without_foreground():
    sizes = [0, 5, 1, 3, 9, 7, 2]
    images = [scored(f"im{size}", size / 10, size=size) for size in sizes]
    found = list(strata(RunScores("run", images)))
    assert [(one.by, one.name, one.images) for one in found] == [
        ("size", "small", 2), ("size", "medium", 2), ("size", "large", 2),
    ]  # fmt: skip
    assert [one.means["dice"] for one in found] == pytest.approx([0.15, 0.4, 0.8])


def test_terciles_by_difficulty_use_the_given_difficulties():
    run = run_of("run", [0.1, 0.2, 0.3, 0.4])
    found = [one for one in strata(run, [3.0, 2.0, math.nan, 1.0]) if one.by == "difficulty"]
    assert [(one.name, one.images) for one in found] == [("easy", 1), ("medium", 1), ("hard", 1)]
    assert [one.means["dice"] for one in found] == pytest.approx([0.4, 0.2, 0.1])


def test_failure_detection_equals_scikit_learn():
    rng = np.random.default_rng(1)
    dice = rng.random(30)
    unsure = 1 - dice + 0.5 * rng.random(30)
    images = [
        scored(str(i), d, entropy=u) for i, (d, u) in enumerate(zip(dice, unsure, strict=False))
    ]
    images.append(scored("without", 0.1))
    (found,) = failure_detection(RunScores("run", images), 0.4)
    assert found.failed == (dice < 0.4).sum()
    assert found.auroc == pytest.approx(peer.roc_auc_score(dice < 0.4, unsure))
    assert found.spearman == pytest.approx(stats.spearmanr(unsure, 1 - dice).statistic)
    order = np.argsort(unsure)
    selective = np.cumsum((1 - dice)[order]) / np.arange(1, 31)
    assert found.aurc == pytest.approx(selective.mean())
    best = np.cumsum(np.sort(1 - dice)) / np.arange(1, 31)
    assert found.excess_aurc == pytest.approx((selective - best).mean())


def test_comparison_excludes_seeds_of_only_one_arm():
    """Otherwise one good seed of an arm would change its mean."""
    rng = np.random.default_rng(4)
    first, lucky = rng.random(20) / 2, 0.5 + rng.random(20) / 2
    a = pool("a", [run_of("a0", first, seed=0), run_of("a1", lucky, seed=1)])
    b = pool("b", [run_of("b0", first, seed=0)])
    found = compare([a, b], "a")[0].differences["dice"]
    assert (found.mean, found.equal, found.runs, found.p) == (0.0, 20, 1, 1.0)
    apart = pool("b", [run_of("b2", lucky, seed=2)])
    found = compare([a, apart], "a")[0].differences["dice"]
    assert found.runs == 0 and found.mean == pytest.approx((lucky - first).mean() / 2)

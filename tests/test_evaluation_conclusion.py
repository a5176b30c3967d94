"""The sentence on whether the adaptive loss helped, for each possible outcome of a comparison."""

import re

import numpy as np
import pytest

from polyseg.config import load_config
from polyseg.evaluation.arms import arms_of, roles_of
from polyseg.evaluation.comparison import compare
from polyseg.evaluation.conclusion import conclusions
from polyseg.evaluation.export import markdown, summary
from polyseg.evaluation.scores import Evaluation, RunScores, pool
from tests.test_evaluation_patients import scored

ROLES = {"adaptive": {"dice": "dice", "permuted": "permuted"}}
CLAUSES = {
    ("dice", "better"): "the adaptive loss was better than the Dice loss (",
    ("dice", "worse"): "the adaptive loss was worse than the Dice loss (",
    ("dice", "not shown"): "no difference between the adaptive loss and the Dice loss was shown (",
    ("permuted", "better"): "adaptive arm was better than the permuted arm (",
    ("permuted", "worse"): "adaptive arm was worse than the permuted arm (",
    ("permuted", "not shown"): "which image got the steep loss made no demonstrable difference",
}
GAINS = {"better": 0.05, "worse": -0.05, "not shown": 0.0}


def arm(name, gain, label="", seeds=5, groups=None):
    """Return an arm of several seeds on 20 patients with Dice `gain` below an adaptive arm."""
    members = []
    for seed in range(seeds):
        rng = np.random.default_rng([seed, *name.encode()])
        level = np.random.default_rng(9).uniform(0.5, 0.8, 40)
        values = level - gain + rng.normal(0, 0.01, 40)
        patients = [f"p{i // 2}" for i in range(40)] if groups is None else groups
        members.append(scored(f"{name}-{seed}", values, patients, seed=seed, label=label))
    return pool(name, members)


def conclusions_for(dice, permuted, **more):
    arms = [arm("adaptive", 0.0, **more), arm("dice", dice, **more)]
    arms.append(arm("permuted", permuted, **more))
    return conclusions(compare(arms, "adaptive"), ROLES), arms


@pytest.mark.parametrize("dice", GAINS)
@pytest.mark.parametrize("permuted", GAINS)
def test_conclusion_states_better_worse_or_not_shown_for_each_arm(dice, permuted):
    (sentence,), arms = conclusions_for(GAINS[dice], GAINS[permuted])
    text = sentence[0].lower() + sentence[1:]
    for role, wanted in (("dice", dice), ("permuted", permuted)):
        assert [kind for of, kind in CLAUSES if of == role and CLAUSES[of, kind] in text] == [
            wanted
        ]
    assert sentence.count(".") == len(re.findall(r"\d\.\d", sentence)) + 1  # It is one sentence.
    assert sentence.endswith("; 20 patients, 5 pairs of runs.")
    numbers = r"mean Dice (\S+), 95 % interval (\S+) to (\S+), adjusted p ([< \d.]+)"
    for other, found in zip(arms[1:], re.findall(numbers, sentence), strict=True):
        mean, low, high = map(float, found[:3])
        assert mean == pytest.approx(arms[0].mean("dice") - other.mean("dice"), abs=6e-5)
        assert low < mean < high
        p = 0.0 if found[3].startswith("<") else float(found[3])
        assert (p < 0.05) == (GAINS[dice if other.name == "dice" else permuted] != 0)


@pytest.mark.parametrize("gain", GAINS)
def test_conclusion_is_the_same_with_the_other_arm_as_baseline(gain):
    """Counts are equal; the interval of the mirrored differences is equal up to resampling."""
    arms = [arm("adaptive", 0.0), arm("dice", GAINS[gain])]
    roles = {"adaptive": {"dice": "dice"}}
    given = [conclusions(compare(arms, baseline), roles) for baseline in ("adaptive", "dice")]
    one, other = (
        re.findall(r"(.*)\((.*mean Dice \S+).*?, adjusted (.*)", text) for (text,) in given
    )
    assert one == other and CLAUSES["dice", gain][:-2].lower() in one[0][0].lower()


def test_each_adaptive_arm_has_a_conclusion():
    arms = [arm("entropy", 0.0), arm("variance", 0.05), arm("dice", 0.05)]
    roles = {name: {"dice": "dice"} for name in ("entropy", "variance")}
    first, second = conclusions(compare(arms, "dice"), roles)
    assert first.startswith("entropy: the adaptive loss was better than the Dice loss (")
    assert second.startswith("variance: no difference between the adaptive loss and the Dice")
    assert conclusions(compare(arms, "dice"), {"entropy": {"permuted": "variance"}}) == []


def test_interval_without_zero_that_p_does_not_confirm_leaves_the_question_open():
    """Of six patients, p of Wilcoxon's test is at least 2 / 2^6, whose double is above 0.05."""
    values = np.linspace(0.6, 0.7, 6)
    arms = [scored("adaptive", values - 0.03, [None] * 6), scored("dice", values, [None] * 6)]
    arms.append(scored("third", values - 0.01, [None] * 6))
    (sentence,) = conclusions(compare(arms, "dice"), {"adaptive": {"dice": "dice"}})
    assert sentence.startswith("Whether the adaptive loss was better or worse than the Dice loss")
    assert "-0.0300, 95 % interval -0.0300 to -0.0300, adjusted p 0.062" in sentence
    assert "an interval that excludes 0 is not confirmed by p; 6 images, one run of" in sentence


def test_conclusion_reports_disagreement_of_mean_and_most_cases():
    values = np.full(30, 0.6)
    other = values + np.where(np.arange(30) < 27, 0.01, -0.4) + np.arange(30) / 1e5
    runs = [scored("adaptive", values, [None] * 30), scored("dice", other, [None] * 30)]
    (sentence,) = conclusions(compare(runs, "adaptive"), {"adaptive": {"dice": "dice"}})
    assert sentence.startswith("The mean and most cases disagree on whether the adaptive loss was")
    assert "steep" not in sentence
    assert sentence.endswith("30 images, one run of each, which says nothing about other seeds.")


def test_conclusion_shows_no_difference_for_one_image_or_equal_runs():
    for values in ([0.5], [0.5] * 9):
        runs = [scored(name, values, [None] * len(values)) for name in ("adaptive", "dice")]
        (sentence,) = conclusions(compare(runs, "adaptive"), {"adaptive": {"dice": "dice"}})
        assert sentence.startswith("No difference between the adaptive loss and the Dice loss was")
        assert ("too few for an adjusted p below 0.05" in sentence) == (len(values) == 1)


@pytest.mark.parametrize(("patients", "enough"), [(6, False), (7, True)])
def test_conclusion_reports_too_few_patients_for_significance(patients, enough):
    """Wilcoxon's smallest p is 2 / 2^n: adjusted for two arms, 0.0625 or 0.031."""
    (sentence,), _ = conclusions_for(0.05, 0.05, groups=[f"p{i % patients}" for i in range(40)])
    assert ("was better than the Dice loss" in sentence) == enough
    few = "; 6 patients are too few for an adjusted p below 0.05 in 2 comparisons."
    assert sentence.endswith(few) == (not enough)


def test_each_label_has_a_conclusion():
    arms = [
        RunScores(**vars(one))
        for label, gain in (("left", 0.05), ("right", 0.0))
        for one in (arm("adaptive", 0.0, label), arm("dice", gain, label))
    ]
    left, right = conclusions(compare(arms, "adaptive"), {"adaptive": {"dice": "dice"}})
    assert left.startswith("left: the adaptive loss was better than the Dice loss (")
    assert right.startswith("right: no difference between")


def test_tables_show_the_conclusion_below_the_differences():
    sentences, arms = conclusions_for(0.05, 0.0)
    evaluation = Evaluation(arms, compare(arms, "adaptive"), conclusions=sentences)
    part = (
        markdown(summary(evaluation)).split("## Dice: difference from adaptive")[1].split("##")[0]
    )
    assert sentences[0] in part.splitlines()
    assert "conclusions" in summary(evaluation)
    damaged = summary(evaluation) | {"conclusions": 3}
    assert sentences[0] not in markdown(damaged)


def configs(**arms):
    shared = {"dice": ["loss.name=dice"], "adaptive": []}
    shared |= {f"{arm}": ["control.replay=x", f"control.replay_arm={arm}"] for arm in ("permuted",)}
    return {
        name: load_config(overrides=[*shared[role], *more]) for name, (role, more) in arms.items()
    }


def test_control_arms_are_recognised_by_their_settings():
    given = configs(a=("adaptive", []), b=("dice", []), c=("permuted", []))
    arms = arms_of(given)
    assert roles_of(given, arms) == {"a": {"dice": "b", "permuted": "c"}}
    given = configs(
        a=("adaptive", ["uncertainty.samples=7", "control.epsilon_max=2"]),
        b=("dice", ["training.learning_rate=0.5"]),
        c=("permuted", ["control.epsilon_max=3", "uncertainty.samples=7"]),
    )
    assert roles_of(given, arms_of(given)) == {"a": {}}
    given = configs(a=("adaptive", ["uncertainty.samples=7"]), b=("dice", []))
    assert roles_of(given, arms_of(given)) == {"a": {"dice": "b"}}

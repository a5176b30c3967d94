"""Analysis of a study on generated rows, against SciPy, plain loops and counts by hand."""

import doctest
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from examples import study_analysis as analysis

SCRIPT = Path(__file__).parent.parent / "examples/study_analysis.py"


def run_row(name, fold, seed, arm, dice, **more):
    images = [[identity, value, 10 + k] for k, (identity, value) in enumerate(dice.items())]
    row = {"set": name, "fold": fold, "seed": seed, "arm": arm, "images": images}
    return json.dumps(row | {"cpu_minutes": 3, **more})


def constant(value, fold=0, images=6):
    return {f"{fold}-{i}": value for i in range(images)}


def test_examples_in_docstrings_run():
    assert doctest.testmod(analysis).failed == 0


# Rows


def test_rows_are_read_with_groups_and_failures():
    lines = [
        run_row("a", 0, 1, "uniform", {"x": 0.5, "y": 1.0}),
        json.dumps({"kind": "groups", "set": "a", "groups": {"x": "p", "y": "p"}}),
        json.dumps({"set": "a", "fold": 0, "seed": 2, "arm": "uniform", "error": "killed"}),
        "",
    ]
    study = analysis.read(lines)
    (run,) = study.runs
    assert run.dice == {"x": 0.5, "y": 1.0} and run.pixels == {"x": 10, "y": 11}
    assert study.groups == {"a": {"x": "p", "y": "p"}}
    assert study.failed == [("a", "uniform")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: is no row of a study"),
        ('{"set": "a"}', "line 2: is no row of a study"),
        ("[1]", "line 2: is no row of a study"),
        (run_row("a", 0, 0, "uniform", {"x": 0.5}), "line 2: repeats a run"),
    ],
)
def test_invalid_lines_are_named(line, said):
    with pytest.raises(ValueError, match=said):
        analysis.read([run_row("a", 0, 0, "uniform", {"x": 0.5}), line])


def test_mean_test_dice_is_over_groups():
    groups = json.dumps({"kind": "groups", "set": "a", "groups": {"x": 1, "y": 1}})
    study = analysis.read([run_row("a", 0, 0, "uniform", {"x": 0.2, "y": 0.4, "z": 0.9}), groups])
    assert study.mean(study.runs[0]) == pytest.approx((0.3 + 0.9) / 2)


def test_runs_without_a_row_are_counted_as_missing():
    lines = [run_row("a", 0, 0, arm, constant(0.5)) for arm in ("uniform", "oracle-0.3")]
    study = analysis.read(lines)
    # Gate B: 3 folds of uniform, 2 donors, 2 oracles, 6 permuted arms; two runs have a row.
    assert analysis.missing(study, "a") == 3 * (1 + 2 + 2 + 6) - 2
    lines += [run_row("a", 0, 0, "dice", constant(0.5))]
    assert analysis.missing(analysis.read(lines), "a") == 31 + 5 * 10 - 1


# Gate A


def measured(seeds=2, images=40):
    """Return a study with one measure that follows the error and one that follows the size."""
    rng = np.random.default_rng(0)
    ids = [f"i{k}" for k in range(images)]
    error = rng.uniform(0, 1, (seeds, images)).round(5)
    d = error + rng.normal(0, 0.3, (seeds, images))
    lines, half = [], images // 2
    for seed in range(seeds):
        for arm, part in (("donor-0", range(half)), ("donor-1", range(half, images))):
            dice = [[ids[k], 1 - error[seed, k], 5 + (7 * k) % images] for k in part]
            row = {"set": "a", "fold": 0, "seed": seed, "arm": arm, "images": dice}
            lines.append(json.dumps(row))
        scores = {"entropy": dict(zip(ids, d[seed], strict=True))}
        scores["size"] = {one: -np.log(5 + (7 * k) % images) for k, one in enumerate(ids)}
        agreement = {"entropy": {"5": 0.5, "20": 0.96, "50": 0.94, "100": 0.97 - 0.03 * seed}}
        agreement["size"] = dict.fromkeys(("5", "20"), 1.0)
        row = {"kind": "measures", "set": "a", "fold": 0, "seed": seed, "scores": scores}
        lines.append(json.dumps(row | {"agreement": agreement}))
    size = np.array([5 + (7 * k) % images for k in range(images)])
    return analysis.read(lines), d, error, size


def residuals(values, given):
    x, y = stats.rankdata(values), stats.rankdata(given)
    return x - np.polyval(np.polyfit(y, x, 1), y)


def test_validity_equals_scipy_and_regression_of_ranks():
    study, d, error, size = measured()
    entropy, by_size = analysis.validity(study, resamples=50)
    rho = [stats.spearmanr(x, y).statistic for x, y in zip(d, error, strict=True)]
    assert entropy.error[0] == pytest.approx(np.mean(rho))
    partial = [
        np.corrcoef(residuals(x, size), residuals(y, size))[0, 1]
        for x, y in zip(d, error, strict=True)
    ]
    assert entropy.at_equal_size[0] == pytest.approx(np.mean(partial))
    assert entropy.between_seeds[0] == pytest.approx(stats.spearmanr(*d).statistic)
    assert (entropy.images, entropy.seeds) == (40, 2)
    assert entropy.passes == [100, float("inf")]
    assert by_size.passes == [] and np.isnan(by_size.at_equal_size[0])
    assert by_size.between_seeds[0] == pytest.approx(1)


def test_intervals_of_validity_resample_whole_groups():
    study, d, error, _ = measured(seeds=1, images=60)
    groups = {f"i{k}": f"p{k // 3}" for k in range(60)}
    (entropy, _) = analysis.validity(replace(study, groups={"a": groups}))
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(1500):
        rows = np.concatenate([3 * k + np.arange(3) for k in rng.integers(0, 20, 20)])
        drawn.append(stats.spearmanr(d[0][rows], error[0][rows]).statistic)
    expected = np.percentile(drawn, (2.5, 97.5))
    width = expected[1] - expected[0]
    assert entropy.error[1] == pytest.approx(tuple(expected), abs=0.12 * width)


def test_donors_of_other_seeds_are_not_used():
    study, *_ = measured(seeds=2)
    alone = replace(study, runs=[run for run in study.runs if run.seed == 0])
    assert [one.seeds for one in analysis.validity(alone, resamples=5)] == [1, 1]


def test_measures_without_both_donors_are_excluded_and_named():
    study, *_ = measured(seeds=2)
    runs = [run for run in study.runs if (run.seed, run.arm) != (1, "donor-1")]
    text = analysis.tables(replace(study, runs=runs))
    assert "| a | entropy | 40 | 1 |" in text
    assert "Left out, without both donors: a seed 1." in text


# Gate B


def oracle_rows(oracle, uniform, permuted, folds=3, sensitivity="1"):
    for fold in range(folds):
        arms = {f"oracle-{sensitivity}": oracle[fold], "uniform": uniform[fold]}
        arms |= {f"permuted-{k}-{sensitivity}": permuted[fold] + 0.1 * (k - 2) for k in (1, 2, 3)}
        for arm, value in arms.items():
            yield run_row("a", fold, fold, arm, constant(value, fold))


@pytest.mark.parametrize(
    ("oracle", "uniform", "permuted", "said"),
    [
        ((0.6, 0.6, 0.6), (0.5, 0.5, 0.5), (0.55, 0.5, 0.4), "in all folds at sensitivity 1"),
        ((0.6, 0.6, 0.6), (0.5, 0.5, 0.6), (0.5, 0.5, 0.4), "no evidence that placement can"),
        ((0.6, 0.6, 0.6), (0.5, 0.5, 0.5), (0.5, 0.61, 0.4), "no evidence that placement can"),
    ],
)
def test_oracle_must_exceed_uniform_and_permuted_in_all_folds(oracle, uniform, permuted, said):
    study = analysis.read(oracle_rows(oracle, uniform, permuted))
    (found,) = analysis.oracles(study)
    for fold in range(3):
        expected = (oracle[fold], uniform[fold], permuted[fold])
        assert found.folds[fold] == pytest.approx(expected)
    assert said in analysis.verdicts([found])["a"]


def test_oracle_is_compared_over_the_images_of_all_folds():
    lines = oracle_rows((0.6, 0.7, 0.8), (0.5, 0.6, 0.7), (0.4, 0.5, 0.6))
    ((name, sensitivity, uniform, permuted),) = analysis.oracle_differences(analysis.read(lines))
    assert (name, sensitivity, uniform.runs, permuted.runs) == ("a", "1", 3, 3)
    assert uniform.images == permuted.images == 18
    assert uniform.mean == pytest.approx(0.1) and permuted.mean == pytest.approx(0.2)


def test_set_with_missing_folds_has_no_verdict():
    rows = list(oracle_rows((0.6,) * 3, (0.5,) * 3, (0.5,) * 3))
    study = analysis.read(rows[:-1])  # A permuted arm of the last fold is missing.
    (found,) = analysis.oracles(study)
    assert sorted(found.folds) == [0, 1]
    assert analysis.verdicts([found])["a"].startswith("unfinished")


# Gate C


def arm_rows(gain, sets=5, seed=0):
    """Return rows of all contrast arms, in which `chosen` is better by the `gain` of its set."""
    study = analysis.simulated(seed, sets)
    for run in study.runs:
        k = int(run.set[-1])
        more = gain[k] if run.arm == "chosen" else 0
        dice = {one: value + more for one, value in run.dice.items()}
        yield replace(run, dice=dice)


def study_of(gain, **more):
    return analysis.Study(list(arm_rows(gain, **more)), groups=analysis.simulated(0).groups)


def test_contrasts_equal_wilcoxon_over_groups_and_t_over_folds():
    study = study_of([0.01] * 5)
    found = analysis.contrasts(study)
    assert len(found) == 10
    for one in found:
        other = "epsilon-0" if one.name == "chosen - uniform" else "chosen-permuted"
        by_group, by_fold = {}, []
        for fold in range(5):
            chosen, beside = (study.arm(one.set, arm)[fold, fold] for arm in ("chosen", other))
            own = {}
            for identity in chosen.dice:
                difference = chosen.dice[identity] - beside.dice[identity]
                own.setdefault(identity.rpartition("-")[0], []).append(difference)
            by_group |= {group: np.mean(values) for group, values in own.items()}
            by_fold.append(np.mean([by_group[group] for group in own]))
        p_groups = stats.wilcoxon(list(by_group.values())).pvalue
        p_folds = stats.ttest_rel(by_fold, np.zeros(5)).pvalue
        assert one.found.mean == pytest.approx(np.mean(list(by_group.values())))
        assert (one.found.patients, one.found.runs) == (120, 5)
        assert one.p == pytest.approx(max(p_groups, p_folds), rel=1e-6)
    order = np.argsort([one.p for one in found])
    running = 0.0
    for k, i in enumerate(order):
        running = max(running, min(1, (10 - k) * found[i].p))
        assert found[i].adjusted == pytest.approx(running)


def test_one_fold_allows_no_claim():
    study = study_of([0.3] * 5)
    first = replace(study, runs=[run for run in study.runs if run.fold == 0])
    found = analysis.contrasts(first)
    assert all(np.isnan(one.p) and np.isnan(one.adjusted) for one in found)
    assert not any(analysis.claims(found).values())


def test_uniform_rows_of_gate_b_replace_missing_epsilon_0_rows():
    study = study_of([0.1] * 5)
    renamed = [
        replace(run, arm="uniform") if run.arm == "epsilon-0" and run.fold < 3 else run
        for run in study.runs
    ]
    assert analysis.contrasts(replace(study, runs=renamed)) == analysis.contrasts(study)


def test_arms_tested_on_other_images_are_refused():
    study = study_of([0.1] * 5)
    first, *others = study.runs
    cut = replace(first, dice=dict(itertools.islice(first.dice.items(), 7)))
    with pytest.raises(ValueError, match="set0 fold 0: chosen and epsilon-0 test other images"):
        analysis.contrasts(replace(study, runs=[cut, *others]))


@pytest.mark.parametrize(
    ("gain", "word"),
    [
        ([0.3] * 5, "better"),
        ([-0.3] * 5, "worse"),
        ([0.3, 0.3, 0.3, 0.02, -0.3], "better"),
        ([0.3, 0.3, 0.3, -0.3, -0.3], ""),
        ([0.3, 0.3, -0.3, -0.3, 0.0], ""),
        ([0.0] * 5, ""),
    ],
)
def test_claim_needs_three_significant_sets_and_four_of_one_sign(gain, word):
    found = analysis.contrasts(study_of(gain), resamples=1)
    assert analysis.claims(found) == dict.fromkeys(analysis.CONTRASTS, word)


def test_shuffling_permutes_labels_within_each_fold():
    study = study_of([0.3] * 5)
    moved = analysis.shuffled(study, 1)
    for key in {(run.set, run.fold) for run in study.runs}:
        before, after = (
            {run.arm: run.dice for run in one.runs if (run.set, run.fold) == key}
            for one in (study, moved)
        )
        assert set(before) == set(after)
        assert sorted(map(str, before.values())) == sorted(map(str, after.values()))
    assert [run.arm for run in moved.runs] != [run.arm for run in study.runs]
    # A true difference is removed, because labels within a fold are random.
    assert not any(analysis.claims(analysis.contrasts(moved, resamples=1)).values())


@pytest.mark.slow
def test_shuffled_arms_make_few_claims():
    claimed, shown = analysis.trial(100)
    assert claimed <= 5
    # Holm's method holds the level: 5 % expected at most, 12 of 100 would have p < 0.005.
    assert shown <= 11


# Tables


@pytest.mark.slow
def test_script_prints_all_tables(tmp_path):
    study, *_ = measured(images=20)
    lines = list(oracle_rows((0.6,) * 3, (0.5,) * 3, (0.5,) * 3))
    runs = [*study_of([0.3] * 5).runs, *(replace(run, set="b") for run in study.runs)]
    lines += [run_row(run.set, run.fold, run.seed, run.arm, run.dice) for run in runs]
    for row in study.measures:
        record = {"kind": "measures", "set": "b", "fold": row.fold, "seed": row.seed}
        lines.append(json.dumps(record | {"scores": row.scores, "agreement": row.agreement}))
    groups = {f"{fold}-{g}-{i}": f"{fold}-{g}" for fold, g, i in np.ndindex(5, 24, 5)}
    lines.append(json.dumps({"kind": "groups", "set": "set0", "groups": groups}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "rows.jsonl"],
        capture_output=True,
        text=True,
        check=True,
    )
    titles = [line for line in done.stdout.splitlines() if line.startswith("## ")]
    assert [title.split(":")[0] for title in titles] == [
        *("## Runs", "## Gate A", "## Gate B", "## Gate C", "## Gate C")
    ]
    assert (
        "- a: the oracle exceeds both others in all folds at sensitivity 1: gate C" in done.stdout
    )
    assert "- chosen - uniform: better is claimed (adjusted p below 0.05 on 5 sets)." in done.stdout
    # 15 runs of 3 minutes; 7 of the 10 arms of gate C have no row.
    assert "| set0 | 15 | 0 | 35 | 600 | 120 | 0.8 |" in done.stdout
    assert "| chosen - uniform | set0 | 120, 5 |" in done.stdout
    assert "| b | entropy | 20 | 2 |" in done.stdout
    for table in done.stdout.split("\n\n"):
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1


@pytest.mark.slow
def test_results_page_has_the_tables_of_the_committed_rows():
    """To update: `python examples/study_analysis.py docs/study.jsonl --page docs/results.md`"""
    docs = SCRIPT.parent.parent / "docs"
    study = analysis.read((docs / "study.jsonl").read_text().splitlines())
    page = (docs / "results.md").read_text()
    assert page.count("<!-- study: ") == 3
    assert analysis.fill(page, study) == page


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("{", [], "line 1: is no row of a study"),
        (run_row("a", 0, 0, "dice", {"x": 0.5}), ["--trial", "5"], "has no pairs of arms"),
    ],
)
def test_unusable_rows_give_an_error_of_one_line(text, more, said, tmp_path):
    (tmp_path / "rows.jsonl").write_text(text + "\n")
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "rows.jsonl", *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == "" and said in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1

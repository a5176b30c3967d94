"""Print the tables of a study from its rows: validity of measures, the oracle, and the arms.

    python examples/study_analysis.py ROWS.jsonl > tables.md
    python examples/study_analysis.py ROWS.jsonl --page docs/results.md
    python examples/study_analysis.py --trial 1000

ROWS.jsonl is what examples/study.py writes, a line for each run:

    {"set", "fold", "seed", "arm", "images": [[id, dice, pixels], ...], "cpu_minutes"}
    {"kind": "measures", "set", "fold", "seed", "scores": {measure: {id: D}},
     "agreement": {measure: {N: rank correlation with 200 passes}}, "cpu_minutes"}
    {"kind": "groups", "set", "groups": {id: group}}

A group is a patient, for example; an image without one is a group. A row with "error" in place of
"images" is a failed run. The end points, contrasts and rules below were fixed before the runs.

`--page` writes each table into a page, between the lines `<!-- study: NAME -->` and
`<!-- study end -->`, where NAME is runs, measures, oracle, arms or contrasts.

`--trial N` shuffles the labels of the arms within each set and fold N times, of the given rows or
of simulated ones, and prints how often a claim is made although no arm differs.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseg.choices import FREE_SCORES
from polyseg.metrics.significance import (
    Interval,
    PairedDifference,
    group_means,
    holm,
    over_runs,
    paired_difference,
)

Values = NDArray[np.float64]
Place = tuple[int, int]
"""Fold and seed of a run."""
Groups = Mapping[str, str]
"""The group of each image, by its id."""

LEVEL = 0.05
SIGNIFICANT_SETS = 3
"""Least number of sets with an adjusted p below LEVEL for a claim."""
SAME_SIGN_SETS = 4
"""Least number of sets whose difference has the sign of the claim."""
ORACLE_FOLDS = 3
"""Number of folds in all of which the oracle has to be better."""
AGREEMENT = 0.95
"""Rank correlation with 200 passes from which on passes are enough."""
RESAMPLES = 999
SENSITIVITIES = ("0.3", "1")
PERMUTATIONS = ("1", "2", "3")
CONTRASTS = {
    "chosen - uniform": ("chosen", ("epsilon-0", "uniform")),
    "chosen - permuted": ("chosen", ("chosen-permuted",)),
}
"""The arm, and the names of the one that it is compared with, in each fold the first with a row."""
DONORS = ("donor-0", "donor-1")
GATE_B = (
    "uniform",
    *(f"oracle-{x}" for x in SENSITIVITIES),
    *(f"permuted-{k}-{x}" for x in SENSITIVITIES for k in PERMUTATIONS),
)
GATE_C = (
    *("dice", "dice_bce", "epsilon-0", "epsilon-1", "thesis", "thesis-mean", "thesis-permuted"),
    *("chosen", "chosen-permuted", "inverted"),
)


@dataclass(frozen=True)
class Run:
    """A trained and tested run."""

    set: str
    fold: int
    seed: int
    arm: str
    dice: Mapping[str, float]
    """Dice of each tested image, by its id."""
    pixels: Mapping[str, int]
    """Foreground pixels of their masks."""
    minutes: float = 0.0
    """Processor time."""


@dataclass(frozen=True)
class Measures:
    """The difficulties of a run's training images by each measure."""

    set: str
    fold: int
    seed: int
    scores: Mapping[str, Mapping[str, float]]
    agreement: Mapping[str, Mapping[int, float]]
    minutes: float = 0.0


@dataclass(frozen=True)
class Study:
    """All rows of a study."""

    runs: Sequence[Run]
    measures: Sequence[Measures] = ()
    failed: Sequence[tuple[str, str]] = ()
    """Set and arm of each failed run."""
    groups: Mapping[str, Groups] = field(default_factory=dict)
    """By set."""

    @property
    def sets(self) -> list[str]:
        """Names of the sets in order of appearance."""
        names = [run.set for run in self.runs] + [row.set for row in self.measures]
        return list(dict.fromkeys(names))

    def arm(self, name: str, arm: str) -> dict[Place, Run]:
        """Return the runs of an arm on a set, by fold and seed."""
        runs = (run for run in self.runs if (run.set, run.arm) == (name, arm))
        return {(run.fold, run.seed): run for run in runs}

    def mean(self, run: Run) -> float:
        """Return the mean test Dice of a run, over groups where they are known."""
        groups = self.groups.get(run.set, {})
        of_groups = group_means(list(run.dice.values()), [groups.get(one) for one in run.dice])
        return float(np.nanmean(of_groups))


@dataclass(frozen=True)
class Contrast:
    """The difference of two arms on a set."""

    name: str
    set: str
    found: PairedDifference
    adjusted: float = float("nan")

    @property
    def p(self) -> float:
        """The larger p of the tests over groups and over folds; NaN where one is unknown."""
        return float(np.maximum(self.found.p_value, self.found.p_over_runs))


def read(lines: Iterable[str]) -> Study:
    """Return the study of some rows, which are lines of JSON.

    Raises:
        ValueError: names the line that is no row, or repeats a run.
    """
    runs, measures = dict[Any, Run](), dict[Any, Measures]()
    failed, groups = list[tuple[str, str]](), dict[str, Groups]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row.get("kind") == "groups":
                groups[row["set"]] = dict(row["groups"])
                continue
            key = (row["set"], int(row["fold"]), int(row["seed"]))
            minutes = float(row.get("cpu_minutes", 0))
            if row.get("kind") == "measures":
                again = key in measures
                agreement = {
                    name: {int(n): float(r) for n, r in by_passes.items()}
                    for name, by_passes in row["agreement"].items()
                }
                measures[key] = Measures(*key, row["scores"], agreement, minutes)
            elif "error" in row:
                failed.append((row["set"], row["arm"]))
                continue
            else:
                again = (*key, row["arm"]) in runs
                dice = {identity: float(value) for identity, value, _ in row["images"]}
                pixels = {identity: int(size) for identity, _, size in row["images"]}
                runs[*key, row["arm"]] = Run(*key, row["arm"], dice, pixels, minutes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number}: is no row of a study ({error!r})") from error
        if again:
            raise ValueError(f"line {number}: repeats a run of an earlier line; remove one")
    return Study(list(runs.values()), list(measures.values()), failed, groups)


# Gate A


@dataclass(frozen=True)
class Validity:
    """Statistics of a score on a set, as means over seeds."""

    set: str
    measure: str
    images: int
    seeds: int
    error: tuple[float, Interval]
    """Spearman's correlation of D with the out-of-fold error."""
    at_equal_size: tuple[float, Interval]
    """The partial one at equal size of the mask."""
    between_seeds: tuple[float, Interval]
    """Spearman's correlation of D between two seeds."""
    passes: Sequence[float]
    """Passes needed by each seed; infinite where none were enough, empty where none are made."""


def validity(study: Study, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Validity]:
    """Return what each measure says on each set, over images that all seeds have measured.

    Intervals are 95 % percentile intervals of a bootstrap that draws whole groups.
    """
    found = []
    for name in study.sets:
        rows = [one for one in study.measures if one.set == name]
        rows = [row for row in rows if out_of_fold(study, row)]
        for measure in dict.fromkeys(key for row in rows for key in row.scores):
            with_it = [row for row in rows if measure in row.scores]
            found.append(_validity(study, measure, with_it, resamples, seed))
    return found


def out_of_fold(study: Study, row: Measures) -> dict[str, tuple[float, int]]:
    """Return 1 - Dice and the size of each training image, by the donor that has not seen it.

    It is empty where a donor of the same fold and seed is missing.
    """
    donors = [study.arm(row.set, arm).get((row.fold, row.seed)) for arm in DONORS]
    there = [donor for donor in donors if donor is not None]
    if len(there) < len(DONORS):
        return {}
    return {
        identity: (1 - dice, donor.pixels[identity])
        for donor in there
        for identity, dice in donor.dice.items()
    }


def passes_needed(agreement: Mapping[int, float]) -> float:
    """Return the least number of passes from which on the agreement is at least AGREEMENT.

    >>> passes_needed({10: 0.96, 20: 0.94, 50: 0.95, 100: 0.99})
    50
    >>> passes_needed({10: 0.5})
    inf
    """
    needed = float("inf")
    for passes, correlation in sorted(agreement.items(), reverse=True):
        if not correlation >= AGREEMENT:
            break
        needed = passes
    return needed


def _validity(
    study: Study, measure: str, rows: Sequence[Measures], resamples: int, seed: int
) -> Validity:
    known = [out_of_fold(study, row) for row in rows]
    shared = set(known[0]).intersection(*known[1:], *(row.scores[measure] for row in rows))
    ids = [one for one in rows[0].scores[measure] if one in shared]
    d = np.array([[row.scores[measure][one] for one in ids] for row in rows], dtype=np.float64)
    errors = np.array([[of_seed[one][0] for one in ids] for of_seed in known])
    size = np.array([known[0][one][1] for one in ids], dtype=np.float64)

    def statistics(counts: Values) -> Values:
        """Return the three correlations, (R, 3), for (R, n) counts of each image."""
        by_seed = [_rank_correlations([x, y, size], counts) for x, y in zip(d, errors, strict=True)]
        pairs = [_rank_correlations(pair, counts) for pair in itertools.combinations(d, 2)]
        return np.stack(
            [
                _means([r[:, 0, 1] for r in by_seed]),
                _means([_partial(r) for r in by_seed]),
                _means([r[:, 0, 1] for r in pairs] or [np.full(len(counts), np.nan)]),
            ],
            axis=1,
        )

    groups = study.groups.get(rows[0].set, {})
    group = np.unique([groups.get(one, f"image {one}") for one in ids], return_inverse=True)[1]
    values = statistics(np.ones((1, len(ids))))[0]
    intervals = _intervals(statistics(_draws(group, resamples, seed)))
    passes = [passes_needed(row.agreement[measure]) for row in rows if measure in row.agreement]
    error, at_equal_size, between = zip(map(float, values), intervals, strict=True)
    return Validity(
        *(rows[0].set, measure, len(ids), len(rows), error, at_equal_size, between),
        [] if measure in FREE_SCORES else passes,
    )


def _rank_correlations(series: Sequence[Values], counts: Values) -> Values:
    """Return Spearman's correlations of S series, (R, S, S), for (R, n) counts of each image.

    Images with a value that is not finite are left out.
    """
    known = np.isfinite(series).all(axis=0)
    counts = counts[:, known]
    ranks = np.stack([_ranks(np.asarray(one)[known], counts) for one in series], axis=1)
    total = counts.sum(axis=1)[:, None, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = ranks - (ranks * counts[:, None]).sum(axis=2, keepdims=True) / total
        covariance = (centred * counts[:, None]) @ centred.transpose(0, 2, 1)
        scale = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
        return np.asarray(covariance / scale[:, :, None] / scale[:, None])


def _ranks(values: Values, counts: Values) -> Values:
    """Return the average ranks, (R, n), of values that occur as often as (R, n) counts say.

    >>> _ranks(np.array([5.0, 7.0, 7.0]), np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]])).tolist()
    [[1.0, 2.5, 2.5], [1.5, 3.0, 3.0]]
    """
    different, place = np.unique(values, return_inverse=True)
    of_value = counts @ np.eye(len(different))[place]
    return np.asarray((of_value.cumsum(axis=1) - (of_value - 1) / 2)[:, place])


def _partial(r: Values) -> Values:
    """Return the correlation of the first two of three series at an equal third, (R,)."""
    left = 1 - r[:, :2, 2] ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (r[:, 0, 1] - r[:, 0, 2] * r[:, 1, 2]) / np.sqrt(left.prod(axis=1))
    return np.where(left.min(axis=1) < 1e-13, np.nan, found)


def _means(columns: Sequence[Values]) -> Values:
    """Return the mean of columns, without their NaN; NaN where none is left."""
    return np.array([_mean(iter(row)) for row in np.transpose(columns)])


def _draws(group: NDArray[np.intp], resamples: int, seed: int) -> Values:
    """Return how often each image is drawn, (resamples, n), where whole groups are drawn."""
    number = int(group.max()) + 1
    drawn = np.random.default_rng(seed).integers(0, number, (resamples, number))
    counts = np.stack([np.bincount(one, minlength=number) for one in drawn])
    return counts[:, group].astype(np.float64)


def _intervals(drawn: Values) -> list[Interval]:
    intervals = []
    for column in drawn.T:
        known = column[np.isfinite(column)]
        ends = np.percentile(known, (2.5, 97.5)) if known.size else (np.nan, np.nan)
        intervals.append(Interval(*map(float, ends)))
    return intervals


# Gate B


@dataclass(frozen=True)
class Oracle:
    """Mean test Dice of the oracle and of the arms beside it in each fold of a set."""

    set: str
    sensitivity: str
    folds: Mapping[int, tuple[float, float, float]]
    """Of the oracle, the uniform arm, and the mean of the permuted arms, by fold."""

    @property
    def better(self) -> int:
        """Number of folds in which the oracle exceeds both others."""
        return sum(oracle > max(others) for oracle, *others in self.folds.values())


def oracles(study: Study) -> list[Oracle]:
    """Return the oracle of each set and sensitivity, in the folds where no arm is missing."""
    found = []
    for name, sensitivity in itertools.product(study.sets, SENSITIVITIES):
        arms = [f"oracle-{sensitivity}", "uniform"]
        arms += [f"permuted-{k}-{sensitivity}" for k in PERMUTATIONS]
        runs = [study.arm(name, arm) for arm in arms]
        places = sorted(set(runs[0]).intersection(*runs[1:]))
        folds = {}
        for place in places:
            oracle, uniform, *permuted = [study.mean(of_arm[place]) for of_arm in runs]
            folds[place[0]] = (oracle, uniform, float(np.mean(permuted)))
        if runs[0]:
            found.append(Oracle(name, sensitivity, folds))
    return found


def oracle_differences(
    study: Study, *, resamples: int = RESAMPLES
) -> list[tuple[str, str, PairedDifference, PairedDifference]]:
    """Return set, sensitivity, and the oracle's differences from uniform and permuted, over folds.

    Permuted is the mean over the permuted runs for each image.
    """
    found = []
    for one in oracles(study):
        arms = [study.arm(one.set, f"permuted-{k}-{one.sensitivity}") for k in PERMUTATIONS]
        means = [
            replace(
                arms[0][place],
                arm="permuted",
                dice={i: float(np.mean([arm[place].dice[i] for arm in arms])) for i in run.dice},
            )
            for place, run in arms[0].items()
            if all(place in arm for arm in arms)
        ]
        with_means = replace(study, runs=[*study.runs, *means])
        pair = [
            _difference(with_means, one.set, f"oracle-{one.sensitivity}", [other], resamples)
            for other in ("uniform", "permuted")
        ]
        if pair[0] is not None and pair[1] is not None:
            found.append((one.set, one.sensitivity, pair[0], pair[1]))
    return found


def verdicts(found: Sequence[Oracle]) -> dict[str, str]:
    """Return the sentence of the rule for each set: may placing the steep loss help there?"""
    sentences = {}
    for name in dict.fromkeys(one.set for one in found):
        of_set = [one for one in found if one.set == name]
        helped = [one.sensitivity for one in of_set if one.better >= ORACLE_FOLDS]
        unfinished = [one for one in of_set if len(one.folds) < ORACLE_FOLDS]
        if helped:
            where = " and ".join(helped)
            said = f"the oracle exceeds both others in all folds at sensitivity {where}: gate C"
            said += " tests adaptive weights"
        elif unfinished:
            said = f"unfinished, fewer than {ORACLE_FOLDS} folds have all arms"
        else:
            said = "no evidence that placement can help here"
        sentences[name] = said
    return sentences


# Gate C


def contrasts(study: Study, *, resamples: int = RESAMPLES) -> list[Contrast]:
    """Return both contrasts on each set, with p adjusted by Holm's method over all of them."""
    found = [
        Contrast(name, data, difference)
        for name, (arm, others) in CONTRASTS.items()
        for data in study.sets
        if (difference := _difference(study, data, arm, others, resamples)) is not None
    ]
    adjusted = holm([one.p for one in found])
    return [
        Contrast(one.name, one.set, one.found, float(p))
        for one, p in zip(found, adjusted, strict=True)
    ]


def _difference(
    study: Study, name: str, arm: str, others: Sequence[str], resamples: int
) -> PairedDifference | None:
    """Return arm - other over groups and over folds, paired by fold and seed; None without pairs.

    An image that several runs have tested has its mean difference, and a fold that of its seeds.
    """
    first = study.arm(name, arm)
    second: dict[Place, Run] = {}
    for other_arm in reversed(others):
        second |= study.arm(name, other_arm)
    places = sorted(set(first) & set(second))
    if not places:
        return None
    groups = study.groups.get(name, {})
    by_image: dict[str, list[float]] = {}
    by_fold: dict[int, list[float]] = {}
    for place in places:
        one, other = first[place], second[place]
        if set(one.dice) != set(other.dice):
            raise ValueError(f"{name} fold {place[0]}: {arm} and {other.arm} test other images")
        differences = {identity: one.dice[identity] - other.dice[identity] for identity in one.dice}
        for identity, value in differences.items():
            by_image.setdefault(identity, []).append(value)
        of_groups = group_means(list(differences.values()), [groups.get(i) for i in differences])
        by_fold.setdefault(place[0], []).append(float(np.nanmean(of_groups)))
    means = np.array([np.mean(values) for values in by_image.values()])
    found = paired_difference(
        *(np.zeros_like(means), means),
        groups=[groups.get(identity) for identity in by_image],
        resamples=resamples,
    )
    return over_runs(found, [np.mean(values) for values in by_fold.values()])


def claim(found: Sequence[Contrast]) -> str:
    """Return "better" or "worse" where a contrast on all sets allows a claim, otherwise "".

    An adjusted p below LEVEL on SIGNIFICANT_SETS sets whose differences have one sign, which
    SAME_SIGN_SETS sets have.
    """
    for sign, word in ((1, "better"), (-1, "worse")):
        with_sign = [one for one in found if sign * one.found.mean > 0]
        significant = [one for one in with_sign if one.adjusted < LEVEL]
        if len(significant) >= SIGNIFICANT_SETS and len(with_sign) >= SAME_SIGN_SETS:
            return word
    return ""


def claims(found: Sequence[Contrast]) -> dict[str, str]:
    """Return the claim of each contrast, "" for none."""
    return {name: claim([one for one in found if one.name == name]) for name in CONTRASTS}


# The trial


def simulated(seed: int, sets: int = 5, folds: int = 5) -> Study:
    """Return a study in which no arm differs: images scatter by 0.2, runs by 0.02.

    Each set has 24 groups of five images in each fold's test part; an image has its level for all
    arms, with an SD of 0.1 between groups and of 0.17 within them, and 0.05 of its own in each run.
    """
    rng = np.random.default_rng(seed)
    runs: list[Run] = []
    groups: dict[str, dict[str, str]] = {}
    for data, fold in itertools.product(range(sets), range(folds)):
        ids = [f"{fold}-{g}-{i}" for g in range(24) for i in range(5)]
        groups.setdefault(f"set{data}", {}).update({one: one.rpartition("-")[0] for one in ids})
        level = 0.7 + np.repeat(rng.normal(0, 0.1, 24), 5) + rng.normal(0, 0.17, len(ids))
        for arm in ("chosen", "epsilon-0", "chosen-permuted"):
            dice = level + rng.normal(0, 0.02) + rng.normal(0, 0.05, len(ids))
            scores = dict(zip(ids, dice.tolist(), strict=True))
            runs.append(Run(f"set{data}", fold, fold, arm, scores, dict.fromkeys(ids, 1)))
    return Study(runs, groups=groups)


def shuffled(study: Study, seed: int) -> Study:
    """Return the study with the labels of the contrasts' arms permuted within each set and fold."""
    rng = np.random.default_rng(seed)
    arms = {"chosen", *(name for _, names in CONTRASTS.values() for name in names)}
    places: dict[tuple[str, int, int], list[Run]] = {}
    for run in study.runs:
        if run.arm in arms:
            places.setdefault((run.set, run.fold, run.seed), []).append(run)
    runs = []
    for members in places.values():
        labels = rng.permutation([run.arm for run in members])
        for run, label in zip(members, labels, strict=True):
            runs.append(Run(run.set, run.fold, run.seed, str(label), run.dice, run.pixels))
    return Study(runs, groups=study.groups)


def trial(number: int, study: Study | None = None) -> tuple[int, int]:
    """Return how many of so many studies without any effect make a claim, and show a difference.

    The second number counts studies with an adjusted p below LEVEL on any set.
    """
    claimed = shown = 0
    for k in range(number):
        found = contrasts(shuffled(study or simulated(k), k), resamples=1)
        claimed += any(claims(found).values())
        shown += any(one.adjusted < LEVEL for one in found)
    return claimed, shown


def rate(count: int, number: int) -> str:
    """Return a share in percent with its 95 % interval (Clopper and Pearson).

    >>> rate(0, 1000)
    '0.0 % (0.0 to 0.4)'
    """
    from scipy import stats

    low, high = stats.binomtest(count, number).proportion_ci(method="exact")
    return f"{100 * count / number:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


# Tables


def tables(study: Study) -> str:
    """Return all tables of a study as Markdown, each with its title."""
    parts = [(title, make(study)) for title, make in TABLES.values()]
    return "\n".join("\n".join([f"## {title}", "", *lines, ""]) for title, lines in parts if lines)


def fill(page: str, study: Study) -> str:
    """Return a page with the tables of a study between its marks, in place of what was there."""

    def table(found: re.Match[str]) -> str:
        lines = TABLES[found[2]][1](study)
        return "\n".join([found[1], *lines, found[3]])

    return re.sub(r"(<!-- study: (\w+) -->)\n.*?(<!-- study end -->)", table, page, flags=re.S)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    alignments = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(row)} |" for row in (heads, alignments, *rows)]


def _runs_table(study: Study) -> list[str]:
    rows = []
    for name in dict.fromkeys([*study.sets, *(of for of, _ in study.failed)]):
        runs = [run for run in study.runs if run.set == name]
        measures = [row for row in study.measures if row.set == name]
        failed = sum(of == name for of, _ in study.failed)
        minutes = [run.minutes for run in runs] + [row.minutes for row in measures]
        images = len({identity for run in runs for identity in run.dice})
        groups = len(set(study.groups.get(name, {}).values()))
        cells = [
            len(runs),
            failed,
            missing(study, name),
            images,
            groups or "–",
            f"{sum(minutes) / 60:.1f}",
        ]
        rows.append([name, *map(str, cells)])
    heads = ["set", "runs", "failed", "missing", "images", "groups", "processor hours"]
    return [
        *_table(heads, rows),
        "",
        "Missing: planned runs of a section that has begun and that have no result.",
    ]


def missing(study: Study, name: str) -> int:
    """Return how many runs of the gates that have begun on a set have no row."""
    there = {(run.fold, run.seed, run.arm) for run in study.runs if run.set == name}
    wanted: set[tuple[int, int, str]] = set()
    first = [(0, seed) for seed in range(3)]
    # The uniform arm and the donors belong to gates A and B; gate A takes measures.
    if any(row.set == name for row in study.measures) or there & {(0, 1, arm) for arm in DONORS}:
        wanted |= {(*place, arm) for place in first for arm in ("uniform", *DONORS)}
    if any(arm.startswith("oracle") for *_, arm in there):
        wanted |= {(k, k, arm) for k in range(ORACLE_FOLDS) for arm in (*GATE_B, *DONORS)}
    if any(arm in GATE_C for *_, arm in there):
        wanted |= {(k, k, arm) for k in range(5) for arm in GATE_C}
    return len(wanted - there)


def _validity_table(study: Study) -> list[str]:
    if not study.measures:
        return []
    found = validity(study)
    alone = [f"{row.set} seed {row.seed}" for row in study.measures if not out_of_fold(study, row)]
    rows = [
        [
            *(one.set, one.measure, f"{one.images}", f"{one.seeds}"),
            *map(_correlation, (one.error, one.at_equal_size, one.between_seeds)),
            _passes(one.passes),
        ]
        for one in found
    ]
    heads = ["set", "measure", "images", "seeds", "error", "at equal size", "between seeds"]
    return [
        *_table([*heads, "passes"], rows),
        "",
        "Spearman's correlation of D with the out-of-fold error, the same at equal size of the "
        "mask, and of D between two seeds: means over seeds with 95 % intervals of a bootstrap "
        f"over groups. Passes: needed for a rank correlation of {AGREEMENT} with 200 passes, "
        "median (least to most) of the seeds.",
        *([f"Left out, without both donors: {', '.join(alone)}."] if alone else []),
    ]


def _correlation(value: tuple[float, Interval]) -> str:
    mean, (low, high) = value
    return "–" if np.isnan(mean) else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _passes(needed: Sequence[float]) -> str:
    if not needed:
        return "none"
    low, middle, high = np.percentile(needed, (0, 50, 100), method="lower")
    shown = ["more" if np.isinf(one) else f"{one:.0f}" for one in (middle, low, high)]
    return "{} ({} to {})".format(*shown) if low != high else shown[0]


def _oracle_table(study: Study) -> list[str]:
    found = oracles(study)
    if not found:
        return []
    rows = [
        [one.set, one.sensitivity, str(fold), *(f"{mean:.3f}" for mean in means)]
        for one in found
        for fold, means in sorted(one.folds.items())
    ]
    heads = ["set", "sensitivity", "fold", "oracle", "uniform", "permuted (mean)"]
    said = [f"- {name}: {sentence}." for name, sentence in verdicts(found).items()]
    differences = [
        [name, sensitivity, *(_with_interval(one) for one in pair)]
        for name, sensitivity, *pair in oracle_differences(study)
    ]
    heads_of_differences = ["set", "sensitivity", "oracle - uniform", "oracle - permuted"]
    return [
        *_table(heads, rows),
        "",
        *_table(heads_of_differences, differences),
        "",
        "Differences over the images of all folds, with 95 % intervals of a bootstrap over groups.",
        "",
        *said,
    ]


def _with_interval(one: PairedDifference) -> str:
    return f"{one.mean:+.4f} [{one.interval.low:+.4f}, {one.interval.high:+.4f}]"


def _arms_table(study: Study) -> list[str]:
    rows = []
    for arm in GATE_C:
        cells = []
        for name in study.sets:
            means = [study.mean(run) for run in study.arm(name, arm).values()]
            spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
            cells.append(f"{np.mean(means):.3f}{spread} ({len(means)})" if means else "–")
        if set(cells) != {"–"}:
            rows.append([arm, *cells])
    note = "Mean ± standard deviation over the folds (number of runs)."
    return [*_table(["arm", *study.sets], rows), "", note] if rows else []


def _contrast_table(found: Sequence[Contrast]) -> list[str]:
    if not found:
        return []
    rows = []
    for one in found:
        ps = (one.found.p_value, one.found.p_over_runs, one.adjusted)
        cells = [_with_interval(one.found), *map(_p, ps)]
        counts = f"{one.found.patients}, {one.found.runs}"
        rows.append([one.name, one.set, counts, *cells])
    heads = ["contrast", "set", "groups, folds", "difference [95 % interval]"]
    said = []
    for name, word in claims(found).items():
        sets = sum(one.name == name and one.adjusted < LEVEL for one in found)
        what = f"{word} is claimed" if word else "no difference is claimed"
        said.append(f"- {name}: {what} (adjusted p below {LEVEL} on {sets} sets).")
    return [
        *_table([*heads, "p groups", "p folds", "adjusted"], rows),
        "",
        "Adjusted: the larger p, by Holm's method over both contrasts and all sets. A claim needs "
        f"an adjusted p below {LEVEL} on {SIGNIFICANT_SETS} sets and the same sign on "
        f"{SAME_SIGN_SETS}.",
        "",
        *said,
    ]


TABLES: Mapping[str, tuple[str, Callable[[Study], list[str]]]] = {
    "runs": ("Runs", _runs_table),
    "measures": ("Gate A: measures of difficulty", _validity_table),
    "oracle": ("Gate B: the oracle", _oracle_table),
    "arms": ("Gate C: mean test Dice of the arms", _arms_table),
    "contrasts": ("Gate C: contrasts", lambda study: _contrast_table(contrasts(study))),
}
"""Title of each table and the function that makes its lines."""


def _p(value: float) -> str:
    return "–" if np.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _mean(values: Iterator[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def main() -> None:
    """Print the tables of a study, or the result of the trial."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="?", help="JSON lines, a row for each run")
    parser.add_argument("--page", type=Path, help="write the tables into this page, not to stdout")
    parser.add_argument("--trial", type=int, metavar="N", help="shuffle the arms' labels N times")
    given = parser.parse_args()
    if given.rows is None and given.trial is None:
        parser.error("give ROWS.jsonl, or --trial N")
    study = None
    if given.rows is not None:
        try:
            study = read(given.rows.read_text().splitlines())
        except (OSError, ValueError) as error:
            sys.exit(f"error: {given.rows}: {error}")
    if given.trial is None and study is not None:
        if given.page is None:
            print(tables(study))
        else:
            given.page.write_text(fill(given.page.read_text(), study))
        return
    if study is not None and not contrasts(study, resamples=1):
        sys.exit(f"error: {given.rows}: has no pairs of arms; leave it out to simulate them")
    claimed, shown = trial(given.trial, study)
    print(f"Of {given.trial} studies with shuffled arms, percent with 95 % interval:")
    print(f"- a claim: {rate(claimed, given.trial)}")
    print(f"- an adjusted p below {LEVEL} on any set: {rate(shown, given.trial)}")


if __name__ == "__main__":
    main()

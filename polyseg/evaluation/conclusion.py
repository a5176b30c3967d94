"""The sentence that says whether the adaptive loss helped, by its comparison with its arms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from polyseg.evaluation.scores import Comparison, RunScores
from polyseg.evaluation.tables import p_text
from polyseg.metrics.significance import Interval, PairedDifference

LEVEL = 0.05
"""Adjusted p from which on no difference counts as shown."""

_ANSWERS = {
    "dice": {
        "better": "the adaptive loss was better than the Dice loss",
        "worse": "the adaptive loss was worse than the Dice loss",
        "not shown": "no difference between the adaptive loss and the Dice loss was shown",
        "open": "whether the adaptive loss was better or worse than the Dice loss remains open",
        "mixed": "the mean and most cases disagree on whether the adaptive loss was better than "
        "the Dice loss",
    },
    "permuted": {
        "better": "it mattered which image got the steep loss: the adaptive arm was better than "
        "the permuted arm",
        "worse": "it mattered which image got the steep loss: the adaptive arm was worse than the "
        "permuted arm",
        "not shown": "which image got the steep loss made no demonstrable difference",
        "open": "whether it mattered which image got the steep loss remains open",
        "mixed": "it mattered which image got the steep loss, but the mean and most cases disagree "
        "on whether the adaptive arm was better than the permuted arm",
    },
}
"""Answers by the role of the arm that the adaptive one is compared with."""


def conclusions(
    comparisons: Sequence[Comparison], roles: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """Return a sentence for each adaptive arm and label: was it better than Dice, and permuted.

    Args:
        comparisons: of arms with a baseline, which is the adaptive arm or one of its roles.
        roles: for each adaptive arm the arms by role, "dice" or "permuted", that it is asked about;
            there is no sentence without a comparison of the two.
    """
    found = []
    for label in dict.fromkeys(one.label for one in comparisons):
        for arm, others in roles.items():
            asked = _asked(comparisons, arm, others, label)
            if not asked:
                continue
            differences = {role: _gain(one, arm, label) for role, one in asked.items()}
            # Means over passes of MC Dropout have a baseline, and a family of p, of their own.
            baselines = {one.baseline for one in asked.values()}
            family = sum(one.baseline in baselines for one in comparisons)
            names = ([arm] if len(roles) > 1 else []) + ([label] if label else [])
            found.append(_sentence(", ".join(names), differences, family))
    return found


def outcome(gain: PairedDifference) -> str:
    """Return "better", "worse", "mixed", "open" or "not shown": the adaptive arm against the other.

    It is "mixed" where the mean says better and most cases say worse, or the other way round, and
    "open" where the interval excludes 0, which is over cases only, but p does not confirm it.
    """
    if math.isnan(gain.adjusted) or gain.adjusted >= LEVEL:
        return "open" if gain.interval.low > 0 or gain.interval.high < 0 else "not shown"
    if gain.mean > 0 and gain.better > gain.worse:
        return "better"
    return "worse" if gain.mean < 0 and gain.worse > gain.better else "mixed"


def _asked(
    comparisons: Sequence[Comparison], arm: str, others: Mapping[str, str], label: str
) -> dict[str, Comparison]:
    """Return the comparisons of an adaptive arm with others, whichever is the baseline, by role."""
    wanted = {
        frozenset((_title(arm, label), _title(others[role], label))): role
        for role in _ANSWERS
        if role in others
    }
    pairs = {frozenset((one.baseline, one.run)): one for one in comparisons}
    return {role: pairs[pair] for pair, role in wanted.items() if pair in pairs}


def _title(arm: str, label: str) -> str:
    return RunScores(arm, [], label).title


def _gain(one: Comparison, arm: str, label: str) -> PairedDifference:
    """Return the difference in Dice as adaptive - other."""
    found = one.differences["dice"]
    if one.run == _title(arm, label):
        return found
    interval = Interval(-found.interval.high, -found.interval.low)
    counts = {"better": found.worse, "worse": found.better}
    return replace(found, mean=-found.mean, interval=interval, **counts)


def _sentence(name: str, gains: Mapping[str, PairedDifference], comparisons: int) -> str:
    clauses = [
        f"{_ANSWERS[role][outcome(one)]} ({_numbers(role, one)})" for role, one in gains.items()
    ]
    text = ", and ".join(clauses)
    text = f"{name}: {text}" if name else text[0].upper() + text[1:]
    if any(outcome(one) == "open" for one in gains.values()):
        text += "; an interval that excludes 0 is not confirmed by p"
    return f"{text}; {_basis(list(gains.values()), comparisons)}."


def _numbers(role: str, gain: PairedDifference) -> str:
    """Return the gain in Dice with its interval and p."""
    low, high = gain.interval
    interval = "" if math.isnan(low) else f", 95 % interval {low:+.4f} to {high:+.4f}"
    other = "Dice loss" if role == "dice" else role
    return (
        f"adaptive minus {other}: mean Dice {gain.mean:+.4f}{interval}, "
        f"adjusted p {p_text(gain.adjusted)}"
    )


def _basis(differences: Sequence[PairedDifference], comparisons: int) -> str:
    """Return the numbers of cases and runs, and whether they are too few to show anything."""
    cases = min(found.patients or found.images for found in differences)
    runs = min(found.runs for found in differences)
    what = "patients" if differences[0].patients else "images"
    text = f"{cases} {what}, {runs} pairs of runs"
    if runs < 2:
        text = f"{cases} {what}, one run of each, which says nothing about other seeds"
    # Wilcoxon's smallest p, of differences with one sign, times Holm's largest factor.
    if 2 * comparisons / 2**cases >= LEVEL:
        text += f"; {cases} {what} are too few for an adjusted p below {LEVEL} in {comparisons} "
        text += "comparisons" if comparisons > 1 else "comparison"
    return text

"""The sentence that says whether the adaptive loss helped, by its comparison with its arms."""

import math
from collections.abc import Mapping, Sequence

from polyseg.evaluation.scores import Comparison, RunScores
from polyseg.evaluation.tables import p_text
from polyseg.metrics.significance import PairedDifference

LEVEL = 0.05
"""Adjusted p from which on no difference counts as shown."""

_ANSWERS = {
    "dice": {
        "better": "the adaptive loss was better than the Dice loss",
        "worse": "the adaptive loss was worse than the Dice loss",
        "not shown": "no difference between the adaptive loss and the Dice loss was shown",
        "mixed": "the mean and most cases disagree on whether the adaptive loss was better than "
        "the Dice loss",
    },
    "permuted": {
        "better": "it mattered which image got the steep loss, the adaptive arm being better than "
        "the permuted arm",
        "worse": "it mattered which image got the steep loss, the adaptive arm being worse than "
        "the permuted arm",
        "not shown": "no difference was shown by which image got the steep loss, adaptive against "
        "permuted",
        "mixed": "it mattered which image got the steep loss, but the mean and most cases disagree "
        "on whether the adaptive arm was better than the permuted arm",
    },
}
"""Answers by the role of the arm that the adaptive one is compared with."""


def conclusions(comparisons: Sequence[Comparison], roles: Mapping[str, str]) -> list[str]:
    """Return a sentence for each label: was adaptive better than Dice, and than permuted, in Dice.

    Args:
        comparisons: of all arms with the adaptive one as baseline.
        roles: the arms that are asked about by their role, "dice" or "permuted"; without any there
            is no sentence.
    """
    found = []
    for label in dict.fromkeys(one.label for one in comparisons):
        titles = {
            role: RunScores(roles[role], [], label).title for role in _ANSWERS if role in roles
        }
        asked = {role: one for role in titles for one in comparisons if one.run == titles[role]}
        if asked:
            differences = {role: one.differences["dice"] for role, one in asked.items()}
            # Means over passes of MC Dropout have a baseline, and a family of p, of their own.
            baselines = {one.baseline for one in asked.values()}
            family = sum(one.baseline in baselines for one in comparisons)
            found.append(_sentence(label, differences, family))
    return found


def outcome(found: PairedDifference) -> str:
    """Return "better", "worse", "mixed" or "not shown": the baseline against the other arm.

    It is "mixed" where the mean says better and most cases say worse, or the other way round.
    """
    if math.isnan(found.adjusted) or found.adjusted >= LEVEL:
        return "not shown"
    # Differences are other - baseline.
    if found.mean < 0 and found.worse > found.better:
        return "better"
    return "worse" if found.mean > 0 and found.better > found.worse else "mixed"


def _sentence(label: str, differences: Mapping[str, PairedDifference], comparisons: int) -> str:
    clauses = [
        f"{_ANSWERS[role][outcome(found)]} ({_numbers(found)})"
        for role, found in differences.items()
    ]
    text = ", and ".join(clauses)
    text = f"{label}: {text}" if label else text[0].upper() + text[1:]
    return f"{text}; {_basis(list(differences.values()), comparisons)}."


def _numbers(found: PairedDifference) -> str:
    """Return baseline - other with its interval and p."""
    low, high = -found.interval.high, -found.interval.low
    interval = "" if math.isnan(low) else f", 95 % interval {low:+.4f} to {high:+.4f}"
    p = p_text(found.adjusted)
    return f"difference in mean Dice {-found.mean:+.4f}{interval}, adjusted p {p}"


def _basis(differences: Sequence[PairedDifference], comparisons: int) -> str:
    """Return the numbers of cases and runs, and whether they are too few to show anything."""
    cases = min(found.patients or found.images for found in differences)
    runs = min(found.runs for found in differences)
    what = "patients" if differences[0].patients else "images"
    text = f"{cases} {what}, {runs} pairs of runs"
    if runs < 2:
        text = f"{cases} {what}, fewer than two pairs of runs, so that other seeds may differ"
    # Wilcoxon's smallest p, of differences with one sign, times Holm's largest factor.
    if 2 * comparisons / 2**cases >= LEVEL:
        text += f"; {cases} {what} are too few for an adjusted p below {LEVEL} in {comparisons} "
        text += "comparisons" if comparisons > 1 else "comparison"
    return text

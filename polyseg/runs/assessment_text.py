"""Sentences about an assessment, for the log and for reports."""

import numpy as np

from polyseg.metrics.rank_stability import FEWEST_JUDGED
from polyseg.metrics.significance import rank_correlation
from polyseg.records import Assessment


def describe(assessment: Assessment) -> str:
    """Return one line with the difficulties and their precision; a dash where it is unknown."""
    quartiles = "/".join(f"{q:.4f}" for q in np.percentile(assessment.difficulty, (25, 50, 75)))
    text = f"difficulty by {assessment.metric}: quartiles {quartiles}"
    errors = assessment.scores_se.get(assessment.metric)
    if errors is None:
        return text
    error, stability = np.median(errors), assessment.rank_stability[assessment.metric]
    text += f"; {assessment.samples} passes, "
    text += f"standard error {error:.4f}, rank stability {stability:.3f}".replace("nan", "-")
    if assessment.samples < FEWEST_JUDGED:
        text += f" (known from {FEWEST_JUDGED} passes)"
    return text


def describe_order(assessment: Assessment) -> list[str]:
    """Return a line on the correlation of D with 1 - Dice for each label that has masks."""
    lines = []
    for label in assessment.label_names:
        part = assessment.of_label(label)
        found = rank_correlation(part.difficulty, 1 - part.dice)
        if not np.isfinite(found.interval).all():
            continue
        name = f"D of {label}" if label else "D"
        low, high = found.interval
        verdict = f": {name} is {found.order}" if found.order else ""
        more = "; see `polyseg schedule validity`" if verdict else ""
        lines.append(
            f"Spearman's correlation of {name} with 1 - Dice: {found.value:.2f} (95 % interval "
            f"{low:.2f} to {high:.2f}, {found.images} images){verdict}{more}"
        )
    return lines

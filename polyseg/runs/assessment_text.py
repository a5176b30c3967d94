"""An assessment as sentences, correlations and CSV."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from polyseg.difficulty import FALLBACKS
from polyseg.metrics.rank_stability import FEWEST_PASSES, spearman
from polyseg.metrics.significance import rank_correlation
from polyseg.records import Assessment
from polyseg.system.files import csv_table


def describe(assessment: Assessment) -> str:
    """Return one line with the difficulties and their precision, if they are measured by passes."""
    quartiles = ", ".join(f"{q:.4f}" for q in np.percentile(assessment.difficulty, (25, 50, 75)))
    text = f"difficulty D ({assessment.metric}): quartiles {quartiles}"
    errors = assessment.scores_se.get(assessment.metric)
    if errors is None:
        return text
    error, stability = np.median(errors), assessment.rank_stability[assessment.metric]
    text += f"; {assessment.samples} passes: standard error "
    if assessment.samples < FEWEST_PASSES:
        return f"{text}and rank stability unknown below {FEWEST_PASSES} passes"
    known = f"{error:.4f}, expected rank correlation with many passes {stability:.3f}"
    return text + known.replace("nan", "unknown")


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
        verdict = f": {name} {found.order}" if found.order else ""
        more = "; see `polyseg schedule validity`" if verdict else ""
        lines.append(
            f"Spearman's correlation of {name} with 1 - Dice: {found.value:.2f} (95 % interval "
            f"{low:.2f} to {high:.2f}, {found.images} images){verdict}{more}"
        )
    return lines


def difficulty_correlations(
    assessment: Assessment, known: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return Spearman's correlation of each score with 1 - Dice, and with known difficulties.

    The first has its 95 % interval. With several labels there are rows for each, since labels
    differ in difficulty. A correlation is NaN where undefined, such as without masks.
    """
    found: list[dict[str, Any]] = []
    for label in assessment.label_names:
        part = assessment.of_label(label)
        rows = [i for i, identity in enumerate(part.ids) if identity in known]
        truth = np.array([known[part.ids[i]] for i in rows])
        for name, scores in part.scores.items():
            row: dict[str, Any] = {"metric": name} | ({"label": label} if label else {})
            of_error = rank_correlation(scores, 1 - part.dice)
            row |= {"with 1 - Dice": of_error.value, "95 % interval": list(of_error.interval)}
            if rows:
                row["with known difficulty"] = spearman(scores[rows], truth)
            found.append(row)
    return found


def assessment_csv(assessment: Assessment) -> str:
    """Return an assessment as CSV, a row for each image and label."""
    labels = assessment.labels
    errors = assessment.scores_se.get(assessment.metric)
    of_difficulty = [assessment.difficulty] if errors is None else [assessment.difficulty, errors]
    columns = [*of_difficulty, *assessment.scores.values()]
    named = ["difficulty", "difficulty_se"][: len(of_difficulty)]
    heads = ["id", *(["label"] if labels else []), *named, *assessment.scores, "dice"]
    rows = []
    for i, identity in enumerate(assessment.ids):
        values = [column[i] for column in columns]
        row = [f"{value:.9g}" for value in (*values, assessment.dice[i])]
        own = [identity, *([labels[i]] if labels else [])]
        rows.append(
            [*own, *row, assessment.foreground_pixels[i], FALLBACKS[assessment.fallback[i]]]
        )
    return csv_table([*heads, "foreground_pixels", "fallback"], rows)

"""Correlate the scores that a run recorded with errors, with sizes and between assessments."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from polyseg.adaptive.recorded_schedule import Row, RunRecord, Values
from polyseg.adaptive.replay import mask_sizes
from polyseg.metrics.rank_stability import partial_spearman, spearman
from polyseg.metrics.significance import rank_correlation
from polyseg.records import ScoreName

MEASURES = ("with_error", "with_size", "with_error_given_size", "with_previous")
"""Spearman's correlations that `validity` returns for each score."""

_FEWEST = 4
"""Smallest number of images for which a correlation is computed."""


def validity(record: RunRecord, unseen: Mapping[tuple[str, str], float] | None = None) -> list[Row]:
    """Return correlations of each recorded score with error and size, by assessment and label.

    `with_error` is Spearman's correlation with 1 - Dice, `with_size` with the pixels of the mask,
    `with_error_given_size` the partial correlation with 1 - Dice given the size, and
    `with_previous` the correlation with the score of the previous assessment. They are NaN for
    fewer than 4 images.

    `unseen` is 1 - Dice by (id, label), from networks that were not trained on the image. It adds
    `with_unseen_error`, the correlation with these errors, with suffix `_low` and `_high` the ends
    of its 95 % interval over the images, and with `_given_size` the correlation given the size.
    """
    parts = list(record.by_label())
    return [
        {"epoch": assessment.epoch, **own, **_validity(part, k, name)}
        | ({} if unseen is None else _unseen_validity(part, k, name, unseen, own.get("label", "")))
        for k, assessment in enumerate(record.assessments)
        for own, part in parts
        for name in assessment.scores
    ]


def validity_summary(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each score and label: each correlation at the last assessment, and its mean.

    The mean leaves out assessments where the correlation is NaN.

    >>> rows = [{"epoch": e, "score": "entropy", **dict.fromkeys(MEASURES, e / 4)} for e in (1, 2)]
    >>> summary = validity_summary(rows)[0]
    >>> summary["with_error_last"], summary["with_error_mean"]
    (0.5, 0.375)
    """
    series: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        series.setdefault((row.get("label", ""), row["score"]), []).append(row)
    summary = []
    for (label, score), one in series.items():
        row = {"label": label, "score": score} if label else {"score": score}
        for measure in MEASURES:
            values = np.array([other[measure] for other in one])
            known = values[np.isfinite(values)]
            row[f"{measure}_last"] = float(values[-1])
            row[f"{measure}_mean"] = float(known.mean()) if known.size else math.nan
        summary.append(row)
    return summary


def validity_curves(rows: Sequence[Row], label: str) -> dict[str, dict[str, Values]]:
    """Return the rows of `validity` for a label as curves: measure to score to values, (epochs,).

    >>> rows = [{"epoch": e, "score": "entropy", **dict.fromkeys(MEASURES, e / 4)} for e in (1, 2)]
    >>> validity_curves(rows, "")["with_size"]["entropy"]
    array([0.25, 0.5 ])
    """
    own = [row for row in rows if row.get("label", "") == label]
    epochs = sorted({row["epoch"] for row in rows})
    curves = {
        measure: {row["score"]: np.full(len(epochs), math.nan) for row in own}
        for measure in MEASURES
    }
    for row in own:
        for measure in MEASURES:
            curves[measure][row["score"]][epochs.index(row["epoch"])] = row[measure]
    return curves


def stability(record: RunRecord) -> dict[str, Values]:
    """Return how stable the order of the images is, (assessments,) each; for one label.

    The values are Spearman's correlation of D with the previous and with the last assessment, and
    the rank stability that follows from the passes of each assessment.
    """
    difficulties = [assessment.difficulty for assessment in record.assessments]
    last = [correlation(one, difficulties[-1]) for one in difficulties[:-1]]
    return {
        "previous assessment": np.array(
            [math.nan, *map(correlation, difficulties[1:], difficulties[:-1])]
        ),
        "last assessment": np.array([*last, math.nan]),
        "many passes (expected)": np.array(
            [one.rank_stability.get(one.metric, math.nan) for one in record.assessments]
        ),
    }


def correlation(first: Values, second: Values) -> float:
    """Return Spearman's correlation if at least 4 images have both values, else NaN.

    >>> correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))
    nan
    """
    known = np.isfinite(first) & np.isfinite(second)
    return spearman(first[known], second[known]) if known.sum() >= _FEWEST else math.nan


def _validity(part: RunRecord, k: int, name: ScoreName) -> Row:
    assessment = part.assessments[k]
    score, error, size = assessment.scores[name], 1 - assessment.dice, mask_sizes(assessment)
    before = part.assessments[k - 1].scores.get(name) if k else None
    return {
        "score": name,
        "images": int((np.isfinite(score) & np.isfinite(error)).sum()),
        "with_error": correlation(score, error),
        "with_size": correlation(score, size),
        "with_error_given_size": partial_spearman(score, error, size),
        "with_previous": math.nan if before is None else correlation(score, before),
    }


def _unseen_validity(
    part: RunRecord, k: int, name: ScoreName, unseen: Mapping[tuple[str, str], float], label: str
) -> Row:
    assessment = part.assessments[k]
    score = assessment.scores[name]
    error = np.array([unseen[identity, label] for identity in assessment.ids])
    low, high = rank_correlation(score, error).interval
    return {
        "with_unseen_error": correlation(score, error),
        "with_unseen_error_low": low,
        "with_unseen_error_high": high,
        "with_unseen_error_given_size": partial_spearman(score, error, mask_sizes(assessment)),
    }

"""Make tables of the difficulties and epsilons that a run recorded.

With several labels every row of a table belongs to an image and a label.
"""

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseg.adaptive.recorded_schedule import Row, RunRecord
from polyseg.adaptive.score_correlations import correlation
from polyseg.difficulty import FALLBACKS, percentile_and_sigma
from polyseg.errors import PolysegError
from polyseg.records import Schedule
from polyseg.system.files import csv_table

QUANTILES = (5, 50, 95)
_EXTREMES = 3
_MOST_NAMED = 3
"""Largest number of ids that an error names."""


def overview(record: RunRecord) -> list[Row]:
    """Return a row for each assessment and label: the distribution and stability of D and epsilon.

    `difficulty_percentile` is D_pct and `sigma` sigma_D of eq. 11 over all images. `epsilon_...`
    are quantiles in the next epoch; `spearman_previous` is the correlation of D with D of the
    previous assessment; `wrong_sign_share` is over the epochs that used the assessment.
    """
    parts = list(record.by_label())
    return [
        {"epoch": assessment.epoch, **own, **_overview(part, k)}
        for k, assessment in enumerate(record.assessments)
        for own, part in parts
    ]


def image_history(record: RunRecord, identity: str) -> list[Row]:
    """Return the D of one image in each assessment, and how its epsilons follow from it.

    There is a row for each label and each period of epochs with the same statistics in eq. 11: one
    epoch with batch statistics, all epochs until the next assessment with data set statistics. An
    assessment without a later epoch has a row without them. Statistics that were not recorded are
    NaN, and `epsilon` is that of the first epoch after the assessment. `rank` is 1 for the largest
    D, and equal ones share the lowest rank; `percentile` is the share of images, in percent, with
    smaller D, where equal ones count half. An image that is not a training image of the run raises
    PolysegError.
    """
    if identity not in record.schedule.ids:
        hint = _ids_like(identity, list(dict.fromkeys(record.schedule.ids)))
        raise PolysegError(f"--image {identity}: not a training image of {record.name}; {hint}")
    rows = []
    parts = list(record.by_label())
    i = parts[0][1].schedule.ids.index(identity)
    for k in range(len(record.assessments)):
        for own, part in parts:
            row = {name: column[i] for name, column in _columns(part, k, own).items()}
            difficulty = part.assessments[k].difficulty
            row["rank"] = int((difficulty > difficulty[i]).sum()) + 1
            smaller, equal = difficulty < difficulty[i], difficulty == difficulty[i]
            row["percentile"] = float((2 * smaller.sum() + equal.sum()) * (50 / len(difficulty)))
            rows += [row | period for period in _periods(part, k, i)]
    return rows


def tidy(record: RunRecord) -> list[Row]:
    """Return a row for each assessment, image and label.

    `epsilon` is that of the next epoch; `difficulty_percentile` and `sigma` are the D_pct and
    sigma_D behind it, and `normalised` is D_norm of eq. 11. They are NaN without a next epoch; all
    but `epsilon` are also NaN if they were not recorded.
    """
    parts = list(record.by_label())
    rows = []
    for k in range(len(record.assessments)):
        tables = [_columns(part, k, own) for own, part in parts]
        for i in range(len(tables[0]["id"])):
            rows += [{name: column[i] for name, column in table.items()} for table in tables]
    return rows


def compare(record: RunRecord, recomputed: Schedule) -> list[Row]:
    """Return how a recomputed schedule differs, with a row for each period between assessments.

    `spearman` is over all images and epochs of the period; `raised_share` is the share of them with
    a larger epsilon.
    """
    moments = [assessment.epoch for assessment in record.assessments]
    epochs = record.schedule.epochs
    periods = np.split(np.arange(len(epochs)), np.searchsorted(epochs, moments, side="right"))
    parts = list(record.by_label())
    rows = []
    for period in filter(len, periods):
        ends = {"from_epoch": int(epochs[period[0]]), "to_epoch": int(epochs[period[-1]])}
        for own, part in parts:
            after = recomputed.of_label(own.get("label", "")).epsilon[period]
            rows.append(ends | own | _change(part.schedule.epsilon[period], after))
    return rows


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as CSV text with a header; NaN is an empty cell.

    >>> print(csv_text([{"id": "a,b", "dice": 0.5}, {"id": "c", "dice": math.nan}]), end="")
    id,dice
    "a,b",0.5
    c,
    """
    return csv_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])


def _ids_like(text: str, ids: Sequence[str]) -> str:
    """Return which ids begin with a text, or else the nearest one, as advice.

    >>> _ids_like("a-", ["a-1", "a-2", "a-3", "a-4", "b-1"])
    '4 images begin with it: a-1, a-2, a-3, ...'
    >>> _ids_like("b", ["a-1", "b-1"])
    '1 image begins with it: b-1'
    """
    if found := [identity for identity in ids if text and identity.startswith(text)]:
        counted = "1 image begins" if len(found) == 1 else f"{len(found)} images begin"
        more = ", ..." if len(found) > _MOST_NAMED else ""
        return f"{counted} with it: {', '.join(found[:_MOST_NAMED])}{more}"
    near = difflib.get_close_matches(text, ids, n=1)
    return f"did you mean {near[0]}?" if near else "`polyseg schedule export` lists them"


def _quantiles(name: str, values: NDArray[Any]) -> Row:
    found = np.percentile(values, QUANTILES)
    return {f"{name}_q{q:02d}": float(value) for q, value in zip(QUANTILES, found, strict=True)}


def _overview(part: RunRecord, k: int) -> Row:
    assessment, fed = part.assessments[k], part.fed(k)
    difficulty = assessment.difficulty
    order = [assessment.ids[i] for i in np.argsort(-difficulty, kind="stable")]
    center, sigma = percentile_and_sigma(difficulty, part.config.control.percentile)
    before = part.assessments[k - 1].difficulty if k else np.full_like(difficulty, math.nan)
    return {
        **_quantiles("difficulty", difficulty),
        "difficulty_percentile": center,
        "sigma": sigma,
        **_quantiles("epsilon", part.next_epsilon(k)),
        **{f"largest_{i + 1}": one for i, one in enumerate(order[:_EXTREMES])},
        **{f"smallest_{i + 1}": one for i, one in enumerate(order[::-1][:_EXTREMES])},
        "fallbacks": int((assessment.fallback > 0).sum()),
        "spearman_previous": correlation(difficulty, before),
        "rank_stability": assessment.rank_stability.get(assessment.metric, math.nan),
        "wrong_sign_share": float(part.wrong_sign[fed].mean()) if fed.any() else math.nan,
    }


def _columns(part: RunRecord, k: int, own: Row) -> dict[str, list[Any]]:
    """Return columns of n values: the images in assessment k and in the next epoch."""
    assessment = part.assessments[k]
    n = len(assessment.ids)
    errors = assessment.scores_se.get(assessment.metric, np.full(n, math.nan))
    center, sigma = part.next_statistics(k).T
    return {
        "epoch": [assessment.epoch] * n,
        "id": assessment.ids,
        **{name: [value] * n for name, value in own.items()},
        "difficulty": assessment.difficulty.tolist(),
        "difficulty_se": errors.tolist(),
        "difficulty_percentile": center.tolist(),
        "sigma": sigma.tolist(),
        "normalised": part.next_normalised(k).tolist(),
        "epsilon": part.next_epsilon(k).tolist(),
        "dice": assessment.dice.tolist(),
        "foreground_pixels": assessment.foreground_pixels.tolist(),
        "fallback": [FALLBACKS[code] for code in assessment.fallback],
    }


def _periods(part: RunRecord, k: int, i: int) -> list[Row]:
    """Return a row for each period of epochs after assessment k with the same statistics."""
    fed = part.fed(k)
    epochs, epsilon = part.schedule.epochs[fed].tolist(), part.schedule.epsilon[fed, i].tolist()
    if not epochs:
        return [dict.fromkeys(("from_epoch", "to_epoch"), math.nan)]
    met = part.schedule.percentile_and_sigma()[fed, i]
    changes = [not np.array_equal(*pair, equal_nan=True) for pair in itertools.pairwise(met)]
    starts = [0, *(j for j, changed in enumerate(changes, start=1) if changed)]
    rows = []
    for first, after in itertools.pairwise([*starts, len(epochs)]):
        center, sigma = met[first].tolist()
        rows.append(
            {
                "from_epoch": epochs[first],
                "to_epoch": epochs[after - 1],
                "difficulty_percentile": center,
                "sigma": sigma,
                "normalised": float(part.normalised(k, int(fed.argmax()) + first)[i]),
                "epsilon": epsilon[first],
            }
        )
    return rows


def _change(before: NDArray[np.float32], after: NDArray[np.float32]) -> Row:
    recorded, recomputed = before.ravel().astype(np.float64), after.ravel().astype(np.float64)
    change = recomputed - recorded
    return {
        **_quantiles("recorded", recorded),
        **_quantiles("recomputed", recomputed),
        "largest_change": float(np.abs(change).max()),
        "spearman": correlation(recorded, recomputed),
        "raised_share": float((change > 0).mean()),
    }


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.9g}" if math.isfinite(value) else ""

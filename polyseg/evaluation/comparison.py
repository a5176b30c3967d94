"""Compare runs, or arms of several runs, with a baseline on the same images."""

from collections.abc import Sequence

import numpy as np

from polyseg.errors import PolysegError
from polyseg.evaluation.scores import (
    Comparison,
    RunScores,
    mean_or_nan,
    pool,
    refuse_other_sizes,
    values_by_id,
)
from polyseg.metrics.image_metrics import METRICS, Metric
from polyseg.metrics.significance import (
    PairedDifference,
    adjust_together,
    group_means,
    over_runs,
    paired_difference,
)


def compare(runs: Sequence[RunScores], baseline: str) -> list[Comparison]:
    """Compare all runs with the baseline on the same images, for each label.

    Means over passes of MC Dropout are compared with such means. For arms, runs with equal seed and
    fold are compared, or all runs if there are none. The p-values of a metric are adjusted by
    Holm's method over the compared runs.

    Raises:
        PolysegError: there is no such run, or masks were compared at different sizes.
    """
    refuse_other_sizes(runs)
    titles = {run.name for run in runs}
    if baseline not in titles:
        raise PolysegError(
            f"--baseline {baseline}: is not one of the runs; choose {', '.join(sorted(titles))}"
        )
    found = []
    for kind in dict.fromkeys((run.label, run.prediction) for run in runs):
        of_kind = [run for run in runs if (run.label, run.prediction) == kind]
        reference = next((run for run in of_kind if run.name == baseline), None)
        if reference is None:
            raise PolysegError(f"--baseline {baseline}: has no results for {kind[0] or kind[1]}")
        found += _compared(reference, [run for run in of_kind if run is not reference])
    return found


def _compared(reference: RunScores, others: Sequence[RunScores]) -> list[Comparison]:
    differences = {
        name: adjust_together([_difference(reference, run, metric) for run in others])
        for name, metric in METRICS.items()
    }
    return [
        Comparison(
            baseline=reference.title,
            run=run.title,
            label=run.label,
            differences={key: found[i] for key, found in differences.items()},
        )
        for i, run in enumerate(others)
    ]


def _difference(reference: RunScores, run: RunScores, metric: Metric) -> PairedDifference:
    """Compare two runs, or the runs of two arms with equal seed and fold."""
    pairs = _pairs(reference, run)
    if pairs:
        reference, run = (pool("", list(members)) for members in zip(*pairs, strict=True))
    ids = [image.id for image in reference.scores]
    found = paired_difference(
        reference.column(metric.name),
        values_by_id(run, metric.name, ids),
        groups=reference.groups,
        higher_is_better=metric.higher_is_better,
    )
    return over_runs(found, [_mean_difference(*pair, metric.name) for pair in pairs])


def _pairs(reference: RunScores, run: RunScores) -> list[tuple[RunScores, RunScores]]:
    return [
        (one, other)
        for one in reference.members
        for other in run.members
        if (one.seed, one.fold) == (other.seed, other.fold)
    ]


def _mean_difference(one: RunScores, other: RunScores, key: str) -> float:
    ids = [image.id for image in one.scores]
    differences = group_means(
        values_by_id(other, key, ids) - values_by_id(one, key, ids), one.groups
    )
    return mean_or_nan(differences[np.isfinite(differences)])

"""The tables of an evaluation, without a form yet: what stands where, what is best or marked."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from polyseg.evaluation.scores import (
    Comparison,
    Evaluation,
    RunScores,
    Stratum,
    failure_detection,
    strata,
)
from polyseg.metrics.image_metrics import METRICS, MetricColumn
from polyseg.metrics.significance import Interval, stars

RULE = (
    "Mask and prediction both empty: the best value. Only one empty: the worst, distances the "
    "image's diagonal. What the mask leaves undefined is left out."
)
DASH = "–"
"""What stands where a value is undefined."""


@dataclass(frozen=True)
class Cell:
    """What stands in a place of a table."""

    text: str
    best: bool = False
    """Whether it is the best of its row."""
    marks: str = ""
    """Stars of significance."""


@dataclass(frozen=True)
class Sheet:
    """A table without a form yet: headings, and rows whose first cell names them."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()


def sheets(evaluation: Evaluation, *, brief: bool = False) -> list[Sheet]:
    """Return the tables of an evaluation, those that have something to say.

    Args:
        evaluation: what was found.
        brief: of several comparisons the differences in Dice alone.

    >>> [sheet.title for sheet in sheets(Evaluation([]))]
    []
    """
    if not evaluation.runs:
        return []
    found = [
        _metrics_sheet(evaluation),
        _dice_sheet(evaluation),
        *([] if brief and len(evaluation.comparisons) > 1 else _comparison_sheets(evaluation)),
        *_strata_sheets(evaluation),
        _failure_sheet(evaluation),
        _robustness_sheet(evaluation),
    ]
    return [sheet for sheet in found if sheet.rows]


def heading(metric: MetricColumn, evaluation: Evaluation) -> str:
    """Return a metric's title with its unit, or its tolerance.

    >>> heading(METRICS[0], Evaluation([]))
    'Dice'
    """
    if metric.key == "nsd":
        return f"{metric.title} ({evaluation.tolerance:g} {evaluation.unit})"
    return metric.heading(evaluation.unit)


def p_text(value: float) -> str:
    """Return a p-value as tables show it.

    >>> p_text(0.0007), p_text(0.04), p_text(math.nan)
    ('< 0.001', '0.040', '–')
    """
    return DASH if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def notes(runs: Sequence[RunScores]) -> list[str]:
    """Return a sentence for each run that has empty cases, and for each metric left undefined."""
    found = []
    for run in runs:
        empty = [
            f"{number} with {what}"
            for what, number in run.counts().items()
            if what != "images" and number
        ]
        left_out = [
            f"{metric.title} of {missing}"
            for metric in METRICS
            if (missing := len(run.scores) - run.defined(metric.key).size)
        ]
        if empty:
            found.append(f"{run.title}: of {len(run.scores)} images {', '.join(empty)}.")
        if left_out:
            found.append(f"{run.title}: left out as undefined: {', '.join(left_out)}.")
    return found


def _metrics_sheet(evaluation: Evaluation) -> Sheet:
    runs = evaluation.runs
    heads = ["metric", *(f"{run.title} ({_images(run)})" for run in runs)]
    rows = []
    for metric in METRICS:
        best = _best(runs, metric)
        cells = [
            Cell(_spread(run, metric), run.title in best, _marks(evaluation, run.title, metric.key))
            for run in runs
        ]
        rows.append([Cell(heading(metric, evaluation)), *cells])
    several = any(run.members for run in runs)
    spread = "Mean ± standard deviation over the images"
    if several:
        spread += (
            " (each its mean over an arm's runs), in brackets that of the means over the seeds"
        )
    marked = (
        "* p < 0.05, ** p < 0.01, *** p < 0.001 against the baseline, after Holm: of these "
        "networks on such images; of other seeds only where arms of several are compared."
    )
    return Sheet(
        "Metrics", heads, rows,
        [f"{spread}. {RULE}", *([marked] if evaluation.comparisons else []), *notes(runs)],
    )  # fmt: skip


def _dice_sheet(evaluation: Evaluation) -> Sheet:
    """Return the differences in Dice alone, a row a run, where there are several."""
    compared = evaluation.comparisons
    several = any(one.differences["dice"].runs > 1 for one in compared)
    dice = METRICS[0]
    rows = [
        [Cell(one.run, marks=row[0].marks), *row[1:]]
        for one in compared
        if (row := _comparison_row(one, dice, evaluation, several))
    ]
    against = " and ".join(dict.fromkeys(one.baseline for one in compared))
    heads = ["run", *_comparison_heads(several)]
    return Sheet(f"Dice against {against}", heads, rows if len(rows) > 1 else [], _meaning(several))


def _comparison_heads(several: bool) -> list[str]:
    over_runs = ["over runs", "p runs"] if several else []
    return ["difference [95 % interval]", "+/-/=", "p", *over_runs, "Holm"]


def _meaning(several: bool) -> list[str]:
    return [
        "+/-/=: images that are better, worse, equal. Interval by bootstrap over the images (BCa), "
        "p by Wilcoxon's signed-rank test, as if each image were a case of its own.",
        *([_OVER_RUNS] if several else []),
        "Holm: the larger p, corrected for the runs compared in a metric, not for metrics.",
    ]


def _comparison_sheets(evaluation: Evaluation) -> Iterator[Sheet]:
    for one in evaluation.comparisons:
        found = one.differences.values()
        images, runs = (max(getattr(each, name) for each in found) for name in ("images", "runs"))
        fewer = [
            f"{metric.title} of {one.differences[metric.key].images}"
            for metric in METRICS
            if one.differences[metric.key].images < images
        ]
        left_out = f"Fewer images where a metric is undefined: {', '.join(fewer)}."
        paired = f", {runs} pair{'s' if runs > 1 else ''} of runs" if runs else ""
        yield Sheet(
            f"{one.run} against {one.baseline} ({_count(images, 'image')}{paired})",
            ["metric", *_comparison_heads(runs > 1)],
            [_comparison_row(one, metric, evaluation, runs > 1) for metric in METRICS],
            [*_meaning(runs > 1), *([left_out] if fewer else [])],
        )


_OVER_RUNS = (
    "Over runs: deviation of the differences of runs with equal seed and fold, and the p of their "
    "paired t-test. The images tell of these networks; only the runs tell of other seeds."
)


def _comparison_row(
    one: Comparison, metric: MetricColumn, evaluation: Evaluation, several: bool
) -> list[Cell]:
    found, digits = one.differences[metric.key], metric.decimals + 1
    texts = [
        f"{_signed(found.mean, digits)} {_interval(found.interval, digits)}",
        f"{found.better}/{found.worse}/{found.equal}",
        p_text(found.p_value),
    ]
    if several:
        deviation = _number(found.deviation_over_runs, digits)
        texts += [f"± {deviation}", p_text(found.p_over_runs)]
    texts.append(p_text(found.adjusted))
    name = Cell(heading(metric, evaluation), marks=stars(found.adjusted))
    return [name, *map(Cell, texts)]


def _strata_sheets(evaluation: Evaluation) -> Iterator[Sheet]:
    """Yield the Dice of thirds of the images, by size and by difficulty."""
    found = [(run, list(strata(run, evaluation.difficulty(run)))) for run in evaluation.runs]
    for by in ("size", "difficulty"):
        parts = {run.title: [one for one in thirds if one.by == by] for run, thirds in found}
        filled = {title: part for title, part in parts.items() if _several_images(part)}
        if not filled:
            continue
        first = next(iter(filled.values()))
        rows = [
            [Cell(title), *(Cell(_of_images(one)) for one in part)]
            for title, part in filled.items()
        ]
        what = "the mask's size" if by == "size" else f"difficulty to {evaluation.runs[0].name}"
        heads = ["run", *(one.name for one in first)]
        yield Sheet(
            f"Dice by {by}",
            heads,
            rows,
            [f"Thirds of the images by {what}; in brackets their number."],
        )


def _failure_sheet(evaluation: Evaluation) -> Sheet:
    rows = [
        [
            Cell(run.title),
            Cell(one.uncertainty.replace("_", " ")),
            Cell(str(one.failed)),
            *(Cell(_number(value, 3)) for value in (one.auroc, one.aurc, one.excess_aurc)),
            Cell(_number(one.spearman, 2)),
        ]
        for run in evaluation.runs
        for one in failure_detection(run, evaluation.failure)
    ]
    heads = ["run", "uncertainty", "failed", "AUROC", "AURC", "E-AURC", "Spearman"]
    note = f"Failed: Dice below {evaluation.failure:g}. Risk, also for Spearman's, is 1 − Dice."
    return Sheet("Does the uncertainty find failures?", heads, rows, [note])


def _robustness_sheet(evaluation: Evaluation) -> Sheet:
    points = evaluation.robustness
    strengths = sorted({point.strength for point in points})
    rows = [
        [
            Cell(corruption),
            Cell(run),
            *(
                Cell(_number(point.mean("dice"), 3))
                for point in points
                if (point.corruption, point.run) == (corruption, run)
            ),
        ]
        for corruption, run in dict.fromkeys((point.corruption, point.run) for point in points)
    ]
    note = "0: the images as they are; 5: severe damage."
    return Sheet("Dice under damage", ["damage", "run", *map(str, strengths)], rows, [note])


def _of_images(stratum: Stratum) -> str:
    return f"{_number(stratum.means['dice'], 3)} ({stratum.images})"


def _several_images(part: Sequence[Stratum]) -> bool:
    return sum(one.images > 0 for one in part) > 1


def _best(runs: Sequence[RunScores], metric: MetricColumn) -> set[str]:
    """Return the runs of each label whose mean, as shown, is the best; none where one is alone."""
    best: set[str] = set()
    for label in dict.fromkeys(run.label for run in runs):
        means = {run.title: run.mean(metric.key) for run in runs if run.label == label}
        shown = {
            title: round(mean, metric.decimals)
            for title, mean in means.items()
            if not math.isnan(mean)
        }
        if len(shown) < 2 or len(set(shown.values())) == 1:
            continue
        extreme = (max if metric.higher_is_better else min)(shown.values())
        best |= {title for title, mean in shown.items() if mean == extreme}
    return best


def _marks(evaluation: Evaluation, title: str, key: str) -> str:
    found = [one.differences[key] for one in evaluation.comparisons if one.run == title]
    return stars(found[0].adjusted) if found else ""


def _spread(run: RunScores, metric: MetricColumn) -> str:
    """Return "mean ± deviation", and in brackets the seeds' spread; a dash where undefined."""
    mean, digits = run.mean(metric.key), metric.decimals
    deviation, seeds = run.deviation(metric.key), run.seed_deviation(metric.key)
    text = _number(mean, digits)
    if not math.isnan(deviation):
        text += f" ± {deviation:.{digits}f}"
    return text if math.isnan(seeds) else f"{text} ({seeds:.{digits}f})"


def _images(run: RunScores) -> str:
    runs = f"{_count(len(run.members), 'run')}, " if run.members else ""
    return runs + _count(len(run.scores), "image")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _number(value: float, digits: int) -> str:
    return DASH if math.isnan(value) else f"{value:.{digits}f}"


def _signed(value: float, digits: int) -> str:
    return DASH if math.isnan(value) else f"{value:+.{digits}f}"


def _interval(interval: Interval, digits: int) -> str:
    if math.isnan(interval.low):
        return DASH
    return f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"

"""Make the tables of an evaluation, as rows of cells, from its summary.json."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polyseg.data.layouts.cases import counted
from polyseg.evaluation.summary_records import (
    Network,
    Record,
    SummaryMetric,
    is_by_patient,
    mapping,
    metric_values,
    metrics_of,
    networks,
    real,
    records,
    whole,
)
from polyseg.metrics.significance import stars

RULE = (
    "If mask and prediction are both empty, a metric has its best value; if only one of them is, "
    "its worst (for distances the image's diagonal). Metrics that a mask leaves undefined are left "
    "out."
)
DASH = "–"
"""Text of a cell whose value is undefined."""
PARTS = {"val": "Validation metrics", "train": "Training metrics", "all": "Metrics of all images"}
"""Title of metrics that are not of test images alone, by the tested part."""
SIZES = {"original": "the images' own size", "network": "the size of the network's input"}
"""Size at which masks were compared, in words."""

_STARS = "* p < 0.05, ** p < 0.01, *** p < 0.001 against the baseline, after Holm's correction."
_ONE_SEED = (
    "The tests compare these trained networks; to compare losses, train several seeds of each."
)
_OVER_RUNS = (
    "SD runs: standard deviation of the differences between runs of equal seed and fold. p runs: "
    "their paired t-test, for other seeds or folds (which share training images)."
)


@dataclass(frozen=True)
class Cell:
    """The content of a cell of a table."""

    text: str
    best: bool = False
    """Whether the value is the best of its row."""
    marks: str = ""
    """Stars of significance."""
    details: str = ""
    """Further values, for tables with space for a second line in a cell."""


@dataclass(frozen=True)
class Sheet:
    """A table: headings, and rows whose first cell names them."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()


def sheets(summary: Record, *, brief: bool = False) -> list[Sheet]:
    """Return the tables of an evaluation that are not empty.

    Args:
        summary: summary of the evaluation.
        brief: whether several comparisons are shown in Dice only.

    >>> [sheet.title for sheet in sheets({"runs": []})]
    []
    """
    dice, single = comparison_sheets(summary)
    found = [metrics_sheet(summary), *dice, *([] if brief and dice else single)]
    return [*(sheet for sheet in found if sheet.rows), *further_sheets(summary)]


def number(value: Any, digits: int, option: str = "") -> str:
    """Return a number as tables show it, or a dash for any other value.

    `option` is put in front of the format, such as "+" or ",".
    """
    found = real(value)
    form = f".{digits}f" if abs(found) < 1e9 else ".3g"
    return DASH if math.isnan(found) else f"{found:{option}{form}}"


def p_text(value: float) -> str:
    """Return a p-value as tables show it.

    >>> p_text(0.0007), p_text(0.04), p_text(math.nan)
    ('< 0.001', '0.040', '–')
    """
    return DASH if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def size_of(summary: Record) -> str:
    """Return the size at which masks were compared; "network" for version 0.1.

    >>> size_of({})
    'network'
    """
    at = summary.get("at")
    return at if isinstance(at, str) and at in SIZES else "network"


def metrics_title(summary: Record) -> str:
    """Return the title of the metrics, which names the tested images.

    >>> metrics_title({"part": "val"}), metrics_title({})
    ('Validation metrics', 'Test metrics')
    """
    return PARTS.get(str(summary.get("part")), "Test metrics")


def metrics_sheet(summary: Record) -> Sheet:
    """Return the means of all metrics: a row per metric, a column per network and label."""
    found = networks(summary)
    keys = dict.fromkeys(key for one in found for key in mapping(one.record, "metrics"))
    metrics = metrics_of(summary, list(keys))
    heads = ["metric", *(f"{one.title} ({_images(one)})" for one in found)]
    rows = []
    for metric in metrics:
        best = _best(found, metric)
        cells = [
            Cell(
                _spread(one, metric),
                one.title in best,
                _marks(summary, one.title, metric.key),
                _details(one, metric),
            )
            for one in found
        ]
        rows.append([Cell(metric.title), *cells])
    spread = f"Masks are compared at {SIZES[size_of(summary)]}. "
    cases = "patients, each the mean of its images" if is_by_patient(summary) else "images"
    spread += f"Mean ± standard deviation over the {cases}"
    if any(one.record.get("members") for one in found):
        spread += (
            " (an image counts with its mean over the runs of the arm that tested it); in brackets "
            "the standard deviations of the means over seeds and over folds"
        )
    lower = [
        metric.title.partition(" (")[0] for metric in metrics if metric.higher_is_better is False
    ]
    better = [f"Lower is better: {', '.join(lower)}."] if lower else []
    marks = [_STARS] if any(cell.marks for row in rows for cell in row) else []
    if records(summary, "comparisons") and not any(one.record.get("members") for one in found):
        marks.append(_ONE_SEED)
    notes = [f"{spread}. {summary.get('rule', RULE)}", *better, *marks, *_notes(found, metrics)]
    return Sheet(metrics_title(summary), heads, rows, notes)


def comparison_sheets(summary: Record) -> tuple[list[Sheet], list[Sheet]]:
    """Return a table of several comparisons in Dice, and one of each comparison in all metrics."""
    compared = [
        (one, metrics_of(summary, list(mapping(one, "metrics"))))
        for one in records(summary, "comparisons")
    ]
    in_dice = [
        (one, metrics[0]) for one, metrics in compared if metrics and metrics[0].key == "dice"
    ]
    by_patient = is_by_patient(summary)
    single = [_comparison_sheet(one, metrics, by_patient) for one, metrics in compared if metrics]
    found = conclusions_of(summary)
    if len(in_dice) < 2:
        return [], [replace(one, notes=[*found, *one.notes]) for one in single]
    several = any(whole(metric_values(one, "dice").get("runs")) > 1 for one, _ in in_dice)
    rows = []
    for one, dice in in_dice:
        named, *cells = _comparison_row(one, dice, several)
        rows.append([Cell(str(one.get("run", DASH)), marks=named.marks), *cells])
    against = " and ".join(dict.fromkeys(str(one.get("baseline", DASH)) for one, _ in compared))
    heads = ["arm" if several else "run", *_comparison_heads(several)]
    notes = [*found, *_meaning(several, by_patient)]
    return [Sheet(f"Dice: difference from {against}", heads, rows, notes)], single


def conclusions_of(summary: Record) -> list[str]:
    """Return the sentences on whether the adaptive loss was better."""
    given = summary.get("conclusions")
    return [one for one in given if isinstance(one, str)] if isinstance(given, list) else []


def further_sheets(summary: Record) -> list[Sheet]:
    """Return the other tables: thirds, failures, robustness."""
    found = [*_strata_sheets(summary), _failure_sheet(summary), _robustness_sheet(summary)]
    return [sheet for sheet in found if sheet.rows]


def _notes(found: Sequence[Network], metrics: Sequence[SummaryMetric]) -> Iterator[str]:
    """Yield a sentence for each network with empty cases, or with metrics that are undefined."""
    for one in found:
        counts = mapping(one.record, "counts").items()
        empty = [f"{n} with {what}" for what, n in counts if what != "images" and whole(n)]
        left_out = [
            f"{metric.title.partition(' (')[0]} of {missing}"
            for metric in metrics
            if (missing := one.images - whole(one.statistics(metric.key).get("n", one.images))) > 0
        ]
        if empty:
            yield f"{one.title}: of {one.images} images {', '.join(empty)}."
        if left_out:
            yield f"{one.title}: left out as undefined: {', '.join(left_out)}."


def _comparison_heads(several: bool) -> list[str]:
    over_runs = ["SD runs", "p runs"] if several else []
    return ["difference [95 % interval]", "+/-/=", "p", *over_runs, "Holm"]


def _meaning(several: bool, by_patient: bool) -> list[str]:
    case = "patient" if by_patient else "image"
    alone = "" if by_patient else ", taken as independent"
    larger = "the larger of the two p" if several else "p"
    return [
        f"+/-/=: number of {case}s that are better, worse, equal. Interval: bootstrap over the "
        f"{case}s (BCa). p: Wilcoxon's signed-rank test over the {case}s{alone}; it compares these "
        "trained networks, not networks of other seeds.",
        *([_OVER_RUNS] if several else []),
        f"Holm: {larger}, adjusted for the number of runs compared in a metric, but not for the "
        "number of metrics.",
    ]


def _comparison_sheet(one: Record, metrics: Sequence[SummaryMetric], by_patient: bool) -> Sheet:
    counts = {metric: whole(metric_values(one, metric.key).get("images")) for metric in metrics}
    images = max(counts.values())
    runs = max(whole(metric_values(one, metric.key).get("runs")) for metric in metrics)
    fewer = [
        f"{metric.title.partition(' (')[0]} of {n}" for metric, n in counts.items() if n < images
    ]
    left_out = f"Fewer images where a metric is undefined: {', '.join(fewer)}."
    patients = max(whole(metric_values(one, metric.key).get("patients")) for metric in metrics)
    cases = (f"{counted(patients, 'patient')}, " if by_patient else "") + counted(images, "image")
    paired = f", {counted(runs, 'pair')} of runs" if runs else ""
    title = f"{one.get('run', DASH)} minus {one.get('baseline', DASH)}"
    return Sheet(
        f"{title} ({cases}{paired})",
        ["metric", *_comparison_heads(runs > 1)],
        [_comparison_row(one, metric, runs > 1) for metric in metrics],
        [*_meaning(runs > 1, by_patient), *([left_out] if fewer else [])],
    )


def _comparison_row(one: Record, metric: SummaryMetric, several: bool) -> list[Cell]:
    found, digits = metric_values(one, metric.key), metric.decimals + 1
    counts = "/".join(number(found.get(name), 0) for name in ("better", "worse", "equal"))
    low, high = (number(found.get(end), digits, "+") for end in ("low", "high"))
    interval = DASH if DASH in (low, high) else f"[{low}, {high}]"
    texts = [
        f"{number(found.get('mean'), digits, '+')} {interval}",
        counts,
        p_text(real(found.get("p_value"))),
    ]
    if several:
        deviation = number(found.get("deviation_over_runs"), digits)
        texts += [f"± {deviation}", p_text(real(found.get("p_over_runs")))]
    adjusted = real(found.get("adjusted"))
    name = Cell(metric.title, marks=stars(adjusted))
    return [name, *map(Cell, [*texts, p_text(adjusted)])]


def _strata_sheets(summary: Record) -> Iterator[Sheet]:
    """Yield the Dice of thirds of the images, by size and by difficulty."""
    found = networks(summary)
    for by in ("size", "difficulty"):
        thirds = {
            one.title: {
                str(part.get("name", "")): part
                for part in records(one.record, "strata")
                if part.get("by") == by
            }
            for one in found
        }
        filled = {
            title: parts
            for title, parts in thirds.items()
            if sum(whole(part.get("images")) > 0 for part in parts.values()) > 1
        }
        names = list(dict.fromkeys(name for parts in filled.values() for name in parts))
        rows = [
            [Cell(title), *(Cell(_of_images(parts.get(name, {}))) for name in names)]
            for title, parts in filled.items()
        ]
        first = found[0].record.get("name", "") if found else ""
        what = "the size of the mask" if by == "size" else f"difficulty for {first}"
        note = f"Thirds of the images by {what}, with the number of images in brackets."
        yield Sheet(f"Dice by {by}", ["run", *names], rows, [note])


def _failure_sheet(summary: Record) -> Sheet:
    rows = [
        [
            Cell(one.title),
            Cell(str(found.get("uncertainty", DASH)).replace("_", " ")),
            Cell(number(found.get("failed"), 0)),
            *(Cell(number(found.get(key), 3)) for key in ("auroc", "aurc", "excess_aurc")),
            Cell(number(found.get("spearman"), 2)),
        ]
        for one in networks(summary)
        for found in records(one.record, "failure_detection")
    ]
    heads = ["run", "uncertainty", "failed", "AUROC", "AURC", "E-AURC", "Spearman"]
    limit = f"{real(summary.get('failure_dice')):g}"
    note = f"Failed: Dice below {limit}. Risk, also for Spearman's, is 1 − Dice."
    return Sheet("Does the uncertainty find failures?", heads, rows, [note])


def _robustness_sheet(summary: Record) -> Sheet:
    points = {
        tuple(str(one.get(key, "")) for key in ("corruption", "run", "strength")): one
        for one in records(summary, "robustness")
    }
    strengths = list(dict.fromkeys(strength for *_, strength in points))
    rows = []
    for line in dict.fromkeys(place[:2] for place in points):
        found = (points.get((*line, strength), {}) for strength in strengths)
        dice = (mapping(one, "metrics").get("dice") for one in found)
        rows.append([*map(Cell, line), *(Cell(number(one, 3)) for one in dice)])
    note = "0: unchanged images; 5: severe corruption."
    return Sheet(
        "Dice on corrupted images",
        ["corruption", "run", *strengths],
        rows,
        [note],
    )


def _of_images(stratum: Record) -> str:
    dice = number(mapping(stratum, "means").get("dice"), 3)
    return f"{dice} ({whole(stratum.get('images'))})"


def _best(found: Sequence[Network], metric: SummaryMetric) -> set[str]:
    """Return the networks of each label with the best mean as shown; none for a single network."""
    best: set[str] = set()
    for label in dict.fromkeys(one.label for one in found):
        means = {one.title: one.mean(metric.key) for one in found if one.label == label}
        shown = {
            title: round(mean, metric.decimals)
            for title, mean in means.items()
            if not math.isnan(mean)
        }
        if len(shown) < 2 or len(set(shown.values())) == 1 or metric.higher_is_better is None:
            continue
        extreme = (max if metric.higher_is_better else min)(shown.values())
        best |= {title for title, mean in shown.items() if mean == extreme}
    return best


def _marks(summary: Record, title: str, key: str) -> str:
    compared = (one for one in records(summary, "comparisons") if one.get("run") == title)
    return next((stars(real(metric_values(one, key).get("adjusted"))) for one in compared), "")


def _spread(one: Network, metric: SummaryMetric) -> str:
    """Return "mean ± deviation (seeds s, folds f)" without undefined values."""
    found, digits = one.statistics(metric.key), metric.decimals
    deviation, *spreads = (
        number(found.get(name), digits)
        for name in ("deviation", "seed_deviation", "fold_deviation")
    )
    text = number(found.get("mean"), digits)
    text += "" if deviation == DASH else f" ± {deviation}"
    pairs = zip(("seeds", "folds"), spreads, strict=True)
    over = ", ".join(f"{what} {spread}" for what, spread in pairs if spread != DASH)
    return f"{text} ({over})" if over else text


def _details(one: Network, metric: SummaryMetric) -> str:
    """Return the interval of a mean, and the number of images if it is not that of all."""
    found = one.statistics(metric.key)
    low, high = (number(found.get(end), metric.decimals) for end in ("low", "high"))
    interval = [] if DASH in (low, high) else [f"{low} to {high}"]
    n = whole(found.get("n", one.images))
    return ", ".join([*interval, *([] if n == one.images else [f"n = {n}"])])


def _images(one: Network) -> str:
    members = one.record.get("members")
    runs = f"{counted(len(members), 'run')}, " if isinstance(members, list) and members else ""
    patients = f"{counted(one.patients, 'patient')}, " if one.patients else ""
    return runs + patients + counted(one.images, "image")

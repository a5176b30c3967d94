"""Export an evaluation: tables as Markdown and LaTeX, numbers as CSV and JSON."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from polyseg.evaluation.scores import Comparison, Evaluation, RunScores, failure_detection, strata
from polyseg.evaluation.summary_records import Record
from polyseg.evaluation.tables import DASH, RULE, Cell, Sheet, sheets
from polyseg.metrics.image_metrics import METRICS
from polyseg.system.files import csv_table, without_nan

SCHEMA = 1
"""Version of summary.json, raised if a key is removed or changes its meaning."""


def markdown(summary: Record) -> str:
    """Return the tables of a summary as Markdown."""
    return "\n".join(_markdown(sheet) for sheet in sheets(summary))


def latex(summary: Record) -> str:
    """Return the tables of a summary for LaTeX with the package booktabs."""
    heading = "% needs \\usepackage{booktabs}\n"
    return heading + "\n".join(_latex(sheet) for sheet in sheets(summary))


def per_image_csv(runs: Sequence[RunScores]) -> str:
    """Return every metric of every image of every run as CSV; an empty cell is undefined.

    An arm has the rows of each of its runs.
    """
    single = [one for run in runs for one in (run.members or [run])]
    unsure = list(dict.fromkeys(k for run in single for one in run.scores for k in one.uncertainty))
    grouped = any(run.members for run in runs)
    arm_of = {id(one): run.name for run in runs for one in run.members}
    named = {"label": any(run.label for run in single)}
    named["prediction"] = any(run.prediction != "plain" for run in single)
    named |= {"seed": grouped, "fold": grouped and any(run.fold is not None for run in single)}
    heads = [*(["arm"] if grouped else []), "run"]
    heads += [*(name for name, there in named.items() if there), "at", "id"]
    metrics = list(METRICS)
    by_group = any(run.groups for run in single)
    heads += ["group"] if by_group else []
    rows = []
    for run in single:
        own = [arm_of.get(id(run), run.name)] if grouped else []
        own += [run.name, *(getattr(run, name) for name, there in named.items() if there)]
        for image in run.scores:
            values = [image.values[key] for key in metrics]
            found = [image.uncertainty.get(name, math.nan) for name in unsure]
            pixels = [image.mask_pixels, image.predicted_pixels]
            names = [run.at, image.id, *([image.group or ""] if by_group else [])]
            rows.append([*own, *names, *map(_text, values), *pixels, *map(_text, found)])
    return csv_table([*heads, *metrics, "mask_pixels", "predicted_pixels", *unsure], rows)


def robustness_csv(evaluation: Evaluation) -> str:
    """Return the means of all metrics at each strength of each corruption as CSV."""
    metrics = list(METRICS)
    rows = [
        [point.run, point.corruption, point.strength, *(_text(point.mean(key)) for key in metrics)]
        for point in evaluation.robustness
    ]
    return csv_table(["run", "corruption", "strength", *metrics], rows)


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as plain values, with None for undefined ones."""
    record = {
        "schema": SCHEMA,
        "rule": RULE,
        "at": evaluation.at,
        "part": evaluation.part,
        "by": "image" if all(run.groups is None for run in evaluation.runs) else "patient",
        "sources": list(evaluation.sources),
        "unit": evaluation.unit,
        "tolerance": evaluation.tolerance,
        "failure_dice": evaluation.failure,
        "metrics": {
            name: {"title": evaluation.heading(metric), "higher_is_better": metric.higher_is_better}
            for name, metric in METRICS.items()
        },
        "runs": [_run_record(run, evaluation) for run in evaluation.runs],
        "comparisons": [_comparison_record(one) for one in evaluation.comparisons],
        "conclusions": list(evaluation.conclusions),
        "robustness": [
            {
                "run": point.run,
                "corruption": point.corruption,
                "strength": point.strength,
                "metrics": {name: point.mean(name) for name in METRICS},
            }
            for point in evaluation.robustness
        ],
    }
    plain: dict[str, Any] = without_nan(record)
    return plain


def _run_record(run: RunScores, evaluation: Evaluation) -> dict[str, Any]:
    curve = run.reliability
    return {
        "name": run.name,
        **({"label": run.label} if run.label else {}),
        "prediction": run.prediction,
        "threshold": run.threshold,
        "counts": run.counts(),
        "patients": run.patients,
        "metrics": {name: _statistics(run, name) for name in METRICS},
        "strata": [asdict(one) for one in strata(run, evaluation.difficulty(run))],
        "failure_detection": [asdict(one) for one in failure_detection(run, evaluation.failure)],
        "calibration": None
        if curve is None
        else {
            "ece": curve.calibration_error,
            "mean_predicted": curve.mean_predicted.tolist(),
            "observed": curve.observed.tolist(),
            "count": curve.count.tolist(),
        },
        "members": [one.name for one in run.members],
    }


def _statistics(run: RunScores, key: str) -> dict[str, float | int]:
    values = run.defined(key)
    interval = run.interval(key)
    return {
        "mean": run.mean(key),
        "deviation": run.deviation(key),
        "seed_deviation": run.seed_deviation(key),
        "fold_deviation": run.fold_deviation(key),
        "low": interval.low,
        "high": interval.high,
        "median": float(np.median(values)) if values.size else math.nan,
        "n": int(np.isfinite(run.column(key)).sum()),
    }


def _comparison_record(one: Comparison) -> dict[str, Any]:
    def plain(key: str) -> dict[str, Any]:
        found = one.differences[key]
        record = asdict(found)
        low, high = record.pop("interval")
        return record | {"low": low, "high": high}

    return {
        "baseline": one.baseline,
        "run": one.run,
        **({"label": one.label} if one.label else {}),
        "metrics": {key: plain(key) for key in one.differences},
    }


def _markdown(sheet: Sheet) -> str:
    def shown(cell: Cell) -> str:
        # Names may contain any characters; brackets of intervals are not escaped.
        text = re.sub(r"([\\|*_`<>&]|(?<=\])\()", r"\\\1", _plain_line(cell.text))
        return (f"**{text}**" if cell.best else text) + cell.marks.replace("*", "\\*")

    heads = [shown(Cell(head)) for head in sheet.heads]
    lines = [
        f"## {shown(Cell(sheet.title))}",
        "",
        _row(heads),
        _row(["---", *["---:"] * (len(heads) - 1)]),
    ]
    lines += [_row([shown(cell) for cell in row]) for row in sheet.rows]
    return "\n".join([*lines, "", *sheet.notes, ""])


def _latex(sheet: Sheet) -> str:
    def shown(cell: Cell) -> str:
        text = _escape(cell.text)
        text = rf"\textbf{{{text}}}" if cell.best else text
        return text + (f"$^{{{cell.marks}}}$" if cell.marks else "")

    # An empty group, because LaTeX takes a bracket or star at the start as an argument of \\.
    rows = ["{}" + " & ".join(shown(cell) for cell in row) + r" \\" for row in sheet.rows]
    return "\n".join(
        [
            f"% {_plain_line(sheet.title)}",
            "\\begin{tabular}{l" + "r" * (len(sheet.heads) - 1) + "}",
            "\\toprule",
            " & ".join(_escape(head) for head in sheet.heads) + r" \\",
            "\\midrule",
            *rows,
            "\\bottomrule",
            "\\end{tabular}",
            *(f"% {_plain_line(note)}" for note in sheet.notes),
            "",
        ]
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    special |= {"<": "$<$", ">": "$>$", "|": r"\textbar{}", "−": "$-$", "±": r"$\pm$", DASH: "--"}
    return "".join(special.get(character, character) for character in _plain_line(text))


def _plain_line(text: str) -> str:
    """Return a text as one line without control characters, which names may contain."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.9g}"

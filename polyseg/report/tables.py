"""The tables of a report about tests, from summary.json files that may be untrusted."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from polyseg.data.layouts.cases import counted
from polyseg.errors import PolysegError
from polyseg.evaluation import tables
from polyseg.evaluation.summary_records import (
    Network,
    Record,
    is_by_patient,
    mapping,
    networks,
    records,
)
from polyseg.metrics.image_metrics import METRICS
from polyseg.report.document import Table, Text
from polyseg.report.run_files import EvaluationFiles

_MOST = 200
_LONGEST = 200
_LONGEST_SENTENCE = 1000
TEST = tables.metrics_title({})


def tested(evaluation: EvaluationFiles) -> list[Network]:
    """Return the networks and labels in an evaluation's summary.

    >>> tested(EvaluationFiles("a", summary={"runs": [{"name": "last", "metrics": {}}]}))[0].title
    'a'
    """
    return networks(_summary([evaluation]))


def metric_tables(evaluations: Sequence[EvaluationFiles]) -> Iterator[Table]:
    """Yield the metrics, a table for each part and label, a column for each network or arm.

    Raises:
        PolysegError: some compared masks at the network's size, others at the images' size.
    """
    parts: dict[str, list[EvaluationFiles]] = {}
    for one in evaluations:
        parts.setdefault(tables.metrics_title(one.summary), []).append(one)
    for of_part in parts.values():
        yield from _metric_tables(of_part)


def _metric_tables(evaluations: Sequence[EvaluationFiles]) -> Iterator[Table]:
    refuse_other_sizes(evaluations)
    summary = _summary(evaluations)
    for label in dict.fromkeys(one.label for one in networks(summary)):
        runs = [one.record for one in networks(summary) if one.label == label]
        sheet = tables.metrics_sheet({**summary, "runs": runs})
        if sheet.rows:
            yield _table(sheet, f"{sheet.title} of {label}" if label else sheet.title)


def refuse_other_sizes(evaluations: Sequence[EvaluationFiles]) -> None:
    """Raise PolysegError unless all evaluations compared masks at the same kind of size."""
    names = {tables.size_of(one.summary): one.name for one in evaluations if one.summary}
    if len(names) > 1:
        raise PolysegError(
            f"report: {names['network']} has metrics at the network's size and {names['original']} "
            "at the images' own; run `polyseg evaluate` on both and give it by --evaluation, or "
            "report them separately"
        )


def conclusions(evaluation: EvaluationFiles) -> list[Text]:
    """Return the sentences on whether the adaptive loss was better, as paragraphs."""
    given = tables.conclusions_of(evaluation.summary)
    return [Text(sentence[:_LONGEST_SENTENCE]) for sentence in given[:_MOST]]


def comparison_tables(evaluation: EvaluationFiles) -> Iterator[Table]:
    """Yield a table of paired differences from the baseline for each other network."""
    for sheet in tables.comparison_sheets(_summary([evaluation]))[1]:
        yield _table(sheet, sheet.title)


def dice_comparison(evaluation: EvaluationFiles) -> Iterator[Table]:
    """Yield a table of the paired differences in Dice, if several networks are compared."""
    for sheet in tables.comparison_sheets(_summary([evaluation]))[0]:
        yield _table(sheet, sheet.title)


def further_tables(evaluation: EvaluationFiles) -> Iterator[Table]:
    """Yield the tables of strata, failures and robustness."""
    for sheet in tables.further_sheets(_summary([evaluation])):
        yield _table(sheet, f"{evaluation.name}: {sheet.title}")


def images_tested(evaluation: EvaluationFiles) -> str:
    """Return the number of test images, and that of the patients if these are the cases."""
    if tables.metrics_title(evaluation.summary) != TEST:
        return tables.DASH
    by_patient = is_by_patient(evaluation.summary)
    counts = []
    for one in tested(evaluation):
        images = number(mapping(one.record, "counts").get("images"), 0)
        patients = f" ({counted(one.patients, 'patient')})" if by_patient and one.patients else ""
        counts.append(images + patients)
    return ", ".join(dict.fromkeys(counts)) or tables.DASH


def dice_tested(evaluation: EvaluationFiles) -> str:
    """Return the mean Dice ± deviation, label by label; a dash for several networks."""
    if tables.metrics_title(evaluation.summary) != TEST:
        return tables.DASH
    summary = _summary([evaluation])
    found = networks(summary)
    if len({one.name for one in found}) != 1:
        return tables.DASH
    rows = {row[0].text: row[1:] for row in tables.metrics_sheet(summary).rows}
    title = mapping(mapping(summary, "metrics"), "dice").get("title", heading("dice"))
    cells = rows.get(str(title), [tables.Cell(tables.DASH)] * len(found))
    named = zip((one.label for one in found), cells, strict=True)
    return ", ".join(" ".join(filter(None, (label, cell.text))) for label, cell in named)


def number(value: Any, decimals: int = 3) -> str:
    """Return a number with a minus sign as a table shows it, or a dash for any other value.

    >>> number(0.12345), number(-1, 1), number(None), number(float("nan")), number("0.1")
    ('0.123', '−1.0', '–', '–', '–')
    """
    return tables.number(value, decimals, ",").replace("-", "−")


def decimals_of(key: str) -> int:
    """Return the number of decimals of a metric."""
    return METRICS[key].decimals if key in METRICS else 4


def heading(key: str) -> str:
    """Return the title of a metric or another column.

    >>> heading("hd95"), heading("mask_pixels")
    ('HD95', 'mask pixels')
    """
    return METRICS[key].title if key in METRICS else brief(key).replace("_", " ")


def brief(value: Any) -> str:
    """Return any value as text, shortened for a table."""
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _summary(evaluations: Sequence[EvaluationFiles]) -> Record:
    """Return one summary of several evaluations; a run's own network gets the run's name."""
    merged: dict[str, Any] = {"runs": [], "metrics": {}}
    for evaluation in evaluations:
        # The conclusions are paragraphs of their own.
        given = {k: one for k, one in evaluation.summary.items() if k != "conclusions"}
        found = {key: _shortened(value) for key, value in given.items()}
        entries = records(found, "runs")
        if not evaluation.compares:
            own, several = evaluation.name, len({Network(one).name for one in entries}) > 1
            names = [f"{own}: {one.get('name', '')}" if several else own for one in entries]
            pairs = zip(entries, names, strict=True)
            entries = [
                {**one, "name": name} | ({} if several else {"prediction": "plain"})
                for one, name in pairs
            ]
        metrics = {**merged["metrics"], **mapping(found, "metrics")}
        merged |= found | {"runs": [*merged["runs"], *entries], "metrics": metrics}
    return merged


def _shortened(value: Any) -> Any:
    """Return a value with its texts, lists and mappings shortened for a page."""
    if isinstance(value, dict):
        return {brief(key): _shortened(one) for key, one in list(value.items())[:_MOST]}
    if isinstance(value, list):
        return [_shortened(one) for one in value[:_MOST]]
    return value if isinstance(value, int | float | None) else brief(value)


def _table(sheet: tables.Sheet, title: str) -> Table:
    rows = [[row[0].text + row[0].marks, *map(_shown, row[1:])] for row in sheet.rows]
    return Table(" ".join([f"{title}.", *sheet.notes]), sheet.heads, rows)


def _shown(cell: tables.Cell) -> str:
    text = "\n".join(filter(None, (cell.text + cell.marks, cell.details)))
    return re.sub(r"(?<![^\s\[])-(?=\d)", "−", text)

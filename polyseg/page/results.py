"""The tables of a page about tests, from evaluation/summary.json as it stands.

The file may be of another version or a stranger's, so nothing in it is taken for granted: what is
not of the expected kind shows as a dash or does not show.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyseg.metrics import METRICS
from polyseg.page.document import Table
from polyseg.page.runfiles import RunFiles

DASH = "–"

_MOST = 200
_LONGEST = 200
_COLUMNS = {metric.key: metric for metric in METRICS}
_FINER = (
    "Below it, where the evaluation gave one, the mean's 95 % interval by bootstrap, and the "
    "number of images where some leave the metric undefined."
)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Tested:
    """What a summary says of one network and one label."""

    name: str
    label: str
    record: Record

    @property
    def metrics(self) -> Mapping[str, Record]:
        """Statistics by the key of the metric."""
        return {key: one for key, one in mapping(self.record, "metrics").items() if _is_record(one)}

    @property
    def title(self) -> str:
        """The name, with the label where there is one."""
        return f"{self.name}: {self.label}" if self.label else self.name


def tested(run: RunFiles) -> list[Tested]:
    """Return what a run's summary says of each network and label.

    >>> tested(RunFiles("a", summary={"runs": [{"name": "a", "metrics": {}}]}))[0].title
    'a'
    """
    entries = records(run.summary, "runs")
    several = len({_network(entry) for entry in entries}) > 1
    return [
        Tested(
            f"{run.name}: {_network(entry)}" if several else run.name,
            brief(entry.get("label", "")),
            entry,
        )
        for entry in entries
    ]


def metric_tables(runs: Sequence[RunFiles]) -> Iterator[Table]:
    """Yield the test metrics, a table a label and a column a run."""
    titles = _titles(runs)
    everything = [one for run in runs for one in tested(run)]
    for label in dict.fromkeys(one.label for one in everything):
        columns = [one for one in everything if one.label == label]
        keys = list(dict.fromkeys(key for one in columns for key in one.metrics))[:_MOST]
        rows = [[_title(key, titles), *(_spread(one, key) for one in columns)] for key in keys]
        if rows:
            of = f" of {label}" if label else ""
            caption = f"Test metrics{of}: mean ± standard deviation over the images. {_FINER}"
            yield Table(caption, ["metric", *(one.name for one in columns)], rows)


def further_tables(run: RunFiles) -> Iterator[Table]:
    """Yield what else a run's evaluation found: comparisons, strata, failures, robustness."""
    yield from _comparisons(run)
    yield from _strata(run)
    yield from _failures(run)
    yield from _robustness(run)


def images_tested(run: RunFiles) -> str:
    """Return how many images a run was tested on."""
    counts = (mapping(one.record, "counts").get("images") for one in tested(run))
    return ", ".join(dict.fromkeys(number(count, 0) for count in counts)) or DASH


def dice_tested(run: RunFiles) -> str:
    """Return a run's mean test Dice ± deviation, label by label; of several networks none."""
    entries = tested(run)
    if len({one.name for one in entries}) != 1:
        return DASH
    spreads = (_spread(one, "dice").partition("\n")[0] for one in entries)
    named = zip((one.label for one in entries), spreads, strict=True)
    return ", ".join(" ".join(filter(None, one)) for one in named)


def number(value: Any, decimals: int = 3, *, sign: bool = False) -> str:
    """Return a number of a file, which may be anything, as a table shows it.

    >>> number(0.12345), number(-1, 1), number(None), number(float("nan")), number("0.1")
    ('0.123', '−1.0', '–', '–', '–')
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return DASH
    form = f"{'+' if sign else ''},.{decimals}f" if abs(value) < 1e9 else ".3g"
    return f"{value:{form}}".replace("-", "−")


def decimals_of(key: str) -> int:
    """Return how many decimals a metric is shown with."""
    return _COLUMNS[key].decimals if key in _COLUMNS else 4


def heading(key: str) -> str:
    """Return what a metric or another column is called.

    >>> heading("hd95"), heading("mask_pixels")
    ('HD95', 'mask pixels')
    """
    return _COLUMNS[key].title if key in _COLUMNS else brief(key).replace("_", " ")


def brief(value: Any) -> str:
    """Return any value as text of a length that a table can hold."""
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def mapping(record: Record, key: str) -> Record:
    """Return the mapping under a key, an empty one where there is none."""
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def records(record: Record, key: str) -> list[Record]:
    """Return the list of mappings under a key, an empty one where there is none."""
    found = record.get(key)
    return [one for one in found if _is_record(one)][:_MOST] if isinstance(found, list) else []


def _is_record(value: Any) -> bool:
    return isinstance(value, dict)


def _network(entry: Record) -> str:
    name = brief(entry.get("name", ""))
    return f"{name} (MC mean)" if entry.get("prediction") == "mc_mean" else name


def _titles(runs: Sequence[RunFiles]) -> dict[str, str]:
    """Return the titles that the files themselves give."""
    return {
        key: brief(one["title"])
        for run in runs
        for key, one in mapping(run.summary, "metrics").items()
        if _is_record(one) and "title" in one
    }


def _title(key: str, titles: Mapping[str, str]) -> str:
    return titles.get(key, heading(key))


def _spread(one: Tested, key: str) -> str:
    statistics, decimals = one.metrics.get(key, {}), decimals_of(key)
    cell = number(statistics.get("mean"), decimals)
    if (deviation := number(statistics.get("deviation"), decimals)) != DASH:
        cell += f" ± {deviation}"
    finer = []
    if (interval := _interval(statistics, decimals)) != DASH:
        finer.append(interval)
    images = mapping(one.record, "counts").get("images")
    if images is not None and statistics.get("n", images) != images:
        finer.append(f"n = {number(statistics['n'], 0)}")
    return "\n".join([cell, ", ".join(finer)] if finer else [cell])


def _interval(statistics: Record, decimals: int, *, sign: bool = False) -> str:
    low, high = (number(statistics.get(end), decimals, sign=sign) for end in ("low", "high"))
    return DASH if DASH in (low, high) else f"{low} to {high}"


def _comparisons(run: RunFiles) -> Iterator[Table]:
    titles = _titles([run])
    head = ["metric", "images", "difference", "95 % interval", "better", "worse", "equal"]
    for one in records(run.summary, "comparisons"):
        rows = [
            [
                _title(key, titles),
                number(found.get("images"), 0),
                number(found.get("mean"), decimals_of(key) + 1, sign=True),
                _interval(found, decimals_of(key) + 1, sign=True),
                *(number(found.get(name), 0) for name in ("better", "worse", "equal")),
                *(_p_value(found.get(name)) for name in ("p_value", "adjusted")),
            ]
            for key, found in mapping(one, "metrics").items()
            if _is_record(found)
        ]
        of = f", {brief(one['label'])}" if "label" in one else ""
        yield Table(
            f"{brief(one.get('run', DASH))} against {brief(one.get('baseline', DASH))}{of}: "
            "differences image by image, their mean with an interval by bootstrap, and Wilcoxon's "
            "signed-rank test, two-sided, adjusted by Holm's method over the runs compared.",
            [*head, "p", "p (Holm)"],
            rows[:_MOST],
        )


def _p_value(value: Any) -> str:
    shown = number(value)
    return "< 0.001" if shown == "0.000" and value < 0.0005 else shown


def _strata(run: RunFiles) -> Iterator[Table]:
    for by, of in (("size", "of the mask's size"), ("difficulty", "of difficulty")):
        parts = {
            one.title: [part for part in records(one.record, "strata") if part.get("by") == by]
            for one in tested(run)
        }
        names = list(
            dict.fromkeys(brief(p.get("name", "")) for part in parts.values() for p in part)
        )
        rows = [
            [title, *(_stratum(part, name) for name in names)]
            for title, part in parts.items()
            if part
        ]
        if rows:
            yield Table(f"{run.name}: Dice in thirds {of}.", ["run", *names], rows)


def _stratum(parts: Sequence[Record], name: str) -> str:
    part = next((one for one in parts if brief(one.get("name", "")) == name), {})
    dice = number(mapping(part, "means").get("dice"))
    return f"{dice}\n{number(part.get('images'), 0)} images"


def _failures(run: RunFiles) -> Iterator[Table]:
    columns = {"failed": 0, "auroc": 3, "aurc": 3, "excess_aurc": 3, "spearman": 2}
    rows = [
        [
            one.title,
            heading(str(found.get("uncertainty", DASH))),
            *(number(found.get(key), decimals) for key, decimals in columns.items()),
        ]
        for one in tested(run)
        for found in records(one.record, "failure_detection")
    ]
    if rows:
        limit = number(run.summary.get("failure_dice"), 2)
        yield Table(
            f"{run.name}: does the uncertainty find the images that are segmented badly? Failed "
            f"are those of Dice below {limit}; the risk is 1 − Dice.",
            ["run", "uncertainty", "failed", "AUROC", "AURC", "E-AURC", "ρ with 1 − Dice"],
            rows[:_MOST],
        )


def _robustness(run: RunFiles) -> Iterator[Table]:
    points = records(run.summary, "robustness")
    strengths = list(dict.fromkeys(number(one.get("strength"), 0) for one in points))
    dice = {
        (
            brief(one.get("corruption", "")),
            brief(one.get("run", "")),
            number(one.get("strength"), 0),
        ): number(mapping(one, "metrics").get("dice"))
        for one in points
    }
    lines = dict.fromkeys((corruption, name) for corruption, name, _ in dice)
    rows = [[*line, *(dice.get((*line, one), DASH) for one in strengths)] for line in lines]
    if rows:
        head = ["damage", "run", *(f"strength {one}" for one in strengths)]
        yield Table(f"{run.name}: Dice on images that were damaged on purpose.", head, rows)

"""The tables of a page about tests, from the summary.json of evaluations as it stands.

The file may be of another version or a stranger's, so nothing in it is taken for granted: what is
not of the expected kind shows as a dash or does not show.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyseg.evaluation.tables import p_text
from polyseg.metrics.image_metrics import METRICS
from polyseg.report.document import Table
from polyseg.report.run_files import EvaluationFiles

DASH = "–"

_MOST = 200
_LONGEST = 200
_COLUMNS = {metric.key: metric for metric in METRICS}
_FINER = (
    "Below it, where the evaluation gave one, the mean's 95 % interval by bootstrap, and the "
    "number of images where some leave the metric undefined."
)
_OF_ARMS = " (each its mean over an arm's runs), in brackets that of the means over the seeds"

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
    def runs(self) -> str:
        """How many runs there are in the arm, in words; nothing of a single run."""
        members = self.record.get("members")
        count = len(members) if isinstance(members, list) else 0
        return f"{count} run{'' if count == 1 else 's'}" if count else ""

    @property
    def title(self) -> str:
        """The name, with the label where there is one."""
        return f"{self.name}: {self.label}" if self.label else self.name


def tested(evaluation: EvaluationFiles) -> list[Tested]:
    """Return what a summary says of each network and label.

    >>> tested(EvaluationFiles("a", summary={"runs": [{"name": "last", "metrics": {}}]}))[0].title
    'a'
    """
    entries = records(evaluation.summary, "runs")
    networks = [_network(entry) for entry in entries]
    if not evaluation.compares:
        several = len(set(networks)) > 1
        own = evaluation.name
        networks = [f"{own}: {network}" if several else own for network in networks]
    return [
        Tested(network, brief(entry.get("label", "")), entry)
        for network, entry in zip(networks, entries, strict=True)
    ]


def metric_tables(evaluations: Sequence[EvaluationFiles]) -> Iterator[Table]:
    """Yield the test metrics, a table a label and a column a network or arm."""
    titles = _titles(evaluations)
    everything = [one for evaluation in evaluations for one in tested(evaluation)]
    for label in dict.fromkeys(one.label for one in everything):
        columns = [one for one in everything if one.label == label]
        keys = list(dict.fromkeys(key for one in columns for key in one.metrics))[:_MOST]
        rows = [[_title(key, titles), *(_spread(one, key) for one in columns)] for key in keys]
        if rows:
            of = f" of {label}" if label else ""
            arms = any(one.runs for one in columns)
            spread = "mean ± standard deviation over the images" + (_OF_ARMS if arms else "")
            heads = [f"{one.name} ({one.runs})" if one.runs else one.name for one in columns]
            yield Table(f"Test metrics{of}: {spread}. {_FINER}", ["metric", *heads], rows)


def comparison_tables(evaluation: EvaluationFiles) -> Iterator[Table]:
    """Yield the paired differences to the baseline, a table for each that is compared with it."""
    titles = _titles([evaluation])
    for one in records(evaluation.summary, "comparisons"):
        found = {k: v for k, v in mapping(one, "metrics").items() if _is_record(v)}
        several = _over_runs(found.values())
        rows = [
            [_title(key, titles), *_difference(record, key, several=several)]
            for key, record in list(found.items())[:_MOST]
        ]
        head = ["metric", *_difference_heads(several)]
        yield Table(f"{_compared(one)}: {_meaning(several)}", head, rows)


def dice_comparison(evaluation: EvaluationFiles) -> Iterator[Table]:
    """Yield the paired differences in Dice alone, a row each, where several are compared."""
    found = [
        (_compared(one), record)
        for one in records(evaluation.summary, "comparisons")
        if (record := mapping(mapping(one, "metrics"), "dice"))
    ]
    if len(found) > 1:
        several = _over_runs(record for _, record in found)
        rows = [[name, *_difference(record, "dice", several=several)] for name, record in found]
        yield Table(f"Dice: {_meaning(several)}", ["compared", *_difference_heads(several)], rows)


def further_tables(evaluation: EvaluationFiles) -> Iterator[Table]:
    """Yield what else an evaluation found: strata, failures, robustness."""
    yield from _strata(evaluation)
    yield from _failures(evaluation)
    yield from _robustness(evaluation)


def rules(evaluations: Iterable[EvaluationFiles]) -> list[str]:
    """Return what the evaluations say of how empty cases count, each rule once."""
    return list(
        dict.fromkeys(str(one.summary["rule"]) for one in evaluations if "rule" in one.summary)
    )


def images_tested(evaluation: EvaluationFiles) -> str:
    """Return how many images there were."""
    counts = (mapping(one.record, "counts").get("images") for one in tested(evaluation))
    return ", ".join(dict.fromkeys(number(count, 0) for count in counts)) or DASH


def dice_tested(evaluation: EvaluationFiles) -> str:
    """Return the mean Dice ± deviation, label by label; of several networks none."""
    entries = tested(evaluation)
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


def _titles(evaluations: Sequence[EvaluationFiles]) -> dict[str, str]:
    """Return the titles that the files themselves give."""
    return {
        key: brief(one["title"])
        for evaluation in evaluations
        for key, one in mapping(evaluation.summary, "metrics").items()
        if _is_record(one) and "title" in one
    }


def _title(key: str, titles: Mapping[str, str]) -> str:
    return titles.get(key, heading(key))


def _spread(one: Tested, key: str) -> str:
    statistics, decimals = one.metrics.get(key, {}), decimals_of(key)
    cell = number(statistics.get("mean"), decimals)
    if (deviation := number(statistics.get("deviation"), decimals)) != DASH:
        cell += f" ± {deviation}"
    if (seeds := number(statistics.get("seed_deviation"), decimals)) != DASH:
        cell += f" ({seeds})"
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


def _compared(one: Record) -> str:
    return f"{brief(one.get('run', DASH))} against {brief(one.get('baseline', DASH))}"


def _over_runs(found: Iterable[Record]) -> bool:
    """Return whether arms of several runs were compared, run by run of equal seed and fold."""
    return any(number(one.get("p_over_runs")) != DASH for one in found)


def _difference_heads(several: bool) -> list[str]:
    over_runs = ["pairs of runs", "over runs", "p (runs)"] if several else []
    head = ["images", "difference", "95 % interval", "better", "worse", "equal", "p"]
    return [*head, *over_runs, "p (Holm)"]


def _difference(found: Record, key: str, *, several: bool) -> list[str]:
    decimals = decimals_of(key) + 1
    cells = [
        number(found.get("images"), 0),
        number(found.get("mean"), decimals, sign=True),
        _interval(found, decimals, sign=True),
        *(number(found.get(name), 0) for name in ("better", "worse", "equal")),
        _p_value(found.get("p_value")),
    ]
    if several:
        deviation = number(found.get("deviation_over_runs"), decimals)
        cells += [number(found.get("runs"), 0), deviation, _p_value(found.get("p_over_runs"))]
    return [*cells, _p_value(found.get("adjusted"))]


def _meaning(several: bool) -> str:
    paired = (
        "differences image by image, their mean with an interval by bootstrap, the number of "
        "images that are better, worse and equal, and Wilcoxon's signed-rank test, two-sided"
    )
    over_runs = (
        "; over runs: the standard deviation of the differences of runs with equal seed and fold, "
        "and the p of their paired t-test"
    )
    larger = "larger p" if several else "p"
    holm = f"; the {larger} adjusted by Holm's method over the runs compared in a metric."
    return paired + (over_runs if several else "") + holm


def _p_value(value: Any) -> str:
    return DASH if number(value) == DASH else p_text(value)


def _strata(evaluation: EvaluationFiles) -> Iterator[Table]:
    networks = tested(evaluation)
    to = f" to {networks[0].name}" if len(networks) > 1 else ""
    for by, of in (("size", "of the mask's size"), ("difficulty", f"of difficulty{to}")):
        parts = {
            one.title: [part for part in records(one.record, "strata") if part.get("by") == by]
            for one in networks
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
            yield Table(f"{evaluation.name}: Dice in thirds {of}.", ["run", *names], rows)


def _stratum(parts: Sequence[Record], name: str) -> str:
    part = next((one for one in parts if brief(one.get("name", "")) == name), {})
    dice = number(mapping(part, "means").get("dice"))
    return f"{dice}\n{number(part.get('images'), 0)} images"


def _failures(evaluation: EvaluationFiles) -> Iterator[Table]:
    columns = {"failed": 0, "auroc": 3, "aurc": 3, "excess_aurc": 3, "spearman": 2}
    rows = [
        [
            one.title,
            heading(str(found.get("uncertainty", DASH))),
            *(number(found.get(key), decimals) for key, decimals in columns.items()),
        ]
        for one in tested(evaluation)
        for found in records(one.record, "failure_detection")
    ]
    if rows:
        limit = number(evaluation.summary.get("failure_dice"), 2)
        yield Table(
            f"{evaluation.name}: does the uncertainty find the images that are segmented badly? "
            f"Failed are those of Dice below {limit}; the risk is 1 − Dice.",
            ["run", "uncertainty", "failed", "AUROC", "AURC", "E-AURC", "ρ with 1 − Dice"],
            rows[:_MOST],
        )


def _robustness(evaluation: EvaluationFiles) -> Iterator[Table]:
    points = records(evaluation.summary, "robustness")
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
        yield Table(f"{evaluation.name}: Dice on images that were damaged on purpose.", head, rows)

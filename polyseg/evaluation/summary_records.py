"""Read the records in an evaluation's summary.json.

The summary may come from another version or be damaged: a missing value, or one of another type,
is left out, or becomes NaN, 0 or an empty record.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyseg.metrics.image_metrics import METRICS

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Network:
    """The record of one network, or arm of several, and one label in a summary."""

    record: Record

    @property
    def name(self) -> str:
        """The name, with the kind of prediction."""
        name = str(self.record.get("name", ""))
        return f"{name} (MC mean)" if self.record.get("prediction") == "mc_mean" else name

    @property
    def label(self) -> str:
        """The label, empty if the network has only one."""
        return str(self.record.get("label", ""))

    @property
    def title(self) -> str:
        """The name that tables show."""
        return f"{self.name}: {self.label}" if self.label else self.name

    @property
    def patients(self) -> int:
        """Number of patients; 0 if none are known."""
        return whole(self.record.get("patients"))

    @property
    def images(self) -> int:
        """Number of images."""
        return whole(mapping(self.record, "counts").get("images"))

    def statistics(self, key: str) -> Record:
        """Return mean, deviation and so on of a metric."""
        return metric_values(self.record, key)

    def mean(self, key: str) -> float:
        """Return the mean of a metric; NaN if it is undefined."""
        return real(self.statistics(key).get("mean"))


@dataclass(frozen=True)
class SummaryMetric:
    """A metric of a summary, which may be unknown to this version."""

    key: str
    title: str
    decimals: int
    higher_is_better: Any


def networks(summary: Record) -> list[Network]:
    """Return the record of each network and label in a summary."""
    return [Network(entry) for entry in records(summary, "runs")]


def mapping(record: Record, key: str) -> Record:
    """Return the mapping under a key, or an empty one."""
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def records(record: Record, key: str) -> list[Record]:
    """Return the mappings of the list under a key, or an empty list."""
    found = record.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def metrics_of(summary: Record, keys: Sequence[str]) -> list[SummaryMetric]:
    """Return the metrics of these keys, with the titles that the summary gives them."""
    titles = mapping(summary, "metrics")
    found = []
    for key in keys:
        known, given = METRICS.get(key), mapping(titles, key)
        title = str(given.get("title", known.title if known else key.replace("_", " ")))
        better = given.get("higher_is_better", known.higher_is_better if known else None)
        found.append(SummaryMetric(key, title, known.decimals if known else 4, better))
    return found


def is_by_patient(summary: Record) -> bool:
    """Return whether the cases of an evaluation are patients, not images."""
    return summary.get("by") == "patient"


def metric_values(record: Record, key: str) -> Record:
    """Return the values of a metric in the record of a network or a comparison."""
    return mapping(mapping(record, "metrics"), key)


def real(value: Any) -> float:
    """Return a value as a float, NaN if a table cannot show it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else math.nan


def whole(value: Any) -> int:
    """Return a value as an integer, 0 if it is no number."""
    found = real(value)
    return 0 if math.isnan(found) else int(found)

"""Analyse the difficulties and epsilons that a run recorded, and recompute them by other settings.

Everything is computed from records, without a network. With several labels every row of a table
belongs to an image and a label.
"""

import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseg.adaptive.controller import EpsilonControl, Recorder, normalised_by
from polyseg.adaptive.replay import arm_of_difficulty, mask_sizes, replay_arm
from polyseg.config import Config, build_config
from polyseg.data.order import epoch_order
from polyseg.difficulty import FALLBACKS, percentile_and_sigma
from polyseg.errors import PolysegError
from polyseg.metrics.rank_stability import partial_spearman, spearman
from polyseg.metrics.significance import rank_correlation
from polyseg.records import Assessment, Metric, Schedule
from polyseg.system.files import csv_table
from polyseg.system.yaml import parse_yaml

Values = NDArray[np.float64]
Row = dict[str, Any]
"""A row of a table: text, integers, and floats that are NaN where they are undefined."""

QUANTILES = (5, 50, 95)
MEASURES = ("with_error", "with_size", "with_error_given_size", "with_previous")
"""Spearman's correlations that `validity` returns for each score."""

_EXTREMES = 3
_FEWEST = 4
"""Smallest number of images for which a correlation is computed."""
_CHANGEABLE = (
    *(f"control.{name}" for name in ("reduction", "map", "percentile", "sensitivity")),
    *(f"control.{name}" for name in ("epsilon_min", "epsilon_max")),
    *(f"control.{name}" for name in ("statistics", "delta", "every", "start")),
    *(f"control.{name}" for name in ("replay_arm", "replay_seed")),
    "uncertainty.metric",
    "loss.epsilon",
)


@dataclass(frozen=True)
class RunRecord:
    """The committed assessments and schedule of a run.

    The rows of the assessments and the columns of the schedule are in the same order.
    """

    name: str
    config: Config
    assessments: Sequence[Assessment]
    """At least one assessment, in the order of epochs."""
    schedule: Schedule
    """The epochs from 1 to the last committed one."""
    wrong_sign: Values
    """Share of the images of each epoch whose loss rose with s, over all labels, (E,)."""

    @property
    def labels(self) -> list[str]:
        """The names of the labels, "" for a single one."""
        return self.assessments[0].label_names

    def of_label(self, label: str) -> "RunRecord":
        """Return the record of one label."""
        return replace(
            self,
            assessments=[assessment.of_label(label) for assessment in self.assessments],
            schedule=self.schedule.of_label(label),
        )

    def fed(self, k: int) -> NDArray[np.bool_]:
        """Return which epochs of the schedule use assessment k, (E,)."""
        epochs = self.schedule.epochs
        after = self.assessments[k].epoch < epochs
        if k + 1 == len(self.assessments):
            return after
        return after & (epochs <= self.assessments[k + 1].epoch)

    def next_epsilon(self, k: int) -> Values:
        """Return the epsilons of the epoch after assessment k, (n,), NaN without such an epoch."""
        met = self.schedule.epsilon[self.fed(k)].astype(np.float64)
        return met[0] if len(met) else np.full(len(self.schedule.ids), math.nan)

    def next_statistics(self, k: int) -> Values:
        """Return D_pct and sigma_D behind the epsilons of `next_epsilon`, (n, 2), or NaN."""
        met = self.schedule.percentile_and_sigma()[self.fed(k)]
        return met[0] if len(met) else np.full((len(self.schedule.ids), 2), math.nan)

    def next_normalised(self, k: int) -> Values:
        """Return D_norm behind the epsilons of `next_epsilon`, (n,), or NaN; for one label."""
        fed = self.fed(k)
        nothing = np.full(len(self.schedule.ids), math.nan)
        return self.normalised(k, int(fed.argmax())) if fed.any() else nothing

    def normalised(self, k: int, row: int) -> Values:
        """Return D_norm of assessment k in a row of the schedule, (n,), or NaN; for one label."""
        normalised = np.full(len(self.schedule.ids), math.nan)
        group, statistics = self.schedule.group, self.schedule.statistics
        if group is None or statistics is None:
            return normalised
        for found in set(group[row].tolist()) - {-1}:
            together = group[row] == found
            difficulty = self.assessments[k].difficulty[together]
            normalised[together] = normalised_by(difficulty, statistics[found], self.config.control)
        return normalised


def overview(record: RunRecord) -> list[Row]:
    """Return a row for each assessment and label: the distribution and stability of D and epsilon.

    `difficulty_percentile` is D_pct and `sigma` sigma_D of eq. 11 over all images. `epsilon_...`
    are quantiles in the next epoch; `spearman_previous` is the correlation of D with D of the
    previous assessment; `wrong_sign_share` is over the epochs that used the assessment.
    """
    parts = list(_by_label(record))
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
        near = difflib.get_close_matches(identity, dict.fromkeys(record.schedule.ids), n=1)
        hint = f"did you mean {near[0]}?" if near else "`polyseg schedule export` lists them"
        raise PolysegError(f"--image {identity}: not a training image of {record.name}; {hint}")
    rows = []
    parts = list(_by_label(record))
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
    parts = list(_by_label(record))
    rows = []
    for k in range(len(record.assessments)):
        tables = [_columns(part, k, own) for own, part in parts]
        for i in range(len(tables[0]["id"])):
            rows += [{name: column[i] for name, column in table.items()} for table in tables]
    return rows


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
    parts = list(_by_label(record))
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
        "many passes (expected)": np.array([_rank_stability(one) for one in record.assessments]),
    }


def changed_settings(config: Config, overrides: Sequence[str]) -> Config:
    """Return a run's settings with changes to those that compute epsilon from a recorded D.

    `overrides` are such as "control.sensitivity=2", with YAML values. A setting that cannot be
    changed, or a value out of bounds, raises PolysegError.

    >>> changed_settings(Config(), ["control.sensitivity=2"]).control.sensitivity
    2.0
    """
    tree = config.model_dump(mode="json")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise PolysegError(f"--set {override}: write KEY=VALUE, such as control.delta=1e-6")
        if key.strip() not in _CHANGEABLE:
            raise PolysegError(
                f"--set {key}: schedule recompute can change only {', '.join(_CHANGEABLE)}"
            )
        section, _, name = key.strip().partition(".")
        tree[section][name] = parse_yaml(value, f"--set {override}")
    return build_config(tree, "--set")


def recompute(record: RunRecord, config: Config) -> Schedule:
    """Return the schedule that settings from `changed_settings` give for the recorded difficulties.

    The run's own settings give its own schedule, bit by bit on the same machine. Other settings
    give no forecast, because training with them would lead to other difficulties. A score or an
    assessment that they need and that was not recorded raises PolysegError.
    """
    arm, seed = "recorded", replay_seed(config)
    if config.control.replay_arm != record.config.control.replay_arm:
        arm = config.control.replay_arm
    return replay_arm(arm_schedule(record, config, arm), arm, seed)


def arm_schedule(
    record: RunRecord, config: Config, arm: str, ids: Sequence[str] | None = None
) -> Schedule:
    """Return the schedule that follows from the recorded D, or from the D of a replay arm.

    Arms that change epsilons are treated as "recorded". `ids` are the training images, if not all
    of the record or in another order. A score or an assessment that the settings need and that was
    not recorded raises PolysegError.
    """
    images = list(dict.fromkeys(record.schedule.ids)) if ids is None else list(ids)
    constant = EpsilonControl(config.control, config.loss.epsilon, labels=len(record.labels))
    controls = {-1: constant}
    for assessment in _needed_assessments(record, config):
        own = arm_of_difficulty(assessment.in_order(images), arm, replay_seed(config))
        controls[assessment.epoch] = replace(constant, assessment=own)
    epochs = record.schedule.epochs
    assessed = [max(e for e in controls if e < epoch) for epoch in epochs]
    recorder = Recorder(images, len(record.labels))
    for epoch, moment in zip(epochs.tolist(), assessed, strict=True):
        order = epoch_order(
            images, batch_size=config.training.batch_size, seed=config.training.seed, epoch=epoch
        )
        recorder.add((names, controls[moment].adapt(names)) for names in order)
    labels = record.labels * len(images) if record.schedule.labels else None
    return Schedule(
        ids=[identity for identity in images for _ in record.labels],
        epochs=epochs,
        labels=labels,
        assessed=np.array(assessed, dtype=np.int64),
        **recorder.columns(),
    )


def compare(record: RunRecord, recomputed: Schedule) -> list[Row]:
    """Return how a recomputed schedule differs, with a row for each period between assessments.

    `spearman` is over all images and epochs of the period; `raised_share` is the share of them with
    a larger epsilon.
    """
    moments = [assessment.epoch for assessment in record.assessments]
    epochs = record.schedule.epochs
    periods = np.split(np.arange(len(epochs)), np.searchsorted(epochs, moments, side="right"))
    parts = list(_by_label(record))
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


def correlation(first: Values, second: Values) -> float:
    """Return Spearman's correlation if at least 4 images have both values, else NaN.

    >>> correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))
    nan
    """
    known = np.isfinite(first) & np.isfinite(second)
    return spearman(first[known], second[known]) if known.sum() >= _FEWEST else math.nan


def replay_seed(config: Config) -> int:
    """Return the random seed of replay arms."""
    own = config.control.replay_seed
    return config.training.seed if own is None else own


def _by_label(record: RunRecord) -> Iterator[tuple[Row, RunRecord]]:
    """Yield the label column of a table, empty for a single label, and the record of each label."""
    for label in record.labels:
        yield ({"label": label} if label else {}), record.of_label(label)


def _rank_stability(assessment: Assessment) -> float:
    return assessment.rank_stability.get(assessment.metric, math.nan)


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
        "rank_stability": _rank_stability(assessment),
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


def _validity(part: RunRecord, k: int, name: Metric) -> Row:
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
    part: RunRecord, k: int, name: Metric, unseen: Mapping[tuple[str, str], float], label: str
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


def _needed_assessments(record: RunRecord, config: Config) -> Iterator[Assessment]:
    """Yield the assessments that epochs use by the settings, with the chosen score as D."""
    recorded = {assessment.epoch: assessment for assessment in record.assessments}
    metric = config.uncertainty.metric
    for epoch in config.control.assessment_epochs(config.training.epochs):
        if epoch >= len(record.schedule.epochs):
            return  # No epoch uses it.
        if epoch not in recorded:
            raise PolysegError(
                f"control.start and control.every: {record.name} was not assessed after epoch "
                f"{epoch}, only after {', '.join(map(str, recorded))}"
            )
        if metric not in recorded[epoch].scores:
            raise PolysegError(
                f"uncertainty.metric {metric}: {record.name} did not record it; choose "
                f"{', '.join(recorded[epoch].scores)}"
            )
        yield replace(recorded[epoch], metric=metric)


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

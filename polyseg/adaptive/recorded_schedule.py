"""What a run's record says of difficulty and epsilon, and what other settings would have made.

Everything here is worked out from records; no network is needed. With several labels every row is
one of an image and a label.
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
from polyseg.difficulty import FALLBACKS
from polyseg.errors import PolysegError
from polyseg.metrics.rank_stability import partial_spearman, spearman
from polyseg.metrics.significance import rank_correlation
from polyseg.records import Assessment, Metric, Schedule
from polyseg.system.files import csv_table
from polyseg.system.yaml import parse_yaml

Values = NDArray[np.float64]
Row = dict[str, Any]
"""A row of a table: words, whole numbers, and numbers that are NaN where they have no meaning."""

QUANTILES = (5, 50, 95)
MEASURES = ("with_error", "with_size", "with_error_given_size", "with_previous")
"""What `validity` tells of a score: Spearman's correlations."""

_EXTREMES = 3
_FEWEST = 4
"""Images from which a correlation means anything."""
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
    """What a run has committed of its schedule.

    The rows of the assessments and the columns of the schedule are the same images, in one order.
    """

    name: str
    config: Config
    assessments: Sequence[Assessment]
    """At least one, by epoch."""
    schedule: Schedule
    """Of the epochs 1 to the last that was committed."""
    wrong_sign: Values
    """(E,) the share of the losses of an epoch that fell as s grew; over all labels."""

    @property
    def labels(self) -> list[str]:
        """The labels, "" for a single one."""
        return self.assessments[0].label_names

    def of_label(self, label: str) -> "RunRecord":
        """Return the record of one label."""
        return replace(
            self,
            assessments=[assessment.of_label(label) for assessment in self.assessments],
            schedule=_of_label(self.schedule, label),
        )

    def fed(self, k: int) -> NDArray[np.bool_]:
        """Return which epochs of the schedule, (E,), go by assessment k."""
        epochs = self.schedule.epochs
        after = self.assessments[k].epoch < epochs
        if k + 1 == len(self.assessments):
            return after
        return after & (epochs <= self.assessments[k + 1].epoch)

    def next_epsilon(self, k: int) -> Values:
        """Return the epsilons of the epoch after assessment k, (n,), NaN where none followed."""
        met = self.schedule.epsilon[self.fed(k)].astype(np.float64)
        return met[0] if len(met) else np.full(len(self.schedule.ids), math.nan)

    def next_statistics(self, k: int) -> Values:
        """Return the D_pct and sigma_D that those epsilons follow from, (n, 2), or NaN."""
        met = self.schedule.percentile_and_sigma()[self.fed(k)]
        return met[0] if len(met) else np.full((len(self.schedule.ids), 2), math.nan)

    def next_normalised(self, k: int) -> Values:
        """Return the normalised difficulties that they follow from, (n,), or NaN; of one label."""
        normalised = np.full(len(self.schedule.ids), math.nan)
        if self.fed(k).any() and self.schedule.group is not None:
            epoch = int(self.fed(k).argmax())
            for group in np.unique(self.schedule.group[epoch]):
                together = self.schedule.group[epoch] == group
                normalised[together] = self._normalised(k, epoch, together)
        return normalised

    def normalised_of(self, k: int, epoch: int, i: int) -> float:
        """Return the normalised difficulty that image i had in a row of the schedule, or NaN."""
        if self.schedule.group is None:
            return math.nan
        together = self.schedule.group[epoch] == self.schedule.group[epoch, i]
        return float(self._normalised(k, epoch, together)[together[:i].sum()])

    def _normalised(self, k: int, epoch: int, together: NDArray[np.bool_]) -> Values:
        """Return those of the images that were normalised together."""
        difficulty = self.assessments[k].difficulty[together]
        statistics = self.schedule.percentile_and_sigma()[epoch, together][0]
        if not np.isfinite(statistics).all():
            return np.full(len(difficulty), math.nan)
        return normalised_by(difficulty, statistics, self.config.control)


def overview(record: RunRecord) -> list[Row]:
    """Return a row for each assessment and label: how D and epsilon spread, and whether D stays.

    `difficulty_percentile` is D_pct and `sigma` sigma_D, of eq. 11 over all images. `epsilon_...`
    are quantiles of the epoch after; `spearman_previous` is the correlation of D with that of the
    assessment before; `wrong_sign_share` is of the epochs that went by the assessment.
    """
    parts = list(_by_label(record))
    return [
        {"epoch": assessment.epoch, **own, **_overview(part, k)}
        for k, assessment in enumerate(record.assessments)
        for own, part in parts
    ]


def image_history(record: RunRecord, identity: str) -> list[Row]:
    """Return what each assessment said of one image, and how its epsilons follow from that.

    A row for each label and each stretch of epochs with the same statistics in eq. 11: with those
    of the batch that is an epoch, with those of the data set all epochs until the next assessment.
    An assessment that no epoch followed has a row without them. Where statistics were not recorded
    they are NaN, and `epsilon` is that of the first epoch after the assessment.
    `rank` is 1 for the largest D, and equal ones share the lowest of their ranks;
    `percentile` is the share of the images, in percent, with smaller D, equal ones counted half.

    Raises:
        PolysegError: the run does not train on such an image.
    """
    if identity not in record.schedule.ids:
        near = difflib.get_close_matches(identity, dict.fromkeys(record.schedule.ids), n=1)
        hint = f"did you mean {near[0]}?" if near else "`polyseg schedule export` lists them"
        raise PolysegError(f"--image {identity}: is no training image of {record.name}; {hint}")
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
            rows += [row | stretch for stretch in _stretches(part, k, i)]
    return rows


def tidy(record: RunRecord) -> list[Row]:
    """Return a row for each assessment, image and label.

    `epsilon` is what the image met in the epoch after; `difficulty_percentile` and `sigma` are the
    D_pct and sigma_D that it follows from, and `normalised` is eq. 11 by them. They are NaN where
    no epoch followed, and all but `epsilon` where they were not recorded.
    """
    parts = list(_by_label(record))
    rows = []
    for k in range(len(record.assessments)):
        tables = [_columns(part, k, own) for own, part in parts]
        for i in range(len(tables[0]["id"])):
            rows += [{name: column[i] for name, column in table.items()} for table in tables]
    return rows


def validity(record: RunRecord, unseen: Mapping[tuple[str, str], float] | None = None) -> list[Row]:
    """Return for each assessment, label and recorded score whether it means difficulty.

    `with_error` is Spearman's correlation with 1 - Dice, `with_size` that with the pixels of the
    mask, `with_error_given_size` the partial one with 1 - Dice given the size, and `with_previous`
    that with the same score at the assessment before. With fewer than 4 images they are NaN.

    Args:
        record: of the run.
        unseen: 1 - Dice by (id, label), of networks that had not seen the image. With it each row
            has `with_unseen_error`, Spearman's correlation with these errors, the `_low` and
            `_high` ends of its 95 % interval over the images, and `_given_size`, the partial
            correlation given the size.
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
    """Return a row for each score and label: each measure at the last assessment, and on average.

    The average leaves out the assessments at which the measure is NaN.

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
    """Return what `validity` found of a label as curves: measure to score to values, (epochs,).

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
    """Return how the order of the images lasts, for a record of one label, (assessments,) each.

    Spearman's correlation of D with the assessment before and with the last one, and the rank
    stability that the passes of each assessment promise.
    """
    difficulties = [assessment.difficulty for assessment in record.assessments]
    last = [correlation(one, difficulties[-1]) for one in difficulties[:-1]]
    return {
        "previous assessment": np.array(
            [math.nan, *map(correlation, difficulties[1:], difficulties[:-1])]
        ),
        "last assessment": np.array([*last, math.nan]),
        "endless passes (expected)": np.array([_rank_stability(a) for a in record.assessments]),
    }


def changed_settings(config: Config, overrides: Sequence[str]) -> Config:
    """Return a run's settings with those changed that turn a recorded D into epsilon.

    Args:
        config: the run's.
        overrides: such as "control.sensitivity=2"; the value is YAML.

    Raises:
        PolysegError: another setting, or a value out of bounds.

    >>> changed_settings(Config(), ["control.sensitivity=2"]).control.sensitivity
    2.0
    """
    tree = config.model_dump(mode="json")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise PolysegError(f"--set {override}: give key.sub=value, such as control.delta=1e-6")
        if key.strip() not in _CHANGEABLE:
            raise PolysegError(
                f"--set {key}: schedule recompute changes control.*, uncertainty.metric and "
                f"loss.epsilon only: {', '.join(_CHANGEABLE)}"
            )
        section, _, name = key.strip().partition(".")
        tree[section][name] = parse_yaml(value, f"--set {override}")
    return build_config(tree, "--set")


def recompute(record: RunRecord, config: Config) -> Schedule:
    """Return the schedule that other settings would have made of the recorded difficulties.

    With the run's own settings that is its schedule, bit for bit on the machine that made it. With
    others it is no forecast: training would have gone another way, and D with it.

    Args:
        record: of the run, with all its labels.
        config: as `changed_settings` returns it.

    Raises:
        PolysegError: a score or an assessment that the settings need was not recorded.
    """
    arm, seed = "recorded", replay_seed(config)
    if config.control.replay_arm != record.config.control.replay_arm:
        arm = config.control.replay_arm
    return replay_arm(arm_schedule(record, config, arm), arm, seed)


def arm_schedule(
    record: RunRecord, config: Config, arm: str, ids: Sequence[str] | None = None
) -> Schedule:
    """Return the schedule that follows from the recorded D, or from those of an arm.

    Args:
        record: of the run, with all its labels.
        config: the settings that make D epsilon, and batches of images.
        arm: of `choices.REPLAY_ARMS`; those of epsilons are as "recorded" here.
        ids: the training images, if not all of the record, or in another order.

    Raises:
        PolysegError: a score or an assessment that the settings need was not recorded.
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
    """Return how a recomputed schedule differs, a row for each stretch between assessments.

    `spearman` is taken over all images and epochs of the stretch; `raised_share` is the share of
    them at which epsilon went up.
    """
    moments = [assessment.epoch for assessment in record.assessments]
    epochs = record.schedule.epochs
    stretches = np.split(np.arange(len(epochs)), np.searchsorted(epochs, moments, side="right"))
    parts = list(_by_label(record))
    rows = []
    for stretch in filter(len, stretches):
        ends = {"from_epoch": int(epochs[stretch[0]]), "to_epoch": int(epochs[stretch[-1]])}
        for own, part in parts:
            after = _of_label(recomputed, own.get("label", "")).epsilon[stretch]
            rows.append(ends | own | _change(part.schedule.epsilon[stretch], after))
    return rows


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as CSV: a header, decimal points, empty where a number is missing.

    >>> print(csv_text([{"id": "a,b", "dice": 0.5}, {"id": "c", "dice": math.nan}]), end="")
    id,dice
    "a,b",0.5
    c,
    """
    return csv_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])


def correlation(first: Values, second: Values) -> float:
    """Return Spearman's correlation where at least 4 images have both values, else NaN.

    >>> correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))
    nan
    """
    known = np.isfinite(first) & np.isfinite(second)
    return spearman(first[known], second[known]) if known.sum() >= _FEWEST else math.nan


def replay_seed(config: Config) -> int:
    """Return the seed of the arms that are random."""
    own = config.control.replay_seed
    return config.training.seed if own is None else own


def _of_label(schedule: Schedule, label: str) -> Schedule:
    if schedule.labels is None:
        return schedule
    columns = [i for i, one in enumerate(schedule.labels) if one == label]
    ids = [schedule.ids[i] for i in columns]
    group = None if schedule.group is None else schedule.group[:, columns]
    return replace(
        schedule, ids=ids, epsilon=schedule.epsilon[:, columns], labels=None, group=group
    )


def _by_label(record: RunRecord) -> Iterator[tuple[Row, RunRecord]]:
    """Yield each label's cell of a table, of which a single one has none, and its record."""
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
    before = part.assessments[k - 1].difficulty if k else np.full_like(difficulty, math.nan)
    return {
        **_quantiles("difficulty", difficulty),
        "difficulty_percentile": float(np.percentile(difficulty, part.config.control.percentile)),
        "sigma": float(difficulty.std()),
        **_quantiles("epsilon", part.next_epsilon(k)),
        **{f"largest_{i + 1}": one for i, one in enumerate(order[:_EXTREMES])},
        **{f"smallest_{i + 1}": one for i, one in enumerate(order[::-1][:_EXTREMES])},
        "fallbacks": int((assessment.fallback > 0).sum()),
        "spearman_previous": correlation(difficulty, before),
        "rank_stability": _rank_stability(assessment),
        "wrong_sign_share": float(part.wrong_sign[fed].mean()) if fed.any() else math.nan,
    }


def _columns(part: RunRecord, k: int, own: Row) -> dict[str, list[Any]]:
    """Return what assessment k and the epoch after say of each image, n values a column."""
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


def _stretches(part: RunRecord, k: int, i: int) -> list[Row]:
    """Return a row for each stretch of epochs after assessment k with the same statistics."""
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
        row = int(fed.argmax()) + first
        rows.append(
            {
                "from_epoch": epochs[first],
                "to_epoch": epochs[after - 1],
                "difficulty_percentile": center,
                "sigma": sigma,
                "normalised": part.normalised_of(k, row, i),
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
    """Yield the assessments that fed an epoch by the settings, each with the chosen score as D."""
    recorded = {assessment.epoch: assessment for assessment in record.assessments}
    metric = config.uncertainty.metric
    for epoch in config.control.assessment_epochs(config.training.epochs):
        if epoch >= len(record.schedule.epochs):
            return  # It feeds nothing.
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

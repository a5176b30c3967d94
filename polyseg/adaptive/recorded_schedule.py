"""Hold the difficulties and epsilons that a run recorded, and recompute them by other settings.

Everything is computed from records, without a network.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseg.adaptive.controller import EpsilonControl, Recorder, normalised_by_setting
from polyseg.adaptive.replay import arm_of_difficulty, replay_arm
from polyseg.config import Config, build_config
from polyseg.data.order import epoch_order
from polyseg.errors import PolysegError
from polyseg.records import Assessment, Schedule
from polyseg.system.yaml import parse_yaml

Values = NDArray[np.float64]
Row = dict[str, Any]
"""A row of a table: text, integers, and floats that are NaN where they are undefined."""

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

    def by_label(self) -> Iterator[tuple[Row, "RunRecord"]]:
        """Yield the label column of a table, empty for a single label, and each label's record."""
        for label in self.labels:
            yield ({"label": label} if label else {}), self.of_label(label)

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
            normalised[together] = normalised_by_setting(
                difficulty, statistics[found], self.config.control
            )
        return normalised


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


def replay_seed(config: Config) -> int:
    """Return the random seed of replay arms."""
    own = config.control.replay_seed
    return config.training.seed if own is None else own


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

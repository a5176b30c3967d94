"""Combine runs that differ only by seed, fold or machine into arms."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyseg.config import Config
from polyseg.evaluation.scores import RobustnessPoint, RunScores, mean_scores, pool

_OF_ONE_ARM = {
    "training.seed",
    "training.device",
    "training.workers",
    "data.path",
    "data.fold",
    "data.split_file",
    "data.memory",
    "data.cache",
    "control.replay",
    "control.replay_arm",
    "control.replay_seed",
}
"""Settings that may differ within an arm, besides those of the output."""

_OF_THE_LOSS = ("loss.name", "loss.epsilon", "loss.terms", "loss.scale", "uncertainty.", "control.")
"""Prefixes of the settings in which a Dice arm may differ from the adaptive arm."""


def arms_of(configs: Mapping[str, Config]) -> dict[str, list[str]]:
    """Return the names of the runs of each arm, by the arm's name.

    >>> seeds = [Config.model_validate({"training": {"seed": seed}}) for seed in (0, 1)]
    >>> arms_of({"runs/dice_s0": seeds[0], "runs/dice_s1": seeds[1]})
    {'dice': ['runs/dice_s0', 'runs/dice_s1']}
    """
    found: dict[str, list[str]] = {}
    for name, config in configs.items():
        found.setdefault(_key(config), []).append(name)
    short = [_common_name(names) for names in found.values()]
    arms: dict[str, list[str]] = {}
    for number, (arm, names) in enumerate(zip(short, found.values(), strict=True), start=1):
        unique = arm and short.count(arm) == 1
        arms[arm if unique else names[0] if len(names) == 1 else f"arm {number}"] = names
    return arms


def roles_of(
    configs: Mapping[str, Config], arms: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, str]]:
    """Return for each adaptive arm the arms that show whether it helps, by "dice" and "permuted".

    They have the settings of the adaptive arm in everything else. A role is left out if no arm has
    it, or more than one.
    """
    first = {arm: configs[names[0]] for arm, names in arms.items() if names[0] in configs}
    return {arm: _roles(own, first) for arm, own in first.items() if own.assesses}


def pool_arms(runs: Sequence[RunScores], arms: Mapping[str, Sequence[str]]) -> list[RunScores]:
    """Return a record for each arm, label and kind of prediction, instead of its runs."""
    pooled = []
    for arm, names in arms.items():
        of_arm = [run for run in runs if run.name in names]
        for label, kind in dict.fromkeys((run.label, run.prediction) for run in of_arm):
            members = [run for run in of_arm if (run.label, run.prediction) == (label, kind)]
            pooled.append(pool(arm, members))
    return pooled


def pool_points(
    points: Sequence[RobustnessPoint], runs: Sequence[RunScores], arms: Mapping[str, Sequence[str]]
) -> list[RobustnessPoint]:
    """Return the robustness points of arms, instead of those of their runs."""
    titles = {
        run.title: RunScores(arm, [], run.label).title
        for arm, names in arms.items()
        for run in runs
        if run.name in names and run.prediction == "plain"
    }
    found: dict[tuple[str, str, int], list[RobustnessPoint]] = {}
    for point in points:
        key = (titles[point.run], point.corruption, point.strength)
        found.setdefault(key, []).append(point)
    return [
        RobustnessPoint(*key, mean_scores([point.scores for point in of_arm]))
        for key, of_arm in found.items()
    ]


def _roles(own: Config, arms: Mapping[str, Config]) -> dict[str, str]:
    found: dict[str, list[str]] = {"dice": [], "permuted": []}
    for arm, config in arms.items():
        replays = config.control.replay is not None
        is_dice = not replays and config.loss.name == "dice"
        is_permuted = replays and config.control.replay_arm == "permuted"
        if is_dice and _settings(config, _OF_THE_LOSS) == _settings(own, _OF_THE_LOSS):
            found["dice"].append(arm)
        if is_permuted and _settings(config) == _settings(own):
            found["permuted"].append(arm)
    return {role: names[0] for role, names in found.items() if len(names) == 1}


def _key(config: Config) -> str:
    """Return the settings that must be equal within an arm, as text."""
    kept = _settings(config)
    kept["replayed"] = config.control.replay and config.control.replay_arm
    return json.dumps(kept, sort_keys=True)


def _settings(config: Config, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return settings by key, except those that may differ within an arm or begin as `without`."""
    kept = {
        key: value
        for key, value in config.flat().items()
        if key not in _OF_ONE_ARM and not key.startswith(("output.", *without))
    }
    # On different machines a data set has different paths, but the same name.
    kept["data set"] = Path(config.data.path or "").name
    return kept


def _common_name(names: Sequence[str]) -> str:
    """Return the common part of the names of an arm's runs, without a number at the end."""
    last = {name.rsplit("/", 1)[-1] for name in names}
    if len(last) == 1 < len(names):
        return last.pop()
    # By characters: "dice_s0" and "dice_s1" have "dice_s" in common.
    common = os.path.commonprefix(list(names)).rsplit("/", 1)[-1]  # noqa: RUF071
    return re.sub(r"([-_. ]+(seed|fold|s|f)?[-_. ]*\d*)$", "", common, flags=re.IGNORECASE)

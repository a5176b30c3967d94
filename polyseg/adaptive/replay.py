"""Replay a recorded schedule instead of assessing images, as recorded or as a control arm.

An arm assigns the epsilons of each epoch, or the D that they are computed from, to other images. If
training succeeds as well with the arm, the assignment of epsilons to images has no effect.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from polyseg.choices import REPLAY_ARMS
from polyseg.config import LARGEST_EPSILON, least_epsilon
from polyseg.difficulty import size_difficulty
from polyseg.errors import PolysegError
from polyseg.records import Assessment, Schedule
from polyseg.system.seeds import derive_seed

# Generators are quoted in annotations, because np.random is only imported when it is used.
Epsilons = NDArray[np.float32]
Values = NDArray[np.float64]

_MOST_NAMED = 5
"""Largest number of missing columns that an error names."""


def replay_arm(schedule: Schedule, arm: str, seed: int) -> Schedule:
    """Return the schedule with the epsilons of each epoch assigned to other images by an arm.

    The result has no statistics of eq. 11, because they explain the recorded epsilons only.
    "recorded" and arms that change D (see `arm_of_difficulty`) return the schedule unchanged.
    "shuffled" uses one permutation for all epochs if the schedule does not record its assessments.

    >>> epsilon = np.array([[0.0, 0.5, 1.0]], np.float32)
    >>> schedule = Schedule(["a", "b", "c"], np.array([1]), epsilon)
    >>> replay_arm(schedule, "inverted", seed=0).epsilon.tolist()
    [[1.0, 0.5, 0.0]]
    """
    row = REPLAY_ARMS[arm]
    if not row.function or row.of_difficulty:
        return schedule
    names = len(dict.fromkeys(schedule.labels or [""]))
    epsilon = schedule.epsilon.reshape(len(schedule.epochs), -1, names)
    change: Callable[[Epsilons, np.random.Generator], Epsilons] = row.resolve()
    # All epochs between two assessments have the same generator.
    moments = [0] * len(epsilon) if schedule.assessed is None else schedule.assessed.tolist()
    seeds = [derive_seed(seed, "replay", moment) for moment in moments]
    each = zip(epsilon, map(np.random.default_rng, seeds), strict=True)
    changed = np.stack([change(one, generator) for one, generator in each])
    changed = changed.reshape(schedule.epsilon.shape)
    return replace(schedule, epsilon=changed, group=None, statistics=None)


def arm_of_difficulty(assessment: Assessment, arm: str, seed: int) -> Assessment:
    """Return an assessment with its D replaced by an arm of `choices.REPLAY_ARMS`.

    Arms that change epsilons return D unchanged. Values that the arm needs and that were not
    recorded raise PolysegError.
    """
    row = REPLAY_ARMS[arm]
    if not row.of_difficulty:
        return assessment
    generator = np.random.default_rng(derive_seed(seed, "replay", "whole run"))
    difficulty = row.resolve()(assessment, generator)
    return replace(assessment, scores={**assessment.scores, assessment.metric: difficulty})


def fit_schedule(
    schedule: Schedule,
    ids: Sequence[str],
    labels: Sequence[str],
    epochs: int,
    terms: int,
    source: str,
) -> Schedule:
    """Return a schedule with the columns of a run's training images, in the run's order.

    The recorded schedule may have further images. `labels` are those of each image, `terms` the
    number K of terms of the loss, which bounds epsilon from below, and `source` the origin of the
    schedule for messages. A missing image, label or epoch, or an epsilon that would reward
    misalignment, raises PolysegError.
    """
    columns: dict[tuple[str, str], int] = {}
    recorded = schedule.labels or [labels[0] if len(labels) == 1 else ""] * len(schedule.ids)
    for i, place in enumerate(zip(schedule.ids, recorded, strict=True)):
        columns.setdefault(place, i)
    wanted = [(identity, label) for identity in ids for label in labels]
    _refuse_missing([place for place in wanted if place not in columns], source)
    _refuse_epochs(schedule, epochs, source)
    kept = [columns[place] for place in wanted]
    chosen = schedule.epsilon[:, kept]
    least = least_epsilon(terms)
    if not ((chosen >= least) & (chosen <= LARGEST_EPSILON)).all():
        raise PolysegError(
            f"{source}: has epsilons from {chosen.min():g} to {chosen.max():g}; they must be from "
            f"{least:.4g}, below which misalignment is rewarded, to {LARGEST_EPSILON}"
        )
    return replace(
        schedule,
        ids=[identity for identity, _ in wanted],
        epsilon=chosen,
        labels=[label for _, label in wanted] if len(labels) > 1 else None,
        group=None if schedule.group is None else schedule.group[:, kept],
    )


def epsilon_of_batch(schedule: Schedule, ids: Sequence[str], epoch: int, labels: int) -> Epsilons:
    """Return the epsilons of a batch in an epoch, (n,), or (n K,) image by image.

    >>> schedule = Schedule(["a", "b"], np.array([1]), np.array([[0.5, 1.0]], np.float32))
    >>> epsilon_of_batch(schedule, ["b", "a"], epoch=1, labels=1).tolist()
    [1.0, 0.5]
    """
    places = {identity: i for i, identity in enumerate(schedule.ids[::labels])}
    row = schedule.epsilon[epoch - 1].reshape(-1, labels)
    chosen: Epsilons = row[[places[identity] for identity in ids]].ravel()
    return chosen


def _refuse_missing(places: Sequence[tuple[str, str]], source: str) -> None:
    """Raise PolysegError if there are (id, label) without a column in the schedule."""
    if not places:
        return
    some = places[:_MOST_NAMED]
    named = [" of ".join(filter(None, (label, identity))) for identity, label in some]
    more = f" and {len(places) - _MOST_NAMED} more" if len(places) > _MOST_NAMED else ""
    raise PolysegError(
        f"{source}: has no epsilon for {', '.join(named)}{more}; replay it with the images of the "
        "recorded run (data.path, and its split.json by --split)"
    )


def _refuse_epochs(schedule: Schedule, epochs: int, source: str) -> None:
    found = schedule.epochs.tolist()
    if found != list(range(1, len(found) + 1)):
        raise PolysegError(f"{source}: its epochs are not 1, 2, 3, ...")
    if not found:
        raise PolysegError(f"{source}: has no epochs yet")
    if len(found) < epochs:
        raise PolysegError(
            f"{source}: lacks epoch {len(found) + 1} of {epochs}; replay it with --epochs "
            f"{len(found)}"
        )


def shuffled(epsilon: Epsilons, generator: "np.random.Generator") -> Epsilons:
    """Return the epsilons permuted over the images, all labels of an image together."""
    return epsilon[generator.permutation(len(epsilon))]


def mean(epsilon: Epsilons, _: "np.random.Generator") -> Epsilons:
    """Return the mean of the epsilons of each label for all images."""
    means = epsilon.mean(axis=0, dtype=np.float64).astype(np.float32)
    return np.broadcast_to(means, epsilon.shape)


def inverted(epsilon: Epsilons, _: "np.random.Generator") -> Epsilons:
    """Return the epsilons of each label with their order over the images reversed."""
    order = np.argsort(epsilon, axis=0, kind="stable")
    result = np.empty_like(epsilon)
    np.put_along_axis(result, order, np.take_along_axis(epsilon, order[::-1], axis=0), axis=0)
    return result


def permuted(assessment: Assessment, generator: "np.random.Generator") -> Values:
    """Return D permuted over the images, all labels of an image together."""
    difficulty = assessment.difficulty.reshape(-1, len(assessment.label_names))
    chosen: Values = difficulty[generator.permutation(len(difficulty))].ravel()
    return chosen


def by_size(assessment: Assessment, _: "np.random.Generator") -> Values:
    """Return D by the size of each image's mask; PolysegError if sizes were not recorded."""
    pixels = mask_sizes(assessment)
    if np.isnan(pixels).any():
        raise PolysegError("control.replay_arm size: the run did not record the sizes of its masks")
    return size_difficulty(pixels)


def by_loss(assessment: Assessment, _: "np.random.Generator") -> Values:
    """Return D by the training loss of each image; PolysegError if it was not recorded."""
    if "training_loss" not in assessment.scores:
        raise PolysegError("control.replay_arm loss: the run did not record the training loss")
    return assessment.scores["training_loss"]


def mask_sizes(assessment: Assessment) -> Values:
    """Return the pixels of each image's mask, (n,), NaN where they were not recorded."""
    if assessment.mask_pixels is not None:
        return assessment.mask_pixels.astype(np.float64)
    if assessment.region != "mask":
        return np.full(len(assessment.ids), math.nan)
    # For an empty mask the pixels are those of the region that replaced it.
    pixels: Values = np.where(assessment.fallback == 0, assessment.foreground_pixels, 0.0)
    return pixels

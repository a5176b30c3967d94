"""A recorded schedule in place of assessments, and the arms that tell whether it matters.

An arm gives the epsilons of each epoch, or the D that they are computed from, to other images: if
training does as well with it, which image gets the steep loss did not matter.
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

Epsilons = NDArray[np.float32]
Values = NDArray[np.float64]

_NAMED = 5


def replay_arm(schedule: Schedule, arm: str, seed: int) -> Schedule:
    """Return the schedule with its epsilons given to other images, epoch by epoch.

    The statistics of eq. 11 explain the epsilons as recorded only, so the other arms have none.

    Args:
        schedule: of n images, or n images with K labels each.
        arm: "recorded", as it is; "shuffled", permuted over the images, all labels of an image
            together, by one permutation from each assessment to the next (by one for all epochs
            where the schedule does not tell its assessments); "mean", each epoch's mean
            for all, label by label; "inverted", the order of each epoch reversed, label by label.
            Arms that change D, as `arm_of_difficulty` does, leave the schedule as it is.
        seed: of the permutations.

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
    changed = np.stack(
        [change(one, _generator(schedule, i, seed)) for i, one in enumerate(epsilon)]
    )
    changed = changed.reshape(schedule.epsilon.shape)
    return replace(schedule, epsilon=changed, group=None, statistics=None)


def arm_of_difficulty(assessment: Assessment, arm: str, seed: int) -> Assessment:
    """Return an assessment with the D that an arm puts in place of the recorded one.

    Args:
        assessment: of n images, or n images with K labels each.
        arm: "permuted", D permuted over the images, all labels of an image together, by the same
            permutation for every assessment of these images; "size" and "loss", D by the size of
            the mask and by the training loss. Arms of epsilons leave D as it is.
        seed: of the permutation.

    Raises:
        PolysegError: what the arm needs was not recorded.
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
    """Return a schedule with the columns that a run needs, in the run's order.

    Args:
        schedule: what was recorded; images that the run does not train on are left out.
        ids: the training images.
        labels: of each image.
        epochs: that the schedule must have.
        terms: K, of the loss, which bounds epsilon from below.
        source: where the schedule is from, for messages.

    Raises:
        PolysegError: an image, a label or an epoch is missing, or an epsilon would reward
            misalignment.
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
            f"{source}: has epsilons out of {least:.4g} to {LARGEST_EPSILON} ({chosen.min():g} to "
            f"{chosen.max():g}); below, they would reward misalignment"
        )
    several = len(labels) > 1
    return Schedule(
        ids=[identity for identity, _ in wanted],
        epochs=schedule.epochs,
        epsilon=chosen,
        labels=[label for _, label in wanted] if several else None,
        assessed=schedule.assessed,
        group=None if schedule.group is None else schedule.group[:, kept],
        statistics=schedule.statistics,
    )


def epsilon_of_batch(schedule: Schedule, ids: Sequence[str], epoch: int, labels: int) -> Epsilons:
    """Return what the images of a batch meet in an epoch, (n,), or (n K,), an image's together.

    >>> schedule = Schedule(["a", "b"], np.array([1]), np.array([[0.5, 1.0]], np.float32))
    >>> epsilon_of_batch(schedule, ["b", "a"], epoch=1, labels=1).tolist()
    [1.0, 0.5]
    """
    places = {identity: i for i, identity in enumerate(schedule.ids[::labels])}
    row = schedule.epsilon[epoch - 1].reshape(-1, labels)
    chosen: Epsilons = row[[places[identity] for identity in ids]].ravel()
    return chosen


def _refuse_missing(places: Sequence[tuple[str, str]], source: str) -> None:
    """Raise if there are (id, label) that a schedule lacks."""
    if not places:
        return
    named = [" of ".join(filter(None, (label, identity))) for identity, label in places[:_NAMED]]
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    raise PolysegError(
        f"{source}: has no epsilon for {', '.join(named)}{more}; replay it on the images of its "
        "own run (data.path, and split.json by --split)"
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


def shuffled(epsilon: Epsilons, generator: np.random.Generator) -> Epsilons:
    """Return the epsilons permuted over the images, all labels of an image together."""
    return epsilon[generator.permutation(len(epsilon))]


def mean(epsilon: Epsilons, _: np.random.Generator) -> Epsilons:
    """Return the mean of the epsilons of each label for all images."""
    means = epsilon.mean(axis=0, dtype=np.float64).astype(np.float32)
    return np.broadcast_to(means, epsilon.shape)


def inverted(epsilon: Epsilons, _: np.random.Generator) -> Epsilons:
    """Return the epsilons of each label with their order over the images reversed."""
    order = np.argsort(epsilon, axis=0, kind="stable")
    turned = np.empty_like(epsilon)
    np.put_along_axis(turned, order, np.take_along_axis(epsilon, order[::-1], axis=0), axis=0)
    return turned


def permuted(assessment: Assessment, generator: np.random.Generator) -> Values:
    """Return D permuted over the images, all labels of an image together."""
    difficulty = assessment.difficulty.reshape(-1, len(assessment.label_names))
    chosen: Values = difficulty[generator.permutation(len(difficulty))].ravel()
    return chosen


def by_size(assessment: Assessment, _: np.random.Generator) -> Values:
    """Return D by the size of each image's mask.

    Raises:
        PolysegError: sizes were not recorded.
    """
    pixels = mask_sizes(assessment)
    if np.isnan(pixels).any():
        raise PolysegError("control.replay_arm size: the run did not record the sizes of its masks")
    return size_difficulty(pixels)


def by_loss(assessment: Assessment, _: np.random.Generator) -> Values:
    """Return D by the training loss of each image.

    Raises:
        PolysegError: it was not recorded.
    """
    if "training_loss" not in assessment.scores:
        raise PolysegError("control.replay_arm loss: the run did not record the training loss")
    return assessment.scores["training_loss"]


def mask_sizes(assessment: Assessment) -> Values:
    """Return the pixels of each image's mask, (n,), NaN where they were not recorded."""
    if assessment.mask_pixels is not None:
        return assessment.mask_pixels.astype(np.float64)
    if assessment.region != "mask":
        return np.full(len(assessment.ids), math.nan)
    # Of an empty mask the pixels are those of what was taken in its place.
    pixels: Values = np.where(assessment.fallback == 0, assessment.foreground_pixels, 0.0)
    return pixels


def _generator(schedule: Schedule, row: int, seed: int) -> np.random.Generator:
    """Return random numbers for an epoch, the same from an assessment to the next."""
    moment = 0 if schedule.assessed is None else int(schedule.assessed[row])
    return np.random.default_rng(derive_seed(seed, "replay", moment))

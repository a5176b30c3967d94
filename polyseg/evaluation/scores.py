"""The results of an evaluation: metrics by image, label and run, arms of several runs.

Only `image_scores` reads pixels; `tables` and `export` write the results.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyseg.errors import PolysegError
from polyseg.metrics.calibration import (
    ReliabilityCurve,
    area_under_risk_coverage,
    area_under_roc,
    excess_area,
)
from polyseg.metrics.image_metrics import METRICS, Metric, image_metrics
from polyseg.metrics.rank_stability import spearman
from polyseg.metrics.significance import (
    Interval,
    PairedDifference,
    deviation_over_seeds,
    group_means,
    mean_interval,
    terciles,
)

Values = NDArray[np.float64]
Prediction = Literal["plain", "mc_mean"]

SIZES = ("small", "medium", "large")
DIFFICULTIES = ("easy", "medium", "hard")


@dataclass(frozen=True)
class ImageScores:
    """The metrics of one image and label."""

    id: str
    values: Mapping[str, float]
    """Metrics by name in `METRICS`; NaN if undefined for the mask."""
    mask_pixels: float
    predicted_pixels: float
    uncertainty: Mapping[str, float] = field(default_factory=dict)
    """Uncertainties of the network about the image by name, if they were measured."""
    group: str | None = None
    """Group of the image, such as its patient, if it is known."""


@dataclass(frozen=True)
class RunScores:
    """The metrics of one network, or of an arm of several, on some images.

    >>> mask = np.array([[1, 0], [0, 0]])
    >>> scores = image_scores("a", np.array([[0.9, 0.6], [0.1, 0.2]]), mask)
    >>> round(RunScores("one", [scores]).mean("dice"), 4)
    0.6667
    """

    name: str
    scores: Sequence[ImageScores]
    label: str = ""
    """Name of the label, "" for a single one."""
    prediction: Prediction = "plain"
    """"plain": pass without dropout; "mc_mean": mean over the passes of MC Dropout."""
    threshold: float = 0.5
    """Smallest probability of foreground; NaN if an arm's runs have different thresholds."""
    unit: str = "px"
    """Unit of distances, "px" or "mm"."""
    at: str = "original"
    """Size of the compared masks: "original", that of the files, or "network"."""
    seed: int | None = None
    fold: int | None = None
    """Fold of the training; runs of two arms are paired by seed and fold."""
    reliability: ReliabilityCurve | None = None
    """Reliability curve over the pixels of all images."""
    members: Sequence["RunScores"] = ()
    """The runs of an arm."""

    @property
    def title(self) -> str:
        """The name that tables and figures show."""
        name = f"{self.name} (MC mean)" if self.prediction == "mc_mean" else self.name
        return f"{name}: {self.label}" if self.label else name

    def column(self, key: str) -> Values:
        """Return a metric of every image, (n,)."""
        return np.array([image.values[key] for image in self.scores], dtype=np.float64)

    @property
    def groups(self) -> list[str | None] | None:
        """Group of each image, such as its patient; None if no image has one."""
        found = [image.group for image in self.scores]
        return found if any(group is not None for group in found) else None

    @property
    def patients(self) -> int | None:
        """Number of groups, counting each image without one as a group; None if none are known."""
        groups = self.groups
        return None if groups is None else group_means(np.zeros(len(groups)), groups).size

    def defined(self, key: str) -> Values:
        """Return the mean of a metric in each patient, or of each image if no patient is known.

        Cases for which it is undefined are left out.
        """
        values = group_means(self.column(key), self.groups)
        return values[~np.isnan(values)]

    def mean(self, key: str) -> float:
        """Return the mean over the patients, or images, with a defined metric; NaN without any."""
        return mean_or_nan(self.defined(key))

    def deviation(self, key: str) -> float:
        """Return the standard deviation over the patients, or images, divisor n - 1."""
        return _deviation(self.defined(key))

    def interval(self, key: str) -> Interval:
        """Return the 95 % bootstrap interval of the mean, which draws patients, or images."""
        return mean_interval(self.defined(key))

    def seed_deviation(self, key: str) -> float:
        """Return the standard deviation of an arm's means over its seeds; NaN below two.

        Folds of one seed count together, since their images differ; it is NaN where the seeds were
        not tested on the same images.
        """
        ids = [image.id for image in self.scores]
        seeds = dict.fromkeys(run.seed for run in self.members)
        parts = [[run for run in self.members if run.seed == seed] for seed in seeds]
        if any({one.id for run in part for one in run.scores} != set(ids) for part in parts):
            return math.nan
        table = [group_means(values_by_id(pool("", part), key, ids), self.groups) for part in parts]
        return deviation_over_seeds(table) if table else math.nan

    def fold_deviation(self, key: str) -> float:
        """Return the standard deviation of an arm's means over its folds; NaN below two."""
        folds = dict.fromkeys(run.fold for run in self.members if run.fold is not None)
        means = [pool("", [run for run in self.members if run.fold == k]).mean(key) for k in folds]
        return _deviation(np.array(means))

    def uncertainty(self, name: str) -> Values:
        """Return an uncertainty of every image, (n,), NaN where it was not measured."""
        return np.array([image.uncertainty.get(name, math.nan) for image in self.scores])

    def counts(self) -> dict[str, int]:
        """Return the numbers of empty masks and predictions; for an arm in any of its runs."""
        each = [run.cases() for run in self.members or [self]]
        return {name: len(set().union(*(one[name] for one in each))) for name in each[0]}

    def cases(self) -> dict[str, set[str]]:
        """Return the ids of images with empty masks or predictions."""
        images = {image.id for image in self.scores}
        masks = {image.id for image in self.scores if image.mask_pixels > 0}
        predictions = {image.id for image in self.scores if image.predicted_pixels > 0}
        return {
            "images": images,
            "both empty": images - masks - predictions,
            "mask empty": predictions - masks,
            "prediction empty": masks - predictions,
        }


@dataclass(frozen=True)
class Comparison:
    """Paired differences between a run and the baseline for each metric."""

    baseline: str
    run: str
    label: str
    differences: Mapping[str, PairedDifference]
    """Differences by name in `METRICS`."""


@dataclass(frozen=True)
class Stratum:
    """A third of a run's images, by size or by difficulty."""

    by: str
    """"size" or "difficulty"."""
    name: str
    images: int
    means: Mapping[str, float]
    """Means by name in `METRICS`; NaN if undefined for all images."""


@dataclass(frozen=True)
class FailureDetection:
    """How well an uncertainty finds badly segmented images; risk is 1 - Dice."""

    uncertainty: str
    failed: int
    """Number of images with a Dice below the limit."""
    auroc: float
    """Area under the ROC curve for these images; NaN if all or none failed."""
    aurc: float
    excess_aurc: float
    spearman: float
    """Rank correlation with 1 - Dice."""


@dataclass(frozen=True)
class RobustnessPoint:
    """The metrics of a run on images with one corruption at one strength."""

    run: str
    """Title of the run."""
    corruption: str
    strength: int
    """Strength from 0, none, to 5."""
    scores: Sequence[ImageScores]

    def column(self, key: str) -> Values:
        """Return a metric of every image, (n,)."""
        return RunScores(self.run, self.scores).column(key)

    def mean(self, key: str) -> float:
        """Return its mean over the images for which it is defined; NaN without any."""
        return RunScores(self.run, self.scores).mean(key)


@dataclass(frozen=True)
class Evaluation:
    """All results of an evaluation."""

    runs: Sequence[RunScores]
    comparisons: Sequence[Comparison] = ()
    robustness: Sequence[RobustnessPoint] = ()
    tolerance: float = 2.0
    """Tolerance of NSD, in the unit of the distances."""
    failure: float = 0.7
    """Dice below which an image counts as failed."""
    part: str = "test"
    """Part of the data that was tested: train, val, test or all."""
    sources: Sequence[str] = ()
    """Paths of the runs, relative to the folder of the results."""
    conclusions: Sequence[str] = ()
    """Sentences on whether the adaptive loss helped."""

    @property
    def unit(self) -> str:
        """Unit of distances."""
        return self.runs[0].unit if self.runs else "px"

    @property
    def at(self) -> str:
        """Size of the compared masks, "original" or "network"."""
        return self.runs[0].at if self.runs else "original"

    def heading(self, metric: Metric) -> str:
        """Return a metric's title with its unit, or its tolerance.

        >>> Evaluation([]).heading(METRICS["dice"])
        'Dice'
        """
        return metric.heading(self.unit, self.tolerance)

    def difficulty(self, run: RunScores) -> Values | None:
        """Return the difficulty of a run's images for the first run, for equal thirds in all runs.

        It is the first measured uncertainty, (n,), NaN for images without it; None without any.
        """
        first = next((one for one in self.runs if one.label == run.label), run)
        names = [name for image in first.scores for name in image.uncertainty]
        if not names:
            return None
        ids = [image.id for image in first.scores]
        known = dict(zip(ids, first.uncertainty(names[0]), strict=True))
        return np.array([known.get(image.id, math.nan) for image in run.scores])


def image_scores(
    identity: str,
    probability: Values,
    mask: NDArray[np.integer],
    *,
    threshold: float = 0.5,
    spacing: tuple[float, float] | None = None,
    tolerance: float = 2.0,
    uncertainty: Mapping[str, float] | None = None,
    group: str | None = None,
) -> ImageScores:
    """Return the metrics of one image; `image_metrics` and `ImageScores` explain the arguments.

    >>> mask = np.array([[1, 1], [0, 0]])
    >>> image_scores("a", np.array([[0.9, 0.4], [0.1, 0.2]]), mask).values["sensitivity"]
    0.5
    """
    return ImageScores(
        id=identity,
        values=image_metrics(
            probability, mask, threshold=threshold, spacing=spacing, tolerance=tolerance
        ),
        mask_pixels=int((np.asarray(mask) > 0).sum()),
        predicted_pixels=int((np.asarray(probability) >= threshold).sum()),
        uncertainty=uncertainty or {},
        group=group,
    )


def pool(name: str, members: Sequence[RunScores]) -> RunScores:
    """Combine runs that differ by seed or fold into an arm, with the mean of each image.

    The mean is over the runs that tested the image, because folds test different images.

    Raises:
        PolysegError: the runs have distances in different units, or masks of different sizes.

    >>> scores = [ImageScores("a", {"dice": dice}, 4, 4) for dice in (0.5, 0.7)]
    >>> arm = pool("arm", [RunScores(f"s{i}", [one], seed=i) for i, one in enumerate(scores)])
    >>> round(arm.mean("dice"), 3), round(arm.seed_deviation("dice"), 3)
    (0.6, 0.141)
    """
    first = members[0]
    if len({run.unit for run in members}) > 1:
        raise PolysegError(f"{name}: some of its runs have distances in mm and some in pixels")
    refuse_other_sizes(members)
    curves = [run.reliability for run in members if run.reliability is not None]
    return replace(
        first,
        name=name,
        scores=mean_scores([run.scores for run in members]),
        threshold=first.threshold if len({run.threshold for run in members}) == 1 else math.nan,
        reliability=sum(curves[1:], curves[0]) if curves else None,
        members=tuple(members),
    )


def refuse_other_sizes(runs: Sequence[RunScores]) -> None:
    """Raise PolysegError unless the masks of all runs were compared at the same size."""
    names = {run.at: run.name for run in runs}
    if len(names) > 1:
        listed = ", ".join(f"{name} at {at} size" for at, name in names.items())
        raise PolysegError(f"evaluate: {listed}; give all runs the same --at")


def mean_scores(runs: Sequence[Sequence[ImageScores]]) -> list[ImageScores]:
    """Return the mean of each image over the runs that tested it, in order of appearance."""
    found: dict[str, list[ImageScores]] = {}
    for scores in runs:
        for image in scores:
            found.setdefault(image.id, []).append(image)
    return [_mean_of_image(images) for images in found.values()]


def strata(run: RunScores, difficulty: ArrayLike | None = None) -> Iterator[Stratum]:
    """Yield the thirds of a run's images by size of the mask, and by difficulty if it is known.

    Args:
        run: the run; images without foreground are in no third by size.
        difficulty: (n,), from one run, which defines the thirds of all compared runs.
    """
    sizes = np.array([image.mask_pixels or math.nan for image in run.scores])
    ways = [("size", SIZES, sizes)]
    if difficulty is not None and np.isfinite(difficulty).any():
        ways.append(("difficulty", DIFFICULTIES, np.asarray(difficulty, np.float64)))
    for by, names, values in ways:
        thirds = terciles(values)
        for i, name in enumerate(names):
            rows = np.flatnonzero(thirds == i)
            part = replace(run, scores=[run.scores[int(row)] for row in rows])
            means = {name: part.mean(name) for name in METRICS}
            yield Stratum(by, name, len(rows), means)


def failure_detection(run: RunScores, limit: float) -> list[FailureDetection]:
    """Return how well each measured uncertainty finds the images that failed.

    Args:
        run: the run; images without a Dice or an uncertainty are ignored.
        limit: Dice below which an image has failed.

    >>> found = [(0.9, 0.1), (0.5, 0.3), (0.8, 0.2)]
    >>> images = [ImageScores("", {"dice": dice}, 1, 1, {"entropy": u}) for dice, u in found]
    >>> failure_detection(RunScores("run", images), 0.7)[0].auroc
    1.0
    """
    names = dict.fromkeys(name for image in run.scores for name in image.uncertainty)
    dice = run.column("dice")
    found = []
    for name in names:
        uncertainty = run.uncertainty(name)
        known = np.isfinite(dice) & np.isfinite(uncertainty)
        risk, unsure = 1 - dice[known], uncertainty[known]
        found.append(
            FailureDetection(
                uncertainty=name,
                failed=int((dice[known] < limit).sum()),
                auroc=area_under_roc(unsure, dice[known] < limit),
                aurc=area_under_risk_coverage(risk, unsure),
                excess_aurc=excess_area(risk, unsure),
                spearman=spearman(unsure, risk),
            )
        )
    return found


def mean_or_nan(values: Values) -> float:
    """Return the mean of values, NaN without any."""
    return float(values.mean()) if values.size else math.nan


def _deviation(values: Values) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else math.nan


def values_by_id(run: RunScores, key: str, ids: Sequence[str]) -> Values:
    """Return a metric of some images, NaN for images that the run has not tested."""
    values = {image.id: image.values[key] for image in run.scores}
    return np.array([values.get(identity, math.nan) for identity in ids])


def _mean_of_image(images: Sequence[ImageScores]) -> ImageScores:
    """Return the mean over several runs' scores of one image, without undefined values."""
    first = images[0]

    def mean(values: Sequence[float]) -> float:
        known = [value for value in values if not math.isnan(value)]
        return math.fsum(known) / len(known) if known else math.nan

    return ImageScores(
        id=first.id,
        values={key: mean([image.values[key] for image in images]) for key in first.values},
        mask_pixels=first.mask_pixels,
        predicted_pixels=mean([image.predicted_pixels for image in images]),
        uncertainty={
            name: mean([image.uncertainty.get(name, math.nan) for image in images])
            for name in first.uncertainty
        },
        group=first.group,
    )

"""Test one network: plain predictions, means over passes of MC Dropout, corrupted images.

Several processes share the images of each test, and all of them get the metrics of all images.
"""

import dataclasses
import functools
import logging
import operator
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from polyseg.choices import FREE_SCORES, PAIR_SCORES, UNCERTAINTIES, WHOLE_SCORES
from polyseg.config import MOST_SAMPLES, DataConfig
from polyseg.data.corruptions import STRENGTHS, check_corruption, corrupted
from polyseg.data.dataset import ImageSet
from polyseg.data.splits import groups_by_id
from polyseg.errors import PolysegError
from polyseg.evaluation.predictions import At, at_size, probabilities
from polyseg.evaluation.scores import (
    ImageScores,
    Prediction,
    RobustnessPoint,
    RunScores,
    image_scores,
)
from polyseg.metrics.calibration import ReliabilityCurve
from polyseg.montecarlo.assessment import assess
from polyseg.networks.segmentation_network import SegmentationNetwork
from polyseg.records import Progress, no_progress
from polyseg.runs.trained_model import (
    Inputs,
    Load,
    Model,
    images_for,
    moved_split,
    part_of,
    passes_of,
)
from polyseg.system.process_group import ALONE, Processes

log = logging.getLogger(__name__)

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Thresholds among which one is chosen on the validation images."""

_PIXELS_AT_ONCE = 2**24
"""Largest number of pixels whose MC-Dropout maps are kept in memory at once."""
_CHOOSING = 48
"""Smallest number of images, rounded up to a batch, from which the number of passes is chosen."""

Groups = Mapping[str, str | None]
"""The group of each image, such as its patient, by the image's id."""
Threshold = float | Literal["val"]
T = TypeVar("T")


@dataclass(frozen=True)
class PredictedMasks:
    """The masks of one label that a network predicted, compressed."""

    run: str
    label: str
    packed: Mapping[str, bytes]
    """Compressed bits of each mask, by the image's id."""
    shapes: Mapping[str, tuple[int, int]]

    def mask(self, identity: str) -> NDArray[np.bool_]:
        """Return the predicted mask of an image, (H, W)."""
        height, width = self.shapes[identity]
        packed = np.frombuffer(zlib.decompress(self.packed[identity]), np.uint8)
        return np.unpackbits(packed, count=height * width).reshape(height, width).astype(bool)


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of the tests of networks."""

    threshold: Threshold = 0.5
    """Smallest probability of foreground; "val": the best one on the validation images."""
    uncertainty: bool = False
    """Whether to test the mean over passes of MC Dropout, and whether D finds failures."""
    samples: int | None = None
    """Number N of passes; None for that of the run."""
    corruptions: Sequence[str] = ()
    """Names of corruptions to test."""
    at: At = "original"
    """Size at which predictions and masks are compared."""
    by: Literal["patient", "image"] = "patient"
    """Unit of means, intervals and tests; "patient" is "image" if no patients are known."""
    tolerance: float = 2.0
    """Tolerance of NSD, in pixels, or in mm if spacings are known."""
    failure: float = 0.7
    """Dice below which an image counts as failed."""

    def check(self) -> None:
        """Raise PolysegError for a value out of bounds."""
        if self.threshold != "val" and not 0 < float(self.threshold) < 1:
            raise PolysegError(
                f"--threshold {self.threshold}: choose a number above 0 and below 1, or val"
            )
        if self.samples is not None and not 2 <= self.samples <= MOST_SAMPLES:
            raise PolysegError(f"--samples {self.samples}: choose 2 to {MOST_SAMPLES:,} passes")
        if self.samples is not None and not self.uncertainty:
            raise PolysegError("--samples needs --uncertainty, which runs the passes of MC Dropout")
        if not 0 < self.tolerance < 1000:
            raise PolysegError(
                f"--tolerance {self.tolerance:g}: choose a number above 0 and below 1000"
            )
        if not 0 < self.failure <= 1:
            raise PolysegError(f"--failure {self.failure:g}: choose a Dice above 0 and at most 1")
        for name in self.corruptions:
            check_corruption(name, 0)


@dataclass(frozen=True)
class NetworkResults:
    """The results of testing one network or folder of masks."""

    scores: Sequence[RunScores]
    points: Sequence[RobustnessPoint]
    masks: Sequence[PredictedMasks]


@dataclass(frozen=True)
class ImageTest:
    """A test of a network, or of a folder of masks."""

    name: str
    """Name in tables."""
    images: ImageSet
    """Images that include the tested ones."""
    ids: Sequence[str]
    """Ids of the tested images."""
    batch_size: int
    settings: EvaluationSettings = EvaluationSettings()
    progress: Progress = no_progress
    processes: Processes = ALONE
    """Processes that share the images; all get all results."""
    groups: Groups = field(default_factory=dict)


class ImagePrediction(NamedTuple):
    """The prediction for one image, and its true masks, at one size."""

    id: str
    probability: NDArray[np.floating]
    """Predicted probabilities, (K, H, W) in [0, 1]."""
    masks: NDArray[np.uint8]
    """True masks, (K, H, W) in {0, 1}."""
    uncertainty: Mapping[str, Sequence[float]]
    """Uncertainties by name, with a value for each label."""


def score(network: SegmentationNetwork, test: ImageTest) -> list[RunScores]:
    """Return the metrics of a network without dropout at threshold 0.5, a record for each label."""
    return scores_of(test, _plain(network, test), dict.fromkeys(test.images.labels, 0.5))


def choose_thresholds(network: SegmentationNetwork, test: ImageTest) -> dict[str, float]:
    """Return the threshold of each label, of `THRESHOLDS`, with the highest mean Dice.

    If several are equally good, it is the one nearest to 0.5.
    """
    dices = [
        [_dice_curve(*pair) for pair in zip(one.probability, one.masks, strict=True)]
        for one in _plain(network, test, "choosing thresholds")
    ]
    means = np.mean(test.processes.joined(dices), axis=0).round(9)
    nearness = [-abs(threshold - 0.5) for threshold in THRESHOLDS]
    return {
        label: max(zip(of_label.tolist(), nearness, THRESHOLDS, strict=True))[2]
        for label, of_label in zip(test.images.labels, means, strict=True)
    }


def measure_network(model: Model, test: ImageTest, load: Load) -> NetworkResults:
    """Test one network as the settings of the test say; `load` reads its own data.

    Raises:
        PolysegError: the images have no masks, or there are no images to choose a threshold.
    """
    thresholds = _thresholds(model, test, load)
    scores: list[RunScores] = []
    if test.settings.uncertainty:
        scores = scores_of(test, _passes(model, test), thresholds, "mc_mean")
    uncertainty = _by_image(scores)
    kept = MaskKeeper(test.name, test.images.labels, thresholds)
    predictions = (
        kept(one._replace(uncertainty=uncertainty.get(one.id, {})))
        for one in _plain(model.network, test)
    )
    plain = scores_of(test, predictions, thresholds)
    points = list(_under_corruption(model, test, plain))
    return NetworkResults(plain + scores, points, kept.masks(test.processes))


def patients_of(images: ImageSet, config: DataConfig) -> Groups:
    """Return the group of each image, such as its patient, by the data or by `data.group`."""
    try:
        return groups_by_id(images.members(), config)
    except PolysegError as error:
        log.warning("%s; groups are taken from the data alone", error)
        return {item.id: item.group for item in images.items}


def _by_image(scores: Sequence[RunScores]) -> dict[str, dict[str, list[float]]]:
    """Return the uncertainties of each image by name, with a value for each label."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in scores:
        for image in run.scores:
            for name, value in image.uncertainty.items():
                found.setdefault(image.id, {}).setdefault(name, []).append(value)
    return found


def _thresholds(model: Model, test: ImageTest, load: Load) -> dict[str, float]:
    """Return the threshold of each label, from the settings or the validation images."""
    images, chosen = test.images, test.settings.threshold
    if chosen != "val":
        return dict.fromkeys(images.labels, float(chosen))
    split = moved_split(model, images)
    own, ids = (
        images_for(model, Inputs(part="val"), "val", test.progress, load)
        if split is None
        else (images, part_of(split, "val", images, model))
    )
    found = choose_thresholds(model.network, dataclasses.replace(test, images=own, ids=ids))
    for label, threshold in found.items():
        what = f" of {label}" if label else ""
        log.info("%s: threshold%s %g, chosen on %d images", model.source, what, threshold, len(ids))
    return found


def _plain(
    network: SegmentationNetwork, test: ImageTest, task: str = ""
) -> Iterator[ImagePrediction]:
    """Yield the prediction without dropout for each image of this process's share."""
    images, at, total = test.images, test.settings.at, len(test.ids)
    task = task or f"testing {test.name}"
    mine = test.processes.share(test.ids)
    found = probabilities(network, images, mine, test.batch_size, at)
    for done, (identity, probability) in enumerate(found, start=1):
        yield ImagePrediction(identity, probability, true_masks(test, identity), {})
        test.progress(task, min(total, test.processes.count * done), total)


def true_masks(test: ImageTest, identity: str) -> NDArray[np.uint8]:
    """Return the true masks of an image, (K, H, W) in {0, 1}, at the size of the test."""
    images, at = test.images, test.settings.at
    masks = images.masks(identity) if at == "network" else images.original(identity)[1]
    if masks is None:
        raise PolysegError("evaluate: the images have no masks to compare with")
    return masks


def _passes(model: Model, test: ImageTest) -> Iterator[ImagePrediction]:
    """Yield the mean over passes of MC Dropout, and uncertainties, for each image of a share.

    Uncertainties are averaged over the predicted foreground, because new images have no masks.
    """
    images, samples, at = test.images, test.settings.samples, test.settings.at
    settings = passes_of(model.config, region="prediction", save_maps=True, samples=samples)
    free = [name for name, row in FREE_SCORES.items() if row.function and row.of == "pixels"]
    also = [name for name, row in (WHOLE_SCORES | PAIR_SCORES).items() if not row.needs_mask]
    names = list(dict.fromkeys([settings.metric, *UNCERTAINTIES, *free, *also]))
    labels, mine = len(images.labels), set(test.processes.share(test.ids))
    choosing = _CHOOSING + test.batch_size if settings.samples == "auto" else 0
    for part in _parts(images, test.ids, choosing, test.processes):
        found = assess(
            model.network,
            images.batches(part, test.batch_size),
            settings,
            seed=model.config.training.seed,
            epoch=model.checkpoint.epoch,
            progress=test.progress,
            total=len(part),
            also=also,
        ).in_order(part)
        # With samples "auto", N is chosen from the first part for all.
        settings = settings.model_copy(update={"samples": found.samples})
        for i, identity in enumerate(part):
            if identity not in mine:
                continue
            rows = slice(i * labels, (i + 1) * labels)
            mean = np.stack(found.maps["mean"][rows]).astype(np.float64)
            yield ImagePrediction(
                identity,
                at_size(mean, images, identity, at),
                true_masks(test, identity),
                {name: found.scores[name][rows].tolist() for name in names},
            )


def _parts(
    images: ImageSet, ids: Sequence[str], choosing: int, processes: Processes
) -> Iterator[list[str]]:
    """Yield a process's share of the images in parts whose maps fit into memory.

    N is chosen from the first `choosing` images. If there are several processes, all of them get
    these images first, and choose the same N.
    """
    first = next(_chunks(images, ids))[:choosing] if processes.count > 1 else []
    rest = [identity for identity in processes.share(ids) if identity not in first]
    if first:
        yield first
    if rest:
        yield from _chunks(images, rest)


def _chunks(images: ImageSet, ids: Sequence[str]) -> Iterator[list[str]]:
    """Yield the images in parts whose maps fit into memory."""
    part: list[str] = []
    pixels = 0
    for identity in ids:
        height, width = images.item(identity).size
        pixels += height * width * len(images.labels)
        if part and pixels > _PIXELS_AT_ONCE:
            yield part
            part, pixels = [], height * width * len(images.labels)
        part.append(identity)
    yield part


def scores_of(
    test: ImageTest,
    predictions: Iterable[ImagePrediction],
    thresholds: Mapping[str, float],
    prediction: Prediction = "plain",
) -> list[RunScores]:
    """Return the metrics of all images by label; each process computes those of its share."""
    labels, at = test.images.labels, test.settings.at
    spacings = {one: _spacing(test.images, one, at) for one in test.ids}
    in_mm = None not in spacings.values()
    rows: list[list[ImageScores]] = []
    curves = [ReliabilityCurve() for _ in labels]
    for one in predictions:
        spacing = spacings[one.id] if in_mm else None
        rows.append(_scores_of_image(test, one, thresholds, spacing))
        for curve, probability, masks in zip(curves, one.probability, one.masks, strict=True):
            curve.add(probability, masks)
    rows, of_all = test.processes.joined(rows), test.processes.gathered(curves)
    return [
        RunScores(
            name=test.name,
            scores=[row[k] for row in rows],
            label=label,
            prediction=prediction,
            threshold=thresholds[label],
            unit="mm" if in_mm else "px",
            at=at,
            reliability=functools.reduce(operator.add, (curves[k] for curves in of_all)),
        )
        for k, label in enumerate(labels)
    ]


def _scores_of_image(
    test: ImageTest,
    one: ImagePrediction,
    thresholds: Mapping[str, float],
    spacing: tuple[float, float] | None,
) -> list[ImageScores]:
    """Return the metrics of one image, label by label."""
    return [
        image_scores(
            one.id,
            one.probability[k],
            one.masks[k],
            threshold=thresholds[label],
            spacing=spacing,
            tolerance=test.settings.tolerance,
            uncertainty={key: values[k] for key, values in one.uncertainty.items()},
            group=test.groups.get(one.id),
        )
        for k, label in enumerate(test.images.labels)
    ]


def _spacing(images: ImageSet, identity: str, at: At) -> tuple[float, float] | None:
    if at == "network":
        return images.item(identity).spacing
    return images.original_spacing(identity)


def _under_corruption(
    model: Model, test: ImageTest, clean: Sequence[RunScores]
) -> Iterator[RobustnessPoint]:
    """Yield the metrics of a network on images with each corruption and strength."""
    thresholds, mine = {run.label: run.threshold for run in clean}, test.processes.share(test.ids)
    for corruption in test.settings.corruptions:
        yield from (RobustnessPoint(run.title, corruption, 0, run.scores) for run in clean)
        for strength in STRENGTHS[1:]:
            # With one seed, all networks get the same corrupted images.
            images = corrupted(
                test.images, corruption, strength, seed=0, config=model.config.data, ids=mine
            )
            task = f"testing {test.name} under {corruption} {strength}"
            predictions = _plain(model.network, dataclasses.replace(test, images=images), task)
            for run in scores_of(test, predictions, thresholds):
                yield RobustnessPoint(run.title, corruption, strength, run.scores)


class MaskKeeper:
    """Stores the predicted masks, compressed, for the figures."""

    def __init__(self, name: str, labels: Sequence[str], thresholds: Mapping[str, float]) -> None:
        self.name, self.labels, self.thresholds = name, labels, thresholds
        self.packed: dict[str, dict[str, bytes]] = {label: {} for label in labels}
        self.shapes: dict[str, tuple[int, int]] = {}

    def __call__(self, one: ImagePrediction) -> ImagePrediction:
        """Store the masks of a prediction, and return the prediction."""
        for k, label in enumerate(self.labels):
            predicted = one.probability[k] >= self.thresholds[label]
            self.packed[label][one.id] = zlib.compress(np.packbits(predicted).tobytes(), 1)
            self.shapes[one.id] = (predicted.shape[0], predicted.shape[1])
        return one

    def masks(self, processes: Processes) -> list[PredictedMasks]:
        """Return the masks of all processes, with a record for each label."""
        packed = {label: _merged(processes.gathered(self.packed[label])) for label in self.labels}
        shapes = _merged(processes.gathered(self.shapes))
        return [PredictedMasks(self.name, label, packed[label], shapes) for label in self.labels]


def _merged(parts: Sequence[Mapping[str, T]]) -> dict[str, T]:
    return {key: value for part in parts for key, value in part.items()}


def _dice_curve(probability: NDArray[np.floating], mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the Dice at each of `THRESHOLDS`, 1 if mask and prediction are empty."""
    truth = mask > 0
    found = []
    for threshold in THRESHOLDS:
        predicted = probability >= threshold
        total = int(predicted.sum()) + int(truth.sum())
        found.append(2 * int((predicted & truth).sum()) / total if total else 1.0)
    return np.array(found)

"""The jobs behind the commands, each put together from the rooms above it."""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyseg import evaluate, losses, plots, report
from polyseg.cache import write_assessment
from polyseg.config import POLYDICE_LOSSES, Config
from polyseg.data import phantoms
from polyseg.data.dataset import ImageSet, load_folder, load_images
from polyseg.data.splits import PARTS, Split, refuse_leaks, split_by_ratio
from polyseg.errors import PolysegError
from polyseg.files import write_text
from polyseg.inference import choose_device, predict
from polyseg.montecarlo import assess
from polyseg.networks import SegmentationNetwork
from polyseg.records import Assessment, Progress, no_progress
from polyseg.run import (
    Checkpoint,
    RunDirectory,
    find_checkpoint,
    new_run_path,
    read_checkpoint,
)
from polyseg.train import Trainer

log = logging.getLogger(__name__)

_FREE_TO_CHANGE = ("training.epochs", "training.device", "training.workers", "output.")


@dataclass(frozen=True)
class Outcome:
    """What a job has to show."""

    folder: Path
    files: list[Path]
    runs: Sequence[evaluate.RunScores] = ()
    correlations: Sequence[Mapping[str, Any]] = ()


def train(config: Config, *, resume: bool = False, progress: Progress = no_progress) -> Outcome:
    """Train, test the best checkpoint, draw the figures.

    Raises:
        PolysegError: data, settings or folder are not in order.
        Interrupted: a signal ended the training; its last epoch is committed.
    """
    run = RunDirectory(Path(config.output.path) if config.output.path else new_run_path())
    config = _located(config)
    if resume:
        config = resumed_config(config, run)
    images = load_images(config.data, progress)
    with run.writing(resume=resume), _log_to(run.log):
        split = _split_of_run(run, images) if resume else new_split(config, images)
        if not resume:
            run.begin(config, split, images.hashes)
        _log_start(config, images, split, run)
        trainer = Trainer(config, images, split, run, progress)
        if resume:
            trainer.resume()
            log.info("resumed after epoch %d", trainer.epoch)
        trainer.fit()
        return _report(trainer, progress)


def plan(config: Config) -> dict[str, Any]:
    """Return what a training run would cost, without training: counts and the share of MC Dropout.

    A training image is counted as three passes, one forward and two for the gradients.
    """
    images = load_images(config.data)
    split = new_split(config, images)
    epochs = config.training.epochs
    moments = config.control.assessment_epochs(epochs) if config.adaptive else []
    stochastic = len(moments) * config.uncertainty.samples * len(split["train"])
    plain = epochs * (3 * len(split["train"]) + len(split["val"]))
    return {
        "images": {part: len(ids) for part, ids in split.items()},
        "image sizes": sorted(f"{height} x {width}" for height, width in images.sizes()),
        "channels": images.channels,
        "epochs": epochs,
        "training steps": epochs * -(-len(split["train"]) // config.training.batch_size),
        "assessed after epochs": moments,
        "MC-Dropout passes of an image": stochastic,
        "share of MC Dropout": round(stochastic / (stochastic + plain), 3),
    }


def estimate_uncertainty(
    source: Path,
    *,
    data: Path | None = None,
    part: str | None = None,
    samples: int | None = None,
    save_maps: bool = False,
    out: Path | None = None,
    device: str = "auto",
    trust: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Measure the uncertainty of a checkpoint about any images, in the format of a run's record.

    Raises:
        PolysegError: checkpoint, data or folder are not in order.
    """
    model = _open(source, device, trust)
    images, ids = _images_for(model, data, part, "all", progress)
    folder = _fresh_folder(out or _beside(source, "uncertainty-estimate"))
    settings = model.config.uncertainty
    assessment = assess(
        model.network,
        images.batches(ids, model.config.training.batch_size),
        samples=samples or settings.samples,
        metric=settings.metric,
        region=settings.region,
        boundary_width=settings.boundary_width,
        masks=settings.masks,
        seed=model.config.training.seed,
        epoch=model.checkpoint.epoch,
        save_maps=save_maps,
        progress=progress,
        total=len(ids),
    )
    assessment = dataclasses.replace(assessment, config_yaml=model.config.to_yaml())
    write_assessment(folder / "assessment.h5", assessment)
    write_text(folder / "per_image.csv", report.assessment_csv(assessment))
    files = [folder / "assessment.h5", folder / "per_image.csv"]
    files += report.draw_assessment(assessment, folder / "figures")
    files += _draw_extremes(model.network, model.config, images, assessment, folder / "figures")
    correlations = report.difficulty_correlations(assessment, images.known_difficulty)
    return Outcome(folder, files, correlations=correlations)


def evaluate_runs(
    sources: Sequence[Path],
    *,
    data: Path | None = None,
    part: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    trust: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Test checkpoints side by side on the same images.

    Raises:
        PolysegError: checkpoint, data or folder are not in order, or the images differ.
    """
    scores, tested = [], {}
    for source, name in zip(sources, _names(sources), strict=True):
        model = _open(source, device, trust)
        images, ids = _images_for(model, data, part, "test", progress)
        hashes = {identity: images.hashes[identity] for identity in ids}
        if tested and hashes != next(iter(tested.values())):
            raise PolysegError(
                f"{source}: would be tested on other images than {next(iter(tested))}; give runs "
                "of one split, or --data"
            )
        tested[source] = hashes
        scores.append(score(name, model.network, model.config, images, ids, progress=progress))
    folder = _fresh_folder(out or _beside(sources[0], "evaluation"))
    return Outcome(folder, report.write_scores(scores, folder, figures=True), scores)


def score(
    name: str,
    network: SegmentationNetwork,
    config: Config,
    images: ImageSet,
    ids: Sequence[str],
    *,
    progress: Progress = no_progress,
) -> evaluate.RunScores:
    """Return the metrics of a network on some images, image by image.

    Raises:
        PolysegError: the images have no masks.
    """
    results = []
    for batch, logits in predict(network, images.batches(ids, config.training.batch_size)):
        if batch.masks is None:
            raise PolysegError("evaluate: the images have no masks to compare with")
        for identity, one, mask in zip(batch.ids, logits[:, 0], batch.masks, strict=True):
            probability = one.double().sigmoid().numpy()
            results.append(evaluate.image_scores(identity, probability, mask.numpy()))
        progress(f"testing {name}", len(results), len(ids))
    return evaluate.RunScores(name, results)


def new_split(config: Config, images: ImageSet) -> Split:
    """Divide the images as the settings say, and make sure that no image is on two sides.

    Raises:
        PolysegError: too few images, sizes that no batch can hold, or one image on two sides.
    """
    if len(images.sizes()) > 1 and config.training.batch_size > 1:
        raise PolysegError(
            f"data.size: the images have {len(images.sizes())} sizes and no batch can hold them; "
            "set data.size, or training.batch_size=1"
        )
    split = split_by_ratio(images.ids, config.data.split, config.data.split_seed)
    refuse_leaks(split, images.hashes)
    return split


def _located(config: Config) -> Config:
    """Return the settings with a data path that holds from anywhere."""
    if config.data.path == "demo":
        return config
    data = config.data.model_copy(update={"path": str(Path(config.data.path).resolve())})
    return config.model_copy(update={"data": data})


def resumed_config(config: Config, run: RunDirectory) -> Config:
    """Return the configuration to go on with: the run's, with what may change from `config`.

    Raises:
        PolysegError: a setting differs that would change the result, by name.
    """
    recorded = read_checkpoint(run.last).config
    wanted, kept = _flat(config.model_dump()), _flat(recorded.model_dump())
    differing = [
        f"{key} {kept[key]} -> {wanted[key]}"
        for key in wanted
        if wanted[key] != kept.get(key) and not key.startswith(_FREE_TO_CHANGE)
    ]
    if differing:
        raise PolysegError(
            f"{run.path}: --resume cannot change {'; '.join(differing)}; start a new run instead"
        )
    return config


@dataclass(frozen=True)
class _Model:
    source: Path
    run: RunDirectory | None
    checkpoint: Checkpoint
    network: SegmentationNetwork

    @property
    def config(self) -> Config:
        return self.checkpoint.config


def _open(source: Path, device: str, trust: bool) -> _Model:
    path = find_checkpoint(source)
    checkpoint = read_checkpoint(path)
    network = checkpoint.build(trust=trust).to(choose_device(device))
    run = RunDirectory(path.parent.parent)
    return _Model(source, run if run.split.is_file() else None, checkpoint, network)


def _images_for(
    model: _Model, data: Path | None, part: str | None, default: str, progress: Progress
) -> tuple[ImageSet, list[str]]:
    """Return images and the ids to use: a part of the run's own data, or all of a folder."""
    config = model.config.data
    own = data is None or (config.path != "demo" and data.resolve() == Path(config.path).resolve())
    if not own and data is not None:
        if part not in (None, "all"):
            raise PolysegError(f"--split {part}: {data} is not what {model.source} was trained on")
        images = load_folder(data, config, model.checkpoint.channels, progress)
        return images, images.ids
    images = load_images(config, progress)
    split = _split_of_run(model.run, images) if model.run else new_split(model.config, images)
    part = part or default
    return images, images.ids if part == "all" else split[part]


def _split_of_run(run: RunDirectory, images: ImageSet) -> Split:
    split, hashes = run.read_split()
    for identity, digest in hashes.items():
        if images.hashes.get(identity) != digest:
            what = "has changed" if identity in images.hashes else "is missing"
            raise PolysegError(f"data: image {identity} {what} since {run.path} was made")
    return split


def _log_to(path: Path) -> "_LogFile":
    return _LogFile(path)


class _LogFile:
    """Everything that the package logs, also into the run's log.txt."""

    def __init__(self, path: Path) -> None:
        self.handler = logging.FileHandler(path, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def __enter__(self) -> None:
        logging.getLogger("polyseg").addHandler(self.handler)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("polyseg").removeHandler(self.handler)
        self.handler.close()


def _log_start(config: Config, images: ImageSet, split: Split, run: RunDirectory) -> None:
    counts = ", ".join(f"{len(split[part])} {part}" for part in PARTS)
    what = "demo phantoms" if config.data.path == "demo" else config.data.path
    log.info("%s: %s images; run folder %s", what, counts, run.path)
    empty = [
        identity
        for identity in split["train"]
        if images.masks is not None and not images.masks[images.index[identity]].any()
    ]
    pushes = config.loss.bce_weight > 0 or config.loss.smooth >= 1
    if empty and config.loss.name in (*POLYDICE_LOSSES, "dice") and not pushes:
        log.warning(
            "%d of %d training masks are empty, and %s with smooth %g hardly learns from them; "
            "set loss.smooth=1 or loss.bce_weight above 0",
            len(empty),
            len(split["train"]),
            config.loss.name,
            config.loss.smooth,
        )


def _report(trainer: Trainer, progress: Progress) -> Outcome:
    """Test the best checkpoint and draw what there is to see."""
    run, config, images = trainer.run, trainer.config, trainer.images
    files = [run.history]
    scores: list[evaluate.RunScores] = []
    if trainer.split["test"]:
        best = read_checkpoint(run.best).build(trust=True).to(trainer.device)
        scores = [
            score(run.path.name, best, config, images, trainer.split["test"], progress=progress)
        ]
        files += report.write_scores(scores, run.evaluation, figures=config.output.figures)
    correlations: list[dict[str, Any]] = []
    if trainer.assessments:
        assessments = report.read_assessments(run, trainer.assessments)
        correlations = report.difficulty_correlations(assessments[-1], images.known_difficulty)
        report.log_correlations(correlations)
        if config.output.figures:
            files += report.draw_assessment(assessments[-1], run.figures)
            files += report.draw_difficulties(assessments, run.figures)
            files += _draw_extremes(trainer.network, config, images, assessments[-1], run.figures)
    if config.output.figures:
        files += report.draw_history(trainer.history, run.figures)
        files += report.draw_schedule(np.stack(trainer.epsilons), config, run.figures)
    return Outcome(run.path, files, scores, correlations)


def _draw_extremes(
    network: SegmentationNetwork,
    config: Config,
    images: ImageSet,
    assessment: Assessment,
    folder: Path,
) -> list[Path]:
    """Draw the hardest and the easiest images; their maps are measured anew, none are kept."""
    order = np.argsort(-assessment.difficulty, kind="stable")
    shown = min(config.output.overlays, len(order))
    files = []
    for title, rows in (("hardest", order[:shown]), ("easiest", order[::-1][:shown])):
        if len(rows) == 0:
            continue
        ids = [assessment.ids[i] for i in rows]
        again = _assess_again(network, config, images, ids, assessment)
        path = folder / f"overlays_{title}"
        files += report.draw_overlays(again, images, path, f"The {len(ids)} {title} images")
    return files


def _assess_again(
    network: SegmentationNetwork,
    config: Config,
    images: ImageSet,
    ids: Sequence[str],
    assessment: Assessment,
) -> Assessment:
    """Return the assessment of some of the images, with their maps."""
    settings = config.uncertainty
    return assess(
        network,
        images.batches(ids, config.training.batch_size),
        samples=assessment.samples,
        metric=assessment.metric,
        region=settings.region,
        boundary_width=settings.boundary_width,
        masks=settings.masks,
        seed=assessment.seed,
        epoch=assessment.epoch,
        save_maps=True,
    )


def _fresh_folder(path: Path) -> Path:
    """Return a folder that is there and empty.

    Raises:
        PolysegError: it holds something already, or cannot be made.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise PolysegError(f"{path}: is not empty and nothing is overwritten; choose another --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PolysegError(f"{path}: cannot be made: {error.strerror}") from error
    return path


def _beside(source: Path, name: str) -> Path:
    """Return where results go that were given no place: into the run, or beside the checkpoint."""
    folder = source if source.is_dir() else source.parent
    return folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _names(sources: Sequence[Path]) -> list[str]:
    """Return a short name for each source that tells it from the others."""
    parts = [source.resolve().parts for source in sources]
    length = next(
        n for n in range(1, 99) if n > 90 or len({part[-n:] for part in parts}) == len(set(parts))
    )
    return ["/".join(part[-length:]) for part in parts]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and not prefix
        flat |= _flat(value, f"{key}.") if nested else {prefix + key: value}
    return flat


def plot_loss(
    *, s: float, epsilons: Sequence[float], terms: int, gradient: bool, out: Path
) -> list[Path]:
    """Draw the loss, or its derivative, over the angle, and return the files.

    Raises:
        PolysegError: s, an epsilon, the terms or the file's suffix are not in order.
    """
    if not 0 < s <= 1:
        raise PolysegError(f"--s {s:g}: a scale is above 0 and at most 1")
    if not 1 <= terms <= 10:
        raise PolysegError(f"--terms {terms}: from 1 to 10")
    if not epsilons or min(epsilons) < -0.5:
        raise PolysegError("--epsilon: give numbers of at least -0.5, separated by commas")
    theta = np.linspace(0, math.pi / 2, 1001)
    curves = {e: losses.polydice1_curve(theta, e, s, terms=terms) for e in epsilons}
    dice = 1 - s * np.cos(theta)
    # Where the loss is above 1 whatever s, it falls with s.
    wrong = {
        e: float(theta[np.argmax(curve > 1)]) for e, curve in curves.items() if (curve > 1).any()
    }
    if gradient:
        curves = {e: np.gradient(curve, theta, edge_order=2) for e, curve in curves.items()}
        dice = s * np.sin(theta)
    figure = plots.loss_curves(
        theta,
        curves,
        dice,
        s=s,
        ylabel="d loss / d θ" if gradient else "loss",
        wrong_sign=wrong,
    )
    return plots.save_figure(figure, out)


def check_data(config: Config, progress: Progress = no_progress) -> dict[str, Any]:
    """Read a folder whole and return what was found.

    Raises:
        PolysegError: all that is wrong with it, a line a problem.
    """
    data = config.data.model_copy(update={"size": None})
    images = load_images(data, progress)
    masks = images.masks or []
    shares = np.array([mask.mean() for mask in masks])
    copies = len(images.hashes) - len(set(images.hashes.values()))
    return {
        "pairs": len(images.ids),
        "sizes": sorted(f"{height} x {width}" for height, width in images.sizes()),
        "channels": images.channels,
        "bits": sorted({8 * image.dtype.itemsize for image in images.images}),
        "foreground, mean": round(float(shares.mean()), 4),
        "foreground, range": [round(float(shares.min()), 4), round(float(shares.max()), 4)],
        "empty masks": int((shares == 0).sum()),
        "copies of another image": copies,
    }


def write_demo(path: Path, *, count: int, size: int, modality: str, seed: int) -> None:
    """Write phantoms as PNG files, with a table of their known difficulties.

    Raises:
        PolysegError: the folder is not empty, or an argument is out of bounds.
    """
    if modality not in phantoms.MODALITIES:
        raise PolysegError(f"--modality {modality}: choose {' or '.join(phantoms.MODALITIES)}")
    if not (1 <= count <= 100_000 and 32 <= size <= 1024):
        raise PolysegError("--images: 1 to 100000; --size: 32 to 1024")
    made = phantoms.make_phantoms(count, seed=seed, size=(size, size), modality=modality)
    phantoms.write_phantoms(path, made)

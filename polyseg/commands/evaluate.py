"""`polyseg evaluate`: test networks, and masks of other tools, side by side on the same images."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from polyseg.commands.outcome import Outcome
from polyseg.config import Config, DataConfig
from polyseg.data.corruptions import CORRUPTIONS
from polyseg.data.dataset import ImageSet
from polyseg.data.loading import load_images
from polyseg.data.splits import PARTS, split_by_settings
from polyseg.errors import PolysegError
from polyseg.evaluation.arms import arms_of, pool_arms, pool_points, roles_of
from polyseg.evaluation.comparison import compare
from polyseg.evaluation.conclusion import conclusions
from polyseg.evaluation.scores import Evaluation, RunScores
from polyseg.evaluation.testing_masks import OtherMasks, measure_masks
from polyseg.evaluation.testing_networks import (
    EvaluationSettings,
    ImageTest,
    NetworkResults,
    measure_network,
    patients_of,
)
from polyseg.figures import evaluation_files
from polyseg.networks.inference import choose_device
from polyseg.records import Progress, no_progress
from polyseg.registry import not_among
from polyseg.runs.run_folder import results_beside
from polyseg.runs.trained_model import Inputs, LastImages, Model, Trained, images_for, read_trained
from polyseg.system.files import short_names
from polyseg.system.output_folder import moved, whole_folder
from polyseg.system.process_group import PATIENCE, Processes, together

log = logging.getLogger(__name__)

_KNOWN_BY = ("summary.json",)

Hashes = Mapping[str, str]
Arms = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class _Compared:
    """The networks that are compared, before any is tested."""

    networks: dict[str, Trained]
    """Networks that are not tested yet, by their names."""
    configs: Mapping[str, Config]
    arms: Arms
    reference: str | None


@dataclass(frozen=True)
class _Found:
    """The results of all networks and folders of masks, before they are compared."""

    tested: Mapping[str, NetworkResults]
    """Results by name."""
    compared: _Compared
    images: ImageSet
    """The images of the first network."""
    part: str
    """Name of the tested part."""

    def evaluation(self, settings: EvaluationSettings) -> Evaluation:
        """Return the results of each arm, and their comparison with the baseline."""
        runs: list[RunScores] = []
        arms, reference = self.compared.arms, self.compared.reference
        for name, test in self.tested.items():
            config = self.compared.configs.get(name)
            seed = None if config is None else config.training.seed
            fold = None if config is None else config.data.fold
            runs += [dataclasses.replace(run, seed=seed, fold=fold) for run in test.scores]
        points = [point for test in self.tested.values() for point in test.points]
        if any([arm] != list(members) for arm, members in arms.items()):
            points, runs = pool_points(points, runs, arms), pool_arms(runs, arms)
        found = Evaluation(runs, (), points, settings.tolerance, settings.failure, self.part)
        if reference is None:
            return found
        compared = compare(runs, reference)
        sentences = conclusions(compared, roles_of(self.compared.configs, arms))
        return dataclasses.replace(found, comparisons=compared, conclusions=sentences)


def corruption_names(text: str | None) -> tuple[str, ...]:
    """Return the corruptions in a list separated by commas, all for "all", none for None.

    Raises:
        PolysegError: the list is empty, as from an unset variable of a script.

    >>> corruption_names("noise, blur")
    ('noise', 'blur')
    """
    if text == "all":
        return CORRUPTIONS
    names = tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    if text is not None and not names:
        raise PolysegError(f"--corrupt: the list is empty; choose {', '.join(CORRUPTIONS)}, or all")
    return names


@dataclass(frozen=True)
class ComparisonSettings:
    """How runs are compared, and where the results are written."""

    baseline: str | None = None
    """Name or path of the run, or name of the arm, that the others are compared with."""
    group: bool = False
    """Whether runs that differ only by seed or fold are one arm."""
    out: Path | None = None
    """Folder for the results, new or empty; None for one beside the runs."""
    overwrite: bool = False
    """Whether results of an earlier evaluation in `out` are replaced."""
    figures: bool = True
    """Whether to draw figures."""


def evaluate_runs(
    sources: Sequence[Path],
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008 - it is frozen
    inputs: Inputs = Inputs(),  # noqa: B008
    comparison: ComparisonSettings = ComparisonSettings(),
    *,
    masks: OtherMasks | None = None,
    progress: Progress = no_progress,
) -> Outcome:
    """Test networks, and masks of other tools, side by side on the same images.

    `sources` are checkpoints or runs, `masks` folders of masks that other tools have written.
    Several processes share the images; the leading one compares, writes and draws.
    """
    settings.check()
    folders: Mapping[str, Path] = {} if masks is None else masks.folders
    if folders and settings.at == "network":
        raise PolysegError(
            "--at network: masks of other tools have the original size; leave it out"
        )
    places = [*sources, *folders.values()]
    place = comparison.out or _default_folder(sources, list(folders.values()))
    with contextlib.ExitStack() as stack:
        with together(choose_device(inputs.device), PATIENCE) as processes:
            held = whole_folder(place, overwrite=comparison.overwrite, known_by=_KNOWN_BY)
            folder = processes.entered_by_leader(stack, held)
            compared = _compared(sources, inputs, comparison, folders)
            how = _TestContext(settings, inputs, progress, processes)
            found = _test(compared, how, masks)
        if not processes.leads:
            return Outcome(place, [])
        paths = [os.path.relpath(one.resolve(), place.resolve()) for one in places]
        progress("comparing", 0, 1)
        evaluation = dataclasses.replace(found.evaluation(settings), sources=paths)
        progress("comparing", 1, 1)
        figures = comparison.figures
        progress("writing and drawing", 0, 1)
        files = evaluation_files.write_evaluation(evaluation, folder, figures=figures)
        if figures:
            drawn = [one for test in found.tested.values() for one in test.masks]
            files += evaluation_files.draw_predictions(evaluation, drawn, found.images, folder)
        progress("writing and drawing", 1, 1)
    return Outcome(place, moved(files, folder, place), evaluation)


def _default_folder(sources: Sequence[Path], folders: Sequence[Path]) -> Path:
    """Return a new folder for results: in a single run, or in a folder that all runs share."""
    if len(sources) == 1 and not folders:
        return results_beside(sources[0], "evaluation")
    shared = Path(os.path.commonpath([one.resolve().parent for one in (*sources, *folders)]))
    if shared == Path(shared.anchor):
        raise PolysegError("evaluate: the runs have no folder in common; give --out")
    return results_beside(shared, "comparison")


class _TestContext(NamedTuple):
    """Settings and surroundings of all tests."""

    settings: EvaluationSettings
    inputs: Inputs
    progress: Progress
    processes: Processes

    def test(
        self, name: str, images: ImageSet, ids: Sequence[str], config: DataConfig, batch_size: int
    ) -> ImageTest:
        """Return a test of some images, with their patients."""
        groups = {} if self.settings.by == "image" else patients_of(images, config)
        return ImageTest(
            name, images, ids, batch_size, self.settings, self.progress, self.processes, groups
        )


def _compared(
    sources: Sequence[Path],
    inputs: Inputs,
    comparison: ComparisonSettings,
    folders: Mapping[str, Path],
) -> _Compared:
    """Read the networks, and raise errors that can be found before the first one is tested."""
    names = short_names(sources) if sources else []
    # Read each file once, and keep only what a test needs.
    trained = [read_trained(source).weights_only() for source in sources]
    networks = dict(zip(names, trained, strict=True))
    configs = {name: one.config for name, one in networks.items()}
    arms = arms_of(configs) if comparison.group else {name: [name] for name in names}
    if taken := [name for name in folders if name in arms or name in names]:
        raise PolysegError(f"--name {taken[0]}: is the name of a run; choose another")
    arms |= {name: [name] for name in folders}
    everything = [*sources, *folders.values()]
    all_names = [*names, *folders]
    baseline = comparison.baseline
    reference = None if baseline is None else _baseline_name(baseline, everything, all_names, arms)
    if configs:
        _refuse_other_tasks(configs)
    if not inputs.data:
        planned = {name: _planned_images(one, inputs.part) for name, one in networks.items()}
        _refuse_other_images(arms, {name: found for name, found in planned.items() if found})
    return _Compared(networks, configs, arms, reference)


def _test(compared: _Compared, how: _TestContext, masks: OtherMasks | None) -> _Found:
    """Return the results of all networks and folders of masks."""
    load, part = LastImages(how.inputs.cache), how.inputs.part
    hashes: dict[str, Hashes] = {}
    tested: dict[str, NetworkResults] = {}
    images: ImageSet | None = None
    for name in compared.configs:
        model = compared.networks.pop(name).build(how.inputs.device, trust=how.inputs.trust)
        found, ids = images_for(model, how.inputs, "test", how.progress, load)
        hashes[name] = {one: f"{found.hashes[one]} {found.item(one).shares}" for one in ids}
        _refuse_other_images(compared.arms, hashes)
        if part in ("train", "val") or (how.inputs.data is None and part == "all"):
            log.warning(
                "%s: --split %s includes images used for training or validation, so that this is "
                "not a test",
                name,
                part,
            )
        _warn_if_early(name, model)
        images = images or found
        size = model.config.training.batch_size
        test = how.test(name, found, ids, model.config.data, size)
        tested[name] = measure_network(model, test, load)
    if how.settings.at == "network":
        _warn_of_sizes(compared.configs)
    if masks is not None:
        if images is None:
            config = masks.config
            images, ids = _images_without_run(config, how)
        else:
            config = next(iter(compared.configs.values())).data
            ids = sorted({one for of_run in hashes.values() for one in of_run})
        test = how.test("", images, ids, config, 1)
        for name, folder in masks.folders.items():
            tested[name] = measure_masks(folder, dataclasses.replace(test, name=name), config)
    if images is None:
        raise PolysegError("Missing argument: give runs, or --predictions with --data")
    return _Found(tested, compared, images, part or "test")


def _warn_if_early(name: str, model: Model) -> None:
    """Warn of weights of an adaptive run that no adapted epsilon has trained."""
    config = model.config
    first = config.control.assessment_epochs(config.training.epochs) if config.assesses else []
    if first and model.checkpoint.epoch <= first[0]:
        log.warning(
            "%s: these weights are of epoch %d, before the first with adapted epsilons (%d), so "
            "differences from it do not show the effect of adapting",
            name,
            model.checkpoint.epoch,
            first[0] + 1,
        )


def _images_without_run(config: DataConfig, how: _TestContext) -> tuple[ImageSet, list[str]]:
    """Return the images of a data set, and the ids of the tested part, of all if none is named."""
    images, part = load_images(config, how.progress), how.inputs.part
    if part not in (None, "all", *PARTS):
        raise PolysegError(f"--split {part}: choose {', '.join(PARTS)} or all")
    ids = images.ids if part in (None, "all") else split_by_settings(images.members(), config)[part]
    if not ids:
        raise PolysegError(f"--split {part}: {config.path} has no {part} images; choose another")
    return images, ids


def _planned_images(network: Trained, part: str | None) -> Hashes | None:
    """Return the images that a run tests on by its split; None for a checkpoint without run."""
    if network.run is None:
        return None
    split, hashes = network.run.read_split()
    if part == "all":
        return hashes
    return {identity: hashes[identity] for identity in split.get(part or "test", [])}


def _refuse_other_tasks(configs: Mapping[str, Config]) -> None:
    """Raise PolysegError unless all networks were trained for the same labels."""
    (first, wanted), *others = configs.items()
    for name, config in others:
        if config.data.tasks != wanted.data.tasks:
            raise PolysegError(
                f"{name}: was trained on other labels than {first} (data.foreground "
                f"{config.data.foreground} and {wanted.data.foreground}); evaluate them separately"
            )


def _refuse_other_images(arms: Arms, hashes: Mapping[str, Hashes]) -> None:
    """Raise PolysegError unless all arms, or runs, are tested on the same images and masks.

    `hashes` are those of the runs whose images are known already.
    """
    seen = {
        arm: _merged([(name, hashes[name]) for name in names if name in hashes])
        for arm, names in arms.items()
    }
    known = {arm: found for arm, found in seen.items() if all(name in hashes for name in arms[arm])}
    for arm, found in known.items():
        first = next(iter(known))
        if found == known[first]:
            continue
        if [arm] == list(arms[arm]):
            raise PolysegError(
                f"{arm}: would be tested on other images, or masks, than {first}; give runs of one "
                "split, --data of new images, or --group for runs of several folds"
            )
        raise PolysegError(
            f"--group: the runs of {arm} ({', '.join(arms[arm])}) have other images than those of "
            f"{first} ({', '.join(arms[first])}); give the same folds of each"
        )


def _merged(runs: Sequence[tuple[str, Hashes]]) -> Hashes:
    merged: dict[str, str] = {}
    owner: dict[str, str] = {}
    for name, hashes in runs:
        for identity, digest in hashes.items():
            if merged.setdefault(identity, digest) != digest:
                raise PolysegError(f"{name}: its image {identity} is not that of {owner[identity]}")
            owner.setdefault(identity, name)
    return merged


def _warn_of_sizes(configs: Mapping[str, Config]) -> None:
    sizes = {str(config.data.size) for config in configs.values()}
    if len(sizes) > 1:
        log.warning(
            "the networks see the images at different sizes (data.size %s): metrics with --at "
            "network are not comparable; use --at original",
            " and ".join(sorted(sizes)),
        )


def _baseline_name(baseline: str, sources: Sequence[Path], names: Sequence[str], arms: Arms) -> str:
    """Return the name in tables of the baseline that the user named."""
    if len(arms) < 2:
        what = "one arm" if len(sources) > 1 else "one run"
        raise PolysegError(
            f"--baseline: there is only {what} to test; name the baseline and the others, as in "
            "polyseg evaluate A B --baseline A"
        )
    if baseline in arms:
        return baseline
    wanted = Path(baseline).resolve()
    for source, name in zip(sources, names, strict=True):
        if source.resolve() == wanted or name == baseline:
            return next(arm for arm, members in arms.items() if name in members)
    raise PolysegError(f"--baseline {not_among(baseline, tuple(arms), 'tested run or arm')}")

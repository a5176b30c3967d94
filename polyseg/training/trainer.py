"""Train a network: epochs, validation, assessments, and a commit after each epoch."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyseg.adaptive.controller import Adapted, EpsilonControl, Recorder
from polyseg.adaptive.replay import epsilon_of_batch
from polyseg.choices import NORMALISATIONS, WHOLE_SCORES
from polyseg.config import LARGEST_EPSILON, Config, UncertaintyConfig, least_epsilon
from polyseg.data.augmentation import changes_of
from polyseg.data.dataset import ImageSet
from polyseg.data.splits import Split
from polyseg.data.training_batches import training_batches
from polyseg.errors import PolysegError
from polyseg.metrics.dice import dice_coefficient
from polyseg.montecarlo.assessment import assess, spread
from polyseg.networks.dropout import active_layers, refuse_hidden_dropout
from polyseg.networks.inference import choose_algorithms, choose_device, predict
from polyseg.networks.segmentation_network import SegmentationNetwork, refuse_untrainable
from polyseg.records import Assessment, Progress, Schedule, no_progress
from polyseg.registry import is_own
from polyseg.runs.checkpoints import Checkpoint, columns_of
from polyseg.runs.history import Epoch, completed, row_of
from polyseg.runs.record_files import read_assessment, write_assessment
from polyseg.runs.run_folder import RunDirectory, in_order
from polyseg.runs.weights import new_network
from polyseg.system.memory import explaining_memory
from polyseg.system.process_group import ALONE, Processes
from polyseg.system.seeds import derive_seed
from polyseg.system.signals import StopRequest, ending_when_asked, interruption
from polyseg.training.log_lines import (
    epoch_line,
    log_assessment,
    log_first_adaptive_epoch,
    warn_if_best_is_early,
)
from polyseg.training.losses_by_name import as_tasks
from polyseg.training.nonfinite import FiniteCheck
from polyseg.training.optimizers import learning_rate, optimizer_tensors
from polyseg.training.own_code import check_own_code
from polyseg.training.step import Step, Steps, of_all_processes

log = logging.getLogger(__name__)


_LESS_MEMORY = (
    "lower training.batch_size or data.size, or set training.precision=bf16; the last epoch is "
    "kept, and --resume continues it with the same batch size"
)


class Trainer:
    """The state of a training run: weights, optimizer, last assessment and history.

    An epoch depends only on config, images, split and the state before it, so a resumed run equals
    an uninterrupted one.
    """

    def __init__(
        self,
        config: Config,
        images: ImageSet,
        split: Split,
        run: RunDirectory,
        progress: Progress = no_progress,
        replay: Schedule | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.processes, self.progress = processes, progress
        self.config, self.images, self.split, self.run = config, images, split, run
        self.replay = replay
        """Recorded epsilons in the order of the training images; None to assess images."""
        self.record_hashes(replay="", split="")
        self.device = choose_device(config.training.device)
        check_own_code(config)
        choose_algorithms(self.device, deterministic=config.training.deterministic)
        self.network = self._new_network(images.channels)
        if NORMALISATIONS[config.data.normalise].pooled:
            images = dataclasses.replace(images, levels=images.pooled_over(split["train"]))
            self.images = images
        self._refuse_unfit_dropout()
        self.steps = Steps(self.network, config, processes)
        self.finite_check = FiniteCheck(self.steps, run.last)
        self.changes = changes_of(config.data)
        self.control = EpsilonControl(
            config.control, config.loss.epsilon, labels=len(images.labels)
        )
        self.epoch = 0
        self.best_epoch, self.best_dice = 0, -1.0
        self.history: list[dict[str, float]] = []
        self.recorder = Recorder(split["train"], len(images.labels))
        self.assessed: list[int] = []
        """The epoch of the assessment that each trained epoch used; -1 for none."""
        self.assessments: dict[str, str] = {}
        """The sha256 of each assessment file by its name."""
        self.losses: dict[str, list[float]] = {}
        """Losses of each image in its last trained epoch, at the constant epsilon, by label."""
        self.stop = StopRequest()

    def _refuse_unfit_dropout(self) -> None:
        """Raise PolysegError at once, not hours later, if MC Dropout cannot assess the network."""
        passes = self.config.assesses and self.config.uncertainty.takes_passes
        if passes:
            active_layers(self.network)
        if passes or self.processes.count > 1:
            image, _ = self.images.patch(self.split["train"][0], seed=0)
            with explaining_memory("training", _LESS_MEMORY):
                refuse_hidden_dropout(self.network, image.to(self.device).repeat(2, 1, 1, 1))

    def _new_network(self, channels: int) -> SegmentationNetwork:
        """Return the network with initial weights; PolysegError if it does not fit into memory."""
        if ":" not in self.config.network.name:
            with torch.device("meta"):
                planned = new_network(self.config, channels)
            refuse_untrainable(planned, self.device)
        torch.manual_seed(derive_seed(self.config.training.seed, "weights"))
        with explaining_memory("network", "lower its channels or features"):
            return new_network(self.config, channels).to(self.device)

    def fit(self) -> None:
        """Train to the last epoch, or until early stopping or a signal.

        Raises:
            Interrupted: a signal came; the last completed epoch is committed.
            PolysegError: a loss or an uncertainty is not finite, or files cannot be written.
        """
        epochs = self.config.training.epochs
        with ending_when_asked(self._progress_text) as self.stop, self._prefer_own_signal():
            if self.epoch == 0:
                self._start()
            while self.epoch < epochs and not self._stopped_early():
                self._run_epoch(self.epoch + 1)
                self.progress("training", self.epoch, epochs)
                self._raise_on_signal()
        log.info("best validation Dice %.4f at epoch %d", self.best_dice, self.best_epoch)
        warn_if_best_is_early(self.assessed, self.best_epoch)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore the state and the folder of a committed epoch.

        Raises:
            PolysegError: a file that the checkpoint refers to is damaged or missing.
        """
        self.steps.restore(checkpoint)
        self.epoch = checkpoint.epoch
        self.best_epoch, self.best_dice = checkpoint.best_epoch, checkpoint.best_dice
        self.assessments = dict(checkpoint.assessments)
        self.record_hashes(replay=checkpoint.replay, split=checkpoint.split)
        if self.epoch:
            self._restore_record(checkpoint)
        for name in in_order(self.assessments):
            # Check all of them, because the figures at the end need them; keep the last one.
            path = self.run.path / "uncertainty" / name
            self._use_assessment(read_assessment(path, sha256=self.assessments[name]))
        if self.processes.leads:
            self.run.recover(checkpoint)

    def record_hashes(self, *, replay: str, split: str) -> None:
        """Store the sha256 of the replayed schedule and of the split for the checkpoints."""
        self.replay_sha256, self.split_sha256 = replay, split

    def _restore_record(self, checkpoint: Checkpoint) -> None:
        try:
            self.history = [completed(row) for row in checkpoint.history]
        except ValueError as error:
            raise PolysegError(f"checkpoint: its record is of another run: {error}") from None
        schedule = checkpoint.schedule
        columns = columns_of(self.split["train"], self.images.labels)
        if schedule is None or schedule.assessed is None or not self.history:
            raise PolysegError("checkpoint: has no record of its training, so it cannot be resumed")
        if (schedule.ids, schedule.labels) != columns:
            raise PolysegError("checkpoint: its record is of other training images or labels")
        if checkpoint.losses is not None:
            names = dict.fromkeys(schedule.ids)
            losses = checkpoint.losses.reshape(len(names), -1).tolist()
            self.losses = dict(zip(names, losses, strict=True))
        self.recorder.restore(schedule)
        self.assessed = schedule.assessed.tolist()

    def _start(self) -> None:
        self._commit()
        if 0 in self._assessment_epochs() and not self.assessments:
            self._assess(0)
            self._commit()

    def _run_epoch(self, epoch: int) -> None:
        seconds: dict[str, float] = {}
        with _stopwatch(seconds, "train"), explaining_memory("training", _LESS_MEMORY):
            record = self._train(epoch)
        with _stopwatch(seconds, "validation"):
            record.validation_losses, record.validation_dice = self._validate()
        record.assessed = epoch in self._assessment_epochs()
        with _stopwatch(seconds, "assessment"):
            if record.assessed:
                self._assess(epoch)
        record.seconds = seconds
        row = row_of(record)
        if not row["validation_dice"] <= self.best_dice:
            self.best_epoch, self.best_dice = epoch, row["validation_dice"]
        self.epoch = epoch
        self.history.append(row)
        self._commit()
        log.info(
            "%s",
            epoch_line(
                row,
                epochs=self.config.training.epochs,
                best=epoch == self.best_epoch,
                adapts=self.assessed[-1] >= 0,
                validates=bool(self.split["val"]),
            ),
        )

    def _train(self, epoch: int) -> Epoch:
        """Take the steps of an epoch, and return its record without validation."""
        ids, epochs = self.split["train"], self.config.training.epochs
        if epoch > 1 and self._assessed_for(epoch) >= 0 > max(self.assessed):
            log_first_adaptive_epoch(epoch, self.config.loss.epsilon)
        labels = len(self.images.labels)
        used: list[tuple[list[str], Adapted]] = []
        done = 0
        steps: list[Step] = []
        torch.manual_seed(derive_seed(self.config.training.seed, epoch, "dropout"))
        with self.steps.at_rate(learning_rate(self.config.training, epoch)):
            for names, images, masks in self._batches(epoch):
                self._raise_on_signal()
                adapted = self._adapted(names, epoch)
                used.append((names, adapted))
                epsilon = torch.from_numpy(adapted.epsilon.astype(np.float32)).reshape(-1, labels)
                steps.append(self.steps.take(names, images, masks, epsilon))
                self.finite_check.check_sometimes(steps, epoch)
                done += len(names)
                self.progress(f"epoch {epoch}/{epochs}", done, len(ids))
        self.finite_check.check(steps, epoch)
        # Batch statistics may differ between processes; those of the leader are kept.
        self.processes.take_from_leader(self.network.buffers())
        self.assessed.append(self._assessed_for(epoch))
        self.recorder.add(used)
        return self._record_of(of_all_processes(steps, self.processes), epoch)

    def _batches(self, epoch: int) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Yield the names of each batch, and this process's images and masks."""
        settings = self.config.training
        return training_batches(
            self.images,
            self.split["train"],
            batch_size=settings.batch_size,
            seed=settings.seed,
            epoch=epoch,
            changes=self.changes,
            workers=settings.workers,
            pinned=self.device.type == "cuda",
            processes=self.processes,
        )

    def _adapted(self, names: Sequence[str], epoch: int) -> Adapted:
        """Return the epsilons of a batch, without statistics if they are replayed."""
        if self.replay is None:
            adapted = self.control.adapt(names)
            self._refuse_epsilons(adapted, names, epoch)
            return adapted
        epsilon = epsilon_of_batch(self.replay, names, epoch, len(self.images.labels))
        return Adapted(epsilon.astype(np.float64), None)

    def _refuse_epsilons(self, adapted: Adapted, names: Sequence[str], epoch: int) -> None:
        """Raise PolysegError if a map returns epsilons that are not allowed."""
        least = least_epsilon(self.config.loss.polydice_terms or 1)
        good = (adapted.epsilon >= least) & (adapted.epsilon <= LARGEST_EPSILON)
        if not good.all():
            bad = int(good.argmin())
            raise PolysegError(
                f"control.map {self.config.control.map}: epsilon {adapted.epsilon[bad]:g} of image "
                f"{names[bad // len(self.images.labels)]} in epoch {epoch}; it must be from "
                f"{least:.4g} to {LARGEST_EPSILON}"
            )

    def _record_of(self, steps: Sequence[Step], epoch: int) -> Epoch:
        """Store the losses of the images in an epoch's steps, and return its record."""
        skipped = len(steps) - len(self.finite_check.without_skipped(steps, epoch))
        finite = [step for step in steps if step.losses.isfinite().all()]
        self._store_losses(finite)
        return Epoch(
            number=epoch,
            learning_rate=learning_rate(self.config.training, epoch),
            losses=torch.cat([step.losses for step in finite]),
            losses_at_constant=torch.cat([step.note.at_constant for step in finite]),
            epsilon=self.recorder.epsilon[-1],
            wrong_sign=sum(int(step.note.wrong_sign.sum()) for step in finite),
            skipped=skipped,
        )

    def _store_losses(self, steps: Sequence[Step]) -> None:
        """Store the losses of the images in these steps; other images keep their last losses."""
        labels = len(self.images.labels)
        new: dict[str, list[float]] = {}
        for step in steps:
            losses = step.note.at_constant.reshape(-1, labels).tolist()
            new |= zip(step.names, losses, strict=True)
        self.losses = new | {name: self.losses[name] for name in self.losses.keys() - new.keys()}

    def _validate(self) -> tuple[Tensor | None, Tensor | None]:
        """Return losses at the constant epsilon and Dice of the validation images.

        Each is (images, labels), or None without validation images.
        """
        ids = self.split["val"]
        found: list[tuple[str, list[float], list[float]]] = []
        mine = self.processes.share(ids)
        batches = self.images.batches(mine, self.config.training.batch_size)
        for batch, predicted in predict(self.network, batches):
            assert batch.masks is not None
            target, logits = as_tasks(batch.masks).float(), as_tasks(predicted)
            epsilon = torch.full((len(logits),), self.config.loss.epsilon)
            losses = self.steps.objective(logits, target, epsilon).reshape(len(batch.ids), -1)
            dices = dice_coefficient(logits >= 0, target).reshape(len(batch.ids), -1)
            found += zip(batch.ids, losses.tolist(), dices.tolist(), strict=True)
        if not ids:
            return None, None
        of_image = {one[0]: one[1:] for part in self.processes.gathered(found) for one in part}
        loss, dice = torch.tensor([of_image[identity] for identity in ids]).unbind(1)
        return loss, dice

    def _assess(self, epoch: int) -> None:
        ids = self.split["train"]
        with _name_epoch_in_errors(epoch, self.config.uncertainty.metric):
            assessment = assess(
                self.network,
                self.images.batches(spread(ids), self.config.training.batch_size),
                self.config.uncertainty,
                seed=self.config.training.seed,
                epoch=epoch,
                progress=lambda _, done, total: self._report_assessment(epoch, done, total),
                total=len(ids),
                processes=self.processes,
                also=_extra_scores(self.config.uncertainty),
            ).in_order(ids)
        assessment = dataclasses.replace(
            assessment,
            scores={**assessment.scores, "training_loss": self._training_losses()},
            config_yaml=self.config.to_yaml(),
        )
        log_assessment(assessment, is_last=epoch == self.config.training.epochs)
        # Processes may round differently, so all of them use the same assessment.
        assessment = self.processes.from_leader(assessment)
        self._use_assessment(assessment)
        if self.config.control.statistics == "dataset":
            assessment = dataclasses.replace(assessment, epsilon=self.control.over_data_set)
        path = self.run.assessment(epoch)
        written = write_assessment(path, assessment) if self.processes.leads else ""
        self.assessments[path.name] = written

    def _training_losses(self) -> NDArray[np.float64]:
        """Return the losses of the last epoch, image by image; 0 before the first."""
        labels = len(self.images.labels)
        losses = [self.losses.get(name, [0.0] * labels) for name in self.split["train"]]
        return np.array(losses, np.float64).ravel()

    def _use_assessment(self, assessment: Assessment) -> None:
        # Epsilons do not need the maps, which may be large.
        self.control = dataclasses.replace(
            self.control, assessment=dataclasses.replace(assessment, maps={})
        )

    def _report_assessment(self, epoch: int, done: int, total: int) -> None:
        self._raise_on_signal()
        self.progress(f"MC Dropout after epoch {epoch}", done, total)

    def _commit(self) -> None:
        if not self.processes.leads:
            return
        self.run.commit(
            Checkpoint(
                config=self.config,
                channels=self.images.channels,
                epoch=self.epoch,
                levels=self.images.levels,
                weights=self.network.state_dict(),
                optimizer=optimizer_tensors(self.steps.optimizer),
                scaler=self.steps.scaler.state_dict(),
                history=self.history,
                schedule=self._schedule() if self.epoch else None,
                losses=self._training_losses() if self.epoch else None,
                best_epoch=self.best_epoch,
                best_dice=self.best_dice,
                assessments=self.assessments,
                replay=self.replay_sha256,
                split=self.split_sha256,
            )
        )

    def _schedule(self) -> Schedule:
        ids, labels = columns_of(self.split["train"], self.images.labels)
        epochs, assessed = np.arange(1, self.epoch + 1), np.array(self.assessed, np.int64)
        columns = self.recorder.columns()
        if self.replay is not None and self.replay.group is not None:
            columns["group"] = self.replay.group[: self.epoch]
            columns["statistics"] = self.replay.statistics
        return Schedule(ids, epochs, labels=labels, assessed=assessed, **columns)

    def _assessment_epochs(self) -> list[int]:
        if not self.config.assesses:
            return []
        return self.config.control.assessment_epochs(self.config.training.epochs)

    def _assessed_for(self, epoch: int) -> int:
        if self.replay is not None:
            return -1 if self.replay.assessed is None else int(self.replay.assessed[epoch - 1])
        return -1 if self.control.assessment is None else self.control.assessment.epoch

    def _stopped_early(self) -> bool:
        patience = self.config.training.early_stopping
        if 0 < patience <= self.epoch - self.best_epoch:
            log.info("early stopping: no better validation Dice for %d epochs", patience)
            return True
        if self.replay is not None and self.epoch >= len(self.replay.epochs):
            log.info("early stopping after epoch %d, like the replayed run", self.epoch)
            return True
        return False

    def _raise_on_signal(self) -> None:
        if self.stop.number:
            raise interruption(self.stop.number, self._progress_text())

    @contextlib.contextmanager
    def _prefer_own_signal(self) -> Iterator[None]:
        """Report a signal that all processes got, not the error that the others have left."""
        try:
            yield
        except RuntimeError:
            if self.processes.count > 1:
                self._raise_on_signal()
            raise

    def _progress_text(self) -> str:
        return (
            f"after epoch {self.epoch}; `polyseg train --resume --out {self.run.path}` continues it"
        )


@contextlib.contextmanager
def _name_epoch_in_errors(epoch: int, metric: str) -> Iterator[None]:
    """Add the epoch to errors of a user's own difficulty score."""
    try:
        yield
    except PolysegError as error:
        if is_own(metric):
            raise PolysegError(f"assessment after epoch {epoch}: {error}") from None
        raise


def _extra_scores(settings: UncertaintyConfig) -> list[str]:
    """Return scores that cost nothing more if the passes already use the whole image."""
    return [*WHOLE_SCORES, "size"] if settings.metric in WHOLE_SCORES else []


@contextlib.contextmanager
def _stopwatch(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start

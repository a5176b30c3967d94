"""Training: epochs, validation, assessments, and the commit that ends each epoch."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from polyseg.cache import read_assessment, write_assessment
from polyseg.checkpoints import Checkpoint, columns_of, fit_weights, new_network
from polyseg.config import Config
from polyseg.control import EpsilonControl
from polyseg.data.augmentation import changes_of
from polyseg.data.dataset import ImageSet, training_batches
from polyseg.data.splits import Split
from polyseg.dropout import active_layers, refuse_hidden_dropout, stochastic_layers
from polyseg.errors import PolysegError
from polyseg.inference import choose_device, predict
from polyseg.memory import explaining_memory
from polyseg.montecarlo import assess, describe, spread
from polyseg.networks import SegmentationNetwork, refuse_untrainable
from polyseg.objective import Note, as_tasks, build_objective, take_note
from polyseg.optimizers import (
    build_optimizer,
    learning_rate,
    norm_of_gradients,
    optimizer_tensors,
    restore_optimizer,
)
from polyseg.overlap import dice_coefficient
from polyseg.parallel import DropoutTogether, normalise_together
from polyseg.processes import ALONE, Processes
from polyseg.recomputation import recompute_blocks
from polyseg.records import Assessment, Progress, Schedule, no_progress
from polyseg.replay import epsilon_of_batch
from polyseg.run import HISTORY_COLUMNS, QUANTILES, RunDirectory, in_order
from polyseg.seeds import derive_seed
from polyseg.signals import Wish, ending_when_asked, interruption

log = logging.getLogger(__name__)


_LESS_MEMORY = (
    "lower training.batch_size or data.size, or set training.precision=bf16; the last epoch is "
    "kept, and --resume goes on from it where the batch size is the same"
)
_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}
_STEPS_BETWEEN_LOOKS = 16
"""A look at the losses waits for the GPU, which has nothing to do until the next step is sent."""


class _Step(NamedTuple):
    """What a step came to, on the device until the epoch's end: to ask sooner holds a GPU up."""

    names: list[str]
    losses: Tensor
    note: Note
    finite: Tensor
    """Whether losses and gradients are, (), bool."""

    def on_cpu(self) -> "_Step":
        """Return the same where processes can exchange it."""
        note = Note(*(values.cpu() for values in self.note))
        return _Step(self.names, self.losses.cpu(), note, self.finite.cpu())

    @classmethod
    def joined(cls, parts: "Sequence[_Step]") -> "_Step":
        """Return a step of which processes have taken a part each."""
        note = Note(*map(torch.cat, zip(*(part.note for part in parts), strict=True)))
        names = [name for part in parts for name in part.names]
        finite = torch.stack([part.finite for part in parts]).all()
        return cls(names, torch.cat([part.losses for part in parts]), note, finite)


_Taken = tuple[Tensor, Note, Tensor]


class Trainer:
    """The state of a training run: weights, optimizer, the last assessment, and the record so far.

    What an epoch does follows from (config, images, split, the state before it) alone, so a run
    that was resumed equals one that was not.
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
        self.processes = processes
        self.config, self.images, self.split, self.run = config, images, split, run
        self.replay = replay
        """The epsilons to use in place of assessments, in the order of the training images."""
        self.relies_on(replay="", split="")
        self.progress = progress
        self.device = choose_device(config.training.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        self.network = self._new_network(images.channels)
        if config.data.normalise == "dataset":
            images = dataclasses.replace(images, levels=images.pooled_over(split["train"]))
            self.images = images
        passes = config.assesses and config.uncertainty.takes_passes
        if passes:
            # Now, not at the first assessment, which may be hours away.
            active_layers(self.network)
        if passes or processes.count > 1:
            image, _ = images.patch(split["train"][0], seed=0)
            with explaining_memory("training", _LESS_MEMORY):
                refuse_hidden_dropout(self.network, image.to(self.device).repeat(2, 1, 1, 1))
        self.dropout = DropoutTogether(stochastic_layers(self.network), processes)
        self.forward = self._as_trained()
        self.has_compiled = False
        self.optimizer = build_optimizer(config.training, self.network)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.training.precision == "fp16"
        )
        self.objective = build_objective(config.loss)
        self.changes = changes_of(config.data)
        self.control = EpsilonControl(
            config.control, config.loss.epsilon, labels=len(images.labels)
        )
        self.epoch = 0
        self.best_epoch, self.best_dice = 0, -1.0
        self.history: list[dict[str, float]] = []
        self.epsilons: list[NDArray[np.float32]] = []
        self.assessed: list[int] = []
        """Of each epoch trained, after which epoch was assessed what it went by; -1: none."""
        self.assessments: dict[str, str] = {}
        self.losses: dict[str, list[float]] = {}
        """Of the last epoch trained, one a label: what each image lost at the constant epsilon."""
        self.wish = Wish()

    def _new_network(self, channels: int) -> SegmentationNetwork:
        """Return the network with its first weights.

        Raises:
            PolysegError: this machine cannot hold it.
        """
        if ":" not in self.config.network.name:
            with torch.device("meta"):
                planned = new_network(self.config, channels)
            refuse_untrainable(planned, self.device)
        torch.manual_seed(derive_seed(self.config.training.seed, "weights"))
        with explaining_memory("network", "lower its channels or features"):
            return new_network(self.config, channels).to(self.device)

    def _as_trained(self) -> nn.Module:
        """Return the network as the steps call it: compiled, and one with the other processes'."""
        together = self.processes.count > 1
        if together and self.config.training.sync_batch_norm:
            normalise_together(self.network)
        if self.config.training.recompute:
            recompute_blocks(self.network)
        compiles = self.config.training.compile
        forward: nn.Module = _compiled(self.network) if compiles else self.network
        if not together:
            return forward
        own = ":" in self.config.network.name  # Whose weights may not all be reached by the loss.
        return DistributedDataParallel(forward, find_unused_parameters=own)

    def fit(self) -> None:
        """Train to the last epoch, or until early stopping or a signal.

        Raises:
            Interrupted: a signal came; the last completed epoch is committed.
            PolysegError: a loss or an uncertainty is not finite, or files cannot be written.
        """
        epochs = self.config.training.epochs
        with ending_when_asked(self._farewell) as self.wish, self._explaining_the_end():
            if self.epoch == 0:
                self._start()
            while self.epoch < epochs and not self._stopped_early():
                self._run_epoch(self.epoch + 1)
                self.progress("training", self.epoch, epochs)
                self._leave_on_signal()
        log.info("best validation Dice %.4f at epoch %d", self.best_dice, self.best_epoch)
        self._warn_of_an_early_best()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take up the state of a committed epoch, and make the folder that of it.

        Raises:
            PolysegError: a file that the checkpoint relies on is damaged or missing.
        """
        fit_weights(self.network, checkpoint.weights)
        if checkpoint.epoch:
            restore_optimizer(self.optimizer, checkpoint.optimizer)
        if self.scaler.is_enabled() and checkpoint.scaler:
            self.scaler.load_state_dict(dict(checkpoint.scaler))
        self.epoch = checkpoint.epoch
        self.best_epoch, self.best_dice = checkpoint.best_epoch, checkpoint.best_dice
        self.assessments = dict(checkpoint.assessments)
        self.relies_on(replay=checkpoint.replay, split=checkpoint.split)
        if self.epoch:
            self._take_up_record(checkpoint)
        for name in in_order(self.assessments):
            # All of them, since the figures at the end want them all; the last one stays.
            path = self.run.path / "uncertainty" / name
            self._adopt(read_assessment(path, sha256=self.assessments[name]))
        if self.processes.leads:
            self.run.recover(checkpoint)

    def relies_on(self, *, replay: str, split: str) -> None:
        """Take note of the sha256 of the run's files that stay as they are."""
        self.replay_sha256, self.split_sha256 = replay, split

    def _take_up_record(self, checkpoint: Checkpoint) -> None:
        """Take up history and schedule."""
        self.history = [dict(row) for row in checkpoint.history]
        schedule = checkpoint.schedule
        columns = columns_of(self.split["train"], self.images.labels)
        if schedule is None or schedule.assessed is None or not self.history:
            raise PolysegError("checkpoint: holds no record of its training to go on from")
        if (schedule.ids, schedule.labels) != columns or set(self.history[0]) != {*HISTORY_COLUMNS}:
            raise PolysegError("checkpoint: its record is not that of this run")
        names = dict.fromkeys(schedule.ids)
        if checkpoint.losses is not None:
            losses = checkpoint.losses.reshape(len(names), -1).tolist()
            self.losses = dict(zip(names, losses, strict=True))
        self.epsilons = list(schedule.epsilon)
        self.assessed = schedule.assessed.tolist()

    def _start(self) -> None:
        self._commit()
        if 0 in self._assessment_epochs() and not self.assessments:
            self._assess(0)
            self._commit()

    def _run_epoch(self, epoch: int) -> None:
        seconds: dict[str, float] = {}
        with _stopwatch(seconds, "train"), explaining_memory("training", _LESS_MEMORY):
            row = self._train(epoch)
        with _stopwatch(seconds, "validation"):
            row |= self._validate()
        assessed = epoch in self._assessment_epochs()
        with _stopwatch(seconds, "assessment"):
            if assessed:
                self._assess(epoch)
        row["assessed"] = float(assessed)
        if not row["validation_dice"] <= self.best_dice:
            self.best_epoch, self.best_dice = epoch, row["validation_dice"]
        row |= {f"seconds_{phase}": value for phase, value in seconds.items()}
        self.epoch = epoch
        self.history.append(row)
        self._commit()
        log.info("%s", _epoch_line(row, self))

    def _train(self, epoch: int) -> dict[str, float]:
        """Return the history's columns that training has to tell."""
        settings = self.config.training
        rate = learning_rate(settings, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(derive_seed(settings.seed, epoch, "dropout"))
        ids = self.split["train"]
        epsilon_of: dict[str, list[float]] = {}
        labels = len(self.images.labels)
        steps: list[_Step] = []
        self.network.train()
        batches = training_batches(
            self.images,
            ids,
            batch_size=settings.batch_size,
            seed=settings.seed,
            epoch=epoch,
            changes=self.changes,
            workers=settings.workers,
            pinned=self.device.type == "cuda",
            processes=self.processes,
        )
        take_step = self._compiled_step if settings.compile else self._step
        with self.dropout.taking_over():
            for names, images, masks in batches:
                self._leave_on_signal()
                epsilon = self._epsilon(names, epoch)
                epsilon_of.update(zip(names, epsilon.reshape(-1, labels).tolist(), strict=True))
                rows = self.processes.rows(len(names))
                mine = torch.from_numpy(epsilon.reshape(-1, labels)[rows].ravel())
                steps.append(_Step(names[rows], *take_step(images, masks, mine, len(names))))
                if len(steps) % _STEPS_BETWEEN_LOOKS == 0:
                    self._refuse_what_is_not_finite(steps, epoch)
                self.progress(f"epoch {epoch}/{settings.epochs}", len(epsilon_of), len(ids))
        self._refuse_what_is_not_finite(steps, epoch)
        # Where statistics are a process's own, the leading process's are those that count.
        self.processes.take_from_leader(self.network.buffers())
        steps = self._of_all_processes(steps)
        taken = self._without_skipped(steps, epoch)
        told = [step for step in steps if step.losses.isfinite().all()]
        fresh = {
            name: losses
            for step in told
            for name, losses in zip(
                step.names, step.note.at_constant.reshape(-1, labels).tolist(), strict=True
            )
        }
        skipped = self.losses.keys() - fresh.keys()
        self.losses = fresh | {name: self.losses[name] for name in skipped}
        self.assessed.append(self._assessed_for(epoch))
        self.epsilons.append(np.array([epsilon_of[name] for name in ids], np.float32).ravel())
        quantiles = np.percentile(self.epsilons[-1], QUANTILES)
        return {
            "epoch": epoch,
            "learning_rate": rate,
            "train_loss": float(torch.cat([step.losses for step in told]).mean()),
            **{f"epsilon_q{q:02d}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
            "wrong_sign_images": sum(int(step.note.wrong_sign.sum()) for step in told),
            "skipped_steps": len(steps) - len(taken),
        }

    def _epsilon(self, names: Sequence[str], epoch: int) -> NDArray[np.float32]:
        """Return what the images of a batch meet."""
        if self.replay is None:
            return self.control.epsilon(names).astype(np.float32)
        return epsilon_of_batch(self.replay, names, epoch, len(self.images.labels))

    def _of_all_processes(self, steps: list[_Step]) -> list[_Step]:
        """Return the steps as one process would have taken them."""
        if self.processes.count == 1:
            return steps
        parts = self.processes.gathered([step.on_cpu() for step in steps])
        return [_Step.joined(of_one) for of_one in zip(*parts, strict=True)]

    def _compiled_step(self, images: Tensor, masks: Tensor, epsilon: Tensor, total: int) -> _Taken:
        """Take a step; the first one compiles the network, and tells how long that took."""
        from torch._dynamo.exc import TorchDynamoException

        start = time.perf_counter()
        try:
            taken = self._step(images, masks, epsilon, total)
        except TorchDynamoException as error:
            raise _cannot_compile(error) from None
        if not self.has_compiled:
            log.info("compiled the network in %.0f s", time.perf_counter() - start)
            self.has_compiled = True
        return taken

    def _step(self, images: Tensor, masks: Tensor, epsilon: Tensor, total: int) -> _Taken:
        """Take one step by this process's rows of a batch of `total` images.

        Returns:
            Losses, (B K,), what to note of each, and whether all are finite.
        """
        skips = self.config.training.on_nonfinite == "skip"
        # A forward pass moves the statistics of batch normalisation, also by what is not finite.
        buffers = [one.clone() for one in self.network.buffers()] if skips else []
        self.optimizer.zero_grad(set_to_none=True)
        # As many parts in each process, none of which is empty in all.
        fullest = -(-total // self.processes.count)
        labels, count = len(self.images.labels), min(self.config.training.accumulate, fullest)
        parts = []
        for part in range(count):
            rows = slice(len(images) * part // count, len(images) * (part + 1) // count)
            mine = epsilon[rows.start * labels : rows.stop * labels]
            with self._together_at_last(part + 1 == count):
                parts.append(self._descend(images[rows], masks[rows], mine, rows, total))
        losses = torch.cat([one for one, _ in parts])
        self.scaler.unscale_(self.optimizer)
        finite = losses.isfinite().all() & norm_of_gradients(self.network).isfinite()
        if not skips or self.processes.all(bool(finite)):
            self.scaler.step(self.optimizer)
        else:
            for one, before in zip(self.network.buffers(), buffers, strict=True):
                one.copy_(before)
        self.scaler.update()
        return losses, Note(*map(torch.cat, zip(*(note for _, note in parts), strict=True))), finite

    def _descend(
        self, images: Tensor, masks: Tensor, epsilon: Tensor, rows: slice, total: int
    ) -> tuple[Tensor, Note]:
        """Add the gradients of some of this process's rows; return losses and what to note."""
        start = self.processes.rows(total).start
        self.dropout.total = total
        self.dropout.rows = slice(start + rows.start, start + rows.stop)
        images, masks, epsilon = (self._send(values) for values in (images, masks, epsilon))
        target = as_tasks(masks).float()
        kind = _REDUCED.get(self.config.training.precision)
        with torch.autocast(self.device.type, kind, enabled=kind is not None):
            logits = self.forward(images)
        logits = as_tasks(logits.float())
        losses = self.objective(logits, target, epsilon)
        self.scaler.scale(self._mean(losses, total)).backward()  # type: ignore[no-untyped-call]
        return losses.detach(), take_note(self.config.loss, losses, logits, target, epsilon)

    def _together_at_last(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let processes exchange gradients with the last part of a batch only."""
        if last or not isinstance(self.forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.forward.no_sync()

    def _mean(self, losses: Tensor, total: int) -> Tensor:
        """Return this part's share of the mean over the batch, once processes have averaged."""
        whole = total * len(self.images.labels)
        if self.processes.count == 1 and len(losses) == whole:
            return losses.mean()
        return losses.sum() * self.processes.count / whole

    def _send(self, values: Tensor) -> Tensor:
        # A copy to CUDA that blocks would wait for all steps before it.
        return values.to(self.device, non_blocking=self.device.type == "cuda")

    def _validate(self) -> dict[str, float]:
        """Return mean loss (at the constant epsilon), Dice and IoU of the validation images."""
        ids = self.split["val"]
        found: list[tuple[str, list[float], list[float]]] = []
        mine = self.processes.share(ids)
        batches = self.images.batches(mine, self.config.training.batch_size)
        for batch, predicted in predict(self.network, batches):
            if batch.masks is None:
                raise ValueError("validation images have no masks")
            target, logits = as_tasks(batch.masks).float(), as_tasks(predicted)
            epsilon = torch.full((len(logits),), self.config.loss.epsilon)
            losses = self.objective(logits, target, epsilon).reshape(len(batch.ids), -1)
            dices = dice_coefficient(logits >= 0, target).reshape(len(batch.ids), -1)
            found += zip(batch.ids, losses.tolist(), dices.tolist(), strict=True)
        if not ids:
            return dict.fromkeys(("validation_loss", "validation_dice", "validation_iou"), math.nan)
        of_image = {one[0]: one[1:] for part in self.processes.gathered(found) for one in part}
        loss, dice = torch.tensor([of_image[identity] for identity in ids]).unbind(1)
        return {
            "validation_loss": float(loss.mean()),
            "validation_dice": float(dice.mean()),
            "validation_iou": float((dice / (2 - dice)).mean()),
        }

    def _assess(self, epoch: int) -> None:
        """Measure the difficulty of the training images, keep the file, and adapt epsilon to it."""
        ids = self.split["train"]
        assessment = assess(
            self.network,
            self.images.batches(spread(ids), self.config.training.batch_size),
            **self.config.uncertainty.model_dump(),
            seed=self.config.training.seed,
            epoch=epoch,
            progress=lambda _, done, total: self._report_assessment(epoch, done, total),
            total=len(ids),
            processes=self.processes,
        ).in_order(ids)
        assessment = dataclasses.replace(
            assessment,
            scores={**assessment.scores, "training_loss": self._training_losses()},
            config_yaml=self.config.to_yaml(),
        )
        log.info("%s", describe(assessment))
        # Bits that processes may compute otherwise must not lead them apart.
        assessment = self.processes.from_leader(assessment)
        self._adopt(assessment)
        if self.config.control.statistics == "dataset":
            assessment = dataclasses.replace(assessment, epsilon=self.control.over_data_set)
        path = self.run.assessment(epoch)
        written = write_assessment(path, assessment) if self.processes.leads else ""
        self.assessments[path.name] = written

    def _training_losses(self) -> NDArray[np.float64]:
        """Return each image's loss of the last epoch, a row a label; before the first, zeros."""
        labels = len(self.images.labels)
        losses = [self.losses.get(name, [0.0] * labels) for name in self.split["train"]]
        return np.array(losses, np.float64).ravel()

    def _adopt(self, assessment: Assessment) -> None:
        # What feeds the next epochs needs no maps, which may be large.
        self.control = dataclasses.replace(
            self.control, assessment=dataclasses.replace(assessment, maps={})
        )

    def _report_assessment(self, epoch: int, done: int, total: int) -> None:
        self._leave_on_signal()
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
                optimizer=optimizer_tensors(self.optimizer),
                scaler=self.scaler.state_dict(),
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
        return Schedule(ids, epochs, np.stack(self.epsilons), labels, assessed)

    def _assessment_epochs(self) -> list[int]:
        if not self.config.assesses:
            return []
        return self.config.control.assessment_epochs(self.config.training.epochs)

    def _warn_of_an_early_best(self) -> None:
        adapted = [epoch for epoch, after in enumerate(self.assessed, start=1) if after >= 0]
        if adapted and self.best_epoch < adapted[0]:
            log.warning(
                "the best checkpoint is from before epoch %d, the first with adapted epsilons, and "
                "tests of it say nothing of them: train for longer, or lower control.start",
                adapted[0],
            )

    def _assessed_for(self, epoch: int) -> int:
        if self.replay is not None:
            return -1 if self.replay.assessed is None else int(self.replay.assessed[epoch - 1])
        return -1 if self.control.assessment is None else self.control.assessment.epoch

    def _stopped_early(self) -> bool:
        patience = self.config.training.early_stopping
        stopped = patience > 0 and self.epoch - self.best_epoch >= patience
        if stopped:
            log.info("no better validation Dice for %d epochs: training ends here", patience)
        if not stopped and self.replay is not None and self.epoch >= len(self.replay.epochs):
            log.info("the replayed run stopped early after epoch %d: so does this one", self.epoch)
            return True
        return stopped

    def _refuse_what_is_not_finite(self, steps: Sequence[_Step], epoch: int) -> None:
        """Raise for the first step that was not finite: all after it are not either."""
        if self.config.training.on_nonfinite == "skip":
            return
        found = [one for one in self.processes.gathered(self._first_not_finite(steps)) if one]
        if found:
            number, _, what = min(found)
            raise PolysegError(
                f"epoch {epoch}, step {number}: {what}; the last good epoch is kept in "
                f"{self.run.last}; try a lower training.learning_rate, or "
                "training.on_nonfinite=skip"
            )

    def _first_not_finite(self, steps: Sequence[_Step]) -> tuple[int, bool, str] | None:
        """Return the first such step, whether only its gradients are, and a sentence."""
        recent = steps[-_STEPS_BETWEEN_LOOKS:]
        if not recent or bool(torch.stack([step.finite for step in recent]).all()):
            return None
        for number, step in enumerate(steps, start=1):
            if not self._is_as_it_should_be(step):
                return number, bool(step.losses.isfinite().all()), _what_is_not_finite(step)
        return None

    def _is_as_it_should_be(self, step: _Step) -> bool:
        """Return whether a step was taken, or only looked for a scale that float16 can hold."""
        searches = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        return bool(step.finite) or (searches and bool(step.losses.isfinite().all()))

    def _without_skipped(self, steps: Sequence[_Step], epoch: int) -> list[_Step]:
        """Return the steps that were taken, and log those that were not.

        Raises:
            PolysegError: none was.
        """
        taken = []
        for number, step in enumerate(steps, start=1):
            if step.finite:
                taken.append(step)
            else:
                what = _what_is_not_finite(step)
                log.warning("epoch %d, step %d is skipped: %s", epoch, number, what)
        if not all(taken or self._is_as_it_should_be(step) for step in steps):
            raise PolysegError(
                f"epoch {epoch}: no step had finite loss and gradients; the last good epoch is "
                f"kept in {self.run.last}; try a lower training.learning_rate"
            )
        return taken

    def _leave_on_signal(self) -> None:
        if self.wish.number:
            raise interruption(self.wish.number, self._farewell())

    @contextlib.contextmanager
    def _explaining_the_end(self) -> Iterator[None]:
        """Let a signal be why the others left, where all processes got one."""
        try:
            yield
        except RuntimeError:
            if self.processes.count > 1:
                self._leave_on_signal()
            raise

    def _farewell(self) -> str:
        return (
            f"after epoch {self.epoch}; `polyseg train --resume --out {self.run.path}` goes "
            "on from there"
        )


def _what_is_not_finite(step: _Step) -> str:
    of_images = step.losses.isfinite().reshape(len(step.names), -1).all(dim=1).tolist()
    bad = [name for name, good in zip(step.names, of_images, strict=True) if not good]
    if bad:
        return f"the loss of {', '.join(bad)} is not finite"
    return f"the gradients of {', '.join(step.names)} are not finite"


def _compiled(network: nn.Module) -> nn.Module:
    try:
        return torch.compile(network)  # type: ignore[return-value]
    except RuntimeError as error:
        raise _cannot_compile(error) from None


def _cannot_compile(error: RuntimeError) -> PolysegError:
    # What follows a blank line is advice on how to see more of torch's inside.
    reason = " ".join(str(error).strip().partition("\n\n")[0].split())
    return PolysegError(
        f"training.compile: torch cannot compile the network here ({reason:.160}); "
        "set training.compile=false"
    )


@contextlib.contextmanager
def _stopwatch(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _epoch_line(row: dict[str, float], trainer: Trainer) -> str:
    """Return what the log says of an epoch."""
    middle = "/".join(f"{row[f'epsilon_q{q:02d}']:.2f}" for q in (5, 50, 95))
    parts = [
        f"epoch {row['epoch']:.0f}/{trainer.config.training.epochs}",
        f"loss {row['train_loss']:.4f}",
        f"val Dice {row['validation_dice']:.4f} (best {trainer.best_dice:.4f})",
        f"epsilon {middle}" + (" assessed" if row["assessed"] else ""),
        f"{sum(value for name, value in row.items() if name.startswith('seconds')):.1f} s",
    ]
    return "  ".join(parts)

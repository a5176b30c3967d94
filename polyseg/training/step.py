"""Training steps of one process, or of several processes that share each batch."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel

from polyseg.config import Config
from polyseg.errors import PolysegError
from polyseg.networks.dropout import stochastic_layers
from polyseg.networks.inference import device_of
from polyseg.runs.checkpoints import Checkpoint
from polyseg.runs.weights import fit_weights
from polyseg.system.process_group import ALONE, Processes
from polyseg.training.activation_checkpointing import recompute_blocks
from polyseg.training.distributed import DropoutTogether, normalise_together
from polyseg.training.losses_by_name import Note, as_tasks, build_objective, take_note
from polyseg.training.optimizers import build_optimizer, norm_of_gradients, restore_optimizer

log = logging.getLogger(__name__)

_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Step(NamedTuple):
    """The results of a step, on the device until the end of the epoch, to keep a GPU busy."""

    names: list[str]
    losses: Tensor
    """Losses, (B K,), with the labels of an image next to each other."""
    note: Note
    finite: Tensor
    """Whether losses and gradients are finite, () bool."""

    def on_cpu(self) -> "Step":
        """Return the results in CPU memory, where processes can exchange them."""
        note = Note(*(values.cpu() for values in self.note))
        return Step(self.names, self.losses.cpu(), note, self.finite.cpu())

    @classmethod
    def joined(cls, parts: "Sequence[Step]") -> "Step":
        """Return a step from the parts that processes have taken."""
        names = [name for part in parts for name in part.names]
        finite = torch.stack([part.finite for part in parts]).all()
        losses = torch.cat([part.losses for part in parts])
        return cls(names, losses, _joined_notes([part.note for part in parts]), finite)


def of_all_processes(steps: list[Step], processes: Processes) -> list[Step]:
    """Return the steps as one process would have taken them."""
    if processes.count == 1:
        return steps
    parts = processes.gathered([step.on_cpu() for step in steps])
    return [Step.joined(of_one) for of_one in zip(*parts, strict=True)]


class Steps:
    """Takes steps with a network, its optimizer, gradient scaler and loss.

    Each of several processes uses its rows of a batch, and all make the same change of weights.
    """

    def __init__(self, network: nn.Module, config: Config, processes: Processes = ALONE) -> None:
        self.network, self.config, self.processes = network, config, processes
        self.device = device_of(network)
        self.channels_last = _has_channels_last(network, config)
        if self.channels_last:
            _put_channels_last(network)
        self.dropout = DropoutTogether(stochastic_layers(network), processes)
        self.forward = _as_called(network, config, processes)
        self.has_compiled = False
        self.optimizer = build_optimizer(config.training, network)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.training.precision == "fp16"
        )
        self.objective = build_objective(config.loss)

    @property
    def is_finding_scale(self) -> bool:
        """Whether gradients may be infinite because the float16 scale is still too large."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore weights, optimizer and gradient scale; PolysegError if they do not fit."""
        fit_weights(self.network, checkpoint.weights)
        if checkpoint.epoch:
            kind = self.config.training.optimizer
            restore_optimizer(self.optimizer, checkpoint.optimizer, kind)
        if self.scaler.is_enabled() and checkpoint.scaler:
            self.scaler.load_state_dict(dict(checkpoint.scaler))

    @contextlib.contextmanager
    def at_rate(self, rate: float) -> Iterator[None]:
        """Prepare network and optimizer for the steps of the block, at a learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        with self.dropout.taking_over():
            yield

    def take(self, names: list[str], images: Tensor, masks: Tensor, epsilon: Tensor) -> Step:
        """Take a step; the first one compiles the network with training.compile.

        `names` are the ids of all images of the batch, `images` (B, C, H, W) and `masks`
        (B, K, H, W) this process's rows of it, and `epsilon` those of all images, with a column for
        each label. A network that does not work with training.compile or channels_last raises
        PolysegError.
        """
        start = time.perf_counter()
        with self._explaining_errors():
            taken = self._take(names, images, masks, epsilon)
        if self.config.training.compile and not self.has_compiled:
            log.info("compiled the network in %.0f s", time.perf_counter() - start)
            self.has_compiled = True
        return taken

    @contextlib.contextmanager
    def _explaining_errors(self) -> Iterator[None]:
        """Name the setting in errors of networks that do not work with compile or channels_last."""
        try:
            yield
        except RuntimeError as error:
            if self.channels_last and "view size is not compatible" in str(error):
                raise PolysegError(
                    "training.channels_last: the network uses view() on feature maps; "
                    "use reshape() instead, or set training.channels_last=false"
                ) from None
            if self.config.training.compile:
                from torch._dynamo.exc import TorchDynamoException

                if isinstance(error, TorchDynamoException):
                    raise _cannot_compile(error) from None
            raise

    def _take(self, names: list[str], images: Tensor, masks: Tensor, epsilon: Tensor) -> Step:
        skips = self.config.training.on_nonfinite == "skip"
        # A forward pass updates batch normalisation statistics, also by values that are not finite.
        buffers = [one.clone() for one in self.network.buffers()] if skips else []
        self.optimizer.zero_grad(set_to_none=True)
        losses, note = self._add_gradients(images, masks, epsilon)
        self.scaler.unscale_(self.optimizer)
        finite = losses.isfinite().all() & norm_of_gradients(self.network).isfinite()
        if not skips or self.processes.all(bool(finite)):
            self.scaler.step(self.optimizer)
        else:
            for one, before in zip(self.network.buffers(), buffers, strict=True):
                one.copy_(before)
        self.scaler.update()
        return Step(names[self.processes.rows(len(names))], losses, note, finite)

    def _add_gradients(self, images: Tensor, masks: Tensor, epsilon: Tensor) -> tuple[Tensor, Note]:
        """Add the gradients of this process's rows, part by part; return losses and notes."""
        total = len(epsilon)
        start = self.processes.rows(total).start
        # All processes need the same number of parts, and no part may be empty in all of them.
        most_rows = -(-total // self.processes.count)
        count = min(self.config.training.accumulate, most_rows)
        parts = []
        for part in range(count):
            rows = slice(len(images) * part // count, len(images) * (part + 1) // count)
            self.dropout.total = total
            self.dropout.rows = slice(start + rows.start, start + rows.stop)
            mine = epsilon[self.dropout.rows].flatten()
            with self._exchange_only_if(last=part + 1 == count):
                parts.append(self._backward(images[rows], masks[rows], mine, epsilon.numel()))
        losses, notes = zip(*parts, strict=True)
        return torch.cat(losses), _joined_notes(notes)

    def _backward(
        self, images: Tensor, masks: Tensor, epsilon: Tensor, whole: int
    ) -> tuple[Tensor, Note]:
        """Add the gradients of some rows of a batch of `whole` losses; return losses and note."""
        # A blocking copy to CUDA would wait for all earlier steps.
        cuda = self.device.type == "cuda"
        images, masks, epsilon = (
            values.to(self.device, non_blocking=cuda) for values in (images, masks, epsilon)
        )
        if self.channels_last:
            # A copy, because layers use the strides, and one channel counts as either order.
            images = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
        target = as_tasks(masks).float()
        kind = _REDUCED.get(self.config.training.precision)
        with torch.autocast(self.device.type, kind, enabled=kind is not None):
            logits = self.forward(images)
        logits = as_tasks(logits.float())
        losses = self.objective(logits, target, epsilon)
        # This part's share of the batch mean, before processes average gradients.
        alone = self.processes.count == 1 and len(losses) == whole
        mean = losses.mean() if alone else losses.sum() * self.processes.count / whole
        self.scaler.scale(mean).backward()  # type: ignore[no-untyped-call]
        return losses.detach(), take_note(self.config.loss, losses, logits, target, epsilon)

    def _exchange_only_if(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let processes exchange gradients only for the last part of a batch."""
        if last or not isinstance(self.forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.forward.no_sync()


def _joined_notes(notes: Sequence[Note]) -> Note:
    return Note(*map(torch.cat, zip(*notes, strict=True)))


def _as_called(network: nn.Module, config: Config, processes: Processes) -> nn.Module:
    """Return the network as steps call it: compiled, and connected with the other processes."""
    together = processes.count > 1
    if together and config.training.sync_batch_norm:
        normalise_together(network)
    if config.training.recompute:
        recompute_blocks(network)
    forward = _compiled(network) if config.training.compile else network
    if not together:
        return forward
    own = ":" in config.network.name  # The loss may not depend on all weights of a user's network.
    return DistributedDataParallel(forward, find_unused_parameters=own)


def _has_channels_last(network: nn.Module, config: Config) -> bool:
    asked = config.training.channels_last
    if asked != "auto":
        return asked
    if device_of(network).type != "cpu" or ":" in config.network.name:
        return False  # A user's network may depend on the default order.
    # For these layers torch copies feature maps into the default order and back.
    return not any(isinstance(layer, _InstanceNorm) for layer in network.modules())


def _put_channels_last(network: nn.Module) -> None:
    """Store the kernels of a network with channels last; its feature maps follow."""
    for weights in network.parameters():
        if weights.dim() == 4:
            # A copy, so that kernels of one channel get the strides that their gradients have.
            ordered = torch.empty_like(weights.data, memory_format=torch.channels_last)
            weights.data = ordered.copy_(weights.data)


def _compiled(network: nn.Module) -> nn.Module:
    try:
        return torch.compile(network)  # type: ignore[return-value]
    except RuntimeError as error:
        raise _cannot_compile(error) from None


def _cannot_compile(error: RuntimeError) -> PolysegError:
    # The text after a blank line is about debugging torch.
    reason = " ".join(str(error).strip().partition("\n\n")[0].split())
    return PolysegError(
        f"training.compile: torch cannot compile the network here ({reason:.160}); "
        "set training.compile=false"
    )

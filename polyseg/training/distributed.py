"""One network in several processes, each with rows of a batch, as if it saw the whole batch.

Batch normalisation takes its statistics over all rows, and dropout draws its masks for all rows and
uses its own.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from polyseg.networks.dropout import mask_shape
from polyseg.system.process_group import Processes


class BatchNormTogether(_BatchNorm):
    """Batch normalisation by the mean and variance of the rows of all processes.

    In evaluation mode it is that of torch; so are its weights and statistics.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return features (B, C, ...) normalised, where B may be 0 in some of the processes."""
        if not (self.training and torch.is_grad_enabled()):
            # A process may try the network by itself; steps are taken by all together.
            return super().forward(features)
        wide = features.float()
        dims = [i for i in range(wide.dim()) if i != 1]
        shape = [1, -1] + [1] * (wide.dim() - 2)
        count = wide.new_tensor([wide.numel() / wide.shape[1]] if wide.numel() else [0.0])
        distributed.all_reduce(count)
        mean = _over_processes(wide.sum(dims)) / count
        centred = wide - mean.reshape(shape)
        variance = _over_processes(centred.square().sum(dims)) / count
        self._note(mean.detach(), variance.detach(), count)
        normalised: Tensor = centred * (variance + self.eps).rsqrt().reshape(shape)
        if self.affine:
            normalised = normalised * self.weight.reshape(shape) + self.bias.reshape(shape)
        return normalised.to(features.dtype)

    def _note(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics, as torch does, by the unbiased variance."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), share)

    def _check_input_dim(self, features: Tensor) -> None:
        """Take features of any number of dimensions."""


class _Sum(torch.autograd.Function):
    """The sum over all processes, of the values and, on the way back, of their gradients."""

    @staticmethod
    def forward(_context: Any, mine: Tensor) -> Tensor:
        return _summed(mine)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(mine: Tensor) -> Tensor:
    total = mine.contiguous().clone()
    distributed.all_reduce(total)
    return total


def _over_processes(mine: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(mine)  # type: ignore[no-untyped-call]
    return total


def normalise_together(network: nn.Module) -> None:
    """Let the batch normalisation layers of a network go by the rows of all processes."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, BatchNormTogether):
                setattr(module, name, _together(child))


def _together(layer: _BatchNorm) -> BatchNormTogether:
    made = BatchNormTogether(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    # The same tensors, so that an optimizer may know them already.
    for name, weights in layer.named_parameters(recurse=False):
        setattr(made, name, weights)
    for name, values in layer.named_buffers(recurse=False):
        setattr(made, name, values)
    made.train(layer.training)
    return made


class DropoutTogether:
    """The masks of a network's dropout layers for a whole batch, of which this process has rows."""

    def __init__(self, layers: Mapping[str, Any], processes: Processes) -> None:
        self.layers, self.processes = layers, processes
        self.total, self.rows = 0, slice(None)
        """Images in the batch of all processes, and which of them are looked at."""

    @contextlib.contextmanager
    def taking_over(self) -> Iterator[None]:
        """Draw in place of the layers, by torch's global stream, which all processes have alike.

        For one process alone the layers draw for themselves, the same.
        """
        if self.processes.count == 1:
            yield
            return
        hooks = []
        for layer in self.layers.values():
            layer.eval()
            hooks.append(layer.register_forward_hook(self._drop))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _drop(self, layer: Any, _inputs: Any, features: Tensor) -> Tensor:
        shape = (self.total, *mask_shape(layer, features.shape[1:]))
        mask = torch.empty(
            shape,
            dtype=features.dtype,
            device=features.device,
            memory_format=_order_in_memory(features),
        )
        mask = mask.bernoulli_(1 - layer.p).div_(1 - layer.p if layer.p < 1 else 1)
        return features * mask[self.rows]


def _order_in_memory(features: Tensor) -> torch.memory_format:
    """Return the order of features, in which torch's own layers draw masks for them."""
    last = features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not features.is_contiguous() else torch.contiguous_format

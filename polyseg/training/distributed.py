"""Batch normalisation and dropout of several processes that share a batch, as in one process.

Batch normalisation uses the statistics of all rows, and dropout draws masks for all rows and uses
those of the process's own rows.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from polyseg.networks.dropout import mask_shape
from polyseg.system.process_group import Processes


class BatchNormTogether(_BatchNorm):
    """Batch normalisation with the mean and variance of the rows of all processes.

    Evaluation mode, weights and running statistics are torch's.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return normalised features, (B, C, ...); B may be 0 in some of the processes."""
        if not (self.training and torch.is_grad_enabled()):
            # Without gradients this is no training step, and other processes may not call it.
            return super().forward(features)
        wide = features.float()
        dims = [i for i in range(wide.dim()) if i != 1]
        shape = [1, -1] + [1] * (wide.dim() - 2)
        count = wide.new_tensor([wide.numel() / wide.shape[1]] if wide.numel() else [0.0])
        distributed.all_reduce(count)
        mean = _over_processes(wide.sum(dims)) / count
        centred = wide - mean.reshape(shape)
        variance = _over_processes(centred.square().sum(dims)) / count
        self._update_statistics(mean.detach(), variance.detach(), count)
        normalised: Tensor = centred * (variance + self.eps).rsqrt().reshape(shape)
        if self.affine:
            normalised = normalised * self.weight.reshape(shape) + self.bias.reshape(shape)
        return normalised.to(features.dtype)

    def _update_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running statistics as torch does, with the unbiased variance."""
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
        """Accept features of any number of dimensions."""


class _Sum(torch.autograd.Function):
    """The sum over all processes: of values in the forward pass, of gradients in the backward."""

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


# Function.apply has no type annotations.
_over_processes: Callable[[Tensor], Tensor] = _Sum.apply


def normalise_together(network: nn.Module) -> None:
    """Replace the batch normalisation layers of a network by `BatchNormTogether`."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, BatchNormTogether):
                setattr(module, name, _together(child))


def _together(layer: _BatchNorm) -> BatchNormTogether:
    made = BatchNormTogether(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    # The same tensors, which an optimizer may already refer to.
    for name, weights in layer.named_parameters(recurse=False):
        setattr(made, name, weights)
    for name, values in layer.named_buffers(recurse=False):
        setattr(made, name, values)
    made.train(layer.training)
    return made


class DropoutTogether:
    """Draws the dropout masks of a whole batch, and applies those of this process's rows."""

    def __init__(self, layers: Mapping[str, Any], processes: Processes) -> None:
        self.layers, self.processes = layers, processes
        self.total, self.rows = 0, slice(None)
        """Number of images in the whole batch, and the rows in the next forward pass."""

    @contextlib.contextmanager
    def taking_over(self) -> Iterator[None]:
        """Replace the layers' own dropout; torch's global generator is equal in all processes.

        In a single process the layers draw the same masks themselves.
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
    """Return the memory order of features, which is the order of masks in torch's layers."""
    last = features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not features.is_contiguous() else torch.contiguous_format

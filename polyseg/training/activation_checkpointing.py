"""Recompute feature maps in the backward pass instead of storing them, to save memory."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

_MOST_CONVOLUTIONS = 4
"""Largest number of convolutions in a block."""
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def recompute_blocks(network: nn.Module) -> int:
    """Let the blocks of a network store only their inputs in training; return their number.

    In the backward pass each block runs again with the same random numbers, without a second update
    of batch normalisation statistics. Evaluation mode is not changed.

    >>> recompute_blocks(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3)))
    1
    """
    blocks = list(_blocks(network))
    for block in blocks:
        block.forward = partial(_run, block, block.forward)
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest modules with few convolutions."""
    convolutions = sum(isinstance(one, _ConvNd) for one in module.modules())
    if 0 < convolutions <= _MOST_CONVOLUTIONS and not isinstance(module, _NEVER_CALLED):
        yield module
    elif convolutions:
        for child in module.children():
            yield from _blocks(child)


def _run(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs, **named)
    return checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(block)),
        **named,
    )


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    layers = [one for one in block.modules() if isinstance(one, _BatchNorm)]
    before = [(one.momentum, one.num_batches_tracked) for one in layers]
    for one in layers:
        # Autograd needs the same operations, so the update stays, but changes nothing.
        one.momentum = 0.0
        one.num_batches_tracked = None if (n := one.num_batches_tracked) is None else n.clone()
    try:
        yield
    finally:
        for one, (momentum, tracked) in zip(layers, before, strict=True):
            one.momentum, one.num_batches_tracked = momentum, tracked

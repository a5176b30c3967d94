"""Feature maps that are computed anew on the way back, in place of being kept: time for memory."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

_CONVOLUTIONS_A_BLOCK = 4
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def recompute_blocks(network: nn.Module) -> int:
    """Let the blocks of a network forget, in training, all but what goes in; return how many.

    On the way back each block runs once more, with the same random numbers, and moves no statistics
    of batch normalisation a second time. In evaluation mode nothing is otherwise.

    >>> recompute_blocks(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3)))
    1
    """
    blocks = list(_blocks(network))
    for block in blocks:
        block.forward = partial(_run, block, block.forward)
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest parts with few convolutions."""
    convolutions = sum(isinstance(one, _ConvNd) for one in module.modules())
    if 0 < convolutions <= _CONVOLUTIONS_A_BLOCK and not isinstance(module, _NEVER_CALLED):
        yield module
    elif convolutions:
        for child in module.children():
            yield from _blocks(child)


def _run(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs, **named)
    contexts = partial(_contexts, block)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **named)


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    """Return what surrounds the way there, and the second run."""
    return contextlib.nullcontext(), _statistics_kept(block)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    layers = [one for one in block.modules() if isinstance(one, _BatchNorm)]
    before = [(one.momentum, one.num_batches_tracked) for one in layers]
    for one in layers:
        # The layer does all that it does, so that autograd meets the same; it moves by nothing.
        one.momentum = 0.0
        one.num_batches_tracked = None if (n := one.num_batches_tracked) is None else n.clone()
    try:
        yield
    finally:
        for one, (momentum, tracked) in zip(layers, before, strict=True):
            one.momentum, one.num_batches_tracked = momentum, tracked

"""The dropout of a network: which layers drop, and whether MC Dropout can steer all that do."""

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from polyseg.errors import PolysegError
from polyseg.inference import held_in_mode

DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

_CHANGES_THE_MEAN = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPS_WITHIN = (nn.MultiheadAttention, nn.RNNBase)


def stochastic_layers(network: nn.Module) -> dict[str, Any]:
    """Return the active dropout layers by name: those with a rate above 0.

    Raises:
        PolysegError: there is a kind of dropout that MC Dropout does not cover.

    >>> sorted(stochastic_layers(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.0))))
    ['0']
    """
    layers: dict[str, Any] = {}
    for name, module in network.named_modules():
        if isinstance(module, _CHANGES_THE_MEAN):
            raise PolysegError(
                f"network layer {name}: {type(module).__name__} changes the mean of what it passes "
                "on, which eq. 7 does not; use nn.Dropout or nn.Dropout2d"
            )
        if isinstance(module, _DROPS_WITHIN) and module.dropout > 0:
            raise PolysegError(
                f"network layer {name}: {type(module).__name__} drops inside itself, which "
                "MC Dropout cannot steer; set its dropout to 0 and use nn.Dropout layers beside it"
            )
        if isinstance(module, DROPOUT_LAYERS) and module.p > 0:
            layers[name] = module
    return layers


def active_layers(network: nn.Module) -> dict[str, Any]:
    """Return the active dropout layers by name; there is at least one.

    Raises:
        PolysegError: none is active, or one drops everything.

    >>> list(active_layers(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))))
    ['1']
    """
    layers = stochastic_layers(network)
    if not layers:
        raise PolysegError(
            "network: has no active dropout layer, so MC Dropout has nothing to sample; "
            "set network.dropout above 0, or choose others by network.dropout_layers"
        )
    for name, layer in layers.items():
        if layer.p == 1:
            raise PolysegError(f"network layer {name}: a dropout rate of 1 drops everything")
    return layers


def refuse_hidden_dropout(network: nn.Module, images: Tensor) -> None:
    """Raise if training drops anything that MC Dropout would not drop alike.

    Two passes are tried, in training and in evaluation mode; modes, buffers and torch's random
    stream are afterwards as they were before.

    Args:
        network: any.
        images: (B, C, H, W) that it takes, two at least.

    Raises:
        PolysegError: something is dropped outside a dropout layer, an active layer is skipped in
            evaluation mode, or a layer's first dimension is not that of the images.

    >>> refuse_hidden_dropout(nn.Dropout(0.5), torch.zeros(2, 1, 4, 4))
    """
    in_training, dropped = _count_calls(network, images, training=True)
    in_evaluation, _ = _count_calls(network, images, training=False)
    if hidden := dropped - in_training.total():
        raise PolysegError(
            f"network: {hidden} calls of functional dropout in a pass, which MC Dropout cannot "
            "steer; use nn.Dropout or nn.Dropout2d layers instead"
        )
    for name in in_training.keys() | in_evaluation.keys():
        if in_training[name] != in_evaluation[name]:
            raise PolysegError(
                f"network layer {name}: is run {in_training[name]} times in training and "
                f"{in_evaluation[name]} times in evaluation mode, where MC Dropout happens; call "
                "it in both, it does nothing in evaluation mode by itself"
            )
    if stochastic_layers(network) and not in_training:
        raise PolysegError(
            "network: none of its active dropout layers is run, so MC Dropout has nothing to sample"
        )


def _count_calls(network: nn.Module, images: Tensor, *, training: bool) -> tuple[Counter[str], int]:
    """Return how often each active layer is called in a pass, and how often anything drops."""
    by_layer: Counter[str] = Counter()

    def count(name: str, output: Tensor) -> None:
        by_layer[name] += 1
        if output.shape[0] != len(images):
            raise PolysegError(
                f"network layer {name}: its first dimension is {output.shape[0]} for "
                f"{len(images)} images; MC Dropout takes it to be the image"
            )

    hooks = [
        layer.register_forward_hook(lambda _m, _i, output, name=name: count(name, output))
        for name, layer in stochastic_layers(network).items()
    ]
    # Where normalisation layers keep the statistics that a pass in training moves.
    buffers = [(values, values.clone()) for values in network.buffers()]
    devices = [images.device] if images.device.type == "cuda" else []
    try:
        with (
            held_in_mode(network, training=training),
            torch.random.fork_rng(devices),
            torch.no_grad(),
            _DropoutCalls() as calls,
        ):
            network(images)
    finally:
        for values, before in buffers:
            values.copy_(before)
        for hook in hooks:
            hook.remove()
    return by_layer, calls.number


class _DropoutCalls(TorchFunctionMode):
    """Counts calls that drop something, be they a layer's or a function's."""

    _functions = frozenset(
        {
            functional.dropout,
            functional.dropout1d,
            functional.dropout2d,
            functional.dropout3d,
            functional.alpha_dropout,
            functional.feature_alpha_dropout,
            functional.multi_head_attention_forward,
            functional.scaled_dot_product_attention,
            torch.dropout,
            torch.dropout_,
            torch.feature_dropout,
            torch.native_dropout,
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._functions and _drops(func, args, kwargs or {}):
            self.number += 1
        return func(*args, **(kwargs or {}))


def _drops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether this call has a rate above 0 and is told to be training."""
    if func is functional.scaled_dot_product_attention:
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0)
    if func is functional.multi_head_attention_forward:
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        return bool(given.get("training", True) and given["dropout_p"] > 0)
    rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return bool(training and rate > 0)

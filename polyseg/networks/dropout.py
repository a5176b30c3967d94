"""The dropout of a network: which layers drop, and whether MC Dropout controls all randomness."""

import contextlib
import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from polyseg.errors import PolysegError
from polyseg.networks.inference import held_in_mode
from polyseg.registry import Registry, Row


def _of_values(shape: Sequence[int]) -> Sequence[int]:
    return shape


def _of_channels(shape: Sequence[int]) -> Sequence[int]:
    return (shape[0], *(1 for _ in shape[1:]))


@dataclass(frozen=True)
class DropoutKind(Row):
    """A type of layer that drops; its function is the type, which has its rate in `p`.

    In evaluation mode it returns its input, by whose mask MC Dropout then multiplies.
    """

    mask_shape: Callable[[Sequence[int]], Sequence[int]] = _of_values
    """Shape of the mask of an image, from that of its features, (C, H, W)."""


DROPOUT_KINDS = Registry(
    "dropout layer",
    DropoutKind("Dropout", "drops single values", "torch.nn:Dropout"),
    *(
        DropoutKind(name, "drops whole feature maps", f"torch.nn:{name}", _of_channels)
        for name in ("Dropout1d", "Dropout2d", "Dropout3d")
    ),
)
"""The layers that MC Dropout covers; the fast passes know those of torch, others run plainly."""

_CHANGES_THE_MEAN = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPS_WITHIN = (nn.MultiheadAttention, nn.RNNBase)
_WITHOUT_OTHER_RANDOMNESS = WeakSet[nn.Module]()
_SEEDS, _SEEDS_IF_DRAWN = 5, 50
"""Numbers of passes, each with a seed of its own, that are compared to find other randomness: the
larger one where something is seen to be drawn, which at a small rate seldom changes a pass."""


def dropout_types() -> tuple[type[Any], ...]:
    """Return the types of `DROPOUT_KINDS`."""
    return tuple(kind.resolve() for kind in DROPOUT_KINDS.values())


def mask_shape(layer: Any, shape: Sequence[int]) -> torch.Size:
    """Return the shape of the mask of an image, from that of its features, (C, H, W).

    >>> mask_shape(nn.Dropout2d(), (4, 8, 8))
    torch.Size([4, 1, 1])
    """
    kinds = (kind for kind in DROPOUT_KINDS.values() if isinstance(layer, kind.resolve()))
    return torch.Size(next(kinds).mask_shape(shape))


def stochastic_layers(network: nn.Module) -> dict[str, Any]:
    """Return the active dropout layers by name: those with a rate above 0.

    Raises:
        PolysegError: there is a kind of dropout that MC Dropout does not cover.

    >>> sorted(stochastic_layers(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.0))))
    ['0']
    """
    layers: dict[str, Any] = {}
    types = dropout_types()
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
        if isinstance(module, types) and module.p > 0:
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
    """Raise if anything is random in training that MC Dropout would not repeat in its passes.

    A pass in training and one in evaluation mode count what drops. Then passes with several seeds,
    with the dropout layers in evaluation and all else in training mode, must give equal outputs.
    Modes, buffers and the random streams of torch, NumPy and Python are afterwards as before.

    Args:
        network: any.
        images: (B, C, H, W) that it takes, two at least.

    Raises:
        PolysegError: something is dropped outside a dropout layer, an active layer is skipped in
            evaluation mode, a layer's first dimension is not that of the images, or something else
            is random, such as stochastic depth by torch.bernoulli.

    >>> refuse_hidden_dropout(nn.Dropout(0.5), torch.zeros(2, 1, 4, 4))
    """
    in_training, dropped = _count_calls(network, images, training=True)
    in_evaluation, _ = _count_calls(network, images, training=False)
    # Below 0 where layers of other types than torch's drop by themselves.
    if (hidden := dropped - in_training.total()) > 0:
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
    _refuse_other_randomness(network, images)


def _refuse_other_randomness(network: nn.Module, images: Tensor) -> None:
    """Raise if passes in training mode differ by the seed while no dropout layer drops.

    A network that passed is not tried again: training changes its weights, not what it draws.
    """
    if network in _WITHOUT_OTHER_RANDOMNESS:
        return
    expected, drawn = _pass_without_dropout(network, images, seed=0)
    # Accelerators may add up in another order each time.
    tolerance = 0.0 if images.device.type == "cpu" else 1e-5 * float(expected.abs().max())
    for seed in range(1, _SEEDS_IF_DRAWN if drawn else _SEEDS):
        found, _ = _pass_without_dropout(network, images, seed=seed)
        # Weights that diverged give NaN, which is no randomness.
        if (found - expected).nan_to_num().abs().max() > tolerance:
            what = ", ".join(sorted(drawn)) or "a generator of its own"
            raise PolysegError(
                f"network: its output in training is random even with its dropout layers off, by "
                f"{what}, which MC Dropout cannot steer; use nn.Dropout or nn.Dropout2d layers in "
                "its place, or take it out"
            )
    _WITHOUT_OTHER_RANDOMNESS.add(network)


def _pass_without_dropout(
    network: nn.Module, images: Tensor, *, seed: int
) -> tuple[Tensor, set[str]]:
    """Return the output with dropout layers in evaluation and all else in training mode, and draws.

    The output is flat, and the draws are the names of what drew random numbers. The network and the
    random streams are afterwards as before.
    """
    with held_in_mode(network, training=True), _left_as_it_was(network, images.device):
        for layer in stochastic_layers(network).values():
            layer.eval()
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        with torch.no_grad(), _Draws(images.device) as draws:
            output = _flat(network(images))
    return output, draws.names


def _flat(output: Any) -> Tensor:
    """Return all numbers of an output, which in training may be several tensors."""
    if isinstance(output, Tensor):
        return output.flatten()
    parts = output.values() if isinstance(output, Mapping) else output
    return torch.cat([_flat(one) for one in parts])


@contextlib.contextmanager
def _left_as_it_was(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Give a network its buffers back, and torch, NumPy and Python their random streams."""
    # Where normalisation layers keep the statistics that a pass in training moves.
    buffers = [
        (module._buffers, name, values, values.clone())
        for module in network.modules()
        for name, values in module._buffers.items()
        if values is not None
    ]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for owner, name, values, before in buffers:
            owner[name] = values.copy_(before)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


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
    try:
        with (
            held_in_mode(network, training=training),
            _left_as_it_was(network, images.device),
            torch.no_grad(),
            _DropoutCalls() as calls,
        ):
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return by_layer, calls.number


class _Draws(TorchFunctionMode):
    """Collects the names of what draws from the random streams of torch, NumPy and Python."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.names = device, set[str]()
        self.python, self.numpy = random.getstate(), _numpy_state()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = self._state()
        result = func(*args, **(kwargs or {}))
        if not torch.equal(self._state(), before):
            self.names.add(f"torch's {func.__name__}")
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if random.getstate() != self.python:
            self.names.add("Python's random")
        if _numpy_state() != self.numpy:
            self.names.add("numpy.random")

    def _state(self) -> Tensor:
        state = torch.get_rng_state()
        if self.device.type != "cuda":
            return state
        return torch.cat([state, torch.cuda.get_rng_state(self.device)])


def _numpy_state() -> str:
    # Its repr would leave out most of the keys.
    return repr([np.asarray(part).tolist() for part in np.random.get_state()])  # noqa: NPY002


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

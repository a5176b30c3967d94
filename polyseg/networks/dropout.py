"""The dropout layers of a network, and checks that MC Dropout controls all its randomness."""

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


def _by_channel(shape: Sequence[int]) -> Sequence[int]:
    return (shape[0], *(1 for _ in shape[1:]))


@dataclass(frozen=True)
class DropoutLayer(Row):
    """A type of dropout layer, named by `function`, with its rate in the attribute `p`.

    In evaluation mode it must return its input, which MC Dropout multiplies by a mask.
    """

    mask_shape: Callable[[Sequence[int]], Sequence[int]] = tuple
    """Shape of an image's mask, from the shape (C, H, W) of its features."""


DROPOUT_LAYERS = Registry(
    "dropout layer",
    DropoutLayer("Dropout", "drops single values", "torch.nn:Dropout"),
    *(
        DropoutLayer(name, "drops whole feature maps", f"torch.nn:{name}", _by_channel)
        for name in ("Dropout1d", "Dropout2d", "Dropout3d")
    ),
)
"""The layers that MC Dropout supports; the compiled passes support torch's only."""

_CHANGES_THE_MEAN = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPS_INSIDE = (nn.MultiheadAttention, nn.RNNBase)
_CHECKED = WeakSet[nn.Module]()
_SEEDS, _SEEDS_IF_DRAWN = 5, 50
"""Numbers of passes that are compared to find other randomness, without and with calls that draw
random numbers: a small rate seldom changes a pass."""


def dropout_types() -> tuple[type[Any], ...]:
    """Return the types of `DROPOUT_LAYERS`."""
    return tuple(kind.resolve() for kind in DROPOUT_LAYERS.values())


def mask_shape(layer: Any, shape: Sequence[int]) -> torch.Size:
    """Return the shape of an image's mask, from the shape (C, H, W) of its features.

    >>> mask_shape(nn.Dropout2d(), (4, 8, 8))
    torch.Size([4, 1, 1])
    """
    kinds = (kind for kind in DROPOUT_LAYERS.values() if isinstance(layer, kind.resolve()))
    return torch.Size(next(kinds).mask_shape(shape))


def stochastic_layers(network: nn.Module) -> dict[str, Any]:
    """Return the active dropout layers, those with a rate above 0, by name.

    Kinds of dropout that MC Dropout does not support raise PolysegError.

    >>> sorted(stochastic_layers(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.0))))
    ['0']
    """
    layers: dict[str, Any] = {}
    types = dropout_types()
    for name, module in network.named_modules():
        if isinstance(module, _CHANGES_THE_MEAN):
            raise PolysegError(
                f"network layer {name}: {type(module).__name__} changes the mean of its input, "
                "unlike the dropout of eq. 7; use nn.Dropout or nn.Dropout2d"
            )
        if isinstance(module, _DROPS_INSIDE) and module.dropout > 0:
            raise PolysegError(
                f"network layer {name}: {type(module).__name__} drops inside itself, which MC "
                "Dropout cannot control; set its dropout to 0 and use nn.Dropout layers beside it"
            )
        if isinstance(module, types) and module.p > 0:
            layers[name] = module
    return layers


def active_layers(network: nn.Module) -> dict[str, Any]:
    """Return the active dropout layers by name, at least one and none with a rate of 1.

    >>> list(active_layers(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))))
    ['1']
    """
    layers = stochastic_layers(network)
    if not layers:
        raise PolysegError(
            "network: has no active dropout layer for MC Dropout; set network.dropout above 0, or "
            "choose others by network.dropout_layers"
        )
    for name, layer in layers.items():
        if layer.p == 1:
            raise PolysegError(f"network layer {name}: a dropout rate of 1 drops everything")
    return layers


def refuse_hidden_dropout(network: nn.Module, images: Tensor) -> None:
    """Raise if training has other randomness than that of the passes of MC Dropout.

    Examples are functional dropout, an active layer that is not called in evaluation mode or whose
    first dimension is not the image, and stochastic depth by torch.bernoulli.

    It counts the dropout calls in a pass in training mode and in one in evaluation mode. Then it
    compares passes with several seeds, with only the dropout layers in evaluation mode.
    `images` are (B, C, H, W), B at least 2. Modes, buffers and random streams (torch, NumPy,
    Python) are restored.

    >>> refuse_hidden_dropout(nn.Dropout(0.5), torch.zeros(2, 1, 4, 4))
    """
    in_training, dropped = _count_calls(network, images, training=True)
    in_evaluation, _ = _count_calls(network, images, training=False)
    # Negative if layers of other types than torch's apply dropout.
    if (hidden := dropped - in_training.total()) > 0:
        raise PolysegError(
            f"network: {hidden} calls of functional dropout in a pass, which MC Dropout cannot "
            "control; use nn.Dropout or nn.Dropout2d layers instead"
        )
    for name in in_training.keys() | in_evaluation.keys():
        if in_training[name] != in_evaluation[name]:
            raise PolysegError(
                f"network layer {name}: is called {in_training[name]} times in training and "
                f"{in_evaluation[name]} times in evaluation mode, which MC Dropout uses; call it "
                "in both modes"
            )
    if stochastic_layers(network) and not in_training:
        raise PolysegError(
            "network: none of its active dropout layers is called, so MC Dropout has no effect"
        )
    _refuse_other_randomness(network, images)


def _refuse_other_randomness(network: nn.Module, images: Tensor) -> None:
    """Raise if passes in training mode with dropout layers off differ by the seed.

    A network is checked once, because training does not change which functions it calls.
    """
    if network in _CHECKED:
        return
    expected, drawn = _pass_without_dropout(network, images, seed=0)
    # Accelerators may sum in another order each time.
    tolerance = 0.0 if images.device.type == "cpu" else 1e-5 * float(expected.abs().max())
    for seed in range(1, _SEEDS_IF_DRAWN if drawn else _SEEDS):
        found, _ = _pass_without_dropout(network, images, seed=seed)
        # NaN of diverged weights is not randomness.
        if (found - expected).nan_to_num().abs().max() > tolerance:
            what = ", ".join(sorted(drawn)) or "its own generator"
            raise PolysegError(
                f"network: its output in training is random even without its dropout layers, by "
                f"{what}, which MC Dropout cannot control; replace it by nn.Dropout or "
                "nn.Dropout2d layers, or remove it"
            )
    _CHECKED.add(network)


def _pass_without_dropout(
    network: nn.Module, images: Tensor, *, seed: int
) -> tuple[Tensor, set[str]]:
    """Return the flat output in training mode without dropout, and the random functions called."""
    with held_in_mode(network, training=True), _restored(network, images.device):
        for layer in stochastic_layers(network).values():
            layer.eval()
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        with torch.no_grad(), _Draws(images.device) as draws:
            output = _flat(network(images))
    return output, draws.names


def _flat(output: Any) -> Tensor:
    """Return all numbers of an output, which may consist of several tensors."""
    if isinstance(output, Tensor):
        return output.flatten()
    parts = output.values() if isinstance(output, Mapping) else output
    return torch.cat([_flat(one) for one in parts])


@contextlib.contextmanager
def _restored(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore a network's buffers, such as batch statistics, and all random streams afterwards."""
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
    """Return the number of calls of each active layer in a pass, and of all dropout calls."""
    by_layer: Counter[str] = Counter()

    def count(name: str, output: Tensor) -> None:
        by_layer[name] += 1
        if output.shape[0] != len(images):
            raise PolysegError(
                f"network layer {name}: the first dimension of its output is {output.shape[0]} "
                f"for {len(images)} images; MC Dropout needs one entry for each image"
            )

    hooks = [
        layer.register_forward_hook(lambda _m, _i, output, name=name: count(name, output))
        for name, layer in stochastic_layers(network).items()
    ]
    try:
        with (
            held_in_mode(network, training=training),
            _restored(network, images.device),
            torch.no_grad(),
            _DropoutCalls() as calls,
        ):
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return by_layer, calls.number


class _Draws(TorchFunctionMode):
    """Collects the names of functions that draw random numbers of torch, NumPy or Python."""

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
    # The repr of the array itself would leave out most numbers.
    return repr([np.asarray(part).tolist() for part in np.random.get_state()])  # noqa: NPY002


class _DropoutCalls(TorchFunctionMode):
    """Counts calls of dropout with effect, by layers or functions."""

    _functions = frozenset(
        {
            *(getattr(functional, f"dropout{dims}") for dims in ("", "1d", "2d", "3d")),
            *(functional.alpha_dropout, functional.feature_alpha_dropout),
            functional.multi_head_attention_forward,
            functional.scaled_dot_product_attention,
            *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.native_dropout),
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
    """Return whether a call has a rate above 0 and is in training mode."""
    if func is functional.scaled_dot_product_attention:
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0)
    if func is functional.multi_head_attention_forward:
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        return bool(given.get("training", True) and given["dropout_p"] > 0)
    rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return bool(training and rate > 0)

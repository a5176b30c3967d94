"""Segmentation networks by name, and where in them dropout is active.

A network is MONAI's, or a user's own as "package.module:factory"; either way it is wrapped so that
it takes images of any size. Dropout layers that are not chosen are removed, so training and MC
Dropout (eq. 7 needs the same masks' distribution in both) see the same layers.
"""

import copy
import fnmatch
import hashlib
import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from polyseg.errors import PolysegError

DropoutKind = Literal["channel", "element"]

_CHANNELS = (16, 32, 64, 128, 256)
_DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_REFUSED_LAYERS = (nn.AlphaDropout, nn.FeatureAlphaDropout)


class SegmentationNetwork(nn.Module):
    """A network for images of any size: pads to a multiple of its stride, crops the logits back.

    >>> network = build_network("unet", in_channels=1)
    >>> network(torch.zeros(2, 1, 50, 70)).shape
    torch.Size([2, 1, 50, 70])
    """

    def __init__(self, core: nn.Module, multiple: int) -> None:
        super().__init__()
        self.core = core
        self.multiple = multiple

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (B, out, H, W), of images (B, C, H, W)."""
        height, width = images.shape[-2:]
        rows, columns = (_padding(size, self.multiple) for size in (height, width))
        if rows or columns:
            images = functional.pad(
                images,
                (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2),
                mode="replicate",
            )
        logits: Tensor = self.core(images)
        return logits[..., rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width]


def build_network(
    name: str,
    *,
    in_channels: int,
    out_channels: int = 1,
    dropout: float = 0.2,
    dropout_kind: DropoutKind = "channel",
    dropout_layers: str | Iterable[str] = "auto",
    multiple_of: int = 32,
    settings: Mapping[str, Any] | None = None,
) -> SegmentationNetwork:
    """Build a network, with random weights from torch's global generator.

    Args:
        name: one of `network_names()`, or "package.module:factory"; the factory is called with
            in_channels, out_channels and `settings`, and puts in dropout as it likes.
        in_channels: channels of the images.
        out_channels: channels of the logits.
        dropout: the rate, in [0, 1), for the networks by name.
        dropout_kind: "channel" drops whole feature maps, "element" single values.
        dropout_layers: "decoder" for those from the bottleneck on, "bottleneck", "all", or patterns
            of layer names such as "core.0.model.1.*"; "auto" is "decoder" for the networks by name
            and "all" for a factory's.
        multiple_of: what a factory's network wants height and width to be a multiple of.
        settings: further arguments of the network.

    Raises:
        PolysegError: an unknown name, settings that the network refuses, patterns that match no
            dropout layer, or an output of another shape than (B, out_channels, H, W).

    >>> network = build_network("basic-unet", in_channels=3, dropout=0.1)
    >>> sum(isinstance(layer, nn.Dropout2d) for layer in network.modules())
    10
    """
    own = ":" in name
    if own:
        core, multiple = _from_factory(name, in_channels, out_channels, settings), multiple_of
    else:
        core, multiple = _from_monai(name, in_channels, out_channels, dropout, settings)
    network = SegmentationNetwork(core, multiple)
    layers = _trace_dropout(network, name, in_channels, out_channels)
    if dropout_layers == "auto":
        dropout_layers = "all" if own else "decoder"
    chosen = _choose(layers, dropout_layers)
    for layer in layers:
        if layer.name not in chosen:
            network.set_submodule(layer.name, nn.Identity())
        elif not own:
            kind = nn.Dropout2d if dropout_kind == "channel" else nn.Dropout
            network.set_submodule(layer.name, kind(dropout))
    return network


def network_names() -> list[str]:
    """Return the names that `build_network` knows.

    >>> network_names()
    ['unet', 'basic-unet', 'attention-unet', 'dynunet', 'segresnet']
    """
    return list(_RECIPES)


def stochastic_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the active dropout layers by name: those with a rate above 0.

    Raises:
        PolysegError: there is a kind of dropout that MC Dropout does not cover.

    >>> sorted(stochastic_layers(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.0))))
    ['0']
    """
    layers: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if isinstance(module, _REFUSED_LAYERS):
            raise PolysegError(
                f"network layer {name}: {type(module).__name__} changes the mean of what it passes "
                "on, which eq. 7 does not; use nn.Dropout or nn.Dropout2d"
            )
        if isinstance(module, _DROPOUT_LAYERS) and module.p > 0:
            layers[name] = module
    return layers


def hash_weights(network: nn.Module) -> str:
    """Return the sha256 of a network's weights and buffers, names included.

    >>> hash_weights(nn.Identity())[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, values in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def refuse_functional_dropout(network: nn.Module, images: Tensor) -> None:
    """Raise if a training pass drops anything outside a dropout layer, where no one can steer it.

    The pass runs on a copy, and torch's random stream is put back after it.

    Args:
        network: any.
        images: (B, C, H, W) that it takes.

    Raises:
        PolysegError: functional dropout, or attention with dropout of its own, was seen.

    >>> refuse_functional_dropout(nn.Dropout(0.5), torch.zeros(1, 1, 4, 4))
    """
    trial = copy.deepcopy(network).train()
    by_layers = 0

    def count(*_: Any) -> None:
        nonlocal by_layers
        by_layers += 1

    for layer in stochastic_layers(trial).values():
        layer.register_forward_hook(count)
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), _DropoutCalls() as calls:
        trial(images)
    if calls.number > by_layers:
        raise PolysegError(
            f"network: {calls.number - by_layers} calls of functional dropout in a pass, which "
            "MC Dropout cannot steer; use nn.Dropout or nn.Dropout2d layers instead"
        )


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
    """Return whether this call has a rate above 0 (and is told to be training)."""
    attention = func is functional.scaled_dot_product_attention
    rate = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) if attention else None
    if rate is None:
        rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = True if attention else kwargs.get("training", args[2] if len(args) > 2 else True)
    return bool(training) and rate > 0


@dataclass(frozen=True)
class _Layer:
    """A dropout layer as a pass meets it."""

    name: str
    channels: int
    area: int
    last: bool
    """Its output is the network's: dropping it would drop the answer."""


def _trace_dropout(
    network: SegmentationNetwork, name: str, in_channels: int, out_channels: int
) -> list[_Layer]:
    """Return the dropout layers in the order in which a pass runs them; checks the output too."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, key=key: seen.setdefault(key, out))
        for key, layer in stochastic_layers(network).items()
    ]
    size = 2 * network.multiple
    training = network.training
    try:
        with torch.no_grad():
            core_output = network.eval().core(torch.zeros(1, in_channels, size, size))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PolysegError(
            f"network.name = {name}: fails on an image of {size} x {size} with {in_channels} "
            f"channels: {reason}"
        ) from error
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    if getattr(core_output, "shape", None) != (1, out_channels, size, size):
        raise PolysegError(
            f"network.name = {name}: must return logits of shape (B, {out_channels}, H, W), gave "
            f"{tuple(getattr(core_output, 'shape', ())) or type(core_output).__name__}"
        )
    return [
        _Layer(key, out.shape[1], math.prod(out.shape[2:]), out is core_output)
        for key, out in seen.items()
    ]


def _choose(layers: list[_Layer], wanted: str | Iterable[str]) -> set[str]:
    """Return the names of the layers that stay.

    A layer with a single channel, or the very last one, is chosen only by a pattern: to drop it
    is to drop everything.
    """
    able = [layer for layer in layers if layer.channels > 1 and not layer.last]
    smallest = min((layer.area for layer in able), default=0)
    if wanted == "all":
        return {layer.name for layer in able}
    if wanted == "bottleneck":
        return {layer.name for layer in able if layer.area == smallest}
    if wanted == "decoder":
        first = next((i for i, layer in enumerate(able) if layer.area == smallest), 0)
        return {layer.name for layer in able[first:]}
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    names = [layer.name for layer in layers]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise PolysegError(
                f"network.dropout_layers: {pattern!r} matches none of the dropout layers: "
                f"{', '.join(names) or 'there are none'}"
            )
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


def _padding(size: int, multiple: int) -> int:
    # At least two cells at the bottleneck, or batch norm has nothing to average over.
    return max(math.ceil(size / multiple), 2) * multiple - size


def _from_factory(
    name: str, in_channels: int, out_channels: int, settings: Mapping[str, Any] | None
) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise PolysegError(
            f"network.name = {name}: {error}; give package.module:factory that can be imported "
            "from here (PYTHONPATH says where from)"
        ) from error
    core = _call(
        name, factory, in_channels=in_channels, out_channels=out_channels, **settings or {}
    )
    if not isinstance(core, nn.Module):
        raise PolysegError(f"network.name = {name}: must return a torch.nn.Module")
    return core


def _from_monai(
    name: str,
    in_channels: int,
    out_channels: int,
    dropout: float,
    settings: Mapping[str, Any] | None,
) -> tuple[nn.Module, int]:
    from monai.networks import nets

    if name not in _RECIPES:
        raise PolysegError(
            f"network.name = {name}: unknown; choose {', '.join(_RECIPES)}, or give "
            "package.module:factory"
        )
    recipe = _RECIPES[name]
    arguments = {**recipe.settings, **(settings or {})}
    rate = {} if recipe.add_dropout else {"dropout": dropout}
    features = arguments["channels"][0] if recipe.wants_head else out_channels
    core = _call(
        name,
        getattr(nets, recipe.class_name),
        spatial_dims=2,
        in_channels=in_channels,
        out_channels=features,
        **rate,
        **arguments,
    )
    if recipe.add_dropout:
        recipe.add_dropout(core, dropout)
    if recipe.wants_head:
        core = nn.Sequential(core, nn.Conv2d(features, out_channels, kernel_size=1))
    return core, recipe.multiple(arguments)


def _call(name: str, factory: Callable[..., Any], **settings: Any) -> Any:
    try:
        return factory(**settings)
    except (TypeError, ValueError) as error:
        raise PolysegError(f"network.kwargs: {name} refuses them: {error}") from error


def _add_dropout_to_segresnet(core: Any, rate: float) -> None:
    """End the bottleneck and each level of the decoder in dropout, as the other networks do.

    SegResNet's own dropout is a single layer behind its first convolution.
    """
    for level in (core.down_layers[-1], *core.up_layers):
        level.append(nn.Dropout2d(rate))


@dataclass(frozen=True)
class _Recipe:
    """How to build one of MONAI's networks, small and for 2D unless settings say otherwise."""

    class_name: str
    settings: Mapping[str, Any]
    multiple: Callable[[Mapping[str, Any]], int]
    add_dropout: Callable[[Any, float], None] | None = None
    wants_head: bool = False
    """Whether it normalises its very output, so that logits could hardly leave [-3, 3]: it then
    ends in features, and a 1 x 1 convolution makes logits of them."""


def _product_of_strides(settings: Mapping[str, Any]) -> int:
    return math.prod(settings["strides"])


_RECIPES = {
    "unet": _Recipe(
        "UNet",
        {"channels": _CHANNELS, "strides": (2, 2, 2, 2), "num_res_units": 2, "norm": "batch"},
        _product_of_strides,
        wants_head=True,
    ),
    "basic-unet": _Recipe(
        "BasicUNet", {"features": (*_CHANNELS, 16), "norm": "batch"}, lambda _: 16
    ),
    "attention-unet": _Recipe(
        "AttentionUnet", {"channels": _CHANNELS, "strides": (2, 2, 2, 2)}, _product_of_strides
    ),
    "dynunet": _Recipe(
        "DynUNet",
        {
            "kernel_size": (3, 3, 3, 3, 3),
            "strides": (1, 2, 2, 2, 2),
            "upsample_kernel_size": (2, 2, 2, 2),
            "filters": _CHANNELS,
            "norm_name": "batch",
        },
        _product_of_strides,
    ),
    "segresnet": _Recipe(
        "SegResNet",
        {"init_filters": 16, "norm": "batch", "blocks_down": (1, 2, 2, 4)},
        lambda settings: 2 ** (len(settings["blocks_down"]) - 1),
        _add_dropout_to_segresnet,
    ),
}

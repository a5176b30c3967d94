"""Segmentation networks by name, and the choice of their active dropout layers.

A network is one of MONAI's, or a user's as "package.module:factory". It is wrapped to take images
of any size. Dropout layers that are not chosen are removed, so that training and MC Dropout
(eq. 7) use the same layers.
"""

import copy
import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from polyseg.choices import DROPOUT_KINDS, NETWORKS
from polyseg.errors import PolysegError, first_line
from polyseg.networks.dropout import stochastic_layers
from polyseg.networks.segmentation_network import SegmentationNetwork
from polyseg.registry import resolve

_CHANNELS = (16, 32, 64, 128, 256)
_LARGEST_MULTIPLE = 512
_MOST_BLOCKS = 16
_SET_ELSEWHERE = ("spatial_dims", "in_channels", "out_channels", "dropout", "deep_supervision")


def build_network(
    name: str,
    *,
    in_channels: int,
    out_channels: int = 1,
    dropout: float = 0.2,
    dropout_kind: str = "channel",
    dropout_layers: str | Iterable[str] = "auto",
    multiple_of: int = 32,
    settings: Mapping[str, Any] | None = None,
) -> SegmentationNetwork:
    """Build a network, with random weights from torch's global generator.

    `dropout`, `dropout_kind`, `dropout_layers` and `multiple_of` are the settings of these names in
    `NetworkConfig`; the first two have no effect on the network of a factory.

    Args:
        name: a row of `NETWORKS`, or "package.module:factory"; the factory is called with
            in_channels, out_channels and `settings`, and adds its own dropout layers.
        in_channels: channels of the images.
        out_channels: channels of the logits.
        settings: further arguments of the network.

    Raises:
        PolysegError: an unknown name, settings that the network refuses, patterns that match no
            dropout layer, or an output that is not (B, out_channels, H, W).

    >>> network = build_network("basic-unet", in_channels=3, dropout=0.1)
    >>> sum(isinstance(layer, nn.Dropout2d) for layer in network.modules())
    10
    """
    if own := ":" in name:
        core, multiple = _from_factory(name, in_channels, out_channels, settings), multiple_of
    else:
        core, multiple = _by_name(name, in_channels, out_channels, dropout, settings)
        _remove_unused_biases(core)
    network = SegmentationNetwork(core, multiple)
    layers = _trace_dropout(network, name, in_channels, out_channels)
    if dropout_layers == "auto":
        dropout_layers = "all" if own else "decoder"
    chosen = _choose(layers, dropout_layers)
    for layer in layers:
        if layer.name not in chosen:
            _replace(network, layer.name, nn.Identity())
        elif own:
            # In place it would also change the features of a skip connection.
            network.get_submodule(layer.name).inplace = False  # type: ignore[assignment]
        else:
            _replace(network, layer.name, DROPOUT_KINDS.find(dropout_kind).resolve()(dropout))
    return network


def _remove_unused_biases(core: nn.Module) -> None:
    """Remove the biases of convolutions whose output is normalised right away.

    They have no effect; their gradients are rounding errors, which Adam would turn into steps.
    """
    for block in core.modules():
        steps = dict(getattr(block, "adn", nn.Sequential()).named_children())
        first = next(iter(steps.values()), None)
        if isinstance(first, _BatchNorm | _InstanceNorm) and isinstance(block.conv, _ConvNd):
            block.conv.register_parameter("bias", None)


@dataclass(frozen=True)
class _Layer:
    """A dropout layer, with the shape of its output."""

    name: str
    channels: int
    area: int
    last: bool
    """Whether its output is the output of the network."""


def _trace_dropout(
    network: SegmentationNetwork, name: str, in_channels: int, out_channels: int
) -> list[_Layer]:
    """Return the dropout layers in the order of a pass, after checking the shape of its output."""
    seen: dict[str, Tensor] = {}
    if network.multiple > _LARGEST_MULTIPLE:
        raise PolysegError(
            f"network.kwargs: {name} needs sides that are multiples of {network.multiple}; "
            f"use at most {_LARGEST_MULTIPLE}"
        )
    size = 2 * network.multiple

    def remember(name: str, output: Tensor) -> None:
        # Returns nothing, because a hook's result would replace the output.
        seen.setdefault(name, output)

    trial = copy.deepcopy(network.core)
    for key, layer in stochastic_layers(trial).items():
        layer.register_forward_hook(lambda _m, _i, out, key=key: remember(f"core.{key}", out))
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            images = torch.zeros(2, in_channels, size, size)
            in_training = trial.train()(images)
            seen.clear()
            output = trial.eval()(images)
    except Exception as error:  # Foreign code and settings may fail in any way.
        raise PolysegError(
            f"network.name = {name}: fails on images of {size} x {size} with {in_channels} "
            f"channels: {first_line(error)}"
        ) from error
    for given in (output, in_training):
        if getattr(given, "shape", None) != (2, out_channels, size, size):
            raise PolysegError(
                f"network.name = {name}: must return logits of shape (B, {out_channels}, H, W), "
                f"gave {tuple(getattr(given, 'shape', ())) or type(given).__name__}"
            )
    return [
        _Layer(key, values.shape[1], math.prod(values.shape[2:]), values is output)
        for key, values in seen.items()
    ]


def _choose(layers: list[_Layer], wanted: str | Iterable[str]) -> set[str]:
    """Return the names of the layers to keep.

    A layer of one channel, or the last of the network, is kept only for a pattern, because it drops
    the whole output.
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


def _from_factory(
    name: str, in_channels: int, out_channels: int, settings: Mapping[str, Any] | None
) -> nn.Module:
    try:
        factory = resolve(name)
    except Exception as error:  # Foreign code may fail in any way.
        raise PolysegError(
            f"network.name = {name}: {first_line(error)}; give package.module:factory that "
            "can be imported from here (PYTHONPATH lists where Python looks)"
        ) from error
    core = _call(
        name,
        lambda **given: factory(in_channels=in_channels, out_channels=out_channels, **given),
        settings,
    )
    if not isinstance(core, nn.Module):
        raise PolysegError(f"network.name = {name}: must return a torch.nn.Module")
    return core


def _by_name(
    name: str,
    in_channels: int,
    out_channels: int,
    dropout: float,
    settings: Mapping[str, Any] | None,
) -> tuple[nn.Module, int]:
    try:
        build = NETWORKS.find(name).resolve()
    except ValueError as error:
        raise PolysegError(
            f"network.name: {error}; name your own as package.module:factory"
        ) from error
    if taken := sorted(set(_SET_ELSEWHERE) & (settings or {}).keys()):
        raise PolysegError(
            f"network.kwargs: {', '.join(taken)} cannot be set there; polyseg sets it "
            "(network.dropout is the rate)"
        )
    for key in ("num_res_units", "blocks_down", "blocks_up"):
        counts = (settings or {}).get(key, 0)
        for count in counts if isinstance(counts, list) else [counts]:
            if isinstance(count, int) and count > _MOST_BLOCKS:
                raise PolysegError(f"network.kwargs: {key} {count}: at most {_MOST_BLOCKS}")
    given = functools.partial(build, in_channels, out_channels, dropout)
    built: tuple[nn.Module, int] = _call(name, given, settings)
    return built


def _call(name: str, factory: Callable[..., Any], settings: Mapping[str, Any] | None) -> Any:
    try:
        return factory(**settings or {})
    except PolysegError:
        raise
    except (Exception, SystemExit) as error:  # Foreign code may fail in any way.
        raise PolysegError(f"network.kwargs: {name} refuses them: {first_line(error)}") from error


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a module under all of its names."""
    old = network.get_submodule(name)
    for alias, one in list(network.named_modules(remove_duplicate=False)):
        if one is old:
            network.set_submodule(alias, module)


def _add_dropout_to_segresnet(core: Any, rate: float) -> None:
    """Add dropout to the end of the bottleneck and of each decoder level, as in other networks.

    SegResNet itself has one dropout layer, after its first convolution.
    """
    for level in (core.down_layers[-1], *core.up_layers):
        level.append(nn.Dropout2d(rate))


@dataclass(frozen=True)
class Recipe:
    """The defaults of a small 2D version of one of MONAI's networks."""

    class_name: str
    settings: Mapping[str, Any]
    multiple: Callable[[Mapping[str, Any]], int]
    add_dropout: Callable[[Any, float], None] | None = None
    wants_head: bool = False
    """Whether a 1 x 1 convolution follows, because the network normalises its output, and logits
    could hardly leave [-3, 3]."""

    def __call__(
        self, in_channels: int, out_channels: int, dropout: float, **settings: Any
    ) -> tuple[nn.Module, int]:
        """Return the network, and the number that must divide the sides of its images."""
        from monai.networks import nets

        arguments = {**self.settings, **settings}
        features = arguments["channels"][0] if self.wants_head else out_channels
        rate = {} if self.add_dropout else {"dropout": dropout}
        core = getattr(nets, self.class_name)(
            spatial_dims=2, in_channels=in_channels, out_channels=features, **rate, **arguments
        )
        if self.add_dropout:
            self.add_dropout(core, dropout)
        if self.wants_head:
            core = nn.Sequential(core, nn.Conv2d(features, out_channels, kernel_size=1))
        return core, self.multiple(arguments)


def _product_of_strides(settings: Mapping[str, Any]) -> int:
    return math.prod(settings["strides"])


UNET = Recipe(
    "UNet",
    {"channels": _CHANNELS, "strides": (2, 2, 2, 2), "num_res_units": 2, "norm": "batch"},
    _product_of_strides,
    wants_head=True,
)
BASIC_UNET = Recipe("BasicUNet", {"features": (*_CHANNELS, 16), "norm": "batch"}, lambda _: 16)
ATTENTION_UNET = Recipe(
    "AttentionUnet", {"channels": _CHANNELS, "strides": (2, 2, 2, 2)}, _product_of_strides
)
DYNUNET = Recipe(
    "DynUNet",
    {
        "kernel_size": (3, 3, 3, 3, 3),
        "strides": (1, 2, 2, 2, 2),
        "upsample_kernel_size": (2, 2, 2, 2),
        "filters": _CHANNELS,
        "norm_name": "batch",
    },
    _product_of_strides,
)
SEGRESNET = Recipe(
    "SegResNet",
    {"init_filters": 16, "norm": "batch", "blocks_down": (1, 2, 2, 4)},
    lambda settings: 2 ** (len(settings["blocks_down"]) - 1),
    _add_dropout_to_segresnet,
)

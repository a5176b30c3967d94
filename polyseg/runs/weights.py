"""From a configuration to a network, and from a checkpoint to one with its weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from polyseg.config import Config
from polyseg.errors import PolysegError
from polyseg.networks.networks_by_name import SegmentationNetwork, Window, build_network
from polyseg.runs.checkpoints import Checkpoint


def network_of(checkpoint: Checkpoint, *, trust: bool = False) -> SegmentationNetwork:
    """Build the network of a checkpoint, with its weights.

    Raises:
        PolysegError: the network is code outside polyseg and `trust` does not allow it, or the
            weights do not fit it.
    """
    config = checkpoint.config
    name = config.network.name
    for kind, own in (("network", name), ("uncertainty.metric", config.uncertainty.metric)):
        if ":" in own and not trust:
            raise PolysegError(
                f"checkpoint: its {kind} {own} is code outside polyseg; --trust imports and runs "
                "it, if you know where it is from"
            )
    if ":" not in name:
        # Settings may ask for any size: theirs must be that of the weights before one is made.
        with torch.device("meta"):
            _refuse_misfits(new_network(config, checkpoint.channels), checkpoint.weights)
    network = new_network(config, checkpoint.channels)
    fit_weights(network, checkpoint.weights)
    return network


def new_network(config: Config, channels: int) -> SegmentationNetwork:
    """Build the network of a configuration, with weights from torch's global generator."""
    settings = config.network
    network = build_network(
        settings.name,
        in_channels=channels,
        out_channels=len(config.data.labels),
        dropout=settings.dropout,
        dropout_kind=settings.dropout_kind,
        dropout_layers=settings.dropout_layers,
        multiple_of=settings.multiple_of,
        settings=settings.kwargs,
    )
    if config.data.fit == "tile" and config.data.size is not None:
        size = config.data.size
        square = (size, size) if isinstance(size, int) else size
        network.window = Window(square, config.data.tile_overlap)
    return network


def fit_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a network that must have them all and no others.

    Raises:
        PolysegError: names, shapes or types differ.
    """
    _refuse_misfits(network, weights)
    for name, values in weights.items():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise PolysegError(f"checkpoint: its weights {name} are not finite")
    network.load_state_dict(dict(weights))


def _refuse_misfits(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    expected = network.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys()) + [
        name
        for name, values in expected.items()
        if name in weights
        and (weights[name].shape != values.shape or weights[name].dtype != values.dtype)
    ]
    if wrong:
        raise PolysegError(
            f"checkpoint: {len(wrong)} weights do not fit its own configuration, such as {wrong[0]}"
        )

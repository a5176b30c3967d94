"""Networks from configurations, and with the weights of checkpoints."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from polyseg.config import Config
from polyseg.errors import PolysegError
from polyseg.networks.networks_by_name import build_network
from polyseg.networks.segmentation_network import SegmentationNetwork, SlidingWindow
from polyseg.runs.checkpoints import Checkpoint


def network_of(checkpoint: Checkpoint, *, trust: bool = False) -> SegmentationNetwork:
    """Build the network of a checkpoint, with its weights.

    Code outside polyseg without `trust`, and weights that do not fit, raise PolysegError.
    """
    config = checkpoint.config
    name = config.network.name
    for kind, own in (("network", name), ("uncertainty.metric", config.uncertainty.metric)):
        if ":" in own and not trust:
            raise PolysegError(
                f"checkpoint: its {kind} {own} is code outside polyseg; add --trust to import and "
                "run it, if you trust its author"
            )
    if ":" not in name:
        # Compare shapes before memory is used: untrusted settings may ask for any size.
        with torch.device("meta"):
            _refuse_misfits(new_network(config, checkpoint.channels), checkpoint.weights)
    network = new_network(config, checkpoint.channels)
    fit_weights(network, checkpoint.weights)
    return network


def new_network(config: Config, channels: int) -> SegmentationNetwork:
    """Build the network of a configuration, with random weights from torch's global generator."""
    given = dict(config.network)
    network = build_network(
        given.pop("name"),
        in_channels=channels,
        out_channels=len(config.data.labels),
        settings=given.pop("kwargs"),
        **given,
    )
    size = config.data.size
    if config.data.fit == "tile" and size is not None and size != "auto":
        square = (size, size) if isinstance(size, int) else size
        network.window = SlidingWindow(square, config.data.tile_overlap)
    return network


def fit_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load finite weights into a network with exactly the same names, shapes and types."""
    _refuse_misfits(network, weights)
    for name, values in weights.items():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise PolysegError(f"checkpoint: its weights {name} are not finite")
    network.load_state_dict(dict(weights))


def _refuse_misfits(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    expected, found = (
        {name: (values.shape, values.dtype) for name, values in each.items()}
        for each in (network.state_dict(), weights)
    )
    wrong = sorted({name for name, _ in expected.items() ^ found.items()})
    if wrong:
        raise PolysegError(
            f"checkpoint: {len(wrong)} weights do not fit its configuration, such as {wrong[0]}"
        )

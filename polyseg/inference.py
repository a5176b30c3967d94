"""Running a trained network as it is: no dropout, no gradient, nothing changed by it."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from polyseg.errors import PolysegError
from polyseg.records import Batch


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the best at hand.

    Raises:
        PolysegError: this machine has no such device.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    at_hand = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, here in at_hand.items() if here))
    if not at_hand.get(name, False):
        here = ", ".join(kind for kind, present in at_hand.items() if present)
        raise PolysegError(f"device {name}: is not at hand; this machine has {here}")
    return torch.device(name)


def device_of(network: nn.Module) -> torch.device:
    """Return where the network's weights lie.

    >>> device_of(nn.Linear(1, 1))
    device(type='cpu')
    """
    return next((weights.device for weights in network.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def held_in_mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Hold a network in training or evaluation mode, then give each module its own mode back.

    >>> layer = nn.Dropout(0.5)
    >>> with held_in_mode(layer, training=False):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    modes = [(module, module.training) for module in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


def predict(network: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch with its logits, (B, K, H, W) float32 on the CPU.

    >>> batch = Batch(["a"], torch.zeros(1, 1, 4, 4), None)
    >>> [logits.shape for _, logits in predict(nn.Conv2d(1, 1, 1), [batch])]
    [torch.Size([1, 1, 4, 4])]
    """
    device = device_of(network)
    for batch in batches:
        with held_in_mode(network, training=False), torch.inference_mode():
            logits = network(batch.images.to(device)).float().cpu()
        yield batch, logits

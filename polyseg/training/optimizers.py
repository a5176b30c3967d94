"""Build optimizers, and save them in checkpoints and restore them."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyseg.choices import OPTIMIZERS, SCHEDULERS
from polyseg.config import TrainingConfig
from polyseg.errors import PolysegError


def learning_rate(config: TrainingConfig, epoch: int) -> float:
    """Return the learning rate of an epoch, from 1 to E.

    >>> learning_rate(TrainingConfig(scheduler="constant", learning_rate=0.5), 7)
    0.5
    """
    share: float = SCHEDULERS[config.scheduler].resolve()((epoch - 1) / config.epochs)
    return config.learning_rate * share


def cosine(done: float) -> float:
    """Return a factor that decreases from 1 to 0.01 along a cosine."""
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def polynomial(done: float) -> float:
    """Return (1 - done)^0.9, which decreases from 1 to 0."""
    return math.pow(1 - done, 0.9)


def constant(_: float) -> float:
    """Return 1."""
    return 1.0


def build_optimizer(config: TrainingConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name, for the weights of a network."""
    optimizer: torch.optim.Optimizer = OPTIMIZERS[config.optimizer].resolve()(
        list(network.parameters()), config
    )
    return optimizer


def adamw(weights: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW."""
    return torch.optim.AdamW(weights, fused=_fused(weights), **_settings(config))


def adam(weights: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Return Adam."""
    return torch.optim.Adam(weights, fused=_fused(weights), **_settings(config))


def sgd(weights: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum 0.9."""
    return torch.optim.SGD(weights, momentum=0.9, nesterov=True, **_settings(config))


def _settings(config: TrainingConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "weight_decay": config.weight_decay}


def _fused(weights: list[nn.Parameter]) -> bool | None:
    """Return True if Adam can use torch's fused step, which does not support complex weights.

    The fused SGD fails if a weight gets its first gradient later than others.
    """
    return all(one.is_floating_point() for one in weights) or None


def norm_of_gradients(network: nn.Module) -> Tensor:
    """Return the norm of all gradients, (), which is not finite if one of them is not."""
    gradients = [weights.grad for weights in network.parameters() if weights.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors by "parameter number/name"."""
    return {
        f"{parameter}/{name}": value
        for parameter, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Any, kind: str) -> None:
    """Restore the tensors of an optimizer; `kind` is its name in `OPTIMIZERS`.

    Raises:
        PolysegError: tensors are missing or do not fit.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parameter, _, name = key.partition("/")
        if not parameter.isdecimal():
            raise PolysegError(f"checkpoint: unknown optimizer tensor {key!r:.60}")
        state.setdefault(int(parameter), {})[name] = value
    _refuse_misfits(optimizer, state, OPTIMIZERS[kind].state)
    weights = _weights_of(optimizer)
    for i, held in state.items():
        state[i] = {name: _in_order_of(weights[i], value) for name, value in held.items()}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _refuse_misfits(
    optimizer: torch.optim.Optimizer,
    state: Mapping[int, Mapping[str, Tensor]],
    names: Collection[str],
) -> None:
    """Raise PolysegError if restored tensors differ from those that the optimizer has."""
    parameters = _weights_of(optimizer)
    fits = bool(state) and max(state) < len(parameters)
    # Weights without a gradient have no state.
    for i, held in state.items() if fits else ():
        shapes = {name: () if name == "step" else parameters[i].shape for name in names}
        fits &= {name: value.shape for name, value in held.items()} == shapes
        fits &= all(value.dtype == torch.float32 for value in held.values())
    if not fits:
        raise PolysegError("checkpoint: optimizer tensors are missing or do not fit")


def _weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [one for group in optimizer.param_groups for one in group["params"]]


def _in_order_of(weights: Tensor, value: Tensor) -> Tensor:
    """Return a tensor in the memory order of its weights, which Adam requires."""
    if value.shape != weights.shape:
        return value
    return torch.empty_like(weights, dtype=value.dtype, requires_grad=False).copy_(value)

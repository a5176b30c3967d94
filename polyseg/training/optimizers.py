"""The optimizer of a training: made by the settings, laid down in a checkpoint, taken up again."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyseg.choices import OPTIMIZERS, SCHEDULERS
from polyseg.config import TrainingConfig
from polyseg.errors import PolysegError


def learning_rate(config: TrainingConfig, epoch: int) -> float:
    """Return the learning rate of an epoch, 1 to E, which depends on nothing else.

    >>> learning_rate(TrainingConfig(scheduler="constant", learning_rate=0.5), 7)
    0.5
    """
    share: float = SCHEDULERS[config.scheduler].resolve()((epoch - 1) / config.epochs)
    return config.learning_rate * share


def cosine(done: float) -> float:
    """Return a share that falls from 1 to 0.01 as a cosine."""
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def polynomial(done: float) -> float:
    """Return a share that falls from 1 to 0 as the power 0.9 of the rest."""
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
    """Return whether Adam may take a step in one pass over all weights: it knows no complex ones.

    SGD has it too, but fails where a weight gets its first gradient later than others.
    """
    return all(one.is_floating_point() for one in weights) or None


def norm_of_gradients(network: nn.Module) -> Tensor:
    """Return the norm of all gradients, (); not finite if any is not."""
    gradients = [weights.grad for weights in network.parameters() if weights.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors by "parameter/name"."""
    return {
        f"{parameter}/{name}": value
        for parameter, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Any, kind: str) -> None:
    """Give an optimizer, by its name in `OPTIMIZERS`, the tensors that one of its kind has kept.

    Raises:
        PolysegError: they are missing or do not fit.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parameter, _, name = key.partition("/")
        if not parameter.isdecimal():
            raise PolysegError(f"checkpoint: optimizer tensor {key!r:.60} is none of polyseg's")
        state.setdefault(int(parameter), {})[name] = value
    _refuse_misfits(optimizer, state, OPTIMIZERS[kind].state)
    weights = _weights_of(optimizer)
    for i, held in state.items():
        state[i] = {name: _laid_out_as(weights[i], value) for name, value in held.items()}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _refuse_misfits(
    optimizer: torch.optim.Optimizer,
    state: Mapping[int, Mapping[str, Tensor]],
    names: Collection[str],
) -> None:
    """Raise unless what an optimizer is to take up is what one of its kind has laid down."""
    parameters = _weights_of(optimizer)
    fits = bool(state) and max(state) < len(parameters)
    # What the loss does not reach has no state.
    for i, held in state.items() if fits else ():
        shapes = {name: () if name == "step" else parameters[i].shape for name in names}
        fits &= {name: value.shape for name, value in held.items()} == shapes
        fits &= all(value.dtype == torch.float32 for value in held.values())
    if not fits:
        raise PolysegError("checkpoint: its optimizer's tensors are missing or do not fit")


def _weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [one for group in optimizer.param_groups for one in group["params"]]


def _laid_out_as(weights: Tensor, value: Tensor) -> Tensor:
    """Return what belongs to weights in the order of memory that those have, by which Adam goes."""
    if value.shape != weights.shape:
        return value
    return torch.empty_like(weights, dtype=value.dtype, requires_grad=False).copy_(value)

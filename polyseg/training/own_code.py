"""Check a user's own functions on a small input before a run, and record their sha256."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyseg.adaptive.controller import epsilon_of
from polyseg.choices import score_of
from polyseg.config import LARGEST_EPSILON, Config, least_epsilon
from polyseg.errors import PolysegError, first_line
from polyseg.registry import resolve
from polyseg.system.files import sha256_of_file
from polyseg.training.losses_by_name import build_objective
from polyseg.uncertainty import UncertaintyAccumulator


def check_own_code(config: Config) -> None:
    """Call a user's own loss, difficulty and map with two images of 8 x 8.

    Raises:
        PolysegError: one of them cannot be imported, fails, or returns unusable values.
    """
    checks: dict[str, Callable[[Config], None]] = {
        "loss.name": _check_loss,
        "uncertainty.metric": _check_metric,
        "control.map": _check_map,
    }
    for setting, name in config.own_code.items():
        if setting not in checks or (setting == "control.map" and not config.adaptive):
            continue
        try:
            checks[setting](config)
        except PolysegError as error:
            raise PolysegError(f"{setting} = {name}: {error}") from None
        except Exception as error:  # A user's code may fail in any way.
            raise PolysegError(
                f"{setting} = {name}: fails on a small input: {first_line(error)}"
            ) from error


def recorded_code(config: Config) -> dict[str, Any]:
    """Return the name and the sha256 of the source file of each of the user's own functions."""
    own = config.own_code.items()
    found = {setting: {"name": name, "sha256": _sha256(name)} for setting, name in own}
    return {"own_code": found} if found else {}


def _sha256(name: str) -> str:
    try:
        file = inspect.getsourcefile(inspect.unwrap(resolve(name)))
        return "unknown" if file is None else sha256_of_file(file)
    except (ImportError, AttributeError, TypeError, OSError):
        return "unknown"


def _small_input() -> tuple[Tensor, Tensor]:
    """Return (2, 1, 8, 8) logits and masks, without use of torch's global generator."""
    logits = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 2:5, 2:6] = 1
    return logits, mask


def _check_loss(config: Config) -> None:
    logits, mask = _small_input()
    logits.requires_grad_()
    losses = build_objective(config.loss)(logits, mask, torch.tensor([0.0, 0.5]))
    _refuse(losses, (2,), "one loss per image")
    if not losses.requires_grad:
        raise PolysegError("its losses have no gradient; compute them from the logits")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    if not gradient.isfinite().all():
        raise PolysegError("the gradient of its losses is not finite")


def _check_metric(config: Config) -> None:
    logits, mask = _small_input()
    truth = mask[:, 0] > 0
    record = UncertaintyAccumulator()
    for shift in (-1.0, 0.0, 1.0):
        record.update((logits[:, 0] + shift).sigmoid())
    row = score_of(config.uncertainty.metric)
    given = record.moments if row.of == "moments" else logits[:, 0].sigmoid()
    _refuse(row.resolve()(given, truth), (2,), "one number per image")


def _check_map(config: Config) -> None:
    normalised = np.linspace(-2, 2, 5)
    epsilon = np.asarray(epsilon_of(normalised, config.control), dtype=np.float64)
    _refuse(torch.from_numpy(epsilon), (5,), "one epsilon per image")
    least = least_epsilon(config.loss.polydice_terms or 1)
    if epsilon.min() < least or epsilon.max() > LARGEST_EPSILON:
        raise PolysegError(
            f"its epsilons, {epsilon.min():g} to {epsilon.max():g}, must lie in {least:.4g} to "
            f"{LARGEST_EPSILON}"
        )


def _refuse(found: Any, shape: tuple[int, ...], what: str) -> None:
    given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if given != shape:
        raise PolysegError(f"must return {what}, a tensor of shape {shape}, and returned {given}")
    if not found.isfinite().all():
        raise PolysegError(f"must return {what}, and returned a number that is not finite")

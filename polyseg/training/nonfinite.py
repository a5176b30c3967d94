"""Find steps whose loss or gradients are not finite, and stop training or report them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from polyseg.errors import PolysegError
from polyseg.training.step import Step, Steps

log = logging.getLogger(__name__)

_STEPS_BETWEEN_CHECKS = 16
"""Number of steps between two checks, each of which waits for the GPU and leaves it idle."""


@dataclass(frozen=True)
class FiniteCheck:
    """Checks the steps of an epoch while it runs."""

    steps: Steps
    kept: Path
    """Checkpoint of the last good epoch."""

    def check_sometimes(self, taken: Sequence[Step], epoch: int) -> None:
        """Call `check` after every 16th step."""
        if len(taken) % _STEPS_BETWEEN_CHECKS == 0:
            self.check(taken, epoch)

    def check(self, taken: Sequence[Step], epoch: int) -> None:
        """Raise if a step was not finite, unless such steps are skipped.

        Raises:
            PolysegError: names the first such step and its images; later ones follow from it.
        """
        if self.steps.config.training.on_nonfinite == "skip":
            return
        first = self._first_nonfinite(taken)
        found = [one for one in self.steps.processes.gathered(first) if one]
        if found:
            number, _, what = min(found)
            raise PolysegError(
                f"epoch {epoch}, step {number}: {what}; the last good epoch is kept in "
                f"{self.kept}; try a lower training.learning_rate, or training.on_nonfinite=skip"
            )

    def without_skipped(self, taken: Sequence[Step], epoch: int) -> list[Step]:
        """Return the steps that changed the weights, and log those that were skipped.

        Raises:
            PolysegError: all steps were skipped.
        """
        for number, step in enumerate(taken, start=1):
            if not step.finite:
                what = _what_is_not_finite(step)
                log.warning("epoch %d, step %d is skipped: %s", epoch, number, what)
        changing = [step for step in taken if step.finite]
        if not all(changing or self._is_valid(step) for step in taken):
            raise PolysegError(
                f"epoch {epoch}: no step had finite loss and gradients; the last good epoch is "
                f"kept in {self.kept}; try a lower training.learning_rate"
            )
        return changing

    def _first_nonfinite(self, taken: Sequence[Step]) -> tuple[int, bool, str] | None:
        """Return the number of the first such step, whether its losses are finite, and a text."""
        recent = taken[-_STEPS_BETWEEN_CHECKS:]
        if not recent or bool(torch.stack([step.finite for step in recent]).all()):
            return None
        for number, step in enumerate(taken, start=1):
            if not self._is_valid(step):
                return number, bool(step.losses.isfinite().all()), _what_is_not_finite(step)
        return None

    def _is_valid(self, step: Step) -> bool:
        """Return whether a step was finite, or only reduced the float16 scale of gradients."""
        if step.finite:
            return True
        return self.steps.is_finding_scale and bool(step.losses.isfinite().all())


def _what_is_not_finite(step: Step) -> str:
    of_images = step.losses.isfinite().reshape(len(step.names), -1).all(dim=1).tolist()
    bad = [name for name, good in zip(step.names, of_images, strict=True) if not good]
    if bad:
        return f"the loss of {', '.join(bad)} is not finite"
    return f"the gradients of {', '.join(step.names)} are not finite"

"""Steps whose loss or gradients were not finite: which they are, and what is to be done of it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from polyseg.errors import PolysegError
from polyseg.training.step import Step, Steps

log = logging.getLogger(__name__)

_STEPS_BETWEEN_LOOKS = 16
"""A look at the losses waits for the GPU, which has nothing to do until the next step is sent."""


@dataclass(frozen=True)
class Watch:
    """Looks at the steps of an epoch, of which more and more are taken."""

    steps: Steps
    kept: Path
    """Where the last good epoch is."""

    def glance(self, taken: Sequence[Step], epoch: int) -> None:
        """Look as `look` does, but only once in a while.

        Raises:
            PolysegError: a step was not finite.
        """
        if len(taken) % _STEPS_BETWEEN_LOOKS == 0:
            self.look(taken, epoch)

    def look(self, taken: Sequence[Step], epoch: int) -> None:
        """Refuse to go on from the first step that was not finite: all after it are not either.

        Where such steps are skipped there is none.

        Raises:
            PolysegError: names it and its images.
        """
        if self.steps.config.training.on_nonfinite == "skip":
            return
        first = self._first_unsound(taken)
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
            PolysegError: all were.
        """
        for number, step in enumerate(taken, start=1):
            if not step.finite:
                what = _what_is_not_finite(step)
                log.warning("epoch %d, step %d is skipped: %s", epoch, number, what)
        changing = [step for step in taken if step.finite]
        if not all(changing or self._is_sound(step) for step in taken):
            raise PolysegError(
                f"epoch {epoch}: no step had finite loss and gradients; the last good epoch is "
                f"kept in {self.kept}; try a lower training.learning_rate"
            )
        return changing

    def _first_unsound(self, taken: Sequence[Step]) -> tuple[int, bool, str] | None:
        """Return the first such step, whether only its gradients are, and a sentence."""
        recent = taken[-_STEPS_BETWEEN_LOOKS:]
        if not recent or bool(torch.stack([step.finite for step in recent]).all()):
            return None
        for number, step in enumerate(taken, start=1):
            if not self._is_sound(step):
                return number, bool(step.losses.isfinite().all()), _what_is_not_finite(step)
        return None

    def _is_sound(self, step: Step) -> bool:
        """Return whether a step was taken, or only looked for a scale that float16 can hold."""
        if step.finite:
            return True
        return self.steps.seek_a_scale and bool(step.losses.isfinite().all())


def _what_is_not_finite(step: Step) -> str:
    of_images = step.losses.isfinite().reshape(len(step.names), -1).all(dim=1).tolist()
    bad = [name for name, good in zip(step.names, of_images, strict=True) if not good]
    if bad:
        return f"the loss of {', '.join(bad)} is not finite"
    return f"the gradients of {', '.join(step.names)} are not finite"

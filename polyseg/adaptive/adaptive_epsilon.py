"""Adaptive epsilons for your own training loop."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyseg.adaptive.controller import EpsilonControl
from polyseg.config import ControlConfig, UncertaintyConfig
from polyseg.montecarlo.assessment import assess
from polyseg.records import Assessment, Batch, Difficulties


class AdaptiveEpsilon:
    """The epsilon of each training image, computed from its difficulty (eq. 11 and 12).

    Before the first assessment epsilon is a constant, as in `polyseg train` before E0. `polyseg
    train` assesses after the epochs that `control.assessment_epochs` returns.

    Args:
        control: settings of the computation of epsilon.
        uncertainty: settings of the measurement of difficulties.
        constant: epsilon before the first assessment, `loss.epsilon` in a configuration.
        seed: random seed of the dropout masks, `training.seed` in a configuration.

    Raises:
        ValueError: the difficulty is the training loss, which `assess` cannot measure.

    >>> adaptive = AdaptiveEpsilon(uncertainty=UncertaintyConfig(samples=4))
    >>> adaptive.epsilon(["a", "b"])
    tensor([0., 0.])
    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))
    >>> batch = Batch(["a", "b"], torch.rand(2, 1, 8, 8), torch.ones(2, 1, 8, 8))
    >>> assessment = adaptive.assess(network, [batch], epoch=1)
    >>> adaptive.epsilon(["b"])  # alone in its batch, so in the middle of the range
    tensor([0.3000])
    """

    def __init__(
        self,
        control: ControlConfig = ControlConfig(),  # noqa: B008 - it is frozen
        uncertainty: UncertaintyConfig = UncertaintyConfig(),  # noqa: B008 - it is frozen
        *,
        constant: float = 0.0,
        seed: int = 0,
    ) -> None:
        if uncertainty.metric == "training_loss":
            raise ValueError("only `polyseg train` can use the metric 'training_loss'")
        self.control, self.uncertainty, self.seed = control, uncertainty, seed
        self._rule = EpsilonControl(control, constant)

    def assess(self, network: nn.Module, batches: Iterable[Batch], epoch: int = 0) -> Assessment:
        """Measure the difficulties of all training images, which determine later epsilons.

        Args:
            network: see `polyseg.assess`.
            batches: all training images, without augmentation, each image once; see
                `polyseg.assess`.
            epoch: number of epochs that the network was trained for; the masks depend on it.

        Returns:
            The assessment, for the record.

        Raises:
            PolysegError: see `polyseg.assess`.
        """
        found = assess(network, batches, self.uncertainty, seed=self.seed, epoch=epoch)
        self._replace(Difficulties(epoch, found.ids, found.difficulty), len(found.label_names))
        return found

    def epsilon(self, ids: Sequence[str]) -> Tensor:
        """Return the epsilons of a batch.

        With "batch" statistics they depend on all images of the batch.

        Args:
            ids: ids of all images of the batch, in its order.

        Returns:
            (B,) float32 on the CPU; after an assessment with K > 1 labels, (B, K).

        Raises:
            ValueError: an image was not assessed.
        """
        rule, names = self._rule, [str(identity) for identity in ids]
        if rule.assessment is not None and (lacking := set(names) - set(rule.assessment.ids)):
            raise ValueError(
                f"{sorted(lacking)[0]!r} was not assessed; give `assess` all training images"
            )
        epsilon = torch.from_numpy(rule.epsilon(names)).float()
        return epsilon if rule.labels == 1 else epsilon.reshape(-1, rule.labels)

    def state_dict(self) -> dict[str, Any]:
        """Return the difficulties of the last assessment, for `torch.save`, without settings."""
        found, labels = self._rule.assessment, self._rule.labels
        if found is None:
            return {}
        difficulty = torch.from_numpy(found.difficulty.copy()).reshape(-1, labels)
        return {"epoch": found.epoch, "ids": list(found.ids[::labels]), "difficulty": difficulty}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the difficulties that `state_dict` returned.

        Raises:
            ValueError: ids and difficulties differ in number.
        """
        if not state:
            self._replace(None, labels=1)
            return
        ids, difficulty = state["ids"], state["difficulty"]
        if difficulty.ndim != 2 or len(difficulty) != len(ids):
            raise ValueError(
                f"difficulty {tuple(difficulty.shape)} must be (n, labels) for {len(ids)} ids"
            )
        labels = difficulty.shape[1]
        rows = [identity for identity in ids for _ in range(labels)]
        values = difficulty.double().cpu().numpy().ravel()
        self._replace(Difficulties(state["epoch"], rows, values), labels)

    def _replace(self, found: Difficulties | None, labels: int) -> None:
        self._rule = replace(self._rule, assessment=found, labels=labels)

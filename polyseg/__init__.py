"""polyseg: medical image segmentation with an uncertainty-adaptive loss.

docs/architecture.md lists the packages in the order in which they may import each other. Importing
polyseg imports none of them until one of its functions is used, so that it is instant.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyseg.adaptive.adaptive_epsilon import AdaptiveEpsilon
    from polyseg.curves import polydice1_curve
    from polyseg.difficulty import epsilon_from_difficulty, foreground_mean, normalise
    from polyseg.losses import (
        PolyDice1Loss,
        dice_loss,
        polydice1_loss,
        polydice_loss,
        scale_and_angle,
    )
    from polyseg.montecarlo.assessment import assess, stochastic_layers
    from polyseg.runs import open_model, read_assessment, read_schedule
    from polyseg.uncertainty import (
        UncertaintyAccumulator,
        mutual_information,
        prediction_variance,
        predictive_entropy,
    )

__version__ = "0.1.0"
INTENDED_USE = "For research use only. Not a medical device."

_HOMES = {
    "curves": ("polydice1_curve",),
    "losses": (
        *("PolyDice1Loss", "dice_loss", "polydice1_loss", "polydice_loss"),
        "scale_and_angle",
    ),
    "uncertainty": (
        *("UncertaintyAccumulator", "mutual_information", "prediction_variance"),
        "predictive_entropy",
    ),
    "difficulty": ("epsilon_from_difficulty", "foreground_mean", "normalise"),
    "montecarlo": ("assess", "stochastic_layers"),
    "adaptive.adaptive_epsilon": ("AdaptiveEpsilon",),
    "runs": ("open_model", "read_assessment", "read_schedule"),
}
"""Public names by the module that they are imported from at first use."""

__all__ = [  # noqa: PLE0604 - each is imported at first use
    "INTENDED_USE",
    "__version__",
    *(name for names in _HOMES.values() for name in names),
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"polyseg.{home}"), name)
    raise AttributeError(f"module polyseg has no attribute {name}")

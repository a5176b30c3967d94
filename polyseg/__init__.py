"""polyseg: medical image segmentation with an uncertainty-adaptive loss.

Public functions are imported at their first use, so that `import polyseg` is instant. The packages
are listed in docs/architecture.md in the order in which they may import each other.
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
    from polyseg.montecarlo import assess, stochastic_layers
    from polyseg.runs import open_model, read_assessment, read_schedule
    from polyseg.uncertainty import (
        UncertaintyAccumulator,
        mutual_information,
        prediction_variance,
        predictive_entropy,
    )

__version__ = "0.2.0.dev0"
INTENDED_USE = "For research use only. Not a medical device."

_PUBLIC = {
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
"""Public names by their module."""

__all__ = [  # noqa: PLE0604
    "INTENDED_USE",
    "__version__",
    *(name for names in _PUBLIC.values() for name in names),
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _PUBLIC.items():
        if name in names:
            return getattr(import_module(f"polyseg.{module}"), name)
    raise AttributeError(f"module polyseg has no attribute {name}")

"""What can be chosen by name: a row here is all that the settings, their help and docs need.

Each row names its function as "module:name", so that this module imports none of them.
"""

from dataclasses import dataclass

from polyseg.registry import Registry, Row


@dataclass(frozen=True)
class Loss(Row):
    """A loss; its function makes it from the settings of `loss`.

    The function takes a `LossConfig` and returns a function of (B, 1, H, W) logits and mask and
    (B,) epsilon, which returns (B,) losses.
    """

    parameters: tuple[str, ...] = ()
    """The settings of `loss` that it uses, besides `epsilon`."""
    has_epsilon: bool = False
    """Whether it depends on epsilon, so that epsilon can be adapted."""


_LOSSES = "polyseg.training.losses_by_name"

LOSSES = Registry(
    "loss",
    Loss(
        "polydice1",
        "PolyDice-1, eq. 6",
        f"{_LOSSES}:polydice",
        ("scale", "scale_gradient", "smooth"),
        has_epsilon=True,
    ),
    Loss(
        "polydice",
        "PolyDice of K terms, eq. 5",
        f"{_LOSSES}:polydice",
        ("terms", "scale", "scale_gradient", "smooth"),
        has_epsilon=True,
    ),
    Loss("dice", "Dice loss with squared denominator, eq. 2", f"{_LOSSES}:dice", ("smooth",)),
    Loss("dice_bce", "MONAI's Dice loss plus binary cross-entropy", f"{_LOSSES}:dice_bce"),
    Loss("bce", "binary cross-entropy", f"{_LOSSES}:bce"),
    Loss("tversky", "Tversky loss", f"{_LOSSES}:tversky", ("tversky_alpha", "tversky_beta")),
    Loss("focal", "focal loss", f"{_LOSSES}:focal", ("focal_gamma",)),
    Loss("tvmf", "t-vMF Dice loss", f"{_LOSSES}:tvmf", ("tvmf_concentration", "smooth")),
)

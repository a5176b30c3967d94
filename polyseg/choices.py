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
        "PolyDice-1, eq. 6, adaptive unless control.enabled=false",
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


@dataclass(frozen=True)
class Score(Row):
    """A number that can be the difficulty D of an image: the mean of a pixel map over its region.

    The function makes the pixel map, (...), of what is given in the registry's description.
    """

    unit: str = ""


_UNCERTAINTY = "polyseg.uncertainty"

UNCERTAINTIES = Registry(
    "difficulty score",
    Score(
        "mutual_information",
        "what the passes of MC Dropout disagree on, eq. 10",
        f"{_UNCERTAINTY}:mutual_information_of",
        "nats",
    ),
    Score(
        "entropy",
        "entropy of the mean prediction of the passes, eq. 9",
        f"{_UNCERTAINTY}:entropy_of",
        "nats",
    ),
    Score(
        "variance",
        "variance of the predictions of the passes, eq. 8",
        f"{_UNCERTAINTY}:variance_of",
    ),
)
"""Pixel-wise uncertainties from the passes of MC Dropout: functions of `uncertainty.Moments`."""

FREE_SCORES = Registry(
    "difficulty score",
    Score(
        "deterministic_entropy",
        "entropy of the prediction without dropout; takes no passes",
        f"{_UNCERTAINTY}:binary_entropy",
        "nats",
    ),
    Score("training_loss", "loss of the image in the last epoch of training; takes no passes"),
)
"""Scores without MC Dropout: functions of the prediction without dropout, (...) in [0, 1].

The training itself gives the one that has no function.
"""


def map_names() -> tuple[str, ...]:
    """Return the names of the pixel maps that an assessment can keep.

    >>> map_names()
    ('mean', 'mutual_information', 'entropy', 'variance')
    """
    return ("mean", *UNCERTAINTIES)


_REPLAY = "polyseg.adaptive.replay"

REPLAY_ARMS = Registry(
    "replay arm",
    Row("recorded", "the epsilons as recorded"),
    Row(
        "shuffled",
        "permuted over the images, by one permutation from each assessment to the next",
        f"{_REPLAY}:shuffled",
    ),
    Row("mean", "the mean of each epoch for all images", f"{_REPLAY}:mean"),
    Row(
        "inverted",
        "in each epoch the largest for the image that had the smallest",
        f"{_REPLAY}:inverted",
    ),
)
"""What a replay does with the epsilons of an epoch.

A function takes (images, labels) epsilons and a generator of random numbers, which is the same for
all epochs between two assessments, and returns epsilons of that shape.
"""

DEVICES = {
    "auto": "cuda, mps or cpu, the first that is there",
    "cpu": "the processor",
    "cuda": "an NVIDIA GPU",
    "mps": "an Apple GPU",
}

MODALITIES = {
    "ultrasound": "gray images of a lesion with speckle",
    "endoscopy": "colour images of a lesion with highlights",
}

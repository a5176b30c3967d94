"""Registries of the values that settings choose by name; help and docs list their rows.

Each row names its function as "module:name", because this module imports none of the functions.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Literal

from polyseg.registry import Registry, Row, is_own, resolve


@dataclass(frozen=True)
class Loss(Row):
    """A loss, which the function of the row makes from a `LossConfig`.

    The loss is itself a function: of (B, 1, H, W) logits and mask and (B,) epsilon. It returns
    (B,) losses.
    """

    parameters: tuple[str, ...] = ()
    """The settings of `loss` that the loss uses, besides `epsilon`."""
    has_epsilon: bool = False
    """Whether the loss depends on epsilon, and epsilon can be adapted."""


_LAYOUTS = "polyseg.data.layouts"

LAYOUTS = Registry(
    "layout",
    Row("auto", "the first of the following layouts that fits the folder"),
    Row(
        "manifest",
        "a CSV file with the columns image and mask",
        f"{_LAYOUTS}.manifest:read_manifest_file",
    ),
    Row(
        "nnunet",
        "nnU-Net: imagesTr/, labelsTr/ and dataset.json",
        f"{_LAYOUTS}.nnunet:read_if_nnunet",
    ),
    Row(
        "decathlon",
        "Medical Segmentation Decathlon: a dataset.json that lists the files",
        f"{_LAYOUTS}.nnunet:read_if_decathlon",
    ),
    Row("bids", "BIDS: images in sub-*/ and masks in derivatives/", f"{_LAYOUTS}.bids:read_bids"),
    Row(
        "public-set",
        "a public data set recognised by the paths of its files, such as PH2",
        f"{_LAYOUTS}.public_sets:read_public_set",
    ),
    Row(
        "case-folders",
        "a folder for each image or case, with its masks",
        f"{_LAYOUTS}.case_folders:read_case_folders",
    ),
    Row("folders", "folders of images and of masks", f"{_LAYOUTS}.folders:read_folders"),
    Row(
        "suffixes",
        "masks beside the images, recognised by their names",
        f"{_LAYOUTS}.folders:read_suffixes",
    ),
)
"""Each function takes a `Source` and returns its `Layout`, or None if it does not apply."""

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
        "PolyDice with K terms, eq. 5",
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
    """A score that can be the difficulty D of an image.

    The function takes the arguments that `of` names and returns (B,) numbers, one for each image
    and label. With "pixels" it returns a pixel map, (...), and D is the mean over the region.
    """

    unit: str = ""
    of: Literal["pixels", "moments", "pass", "passes", "mask"] = "pixels"
    """Arguments of the function. "pixels": see the registry; "moments": `uncertainty.Moments`,
    (B, H, W) each, and the mask, (B, H, W) bool; "pass": the probabilities of a pass, (B, H, W),
    and the mask, and D is the mean over the passes; "mask": the numbers of foreground pixels, (B,);
    "passes": a class with the method `update`, for each pass, and the property `value`."""
    needs_mask: bool = False
    """Whether the score is undefined without a mask."""


_UNCERTAINTY = "polyseg.uncertainty"

UNCERTAINTIES = Registry(
    "difficulty score",
    Score(
        "mutual_information",
        "mutual information: disagreement of the passes of MC Dropout, eq. 10",
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

WHOLE_SCORES = Registry(
    "difficulty score",
    Score(
        "dispersion",
        "variance of the passes over the whole image, divided by their mean square",
        f"{_UNCERTAINTY}:dispersion",
        of="moments",
    ),
    Score(
        "expected_error",
        "1 - Dice of each pass against the mask, eq. 2 with smooth 1, averaged over the passes",
        f"{_UNCERTAINTY}:error_of_pass",
        of="pass",
        needs_mask=True,
    ),
)
"""Scores from the passes of MC Dropout over the whole image, for any region."""

PAIR_SCORES = Registry(
    "score of pairs of passes",
    Score(
        "pairwise_dice",
        "1 - Dice of the masks of two passes at 0.5, averaged over all pairs of passes",
        f"{_UNCERTAINTY}:PairwiseDice",
        of="passes",
    ),
)
"""Scores that evaluate and estimate-uncertainty can compute, but training cannot use."""

FREE_SCORES = Registry(
    "difficulty score",
    Score(
        "deterministic_entropy",
        "entropy of the prediction without dropout; needs no passes",
        f"{_UNCERTAINTY}:binary_entropy",
        "nats",
    ),
    Score("training_loss", "loss of the image in the last epoch of training; needs no passes"),
    Score(
        "size",
        "-log(max(foreground pixels of the mask, 1)); needs no passes",
        "polyseg.difficulty:size_difficulty",
        of="mask",
        needs_mask=True,
    ),
)
"""Scores without MC Dropout: functions of the mask, or of the prediction without dropout, (...).

The trainer computes the training loss, which has no function here.
"""


def score_of(name: str) -> Score:
    """Return the registry row of a score, or a new row for a user's own function.

    >>> score_of("dispersion").of
    'moments'
    """
    rows: dict[str, Score] = {**UNCERTAINTIES, **WHOLE_SCORES, **PAIR_SCORES, **FREE_SCORES}
    if name in rows or not is_own(name):
        return rows[name]
    # A user's function takes (moments, mask), or (probability, mask) of each pass.
    first = next(iter(signature(resolve(name)).parameters), "")
    of: Literal["pass", "moments"] = "pass" if first == "probability" else "moments"
    return Score(name, "your own function", name, of=of, needs_mask=of == "pass")


def loss_of(name: str) -> Loss:
    """Return the registry row of a loss, or a new row for a user's own function of epsilon.

    >>> loss_of("my_loss.py:loss").has_epsilon
    True
    """
    own = Loss(name, "your own function", name, has_epsilon=True)
    return LOSSES.get(name, own) if is_own(name) else LOSSES[name]


def map_of(name: str) -> Row:
    """Return the registry row of a map to epsilon, or a new row for a user's own function."""
    own = Row(name, "your own function", name)
    return MAPS.get(name, own) if is_own(name) else MAPS[name]


def score_names() -> tuple[str, ...]:
    """Return the names of all scores, in the order in which they are listed."""
    return (*UNCERTAINTIES, *WHOLE_SCORES, *PAIR_SCORES, *FREE_SCORES)


def image_scores() -> dict[str, str]:
    """Return the help of each whole-image score that can be computed in addition to D.

    >>> image_scores()["size"]
    '-log(max(foreground pixels of the mask, 1)); needs no passes'
    """
    rows = (*WHOLE_SCORES.values(), *PAIR_SCORES.values(), *FREE_SCORES.values())
    return {row.name: row.help for row in rows if row.of != "pixels"}


def map_names() -> tuple[str, ...]:
    """Return the names of the pixel maps that an assessment can keep.

    >>> map_names()[0]
    'mean'
    """
    return ("mean", *UNCERTAINTIES)


_DIFFICULTY = "polyseg.difficulty"


@dataclass(frozen=True)
class Reduction(Row):
    """A normalisation of difficulties."""

    statistics: str = "D_pct and sigma"
    """The numbers of the images normalised together that it uses, in words."""


REDUCTIONS = Registry(
    "reduction",
    Reduction("sigma", "(D - D_pct) / (sigma_D + delta), eq. 11", f"{_DIFFICULTY}:normalise_by"),
    Reduction(
        "rank",
        "normal score of the rank, Phi^-1((rank - 1/2) / n), average ranks for ties",
        f"{_DIFFICULTY}:normalise_by_rank",
        "ranks",
    ),
)
"""Normalisations of difficulties.

Each function takes the (n,) difficulties of the images normalised together, D_pct, sigma_D and
delta, and returns the (n,) normalised difficulties.
"""

MAPS = Registry(
    "map",
    Row(
        "sigmoid",
        "epsilon_min + (epsilon_max - epsilon_min) sigmoid(lambda D_norm), eq. 12",
        f"{_DIFFICULTY}:epsilon_from_difficulty",
    ),
    Row(
        "weight",
        "(c exp(lambda D_norm) - 1) / 2, clipped to the range; c makes the weights 1 + 2 epsilon "
        "of the images that are normalised together average 1",
        f"{_DIFFICULTY}:epsilon_from_weight",
    ),
)
"""Maps from normalised difficulties to epsilons.

Each function takes the (n,) normalised difficulties of the images normalised together, epsilon_min,
epsilon_max and the sensitivity, and returns (n,) epsilons.
"""


@dataclass(frozen=True)
class Arm(Row):
    """A control arm of a recorded run."""

    of_difficulty: bool = False
    """Whether the arm changes D; epsilons are then recomputed from D in the run's batches."""


_REPLAY = "polyseg.adaptive.replay"

REPLAY_ARMS = Registry(
    "replay arm",
    Arm("recorded", "as recorded"),
    Arm(
        "shuffled",
        "that of another image, drawn anew after each assessment",
        f"{_REPLAY}:shuffled",
    ),
    Arm("mean", "the mean of the epoch", f"{_REPLAY}:mean"),
    Arm(
        "inverted",
        "in reverse order: the largest for the image that had the smallest",
        f"{_REPLAY}:inverted",
    ),
    Arm(
        "permuted",
        "computed from D of another image, drawn once for the whole run",
        f"{_REPLAY}:permuted",
        of_difficulty=True,
    ),
    Arm(
        "size",
        "computed with D = -log(max(foreground pixels of the mask, 1))",
        f"{_REPLAY}:by_size",
        of_difficulty=True,
    ),
    Arm(
        "loss",
        "computed with D = recorded training loss",
        f"{_REPLAY}:by_loss",
        of_difficulty=True,
    ),
)
"""Ways to assign epsilons to the images of a replay.

A function of epsilons takes those of an epoch, (images, labels), and a random generator, the same
for all epochs between two assessments, and returns epsilons of that shape. A function of D takes an
assessment and a random generator, the same for all assessments, and returns the (n,) difficulties
that replace the recorded ones.
"""


@dataclass(frozen=True)
class Preset(Row):
    """A named group of settings."""

    settings: tuple[str, ...] = ()
    """Settings, each as "section.name=value"."""


PRESETS = Registry(
    "preset",
    Preset(
        "thesis",
        "the method of the thesis, see docs/method.md; stays the same if defaults change",
        settings=(
            "loss.name=polydice1",
            "loss.epsilon=0.0",
            "loss.scale=norms",
            "loss.scale_gradient=guarded",
            "loss.smooth=1.0e-6",
            "loss.bce_weight=0.0",
            "uncertainty.samples=20",
            "uncertainty.metric=mutual_information",
            "uncertainty.region=mask",
            "uncertainty.masks=consistent",
            "control.enabled=auto",
            "control.start=0.2",
            "control.every=5",
            "control.statistics=batch",
            "control.reduction=sigma",
            "control.percentile=50.0",
            "control.delta=1.0e-9",
            "control.map=sigmoid",
            "control.sensitivity=1.0",
            "control.epsilon_min=-0.4",
            "control.epsilon_max=1.0",
        ),
    ),
)

DEVICES = {
    "auto": "the first available of cuda, mps and cpu",
    "cpu": "the CPU",
    "cuda": "an NVIDIA GPU",
    "mps": "an Apple GPU",
}

MODALITIES = {
    "ultrasound": "gray images of a lesion with speckle",
    "endoscopy": "colour images of a lesion with highlights",
}

DROPOUT_KINDS = Registry(
    "kind of dropout",
    Row("channel", "whole feature maps", "torch.nn:Dropout2d"),
    Row("element", "single values", "torch.nn:Dropout"),
)
"""Each function is a layer that takes its rate, and is also a row of `networks.dropout`."""

_NETWORKS = "polyseg.networks.networks_by_name"

NETWORKS = Registry(
    "network",
    Row("unet", "MONAI's UNet with residual units", f"{_NETWORKS}:UNET"),
    Row("basic-unet", "MONAI's BasicUNet", f"{_NETWORKS}:BASIC_UNET"),
    Row("attention-unet", "MONAI's AttentionUnet", f"{_NETWORKS}:ATTENTION_UNET"),
    Row("dynunet", "MONAI's DynUNet, as in nnU-Net", f"{_NETWORKS}:DYNUNET"),
    Row("segresnet", "MONAI's SegResNet", f"{_NETWORKS}:SEGRESNET"),
)
"""Functions of in_channels, out_channels, the dropout rate and further arguments.

They return the network, and a number that must divide the height and width of its images.
"""


@dataclass(frozen=True)
class Optimizer(Row):
    """An optimizer; its function makes it from a list of weights and the settings of `training`."""

    state: tuple[str, ...] = ()
    """Names of the tensors that it stores for each weight in a checkpoint."""


_OPTIMIZERS = "polyseg.training.optimizers"
_OF_ADAM = ("step", "exp_avg", "exp_avg_sq")

OPTIMIZERS = Registry(
    "optimizer",
    Optimizer("adamw", "Adam with decoupled weight decay", f"{_OPTIMIZERS}:adamw", _OF_ADAM),
    Optimizer("adam", "Adam, with weight decay in the gradient", f"{_OPTIMIZERS}:adam", _OF_ADAM),
    Optimizer(
        "sgd",
        "gradient descent with Nesterov momentum 0.9",
        f"{_OPTIMIZERS}:sgd",
        ("momentum_buffer",),
    ),
)

SCHEDULERS = Registry(
    "scheduler",
    Row("cosine", "decreases to 1 % along a cosine", f"{_OPTIMIZERS}:cosine"),
    Row(
        "polynomial",
        "decreases to 0 as (1 - e/E)^0.9 after e of E epochs",
        f"{_OPTIMIZERS}:polynomial",
    ),
    Row("constant", "stays the same", f"{_OPTIMIZERS}:constant"),
)
"""Functions of the share of finished epochs that return the factor of the learning rate."""


@dataclass(frozen=True)
class Normalisation(Row):
    """A normalisation of the values of images.

    Its function takes an image, (H, W, C), and the settings of `data`, and returns its `Levels`.
    """

    pooled: bool = False
    """Whether mean and standard deviation are those of all training images together."""


_PREPROCESSING = "polyseg.data.preprocessing"

NORMALISATIONS = Registry(
    "normalisation",
    Normalisation(
        "zscore",
        "mean 0 and standard deviation 1 per image and channel",
        f"{_PREPROCESSING}:mean_and_deviation",
    ),
    Normalisation(
        "unit", "scale the range of the pixel type to [0, 1]", f"{_PREPROCESSING}:full_range"
    ),
    Normalisation(
        "percentile",
        "scale the 1st and 99th percentile of the image to [0, 1], clipped",
        f"{_PREPROCESSING}:percentiles",
    ),
    Normalisation(
        "dataset",
        "mean 0 and standard deviation 1 over all training images",
        f"{_PREPROCESSING}:mean_and_deviation",
        pooled=True,
    ),
    Normalisation("window", "scale data.window to [0, 1], clipped", f"{_PREPROCESSING}:window"),
)


@dataclass(frozen=True)
class Region(Row):
    """A choice of the pixels over which the difficulty of an image is averaged.

    Its function takes mask and prediction, (B, H, W) bool, and the width of a band in pixels, and
    returns regions of that shape: the requested one, then those that replace an empty one.
    """

    of_mask: bool = False
    """Whether the region follows from the mask alone, unless it is empty."""


_REGIONS = "polyseg.montecarlo.regions"

REGIONS = Registry(
    "region",
    Region("mask", "foreground of the mask", f"{_REGIONS}:of_mask", of_mask=True),
    Region(
        "prediction", "pixels with a mean prediction of at least 0.5", f"{_REGIONS}:of_prediction"
    ),
    Region("union", "pixels of mask or prediction", f"{_REGIONS}:of_union"),
    Region(
        "boundary",
        "band on both sides of the edge of the mask",
        f"{_REGIONS}:of_boundary",
        of_mask=True,
    ),
    Region("image", "all pixels", f"{_REGIONS}:of_image"),
)

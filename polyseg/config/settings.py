"""Declare every setting with its default, unit, bounds and meaning."""

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self
from unicodedata import category

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator
from pydantic_core import core_schema

from polyseg import choices
from polyseg.config.label_values import LARGEST_LABEL, name_of, parse_values
from polyseg.registry import Registry, is_own, listed, not_among
from polyseg.system.yaml import dump_yaml, parts

_LARGEST_SIDE = 8192
_LARGEST_ARGUMENT = 4096
_LONGEST_ARGUMENT = 16
_LONGEST_PATTERN = 200
_MOST_LABELS = 32
_CONTROL_CATEGORIES = {"Cc", "Cs"}
"""Unicode categories of control characters and surrogates, which no setting may contain."""
_TASK_NAME = re.compile(r"[\w+()-][\w +().-]{0,63}")

_OR_OWN = "or your own function, as package.module:function or file.py:function"

MOST_SAMPLES = 10_000
LARGEST_EPSILON = 100


def _setting(
    default: Any,
    description: str,
    unit: str = "",
    choices: Mapping[str, str] | None = None,
    **bounds: Any,
) -> Any:
    """Return a field with its description, unit, bounds and the meaning of each choice."""
    extra: Any = {"unit": unit, "choices": dict(choices or {})}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


class OneOf:
    """Validator of a setting whose value is a name of the given registries.

    With `own`, a user's function is allowed too: "package.module:function" or "file.py:function".
    """

    def __init__(self, *registries: Registry[Any], own: bool = False) -> None:
        self.registries, self.own = registries, own

    def choices(self) -> dict[str, str]:
        """Return the meaning of each allowed name."""
        return {name: text for one in self.registries for name, text in one.choices().items()}

    def check(self, value: str) -> str:
        """Return the name if it is allowed, or raise ValueError with the nearest allowed one."""
        if value not in self.choices() and not (self.own and is_own(value)):
            also = "; your own function is package.module:function" if self.own else ""
            raise ValueError(not_among(value, self.choices(), self.registries[0].kind) + also)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        names = {"enum": list(self.choices())}
        return handler(schema) | ({"anyOf": [names, {"pattern": ":"}]} if self.own else names)


class Section(BaseModel):
    """A section of the configuration, frozen and strict."""

    # Strict: neither true nor "10" is accepted as a number, nor 1 or "yes" as true.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, strict=True
    )

    @field_validator("*")
    @classmethod
    def _refuse_control_characters(cls, value: Any) -> Any:
        """Refuse control characters: names and paths reach the system, YAML and error messages."""
        for part in parts(value):
            if isinstance(part, str) and any(category(one) in _CONTROL_CATEGORIES for one in part):
                raise ValueError(f"{part!a:.60} contains a control character or invalid Unicode")
        return value


Side = Annotated[int, Field(ge=16, le=_LARGEST_SIDE)]
_FROM_A_LIST = Strict(False)
"""Marker that lets a tuple be written as a list; its elements stay strict."""
Names = str | Annotated[tuple[str, ...], _FROM_A_LIST] | None
LabelValue = int | str
LabelValues = LabelValue | Annotated[tuple[LabelValue, ...], _FROM_A_LIST]
Foreground = (
    LabelValue | Annotated[tuple[LabelValues, ...], _FROM_A_LIST] | dict[str, LabelValues] | None
)


class AugmentConfig(Section):
    """Strength of each augmentation; null takes it from the preset `data.augmentation`."""

    flip: float | None = _setting(None, "probability of a flip along each axis", ge=0, le=1)
    rotation: float | None = _setting(None, "largest rotation", "degrees", ge=0, le=180)
    scale: float | None = _setting(None, "largest relative change of size", ge=0, le=0.9)
    shift: float | None = _setting(None, "largest shift, as a share of a side", ge=0, le=0.5)
    elastic: float | None = _setting(
        None,
        "largest standard deviation of elastic deformation: nodes 1/8 of a side apart move by a "
        "Gaussian of this share of their distance",
        ge=0,
        le=0.5,
    )
    intensity: float | None = _setting(
        None, "largest change of gain and offset, in units of the normalised image", ge=0, le=2
    )
    gamma: float | None = _setting(
        None, "g of the range of gamma, from 1 / (1 + g) to 1 + g", ge=0, le=4
    )
    blur: float | None = _setting(None, "largest sigma of Gaussian blur", "pixels", ge=0, le=20)
    noise: float | None = _setting(
        None,
        "largest standard deviation of Gaussian noise, in units of the normalised image",
        ge=0,
        le=2,
    )


class DataConfig(Section):
    """Images and masks, their split and their preprocessing."""

    path: str = _setting(
        "demo", "folder of a data set, CSV manifest, or 'demo' for generated phantoms"
    )
    layout: Annotated[str, OneOf(choices.LAYOUTS)] = _setting(
        "auto", "arrangement of image and mask files in the folder"
    )
    images: Names = _setting(
        None,
        "folder of the images (its name, or its path in the data set), a pattern such as *.png, or "
        "a list of these; null: found by the layout",
    )
    masks: Names = _setting(
        None,
        "folder or pattern of the masks, as for data.images; with a list, the masks of one image "
        "are united",
    )
    unmasked: Literal["refuse", "empty", "skip"] = _setting(
        "refuse",
        "treatment of images without a mask",
        choices={
            "refuse": "stop with an error",
            "empty": "use an empty mask",
            "skip": "leave the image out",
        },
    )
    plane: Literal["axial", "coronal", "sagittal"] = _setting(
        "axial",
        "plane in which NIfTI volumes are sliced",
        choices={
            "axial": "slices across the axis from foot to head",
            "coronal": "slices across the axis from back to front",
            "sagittal": "slices across the axis from left to right",
        },
    )
    orientation: Literal["auto", "tag", "stored"] = _setting(
        "auto",
        "whether images are rotated as their orientation tag (EXIF, TIFF) says",
        choices={
            "auto": "rotate; stop with an error if image and mask have different tags and their "
            "sizes do not show which is right",
            "tag": "rotate images and masks by their own tags",
            "stored": "use images and masks as stored",
        },
    )
    channels: Literal["auto", "gray"] = _setting(
        "auto",
        "channels of the images",
        choices={
            "auto": "as in the files; gray images among RGB ones become RGB",
            "gray": "one channel: RGB is converted by the luma weights 0.299, 0.587, 0.114, other "
            "channels are averaged",
        },
    )
    training_slices: Literal["all", "foreground"] = _setting(
        "all",
        "images and slices used for training",
        choices={"all": "all of them", "foreground": "only those with foreground"},
    )
    size: Side | Annotated[tuple[Side, Side], _FROM_A_LIST] | Literal["auto"] | None = _setting(
        "auto",
        "size of the network's input: one number for a square, or [height, width]; auto: the "
        "median size of the images, reduced to sides of at most 256 that are multiples of 16 (128 "
        "for the demo), which the run records; null: the size of each image",
        "pixels",
    )
    fit: Literal["resize", "tile"] = _setting(
        "resize",
        "how images are fitted to data.size",
        choices={
            "resize": "resize each image",
            "tile": "train on patches cut from the images, and predict in overlapping windows",
        },
    )
    tile_overlap: float = _setting(
        0.25, "overlap of neighbouring windows, as a share", ge=0, le=0.75
    )
    tile_foreground: float = _setting(
        0.5, "share of the training patches that are centred on foreground", ge=0, le=1
    )
    split: Annotated[tuple[float, float, float], _FROM_A_LIST] = _setting(
        (0.7, 0.15, 0.15), "shares of training, validation and test images, unless a split is given"
    )
    split_seed: int = _setting(0, "random seed of the split, independent of training.seed", ge=0)
    stratify: bool = _setting(
        True, "distribute small and large foregrounds evenly over the parts of the split"
    )
    folds: int = _setting(5, "number of cross-validation folds", ge=2, le=1000)
    fold: int | None = _setting(
        None,
        "fold used for testing, from 0 (for validation if the data set has a test set); null: "
        "no cross-validation",
        ge=0,
    )
    split_file: str | None = _setting(
        None,
        "split to use: split.json of a run or of `polyseg data split`, or nnU-Net's "
        "splits_final.json; null: a new split",
    )
    group: str | None = _setting(
        "auto",
        "images that stay together in a split; auto: those of one patient, recognised by a folder "
        "per patient or by the first number in names with several numbers; none: every image by "
        "itself; or a regular expression: images in whose id it finds the same text",
    )
    duplicates: Literal["refuse", "allow-near", "allow"] = _setting(
        "refuse",
        "treatment of equal or nearly equal images in different parts of a split",
        choices={
            "refuse": "stop with an error",
            "allow-near": "stop with an error only if they are equal",
            "allow": "allow them",
        },
    )
    foreground: Foreground = _setting(
        None,
        "label values of the foreground: a number, a range such as 1-300, nonzero, or a colour "
        "such as '#FF0000'; for several labels a list or a mapping of names to values, where an "
        "inner list unites values; null: masks are 0/1 or 0/255",
    )
    normalise: Annotated[str, OneOf(choices.NORMALISATIONS)] = _setting(
        "zscore", "how the values of an image are normalised"
    )
    window: Annotated[tuple[float, float], _FROM_A_LIST] = _setting(
        (-160.0, 240.0),
        "lowest and highest value for data.normalise window, in units of the image, such as "
        "Hounsfield units",
    )
    augmentation: Literal["none", "light", "medium", "strong"] = _setting(
        "light",
        "preset of random changes to the training images",
        choices={
            "none": "no changes",
            "light": "flips; small changes of rotation, scale, shift, intensity, gamma and noise",
            "medium": "larger changes, and elastic deformation and blur",
            "strong": "the changes of medium, larger",
        },
    )
    memory: int = _setting(
        2048,
        "largest size of decoded images kept in memory; larger sets go to a file in data.cache",
        "MB",
        ge=0,
        le=10_000_000,
    )
    cache: str | None = _setting(
        None, "folder for decoded images; null: .cache/polyseg in the home folder"
    )
    demo_images: int = _setting(160, "number of phantoms in the demo data", ge=8, le=100_000)
    demo_modality: Literal["ultrasound", "endoscopy"] = _setting(
        "ultrasound", "imaging modality of the phantoms", choices=choices.MODALITIES
    )
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6 or self.split[0] == 0:
            raise ValueError(
                f"data.split {list(self.split)}: give three shares with sum 1, the first above 0"
            )
        if self.fold is not None and self.fold >= self.folds and self.split_file is None:
            raise ValueError(
                f"data.fold {self.fold}: the last of data.folds {self.folds} is {self.folds - 1}"
            )
        if self.window[0] >= self.window[1]:
            raise ValueError(f"data.window {list(self.window)}: the first must be the lower")
        if self.fit == "tile" and self.size is None:
            raise ValueError("data.fit tile needs a data.size")
        if len(self.group or "") > _LONGEST_PATTERN:
            raise ValueError(
                f"data.group: a pattern may have at most {_LONGEST_PATTERN} characters"
            )
        try:
            re.compile(self.group or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"data.group {self.group!r}: not a regular expression: {error}"
            ) from None
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.foreground is None:
            return self
        given = self.foreground if isinstance(self.foreground, tuple | dict) else (1,)
        if not all(self.tasks.values()) or not self.tasks:
            raise ValueError("data.foreground: a label has no value; give it at least one")
        if len({frozenset(task) for task in self.tasks.values()}) != len(given):
            raise ValueError("data.foreground: two labels have the same values")
        if len(self.tasks) > _MOST_LABELS:
            raise ValueError(
                f"data.foreground: {len(self.tasks)} labels; at most {_MOST_LABELS}. For one label "
                "of many values give a range such as 1-300, or nonzero"
            )
        # File names contain these names.
        if not all(_TASK_NAME.fullmatch(name) for name in self.tasks):
            raise ValueError(
                "data.foreground: a name has at most 64 letters, digits, spaces and _ + - ( ) . "
                "and does not begin with a dot or a space"
            )
        return self

    @property
    def group_pattern(self) -> str | None:
        """The regular expression of `group`, or None if it is "auto" or "none"."""
        return None if self.group in (None, "auto", "none") else self.group

    @property
    def tasks(self) -> dict[str, tuple[int, ...]]:
        """The values of each label by its name; empty if masks are 0/1 or 0/255.

        >>> DataConfig(foreground=(1, (2, 3))).tasks
        {'1': (1,), '2+3': (2, 3)}
        """
        given = self.foreground
        if given is None:
            return {}
        if not isinstance(given, dict):
            several = given if isinstance(given, tuple) else (given,)
            given = {name_of(_as_tuple(one)): one for one in several}
        return {
            name: tuple(dict.fromkeys(n for entry in _as_tuple(one) for n in parse_values(entry)))
            for name, one in given.items()
        }

    def written(self, binary: int) -> dict[str, int]:
        """Return the value that each label has in predicted masks: the first of its values.

        Args:
            binary: the value of a single label whose first value is 0, nonzero or a colour; the
                values of several such labels are 1, 2, ...

        >>> [DataConfig(foreground=one).written(255) for one in ((2, 7), "nonzero")]
        [{'2': 2, '7': 7}, {'nonzero': 255}]
        """
        first = {name: values[0] for name, values in (self.tasks or {"": (binary,)}).items()}
        if all(1 <= value <= LARGEST_LABEL for value in first.values()):
            return first
        numbers = [binary] if len(first) == 1 else range(1, len(first) + 1)
        return dict(zip(first, numbers, strict=True))

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the network's output channels; "" for a single one.

        >>> DataConfig(foreground=3).labels, DataConfig(foreground={"liver": 1, "tumour": 2}).labels
        (('',), ('liver', 'tumour'))
        """
        return tuple(self.tasks) if len(self.tasks) > 1 else ("",)


class NetworkConfig(Section):
    """The network and its dropout."""

    name: Annotated[str, OneOf(choices.NETWORKS, own=True)] = _setting(
        "unet", "network by name, or your own factory as package.module:factory"
    )
    dropout: float = _setting(0.2, "dropout rate; 0: no dropout", ge=0, lt=1)
    dropout_kind: Annotated[str, OneOf(choices.DROPOUT_KINDS)] = _setting(
        "channel", "values that dropout sets to zero together"
    )
    dropout_layers: str | Annotated[tuple[str, ...], _FROM_A_LIST] = _setting(
        "auto",
        "active dropout layers: decoder (from the bottleneck on), bottleneck, all, or patterns of "
        "layer names; auto: decoder, or all for your own network",
    )
    multiple_of: int = _setting(
        32,
        "pad images to a multiple of this for your own network (the others know theirs)",
        "pixels",
        ge=1,
        le=512,
    )
    kwargs: dict[str, Any] = _setting({}, "further arguments of the network, by name")

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        """Refuse unusual arguments, because a checkpoint contains them and may be from anyone."""
        try:
            plain = json.loads(json.dumps(self.kwargs, allow_nan=False)) == self.kwargs
        except (TypeError, ValueError, OverflowError, RecursionError):
            plain = False
        if not plain:
            raise ValueError("network.kwargs: only numbers, text, and lists and mappings of them")
        for value in parts(self.kwargs):
            if isinstance(value, int | float) and abs(value) > _LARGEST_ARGUMENT:
                raise ValueError(f"network.kwargs: {value:g} is above {_LARGEST_ARGUMENT}")
            if not isinstance(value, list):
                continue
            if len(value) > _LONGEST_ARGUMENT:
                raise ValueError(f"network.kwargs: a list of over {_LONGEST_ARGUMENT} entries")
            # Lists such as channels or strides; those of a user's factory can mean anything.
            if ":" not in self.name and any(type(one) is int and one < 1 for one in value):
                raise ValueError(f"network.kwargs: {value!r:.60} has numbers below 1")
        return self


class LossConfig(Section):
    """The loss."""

    name: Annotated[str, OneOf(choices.LOSSES, own=True)] = _setting(
        "polydice1", f"loss by name, {_OR_OWN}, of (logits, mask, epsilon)"
    )
    epsilon: float = _setting(
        0.0,
        "epsilon of all images before the first assessment, or in the whole training if epsilon is "
        "not adapted",
        ge=-0.5,
        le=100,
    )
    terms: int = _setting(3, "number K of terms of the loss polydice", ge=1, le=10)
    scale: Literal["norms", "printed"] = _setting(
        "norms",
        "formula of the scale s in eq. 3",
        choices={"norms": "2ab/(a^2+b^2)", "printed": "2q/(a^2+b^2), as printed in the thesis"},
    )
    scale_gradient: Literal["guarded", "full", "detached"] = _setting(
        "guarded",
        "images for which s is constant in the backward pass",
        choices={"guarded": "those whose loss rises with s", "full": "none", "detached": "all"},
    )
    smooth: float = _setting(
        1e-6, "smoothing, added to numerators and denominators", ge=1e-9, le=1e6
    )
    bce_weight: float = _setting(
        0.0, "weight of binary cross-entropy added to the loss", ge=0, le=1000
    )
    tversky_alpha: float = _setting(0.3, "weight of false positives in tversky", ge=0, le=1)
    tversky_beta: float = _setting(0.7, "weight of false negatives in tversky", ge=0, le=1)
    focal_gamma: float = _setting(2.0, "focusing exponent of focal", ge=0, le=10)
    tvmf_concentration: float = _setting(32.0, "concentration of tvmf", ge=0, le=10_000)

    @property
    def has_epsilon(self) -> bool:
        """Whether the loss depends on epsilon."""
        return choices.loss_of(self.name).has_epsilon

    @property
    def polydice_terms(self) -> int:
        """K of the PolyDice losses, 0 of others."""
        return {"polydice1": 1, "polydice": self.terms}.get(self.name, 0)


class UncertaintyConfig(Section):
    """MC Dropout and the difficulty D."""

    samples: Annotated[int, Field(ge=2, le=MOST_SAMPLES)] | Literal["auto"] = _setting(
        20,
        f"number N of passes in an assessment, 2 to {MOST_SAMPLES:,}; auto: the fewest that reach "
        "uncertainty.rank_target",
        "passes",
    )
    rank_target: float = _setting(
        0.95,
        "with uncertainty.samples auto: rank correlation that D should have with D of infinitely "
        "many passes",
        gt=0.5,
        lt=1,
    )
    metric: Annotated[
        str, OneOf(choices.UNCERTAINTIES, choices.WHOLE_SCORES, choices.FREE_SCORES, own=True)
    ] = _setting(
        "mutual_information",
        "difficulty D: the mean of a pixel map over uncertainty.region, or a score of the whole "
        f"image, {_OR_OWN}, of (moments, mask), or of (probability, mask) for each pass",
    )
    region: Annotated[str, OneOf(choices.REGIONS)] = _setting(
        "mask", "pixels over which D is averaged; if there are none, those of the prediction"
    )
    boundary_width: int = _setting(
        3, "half width of the band of uncertainty.region boundary", "pixels", ge=1, le=64
    )
    masks: Literal["consistent", "independent"] = _setting(
        "consistent",
        "dropout masks of the images in a pass",
        choices={
            "consistent": "the same for all images",
            "independent": "different for each image",
        },
    )
    program: Literal["auto", "plain"] = _setting(
        "auto",
        "how the passes are computed",
        choices={
            "auto": "compute parts that do not depend on dropout once for all passes, if that "
            "saves time",
            "plain": "run the whole network in each pass",
        },
    )
    precision: Literal["fp32", "bf16"] = _setting(
        "fp32",
        "precision of the network in the passes; scores are always float32 or wider",
        choices={
            "fp32": "float32",
            "bf16": "bfloat16, faster on GPUs and CPUs that support it; its rounding changes D by "
            "about a thousandth",
        },
    )
    save_maps: bool = _setting(False, "save the pixel maps in the assessment files")

    @field_validator("metric", mode="before")
    @classmethod
    def _refuse_pairs(cls, value: Any) -> Any:
        if isinstance(value, str) and value in choices.PAIR_SCORES:
            raise ValueError(
                f"{value} compares all pairs of passes and cannot be the difficulty in training; "
                f"`polyseg evaluate` and `polyseg estimate-uncertainty --score {value}` compute it"
            )
        return value

    @property
    def takes_passes(self) -> bool:
        """Whether the difficulty comes from MC Dropout."""
        return self.metric not in choices.FREE_SCORES


class ControlConfig(Section):
    """How the difficulty of an image determines its epsilon."""

    enabled: bool | Literal["auto"] = _setting(
        "auto", "adapt epsilon to the difficulty; auto: if the loss has an epsilon"
    )
    start: float = _setting(
        0.2, "epoch E0 of the first assessment; below 1: a share of training.epochs", "epochs", ge=0
    )
    every: int = _setting(5, "number tau of epochs between assessments", "epochs", ge=1)
    reduction: Annotated[str, OneOf(choices.REDUCTIONS)] = _setting(
        "sigma", "how difficulties are normalised, D to D_norm"
    )
    percentile: float = _setting(
        50.0, "pct of eq. 11: percentile of D that is subtracted", "percent", ge=0, le=100
    )
    map: Annotated[str, OneOf(choices.MAPS, own=True)] = _setting(
        "sigmoid",
        f"how epsilon is computed from D_norm: by name, {_OR_OWN}, of (normalised, epsilon_min, "
        "epsilon_max, sensitivity)",
    )
    sensitivity: float = _setting(
        1.0, "lambda of eq. 12: how strongly epsilon depends on D_norm", ge=0, le=1000
    )
    epsilon_min: float = _setting(
        -0.4, "smallest epsilon, approached by the easiest images", ge=-0.5, le=LARGEST_EPSILON
    )
    epsilon_max: float = _setting(
        1.0, "largest epsilon, approached by the hardest images", ge=-0.5, le=LARGEST_EPSILON
    )
    statistics: Literal["batch", "dataset"] = _setting(
        "batch",
        "images that are normalised together, over which percentile, sigma, ranks and mean weight "
        "are computed",
        choices={
            "batch": "those of the batch",
            "dataset": "all training images, at the assessment",
        },
    )
    delta: float = _setting(1e-9, "delta of eq. 11, which avoids a division by zero", gt=0, le=1)
    replay: str | None = _setting(
        None,
        "run or schedule file whose recorded epsilons are used, without MC Dropout; null: adapt "
        "epsilon in this training",
    )
    replay_arm: Annotated[str, OneOf(choices.REPLAY_ARMS)] = _setting(
        "recorded", "how the replayed epsilons are assigned to the images"
    )
    replay_seed: int | None = _setting(
        None,
        "random seed of control.replay_arm shuffled and permuted; null: training.seed",
        ge=0,
        le=2**31,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epsilon_min > self.epsilon_max:
            raise ValueError(
                f"control.epsilon_min {self.epsilon_min} is above epsilon_max {self.epsilon_max}"
            )
        if self.map == "weight" and not self.epsilon_min < 0 < self.epsilon_max:
            raise ValueError(
                f"control.map weight needs control.epsilon_min {self.epsilon_min} below 0 and "
                f"control.epsilon_max {self.epsilon_max} above 0, because the mean weight "
                "1 + 2 epsilon is 1"
            )
        if self.start >= 1 and self.start != int(self.start):
            raise ValueError(
                f"control.start {self.start}: give a whole number of epochs, or a share below 1"
            )
        return self

    def assessment_epochs(self, epochs: int) -> list[int]:
        """Return the epochs after which images are assessed: E0, E0 + tau, ..., from 1.

        >>> ControlConfig(start=0.2, every=5).assessment_epochs(20)
        [4, 9, 14, 19]
        """
        share = 0 < self.start < 1
        first = max(1, round(self.start * epochs)) if share else int(self.start)
        return list(range(first, epochs + 1, self.every))


class TrainingConfig(Section):
    """The optimisation of the network's weights."""

    epochs: int = _setting(30, "passes over the training images", "epochs", ge=1, le=100_000)
    batch_size: int = _setting(8, "images in each training step", "images", ge=1, le=4096)
    learning_rate: float = _setting(3e-3, "learning rate of the first epoch", gt=0, le=10)
    optimizer: Annotated[str, OneOf(choices.OPTIMIZERS)] = _setting(
        "adamw", "optimizer of the weights"
    )
    weight_decay: float = _setting(1e-2, "weight decay of the optimizer", ge=0, le=1)
    scheduler: Annotated[str, OneOf(choices.SCHEDULERS)] = _setting(
        "cosine", "how the learning rate changes over the epochs"
    )
    early_stopping: int = _setting(
        0,
        "stop after this many epochs without a better validation Dice; 0: train all epochs",
        "epochs",
        ge=0,
    )
    precision: Literal["fp32", "bf16", "fp16"] = _setting(
        "fp32",
        "precision of the network's forward pass in training; losses and D are float32 or wider",
        choices={
            "fp32": "float32",
            "bf16": "bfloat16 mixed precision",
            "fp16": "float16 mixed precision; gradients are scaled, and steps whose gradients "
            "overflow are skipped",
        },
    )
    accumulate: int = _setting(
        1,
        "number of parts in which each batch goes through the network: more parts need less "
        "memory, but batch normalisation uses the statistics of one part",
        "parts",
        ge=1,
        le=4096,
    )
    recompute: bool = _setting(
        False,
        "recompute feature maps in the backward pass: less memory, more time, the same result",
    )
    compile: bool = _setting(False, "compile the network with torch.compile")
    channels_last: bool | Literal["auto"] = _setting(
        "auto",
        "store the channels of a pixel next to each other in memory: on one CPU thread a step with "
        "images of 256 x 256 takes 0.76 times as long (GPUs were not measured); results differ by "
        "rounding only, but element dropout may draw other masks; auto: on CPUs, except for your "
        "own networks and those with instance normalisation",
    )
    deterministic: bool = _setting(
        True,
        "on a GPU: use deterministic algorithms where torch has them, so a resumed run equals an "
        "uninterrupted one; false: use the fastest algorithms, and runs may differ from the first "
        "step on; no effect on a CPU",
    )
    sync_batch_norm: bool = _setting(
        True,
        "with several processes: batch normalisation over the whole batch, as in one process; "
        "false: over the part of each process, which is faster",
    )
    on_nonfinite: Literal["stop", "skip"] = _setting(
        "stop",
        "reaction to a step whose loss or gradients are not finite",
        choices={
            "stop": "end the run and keep its last good epoch",
            "skip": "skip the step, count it and log it; a GPU must wait for the check",
        },
    )
    workers: int = _setting(
        0,
        "processes that read and augment images; 0: the training process itself",
        "processes",
        ge=0,
        le=64,
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = _setting(
        "auto", "device of training and MC Dropout", choices=choices.DEVICES
    )
    seed: int = _setting(
        0, "random seed for weights, data order, augmentation and dropout", ge=0, le=2**31
    )


class OutputConfig(Section):
    """The folder and the figures of a run."""

    path: str | None = _setting(
        None, "new folder of the run; null: a folder in runs/ named by the time"
    )
    overlays: int = _setting(6, "number of images in each overlay figure", "images", ge=0, le=50)
    figures: bool = _setting(True, "draw figures at the end of the run")


class Config(Section):
    """All settings of a run.

    >>> Config().loss.name
    'polydice1'
    """

    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = LossConfig()
    uncertainty: UncertaintyConfig = UncertaintyConfig()
    control: ControlConfig = ControlConfig()
    training: TrainingConfig = TrainingConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _check_epsilon(self) -> Self:
        if self.loss.name != "polydice":
            return self  # The bounds of the fields are those of a single term.
        least = least_epsilon(self.loss.terms)
        reached = {"loss.epsilon": self.loss.epsilon}
        if self.adaptive:
            reached["control.epsilon_min"] = self.control.epsilon_min
        for key, epsilon in reached.items():
            if epsilon < least:
                raise ValueError(
                    f"{key} {epsilon:g} would reward misalignment with loss.terms "
                    f"{self.loss.terms}: at least {math.ceil(1000 * least) / 1000:g}"
                )
        return self

    @model_validator(mode="after")
    def _check_control(self) -> Self:
        adaptable = listed(name for name, row in choices.LOSSES.items() if row.has_epsilon)
        if self.control.enabled is True and not self.loss.has_epsilon:
            raise ValueError(
                f"control.enabled: loss.name {self.loss.name} has no epsilon to adapt; "
                f"choose {adaptable}, or control.enabled=false"
            )
        if self.control.replay is not None and not self.adaptive:
            raise ValueError(
                f"control.replay needs an adapted epsilon; set loss.name to {adaptable}, and "
                "control.enabled to auto"
            )
        if not self.assesses:
            return self
        passes = self.uncertainty.takes_passes
        if passes and ":" not in self.network.name and self.network.dropout == 0:
            raise ValueError(
                "network.dropout is 0, so all passes of MC Dropout would be equal; "
                "set it above 0, or control.enabled=false"
            )
        if not self.control.assessment_epochs(self.training.epochs):
            raise ValueError(
                f"control.start {self.control.start:g} is beyond training.epochs "
                f"{self.training.epochs}, so no image would be assessed; lower it"
            )
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> Self:
        if self.training.compile and self.training.recompute:
            raise ValueError(
                "training.recompute does not work with training.compile; set one of them to false"
            )
        return self

    @property
    def adaptive(self) -> bool:
        """Whether epsilon is adapted."""
        if self.control.enabled == "auto":
            return self.loss.has_epsilon
        return self.control.enabled

    @property
    def own_code(self) -> dict[str, str]:
        """The code outside polyseg that settings name, by setting."""
        flat = self.flat()
        keys = ("network.name", "loss.name", "uncertainty.metric", "control.map")
        return {key: flat[key] for key in keys if ":" in flat[key]}

    @property
    def assesses(self) -> bool:
        """Whether the run itself assesses images in order to adapt epsilon."""
        return self.adaptive and self.control.replay is None

    def flat(self) -> dict[str, Any]:
        """Return the settings by section and name, such as "loss.name"."""
        return {
            f"{section}.{name}": value
            for section, values in self.model_dump().items()
            for name, value in values.items()
        }

    def changed(self, settings: Mapping[str, Any]) -> "Config":
        """Return a copy with other values, unchecked, by section and name."""
        copy = self
        for key, value in settings.items():
            section, _, name = key.partition(".")
            values = getattr(copy, section).model_copy(update={name: value})
            copy = copy.model_copy(update={section: values})
        return copy

    def to_yaml(self) -> str:
        """Return the whole configuration as YAML."""
        return dump_yaml(self.model_dump(mode="json"))


def _as_tuple(values: LabelValues) -> tuple[LabelValue, ...]:
    return (values,) if isinstance(values, int | str) else values


def least_epsilon(terms: int) -> float:
    """Return the least epsilon for which PolyDice of this many terms never falls as theta grows.

    For that epsilon the derivative of the sum, 2 (1/2 + epsilon) theta +
    sum_{k>1} 2k alpha_k theta^(2k-1), is 0 at theta = pi/2. It is -1/2 for one term and tends to
    -1/pi.

    >>> [round(least_epsilon(terms), 4) for terms in (1, 2, 3, 10)]
    [-0.5, -0.2944, -0.3198, -0.3183]
    """
    rest = (
        (-1) ** (k - 1) * k / math.factorial(2 * k) * (math.pi / 2) ** (2 * k - 2)
        for k in range(2, terms + 1)
    )
    return -0.5 - float(sum(rest))

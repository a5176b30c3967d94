"""Declare every setting with its default, unit, bounds and meaning."""

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self
from unicodedata import category

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from polyseg.choices import (
    DEVICES,
    FREE_SCORES,
    LAYOUTS,
    LOSSES,
    MAPS,
    MODALITIES,
    NETWORKS,
    NORMALISATIONS,
    OPTIMIZERS,
    PAIR_SCORES,
    REDUCTIONS,
    REGIONS,
    REPLAY_ARMS,
    SCHEDULERS,
    UNCERTAINTIES,
    WHOLE_SCORES,
    loss_of,
)
from polyseg.config.label_values import LARGEST_LABEL, name_of, parse_values
from polyseg.registry import Registry, is_own, listed, not_among
from polyseg.system.yaml import dump_yaml, parts

_LARGEST_SIDE = 8192
_LARGEST_ARGUMENT = 4096
_LONGEST_ARGUMENT = 16
_LONGEST_PATTERN = 200
_MOST_LABELS = 32
_NO_TEXT = {"Cc", "Cs"}
"""Unicode's control characters and surrogates."""
_TASK_NAME = re.compile(r"[\w+()-][\w +().-]{0,63}")

_OR_OWN = "or a function of one's own, package.module:function or file.py:function"

MOST_SAMPLES = 10_000
LARGEST_EPSILON = 100


def _setting(
    default: Any,
    description: str,
    unit: str = "",
    choices: Mapping[str, str] | None = None,
    **bounds: Any,
) -> Any:
    """Return a field that knows its meaning, its unit, its bounds, and what each choice means."""
    extra: Any = {"unit": unit, "choices": dict(choices or {})}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


class OneOf:
    """The values of a setting that are the names of registries, as they are when it is checked.

    With `own`, code of one's own is allowed too, "package.module:function" or "file.py:function".
    """

    def __init__(self, *registries: Registry[Any], own: bool = False) -> None:
        self.registries, self.own = registries, own

    def choices(self) -> dict[str, str]:
        """Return what each allowed name means."""
        return {name: text for one in self.registries for name, text in one.choices().items()}

    def check(self, value: str) -> str:
        """Return a name that is allowed.

        Raises:
            ValueError: it is not, with the nearest one that is.
        """
        if value not in self.choices() and not (self.own and is_own(value)):
            also = "; one of your own is package.module:function" if self.own else ""
            raise ValueError(not_among(value, self.choices(), self.registries[0].kind) + also)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        names = {"enum": list(self.choices())}
        return handler(schema) | ({"anyOf": [names, {"pattern": ":"}]} if self.own else names)


class Section(BaseModel):
    """A part of the configuration; it is frozen and strict."""

    # Strict: neither true nor "10" is a number, and neither 1 nor "yes" is true.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, strict=True
    )

    @field_validator("*")
    @classmethod
    def _texts_are_of_a_line(cls, value: Any) -> Any:
        """What stands in names and paths goes to the system, to YAML and to error messages."""
        for part in parts(value):
            if isinstance(part, str) and any(category(sign) in _NO_TEXT for sign in part):
                raise ValueError(f"{part!a:.60} holds a control character or what is no text")
        return value


Side = Annotated[int, Field(ge=16, le=_LARGEST_SIDE)]
_FROM_A_LIST = Strict(False)
"""Of the tuple itself; what is in it stays strict."""
Names = str | Annotated[tuple[str, ...], _FROM_A_LIST] | None
LabelValue = int | str
LabelValues = LabelValue | Annotated[tuple[LabelValue, ...], _FROM_A_LIST]
Foreground = (
    LabelValue | Annotated[tuple[LabelValues, ...], _FROM_A_LIST] | dict[str, LabelValues] | None
)


class AugmentConfig(Section):
    """Strengths of single changes; null is what the preset `data.augmentation` says."""

    flip: float | None = _setting(None, "chance of a flip along each axis", ge=0, le=1)
    rotation: float | None = _setting(None, "rotated by up to this", "degrees", ge=0, le=180)
    scale: float | None = _setting(None, "scaled by up to this share", ge=0, le=0.9)
    shift: float | None = _setting(None, "moved by up to this share of a side", ge=0, le=0.5)
    elastic: float | None = _setting(
        None,
        "bent: nodes 1/8 of a side apart move by a Gaussian of up to this share of their distance",
        ge=0,
        le=0.5,
    )
    intensity: float | None = _setting(
        None, "gain and offset changed by up to this, in units of the normalised image", ge=0, le=2
    )
    gamma: float | None = _setting(None, "gamma within 1 / (1 + this) and 1 + this", ge=0, le=4)
    blur: float | None = _setting(None, "Gaussian of up to this sigma", "pixels", ge=0, le=20)
    noise: float | None = _setting(
        None, "Gaussian noise of up to this deviation, in units of the normalised image", ge=0, le=2
    )


class DataConfig(Section):
    """Which images, and what they go through before the network."""

    path: str = _setting(
        "demo", "folder of a data set, CSV manifest, or 'demo' for generated phantoms"
    )
    layout: Annotated[str, OneOf(LAYOUTS)] = _setting("auto", "how images and masks lie")
    images: Names = _setting(
        None,
        "folder of the images: its name, or its path in the data set; a pattern such as *.png; or "
        "a list of these",
    )
    masks: Names = _setting(
        None, "the same for the masks; of a list, masks of one image are united"
    )
    unmasked: Literal["refuse", "empty", "skip"] = _setting(
        "refuse",
        "what happens to an image without a mask",
        choices={
            "refuse": "it is an error",
            "empty": "it has an empty mask",
            "skip": "it is left out",
        },
    )
    plane: Literal["axial", "coronal", "sagittal"] = _setting(
        "axial",
        "plane that NIfTI volumes are sliced in",
        choices={
            "axial": "slices across the axis from foot to head",
            "coronal": "slices across the axis from back to front",
            "sagittal": "slices across the axis from left to right",
        },
    )
    orientation: Literal["auto", "tag", "stored"] = _setting(
        "auto",
        "whether pictures are turned as their orientation tag (EXIF, TIFF) says",
        choices={
            "auto": "they are turned; an error where image and mask have different tags and their "
            "sizes do not tell which is right",
            "tag": "images and masks are turned by their own tags",
            "stored": "images and masks are taken as stored",
        },
    )
    channels: Literal["auto", "gray"] = _setting(
        "auto",
        "channels of the images",
        choices={
            "auto": "those of the files; gray images among RGB ones become RGB",
            "gray": "one: RGB becomes gray by the luma weights 0.299, 0.587, 0.114, other channels "
            "their mean",
        },
    )
    training_slices: Literal["all", "foreground"] = _setting(
        "all",
        "images and slices that are trained on",
        choices={"all": "all of them", "foreground": "only those with foreground"},
    )
    size: Side | Annotated[tuple[Side, Side], _FROM_A_LIST] | Literal["auto"] | None = _setting(
        "auto",
        "size that the network sees: this square, or [height, width]; auto: the images' median "
        "size, sides in proportion, at most 256 and multiples of 16 (128 for the demo), which a "
        "run records; null keeps images as they are",
        "pixels",
    )
    fit: Literal["resize", "tile"] = _setting(
        "resize",
        "how images come to data.size",
        choices={
            "resize": "images are resized to it",
            "tile": "training is on patches cut from the images as they are, prediction window by "
            "window",
        },
    )
    tile_overlap: float = _setting(
        0.25, "share of a window that its neighbour sees too", ge=0, le=0.75
    )
    tile_foreground: float = _setting(
        0.5, "share of the patches that are centred on foreground", ge=0, le=1
    )
    split: Annotated[tuple[float, float, float], _FROM_A_LIST] = _setting(
        (0.7, 0.15, 0.15), "shares of training, validation and test images, where none are given"
    )
    split_seed: int = _setting(0, "seed of the split, apart from training.seed", ge=0)
    stratify: bool = _setting(True, "each part gets its share of small and of large foregrounds")
    folds: int = _setting(5, "number of folds of a cross-validation", ge=2, le=1000)
    fold: int | None = _setting(
        None, "the fold, from 0, that is tested on (validated on where a test set is given)", ge=0
    )
    split_file: str | None = _setting(
        None, "split.json of a run or of `polyseg data split`, or splits_final.json of nnU-Net"
    )
    group: str | None = _setting(
        "auto",
        "images that stay together in a split: auto: those of one patient, by a folder for each or "
        "the first number in their names that further numbers follow; none: each by itself; or a "
        "regular expression: those in whose id it finds the same text",
    )
    duplicates: Literal["refuse", "allow-near", "allow"] = _setting(
        "refuse",
        "what happens to an image that is in two parts of a split, as it is or nearly so",
        choices={
            "refuse": "it is an error",
            "allow-near": "it is an error only if the copies are equal",
            "allow": "it is allowed",
        },
    )
    foreground: Foreground = _setting(
        None,
        "label values that count: a number, a range such as 1-300, nonzero, or a colour such as "
        "'#FF0000'; a list of several tasks, a list of lists that unites values, or a mapping of "
        "names to them; null: masks are 0/1 or 0/255",
    )
    normalise: Annotated[str, OneOf(NORMALISATIONS)] = _setting(
        "zscore", "how the values of an image are normalised"
    )
    window: Annotated[tuple[float, float], _FROM_A_LIST] = _setting(
        (-160.0, 240.0), "lowest and highest value of normalise=window, such as Hounsfield units"
    )
    augmentation: Literal["none", "light", "medium", "strong"] = _setting(
        "light",
        "preset of random changes to the training images",
        choices={
            "none": "no changes",
            "light": "flips and small rotation, scale, shift, intensity, gamma and noise",
            "medium": "larger ones, and elastic deformation and blur",
            "strong": "the same kinds, larger still",
        },
    )
    memory: int = _setting(
        2048,
        "decoded images are kept in memory up to this, else in a file of data.cache",
        "MB",
        ge=0,
        le=10_000_000,
    )
    cache: str | None = _setting(
        None, "folder for decoded images; null: .cache/polyseg in the home folder"
    )
    demo_images: int = _setting(160, "number of phantoms of the demo data", ge=8, le=100_000)
    demo_modality: Literal["ultrasound", "endoscopy"] = _setting(
        "ultrasound", "what the phantoms look like", choices=MODALITIES
    )
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _shares_make_a_whole(self) -> Self:
        if min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6 or self.split[0] == 0:
            raise ValueError(
                f"data.split {list(self.split)}: three shares, the first above 0, sum 1"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fold is not None and self.fold >= self.folds and self.split_file is None:
            raise ValueError(
                f"data.fold {self.fold}: data.folds {self.folds} end at fold {self.folds - 1}"
            )
        if self.window[0] >= self.window[1]:
            raise ValueError(f"data.window {list(self.window)}: the first must be the lower")
        if self.fit == "tile" and self.size is None:
            raise ValueError("data.fit: tiles need a data.size")
        if self.group_pattern is not None:
            _check_pattern(self.group_pattern)
        return self

    @model_validator(mode="after")
    def _labels_are_told_apart(self) -> Self:
        if self.foreground is None:
            return self
        given = self.foreground if isinstance(self.foreground, tuple | dict) else (1,)
        if not all(self.tasks.values()) or not self.tasks:
            raise ValueError("data.foreground: a task without a label value")
        if len({frozenset(task) for task in self.tasks.values()}) != len(given):
            raise ValueError("data.foreground: two tasks are the same")
        if len(self.tasks) > _MOST_LABELS:
            raise ValueError(
                f"data.foreground: {len(self.tasks)} tasks; at most {_MOST_LABELS}. For one task "
                "of many values give a range such as 1-300, or nonzero"
            )
        # Names become parts of the names of files.
        if not all(_TASK_NAME.fullmatch(name) for name in self.tasks):
            raise ValueError(
                "data.foreground: names are letters, digits, spaces and _ + - ( ) . up to 64, the "
                "first no dot"
            )
        return self

    @property
    def group_pattern(self) -> str | None:
        """Regular expression that finds an image's group in its id; None where none is given."""
        return None if self.group in (None, "auto", "none") else self.group

    @property
    def tasks(self) -> dict[str, tuple[int, ...]]:
        """Label values by the name of the task; empty where masks are 0/1 or 0/255.

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
        """Return the value that predictions hold for each task, which is its first.

        Args:
            binary: the value for a single task whose first value is 0, nonzero or a colour; the
                values of several such tasks are 1, 2, ...

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
        """The names of the network's output channels; a single one has none.

        >>> DataConfig(foreground=3).labels, DataConfig(foreground={"liver": 1, "tumour": 2}).labels
        (('',), ('liver', 'tumour'))
        """
        return tuple(self.tasks) if len(self.tasks) > 1 else ("",)


class NetworkConfig(Section):
    """The network and its dropout."""

    name: Annotated[str, OneOf(NETWORKS, own=True)] = _setting(
        "unet", "the network, or a factory of your own as package.module:factory"
    )
    dropout: float = _setting(0.2, "dropout rate; 0 leaves none", ge=0, lt=1)
    dropout_kind: Literal["channel", "element"] = _setting(
        "channel",
        "what is dropped",
        choices={"channel": "whole feature maps", "element": "single values"},
    )
    dropout_layers: str | Annotated[tuple[str, ...], _FROM_A_LIST] = _setting(
        "auto",
        "active dropout layers: decoder (from the bottleneck on), bottleneck, all, or patterns of "
        "layer names; auto is decoder, and all for a factory's network",
    )
    multiple_of: int = _setting(
        32, "a factory's network gets images padded to a multiple of this", "pixels", ge=1, le=512
    )
    kwargs: dict[str, Any] = _setting({}, "further arguments of the network")

    @model_validator(mode="after")
    def _arguments_are_plain_and_small(self) -> Self:
        """A checkpoint brings these along, and may be from anyone."""
        try:
            plain = json.loads(json.dumps(self.kwargs, allow_nan=False)) == self.kwargs
        except (TypeError, ValueError, OverflowError, RecursionError):
            plain = False
        if not plain:
            raise ValueError("network.kwargs: numbers, words, lists and mappings of them only")
        for value in parts(self.kwargs):
            if isinstance(value, list) and len(value) > _LONGEST_ARGUMENT:
                raise ValueError(f"network.kwargs: a list of over {_LONGEST_ARGUMENT} entries")
            if isinstance(value, int | float) and abs(value) > _LARGEST_ARGUMENT:
                raise ValueError(f"network.kwargs: {value:g} is above {_LARGEST_ARGUMENT}")
            # Of a factory's own lists nothing is known.
            if isinstance(value, list) and ":" not in self.name and _has_none_of_something(value):
                raise ValueError(f"network.kwargs: {value!r:.60} has numbers below 1")
        return self


class LossConfig(Section):
    """The loss."""

    name: Annotated[str, OneOf(LOSSES, own=True)] = _setting(
        "polydice1", f"loss of each image; {_OR_OWN}, of (logits, mask, epsilon)"
    )
    epsilon: float = _setting(
        0.0, "steepness until the first assessment, and without control always", ge=-0.5, le=100
    )
    terms: int = _setting(3, "K of polydice", ge=1, le=10)
    scale: Literal["norms", "printed"] = _setting(
        "norms",
        "the scale s of eq. 3",
        choices={"norms": "2ab/(a^2+b^2)", "printed": "2q/(a^2+b^2), as the thesis prints it"},
    )
    scale_gradient: Literal["guarded", "full", "detached"] = _setting(
        "guarded",
        "where s is held constant in the backward pass",
        choices={
            "guarded": "for images where the loss rises with s",
            "full": "nowhere",
            "detached": "everywhere",
        },
    )
    smooth: float = _setting(1e-6, "added to numerators and denominators", ge=1e-9, le=1e6)
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
        return loss_of(self.name).has_epsilon

    @property
    def polydice_terms(self) -> int:
        """K of the PolyDice losses, 0 of others."""
        return {"polydice1": 1, "polydice": self.terms}.get(self.name, 0)


class UncertaintyConfig(Section):
    """MC Dropout and what is read off it."""

    samples: Annotated[int, Field(ge=2, le=MOST_SAMPLES)] | Literal["auto"] = _setting(
        20,
        f"N, passes an assessment, 2 to {MOST_SAMPLES:,}; auto: as few as reach rank_target",
        "passes",
    )
    rank_target: float = _setting(
        0.95,
        "with samples auto: rank correlation that D should have with endless passes",
        gt=0.5,
        lt=1,
    )
    metric: Annotated[str, OneOf(UNCERTAINTIES, WHOLE_SCORES, FREE_SCORES, own=True)] = _setting(
        "mutual_information",
        "the difficulty D: a pixel map, whose mean over the region it is, or a score of the whole "
        f"image; {_OR_OWN}, of (moments, mask), or of (probability, mask) of each pass",
    )
    region: Annotated[str, OneOf(REGIONS)] = _setting(
        "mask", "pixels that D is averaged over; where there are none, those of the prediction"
    )
    boundary_width: int = _setting(
        3, "half width of the band of region boundary", "pixels", ge=1, le=64
    )
    masks: Literal["consistent", "independent"] = _setting(
        "consistent",
        "dropout masks of a pass",
        choices={
            "consistent": "pass n drops the same for every image",
            "independent": "each image has masks of its own",
        },
    )
    program: Literal["auto", "plain"] = _setting(
        "auto",
        "how the passes are run",
        choices={
            "auto": "they share what they have in common, where that repays taking the network "
            "apart",
            "plain": "each runs the whole network",
        },
    )
    precision: Literal["fp32", "bf16"] = _setting(
        "fp32",
        "precision of the network in the passes; scores are float32 or wider in either",
        choices={
            "fp32": "float32",
            "bf16": "bfloat16, faster on GPUs and processors that have it; its rounding moves D by "
            "about a thousandth",
        },
    )
    save_maps: bool = _setting(False, "keep the pixel maps in the assessment files")

    @field_validator("metric", mode="before")
    @classmethod
    def _refuse_pairs(cls, value: Any) -> Any:
        if isinstance(value, str) and value in PAIR_SCORES:
            raise ValueError(
                f"{value} compares all pairs of passes and is no difficulty to train by; "
                f"`polyseg evaluate` and `polyseg estimate-uncertainty --score {value}` measure it"
            )
        return value

    @property
    def takes_passes(self) -> bool:
        """Whether the difficulty comes from MC Dropout."""
        return self.metric not in FREE_SCORES


class ControlConfig(Section):
    """How difficulty sets epsilon."""

    enabled: bool | Literal["auto"] = _setting(
        "auto", "adapt epsilon; auto: where the loss has one"
    )
    start: float = _setting(
        0.2, "E0, first assessment: whole epochs, or a share of them below 1", "epochs", ge=0
    )
    every: int = _setting(5, "tau, epochs between assessments", "epochs", ge=1)
    reduction: Annotated[str, OneOf(REDUCTIONS)] = _setting(
        "sigma", "how the difficulties of images are made comparable: D_norm"
    )
    percentile: float = _setting(50.0, "pct of eq. 11", "percent", ge=0, le=100)
    map: Annotated[str, OneOf(MAPS, own=True)] = _setting(
        "sigmoid",
        f"how D_norm becomes epsilon; {_OR_OWN}, of (normalised, epsilon_min, epsilon_max, "
        "sensitivity)",
    )
    sensitivity: float = _setting(
        1.0, "lambda of eq. 12: how strongly epsilon follows D_norm", ge=0, le=1000
    )
    epsilon_min: float = _setting(
        -0.4, "epsilon that the easiest images tend to", ge=-0.5, le=LARGEST_EPSILON
    )
    epsilon_max: float = _setting(
        1.0, "epsilon that the hardest images tend to", ge=-0.5, le=LARGEST_EPSILON
    )
    statistics: Literal["batch", "dataset"] = _setting(
        "batch",
        "images that are normalised together: percentile, sigma or ranks, and the mean weight, "
        "are over these",
        choices={
            "batch": "those of the batch",
            "dataset": "all training images, at the assessment",
        },
    )
    delta: float = _setting(1e-9, "delta of eq. 11", gt=0, le=1)
    replay: str | None = _setting(
        None, "run or schedule file whose epsilons are used instead, without MC Dropout"
    )
    replay_arm: Annotated[str, OneOf(REPLAY_ARMS)] = _setting(
        "recorded", "which image gets which of the replayed epsilons"
    )
    replay_seed: int | None = _setting(
        None, "random seed of replay_arm shuffled and permuted; null: training.seed", ge=0, le=2**31
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
            raise ValueError(f"control.start {self.start}: whole epochs, or a share below 1")
        return self

    def assessment_epochs(self, epochs: int) -> list[int]:
        """Return E0, E0 + tau, ... up to the last epoch.

        >>> ControlConfig(start=0.2, every=5).assessment_epochs(20)
        [4, 9, 14, 19]
        """
        share = 0 < self.start < 1
        first = max(1, round(self.start * epochs)) if share else int(self.start)
        return list(range(first, epochs + 1, self.every))


class TrainingConfig(Section):
    """How long, how fast, on what."""

    epochs: int = _setting(30, "passes over the training images", "epochs", ge=1, le=100_000)
    batch_size: int = _setting(8, "images a step", "images", ge=1, le=4096)
    learning_rate: float = _setting(3e-3, "at the start", gt=0, le=10)
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = _setting("adamw", "optimizer")
    weight_decay: float = _setting(1e-2, "of the optimizer", ge=0, le=1)
    scheduler: Annotated[str, OneOf(SCHEDULERS)] = _setting(
        "cosine", "learning rate over the epochs"
    )
    early_stopping: int = _setting(
        0, "end after so many epochs without a better validation Dice; 0: never", "epochs", ge=0
    )
    precision: Literal["fp32", "bf16", "fp16"] = _setting(
        "fp32",
        "precision of the network's forward pass in training; losses and D are float32 or wider",
        choices={
            "fp32": "float32",
            "bf16": "bfloat16, in mixed precision",
            "fp16": "float16, in mixed precision; gradients are scaled, and steps in which they "
            "overflow left out",
        },
    )
    accumulate: int = _setting(
        1,
        "parts that each batch goes through the network in, one after another, which takes less "
        "memory; batch normalisation sees a part at a time",
        "parts",
        ge=1,
        le=4096,
    )
    recompute: bool = _setting(
        False,
        "keep few feature maps for the way back and compute the others anew: less memory, more "
        "time, the same result",
    )
    compile: bool = _setting(False, "torch.compile the network")
    channels_last: bool | Literal["auto"] = _setting(
        "auto",
        "train with the channels of a pixel side by side in memory: on one CPU thread a step with "
        "images of 256 x 256 takes 0.76 times as long, GPUs are not measured; equal to rounding "
        "where dropout is by channels, by elements it may draw other masks; auto: on a CPU, but "
        "for networks of one's own and those with instance normalisation",
    )
    deterministic: bool = _setting(
        True,
        "on a GPU: algorithms that give the same bits each time, as far as torch has them, so that "
        "a resumed run equals one that was not stopped; false: the fastest by trial, and runs may "
        "differ from each other from the first step on. On a CPU it changes nothing",
    )
    sync_batch_norm: bool = _setting(
        True,
        "with several processes: batch normalisation over the whole batch, as one process has it; "
        "false is faster and normalises each process's part by itself",
    )
    on_nonfinite: Literal["stop", "skip"] = _setting(
        "stop",
        "what happens where the loss or the gradients of a step are not finite",
        choices={
            "stop": "the run ends; its last good epoch is kept",
            "skip": "the step is left out, counted and logged, which a GPU waits for",
        },
    )
    workers: int = _setting(0, "processes that read and augment", "processes", ge=0, le=64)
    device: Literal["auto", "cpu", "cuda", "mps"] = _setting(
        "auto", "device of training and MC Dropout", choices=DEVICES
    )
    seed: int = _setting(
        0, "random seed for weights, data order, augmentation and dropout", ge=0, le=2**31
    )


class OutputConfig(Section):
    """What a run leaves."""

    path: str | None = _setting(None, "the run's folder; null: runs/ and the time")
    overlays: int = _setting(6, "images in each overlay figure", "images", ge=0, le=50)
    figures: bool = _setting(True, "draw the figures")


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
    def _no_epsilon_rewards_misalignment(self) -> Self:
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
        adaptable = listed(name for name, row in LOSSES.items() if row.has_epsilon)
        if self.control.enabled is True and not self.loss.has_epsilon:
            raise ValueError(
                f"control.enabled: loss.name {self.loss.name} has no epsilon to adapt; "
                f"choose {adaptable}, or control.enabled=false"
            )
        if self.control.replay is not None and not self.adaptive:
            raise ValueError(
                f"control.replay: epsilon is not adapted here; choose loss.name {adaptable}, and "
                "control.enabled auto"
            )
        if not self.assesses:
            return self
        passes = self.uncertainty.takes_passes
        if passes and ":" not in self.network.name and self.network.dropout == 0:
            raise ValueError(
                "network.dropout is 0, so MC Dropout has nothing to sample; "
                "set it above 0, or control.enabled=false"
            )
        if not self.control.assessment_epochs(self.training.epochs):
            raise ValueError(
                f"control.start {self.control.start:g} is beyond training.epochs "
                f"{self.training.epochs}: nothing would ever be assessed"
            )
        return self

    @model_validator(mode="after")
    def _compiles_or_recomputes(self) -> Self:
        if self.training.compile and self.training.recompute:
            raise ValueError("training.recompute: torch cannot compile it; set compile to false")
        return self

    @property
    def adaptive(self) -> bool:
        """Whether epsilon is adapted."""
        if self.control.enabled == "auto":
            return self.loss.has_epsilon
        return self.control.enabled

    @property
    def own_code(self) -> dict[str, str]:
        """The settings that name code outside polyseg, and what they name."""
        named = {
            "network.name": self.network.name,
            "loss.name": self.loss.name,
            "uncertainty.metric": self.uncertainty.metric,
            "control.map": self.control.map,
        }
        return {setting: name for setting, name in named.items() if ":" in name}

    @property
    def assesses(self) -> bool:
        """Whether epsilon is adapted by assessments of the run's own."""
        return self.adaptive and self.control.replay is None

    def to_yaml(self) -> str:
        """Return the whole configuration as YAML."""
        return dump_yaml(self.model_dump(mode="json"))


def _has_none_of_something(values: list[Any]) -> bool:
    """Tell whether a list, such as of channels or strides, has a whole number below 1."""
    return any(type(value) is int and value < 1 for value in values)


def _as_tuple(values: LabelValues) -> tuple[LabelValue, ...]:
    return (values,) if isinstance(values, int | str) else values


def _check_pattern(pattern: str) -> None:
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"data.group: a pattern of over {_LONGEST_PATTERN} characters")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"data.group {pattern!r}: is no regular expression: {error}") from None


def least_epsilon(terms: int) -> float:
    """Return the least epsilon for which PolyDice of so many terms never falls as theta grows.

    The sum's derivative, 2 (1/2 + epsilon) theta + sum_{k>1} 2k alpha_k theta^(2k-1), first
    meets 0 at theta = pi/2. It is -1/2 for one term and tends to -1/pi.

    >>> [round(least_epsilon(terms), 4) for terms in (1, 2, 3, 10)]
    [-0.5, -0.2944, -0.3198, -0.3183]
    """
    rest = (
        (-1) ** (k - 1) * k / math.factorial(2 * k) * (math.pi / 2) ** (2 * k - 2)
        for k in range(2, terms + 1)
    )
    return -0.5 - float(sum(rest))

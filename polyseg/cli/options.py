"""Options that several commands share, and the panels of the help that list them."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from polyseg.choices import DEVICES, PRESETS
from polyseg.cli import completion


def help_of(choices: Mapping[str, str]) -> str:
    """Return the help of an option that takes one of some names.

    >>> help_of({"auto": "the best there is", "cpu": "the processor"})
    'auto (the best there is), cpu (the processor)'
    """
    return ", ".join(f"{name} ({text})" for name, text in choices.items())


F = TypeVar("F", bound=Callable[..., Any])


def _no_type(ctx: Any) -> None:
    """Show no type."""


class _PlainTypes:
    """Base of commands whose help shows no Python types."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; flags and arguments show no type, numbers show N."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
            elif isinstance(parameter, TyperArgument):
                parameter.display_type_rich = _no_type  # type: ignore[method-assign]
            elif parameter.metavar is None:
                parameter.metavar = "N"
        return parameters


class _Command(_PlainTypes, TyperCommand):
    pass


class _Group(_PlainTypes, TyperGroup):
    pass


class App(typer.Typer):
    """A group of commands that prints its help if it gets no arguments."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=_Group, no_args_is_help=True, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[F], F]:
        """Return a decorator that makes a function a command."""
        return super().command(name, cls=_Command, **settings)


in_out = partial(typer.Option, rich_help_panel="Input and output")
setting = partial(typer.Option, rich_help_panel="Settings")
printed = partial(typer.Option, rich_help_panel="Output on the terminal")


def one_of(choices: Mapping[str, str], default: str = "", meaning: str = "") -> Any:
    """Return a setting that takes one of some names."""
    text = meaning + help_of(choices) + (f"; default: {default}" if default else "")
    return setting(metavar="NAME", help=f"{text}.", autocompletion=completion.names(choices))


def fold(of: str) -> Any:
    """Return the option --fold of a command that takes folds of some origin."""
    return setting(
        "--fold",
        metavar="K",
        help=f"Fold to test on, counted from 0, of {of} (default: no cross-validation).",
    )


def part(default: str) -> Any:
    """Return the option --split of a command that uses a part of a run's images by default."""
    return in_out(
        "--split",
        metavar="PART",
        help="Images to use: the run's train, val or test part, or all of them (default: "
        f"{default}).",
        autocompletion=completion.names(("train", "val", "test", "all")),
    )


def out_in(place: str) -> Any:
    """Return the option --out of a command that makes a new folder in a place by default."""
    return in_out(
        "--out", metavar="DIR", help=f"Folder for the results (default: a new one in {place})."
    )


Quiet = Annotated[bool, printed("--quiet", "-q", help="Print only results and warnings.")]
Verbose = Annotated[bool, printed("--verbose", "-v", help="Print more details.")]
AsJson = Annotated[bool, printed("--json", help="Print the results as JSON.")]
Device = Annotated[str, one_of(DEVICES)]
Trust = Annotated[
    bool,
    setting(
        "--trust",
        help="Import and run code outside polyseg that the settings of a run or checkpoint name "
        "(package.module:function); only if you trust its author.",
    ),
]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN ...", help="Folders of runs.")]
Source = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT|RUN",
        help="A checkpoint, or the folder of a run, whose best checkpoint is used.",
    ),
]
Passes = Annotated[
    int | None,
    setting(
        "--samples",
        metavar="N",
        help="Number of MC Dropout passes for --uncertainty (default: uncertainty.samples of the "
        "run).",
    ),
]
OtherData = Annotated[
    Path | None,
    in_out(
        "--data",
        metavar="PATH",
        help="Other images: a folder or a CSV manifest (default: the data set of the run).",
    ),
]
FigureFile = Annotated[
    Path,
    in_out(
        "--out",
        metavar="FILE",
        help="Figure to write: .png, .pdf or .svg; without suffix both PNG and PDF.",
    ),
]
Overwrite = Annotated[bool, in_out("--overwrite", help="Replace --out if this command wrote it.")]
Cache = Annotated[
    Path | None,
    in_out(
        "--cache",
        metavar="DIR",
        help="Folder for decoded images that do not fit into memory (default: data.cache of the "
        "run).",
    ),
]
Overrides = Annotated[
    list[str] | None,
    setting(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting, such as loss.name=dice; repeatable. `polyseg config show` lists them.",
        autocompletion=completion.setting,
    ),
]
PresetName = Annotated[
    str | None,
    setting(
        "--preset",
        metavar="NAME",
        help=f"Named settings, which override CONFIG.yaml and are overridden by --set: "
        f"{help_of(PRESETS.choices())}",
    ),
]
Out = Annotated[Path | None, out_in("the folder of the run")]
DataPath = Annotated[
    str, typer.Argument(metavar="PATH", help="Folder of a data set, or CSV manifest.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG.yaml", help="File of settings (default: those of `polyseg config show`)."
    ),
]


def as_overrides(flags: Mapping[str, Any]) -> list[str]:
    """Return the flags that were given, as --set overrides.

    >>> as_overrides({"data.path": "images", "data.fold": None})
    ['data.path="images"']
    """
    return [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]

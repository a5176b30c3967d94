"""Options that several commands share, and the panels of the help that they stand in."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from polyseg.choices import DEVICES, PRESETS
from polyseg.cli import completion


def help_of(choices: Mapping[str, str]) -> str:
    """Return the help of an option that takes one of some names.

    >>> help_of({"auto": "the best there is", "cpu": "the processor"})
    'auto (the best there is), cpu (the processor)'
    """
    return ", ".join(f"{name} ({text})" for name, text in choices.items())


F = TypeVar("F", bound=Callable[..., Any])


class _Command(TyperCommand):
    """A command whose help shows no type beside flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters."""
        return _without_types_of_flags(super().get_params(ctx))


class _Group(TyperGroup):
    """A group of commands whose help shows no type beside flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters."""
        return _without_types_of_flags(super().get_params(ctx))


class App(typer.Typer):
    """A group of commands, which without arguments prints its help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=_Group, no_args_is_help=True, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[F], F]:
        """Return a decorator that makes a function a command."""
        return super().command(name, cls=_Command, **settings)


def _without_types_of_flags(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


THE_PRODUCT, AROUND_IT = "The main job", "Around it"
WHERE, HOW, TALK = "Input and output", "Settings", "What is printed"

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only results and warnings.", rich_help_panel=TALK),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print details as well.", rich_help_panel=TALK)
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel=TALK)
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"{help_of(DEVICES)}.",
        autocompletion=completion.names(DEVICES),
        rich_help_panel=HOW,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import and run the code outside polyseg that a run names (package.module:function).",
        rich_help_panel=HOW,
    ),
]
Sources = Annotated[
    list[Path], typer.Argument(metavar="CHECKPOINT|RUN ...", help="Checkpoints or folders of runs.")
]
Source = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT|RUN",
        help="A checkpoint, or the folder of a run, whose best weights are used.",
    ),
]
OtherData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="Data set: a folder or a CSV manifest (default: the images of the run).",
        rich_help_panel=WHERE,
    ),
]
Part = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="PART",
        help="Part of the images: train, val, test or all (default: test to evaluate, else all).",
        autocompletion=completion.names(("train", "val", "test", "all")),
        rich_help_panel=WHERE,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Folder for the results (default: a new one in the folder of the run).",
        rich_help_panel=WHERE,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace results of this command that are there already, the whole folder.",
        rich_help_panel=WHERE,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Folder for decoded images that do not fit into memory (default: data.cache of the "
        "run).",
        rich_help_panel=WHERE,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting, such as loss.name=dice; repeatable. `polyseg config show` lists them.",
        autocompletion=completion.setting,
        rich_help_panel=HOW,
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help=f"Settings that go over those of CONFIG.yaml, and --set over them: "
        f"{help_of(PRESETS.choices())}",
        rich_help_panel=HOW,
    ),
]
Fold = Annotated[
    int | None,
    typer.Option(
        "--fold",
        metavar="K",
        help="Fold to test on, from 0, of data.folds or of the file of --split (default: no "
        "folds).",
        rich_help_panel=HOW,
    ),
]
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
    """Return flags that were given as settings.

    >>> as_overrides({"data.path": "images", "data.fold": None})
    ['data.path="images"']
    """
    return [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]

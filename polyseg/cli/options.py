"""Options that several commands share, and the panels of the help that they stand in."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from polyseg.choices import DEVICES, PRESETS


def help_of(choices: Mapping[str, str]) -> str:
    """Return the help of an option that takes one of some names.

    >>> help_of({"auto": "the best there is", "cpu": "the processor"})
    'auto (the best there is), cpu (the processor).'
    """
    return f"{', '.join(f'{name} ({text})' for name, text in choices.items())}."


THE_PRODUCT, AROUND_IT = "The main job", "Around it"
WHERE, HOW, TALK = "Input and output", "Settings", "Talking"

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only results and warnings.", rich_help_panel=TALK),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", rich_help_panel=TALK)]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel=TALK)
]
Device = Annotated[str, typer.Option(help=help_of(DEVICES), rich_help_panel=HOW)]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import and run the code outside polyseg that a run names (package.module:function).",
        rich_help_panel=HOW,
    ),
]
Sources = Annotated[
    list[Path], typer.Argument(metavar="CHECKPOINT|RUN ...", help="Checkpoints, or run folders.")
]
Source = Annotated[Path, typer.Argument(metavar="CHECKPOINT|RUN", help="A checkpoint or a run.")]
OtherData = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder of images; the run's own if left out.", rich_help_panel=WHERE
    ),
]
Part = Annotated[
    str | None,
    typer.Option("--split", help="train, val, test or all.", rich_help_panel=WHERE),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for the results.", rich_help_panel=WHERE)
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace what a former run of this command left there, the whole folder.",
        rich_help_panel=WHERE,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder for decoded images that do not fit into memory.",
        rich_help_panel=WHERE,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY.SUB=VALUE", help="Any setting; repeatable.", rich_help_panel=HOW
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
        help="Fold to test on, from 0, of data.folds (of the split file, with --split).",
        rich_help_panel=HOW,
    ),
]
DataPath = Annotated[str, typer.Argument(metavar="PATH", help="Folder, or CSV manifest.")]
ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG.yaml", help="Settings; the defaults if left out."),
]


def as_overrides(flags: Mapping[str, Any]) -> list[str]:
    """Return flags that were given as settings.

    >>> as_overrides({"data.path": "images", "data.fold": None})
    ['data.path="images"']
    """
    return [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]

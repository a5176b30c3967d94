"""`polyseg config`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from polyseg.cli.options import App, ConfigFile, Overrides, PresetName
from polyseg.errors import PolysegError

config_app = App(help="Print or write the settings, or their JSON Schema.")


@config_app.command("show")
def config_show(
    config: ConfigFile = None, preset: PresetName = None, overrides: Overrides = None
) -> None:
    """Print all settings of a run with these options.

    Example: polyseg config show --set loss.name=dice
    """
    from polyseg.config import load_config

    print(load_config(config, overrides or [], preset).to_yaml(), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of the configuration.

    Example: polyseg config schema > polyseg.schema.json
    """
    from polyseg.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


@config_app.command("init")
def config_init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path(
        "polyseg.yaml"
    ),
    preset: PresetName = None,
) -> None:
    """Write a configuration file of all settings, the defaults or a preset's, with their meaning.

    Example: polyseg config init my-settings.yaml
    """
    from polyseg.config import load_config, template
    from polyseg.system.files import write_text

    if path.exists():
        raise PolysegError(f"{path}: exists already; choose another name")
    write_text(path, template(load_config(preset=preset)))
    print(path)

"""List the settings with what they mean, for the help, the docs and the file of all defaults."""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import (
    BaseModel,
)

from polyseg.config.settings import Config, OneOf, Section
from polyseg.system.yaml import dump_yaml


def settings_of(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[dict[str, Any]]:
    """Yield every setting: key, default (as YAML), description, unit, bounds and choices.

    >>> next(settings_of())["key"]
    'data.path'
    """
    for name, field in section.model_fields.items():
        if isinstance(field.default, Section):
            yield from settings_of(type(field.default), f"{prefix}{name}.")
            continue
        extra: Any = field.json_schema_extra
        registered = [one.choices() for one in field.metadata if isinstance(one, OneOf)]
        yield {
            "key": prefix + name,
            "default": _yaml_of(field.default),
            "description": field.description,
            "unit": extra["unit"],
            "bounds": ", ".join(_bounds(field.metadata)),
            "choices": registered[0] if registered else extra["choices"],
        }


def template(config: Config = Config()) -> str:  # noqa: B008 - it is frozen
    """Return a configuration file of all settings, each with its meaning, unit and bounds."""
    lines = ["# polyseg configuration; every line may be left out"]
    section: list[str] = []
    for setting in settings_of():
        *head, name = setting["key"].split(".")
        indent = "  " * len(head)
        if head != section:
            outer = [] if len(head) > 1 else [""]
            lines += [*outer, f"{indent[2:]}{head[-1]}:"]
            section = head
        notes = "; ".join(
            note for note in (setting["description"], setting["unit"], setting["bounds"]) if note
        )
        lines += [f"{indent}# {notes}"]
        lines += [f"{indent}#   {one}: {text}" for one, text in setting["choices"].items()]
        value: Any = config
        for part in (*head, name):
            value = getattr(value, part)
        lines += [f"{indent}{name}: {_yaml_of(value)}"]
    return "\n".join(lines) + "\n"


def _yaml_of(value: Any) -> str:
    """Return a value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return dump_yaml(plain, in_a_line=True)


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for constraint in metadata:
        for attribute, words in signs.items():
            if hasattr(constraint, attribute):
                yield f"{words} {getattr(constraint, attribute):g}"

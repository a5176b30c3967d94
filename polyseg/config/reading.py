"""Read a configuration: flags and --set override the file, and the file overrides the defaults.

An unknown key is an error that names the nearest known one.
"""

import difflib
import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from polyseg.choices import PRESETS
from polyseg.config.descriptions import settings_of
from polyseg.config.settings import Config
from polyseg.errors import PolysegError, reason
from polyseg.registry import not_among, words_of
from polyseg.system.yaml import LONGEST_YAML, parse_yaml

_MOST_PROBLEMS = 5
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
}
"""Values that a setting takes, in words, by the beginning of pydantic's type of error."""


def load_config(
    file: str | Path | None = None, overrides: Sequence[str] = (), preset: str | None = None
) -> Config:
    """Read a configuration file, which a preset overrides, and dotted overrides override both.

    Args:
        file: YAML, or None for the defaults.
        overrides: such as "loss.epsilon=0.5"; the value is YAML.
        preset: a name of `choices.PRESETS`.

    Raises:
        PolysegError: a setting is wrong; the message names the file or override and the key.

    >>> load_config(overrides=["training.epochs=3"]).training.epochs
    3
    """
    tree = None if file is None else parse_yaml(_read(Path(file)), str(file))
    # An empty file means the defaults.
    tree = {} if tree is None else tree
    _refuse_no_settings(tree, str(file))
    try:
        of_preset = () if preset is None else PRESETS.find(preset).settings
    except ValueError as error:
        raise PolysegError(f"--preset {error}") from None
    for override in (*of_preset, *overrides):
        key, equals, value = override.partition("=")
        if not equals:
            raise PolysegError(f"--set {override}: write KEY=VALUE, such as loss.epsilon=0.5")
        _set_key(tree, key.strip(), _parse_override(value, f"--set {override}"))
    source = "configuration" if file is None else f"{file}{' with options' if overrides else ''}"
    return build_config(tree, source)


def build_config(tree: Any, source: str) -> Config:
    """Check a tree of settings.

    Raises:
        PolysegError: settings are wrong; one line, which starts with `source`, names them all.

    >>> build_config({"loss": {"epsilom": 1}}, "a.yaml")
    Traceback (most recent call last):
    polyseg.errors.PolysegError: a.yaml: loss.epsilom: unknown key; did you mean loss.epsilon?
    """
    _refuse_no_settings(tree, source)
    try:
        # An empty section means its defaults.
        return Config.model_validate(
            {key: {} if value is None else value for key, value in tree.items()}
        )
    except ValidationError as error:
        problems = list(_describe(error))
        more = len(problems) - _MOST_PROBLEMS
        shown = problems[:_MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise PolysegError(f"{source}: {'; '.join(shown)[:2000]}") from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise PolysegError(f"{source}: {str(error)[:200]}") from None


def _parse_override(value: str, source: str) -> Any:
    if "foreground" in source:
        # Quote colours, because an unquoted # begins a comment.
        value = re.sub(r"(?<![\w'\"])#[0-9A-Fa-f]{6}\b(?!['\"])", r'"\g<0>"', value)
    parsed = parse_yaml(value, source)
    if " #" in value and parsed == value.partition(" #")[0].strip():
        raise PolysegError(
            f"{source}: YAML ignores the text after #; put the value in double quotes inside "
            "the shell's quotes"
        )
    return parsed


def _read(file: Path) -> str:
    try:
        if file.exists() and not file.is_file():
            raise OSError(errno.EINVAL, "is not a file")
        with file.open(encoding="utf-8") as stream:
            return stream.read(LONGEST_YAML + 1)
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "is not a text file"
        raise PolysegError(f"{file}: cannot be read: {why}") from None


def _refuse_no_settings(tree: Any, source: str) -> None:
    if not isinstance(tree, dict):
        raise PolysegError(
            f"{source}: holds no settings; `polyseg config init` writes a file of all settings"
        )


def _set_key(tree: Any, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(tree, dict):
            break
        tree = tree.setdefault(section, {})
    if not isinstance(tree, dict):
        raise PolysegError(
            f"--set {key}: {'.'.join(sections)} is not a section of settings in the file"
        )
    tree[name] = value


def _describe(error: ValidationError) -> Iterator[str]:
    """Yield one problem for each setting; pydantic has one for each branch of a union."""
    settings = {setting["key"]: setting for setting in settings_of()}
    problems: dict[str, list[Any]] = {}
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        prefixes = (".".join(location[:end]) for end in range(len(location), 0, -1))
        key = next((prefix for prefix in prefixes if prefix in settings), ".".join(location))
        problems.setdefault(key, []).append(problem)
    for key, (first, *others) in problems.items():
        if first["type"] == "extra_forbidden":
            yield f"{key}: unknown key; {_nearest(key, settings)}"
        elif first["type"] == "value_error":
            message = first["msg"].removeprefix("Value error, ")
            yield f"{key}: {message}" if key in settings else message
        elif first["type"] == "literal_error" and not others and settings[key]["choices"]:
            yield f"{key}: {not_among(first['input'], settings[key]['choices'], 'choice')}"
        elif not others and (expected := _EXPECTED.get(first["type"].partition("_")[0])):
            yield f"{key}: must be {expected}, got {first['input']!r:.60}"
        elif others or first["type"].endswith("_type"):
            what = settings[key]["description"] if key in settings else first["msg"]
            yield f"{key}: {first['input']!r:.60} is not valid: {what}"
        else:
            message = (first["msg"][:1].lower() + first["msg"][1:]).replace("input should", "must")
            yield f"{key}: {message}, got {first['input']!r:.60}"


def _nearest(key: str, settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a hint at the setting that an unknown key may mean.

    That is one of the same name in another section, one of its section whose description has the
    name as a word (control.lambda: "lambda of eq. 12"), or one with a similar spelling.
    """
    section, _, name = key.rpartition(".")
    near = (
        [one for one in settings if one.rpartition(".")[2] == name]
        or [
            one
            for one, setting in settings.items()
            if one.startswith(section) and name.lower() in words_of(setting["description"])
        ]
        or difflib.get_close_matches(key, [*settings, *Config.model_fields], n=1, cutoff=0.6)
    )
    return f"did you mean {near[0]}?" if len(near) == 1 else "`polyseg config show` lists the keys"

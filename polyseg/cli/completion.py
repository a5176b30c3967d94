"""Shell completion of the names of settings, of their values, and of choices."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Offers = list[tuple[str, str]]
"""Words, each with a description, which bash does not show."""


def names(choices: Mapping[str, str] | Iterable[str]) -> Callable[[str], Offers]:
    """Return the completion of an option that takes one of some names.

    >>> names({"dice": "Dice loss", "bce": "cross-entropy"})("d")
    [('dice', 'Dice loss')]
    """
    texts = choices if isinstance(choices, Mapping) else dict.fromkeys(choices, "")

    def complete(incomplete: str) -> Offers:
        return [(name, text) for name, text in texts.items() if name.startswith(incomplete)]

    return complete


def setting(incomplete: str) -> Offers:
    """Complete `--set`: keys, or if only one fits, that key with its values or its default.

    >>> [word for word, _ in setting("control.sta")]
    ['control.start', 'control.statistics']
    >>> [word for word, _ in setting("control.stat")]
    ['control.statistics=batch', 'control.statistics=dataset']
    """
    from polyseg.config import settings_of

    key, equals, _ = incomplete.partition("=")
    found = [
        one
        for one in settings_of()
        if (one["key"] == key if equals else one["key"].startswith(key))
    ]
    if len(found) > 1:
        return [(one["key"], one["description"]) for one in found]
    return [(f"{one['key']}={value}", text) for one in found for value, text in _values(one)]


def _values(setting: Mapping[str, Any]) -> Offers:
    """Return the values that a setting can have, or its default if they are not listed."""
    if setting["choices"]:
        return list(setting["choices"].items())
    values = ("true", "false") if setting["default"] in ("true", "false") else [setting["default"]]
    return [(value, setting["description"]) for value in values]


def after_equals(environment: Mapping[str, str]) -> list[str] | None:
    """Return the values for `--set KEY=` in bash, which splits KEY=VALUE into three words.

    None if something else is completed.

    >>> words = {"COMP_WORDS": "polyseg train --set loss.name = d", "COMP_CWORD": "5"}
    >>> after_equals({"_POLYSEG_COMPLETE": "complete_bash", **words})
    ['dice', 'dice_bce']
    """
    if environment.get("_POLYSEG_COMPLETE") != "complete_bash":
        return None
    words = environment.get("COMP_WORDS", "").split()[: int(environment.get("COMP_CWORD", 0)) + 1]
    match words:
        case [*_, "--set", key, "="]:
            start = ""
        case [*_, "--set", key, "=", start]:
            pass
        case _:
            return None
    values = [word.partition("=")[2] for word, _ in setting(f"{key}=")]
    return [value for value in values if value.startswith(start)]

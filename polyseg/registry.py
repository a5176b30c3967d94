"""The table in which each kind of thing that can be chosen by name, or listed, has its rows."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar


@dataclass(frozen=True)
class Row:
    """One thing that can be chosen by its name."""

    name: str
    help: str
    """What it is, in a sentence without a full stop."""
    function: str = ""
    """Where its code is, as "module:name"; it is imported when it is first used."""

    def resolve(self) -> Any:
        """Return the function.

        >>> Row("root", "square root", "math:sqrt").resolve()(9.0)
        3.0
        """
        return resolve(self.function)


def resolve(place: str) -> Any:
    """Return what "module:name" names.

    >>> resolve("math:sqrt")(9.0)
    3.0
    """
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


R = TypeVar("R", bound=Row)


class Registry(dict[str, R]):
    """Rows by name, in the order in which they are listed.

    >>> roots = Registry("root", Row("square", "x^(1/2)", "math:sqrt"))
    >>> list(roots), roots.choices()
    (['square'], {'square': 'x^(1/2)'})
    >>> roots.find("sqare")
    Traceback (most recent call last):
    ValueError: 'sqare' is not a root: choose square; did you mean square?
    """

    def __init__(self, kind: str, *rows: R) -> None:
        super().__init__({row.name: row for row in rows})
        self.kind = kind
        """What a row is, as a noun."""

    def find(self, name: str) -> R:
        """Return the row of a name.

        Raises:
            ValueError: there is none; the message lists the names.
        """
        if name not in self:
            raise ValueError(not_among(name, self, self.kind))
        return self[name]

    def choices(self) -> dict[str, str]:
        """Return what each name means."""
        return {name: row.help for name, row in self.items()}


def not_among(value: object, names: Iterable[str], kind: str) -> str:
    """Return the message for a value that is none of some names, with the one that is nearest.

    Of names with help, the one whose help has the value as a word is nearest too.

    >>> not_among("dise", ["dice", "bce"], "loss")
    "'dise' is not a loss: choose dice or bce; did you mean dice?"
    >>> not_among("overlap", {"dice": "loss of overlap", "bce": "cross-entropy"}, "loss")
    "'overlap' is not a loss: choose dice or bce; did you mean dice?"
    """
    said = names.choices() if isinstance(names, Registry) else names
    helps = (
        {str(name): str(text) for name, text in said.items()} if isinstance(said, Mapping) else {}
    )
    names = list(names)
    article = "an" if kind[:1] in "aeiou" else "a"
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6) or [
        name for name, text in helps.items() if str(value).lower() in words_of(text)
    ]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{value!r:.60} is not {article} {kind}: choose {listed(names)}{hint}"


def words_of(text: str) -> set[str]:
    """Return the words of a text, in small letters.

    >>> sorted(words_of("lambda of eq. 12"))
    ['12', 'eq', 'lambda', 'of']
    """
    return set(re.findall(r"\w+", text.lower()))


def listed(names: Iterable[str]) -> str:
    """Return names as part of a sentence.

    >>> listed(["a", "b", "c"])
    'a, b or c'
    """
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last

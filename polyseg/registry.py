"""Registries: tables of the things that can be chosen by name."""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar


@dataclass(frozen=True)
class Row:
    """One entry of a registry."""

    name: str
    help: str
    """One sentence without a full stop."""
    function: str = ""
    """Function as "module:name", imported at first use."""

    def resolve(self) -> Any:
        """Return the function."""
        return resolve(self.function)


def resolve(place: str) -> Any:
    """Return the object named "package.module:name" or "path/to/file.py:name".

    >>> resolve("math:sqrt")(9.0)
    3.0
    """
    module, _, name = place.rpartition(":")
    return getattr(_import_file(module) if module.endswith(".py") else import_module(module), name)


@cache
def _import_file(path: str) -> ModuleType:
    """Import a Python file once, and return the module."""
    name = f"polyseg_own_{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ImportError(f"there is no file {path}")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_own(name: str) -> bool:
    """Return whether a name refers to a user's own code: "module:name" or "file.py:name".

    >>> is_own("my_loss.py:loss"), is_own("dice")
    (True, False)
    """
    module, colon, attribute = name.rpartition(":")
    return bool(module and colon) and attribute.isidentifier()


R = TypeVar("R", bound=Row)


class Registry(dict[str, R]):
    """Rows by name, in the order of listings.

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
        """Noun for a row, used in messages."""

    def find(self, name: str) -> R:
        """Return the row of a name, or raise ValueError with all names."""
        if name not in self:
            raise ValueError(not_among(name, self, self.kind))
        return self[name]

    def choices(self) -> dict[str, str]:
        """Return the help of each name."""
        return {name: row.help for name, row in self.items()}


def not_among(value: object, names: Iterable[str], kind: str) -> str:
    """Return the message for an unknown name, with the known names and the closest ones.

    One or two names whose help contains the value as a word come before similar names.

    >>> not_among("dise", ["dice", "bce"], "loss")
    "'dise' is not a loss: choose dice or bce; did you mean dice?"
    >>> not_among("overlap", {"dice": "loss of overlap", "bce": "cross-entropy"}, "loss")
    "'overlap' is not a loss: choose dice or bce; did you mean dice?"
    """
    helps = names.choices() if isinstance(names, Registry) else names
    article, names = "an" if kind[:1] in "aeiou" else "a", list(names)
    explained = helps.items() if isinstance(helps, Mapping) else ()
    near = [name for name, text in explained if str(value).lower() in words_of(text)]
    if len(near) not in (1, 2):
        near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    hint = f"; did you mean {listed(near)}?" if near else ""
    return f"{value!r:.60} is not {article} {kind}: choose {listed(names)}{hint}"


def words_of(text: str) -> set[str]:
    """Return the words of a text in lower case.

    >>> sorted(words_of("lambda of eq. 12"))
    ['12', 'eq', 'lambda', 'of']
    """
    return set(re.findall(r"\w+", text.lower()))


def listed(names: Iterable[str]) -> str:
    """Return names joined by commas and "or".

    >>> listed(["a", "b", "c"])
    'a, b or c'
    """
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last

"""Define the input of layouts: a path, the settings, and folders that are listed once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polyseg.data.layouts.cases import Folders, Unmasked, plain, some
from polyseg.errors import PolysegError

Names = str | Sequence[str] | None
"""Value of data.images or data.masks: a name or path, several, or none."""


@dataclass
class Source:
    """A path that may have a layout."""

    path: Path
    layout: str = "auto"
    images: tuple[str, ...] = ()
    """Names or paths of data.images."""
    masks: tuple[str, ...] = ()
    """Names or paths of data.masks."""
    unmasked: Unmasked = "refuse"
    folders: Folders = field(default_factory=Folders)
    problems: list[str] = field(default_factory=list)
    """Reasons why layouts were not recognised, for the error message."""

    @property
    def chosen(self) -> bool:
        """Whether the user chose this layout by name."""
        return self.layout != "auto"

    def settings(self) -> list[str]:
        """Return the values of data.images and data.masks as a user writes them.

        >>> Source(Path("."), masks=("a", "b")).settings()
        ['data.masks=[a, b]']
        """
        sides = (("images", self.images), ("masks", self.masks))
        return [
            f"data.{side}=" + (f"[{', '.join(names)}]" if names[1:] else repr(names[0]))
            for side, names in sides
            if names
        ]


def as_names(value: Names) -> tuple[str, ...]:
    """Return the names that a setting holds."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def several_sets(folder: Path, found: Sequence[Path]) -> PolysegError:
    """Return the error that a folder holds more than one data set."""
    names = some("data set", [f"{each.name}/" for each in found])
    return PolysegError(f"{folder}: holds {names}; give the path of one, such as {found[0]}")


def ambiguity(folder: Path, side: str, found: Sequence[str], what: str = "folders") -> PolysegError:
    """Return the error that several folders or files may hold the images or the masks."""
    name = min(found, key=lambda one: (plain(one), one)) if what != "folders" else found[0]
    return PolysegError(
        f"{folder}: several {what} may hold the {side} "
        f"({', '.join(f'{one}/' if what == 'folders' else one for one in found)}); name one by "
        f"data.{side}=NAME, such as data.{side}={name!r}"
    )

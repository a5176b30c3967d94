"""Find images of one patient by their folders and names (data.group=auto)."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonpath
from pathlib import Path

from polyseg.data.layouts.cases import Case, plain
from polyseg.data.layouts.names import IMAGE_FOLDERS, MASK_FOLDERS

_FEWEST_GROUPS = 3
_FEWEST_IMAGES = 2
"""Images that a group has on average, at least."""
_SHOWN = 3
_NUMBER = re.compile(r"\d+")
_NO_PATIENTS = re.compile(
    r"(fold|batch|part|set|site|grade|class|level|stage|type|version|v|vol|dataset)[ _-]*\d+$",
    re.IGNORECASE,
)
"""Names with a number that are hardly of a patient."""
_DATE = re.compile(r"(19|20)\d\d((0[1-9]|1[0-2])([0-2]\d|3[01]))?")


@dataclass(frozen=True)
class Guess:
    """A group for each case, by what it was found, and whether that is sure."""

    groups: list[str]
    by: str
    sure: bool

    def line(self, images: int) -> str:
        """Return what is found and which setting changes it.

        >>> Guess(["a1", "a2", "a3"] * 2, "the first number in their names", True).line(6)
        '6 images form 3 groups by the first number in their names (a1, a2, a3), each kept in one part of the split; data.group=none turns this off'
        """  # noqa: E501
        names = list(dict.fromkeys(self.groups))
        more = ", ..." if len(names) > _SHOWN else ""
        what = f"{len(names)} groups by {self.by} ({', '.join(names[:_SHOWN])}{more})"
        if self.sure:
            return (
                f"{images} images form {what}, each kept in one part of the split; "
                "data.group=none turns this off"
            )
        return (
            f"suspected: {images} images may form {what}, such as patients, and they are not kept "
            "together; data.group takes a regular expression that finds the group in a name, "
            "data.group=none ends this line"
        )


def with_groups(cases: Sequence[Case], split_given: bool) -> tuple[list[Case], Guess | None]:
    """Return cases with the groups that their folders and names tell surely, and the guess.

    Cases keep the groups that the data bring along. Where parts of a split are given, and a group
    would lie in two of them, nothing is changed.

    Args:
        cases: of a data set.
        split_given: whether a file gives the split, which is then left as it is.
    """
    if any(case.group for case in cases) or not cases:
        return list(cases), None
    guess = _by_folders(cases) or _by_names(cases)
    if guess is None:
        return list(cases), None
    parts: dict[str, set[str | None]] = {}
    for case, group in zip(cases, guess.groups, strict=True):
        parts.setdefault(group, set()).add(case.part)
    if split_given or any(len(found) > 1 for found in parts.values()):
        guess = replace(guess, sure=False)
    if not guess.sure:
        return list(cases), guess
    pairs = zip(cases, guess.groups, strict=True)
    return [replace(case, group=group) for case, group in pairs], guess


def _by_folders(cases: Sequence[Case]) -> Guess | None:
    """Group by the outermost folders below which images lie, if these have numbers."""
    places = [case.images[0].parent.parts for case in cases]
    above = len(Path(commonpath([Path(*place) for place in places])).parts)
    for depth in range(above, max(map(len, places))):
        named = [place[depth] if len(place) > depth else "" for place in places]
        keys = ["/".join(place[above : depth + 1]) for place in places]
        if not all(map(_NUMBER.search, named)) or not _are_groups(keys):
            continue
        names = [plain(name) for name in named]
        if not any(name in (*IMAGE_FOLDERS, *MASK_FOLDERS) for name in names):
            sure = not any(map(_NO_PATIENTS.match, named))
            return Guess(keys, "their folders", sure)
    return None


def _by_names(cases: Sequence[Case]) -> Guess | None:
    """Group by the first number that varies, where further numbers follow it in every name."""
    ids = [case.id for case in cases]
    numbers = [list(_NUMBER.finditer(name, name.rfind("/") + 1)) for name in ids]
    usual = Counter(map(len, numbers)).most_common(1)[0][0]
    whole = [n for n, found in enumerate(numbers) if len(found) == usual]
    # Hashes, such as cju0qkwl35piu0, have numbers too, but no two are built alike.
    shapes = Counter(_NUMBER.sub("#", ids[n]) for n in whole)
    alike = shapes.most_common(1)[0][1] > len(cases) / 2 or len(shapes) <= max(3, len(cases) / 20)
    if usual < 2 or not alike or len(whole) < len(cases) / 2:
        return None
    for place in range(usual - 1):
        keys = [
            ids[n][: found[place].end()] if n in set(whole) else ids[n]
            for n, found in enumerate(numbers)
        ]
        if len(set(keys)) == 1:
            continue
        if not _are_groups(keys):
            return None
        dated = all(_DATE.fullmatch(numbers[n][place][0]) for n in whole)
        odd = any(_NO_PATIENTS.search(keys[n]) for n in whole)
        sure = len(whole) == len(cases) and not dated and not odd
        return Guess(keys, "the first number in their names", sure)
    return None


def _are_groups(keys: Sequence[str]) -> bool:
    count = len(set(keys))
    return count >= _FEWEST_GROUPS and len(keys) >= _FEWEST_IMAGES * count

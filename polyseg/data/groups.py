"""Find the images of each patient by folders and names (data.group=auto)."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonpath
from pathlib import Path

from polyseg.data.layouts.cases import Case, part_of, plain
from polyseg.data.layouts.names import IMAGE_FOLDERS, MASK_FOLDERS

_FEWEST_GROUPS = 3
_SHOWN = 3
_NUMBER = re.compile(r"\d+")
_NO_PATIENTS = re.compile(
    r"(fold|batch|part|set|site|grade|class|level|stage|type|version|v|vol|dataset)[ _-]*\d+$",
    re.IGNORECASE,
)
"""Names with a number that probably do not name patients."""
_DATE = re.compile(r"(19|20)\d\d((0[1-9]|1[0-2])([0-2]\d|3[01]))?")


@dataclass(frozen=True)
class Guess:
    """A group for each case, its source, and whether it is certain."""

    groups: list[str]
    by: str
    sure: bool

    def line(self, images: int) -> str:
        """Return a line about the groups and the setting that changes them.

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
            "data.group=none removes this line"
        )


def with_groups(cases: Sequence[Case], split_given: bool) -> tuple[list[Case], Guess | None]:
    """Return cases with the groups that are certain from folders and names, and the guess.

    Groups in the data are kept. No group is added if a file gives the split, or if a group would be
    in two parts that the data give.
    """
    known = not cases or any(case.group for case in cases)
    guess = None if known else _by_folders(cases) or _by_names(cases)
    if guess is None:
        return list(cases), None
    pairs = {(group, case.part) for group, case in zip(guess.groups, cases, strict=True)}
    if split_given or len(pairs) > len(set(guess.groups)):
        guess = replace(guess, sure=False)
    if not guess.sure:
        return list(cases), guess
    grouped = zip(cases, guess.groups, strict=True)
    return [replace(case, group=group) for case, group in grouped], guess


def _by_folders(cases: Sequence[Case]) -> Guess | None:
    """Group by the outermost folders that contain images, if these have numbers."""
    places = [case.images[0].parent.parts for case in cases]
    above = len(Path(commonpath([Path(*place) for place in places])).parts)
    for depth in range(above, max(map(len, places))):
        named = [place[depth] if len(place) > depth else "" for place in places]
        keys = ["/".join(place[above : depth + 1]) for place in places]
        if not all(map(_NUMBER.search, named)) or not _are_groups(keys):
            continue
        if not any(map(_is_of_images, named)):
            sure = not any(map(_NO_PATIENTS.match, named))
            return Guess(keys, "their folders", sure)
    return None


def _is_of_images(name: str) -> bool:
    """Return whether a folder's name means images or a part of the split, not a patient."""
    words = [plain(name), *map(plain, re.split(r"[ _-]+", name))]
    return any(word in (*IMAGE_FOLDERS, *MASK_FOLDERS) or part_of(word) for word in words)


def _by_names(cases: Sequence[Case]) -> Guess | None:
    """Group by the first number that varies, if further numbers follow it in every name."""
    ids = [case.id for case in cases]
    numbers = [list(_NUMBER.finditer(name, name.rfind("/") + 1)) for name in ids]
    usual = Counter(map(len, numbers)).most_common(1)[0][0]
    whole = [n for n, found in enumerate(numbers) if len(found) == usual]
    # Hashes, such as cju0qkwl35piu0, have numbers too, but no two have the same form.
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
    """Return whether there are several groups, and at least half of the images share one."""
    sizes = Counter(keys).values()
    return len(sizes) >= _FEWEST_GROUPS and 2 * sum(n for n in sizes if n > 1) >= len(keys)

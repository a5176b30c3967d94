"""Define cases, and list the files and folders in which they are found."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from polyseg.data.formats.file_formats import is_dicom, suffix_of
from polyseg.errors import PolysegError, reason

LARGEST_SET = 1_000_000
"""Largest number of files and folders of a data set."""
DEEPEST = 4
"""Largest depth of a data set below the given path, in folders."""

Unmasked = Literal["refuse", "empty", "skip"]
"""Treatment of images without a mask: an error, a case without foreground, or no case."""

_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_JUNK = {
    *("__macosx", "thumbs.db", "desktop.ini", "dicomdir"),
    *("lost+found", "system volume information", "$recycle.bin"),
}
_DOCUMENTS = {
    *("", ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".xml", ".html", ".pdf", ".xls", ".xlsx"),
    *(".doc", ".docx", ".yaml", ".yml", ".ini", ".cfg", ".log", ".db", ".py", ".m", ".sh", ".zip"),
}
"""Suffixes of texts, tables and archives that data sets contain beside images."""
_VOXELS = re.compile(r"\.z?raw(\.gz|\.bz2)?$", re.IGNORECASE)
"""Suffixes of files that hold the voxels of a header (.mhd, .nhdr) beside them."""
_SHOWN = 5
_LINES = 20
_DEEPEST_SERIES = 3


@dataclass(frozen=True)
class Case:
    """The files of an image, or of a stack of slices, and of its masks."""

    id: str
    images: tuple[Path, ...]
    """One file, or several of one channel each; a folder holds the slices of one DICOM series."""
    masks: tuple[Path, ...] | None
    """Mask files, which the reader unites; () for an empty mask, None without a mask."""
    part: str | None = None
    """"train", "val" or "test" if the data set assigns a part, else None."""
    group: str | None = None
    """Name of the patient, if the data set gives it."""


@dataclass(frozen=True)
class Layout:
    """The cases of a data set, and how they were found."""

    name: str
    """Name of the layout, for messages."""
    cases: list[Case]
    """Cases in order of their ids, which are unique and printable."""
    labels: Mapping[str, int]
    """Names of label values if a dataset.json gives them, without the background."""
    notes: tuple[str, ...] = ()
    """Lines for the log."""
    problems: tuple[str, ...] = ()
    """Lines about wrong names and missing files; the content of files is checked later."""
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Label values of each task that the data set declares; empty if it declares none."""


@dataclass(frozen=True)
class Listing:
    """Readable files and sub-folders of a folder, and the names of entries that are left out."""

    files: tuple[Path, ...]
    folders: tuple[Path, ...]
    broken: tuple[str, ...] = ()
    """Links to missing files."""
    unread: tuple[str, ...] = ()
    """Files of unsupported formats, without texts and tables."""


class Folders:
    """List folders, each once, up to the number of files that a data set may have."""

    def __init__(self) -> None:
        self._known: dict[Path, Listing] = {}
        self._left = LARGEST_SET

    def list(self, folder: Path) -> Listing:
        """List the readable files and the sub-folders, without hidden ones and junk.

        A link to a folder that contains it is left out, so no path through folders is endless.

        Raises:
            PolysegError: it cannot be listed, a name is not valid text, or there are too many.
        """
        if folder not in self._known:
            self._known[folder] = self._read(folder)
        return self._known[folder]

    def files_below(self, folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
        """Yield the readable files of a folder, then those of its sub-folders up to a depth."""
        listing = self.list(folder)
        yield from listing.files
        for each in listing.folders if depth else ():
            yield from self.files_below(each, depth - 1)

    def series(self, folder: Path) -> Path | None:
        """Return the folder of a DICOM series, or None if `folder` holds anything else.

        The series may be in sub-folders (patient/study/series); if it has one slice, return that
        file.
        """
        for _ in range(_DEEPEST_SERIES):
            listing = self.list(folder)
            if listing.files or len(listing.folders) != 1:
                break
            folder = listing.folders[0]
        # No other format has these suffixes, or no suffix.
        named = all(suffix_of(file) in ("", ".dcm", ".ima") for file in listing.files)
        if not listing.files or listing.folders or not named:
            return None
        return folder if len(listing.files) > 1 else listing.files[0]

    def _read(self, folder: Path) -> Listing:
        files: list[str] = []
        folders: list[str] = []
        broken: list[str] = []
        unread: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._left -= 1
                    if self._left < 0:
                        raise PolysegError(
                            f"{folder}: over {LARGEST_SET:,} files and folders were found up to "
                            "here; give the folder of one data set"
                        )
                    if is_junk(entry.name):
                        continue
                    if exists(entry, "folder") and not _links_to_parent(entry):
                        folders.append(entry.name)
                    elif exists(entry, "file"):
                        readable = is_readable(folder / entry.name)
                        (files if readable else unread).append(entry.name)
                    elif entry.is_symlink() and not exists(entry, "folder"):
                        broken.append(entry.name)
        except (OSError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else error
            raise PolysegError(f"{shown(folder)}: cannot be listed: {why}") from None
        if odd := [name for name in (*files, *folders) if not name.isprintable()]:
            raise PolysegError(f"{shown(folder)}: {some('name', odd)} is not valid text; rename it")
        headers = {Path(name).stem for name in files if name.lower().endswith((".mhd", ".nhdr"))}
        others = sorted(
            name
            for name in unread
            if Path(name).suffix.lower() not in _DOCUMENTS
            and not (_VOXELS.search(name) and _VOXELS.sub("", name) in headers)
        )
        own, below = (tuple(folder / name for name in sorted(names)) for names in (files, folders))
        return Listing(own, below, tuple(sorted(broken)), tuple(others))


@dataclass
class Findings:
    """Cases, problems and notes while a layout is read."""

    unmasked: Unmasked = "refuse"
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _cases: list[tuple[str, Case]] = field(default_factory=list)

    def add(self, where: str, cases: Sequence[Case], prefix: str = "") -> None:
        """Add cases, and treat those without a mask by `unmasked`.

        The prefix precedes ids if two ids would be equal without it.

        >>> findings = Findings("empty")
        >>> findings.add("a/images", [Case("1", (Path("a/images/1.png"),), None)])
        >>> findings.finish("a", "images/ and masks/").cases[0].masks
        ()
        >>> findings.notes
        ['a/images: 1 image without a mask: taken as empty']
        """
        self._cases += [(prefix, case) for case in cases if case.masks is not None]
        cases = [case for case in cases if case.masks is None]
        if not cases:
            return
        what = f"{where}: {some('image', [case.images[0].name for case in cases])} without a mask"
        count = f"{where}: {counted(len(cases), 'image')} without a mask"
        if self.unmasked == "refuse":
            self.problems.append(
                f"{what}; add masks, or set data.unmasked=empty (no foreground) or =skip"
            )
        elif self.unmasked == "skip":
            self.notes.append(f"{count}: left out")
        else:
            self.notes.append(f"{count}: taken as empty")
            self._cases += [(prefix, replace(case, masks=())) for case in cases]

    def problem(self, where: str, noun: str, names: Iterable[str], what: str) -> None:
        """Add a problem with some files, if there are any, as one line."""
        if listed := list(names):
            self.problems.append(f"{where}: {some(noun, listed)} {what}")

    def finish(self, source: str, name: str, labels: Mapping[str, int] | None = None) -> Layout:
        """Return the layout that was found, with prefixes where ids would not be unique.

        Raises:
            PolysegError: no case was found.

        >>> findings = Findings()
        >>> findings.add("set", [Case("1", (Path("a/1.png"),), ())], "a")
        >>> findings.add("set", [Case("1", (Path("b/1.png"),), ())], "b")
        >>> [case.id for case in findings.finish("set", "classes").cases]
        ['a/1', 'b/1']
        """
        cases = [case for _, case in self._cases]
        if repeated(case.id for case in cases):
            cases = [
                replace(case, id=f"{prefix}/{case.id}") if prefix else case
                for prefix, case in self._cases
            ]
        twice = repeated(case.id for case in cases)
        self.problem(source, "id", twice, "belong to two images; rename one")
        if not cases:
            raise_problems(self.problems)
            raise PolysegError(f"{source}: has no image with a mask ({name})")
        cases.sort(key=lambda case: case.id)
        return Layout(name, cases, labels or {}, tuple(self.notes), tuple(self.problems))


def left_out(folders: Folders, places: Iterable[Path]) -> tuple[list[str], list[str]]:
    """Return notes on unreadable files of folders, or problems where most are unreadable."""
    notes: list[str] = []
    problems: list[str] = []
    for folder in sorted(set(places)):
        listing = folders.list(folder) if exists(folder, "folder") else Listing((), ())
        kinds = ", ".join(sorted({Path(name).suffix.lower() for name in listing.unread}))
        for names, noun, remedy in (
            (listing.broken, "broken link", "fetch the files, such as by `git annex get`"),
            (listing.unread, "file", f"their kinds are not read ({kinds})"),
        ):
            if names:
                most = len(names) > len(listing.files)
                what = f"{shown(folder)}: {some(noun, names)} left out; {remedy}"
                (problems if most else notes).append(what)
    more = len(notes) - _SHOWN
    if more > 1:
        notes[_SHOWN:] = [f"and {more} more folders hold files that are left out"]
    return notes, problems


def stem_of(path: Path) -> str:
    """Return a file's name without the suffix of its format, with letters in composed form.

    >>> [stem_of(Path(name)) for name in ("a.nii.gz", "b.c.PNG", "1.2.840")]
    ['a', 'b.c', '1.2.840']
    """
    name = unicodedata.normalize("NFC", path.name)
    return name[: len(name) - len(suffix_of(Path(name)))]


def is_readable(path: Path) -> bool:
    """Return whether a file can be read, by its name or else by its first bytes.

    >>> is_readable(Path("a.JPG")), is_readable(Path("notes.txt"))
    (True, False)
    """
    return bool(suffix_of(path)) or is_dicom(path)


def is_junk(name: str) -> bool:
    """Return whether an entry is hidden or created by an operating system.

    >>> is_junk("._1.png"), is_junk("__MACOSX"), is_junk("1.png")
    (True, True, False)
    """
    return name.startswith(".") or name.lower() in _JUNK


def exists(path: Path | os.DirEntry[str], kind: Literal["file", "folder"]) -> bool:
    """Return whether a file or folder exists; False if a path is too long or circular.

    >>> exists(Path("x" * 5000), "file")
    False
    """
    try:
        return path.is_file() if kind == "file" else path.is_dir()
    except (OSError, ValueError):
        return False


def plain(name: str) -> str:
    """Return a name in lower case without spaces, hyphens and underscores.

    >>> plain("Ground_Truth")
    'groundtruth'
    """
    return re.sub(r"[ _-]+", "", name.lower())


def part_of(name: str) -> str | None:
    """Return the part of the data that a name means.

    >>> [part_of(name) for name in ("Training", "valid", "TestDataset", "images")]
    ['train', 'val', 'test', None]
    """
    short = plain(name)
    return _PARTS.get(short) or _PARTS.get(re.sub(r"(dataset|data|set)$", "", short))


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, in order."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def shown(name: object) -> str:
    """Return a name for a message: short, with only printable characters.

    >>> shown("a" + chr(10))
    "'a\\\\n'"
    """
    kinds = {list: "a list", dict: "an object", type(None): "nothing"}
    text = kinds.get(type(name)) or str(name)
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return text if text.isprintable() else ascii(text)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def some(noun: str, names: Sequence[str]) -> str:
    """Return the number of names, and the first few of them.

    >>> some("mask", list("abcdefg"))
    '7 masks (a, b, c, d, e and 2 more)'
    """
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{counted(len(names), noun)} ({', '.join(map(shown, names[:_SHOWN]))}{more})"


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one error with a line for each problem, if there are any.

    >>> raise_problems(["a: is no image", "b: is no mask"])
    Traceback (most recent call last):
    polyseg.errors.PolysegError: a: is no image
    b: is no mask
    """
    if problems:
        more = [f"and {len(problems) - _LINES} more"] if len(problems) > _LINES else []
        raise PolysegError(*problems[:_LINES], *more)


def seen_in(folder: Path) -> str:
    """Return the names of a few entries of a folder, with a slash after folders."""
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry, _ in zip(entries, range(LARGEST_SET), strict=False):
                if not is_junk(entry.name):
                    names.append(f"{entry.name}/" if exists(entry, "folder") else entry.name)
    except (OSError, ValueError):
        return "nothing"
    # Folders identify a layout better than files.
    names.sort(key=lambda name: (not name.endswith("/"), name))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(map(shown, names[:_SHOWN]))}{more}" if names else "nothing"


def _links_to_parent(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return False
    target, here = Path(entry.path).resolve(), Path(entry.path).parent.resolve()
    return target == here or target in here.parents

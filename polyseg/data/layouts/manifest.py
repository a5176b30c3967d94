"""Data sets that are listed in a CSV file: image,mask[,split][,group][,id]."""

import csv
import difflib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polyseg.data.formats.file_formats import readable_suffixes
from polyseg.data.layouts.cases import (
    Case,
    Findings,
    Folders,
    Layout,
    Unmasked,
    exists,
    is_readable,
    part_of,
    raise_problems,
    repeated,
    shown,
    stem_of,
)
from polyseg.data.layouts.source import Source
from polyseg.errors import PolysegError, reason
from polyseg.system.files import read_text

MANIFEST_SUFFIXES = (".csv", ".tsv")

COLUMNS = ("image", "mask", "split", "group", "id")

_PATIENT_COLUMNS = {"patient", "patient_id", "subject", "subject_id", "case", "case_id"}
"""Names of columns that probably name the patient of an image."""

_LONGEST_ID = 200


@dataclass(frozen=True)
class _Row:
    line: int
    """Number of the line in which the row ends."""
    cells: dict[str, str]


def read_manifest(path: str | Path, unmasked: Unmasked = "refuse") -> Layout:
    """Read the cases that a CSV file lists, paths relative to its folder or absolute.

    Several masks of an image, or several files of one channel each, are separated by ";".
    Columns are separated by commas or tabs. An id that is not given is the image's stem, or its
    path as written where stems are not unique. `unmasked` is the treatment of images whose mask
    cell is empty.

    Raises:
        PolysegError: there are problems; one line for each.
    """
    path = Path(path)
    rows = list(_rows(path))
    findings = Findings(unmasked)
    folders = Folders()
    cases = _with_ids([_case(path, row, folders, findings) for row in rows], path.parent)
    _refuse_repeated_ids(path, cases, rows, findings)
    raise_problems(findings.problems)
    findings.add(str(path), cases)
    findings.notes += _notes_on_columns(path, list(rows[0].cells) if rows else [])
    return findings.finish(str(path), "CSV manifest")


def read_manifest_file(source: Source) -> Layout | None:
    """Read a CSV manifest, or return None for a folder."""
    return read_manifest(source.path, source.unmasked) if exists(source.path, "file") else None


def _rows(path: Path) -> Iterator[_Row]:
    lines = _lines(path)
    _, header = next(lines, (0, []))
    columns = [cell.strip().lower() for cell in header]
    _check_columns(path, columns)
    for line, cells in lines:
        stripped = [cell.strip() for cell in cells]
        if any(stripped[len(columns) :]):
            raise PolysegError(
                f"{path}: line {line} has {len(cells)} cells, the header {len(columns)}; write "
                'a cell with a comma in it as "a,b"'
            )
        if any(stripped):
            padded = [*stripped, *[""] * len(columns)]
            yield _Row(line, dict(zip(columns, padded, strict=False)))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        text = read_text(path).removeprefix("\ufeff")
    except OSError as error:
        raise PolysegError(f"{path}: cannot be read: {reason(error)}") from None
    except ValueError:
        raise PolysegError(f"{path}: is not a text file; save it as CSV in UTF-8") from None
    first = text[: text.find("\n")] if "\n" in text else text
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if "\t" in first and "," not in first else ","
    )
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise PolysegError(f"{path}: line {reader.line_num} is not CSV: {error}") from None


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    # Columns that resemble none of these are additional data, such as age, site, scanner.
    problems = [
        f"{path}: unknown column {shown(name)!r}; did you mean {near[0]}?"
        for name in columns
        if name not in COLUMNS
        and (near := difflib.get_close_matches(name[:50], COLUMNS, n=1, cutoff=0.78))
    ]
    if len(columns) == 1 and ";" in columns[0]:
        problems = [f"{path}: separate the columns by commas (or tabs), not by semicolons"]
    elif missing := [name for name in ("image", "mask") if name not in columns]:
        problems.append(
            f"{path}: has no column {' and no column '.join(missing)}; the first line names the "
            "columns: image,mask and optionally split, group and id"
        )
    problems.extend(f"{path}: two columns are called {shown(name)}" for name in repeated(columns))
    raise_problems(problems)


def _notes_on_columns(path: Path, columns: Sequence[str]) -> list[str]:
    """Return a line on each column that probably names patients, and one on the others not used.

    >>> _notes_on_columns(Path("a.csv"), ["image", "mask", "stain"])
    ['a.csv: columns that are not used: stain']
    """
    others = [name for name in columns if name not in COLUMNS]
    patients = [name for name in others if name in _PATIENT_COLUMNS and "group" not in columns]
    lines = [
        f"{path}: {name}: name the column group to keep the images of a {name.split('_')[0]} in "
        "one part of the split"
        for name in patients
    ]
    if rest := [shown(name) for name in others if name not in patients]:
        lines.append(f"{path}: columns that are not used: {', '.join(rest)}")
    return lines


def _case(path: Path, row: _Row, folders: Folders, findings: Findings) -> Case:
    def problem(text: str) -> None:
        findings.problems.append(f"{path}: line {row.line}: {text}")

    images, masks = (
        tuple(path.parent / part.strip() for part in row.cells[column].split(";") if part.strip())
        for column in ("image", "mask")
    )
    if not images:
        problem("names no image")
    if not (row.cells["image"] + row.cells["mask"]).isprintable():
        problem("a path is not valid text")
    for file in (*images, *masks):
        if what := _problem_with(file, folders):
            problem(f"{shown(file)}: {what}")
    split, group, own_id = (row.cells.get(name, "") for name in ("split", "group", "id"))
    part = part_of(split)
    if split and part is None:
        problem(f"split is {shown(split)}; expected train, val, test or nothing")
    if not group.isprintable():
        problem(f"group {shown(group)} is not valid text")
    if own_id and not _is_id(own_id):
        problem(
            f"id {shown(own_id)} cannot be used; give printable text of up to {_LONGEST_ID} "
            "characters, which neither begins nor ends with / nor holds .. between them"
        )
    return Case(own_id, images, masks or None, part, group or None)


def _problem_with(path: Path, folders: Folders) -> str | None:
    if exists(path, "folder"):
        try:
            return None if folders.series(path) else "is a folder, but holds no DICOM series"
        except PolysegError as error:
            return str(error)
    if not exists(path, "file"):
        return "there is no such file"
    if not is_readable(path):
        return f"is not a supported file ({' '.join(readable_suffixes())})"
    return None


def _is_id(text: str) -> bool:
    """Return whether a text can be an id, which as a file name must not leave its folder."""
    inside = not any(part.strip() in ("", ".", "..") for part in text.split("/"))
    return inside and len(text) <= _LONGEST_ID and text.isprintable()


def _with_ids(cases: Sequence[Case], folder: Path) -> list[Case]:
    ids = [case.id or _stem(case) for case in cases]
    if repeated(ids):
        ids = [case.id or _path_id(case, folder) for case in cases]
    return [replace(case, id=name) for case, name in zip(cases, ids, strict=True)]


def _stem(case: Case) -> str:
    if not case.images:
        return ""
    stem = stem_of(case.images[0])
    return re.sub(r"(?<=.)_\d{4}$", "", stem) if len(case.images) > 1 else stem


def _path_id(case: Case, folder: Path) -> str:
    if not case.images:
        return ""
    place, folder = (Path(os.path.normpath(one)) for one in (case.images[0].parent, folder))
    inside = place.relative_to(folder) if place.is_relative_to(folder) else place
    parts = [part for part in inside.parts if part not in ("..", inside.anchor)]
    return "/".join([*parts, _stem(case)])


def _refuse_repeated_ids(
    path: Path, cases: Sequence[Case], rows: Sequence[_Row], findings: Findings
) -> None:
    lines: dict[str, list[str]] = {}
    for case, row in zip(cases, rows, strict=True):
        if case.images:
            lines.setdefault(case.id, []).append(str(row.line))
    for name, places in lines.items():
        if len(places) > 1:
            findings.problems.append(
                f"{path}: lines {', '.join(places[:5])} have the same id {shown(name)}; "
                "list an image once, or give different ids in a column id"
            )

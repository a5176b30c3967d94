"""Durable files, their hashes, locks and names, and CSV without formulas."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from polyseg.errors import PolysegError, reason

log = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".partial-"
"""Start of the names of unfinished files; a killed process may leave one behind."""

_LARGEST_TEXT = 2**26
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
"""Start of a text that a spreadsheet would compute, after any number of apostrophes."""
_LOCKS_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Disk:
    """The operations on files that durable writing uses; tests replace it by one that fails."""

    def make_folder(self, folder: Path) -> None:
        """Make a folder and its parents, and flush their names to the disk."""
        missing = [one for one in (folder, *folder.parents) if not one.is_dir()]
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            self.flush(one.parent)

    def create(self, path: Path) -> Path:
        """Make an empty file beside `path`, with a temporary name and the suffix of `path`."""
        handle, name = tempfile.mkstemp(
            prefix=f"{TEMPORARY_PREFIX}{path.stem}.", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
        return Path(name)

    def flush(self, path: Path) -> None:
        """Wait until the bytes of a file, or the names in a folder, are on the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file atomically, replacing the target."""
        old.replace(new)

    def link(self, old: Path, new: Path) -> None:
        """Make a hard link; the new name must be free."""
        os.link(old, new)

    def remove(self, path: Path) -> None:
        """Remove a file if it exists."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """Remove a folder and its content if it exists, without following links in it."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


disk = Disk()
"""The disk that all durable writing uses."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` if the block succeeds.

    The bytes are flushed before the rename, and an error in the block leaves no file behind. The
    temporary name keeps the suffix, because some writers choose the format by it. A folder that
    cannot be written, or a full disk, raises PolysegError.
    """
    path = Path(path)
    try:
        disk.make_folder(path.parent)
        temporary = disk.create(path)
    except OSError as error:
        raise PolysegError(f"{path}: cannot be written: {reason(error)}") from error
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private.
        disk.flush(temporary)
        disk.rename(temporary, path)
        disk.flush(path.parent)
    except OSError as error:
        raise PolysegError(f"{path}: cannot be written: {reason(error)}") from error
    finally:
        disk.remove(temporary)


def keep_as(path: Path, older: Path) -> None:
    """Give a file that is about to be replaced a second name, atomically.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder) / "last", "first")
    ...     keep_as(Path(folder) / "last", Path(folder) / "previous")
    ...     write_text(Path(folder) / "last", "second")
    ...     (Path(folder) / "previous").read_text()
    'first'
    """
    if older.exists() and older.samefile(path):
        return  # rename() does nothing if both names are links to the same file.
    second = older.with_name(f"{TEMPORARY_PREFIX}{older.name}")
    try:
        disk.remove(second)
        disk.link(path, second)
        disk.rename(second, older)
    except OSError:
        # Some file systems have no hard links.
        with atomic_path(older) as temporary:
            shutil.copyfile(path, temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str:
    """Read a text file (UTF-8) of at most 64 MiB.

    A missing or larger file, or one that is not plain, such as a pipe, raises OSError.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError("is not a file")
    if path.stat().st_size > _LARGEST_TEXT:
        raise OSError(f"is over {_LARGEST_TEXT:,} bytes")
    return path.read_text(encoding="utf-8")


def csv_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV text without cells that a spreadsheet would compute.

    Text that starts with =, +, -, @, a tab or a line break gets an apostrophe before it unless it
    is a number; so does such text after apostrophes. `csv_rows` removes the added apostrophes.

    >>> print(csv_table(["id", "change"], [["=1+1", "-0.5"], ["a,b", -2]]), end="")
    id,change
    '=1+1,-0.5
    "a,b",-2
    """
    return "".join(map(_csv_line, (head, *rows)))


def _csv_line(row: Sequence[Any]) -> str:
    text = io.StringIO()
    # "\r\n" first, because csv quotes only the line break that it writes itself.
    csv.writer(text, lineterminator="\r\n").writerow([_no_formula(cell) for cell in row])
    return text.getvalue().removesuffix("\r\n") + "\n"


def csv_rows(text: str) -> list[list[str]]:
    """Return the non-empty rows of a text from `csv_table`, with the original cells.

    >>> csv_rows(csv_table(["id"], [["=1+1"], ["'=1+1"], ["-0.5"]]))
    [['id'], ['=1+1'], ["'=1+1"], ['-0.5']]
    """
    rows = csv.reader(io.StringIO(text, newline=""))
    return [
        [cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell for cell in row]
        for row in rows
        if row
    ]


def _no_formula(cell: Any) -> Any:
    if not isinstance(cell, str) or not _FORMULA.match(cell):
        return cell
    try:
        float(cell)
        return cell
    except ValueError:
        return f"'{cell}"


def sha256_of_file(path: str | Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive_lock(path: Path, *, owner: str) -> Iterator[None]:
    """Hold the lock file `path` of `owner` during the block; a killed process frees its lock."""
    try:
        # O_NOFOLLOW: a link in another user's folder may point anywhere.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise PolysegError(f"{path}: cannot be locked: {reason(error)}") from error
    try:
        lock(descriptor, path, owner=owner)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path, *, owner: str) -> None:
    """Lock an open file or folder until it is closed; warn where locks are not supported."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PolysegError(
            f"{owner} is being written by another process; wait for it to end or choose another "
            "--out"
        ) from error
    except OSError as error:
        if error.errno not in _LOCKS_UNSUPPORTED:
            raise PolysegError(f"{path}: cannot be locked: {reason(error)}") from error
        log.warning(
            "%s: its file system does not support locks (%s); make sure that no other process "
            "writes there",
            path.parent,
            error.strerror,
        )


def short_names(sources: Sequence[Path]) -> list[str]:
    """Return the shortest path endings that are distinct; PolysegError if a source is repeated.

    >>> short_names([Path("/runs/a/last.safetensors"), Path("/runs/b/last.safetensors")])
    ['a/last.safetensors', 'b/last.safetensors']
    """
    parts = [source.resolve().parts for source in sources]
    for source, place in zip(sources, parts, strict=True):
        if parts.count(place) > 1:
            raise PolysegError(f"{source}: is given twice")
    length = next(n for n in range(1, 9999) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-length:]) for part in parts]


def without_nan(value: Any) -> Any:
    """Return a value with None in place of NaN and infinity, which JSON does not have.

    >>> without_nan({"dice": [0.5, math.nan]})
    {'dice': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Durable files: whole or not at all, their hashes, one writer at a time; and names for them."""

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
"""How the names of files begin that are not whole yet; a killed process may leave one."""


_LARGEST_TEXT = 2**26
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
"""How text starts that a spreadsheet would compute, with any number of apostrophes before it."""
_KNOWS_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Disk:
    """What durable writing asks of the operating system, step by step.

    Tests put one in its place that fails at a step, or forgets what never reached the disk.
    """

    def make_folder(self, folder: Path) -> None:
        """Make a folder and what is above it, each of which reaches the disk with its name."""
        missing = [one for one in (folder, *folder.parents) if not one.is_dir()]
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            self.flush(one.parent)

    def create(self, path: Path) -> Path:
        """Make an empty file beside `path`, under a temporary name that keeps the suffix."""
        handle, name = tempfile.mkstemp(
            prefix=f"{TEMPORARY_PREFIX}{path.stem}.", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
        return Path(name)

    def flush(self, path: Path) -> None:
        """Return when the bytes of a file, or the names in a folder, have reached the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name, at once, in place of what had it."""
        old.replace(new)

    def link(self, old: Path, new: Path) -> None:
        """Give a file a second name that nothing has."""
        os.link(old, new)

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """Remove a folder with all that is in it, if it is there; links in it are not followed."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


disk = Disk()
"""The seam: all that is written durably goes through it."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path` when the block ends well.

    The bytes reach the disk before the name does, and an error in the block leaves neither a
    torn file nor a leftover. The temporary name keeps the suffix, for writers that go by it.

    Raises:
        PolysegError: the folder cannot be written, or the disk is full.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_path(Path(folder) / "table.csv") as temporary:
    ...         _ = temporary.write_text("id,dice")
    ...     (Path(folder) / "table.csv").read_text()
    'id,dice'
    """
    path = Path(path)
    try:
        disk.make_folder(path.parent)
        temporary = disk.create(path)
    except OSError as error:
        raise PolysegError(f"{path}: cannot be written: {reason(error)}") from error
    try:
        yield temporary
        _readable_by_umask(temporary)
        disk.flush(temporary)
        disk.rename(temporary, path)
        disk.flush(path.parent)
    except OSError as error:
        raise PolysegError(f"{path}: cannot be written: {reason(error)}") from error
    finally:
        disk.remove(temporary)


def keep_as(path: Path, older: Path) -> None:
    """Give a file that is about to be replaced another name too, whole or not at all.

    Raises:
        PolysegError: the folder cannot be written, or the disk is full.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder) / "last", "first")
    ...     keep_as(Path(folder) / "last", Path(folder) / "previous")
    ...     write_text(Path(folder) / "last", "second")
    ...     (Path(folder) / "previous").read_text()
    'first'
    """
    if older.exists() and older.samefile(path):
        return  # A rename between two names of one file would do nothing.
    second = older.with_name(f"{TEMPORARY_PREFIX}{older.name}")
    try:
        disk.remove(second)
        disk.link(path, second)
        disk.rename(second, older)
    except OSError:
        # Some file systems know no second names.
        with atomic_path(older) as temporary:
            shutil.copyfile(path, temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) whole or not at all.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder) / "note.txt", "done")
    ...     (Path(folder) / "note.txt").read_text()
    'done'
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str:
    """Read a text file (UTF-8) of any size that a run's own record may have.

    Raises:
        OSError: there is no such file, it is none, such as a pipe that nobody writes to, or it is
            larger than any record.
        ValueError: it is no text.

    >>> read_text(Path("/dev/zero"))
    Traceback (most recent call last):
    OSError: is no file
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError("is no file")
    if path.stat().st_size > _LARGEST_TEXT:
        raise OSError(f"is over {_LARGEST_TEXT:,} bytes")
    return path.read_text(encoding="utf-8")


def csv_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV text in which no cell is a formula to a spreadsheet.

    Text that starts with =, +, -, @, a tab or a line break gets an apostrophe before it, unless it
    is a number; so does text of that kind that has apostrophes before it already, so that
    `csv_rows` can tell both apart.

    >>> print(csv_table(["id", "change"], [["=1+1", "-0.5"], ["a,b", -2]]), end="")
    id,change
    '=1+1,-0.5
    "a,b",-2
    """
    return "".join(map(_csv_line, (head, *rows)))


def _csv_line(row: Sequence[Any]) -> str:
    text = io.StringIO()
    # Ended by both signs first, because the library quotes only those that end its lines.
    csv.writer(text, lineterminator="\r\n").writerow([_no_formula(cell) for cell in row])
    return text.getvalue().removesuffix("\r\n") + "\n"


def csv_rows(text: str) -> list[list[str]]:
    """Return the rows of a text that `csv_table` wrote, without empty ones, each cell as it was.

    Raises:
        csv.Error: it is no CSV.

    >>> csv_rows(csv_table(["id"], [["=1+1"], ["'=1+1"], ["-0.5"]]))
    [['id'], ['=1+1'], ["'=1+1"], ['-0.5']]
    """
    rows = csv.reader(io.StringIO(text, newline=""))
    return [[_as_it_was(cell) for cell in row] for row in rows if row]


def _as_it_was(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _no_formula(cell: Any) -> Any:
    if not isinstance(cell, str) or not _FORMULA.match(cell):
        return cell
    try:
        float(cell)
        return cell
    except ValueError:
        return f"'{cell}"


def sha256_of_file(path: str | Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder) / "empty", "")
    ...     sha256_of_file(Path(folder) / "empty")[:12]
    'e3b0c44298fc'
    """
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive_lock(path: Path, *, owner: str) -> Iterator[None]:
    """Hold the lock file `path` for the length of the block; a dead process holds none.

    Where the file system knows no locks, as some that are shared over a network, a warning says so.

    Raises:
        PolysegError: another process holds it; `owner` names what is in use.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with exclusive_lock(Path(folder) / ".lock", owner="this run"):
    ...         "one writer"
    'one writer'
    """
    try:
        # Not through a link, which may lead anywhere if the folder is somebody else's.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise PolysegError(f"{path}: cannot be locked: {reason(error)}") from error
    try:
        lock(descriptor, path, owner=owner)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path, *, owner: str) -> None:
    """Lock what is open, a file or a folder, until it is closed.

    Raises:
        PolysegError: another process holds it; `owner` names what is in use.

    >>> with tempfile.NamedTemporaryFile() as file:
    ...     lock(file.fileno(), Path(file.name), owner="this run")
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PolysegError(
            f"{owner} is being written by another process; wait for it to end or choose another "
            "--out"
        ) from error
    except OSError as error:
        if error.errno not in _KNOWS_NO_LOCKS:
            raise PolysegError(f"{path}: cannot be locked: {reason(error)}") from error
        log.warning(
            "%s: its file system knows no locks (%s); make sure yourself that no other process "
            "writes there",
            path.parent,
            error.strerror,
        )


def _readable_by_umask(path: Path) -> None:
    """Undo mkstemp's private mode: results are shared like any other file of the user."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def short_names(sources: Sequence[Path]) -> list[str]:
    """Return a short name for each source that tells it from the others.

    Raises:
        PolysegError: one is given twice.

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
    """Return the same with None for NaN and infinity, which JSON does not know.

    >>> without_nan({"dice": [0.5, math.nan]})
    {'dice': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

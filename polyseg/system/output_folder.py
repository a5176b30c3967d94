"""Folders of results: whole or not at all, one writer at a time, nothing lost in their place."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from polyseg.errors import PolysegError, reason
from polyseg.system import files
from polyseg.system.files import TEMPORARY_PREFIX

_ATTEMPTS = 20
"""To hold a folder that others give their names to meanwhile."""


@contextlib.contextmanager
def whole_folder(
    path: Path, *, overwrite: bool = False, known_by: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place when the block ends well.

    What ends the block early, an error or a signal, leaves nothing behind, and what was at `path`
    untouched. What a process that was killed has left is cleared by the next one that writes to
    `path`.

    Args:
        path: a new or empty folder.
        overwrite: a folder of former results may be replaced too.
        known_by: patterns of files, of which one shows that a folder holds such results.

    Raises:
        PolysegError: there is something at `path`, another process writes it, or it cannot be
            written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_folder(Path(folder) / "results") as temporary:
    ...         _ = (temporary / "note.txt").write_text("done")
    ...     (Path(folder) / "results" / "note.txt").read_text()
    'done'
    """
    with contextlib.ExitStack() as stack:
        with _told(path):
            _refuse_occupied(path, overwrite, known_by)
            place = Path(os.path.realpath(path))
            _refuse_immovable(place, path)
            temporary = place.with_name(f"{TEMPORARY_PREFIX}{place.name}")
            older = place.with_name(f"{temporary.name}.replaced")
            stack.enter_context(_held(temporary, path))
            _settle(place, older)
            stack.callback(_settle, place, older)
            _refuse_occupied(path, overwrite, known_by)
            _clear(temporary)
        try:
            yield temporary
        except PolysegError as error:
            lines = (str(line).replace(str(temporary), str(path)) for line in error.args)
            raise PolysegError(*lines) from error
        with _told(path):
            _refuse_occupied(path, overwrite, known_by)
            _put(temporary, place, older)


def moved(paths: Sequence[Path], old: Path, new: Path) -> list[Path]:
    """Return paths in a folder as they are once it has another name.

    >>> [str(path) for path in moved([Path(".partial-a/b")], Path(".partial-a"), Path("a"))]
    ['a/b']
    """
    return [new / path.relative_to(old) for path in paths]


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise if there is something where a file is to go; with `overwrite` a plain file may be.

    Raises:
        PolysegError: there is.

    >>> refuse_existing(Path("/dev/null"), overwrite=True)
    Traceback (most recent call last):
    polyseg.errors.PolysegError: /dev/null: is no plain file; choose another name
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise PolysegError(f"{path}: is no plain file; choose another name")
    if not overwrite:
        raise PolysegError(f"{path}: exists already; choose another name, or add --overwrite")


def refuse_existing_figure(path: Path, *, overwrite: bool) -> None:
    """Raise if there is something where a figure is to go; without suffix that is PNG and PDF.

    Raises:
        PolysegError: there is.
    """
    plain = bool(path.name) and not path.suffix
    for place in [path.with_suffix(".png"), path.with_suffix(".pdf")] if plain else [path]:
        refuse_existing(place, overwrite=overwrite)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Tell in one line what the operating system refuses."""
    try:
        yield
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        where = f" ({Path(error.filename).name})" if in_the_way and error.filename else ""
        raise PolysegError(f"{path}: cannot be written: {reason(error)}{where}") from error


def _is_occupied(place: Path) -> bool:
    return os.path.lexists(place) and (not place.is_dir() or any(place.iterdir()))


def _refuse_occupied(path: Path, overwrite: bool, known_by: Sequence[str]) -> None:
    """Raise if something is at `path` that must not be replaced."""
    if not _is_occupied(path):
        return
    if not path.is_dir():
        raise PolysegError(f"{path}: is no folder; choose another one")
    ours = any(next(path.glob(pattern), None) for pattern in known_by)
    kept = next((one for one in path.rglob("*") if _is_of_a_run(one)), None) if ours else None
    if not overwrite:
        hint = ", or add --overwrite" if ours and kept is None else ""
        raise PolysegError(
            f"{path}: is not empty and nothing is overwritten; choose another folder{hint}"
        )
    if not ours:
        raise PolysegError(
            f"{path}: was not left by this command (no {known_by[0]} in it), and --overwrite "
            "replaces nothing else; choose another folder"
        )
    if kept is not None:
        raise PolysegError(
            f"{path}: holds {kept.relative_to(path)}, and --overwrite removes no runs; choose "
            "another folder"
        )


def _is_of_a_run(path: Path) -> bool:
    return path.name == "checkpoints" or path.suffix == ".safetensors"


def _refuse_immovable(place: Path, path: Path) -> None:
    """Raise if no other folder can take this one's place."""
    if place.is_mount():
        raise PolysegError(f"{path}: is a mount point; give a new folder in it")
    if Path.cwd().is_relative_to(place):
        raise PolysegError(f"{path}: is, or holds, the working folder; choose another one")


@contextlib.contextmanager
def _held(temporary: Path, path: Path) -> Iterator[None]:
    """Hold the temporary folder alone; if it is still there in the end, it goes."""
    missing = [parent for parent in temporary.parents if not parent.exists()]
    try:
        with _locked(temporary, path) as descriptor:
            try:
                yield
            finally:
                if _is_at(descriptor, temporary):
                    files.disk.remove_folder(temporary)
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def _locked(temporary: Path, path: Path) -> Iterator[int]:
    """Yield the descriptor of a locked folder, made if it is not there."""
    for _ in range(_ATTEMPTS):
        descriptor = _open(temporary)
        try:
            files.lock(descriptor, temporary, owner=str(path))
            # Whoever held it before may have given it its final name meanwhile.
            if _is_at(descriptor, temporary):
                yield descriptor
                return
        finally:
            os.close(descriptor)
    raise PolysegError(f"{path}: cannot be written: other processes come and go; try again")


def _open(folder: Path) -> int:
    """Return the descriptor of a folder, made if it is not there; a link to one is none."""
    while True:
        files.disk.make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        with contextlib.suppress(FileNotFoundError):  # Another process has moved or removed it.
            return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.lstat())
    except FileNotFoundError:
        return False


def _clear(folder: Path) -> None:
    """Remove what a process that was killed has left in its temporary folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            files.disk.remove_folder(entry)
        else:
            files.disk.remove(entry)


def _put(temporary: Path, place: Path, older: Path) -> None:
    """Give the temporary folder its final name, once all that is in it has reached the disk."""
    for entry in sorted(temporary.rglob("*"), reverse=True):
        files.disk.flush(entry)
    if place.is_dir():
        shutil.copymode(place, temporary)
    files.disk.flush(temporary)
    if _is_occupied(place):
        files.disk.rename(place, older)
    files.disk.rename(temporary, place)
    files.disk.flush(place.parent)


def _settle(place: Path, older: Path) -> None:
    """Bring back what was moved aside, or remove it if its successor is in place."""
    try:
        older.lstat()
    except FileNotFoundError:
        return
    if _is_occupied(place):
        files.disk.remove_folder(older)
    else:
        files.disk.rename(older, place)

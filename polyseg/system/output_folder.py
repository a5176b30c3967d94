"""Folders of results that appear complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from polyseg.errors import PolysegError, reason
from polyseg.system import files
from polyseg.system.files import TEMPORARY_PREFIX


@contextlib.contextmanager
def whole_folder(
    path: Path, *, overwrite: bool = False, known_by: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `path` if the block succeeds.

    An error or a signal in the block removes it and leaves `path` as it was. The next process that
    writes to `path` removes the files that a killed process has left there.

    `path` must be new or empty. With `overwrite` it may also hold earlier results, which are
    recognised by a match of one of the patterns `known_by`. Otherwise, and while another process
    writes it, PolysegError is raised.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_folder(Path(folder) / "results") as temporary:
    ...         _ = (temporary / "note.txt").write_text("done")
    ...     (Path(folder) / "results" / "note.txt").read_text()
    'done'
    """
    with contextlib.ExitStack() as stack:
        with _explaining_os_errors(path):
            _refuse_occupied(path, overwrite, known_by)
            place = Path(os.path.realpath(path))
            _refuse_immovable(place, path)
            temporary = place.with_name(f"{TEMPORARY_PREFIX}{place.name}")
            older = place.with_name(f"{temporary.name}.replaced")
            new = [parent for parent in temporary.parents if not parent.exists()]
            stack.callback(_remove_empty, new)
            stack.callback(os.close, _locked(temporary, path))

        @stack.push
        def remove_on_error(kind: type[BaseException] | None, *_: object) -> None:
            if kind is not None:
                files.disk.remove_folder(temporary)

        with _explaining_os_errors(path):
            _restore(place, older)
            stack.callback(_restore, place, older)
            _refuse_occupied(path, overwrite, known_by)
            _clear(temporary)
        try:
            yield temporary
        except PolysegError as error:
            lines = (str(line).replace(str(temporary), str(path)) for line in error.args)
            raise PolysegError(*lines) from error
        with _explaining_os_errors(path):
            _refuse_occupied(path, overwrite, known_by)
            _publish(temporary, place, older)


def moved(paths: Sequence[Path], old: Path, new: Path) -> list[Path]:
    """Return the paths of files in a folder after the folder is renamed."""
    return [new / path.relative_to(old) for path in paths]


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise if a file cannot go to `path`, because something is there."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise PolysegError(f"{path}: is not a plain file; choose another name")
    if not overwrite:
        raise PolysegError(f"{path}: exists already; choose another name, or add --overwrite")


def refuse_existing_figure(path: Path, *, overwrite: bool) -> None:
    """Raise if a figure cannot go to `path`; without a suffix it is written as PNG and PDF."""
    plain = bool(path.name) and not path.suffix
    for place in [path.with_suffix(".png"), path.with_suffix(".pdf")] if plain else [path]:
        refuse_existing(place, overwrite=overwrite)


@contextlib.contextmanager
def _explaining_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a PolysegError."""
    try:
        yield
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        where = f" ({Path(error.filename).name})" if in_the_way and error.filename else ""
        raise PolysegError(f"{path}: cannot be written: {reason(error)}{where}") from error


def _is_occupied(place: Path) -> bool:
    return os.path.lexists(place) and (not place.is_dir() or any(place.iterdir()))


def _refuse_occupied(path: Path, overwrite: bool, known_by: Sequence[str]) -> None:
    """Raise if `path` holds something that must not be replaced."""
    if not _is_occupied(path):
        return
    if not path.is_dir():
        raise PolysegError(f"{path}: is not a folder; choose another one")
    ours = any(next(path.glob(pattern), None) for pattern in known_by)
    of_run = (
        one for one in path.rglob("*") if one.name == "checkpoints" or one.suffix == ".safetensors"
    )
    kept = next(of_run, None) if ours else None
    if not overwrite:
        hint = ", or add --overwrite" if ours and kept is None else ""
        raise PolysegError(
            f"{path}: is not empty, and nothing is overwritten; choose another folder{hint}"
        )
    if not ours:
        raise PolysegError(
            f"{path}: has no {known_by[0]}, so this command did not write it, and --overwrite "
            "replaces nothing else; choose another folder"
        )
    if kept is not None:
        raise PolysegError(
            f"{path}: contains {kept.relative_to(path)}, and --overwrite removes no runs; choose "
            "another folder"
        )


def _refuse_immovable(place: Path, path: Path) -> None:
    """Raise if no other folder can be renamed to this one."""
    if place.is_mount():
        raise PolysegError(f"{path}: is a mount point; give a new folder in it")
    if Path.cwd().is_relative_to(place):
        raise PolysegError(f"{path}: is or contains the working folder; choose another one")


def _locked(temporary: Path, path: Path) -> int:
    """Make the temporary folder if it does not exist, and return its locked descriptor."""
    files.disk.make_folder(temporary.parent)
    with contextlib.suppress(FileExistsError):
        temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        files.lock(descriptor, temporary, owner=str(path))
    except PolysegError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _clear(folder: Path) -> None:
    """Remove the files that a killed process has left in its temporary folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            files.disk.remove_folder(entry)
        else:
            files.disk.remove(entry)


def _publish(temporary: Path, place: Path, older: Path) -> None:
    """Rename the temporary folder once all files in it are on the disk."""
    for entry in sorted(temporary.rglob("*"), reverse=True):
        files.disk.flush(entry)
    if place.is_dir():
        shutil.copymode(place, temporary)
    files.disk.flush(temporary)
    if _is_occupied(place):
        files.disk.rename(place, older)
    files.disk.rename(temporary, place)
    files.disk.flush(place.parent)


def _restore(place: Path, older: Path) -> None:
    """Undo an interrupted replacement, or remove the replaced folder."""
    if os.path.lexists(older):
        if _is_occupied(place):
            files.disk.remove_folder(older)
        else:
            files.disk.rename(older, place)

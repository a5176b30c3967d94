"""Files of decoded images: their folder, their key, and the removal of unused ones."""

import contextlib
import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from polyseg import __version__
from polyseg.config import DataConfig
from polyseg.data.dataset import Item
from polyseg.data.formats.file_formats import FORMATS, format_of
from polyseg.data.layouts.cases import Case
from polyseg.data.pixel_store import Shape, index_of
from polyseg.errors import PolysegError
from polyseg.registry import resolve
from polyseg.system.files import TEMPORARY_PREFIX, sha256_of_file

log = logging.getLogger(__name__)

_DECISIVE = ("size", "fit", "plane", "orientation", "channels", "normalise", "window")
"""Settings that the stored pixels depend on."""
_SCHEMA = 2
"""Version of decoded images, raised when the same files and settings give another content."""
_STALE_SECONDS = 24 * 3600
_NAME = re.compile(r"[0-9a-f]{64}\.images")
_UNUSED_DAYS = 30
"""Age after which unused decoded images are removed, in days; they can be made again."""
MEGABYTE = 10**6


@functools.cache
def _item_type() -> TypeAdapter[Item]:
    # Building it takes longer than many commands run.
    return TypeAdapter(Item)


def cache_folder(config: DataConfig) -> Path:
    """Return the folder for decoded images.

    Raises:
        PolysegError: there is no home folder, and no other is set.
    """
    try:
        return Path(config.cache or "~/.cache/polyseg").expanduser()
    except RuntimeError:
        raise PolysegError(
            "data.cache: there is no home folder; set data.cache to a folder for decoded images"
        ) from None


def cache_key(cases: Sequence[Case], config: DataConfig) -> str:
    """Return the sha256 of everything that the stored pixels depend on."""
    settings = [getattr(config, name) for name in _DECISIVE]
    # As a list, because the order of the labels is that of the channels.
    tasks = list(config.tasks.items())
    versions = [(name, _version(name)) for row in FORMATS.values() for name in row.libraries]
    about = [_SCHEMA, settings, tasks, versions, __version__]
    digest = hashlib.sha256(json.dumps(about).encode())
    for case in cases:
        files = [[_content(path) for path in paths] for paths in (case.images, case.masks or ())]
        about = [case.id, case.part, case.group, case.masks is None, *files]
        digest.update(json.dumps(about).encode())
    return digest.hexdigest()


def _content(path: Path) -> list[str]:
    """Return the hashes of a file and its voxels, or of all files of a folder with a series."""
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    kind = format_of(path)
    if kind is not None and kind.voxels:
        files = list(dict.fromkeys([path, resolve(kind.voxels)(path)]))
    return [f"{one.name} {sha256_of_file(one)}" for one in files]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def remove_stale(folder: Path) -> None:
    """Remove incomplete files of killed runs, which have not been changed for a day."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def remove_unused(folder: Path, *, keep: Path) -> None:
    """Remove only files of decoded images that no run has used for 30 days.

    A process that still reads one has it open, and can continue.
    """
    freed = 0
    for path in folder.glob("*.images"):
        index = index_of(path)
        with contextlib.suppress(OSError):
            used = (index if index.is_file() else path).stat().st_mtime
            ours = _NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink()
            if ours and path != keep and time.time() - used > _UNUSED_DAYS * 24 * 3600:
                freed += path.stat().st_size
                index.unlink(missing_ok=True)
                path.unlink()
    if freed:
        what = f"{freed / MEGABYTE:.0f} MB of decoded images"
        log.info("%s: removed %s that were not used for %d days", folder, what, _UNUSED_DAYS)


def item_from_row(row: tuple[dict[str, Any], Shape], path: Path) -> Item:
    """Return an item from its row in the index of decoded images."""
    about, shape = row
    try:
        item = _item_type().validate_python(about)
        masks = 0 if item.shares is None else len(item.shares)
        described = (*item.size, item.channels, masks)
        if described != (shape.height, shape.width, shape.channels, shape.masks):
            raise ValueError("sizes differ")
        if len(bytes.fromhex(item.likeness.near)) not in (0, 32):
            raise ValueError("a hash has another length")
        return item
    except ValueError as error:
        why = " ".join(str(error).split())[:120]
        raise PolysegError(
            f"{index_of(path)}: is damaged ({why}); remove it, and it will be made again"
        ) from None

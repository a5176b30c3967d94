"""Finding images and their masks in a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polyseg.errors import PolysegError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

_SHOWN = 5


@dataclass(frozen=True)
class Pair:
    """An image and where its mask is, if it has one."""

    id: str
    image: Path
    mask: Path | None


def find_pairs(folder: Path) -> list[Pair]:
    """Find the images of `folder`/images and the masks of equal stem in `folder`/masks.

    Returns:
        Pairs in order of their ids, which are the stems.

    Raises:
        PolysegError: the layout is another, or images and masks do not match: all misfits named.

    >>> find_pairs(Path("nowhere"))
    Traceback (most recent call last):
    polyseg.errors.PolysegError: nowhere: there is no such folder
    """
    _require_folder(folder)
    missing = [name for name in ("images", "masks") if not (folder / name).is_dir()]
    if missing:
        seen = sorted(entry.name for entry in folder.iterdir())[:_SHOWN]
        raise PolysegError(
            f"{folder}: has no folder {' and no folder '.join(missing)} (it holds "
            f"{', '.join(seen) or 'nothing'}); expected images/ and masks/ with equal stems"
        )
    images, masks = _by_stem(folder / "images"), _by_stem(folder / "masks")
    problems = [
        _list_some("without a mask", sorted(images.keys() - masks.keys())),
        _list_some("without an image", sorted(masks.keys() - images.keys())),
    ]
    if any(problems):
        raise PolysegError(
            f"{folder}: {'; '.join(filter(None, problems))}; every image needs a mask of equal stem"
        )
    if not images:
        raise PolysegError(f"{folder}/images: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return [Pair(stem, images[stem], masks[stem]) for stem in sorted(images)]


def find_images(folder: Path) -> list[Pair]:
    """Find images without asking for masks: those of `folder`/images, or of `folder` itself.

    Raises:
        PolysegError: there are none.
    """
    _require_folder(folder)
    source = folder / "images" if (folder / "images").is_dir() else folder
    images = _by_stem(source)
    if not images:
        raise PolysegError(f"{source}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return [Pair(stem, images[stem], None) for stem in sorted(images)]


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "there is no such folder"
        raise PolysegError(f"{folder}: {what}")


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if not path.name.isprintable():
            raise PolysegError(f"{folder}: the name {path.name!r} is no text; rename that file")
        if path.stem in found:
            raise PolysegError(
                f"{path}: has the same stem as {found[path.stem].name}; stems are the images' ids"
            )
        found[path.stem] = path
    return found


def _list_some(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"

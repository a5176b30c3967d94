"""The HDF5 files: one an assessment, written once and whole, and the schedule of epsilons.

Layout of an assessment of n images: attributes for what was measured how; `id` (n) strings, and
`label` (n) where each image has several rows, one a label;
`difficulty`, `dice`, and where the statistics are the data set's `epsilon` (n) float64;
`scores/NAME` and `scores_se/NAME` (n) float64; `foreground_pixels` and, with masks, `mask_pixels`
(n) int64; `fallback` (n) int8; `maps/NAME` (n, H, W) float16, where kept. D is raw, before eq. 11,
so that eq. 11 and 12 can be computed anew. Layout of a schedule: `id` (n), `epoch` (E), `epsilon`
(E, n) float32, `assessed` (E) int64, where it is known.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

import h5py
import numpy as np
from numpy.typing import NDArray

from polyseg.difficulty import FALLBACKS
from polyseg.errors import PolysegError
from polyseg.files import atomic_path, sha256_of_file
from polyseg.records import MAPS, METRICS, Assessment, Metric, Schedule

SCHEMA = 1
"""Raised when a file's layout changes so that an older reader would misread it."""

_ASSESSMENT = "polyseg assessment"
_SCHEDULE = "polyseg schedule"
_MOST_IMAGES = 10_000_000
_NAMES_AT_ONCE = 64
_LONGEST_NAME = 4096
_LARGEST_SCORE = 1e30
_MOST_PIXELS = 2**26


def write_assessment(path: Path, assessment: Assessment) -> str:
    """Write an assessment file whole or not at all, and return its sha256.

    Raises:
        PolysegError: the file cannot be written, or maps differ in size.
    """
    with _writing(path, _ASSESSMENT) as file:
        file.attrs.update(
            {
                "epoch": assessment.epoch,
                "samples": assessment.samples,
                "rate": assessment.rate,
                "metric": assessment.metric,
                "region": assessment.region,
                "masks": assessment.masks,
                "seed": assessment.seed,
                "weights_sha256": assessment.weights_sha256,
            }
        )
        # A dataset, because an attribute holds no more than 64 KiB.
        file.create_dataset("config", data=assessment.config_yaml, dtype=h5py.string_dtype())
        _write_rows(file, assessment.ids, assessment.labels)
        file["difficulty"] = assessment.difficulty
        for name, values in assessment.scores.items():
            file[f"scores/{name}"] = values
            if name in assessment.rank_stability:
                file[f"scores/{name}"].attrs["rank_stability"] = assessment.rank_stability[name]
        for name, values in assessment.scores_se.items():
            file[f"scores_se/{name}"] = values
        for column in ("foreground_pixels", "fallback", "dice"):
            file[column] = getattr(assessment, column)
        for column in ("mask_pixels", "epsilon"):
            if getattr(assessment, column) is not None:
                file[column] = getattr(assessment, column)
        for map_name, maps in assessment.maps.items():
            _write_maps(file, map_name, maps)
    return sha256_of_file(path)


def read_assessment(
    path: Path, *, sha256: str | None = None, with_maps: bool = False
) -> Assessment:
    """Read an assessment file.

    Args:
        path: the file.
        sha256: what its hash must be, where it is known.
        with_maps: read the pixel maps too.

    Raises:
        PolysegError: the file is missing, damaged, of a newer layout or something else.
    """
    with _reading(path, _ASSESSMENT, sha256) as file:
        ids, labels = _rows(file)
        n = len(ids)
        return Assessment(
            **_attributes(file),
            ids=ids,
            labels=labels,
            scores=_columns(file, "scores", n),
            scores_se=_columns(file, "scores_se", n),
            rank_stability=_rank_stability(file),
            foreground_pixels=_column(file, "foreground_pixels", n, "i8"),
            fallback=_within(_column(file, "fallback", n, "i1"), 0, len(FALLBACKS) - 1),
            dice=_within(_column(file, "dice", n, "f8"), 0, 1, or_nan=True),
            mask_pixels=_optional(file, "mask_pixels", n, "i8"),
            epsilon=_optional(file, "epsilon", n, "f8"),
            maps=_read_maps(file, n) if with_maps and _has(file, "maps") else {},
            config_yaml=_text(file, "config"),
        )


def write_schedule(path: Path, schedule: Schedule) -> str:
    """Write a schedule file whole or not at all, and return its sha256.

    Raises:
        PolysegError: the file cannot be written.
    """
    with _writing(path, _SCHEDULE) as file:
        _write_rows(file, schedule.ids, schedule.labels)
        file["epoch"] = schedule.epochs.astype(np.int64)
        file["epsilon"] = schedule.epsilon.astype(np.float32)
        if schedule.assessed is not None:
            file["assessed"] = schedule.assessed.astype(np.int64)
    return sha256_of_file(path)


def read_schedule(path: Path, *, sha256: str | None = None) -> Schedule:
    """Read a schedule file.

    Raises:
        PolysegError: the file is missing, damaged, of a newer layout or something else.
    """
    with _reading(path, _SCHEDULE, sha256) as file:
        ids, labels = _rows(file)
        epochs = _dataset(file, "epoch")
        if epochs.ndim != 1 or epochs.dtype != np.int64:
            raise ValueError("epoch must be (E) int64")
        epsilon = _dataset(file, "epsilon")
        if epsilon.shape != (*epochs.shape, len(ids)) or epsilon.dtype != np.float32:
            raise ValueError("epsilon must be (E, n) float32")
        return Schedule(
            ids,
            epochs[()],
            epsilon[()],
            labels,
            _optional(file, "assessed", len(epochs), "i8"),
        )


@contextlib.contextmanager
def _writing(path: Path, kind: str) -> Iterator[Any]:
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["kind"] = kind
        file.attrs["schema"] = SCHEMA
        yield file


@contextlib.contextmanager
def _reading(path: Path, kind: str, sha256: str | None) -> Iterator[Any]:
    """Yield the open file once it is known to be what it should be; any misfit is one line."""
    if not path.is_file():
        raise PolysegError(f"{path}: there is no such file")
    if sha256 is not None and sha256_of_file(path) != sha256:
        raise PolysegError(
            f"{path}: is not the file that the run recorded (its sha256 differs); it was damaged "
            "or replaced"
        )
    try:
        # No lock: files are never changed once they have their name.
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("kind") != kind:
                raise ValueError(f"is no {kind} file")
            if file.attrs["schema"] > SCHEMA:
                raise ValueError(
                    f"has layout {file.attrs['schema']}, newer than {SCHEMA}; update polyseg"
                )
            yield file
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PolysegError(f"{path}: cannot be read as a {kind}: {reason}") from error


def _has(file: Any, name: str) -> bool:
    """Return whether the file itself holds something of that name; a link is not followed."""
    group = file
    for part in name.split("/"):
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        if link is not None and not isinstance(link, h5py.HardLink):
            raise ValueError(f"{name} is a link")
        if link is None:
            return False
        group = group[part]
    return True


def _dataset(file: Any, name: str) -> Any:
    """Return a dataset whose bytes lie in this file: links, external and virtual ones are not."""
    if not _has(file, name):
        raise ValueError(f"{name} is missing")
    group = file[name]
    if not isinstance(group, h5py.Dataset) or group.is_virtual or group.external:
        raise ValueError(f"{name} is not a plain dataset")
    if not name.startswith("maps/") and group.id.get_storage_size() < group.nbytes:
        # Only maps are compressed; elsewhere a shape cannot promise more than the file holds.
        raise ValueError(f"{name} is of shape {group.shape} but its values are not there")
    return group


def _rows(file: Any) -> tuple[list[str], list[str] | None]:
    """Return the image of each row, and its label where images have several rows."""
    ids = _names(_dataset(file, "id"))
    labels = _names(_dataset(file, "label")) if _has(file, "label") else None
    each = list(dict.fromkeys(labels or [""]))
    images = ids[:: len(each)]
    if len(set(images)) < len(images) or ids != [one for one in images for _ in each]:
        raise ValueError("id must name each image once, or once a label")
    if labels is not None and labels != each * len(images):
        raise ValueError("label must repeat the same labels for each image")
    return ids, labels


def _names(dataset: Any) -> list[str]:
    """Return what can be names: text of a line, and in all no longer than the file.

    Many rows of a file may refer to one long string.
    """
    if dataset.ndim != 1 or not 0 < dataset.size <= _MOST_IMAGES:
        raise ValueError(f"{dataset.name} must be (n) strings")
    left = Path(dataset.file.filename).stat().st_size
    names: list[str] = []
    for start in range(0, dataset.size, _NAMES_AT_ONCE):
        part = [str(name) for name in dataset.asstr()[start : start + _NAMES_AT_ONCE]]
        left -= sum(map(len, part))
        if left < 0 or any(not name.isprintable() or len(name) > _LONGEST_NAME for name in part):
            raise ValueError(f"{dataset.name} holds what is no name")
        names += part
    return names


def _text(file: Any, name: str) -> str:
    dataset = _dataset(file, name)
    if dataset.shape != ():
        raise ValueError(f"{name} must be one string")
    return str(dataset.asstr()[()])


def _attributes(file: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: file.attrs[name].item() for name in ("epoch", "samples", "rate", "seed")
    }
    found |= {name: str(file.attrs[name]) for name in ("metric", "region", "masks")}
    if not (isinstance(found["epoch"], int) and found["epoch"] >= 0):
        raise ValueError(f"epoch {found['epoch']} is none")
    if found["metric"] not in get_args(Metric) or not _has(file, f"scores/{found['metric']}"):
        raise ValueError(f"metric {found['metric']!r} is unknown, or has no scores")
    return found | {"weights_sha256": str(file.attrs["weights_sha256"])}


def _rank_stability(file: Any) -> dict[Metric, float]:
    attributes = {
        name: file[f"scores/{name}"].attrs for name in METRICS if _has(file, f"scores/{name}")
    }
    return {
        name: float(held["rank_stability"])
        for name, held in attributes.items()
        if "rank_stability" in held
    }


def _write_rows(file: Any, ids: list[str], labels: list[str] | None) -> None:
    file.create_dataset("id", data=ids, dtype=h5py.string_dtype())
    if labels is not None:
        file.create_dataset("label", data=labels, dtype=h5py.string_dtype())


def _column(file: Any, name: str, n: int, dtype: str) -> NDArray[Any]:
    dataset = _dataset(file, name)
    if dataset.shape != (n,) or dataset.dtype != np.dtype(dtype):
        raise ValueError(f"{name} must be ({n}) {np.dtype(dtype)}")
    return cast(NDArray[Any], dataset[()])


def _optional(file: Any, name: str, n: int, dtype: str) -> NDArray[Any] | None:
    return _finite(_column(file, name, n, dtype)) if _has(file, name) else None


def _within(values: NDArray[Any], low: float, high: float, *, or_nan: bool = False) -> NDArray[Any]:
    good = (values >= low) & (values <= high)
    if not (good | np.isnan(values) if or_nan else good).all():
        raise ValueError(f"values must lie in {low} to {high}")
    return values


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    if not (np.abs(values) < _LARGEST_SCORE).all():
        raise ValueError("values must be finite")
    return values


def _columns(file: Any, group: str, n: int) -> dict[Metric, NDArray[np.float64]]:
    return {
        name: _finite(_column(file, f"{group}/{name}", n, "f8"))
        for name in get_args(Metric)
        if _has(file, f"{group}/{name}")
    }


def _write_maps(file: Any, name: str, maps: list[NDArray[np.floating]]) -> None:
    if len({one.shape for one in maps}) > 1:
        raise PolysegError(
            "uncertainty.save_maps: images differ in size; set data.size to keep their maps"
        )
    stack = np.stack([one.astype(np.float16) for one in maps])
    file.create_dataset(
        f"maps/{name}",
        data=stack,
        chunks=(1, *stack.shape[1:]),
        compression="gzip",
        shuffle=True,
        fletcher32=True,
    )


def _read_maps(file: Any, n: int) -> dict[str, list[NDArray[np.floating]]]:
    maps = {}
    for name in MAPS:
        dataset = _dataset(file, f"maps/{name}")
        plausible = dataset.ndim == 3 and np.prod(dataset.shape[1:], dtype=float) <= _MOST_PIXELS
        if not plausible or len(dataset) != n or dataset.dtype != np.float16:
            raise ValueError(f"maps/{name} must be ({n}, H, W) float16")
        maps[name] = [dataset[i] for i in range(n)]
    return maps

"""The HDF5 files of a run: one for each assessment, and one for the schedule of epsilons.

docs/files.md lists their datasets. D is stored before eq. 11, so that eq. 11 and 12 can be
recomputed. Strings have a fixed size, because a string in HDF5's heap may claim any size. The first
512 bytes (HDF5's user block) hold the sha256 of the rest, which is checked before the HDF5 library
opens the file, because the library does not notice most damage.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
from numpy.typing import NDArray

from polyseg.choices import UNCERTAINTIES, WHOLE_SCORES, map_names, score_names
from polyseg.difficulty import FALLBACKS
from polyseg.errors import PolysegError
from polyseg.metrics.rank_stability import FEWEST_PASSES
from polyseg.records import Assessment, Schedule, ScoreName
from polyseg.registry import is_own
from polyseg.system.files import atomic_path, sha256_of_file

SCHEMA = 3
"""Schema number of the files that are written."""

_READABLE = (2, SCHEMA)
_ASSESSMENT, _SCHEDULE = "polyseg assessment", "polyseg schedule"
_MOST_IMAGES, _MOST_EPOCHS, _MOST_PIXELS, _LONGEST_NAME = 10_000_000, 100_000, 2**26, 4096
_TEXTS = ("metric", "region", "masks", "weights_sha256")
_NUMBERS = {"epoch": int, "samples": int, "seed": int, "rate": float | int}
_LARGEST_SCORE = 1e30
_SMALLEST_CHUNK = 8
_CHUNK_OVERHEAD = 100
_FILTERS = [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32]
_SEAL_BYTES = 512
_SEAL = "polyseg: the sha256 of what follows byte 512 is "
_INVALID = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, MemoryError)


def write_assessment(path: str | Path, assessment: Assessment) -> str:
    """Write an assessment file atomically, and return its sha256; maps must have equal sizes."""
    with _writing(path, _ASSESSMENT) as file:
        for name in (*_TEXTS, *_NUMBERS):
            value = getattr(assessment, name)
            file.attrs[name] = _fixed(value) if name in _TEXTS else value
        # A dataset, because attributes are limited to 64 KiB.
        file["config"] = _fixed(assessment.config_yaml)
        _write_rows(file, assessment.ids, assessment.labels)
        file["difficulty"] = assessment.difficulty
        for name, values in assessment.scores.items():
            place = f"scores/{_key(name)}"
            file[place] = values
            if name in assessment.rank_stability and assessment.samples >= FEWEST_PASSES:
                file[place].attrs["rank_stability"] = assessment.rank_stability[name]
        judged = assessment.scores_se if assessment.samples >= FEWEST_PASSES else {}
        for name, values in judged.items():
            file[f"scores_se/{_key(name)}"] = values
        for column in ("foreground_pixels", "fallback", "dice"):
            file[column] = getattr(assessment, column)
        for column in ("mask_pixels", "epsilon"):
            if getattr(assessment, column) is not None:
                file[column] = getattr(assessment, column)
        for map_name, maps in assessment.maps.items():
            _write_maps(file, map_name, maps)
    return sha256_of_file(path)


def read_assessment(
    path: str | Path, *, sha256: str | None = None, with_maps: bool = False
) -> Assessment:
    """Read an assessment file, with its pixel maps on request.

    A file that is missing, damaged, of another schema or kind, or whose hash is not `sha256`,
    raises PolysegError.
    """
    with _reading(path, _ASSESSMENT, sha256) as file:
        ids, labels = _rows(file)
        n, attributes = len(ids), _attributes(file)
        names = list(dict.fromkeys([*score_names(), attributes["metric"]]))
        scores = _columns(file, "scores", n, names)
        if attributes["samples"] < FEWEST_PASSES:  # Version 0.1 wrote zeros here.
            judged = {*UNCERTAINTIES, *WHOLE_SCORES, *filter(is_own, scores)}
            measured = [name for name in names if name in scores and name in judged]
            errors = {name: np.full(n, np.nan) for name in measured}
            stability = dict.fromkeys(measured, float("nan"))
        else:
            errors, stability = _columns(file, "scores_se", n, names), _rank_stability(file, scores)
        return Assessment(
            **attributes,
            ids=ids,
            labels=labels,
            scores=scores,
            scores_se=errors,
            rank_stability=stability,
            foreground_pixels=_column(file, "foreground_pixels", n, "i8"),
            fallback=_within(_column(file, "fallback", n, "i1"), 0, len(FALLBACKS) - 1),
            dice=_within(_column(file, "dice", n, "f8"), 0, 1, or_nan=True),
            mask_pixels=_optional(file, "mask_pixels", n, "i8"),
            epsilon=_optional(file, "epsilon", n, "f8"),
            maps=_read_maps(file, n) if with_maps and _has(file, "maps") else {},
            config_yaml=_text(file, "config"),
        )


def write_schedule(path: str | Path, schedule: Schedule) -> str:
    """Write a schedule file atomically, and return its sha256."""
    with _writing(path, _SCHEDULE) as file:
        _write_rows(file, schedule.ids, schedule.labels)
        file["epoch"] = schedule.epochs.astype(np.int64)
        file["epsilon"] = schedule.epsilon.astype(np.float32)
        if schedule.assessed is not None:
            file["assessed"] = schedule.assessed.astype(np.int64)
        if schedule.group is not None:
            file["group"], file["statistics"] = schedule.group, schedule.statistics
    return sha256_of_file(path)


def read_schedule(path: str | Path, *, sha256: str | None = None) -> Schedule:
    """Read a schedule file."""
    with _reading(path, _SCHEDULE, sha256) as file:
        epochs = _dataset(file, "epoch")
        if epochs.ndim != 1 or epochs.dtype != np.int64 or len(epochs) > _MOST_EPOCHS:
            raise ValueError(f"epoch must be (E) int64 with E at most {_MOST_EPOCHS:,}")
        ids, labels = _rows(file)
        epsilon = _dataset(file, "epsilon")
        if epsilon.shape != (*epochs.shape, len(ids)) or epsilon.dtype != np.float32:
            raise ValueError("epsilon must be (E, n) float32")
        return Schedule(
            ids,
            epochs[()],
            epsilon[()],
            labels,
            _optional(file, "assessed", len(epochs), "i8"),
            # Schema 2 has neither.
            _dataset(file, "group")[()] if _has(file, "group") else None,
            _finite(_dataset(file, "statistics")[()]) if _has(file, "statistics") else None,
        )


@contextlib.contextmanager
def _writing(path: str | Path, kind: str) -> Iterator[Any]:
    # In memory first: on a full disk the library may end the process or report no error.
    image = io.BytesIO()
    with h5py.File(image, "w", userblock_size=_SEAL_BYTES) as file:
        file.attrs["kind"] = _fixed(kind)
        file.attrs["schema"] = SCHEMA
        yield file
    image.seek(0)
    image.write(_seal(hashlib.sha256(image.getbuffer()[_SEAL_BYTES:]).hexdigest()))
    with atomic_path(path) as temporary:
        temporary.write_bytes(image.getbuffer())


def _seal_of(stream: BufferedIOBase) -> bytes:
    """Return the user block that a file must have."""
    stream.seek(_SEAL_BYTES)
    return _seal(hashlib.file_digest(stream, "sha256").hexdigest())


def _seal(digest: str) -> bytes:
    return f"{_SEAL}{digest}\n".encode().ljust(_SEAL_BYTES, b"\0")


@contextlib.contextmanager
def _reading(path: str | Path, kind: str, sha256: str | None) -> Iterator[Any]:
    """Yield the open file after checking its hash, schema and kind."""
    path = Path(path)
    if not path.is_file():
        raise PolysegError(f"{path}: there is no such file")
    if sha256 is not None and sha256_of_file(path) != sha256:
        raise PolysegError(
            f"{path}: is not the file that the run recorded (its sha256 differs); it was damaged "
            "or replaced"
        )
    try:
        if sha256 is None:
            _refuse_damage(path)
        # No lock: a file is never changed once it has its name.
        with h5py.File(path, "r", locking=False) as file:
            if (schema := _attribute(file, "schema")) not in _READABLE:
                known = " or ".join(map(str, _READABLE))
                raise ValueError(f"has schema {schema}, not {known}; use the polyseg that wrote it")
            if _attribute(file, "kind") != kind:
                raise ValueError(f"is not a {kind} file")
            yield file
    except _INVALID as error:
        reason = " ".join(str(error).split())[:200]
        raise PolysegError(f"{path}: cannot be read as a {kind}: {reason}") from error


def _refuse_damage(path: Path) -> None:
    """Raise if a file's content does not match its user block."""
    with path.open("rb") as stream:
        found = stream.read(_SEAL_BYTES)
        if not found.startswith(_SEAL.encode()):
            raise ValueError("has no sha256: an earlier schema or another program wrote it")
        if found != _seal_of(stream):
            raise ValueError("its sha256 differs: it is damaged")


def _attribute(file: Any, name: str) -> int | float | str:
    """Return a single number or string; an array of strings could be far larger than its file."""
    held = file.attrs.get_id(name)
    if held.shape != () or held.dtype.kind not in "iufS":
        raise ValueError(f"{name} is not a single number or string of fixed size")
    value: int | float | bytes = file.attrs[name].item()
    return value.decode() if isinstance(value, bytes) else value


def _has(file: Any, name: str) -> bool:
    """Return whether the file contains an object of that name; links raise ValueError."""
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
    """Return a dataset of this file, which is no link, and neither external nor virtual."""
    if not _has(file, name):
        raise ValueError(f"{name} is missing")
    group = file[name]
    if not isinstance(group, h5py.Dataset) or group.is_virtual or group.external:
        raise ValueError(f"{name} is not a plain dataset")
    if name.startswith("maps/"):
        return group
    # Only maps are compressed; other shapes cannot claim more than the file holds.
    if group.shape is None or group.chunks or group.id.get_storage_size() < group.nbytes:
        raise ValueError(f"{name} of shape {group.shape} has no values")
    return group


def _rows(file: Any) -> tuple[list[str], list[str] | None]:
    """Return the image of each row, and its label if images have several rows."""
    ids = _names(_dataset(file, "id"))
    labels = _names(_dataset(file, "label")) if _has(file, "label") else None
    each = list(dict.fromkeys(labels or [""]))
    images = ids[:: len(each)]
    if len(set(images)) < len(images) or ids != [one for one in images for _ in each]:
        raise ValueError("id must name each image once, or once for each label")
    if labels is not None and labels != each * len(images):
        raise ValueError("label must repeat the same labels for each image")
    return ids, labels


def _names(dataset: Any) -> list[str]:
    """Return strings that can be names: printable and not too long."""
    if dataset.ndim != 1 or not 0 < dataset.size <= _MOST_IMAGES or dataset.dtype.kind != "S":
        raise ValueError(f"{dataset.name} must be (n) strings")
    names = [name.decode() for name in dataset[()].tolist()]
    if any(not name.isprintable() or len(name) > _LONGEST_NAME for name in names):
        raise ValueError(f"{dataset.name} has unprintable or too long names")
    return names


def _text(file: Any, name: str) -> str:
    dataset = _dataset(file, name)
    if dataset.shape != () or dataset.dtype.kind != "S":
        raise ValueError(f"{name} must be one string")
    return str(dataset.asstr()[()])


def _fixed(text: str | list[str]) -> NDArray[Any]:
    """Return strings as HDF5 strings of fixed size."""
    content = [text.encode()] if isinstance(text, str) else [one.encode() for one in text]
    kind = h5py.string_dtype(length=max(1, *map(len, content)))
    return np.array(content[0] if isinstance(text, str) else content, dtype=kind)


def _attributes(file: Any) -> dict[str, Any]:
    kinds: dict[str, Any] = dict.fromkeys(_TEXTS, str) | _NUMBERS
    found: dict[str, Any] = {name: _attribute(file, name) for name in kinds}
    for name, kind in kinds.items():
        if not isinstance(found[name], kind) or (name == "epoch" and found[name] < 0):
            raise ValueError(f"{name} {found[name]!r:.40} is invalid")
    known = found["metric"] in score_names() or is_own(found["metric"])
    if not known or not _has(file, f"scores/{_key(found['metric'])}"):
        raise ValueError(f"metric {found['metric']!r:.40} is unknown, or has no scores")
    return found


def _key(score: ScoreName) -> str:
    """Return the name of a score in a file, where / would begin a group."""
    return score.replace("/", "|")


def _rank_stability(file: Any, scores: Iterable[ScoreName]) -> dict[ScoreName, float]:
    held = {name: file[f"scores/{_key(name)}"] for name in scores}
    judged = {name: one for name, one in held.items() if "rank_stability" in one.attrs}
    return {name: float(_attribute(one, "rank_stability")) for name, one in judged.items()}


def _write_rows(file: Any, ids: list[str], labels: list[str] | None) -> None:
    file["id"] = _fixed(ids)
    if labels is not None:
        file["label"] = _fixed(labels)


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


def _columns(
    file: Any, group: str, n: int, names: list[ScoreName]
) -> dict[ScoreName, NDArray[np.float64]]:
    return {
        name: _finite(_column(file, f"{group}/{_key(name)}", n, "f8"))
        for name in names
        if _has(file, f"{group}/{_key(name)}")
    }


def _has_expected_chunks(maps: Any) -> bool:
    """Return whether each chunk was written, by our filters, with a plausible size.

    A chunk that was never written would be read as zeros of any size, and HDF5's filters trust
    their input.
    """
    pieces: list[Any] = []
    maps.id.chunk_iter(pieces.append)
    sizes = range(_SMALLEST_CHUNK, 2 * maps.nbytes // len(maps) + _CHUNK_OVERHEAD)
    plain = all(piece.filter_mask == 0 and piece.size in sizes for piece in pieces)
    own = maps.id.get_create_plist()
    filters = [own.get_filter(i)[0] for i in range(own.get_nfilters())]
    return plain and filters == _FILTERS and len(pieces) == len(maps)


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
    for name in map_names():
        if name != "mean" and not _has(file, f"maps/{name}"):
            continue  # The version that wrote the file had no such map.
        dataset = _dataset(file, f"maps/{name}")
        plausible = dataset.ndim == 3 and np.prod(dataset.shape[1:], dtype=float) <= _MOST_PIXELS
        if not plausible or len(dataset) != n or dataset.dtype != np.float16:
            raise ValueError(f"maps/{name} must be ({n}, H, W) float16")
        if dataset.chunks != (1, *dataset.shape[1:]) or not _has_expected_chunks(dataset):
            raise ValueError(f"maps/{name} must have one compressed chunk for each image")
        maps[name] = [dataset[i] for i in range(n)]
    return maps

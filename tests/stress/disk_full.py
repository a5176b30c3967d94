"""Disks that become full at any point: one error line, committed files stay, runs can resume."""

import contextlib
import functools
import random
import resource
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np

from polyseg.system.files import TEMPORARY_PREFIX
from tests.stress import runs

RESULTS = (
    "estimate-uncertainty RUN --samples 3 --maps",
    "evaluate RUN --split train --no-figures",
    "predict RUN IMAGES --uncertainty --samples 3",
    "data demo",
    "predict RUN VOLUME",
    "schedule plot RUN",
)
TRIALS_A_RESULT = 3
_LEAST = 700
"""Smallest limit of file size in bytes, because the output of a command goes to a file."""
_AMPLE = 256
"""MiB of a disk with enough space."""
_HEAD_START = 0.5
"""Seconds that a fork waits, in which its limit is set."""


def check(count: int, seed: int) -> list[str]:
    """Fill the disk of `count` runs and of a third as many other results; return the failures."""
    met: Counter[str] = Counter()

    def training(chance: random.Random, number: int, place: Path) -> list[str]:
        filling = _small_disk if number % 2 and _may_mount() else _small_files
        return filling(chance, place, met)

    def result(chance: random.Random, number: int, place: Path) -> list[str]:
        return _result(RESULTS[number % len(RESULTS)], chance, place, met)

    if not _may_mount():
        print("disk_full: nothing may be mounted here, so only the size of files is limited")
    failures = runs.trials("disk_full", count, seed, training)
    failures += runs.trials("disk_full results", -(-count // TRIALS_A_RESULT), seed, result)
    how = ", ".join(f"{times} {moment}" for moment, times in sorted(met.items()))
    print(f"disk_full, seed {seed}: {how}; {len(failures)} failures")
    return failures


def _small_files(chance: random.Random, place: Path, met: Counter[str]) -> list[str]:
    """Train with a limit of file size, and resume without it."""
    run, reference = place / "run", runs.reference().folder
    # Most files are small and checkpoints grow little, so more limits are close to the largest.
    share = chance.choice([chance.uniform(0, 1), chance.uniform(0.9, 1)])
    limit = max(_LEAST, int(share * max(_sizes(reference))))
    answer = _limited([*runs.training(run), "--quiet"], place, limit)
    return _verdict(answer, run, place, met, f"of {limit} bytes a file")


def _small_disk(chance: random.Random, place: Path, met: Counter[str]) -> list[str]:
    """Train on a disk that is too small, and resume on a larger one."""
    pages = sum(-(-size // 4096) + 1 for size in _sizes(runs.reference().folder))
    kilobytes = 4 * chance.randrange(4, pages + 10)
    with _mounted(place / "disk", kilobytes) as disk:
        run = disk / "run"
        answer = runs.run([*runs.training(run), "--quiet"], place)
        _mount("-o", f"remount,size={_AMPLE}m", str(disk))
        return _verdict(answer, run, place, met, f"of {kilobytes} KiB")


def _verdict(
    answer: runs.Answer, run: Path, place: Path, met: Counter[str], space: str
) -> list[str]:
    """Return the faults of a run whose disk was full, and of the resumed run."""
    if answer.code == 0:
        met["runs with space enough"] += 1
        return [f"disk {space}: {one}" for one in runs.differences(run, runs.reference().folder)]
    epoch = runs.committed_epoch(run)
    met["runs before the first checkpoint" if epoch < 0 else "runs after it"] += 1
    wrong = _faults(answer, run) + _leftovers(run, "the full disk")
    argv, more = runs.continued(run, place)
    wrong += more + runs.complete(argv, run, place) + _leftovers(run, argv[1])
    return [f"disk {space}, after epoch {epoch}: {one}" for one in wrong]


def _result(words: str, chance: random.Random, place: Path, met: Counter[str]) -> list[str]:
    """Let a command run out of space, with and without previous results in its folder."""
    out, command = place / "out", words.split(maxsplit=1)[0]
    places = {"RUN": str(runs.reference().folder), "IMAGES": str(_images() / "images")}
    places["VOLUME"] = str(_volume())
    argv = [places.get(word, word) for word in words.split()]
    argv += [str(out), "--images", "3"] if command == "data" else ["--out", str(out)]
    good = runs.run([*argv, "--quiet"], place)
    if good.code != 0:
        return [f"{command} with space: {good}"]
    limit = chance.randrange(_LEAST, max(*_sizes(out), _LEAST + 1))
    former = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if command == "data" or chance.random() < 0.5:
        former = {}
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        out.rmdir()
    argv += ["--overwrite"] if former else []
    answer = _limited([*argv, "--quiet"], place, limit)
    if answer.code == 0:
        met[f"{command} with space enough"] += 1
        return []
    met[f"{command} without"] += 1
    wrong = _faults(answer, out)
    wrong += [f"{one.name} is left" for one in place.glob(f"{TEMPORARY_PREFIX}*")]
    if former != {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}:
        wrong.append("the former results are not what they were")
    if out.exists() and not former:
        wrong.append("a torn folder is left")
    again = runs.run([*argv, "--quiet"], place)
    wrong += [] if again.code == 0 else [f"with space again: {again}"]
    return [f"{command}, {limit} bytes a file: {one}" for one in wrong]


def _limited(argv: list[str], place: Path, limit: int) -> runs.Answer:
    """Run a command with a limit of file size in bytes."""
    runs.reference(genuine=False)  # Make sure that the server of forks is running.
    while True:
        at = time.monotonic() + _HEAD_START
        process = runs.start(argv, place, at=at)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        if time.monotonic() < at:
            return process.answer()
        process.send(9)
        process.wait()


def _faults(answer: runs.Answer, folder: Path) -> list[str]:
    """Return the faults of a command's message about a full disk."""
    lines = answer.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    wrong = [] if answer.code == 2 else [f"exit {answer}"]
    if len(errors) != 1 or lines[-1:] != errors:
        wrong.append(f"{len(errors)} error lines of {len(lines)}, the last {lines[-1:]}")
    elif str(folder) not in errors[0] or not any(
        reason in errors[0] for reason in ("No space left", "File too large")
    ):
        wrong.append(f"not a line that says what and where: {errors[0]}")
    signs = ("Traceback", "Logging error", "Exception ignored")
    return wrong + [f"{sign} on stderr: {lines[-2:]}" for sign in signs if sign in answer.err]


def _leftovers(folder: Path, when: str) -> list[str]:
    return [f"{path.name} is left after {when}" for path in folder.rglob(f"{TEMPORARY_PREFIX}*")]


def _sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


@functools.cache
def _images() -> Path:
    """Return a folder of images, made once."""
    folder = runs.lasting_folder() / "images"
    answer = runs.run(["data", "demo", str(folder), "--images", "3", "--size", "32"], folder.parent)
    if answer.code != 0:
        raise RuntimeError(f"the images could not be made: {answer}")
    return folder


@functools.cache
def _volume() -> Path:
    """Return a volume, made once."""
    path = runs.lasting_folder() / "volume.nii"
    pixels = np.arange(32 * 32 * 8, dtype=np.uint16).reshape(32, 32, 8)
    nibabel.save(nibabel.Nifti1Image(pixels, np.eye(4)), path)
    return path


@contextlib.contextmanager
def _mounted(folder: Path, kilobytes: int) -> Iterator[Path]:
    """Yield a folder that is a separate disk."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@functools.cache
def _may_mount() -> bool:
    """Return whether a small disk may be mounted here."""
    try:
        with runs.workplace() as place, _mounted(place / "disk", 16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False

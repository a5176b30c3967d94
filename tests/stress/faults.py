"""Stop the machine before or after any step of durable writing: every run can be resumed.

All durable writing goes through `polyseg.system.files.disk`. Here it is replaced by a disk that
stops at a step, and records what a disk is then sure to hold: flushed contents under flushed
names.
"""

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyseg.config import Config, load_config
from polyseg.errors import PolysegError
from polyseg.system import files
from polyseg.system.files import Disk
from tests.stress import runs

MEMORIES = ("kept", "torn", "forgotten")
"""What remains of data that was not flushed: all, names only, or nothing."""


class Stopped(BaseException):
    """Raised in place of a stop of the machine."""


class MortalDisk(Disk):
    """A disk that works until it stops, and then does nothing."""

    def __init__(self, stops_at: int, root: Path) -> None:
        self.stops_at, self.moments = stops_at, 0
        self.contents: dict[int, bytes] = {}
        """Flushed content of each file by inode number."""
        self.names: dict[int, dict[str, int]] = {}
        """Flushed entries of each folder: inode numbers by name."""
        self.held: list[int] = []
        """Open files, so that the system does not reuse their inode numbers."""
        # Files from before a restart are on the disk.
        for path in (root, *root.rglob("*")) if root.exists() else ():
            self._remember(path)

    @property
    def dead(self) -> bool:
        """Whether it has stopped."""
        return self.moments >= self.stops_at

    def _step(self, act: Callable[[], Any], after: Callable[[], Any] = lambda: None) -> Any:
        """Do one step if the machine is running; it may stop before or after the step."""
        if self.dead:
            raise Stopped
        self._tick()
        result = act()
        after()
        self._tick()
        return result

    def _tick(self) -> None:
        self.moments += 1
        if self.dead:
            raise Stopped

    def create(self, path: Path) -> Path:
        return self._step(lambda: Disk.create(self, path))

    def flush(self, path: Path) -> None:
        self._step(lambda: Disk.flush(self, path), lambda: self._remember(path))

    def rename(self, old: Path, new: Path) -> None:
        self._step(lambda: Disk.rename(self, old, new))

    def link(self, old: Path, new: Path) -> None:
        self._step(lambda: Disk.link(self, old, new))

    def remove(self, path: Path) -> None:
        if not self.dead:  # After a stop no cleanup would have run.
            self._step(lambda: Disk.remove(self, path))

    def _remember(self, path: Path) -> None:
        self.held.append(os.open(path, os.O_RDONLY))
        number = path.stat().st_ino
        if path.is_dir():
            self.names[number] = {one.name: one.stat().st_ino for one in path.iterdir()}
        else:
            self.contents[number] = path.read_bytes()

    def restart(self, root: Path, memory: str) -> None:
        """Write to `root` the files that the disk holds after a restart."""
        if memory != "kept":
            image = root.with_name("image")
            flushed_names = memory == "forgotten"
            self._lay_out(root, image, flushed_names)
            shutil.rmtree(root)
            if image.exists():
                image.rename(root)
        for descriptor in self.held:
            os.close(descriptor)

    def _lay_out(self, folder: Path, image: Path, flushed_names: bool) -> None:
        """Copy a folder as it would be found after a restart."""
        image.mkdir()
        now = {one.stat().st_ino: one for one in folder.rglob("*")}
        number = folder.stat().st_ino
        names = {one.name: one.stat().st_ino for one in folder.iterdir()}
        for name, inner in (self.names.get(number, {}) if flushed_names else names).items():
            if inner in now and now[inner].is_dir():
                self._lay_out(now[inner], image / name, flushed_names)
            else:
                (image / name).write_bytes(self.contents.get(inner, b""))


def check(count: int, seed: int) -> list[str]:
    """Stop `count` runs, each at a different moment; return the failures."""
    with runs.workplace() as place:
        whole = _settings(place / "whole" / "run")
        moments = _moments_of(whole, resume=False)
        # And while a stopped run is being recovered.
        again = _moments_of(_stopped(place / "twice", moments // 2, "kept"), resume=True)
        cases = [(moment, None, memory) for moment in range(1, moments) for memory in MEMORIES]
        cases += [
            (moments // 2, moment, memory)
            for moment in range(1, min(again, 60))
            for memory in MEMORIES
        ]
        random.Random(seed).shuffle(cases)
        failures = []
        for case in cases[:count]:
            failures += [f"faults {case}: {wrong}" for wrong in _trial(place, *case)]
            shutil.rmtree(place / "run", ignore_errors=True)
    tried = min(count, len(cases))
    print(
        f"faults, seed {seed}: {tried} of {len(cases)} stops, at {moments} moments of a run and "
        f"{min(again, 60)} of one that goes on; {len(failures)} failures"
    )
    return failures


def _settings(folder: Path) -> Config:
    places = [f"output.path={folder}", f"training.epochs={runs.EPOCHS}"]
    return load_config(overrides=[*runs.SETTINGS, *places])


def _moments_of(config: Config, *, resume: bool) -> int:
    """Complete a run and return the number of moments at which it could be stopped."""
    disk = MortalDisk(10**9, Path(str(config.output.path)))
    _train(config, disk, resume=resume)
    for descriptor in disk.held:
        os.close(descriptor)
    return disk.moments


def _stopped(folder: Path, moment: int, memory: str) -> Config:
    config = _settings(folder)
    disk = MortalDisk(moment, folder)
    with contextlib.suppress(Stopped):
        _train(config, disk)
    disk.restart(folder, memory)
    return config


def _trial(place: Path, moment: int, second: int | None, memory: str) -> list[str]:
    folder = place / "run"
    config, wrong, seen = _settings(folder), [], -1
    for stops_at in filter(None, (moment, second)):
        disk, done = MortalDisk(stops_at, folder), [seen]
        with contextlib.suppress(Stopped):
            _train(config, disk, resume=seen >= 0, done=done)
        disk.restart(folder, memory)
        found = runs.committed_epoch(folder) if folder.exists() else -1
        if found < done[-1]:
            wrong.append(f"epoch {done[-1]} was committed, and {found} is what is left")
        seen = found
    if seen < 0:
        wrong += _refusal(config)
    try:
        _train(config, Disk(), resume=seen >= 0)
    except PolysegError as error:
        return [*wrong, f"it does not go on: {error}"]
    return wrong + runs.differences(folder, place / "whole" / "run")


def _refusal(config: Config) -> list[str]:
    try:
        _train(config, Disk(), resume=True)
    except PolysegError as error:
        return [] if "holds no run to resume" in str(error) else [f"it is refused by {error}"]
    return ["what was never committed was resumed"]


def _train(
    config: Config, disk: Disk, *, resume: bool = False, done: list[int] | None = None
) -> None:
    from polyseg.commands.train import train

    def progress(task: str, epoch: int, _: int) -> None:
        if task == "training" and done is not None:
            done.append(epoch)

    before, files.disk = files.disk, disk
    try:
        train(config, resume=resume, progress=progress)
    finally:
        files.disk = before

"""Several processes at one run: readers change nothing, and one of two writers continues."""

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.stress import runs

READING = (
    "schedule show RUN",
    "schedule validity RUN --out OUT",
    "schedule plot RUN --out OUT",
    "schedule export RUN --out OUT/table.csv",
    "schedule recompute RUN --out OUT/new.h5",
    "report RUN --out OUT/page.html",
    "evaluate RUN --split train --no-figures --out OUT",
    "estimate-uncertainty RUN --samples 3 --out OUT",
    "predict RUN IMAGE --out OUT/masks",
)
READS_A_PAIR = 4
LONG = 30
"""Number of epochs of the run that is read."""
_HEAD_START = 1.0
"""Seconds that two forks have to become ready before they start together."""


def check(count: int, seed: int) -> list[str]:
    """Read a run in training `count` times, and start a quarter as many pairs of writers."""
    return check_reads(count, seed) + check_pairs(max(1, count // READS_A_PAIR), seed)


def check_reads(count: int, seed: int) -> list[str]:
    """Read runs in training `count` times, a new run after each end; return the failures."""
    commands = itertools.islice(_shuffled(random.Random(f"reads {seed}")), count)
    waiting, answered = list(commands), Counter[str]()
    failures: list[str] = []
    while waiting:
        with runs.workplace() as place:
            failures += _read_a_run(waiting, place, answered)
    failures = [f"access, seed {seed}: {failure}" for failure in failures]
    how = ", ".join(f"{times} {moment}" for moment, times in sorted(answered.items()))
    print(f"access, seed {seed}: {count} reads, {how}; {len(failures)} failures")
    return failures


def check_pairs(count: int, seed: int) -> list[str]:
    """Start `count` pairs of writers, every second pair to resume; return the failures."""
    failures = runs.trials("access", count, seed, _pair)
    print(f"access, seed {seed}: {count} pairs of writers; {len(failures)} failures")
    return failures


def _shuffled(chance: random.Random) -> Iterator[str]:
    """Yield all commands repeatedly, each time in a new random order."""
    while True:
        yield from chance.sample(READING, len(READING))


def _read_a_run(waiting: list[str], place: Path, answered: Counter[str]) -> list[str]:
    """Run commands from the list until a training run ends; return the failures."""
    run, failures = place / "run", []
    Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(place / "image.png")
    writer = runs.start(runs.training(run, epochs=LONG), place)
    while waiting and not writer.ended():
        failures += _read(waiting.pop(), run, place, answered)
    answer = writer.answer()
    if answer.code != 0:
        return [*failures, f"the run that was read failed: {answer}"]
    undisturbed = runs.reference(genuine=False, epochs=LONG).folder
    return failures + [
        f"the run that was read: {one}" for one in runs.differences(run, undisturbed)
    ]


def _read(command: str, run: Path, place: Path, answered: Counter[str]) -> list[str]:
    """Return the faults of a reader's answer; before the first epoch it may refuse."""
    out = place / f"out-{sum(answered.values())}"
    out.mkdir()
    places = {"RUN": run, "OUT": out, "IMAGE": place / "image.png"}
    argv = command.split()
    for name, path in places.items():
        argv = [word.replace(name, str(path)) for word in argv]
    early = runs.committed_epoch(run) < 1
    answer = runs.run(argv, place)
    answered["before the first epoch" if early else "after it"] += 1
    if answer.code == 0 or (early and answer.code == 2 and len(answer.err.splitlines()) == 1):
        return []
    return [f"polyseg {command}: {answer}"]


def _pair(chance: random.Random, number: int, place: Path) -> list[str]:
    """Start two writers of one run at the same instant; return the faults."""
    run, argv = place / "run", runs.training(place / "run")
    if number % 2:
        _leave_half_a_run(run, place)
        argv = runs.resuming(run)
    at = time.monotonic() + _HEAD_START
    both = [runs.start(argv, place, at=at) for _ in range(2)]
    answers = sorted((process.answer() for process in both), key=lambda one: one.code or 0)
    if [answer.code for answer in answers] != [0, 2]:
        return [f"{argv[1]}, two at once: {'; '.join(map(str, answers))}"]
    refused = answers[1]
    wrong = [] if runs.is_one_line_naming(run, refused.err) else [f"{argv[1]}, refused: {refused}"]
    return wrong + runs.differences(run, runs.reference().folder)


def _leave_half_a_run(run: Path, place: Path) -> None:
    """Kill a run in its third epoch or a little later."""
    process = runs.start(runs.training(run), place)
    while not (run / "uncertainty" / "epoch_0003.h5").exists() and not process.ended():
        time.sleep(0.01)
    process.send(signal.SIGKILL)
    process.wait()

"""Runs that are killed at any instant: they resume to the same result, or have no checkpoint."""

import random
import signal
from collections import Counter
from pathlib import Path

from tests.stress import runs


def check(count: int, seed: int) -> list[str]:
    """Kill `count` runs, some of them several times; return the failures."""
    hit: Counter[str] = Counter()

    def trial(chance: random.Random, number: int, place: Path) -> list[str]:
        return _trial(chance, place, hit, genuine=number % 10 == 9)

    failures = runs.trials("kills", count, seed, trial)
    when = ", ".join(f"{times} {moment}" for moment, times in sorted(hit.items()))
    print(f"kills, seed {seed}: {count} runs, killed {when}; {len(failures)} failures")
    return failures


def _trial(chance: random.Random, place: Path, hit: Counter[str], *, genuine: bool) -> list[str]:
    run = place / "run"
    seconds = runs.reference(genuine=genuine).seconds
    argv, wrong = runs.training(run), []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        process = runs.start(argv, place, genuine=genuine)
        process.work(chance.uniform(0, seconds))
        process.send(signal.SIGKILL)
        answer = process.answer()
        if answer.code not in (0, -signal.SIGKILL):
            wrong.append(f"{argv[1]} ended by itself: {answer}")
        hit[_moment(answer.code, runs.committed_epoch(run))] += 1
        argv, more = runs.continued(run, place, genuine=genuine)
        wrong += more
    return wrong + runs.complete(argv, run, place, genuine=genuine)


def _moment(code: int | None, epoch: int) -> str:
    if code == 0:
        return "too late"
    if epoch < 0:
        return "before the first checkpoint"
    return "after the last epoch" if epoch == runs.EPOCHS else "between them"

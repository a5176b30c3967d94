"""Signals at any instant: exit code, one line, no traceback, and a run that can be resumed."""

import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.stress import runs

KINDS = (
    (signal.SIGINT,),
    (signal.SIGTERM,),
    (signal.SIGUSR1,),
    (signal.SIGINT, signal.SIGINT),
)
BETWEEN_TWO = 0.05
LONGEST = 2.0
"""Seconds allowed from a signal to the end, without time spent waiting for a processor."""


class _Signalled(NamedTuple):
    """State of a run when a signal was sent, and the time until its end."""

    number: int
    begun: bool
    epoch: int
    seconds: float


def check(count: int, seed: int) -> list[str]:
    """End `count` runs by signals; return the failures."""
    codes: Counter[int | None] = Counter()

    def trial(chance: random.Random, number: int, place: Path) -> list[str]:
        numbers = KINDS[number % len(KINDS)]
        return _trial(chance, place, numbers, codes, genuine=number % 7 == 6)

    failures = runs.trials("signals", count, seed, trial)
    how = ", ".join(f"{times} with {code}" for code, times in codes.items())
    print(f"signals, seed {seed}: {count} runs ended, {how}; {len(failures)} failures")
    return failures


def _trial(
    chance: random.Random,
    place: Path,
    numbers: Sequence[int],
    codes: Counter[int | None],
    *,
    genuine: bool,
) -> list[str]:
    run = place / "run"
    process = runs.start(runs.training(run), place, genuine=genuine)
    process.work(chance.uniform(0, runs.reference(genuine=genuine).seconds))
    asked, answer = _end(process, run, numbers)
    codes[answer.code] += 1
    wrong = [f"{signal.Signals(asked.number).name}: {one}" for one in _wrong(asked, answer, run)]
    argv, more = runs.continued(run, place, genuine=genuine)
    return wrong + more + runs.complete(argv, run, place, genuine=genuine)


def _end(
    process: runs.Running, run: Path, numbers: Sequence[int]
) -> tuple[_Signalled, runs.Answer]:
    epoch, begun = runs.committed_epoch(run), process.has_begun()
    start, waited = time.monotonic(), process.times().waited
    for i, number in enumerate(numbers):
        time.sleep(BETWEEN_TWO if i else 0)
        process.send(number)
    process.work()
    seconds = time.monotonic() - start - (process.last_times.waited - waited)
    return _Signalled(numbers[0], begun, epoch, seconds), process.answer()


def _wrong(asked: _Signalled, answer: runs.Answer, run: Path) -> list[str]:
    """Return the faults of a command that was ended by signals."""
    if asked.seconds > LONGEST:
        return [f"took {asked.seconds:.1f} s to end"]
    if answer.code == 0 and "in " + str(run) in answer.out:
        return []  # The results were complete, and nothing was left to end.
    if answer.code == -asked.number and not asked.begun:
        return []
    wrong = []
    if answer.code != 128 + asked.number:
        wrong.append(f"ended otherwise than with code {128 + asked.number}: {answer}")
    if "Traceback" in answer.err:
        wrong.append(f"a traceback: {answer.err}")
    tested = (run / "evaluation" / "summary.json").exists()  # Then nothing is left to resume.
    told = "--resume" in answer.err and str(run) in answer.err
    if asked.epoch >= 0 and not tested and not told:
        wrong.append(f"does not tell how to go on after epoch {asked.epoch}: {answer}")
    return wrong

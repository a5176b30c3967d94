"""A long run in one process: memory, open files and threads must stop growing."""

import gc
import json
from pathlib import Path

from tests import forks
from tests.stress import runs

SHOWN = (20, 50, 100, 150, 200)
SETTLED = 20
"""Epoch after which files and threads may not grow; in shorter runs, after a third."""
WARM = 50
"""Epoch after which memory may not grow by more than both of the following."""
MOST_GROWTH, MOST_KILOBYTES = 0.05, 10_000
_SECONDS_AN_EPOCH = 30.0

Sample = dict[str, int]


def check(count: int, seed: int) -> list[str]:
    """Train for `count` epochs with an assessment after each; return what grew."""
    with runs.workplace() as place:
        samples = _samples(place, count, seed)
    for epoch in [one for one in SHOWN if one <= len(samples)] or [len(samples)]:
        figures = ", ".join(f"{value:,} {name}" for name, value in samples[epoch - 1].items())
        print(f"soak, epoch {epoch}: {figures}")
    failures = [] if len(samples) == count else [f"{len(samples)} of {count} epochs were trained"]
    failures += _growth(samples) if samples else []
    failures = [f"soak, seed {seed}: {failure}" for failure in failures]
    print(f"soak, seed {seed}: {len(samples)} epochs in one process; {len(failures)} failures")
    return failures


def _samples(place: Path, epochs: int, seed: int) -> list[Sample]:
    """Return a sample after each epoch of a run in a separate process."""
    path = place / "samples.jsonl"
    path.touch()
    process = forks.context().Process(
        target=_train, args=(place / "run", epochs, seed, path), daemon=True
    )
    process.start()
    process.join(60 + _SECONDS_AN_EPOCH * epochs)
    process.kill()
    process.join()
    return [json.loads(line) for line in path.read_text().splitlines()]


def _train(run: Path, epochs: int, seed: int, path: Path) -> None:
    """Train and record a sample after each epoch."""
    import torch

    from polyseg.commands.train import train
    from polyseg.config import load_config

    def progress(task: str, done: int, total: int) -> None:
        if task == "training":
            with path.open("a") as stream:
                stream.write(json.dumps(_sample()) + "\n")

    torch.set_num_threads(1)
    own = (f"training.epochs={epochs}", f"training.seed={seed}", f"output.path={run}")
    train(load_config(overrides=[*runs.SETTINGS, *own]), progress=progress)


def _sample() -> Sample:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {
        "kB in memory": int(status["VmRSS"].split()[0]),
        "open files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def _growth(samples: list[Sample]) -> list[str]:
    """Return the quantities that have grown but should not."""
    settled = samples[min(SETTLED, len(samples) // 3) :]
    failures = [
        f"{name} grew from {settled[0][name]} to {most}"
        for name in ("open files", "threads")
        if (most := max(sample[name] for sample in settled)) > settled[0][name]
    ]
    if len(samples) < 2 * WARM:
        return failures
    before, after = (samples[epoch - 1]["kB in memory"] for epoch in (WARM, len(samples)))
    if after - before > max(MOST_GROWTH * before, MOST_KILOBYTES):
        failures.append(f"memory grew from {before:,} to {after:,} kB")
    return failures

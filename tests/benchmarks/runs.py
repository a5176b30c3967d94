"""Cost of MC Dropout in a whole run: python tests/benchmarks/runs.py

Runs with and without assessments, from the first weights to the last checkpoint, over the same
images, whose share of foreground is in a given range; no validation. Measured in turn in one
process by processor time, which excludes waiting; the ratio is computed in each
round. The times of an assessment and an epoch are read from the history of the runs.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from polyseg.config import load_config
from polyseg.data.loading import load_images
from polyseg.data.splits import split_json
from polyseg.runs.run_folder import RunDirectory, environment
from polyseg.system.memory import keep_freed_memory
from polyseg.training.trainer import Trainer


def settings_of(arguments):
    """Return the settings of all runs."""
    settings = [
        f"data.path={arguments.data}",
        f"data.size={arguments.size}",
        f"training.epochs={arguments.epochs}",
        f"training.device={arguments.device}",
    ]
    # Enough phantoms to find those whose share of foreground is in the range.
    wide = arguments.foreground[1] - arguments.foreground[0] == 1
    if arguments.data == "demo":
        settings.append(f"data.demo_images={arguments.images * (1 if wide else 20)}")
    return settings


def load(settings, arguments):
    """Return the images, and a split that trains on those in the range."""
    images = load_images(load_config(None, settings).data)
    low, high = arguments.foreground
    chosen = [item.id for item in images.items if low <= (item.foreground or 0) <= high]
    if not chosen:
        raise SystemExit(f"no image of {arguments.data} has a foreground of {low} to {high}")
    return images, {"train": chosen[: arguments.images], "val": [], "test": []}


def trained(settings, images, split):
    """Train a run in a temporary folder; return the trainer and the processor seconds."""
    config = load_config(None, settings)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run")
        start = time.process_time()
        trainer = Trainer(config, images, split, run)
        with run.writing(resume=False):
            now = environment(trainer.device)
            trainer.record_hashes(split=run.begin(config, split_json(split, {}), now), replay="")
            trainer.fit()
        return trainer, time.process_time() - start


def phase(histories, name):
    """Return the median seconds of a phase over the epochs that have it."""
    key = f"seconds_{name}"
    return np.median([row[key] for one in histories for row in one if row[key] > 0.01])


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="demo", help="demo, or a folder")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument(
        "--samples",
        nargs="+",
        default=("20", "20:bf16", "6", "expected_error/5", "training_loss/5"),
        help="[METRIC/]N[:PRECISION]",
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--foreground", type=float, nargs=2, default=(0.1, 0.2))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", nargs="*", default=(), help="settings of all runs")
    arguments = parser.parse_args()
    keep_freed_memory()
    settings = [*settings_of(arguments), *arguments.set]
    images, split = load(settings, arguments)
    kinds = {"without": ["control.enabled=false"]}
    for asked in arguments.samples:
        passes, _, precision = asked.partition(":")
        metric, _, count = passes.rpartition("/")
        name = " ".join((metric, "N =", count, precision)).strip()
        kinds[name] = [f"uncertainty.samples={count}"]
        kinds[name] += [f"uncertainty.metric={metric}"] if metric else []
        kinds[name] += [f"uncertainty.precision={precision}"] if precision else []
    seconds, histories = ({name: [] for name in kinds} for _ in range(2))
    for _ in range(arguments.rounds):
        for name, more in kinds.items():
            trainer, taken = trained([*settings, *more], images, split)
            seconds[name].append(taken)
            histories[name].append(trainer.history)
            print(f"{name}: {taken:.1f} s", flush=True)
    assessments = sum(row["assessed"] for row in histories[name][0])
    title = (
        f"{len(split['train'])} images of {arguments.size} x {arguments.size}, "
        f"{arguments.epochs} epochs, {assessments:.0f} assessments"
    )
    table = Table("run", "median s", "ratio", "range", "epoch s", "assessment s", title=title)
    for name, values in seconds.items():
        ratios = np.array(values) / np.array(seconds["without"])
        epoch = phase(histories[name], "train")
        assessment = "" if name == "without" else f"{phase(histories[name], 'assessment'):.2f}"
        spread = f"{ratios.min():.3f} to {ratios.max():.3f}"
        row = (f"{np.median(values):.1f}", f"{np.median(ratios):.3f}", spread)
        table.add_row(name, *row, f"{epoch:.2f}", assessment)
    Console().print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}")


if __name__ == "__main__":
    main()

"""Divergence of two trainings by rounding: python -m tests.benchmarks.rounding

The default network is trained twice on 16 phantoms, with one thread and with two, which sum in
a different order. Prints the differences after each epoch: of D, relative to the largest; of single
weights, relative to the largest of their tensor; and of all weights together, as a ratio of norms.
Settings can be given as arguments, such as training.learning_rate=0.001.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from polyseg.config import load_config
from polyseg.data.loading import load_images
from polyseg.runs.run_folder import RunDirectory
from polyseg.training.trainer import Trainer

SETTINGS = (
    *("data.demo_images=16", "data.size=64", "training.batch_size=4", "training.epochs=5"),
    *("control.start=1", "control.every=1"),
)


def differences(one, other):
    """Return the relative differences between two trainers in D, single weights and all weights."""
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    pairs = [(a.detach(), b.detach()) for a, b in pairs if a.numel() > 1]
    d = [trainer.control.assessment.difficulty for trainer in (one, other)]
    weights, moved = (
        torch.cat([values.flatten() for values in part])
        for part in ([a for a, _ in pairs], [a - b for a, b in pairs])
    )
    return (
        np.abs(d[0] - d[1]).max() / d[0].max(),
        max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs),
        float(moved.norm() / weights.norm()),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eps", type=float, help="of the optimizer, in place of its own")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    table = Table("epoch", "D", "single weights", "all weights")
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(overrides=[*SETTINGS, *arguments.settings, f"output.path={folder}"])
        images = load_images(config.data)
        split = {"train": [item.id for item in images.items], "val": [], "test": []}
        run = RunDirectory(Path(folder))
        trainers = [Trainer(config, images, split, run) for _ in range(2)]
        for epoch in range(1, config.training.epochs + 1):
            for threads, trainer in enumerate(trainers, start=1):
                torch.set_num_threads(threads)
                for group in trainer.steps.optimizer.param_groups if arguments.eps else ():
                    group["eps"] = arguments.eps
                trainer._train(epoch)
                trainer._assess(epoch)
            found = differences(*trainers)
            table.add_row(str(epoch), *(f"{value:.0e}" for value in found))
    Console().print(table)


if __name__ == "__main__":
    main()

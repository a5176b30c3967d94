"""Correlation of rankings by few and by many passes: python -m tests.benchmarks.ranks

A network of each kind of dropout is trained without assessments. D by many passes over its
training images approximates infinitely many; the table shows its Spearman correlation with
D by fewer passes of other seeds, mean and deviation over repeats, and with the two measures without
passes. In bf16 the masks are those of fp32, so that their correlation with each other shows the
effect of rounding.
"""

import argparse

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from polyseg.config import UncertaintyConfig
from polyseg.metrics.rank_stability import spearman
from polyseg.montecarlo.assessment import assess
from polyseg.system.memory import keep_freed_memory

from . import runs

REFERENCE_SEED = 1000
WAYS = (("consistent", "fp32"), ("consistent", "bf16"), ("independent", "fp32"))


def measure(trainer, ids, arguments):
    """Yield rows of the table."""

    def assessed(samples, seed, masks="consistent", precision="fp32"):
        settings = UncertaintyConfig(samples=samples, masks=masks, precision=precision)
        batches = trainer.images.batches(ids, arguments.batch)
        return assess(trainer.network, batches, settings, seed=seed).in_order(ids)

    reference = assessed(arguments.reference, REFERENCE_SEED)
    for masks, precision in WAYS:
        for samples in arguments.samples:
            found = [
                spearman(assessed(samples, seed, masks, precision).difficulty, reference.difficulty)
                for seed in range(arguments.repeats)
            ]
            yield (
                f"{masks} masks, {precision}",
                str(samples),
                f"{np.mean(found):.3f}",
                f"{np.std(found, ddof=1):.3f}",
            )
    samples = max(arguments.samples)
    pairs = [
        [assessed(samples, seed, precision=kind).difficulty for kind in ("fp32", "bf16")]
        for seed in range(arguments.repeats)
    ]
    alike = [spearman(*pair) for pair in pairs]
    yield (
        "bf16 with fp32, same masks",
        str(samples),
        f"{np.mean(alike):.4f}",
        f"{np.std(alike):.4f}",
    )
    apart = np.median([np.abs(two / one - 1) for one, two in pairs])
    yield "their median relative difference", str(samples), f"{apart:.1e}", ""
    entropy = spearman(reference.scores["deterministic_entropy"], reference.difficulty)
    yield "entropy of one pass without dropout", "0", f"{entropy:.3f}", ""
    losses = np.array([np.mean(trainer.losses[identity]) for identity in ids])
    yield "loss in the last epoch", "0", f"{spearman(losses, reference.difficulty):.3f}", ""


def main():
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="demo", help="demo, or a folder")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, nargs="+", default=(6, 10, 20))
    parser.add_argument("--reference", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", default=("channel", "element"))
    parser.add_argument("--foreground", type=float, nargs=2, default=(0.0, 1.0))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    keep_freed_memory()
    settings = [*runs.settings_of(arguments), "control.enabled=false"]
    images, split = runs.load(settings, arguments)
    for kind in arguments.kinds:
        trainer, _ = runs.trained([*settings, f"network.dropout_kind={kind}"], images, split)
        title = (
            f"{len(split['train'])} images of {arguments.size} x {arguments.size}, "
            f"{arguments.epochs} epochs, dropout by {kind}s, {arguments.reference} passes"
        )
        table = Table("D by", "N", "rank correlation", "deviation", title=title)
        for row in measure(trainer, split["train"], arguments):
            table.add_row(*row)
        Console().print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}")


if __name__ == "__main__":
    main()

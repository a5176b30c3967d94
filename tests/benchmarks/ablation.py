"""Speedup by each rewrite of MC-Dropout passes: python -m tests.benchmarks.ablation --data PATH

An assessment with all rewrites and one without a single rewrite are run in turn, by default four
times each, on one thread. The ratio is the median over the turns of their processor times: 1.10
means that an assessment takes a tenth longer without the rewrite. Most rewrites with a small gain
are not independent: without a group of them the loss is larger than their ratios suggest.
"""

import argparse
import contextlib
import time
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from polyseg.config import UncertaintyConfig
from polyseg.montecarlo.assessment import assess
from polyseg.montecarlo.compiler import rewrite, run
from tests.benchmarks.montecarlo import build, load


def without(owner, name, replacement=lambda *_: None):
    """Return a context in which a function is replaced, by default by one that does nothing."""
    return lambda: mock.patch.object(owner, name, replacement)


WAYS = {
    "batch norm into the convolution before it": without(rewrite, "fold_batch_norms"),
    "input added to the kernel": without(rewrite, "fold_identities"),
    "1 x 1 convolutions merged": without(rewrite, "merge_pointwise"),
    "concatenations split": without(rewrite, "split_concatenations"),
    "Winograd's algorithm": without(rewrite, "use_winograd"),
    "in place": without(rewrite, "work_in_place", lambda part, *_: part.function.recompile()),
    "windows": without(run.Program, "_find_ends", lambda *_: []),
    "channels last": without(torch, "channels_last", torch.contiguous_format),
    "all of them (plain passes)": contextlib.nullcontext,
}


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="demo", help="demo, or a folder")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--foreground", type=float, nargs=2, default=(0.1, 0.2))
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    arguments = parser.parse_args()
    arguments.network, arguments.device = "unet", "cpu"
    torch.set_num_threads(1)
    batches = load(arguments)
    network = build(arguments, batches)

    def seconds(way=contextlib.nullcontext, program="auto"):
        with way():
            start = time.process_time()
            assess(network, batches, UncertaintyConfig(samples=arguments.samples, program=program))
            return time.process_time() - start

    seconds()
    table = Table("without", "median ratio", "lowest", "highest")
    for name in arguments.only:
        program = "plain" if WAYS[name] is contextlib.nullcontext else "auto"
        pairs = [(seconds(), seconds(WAYS[name], program)) for _ in range(arguments.rounds)]
        ratios = np.array([less / whole for whole, less in pairs])
        table.add_row(
            name, *(f"{one:.2f}" for one in (np.median(ratios), *np.sort(ratios)[[0, -1]]))
        )
    Console().print(table)


if __name__ == "__main__":
    main()

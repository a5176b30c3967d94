"""Time of the losses, forward and backward, and of MONAI's: python tests/benchmarks/loss.py

Measured in turn in one process, so that other load affects all equally. Each row's
ratio is the median over rounds of its time to that of MONAI's loss in the same round.
"""

import argparse
import time

import numpy as np
import torch
from monai.losses import DiceLoss
from rich.console import Console
from rich.table import Table

from polyseg.losses import dice_loss, polydice1_loss, polydice_loss


def build(device):
    """Return the losses by name, each a function of (logits, mask)."""
    epsilon = torch.linspace(-0.4, 1.0, 8, device=device)
    monai = DiceLoss(sigmoid=True, squared_pred=True)
    return {
        "MONAI DiceLoss": monai,
        "Dice": lambda logits, mask: dice_loss(logits.sigmoid(), mask).mean(),
        "PolyDice-1, epsilon per image": lambda logits, mask: polydice1_loss(
            logits.sigmoid(), mask, epsilon
        ).mean(),
        "PolyDice, 5 terms": lambda logits, mask: polydice_loss(
            logits.sigmoid(), mask, epsilon, terms=5
        ).mean(),
    }


def seconds(loss, logits, mask, repeats):
    """Return the mean time of a forward and a backward pass."""
    synchronize = torch.cuda.synchronize if logits.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        logits.grad = None
        loss(logits, mask).backward()
    synchronize()
    return (time.perf_counter() - start) / repeats


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--shape", type=int, nargs=4, default=(8, 1, 256, 256))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    logits = torch.randn(arguments.shape, device=arguments.device, requires_grad=True)
    mask = (torch.rand(arguments.shape, device=arguments.device) < 0.2).float()
    losses = build(arguments.device)
    times = {name: [] for name in losses}
    for turn in range(arguments.rounds + 2):
        for name, loss in losses.items():
            taken = seconds(loss, logits, mask, arguments.repeats)
            if turn >= 2:  # the first ones warm up
                times[name].append(taken)
    shape = "x".join(map(str, arguments.shape))
    table = Table("loss", "median ms", "ratio to MONAI", "10-90 %", title=f"({shape}), fwd + bwd")
    reference = np.array(times["MONAI DiceLoss"])
    for name, values in times.items():
        ratio = np.array(values) / reference
        low, middle, high = np.percentile(ratio, (10, 50, 90))
        milliseconds = f"{1e3 * np.median(values):.2f}"
        table.add_row(name, milliseconds, f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}")


if __name__ == "__main__":
    main()

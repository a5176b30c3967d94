"""Time to the first help, beside what it is made of: python tests/benchmarks/startup.py

Each is a new process; they are started in turn, and each row's ratio is the median over rounds of
its time over that of importing typer, rich and pydantic alone in the same round.
"""

import argparse
import subprocess
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

REFERENCE = "import typer, rich, pydantic"
COMMANDS = {
    REFERENCE: ["-c", REFERENCE],
    "python -c pass": ["-c", "pass"],
    "polyseg --help": ["-m", "polyseg", "--help"],
    "polyseg train --help": ["-m", "polyseg", "train", "--help"],
    "polyseg config show": ["-m", "polyseg", "config", "show"],
    "import torch": ["-c", "import torch"],
}


def seconds(arguments):
    """Return how long a process of this Python takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    times = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            taken = seconds(arguments)
            if turn:  # the first one fills the disk's cache
                times[name].append(taken)
    table = Table("process", "median s", "ratio", "10-90 %")
    for name, values in times.items():
        ratio = np.array(values) / np.array(times[REFERENCE])
        low, middle, high = np.percentile(ratio, (10, 50, 90))
        table.add_row(name, f"{np.median(values):.2f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

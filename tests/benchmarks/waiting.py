"""Time of a training step with two threads by OpenMP waiting: python -m tests.benchmarks.waiting

`polyseg train` on phantoms of 128 x 128 in batches of 8, in turn with the default waiting of GNU
OpenMP and with that of polyseg, on the machine as it is and beside two busy loops. Each
line shows the load of other processes: the machine was idle only if it is nearly 0.
"""

import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = {"default": {"GOMP_SPINCOUNT": "300000"}, "polyseg": {}}
STEPS = 2
SETTINGS = ("data.demo_images=20", "data.split=[0.8,0.1,0.1]", "output.figures=false")


def used():
    """Return the processor seconds of the whole machine and of the children of this process."""
    ticks = list(map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]))
    mine = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), mine[0] + mine[1]


def step(way, epochs):
    """Return the median seconds of a step and the number of cores used by other processes."""
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"OMP_NUM_THREADS": "2"} | WAYS[way]
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "polyseg", "train", "--out", f"{folder}/run", "--quiet"]
        command += ["--loss", "dice", "--epochs", str(epochs), *words]
        (all_before, mine_before), start = used(), time.monotonic()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        (all_after, mine_after), seconds = used(), time.monotonic() - start
        rows = list(csv.DictReader(Path(folder, "run", "history.csv").read_text().splitlines()))
    others = (all_after - all_before - mine_after + mine_before) / seconds
    return statistics.median(float(row["seconds_train"]) / STEPS for row in rows[1:]), others


def main():
    """Measure and print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6)
    how = parser.parse_args()
    for busy in (0, 2):
        found = {way: [] for way in WAYS}
        for turn in range(how.rounds):
            for way in list(WAYS)[:: 1 if turn % 2 else -1]:
                loop = [sys.executable, "-c", "while True: pass"]
                loops = [subprocess.Popen(loop) for _ in range(busy)]
                try:
                    seconds, others = step(way, how.epochs)
                finally:
                    for one in loops:
                        one.kill()
                        one.wait()
                found[way].append(seconds)
                print(
                    f"{busy} loops, {way}: {seconds:.3f} s, others {others:.1f} cores", flush=True
                )
        for way, values in found.items():
            print(f"{busy} loops, {way}: median {statistics.median(values):.3f} s")


if __name__ == "__main__":
    main()

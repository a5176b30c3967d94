"""Run the trials: `python -m tests.stress [NAME ...] [--count N] [--seed S]`."""

import argparse
import importlib
import importlib.util
import signal
import sys
import time
import traceback
from typing import NamedTuple

ALL = 1_000_000
"""Count of modules with a fixed number of trials."""
COUNTS = {
    "kills": 100,
    "signals": 40,
    "access": 200,
    "soak": 200,
    "faults": ALL,
    "damage": 2000,
    "configs": 1000,
    "checkpoints": 1000,
    "pickles": ALL,
    "disk_full": 20,
}


class Row(NamedTuple):
    """Result of the trials of one module."""

    name: str
    trials: str
    seed: int
    failures: str
    seconds: float


def main() -> int:
    """Run the requested trials, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COUNTS)}")
    parser.add_argument("--count", type=int, help="trials of each; its own number if left out")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    asked = parser.parse_args()
    if unknown := set(asked.names) - COUNTS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: choose of {', '.join(COUNTS)}")
    # Background jobs of a shell inherit that this signal is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows = [_run(name, asked.count, asked.seed) for name in asked.names or COUNTS]
    _print_table(rows)
    return int(any(row.failures != "0" for row in rows))


def _run(name: str, count: int | None, seed: int) -> Row:
    count = COUNTS[name] if count is None else count
    trials = "all" if count >= ALL else str(count)
    module = f"tests.stress.{name}"
    if importlib.util.find_spec(module) is None:
        return Row(name, trials, seed, "not there", 0.0)
    begin = time.monotonic()
    try:
        failures = importlib.import_module(module).check(count, seed)
    except Exception:
        # The other modules still run, and the table is printed.
        traceback.print_exc()
        return Row(name, trials, seed, "broke off", time.monotonic() - begin)
    for failure in failures:
        print(f"failed: {failure}", flush=True)
    return Row(name, trials, seed, str(len(failures)), time.monotonic() - begin)


def _print_table(rows: list[Row]) -> None:
    print(f"\n{'name':<12} {'trials':>7} {'seed':>6} {'failures':>9} {'seconds':>8}")
    for row in rows:
        print(f"{row.name:<12} {row.trials:>7} {row.seed:>6} {row.failures:>9} {row.seconds:>8.0f}")


if __name__ == "__main__":
    sys.exit(main())

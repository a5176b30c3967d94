"""Processor time of commands that need no network: python tests/benchmarks/startup.py

Each command has a reference with its minimal work: the imports alone, and where the
name says so the reading or drawing as well. A second reference does the same within an empty
command of typer, because parsing arguments and printing help import more than `import typer` does.
All are new processes, started in turn, with cached bytecode as pip installs it; a ratio is the
median over rounds of a command's processor time to that of a reference in the same round.
`--beside DIR` measures the polyseg of another folder as well, such as a checkout from before a
change.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from polyseg.data.phantoms.phantom_sets import make_phantoms, write_phantoms

HERE = Path(__file__).parents[2]
RUN = str(HERE / "tests/run_of_0_1")
CLI = "import typer, rich, pydantic"
EMPTY_COMMAND = """
import typer
from typing import Annotated
app = typer.Typer()
@app.command()
def work(
    path: Annotated[str, typer.Argument()] = "",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None: ...
@app.command()
def other() -> None: ...
app(standalone_mode=False)
"""
PLOT = "import numpy, matplotlib.figure"
DRAW = """
import numpy as np
from matplotlib.figure import Figure
theta = np.linspace(0, np.pi / 2, 1001)
figure = Figure(figsize=(3.5, 3), layout="constrained")
axes = figure.add_subplot(xlabel="angle", ylabel="loss")
for epsilon in (-0.4, 0, 0.5, 1):
    axes.plot(theta, 0.9 + 0.1 * (0.5 + epsilon) * theta**2, label=str(epsilon))
figure.legend(loc="outside lower center", ncols=3)
for suffix in ("png", "pdf"):
    figure.savefig(f"loss.{suffix}", dpi=300)
"""
RECORDS = "import h5py, numpy, rich.console, rich.table"
READ = """
import numpy as np, pathlib
from PIL import Image
for path in sorted(pathlib.Path("phantoms").rglob("*.png")):
    np.asarray(Image.open(path))
"""
COMMANDS = {
    "--help": (CLI, ["--help"]),
    "train --help": (CLI, ["train", "--help"]),
    "config show": (CLI, ["config", "show"]),
    "plot-loss (imports)": (PLOT, ["plot-loss", "--overwrite"]),
    "plot-loss (imports, drawing)": (DRAW, ["plot-loss", "--overwrite"]),
    "schedule show": (RECORDS, ["schedule", "show", RUN]),
    "schedule export": (RECORDS, ["schedule", "export", RUN]),
    "report (imports)": (f"{RECORDS}\n{PLOT}", ["report", RUN, "--overwrite"]),
    "data check (imports, reading)": (READ, ["data", "check", "phantoms"]),
    "data split (imports, reading)": (
        READ,
        ["data", "split", "phantoms", "--out", "split.json", "--overwrite"],
    ),
}
"""References and arguments of polyseg of each command."""


def processor_seconds(arguments: list[str], package: Path, folder: Path) -> float:
    """Return the processor time of a process of this Python, in seconds."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ
        | {"PYTHONPATH": str(package)}
        | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "bytecode")},
        cwd=folder,
    ) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments}: exit code {process.returncode}")
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=Path, help="folder with another polyseg")
    options = parser.parse_args()
    packages = [HERE] if options.beside is None else [options.beside.resolve(), HERE]
    times: dict[str, list[list[float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_phantoms(folder / "phantoms", make_phantoms(40))
        for turn in range(options.rounds + 1):
            for name, (reference, arguments) in COMMANDS.items():
                words = ["--help"] if "--help" in arguments else ["work", "path"]
                within = ["-c", f"{EMPTY_COMMAND}\n{reference}", *words]
                row = [
                    processor_seconds(["-c", reference], HERE, folder),
                    processor_seconds(within, HERE, folder),
                ]
                for package in packages:
                    command = ["-m", "polyseg", *arguments]
                    row.append(processor_seconds(command, package, folder))
                if turn:  # The first round fills the caches of files and bytecode.
                    times[name].append(row)
    table = Table("command", "reference s", "in typer s")
    for package in packages:
        for head in ("s", "ratio", "ratio, in typer"):
            table.add_column(f"{package.name} {head}")
    for name, rows in times.items():
        seconds = np.array(rows)
        medians = np.median(seconds, axis=0)
        ratios = [np.median(seconds / seconds[:, [i]], axis=0) for i in (0, 1)]
        cells = [medians[0], medians[1]]
        for i in range(2, len(medians)):
            cells += [medians[i], ratios[0][i], ratios[1][i]]
        table.add_row(name, *(f"{cell:.2f}" for cell in cells))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

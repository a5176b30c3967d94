"""Run a gate of a study: does it help to place a steep loss on difficult images?

    python examples/study.py RUNS ROWS.jsonl --data DATA --gate b --sets kvasir-polyps
    python examples/study.py RUNS ROWS.jsonl --data DATA --gate c --measure expected_error

Gate A trains networks only: for fold 0 and seeds 0 to 2, one with epsilon 0 for all ("uniform") and
two donors, each trained on half of its training images and tested on the other half, so that each
training image gets an error (1 - Dice) from a network that has not seen it. Then each measure of
difficulty is taken of the training images.

Gate B gives each image, in all epochs, the epsilon that this error asks for ("oracle", folds 0 to
2, seed = fold, sensitivities 0.3 and 1), beside the same epsilons permuted over the images by three
fixed permutations, and beside "uniform".

Gate C compares the arms of ARMS and REPLAYS (folds 0 to 4, seed = fold), where "chosen" is adaptive
by `--measure` with `--samples` passes and `--sensitivity`, which gates A and B choose.

A run whose row is in ROWS.jsonl is not repeated, and one that was stopped is resumed. Each run
takes one thread, and `--jobs` of them run at once. `python examples/study_analysis.py ROWS.jsonl`
prints the tables.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseg.difficulty import epsilon_from_weight, normalise_by_rank
from polyseg.metrics.rank_stability import spearman
from polyseg.montecarlo import assess
from polyseg.records import Schedule, no_progress
from polyseg.runs import read_schedule
from polyseg.runs.checkpoints import read_checkpoint
from polyseg.runs.record_files import write_schedule
from polyseg.runs.trained_model import Inputs, images_for, open_model

SETS = {
    "dsb2018-histology": ("dsb2018-histology", 96),
    "dsb2018-fluorescence": ("dsb2018-fluorescence", 96),
    "kvasir-polyps": ("kvasir-polyps", 96),
    "sunnybrook-lv": ("sunnybrook-lv/groups.csv", 96),
    "idrid-microaneurysms": ("idrid-microaneurysms/groups.csv", 128),
}
NETWORK = "{channels: [12, 24, 48, 96], strides: [2, 2, 2], num_res_units: 2}"
EPOCHS = 30
SENSITIVITIES = (0.3, 1.0)
PERMUTATIONS = (1, 2, 3)
PASSES = (5, 10, 20, 50, 100)
REFERENCE = 200
SCORES = ("dispersion", "expected_error", "pairwise_dice", "size")
EPSILON_MIN, EPSILON_MAX = -0.4, 1.0
KEYS = ("set", "fold", "seed", "arm")
_CONSTANT = ("--loss", "polydice1", "--set", "control.enabled=false")
ARMS = {
    "uniform": _CONSTANT,
    "dice": ("--loss", "dice", "--set", "control.enabled=false"),
    "dice_bce": ("--loss", "dice_bce", "--set", "control.enabled=false"),
    "epsilon-0": _CONSTANT,
    "epsilon-1": (*_CONSTANT, "--set", "loss.epsilon=1"),
    "thesis": ("--preset", "thesis"),
}
"""Options of `polyseg train` for the arms that need no other run."""
REPLAYS = {
    "thesis-mean": ("thesis", "mean"),
    "thesis-permuted": ("thesis", "permuted"),
    "chosen-permuted": ("chosen", "permuted"),
    "inverted": ("chosen", "inverted"),
}
"""The arm whose run is replayed, and how."""


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    set: str
    fold: int
    seed: int
    arm: str
    """donor-0, donor-1, oracle-LAMBDA, permuted-K-LAMBDA, chosen, or one of ARMS and REPLAYS."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.set}/fold{self.fold}-seed{self.seed}-{self.arm}"


def gate(name: str, sets: list[str]) -> list[list[Run]]:
    """Return the runs of a gate in stages; those of a stage depend on earlier stages only.

    >>> [len(stage) for stage in gate("a", ["kvasir-polyps"])]
    [9]
    >>> [len(stage) for stage in gate("b", ["kvasir-polyps"])]
    [9, 24]
    >>> [len(stage) for stage in gate("c", ["kvasir-polyps"])]
    [30, 20]
    """
    places = [(0, seed) for seed in range(3)] if name == "a" else [(k, k) for k in range(3)]
    first = ["uniform", "donor-0", "donor-1"]
    second = [f"oracle-{x:g}" for x in SENSITIVITIES]
    second += [f"permuted-{k}-{x:g}" for x in SENSITIVITIES for k in PERMUTATIONS]
    stages = [first] if name == "a" else [first, second]
    if name == "c":
        places = [(k, k) for k in range(5)]
        stages = [[*(arm for arm in ARMS if arm != "uniform"), "chosen"], list(REPLAYS)]
    return [
        [Run(data, fold, seed, arm) for data in sets for fold, seed in places for arm in arms]
        for arms in stages
    ]


class Study:
    """Folders, rows and commands of the runs."""

    def __init__(self, data: Path, runs: Path, rows: Path, chosen: Sequence[str] = ()) -> None:
        self.data, self.runs, self.rows = data, runs, rows
        self.chosen = [word for setting in chosen for word in ("--set", setting)]
        """Options of the arm that gates A and B choose."""
        self._lock = threading.Lock()

    def done(self) -> dict[str, dict[str, Any]]:
        """Return the rows of trained runs, by the name of the run."""
        runs = [row for row in self._read() if "kind" not in row]
        return {Run(*(row[key] for key in KEYS)).name: row for row in runs}

    def go(self, run: Run) -> None:
        """Train a run, test its last epoch's weights, and append its row."""
        if run.name in self.done():
            return
        folder = self.runs / run.name
        folder.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        used = 0.0
        if (folder / "checkpoints/last.safetensors").exists():
            used += self._polyseg("train", "--resume", "--out", folder)
        else:
            used += self._polyseg("train", "--out", folder, *self._arguments(run))
        tested = folder / "last"
        last = folder / "checkpoints/last.safetensors"
        self._polyseg("evaluate", last, "--out", tested, "--overwrite", "--no-figures")
        with (tested / "per_image.csv").open() as file:
            images = [
                [row["id"], round(float(row["dice"]), 5), int(float(row["mask_pixels"]))]
                for row in csv.DictReader(file)
            ]
        config = (folder / "config.yaml").read_bytes()
        row: dict[str, Any] = asdict(run) | {
            "polyseg": _version(),
            "settings": hashlib.sha256(config.split(b"output:")[0]).hexdigest()[:12],
            "minutes": round((time.monotonic() - started) / 60, 2),
            "cpu_minutes": round(used / 60, 2),
            "epsilon": self._quantiles(folder),
            "images": images,
        }
        self._append(row)

    def measure(self, run: Run) -> None:
        """Assess the training images of a run by each measure, with more and with fewer passes.

        The row has D of each image by each measure with 200 passes, the loss of the last epoch
        (`training_loss`), and the rank correlation of D by fewer passes, of other masks, with D by
        200 passes.
        """
        if any(
            row.get("kind") == "measures" and Run(*(row[key] for key in KEYS)) == run
            for row in self._read()
        ):
            return
        started = time.process_time()
        last = self.runs / run.name / "checkpoints/last.safetensors"
        model = open_model(last, "cpu", False)
        images, ids = images_for(model, Inputs(part="train"), "train", no_progress)
        batches = list(images.batches(ids, model.config.training.batch_size))

        def difficulties(samples: int, seed: int) -> Mapping[str, NDArray[np.float64]]:
            settings = model.config.uncertainty.model_copy(update={"samples": samples})
            found = assess(model.network, batches, settings, seed=seed, also=SCORES)
            return found.in_order(ids).scores

        reference = difficulties(REFERENCE, seed=run.seed)
        agreement: dict[str, dict[int, float]] = {name: {} for name in reference}
        for samples in PASSES:
            for name, scores in difficulties(samples, seed=1000 + samples).items():
                agreement[name][samples] = round(spearman(scores, reference[name]), 4)
        checkpoint = read_checkpoint(last)
        assert checkpoint.losses is not None and checkpoint.schedule is not None
        losses = dict(zip(checkpoint.schedule.ids, checkpoint.losses, strict=True))
        loss = np.array([losses[identity] for identity in ids])
        columns = {**reference, "training_loss": loss}
        by_image = {
            name: {identity: float(f"{d:.6g}") for identity, d in zip(ids, column, strict=True)}
            for name, column in columns.items()
        }
        minutes = round((time.process_time() - started) / 60, 2)
        row = asdict(run) | {"kind": "measures", "polyseg": _version(), "cpu_minutes": minutes}
        self._append(row | {"agreement": agreement, "scores": by_image})

    def keep_groups(self, name: str) -> None:
        """Append a row with the group of each image of a set, if it has groups and no such row."""
        groups = self._groups(name)
        known = any((row.get("kind"), row["set"]) == ("groups", name) for row in self._read())
        if groups and not known:
            self._append({"kind": "groups", "set": name, "groups": groups})

    def _append(self, row: Mapping[str, object]) -> None:
        with self._lock, self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        if not self.rows.exists():
            return []
        return [json.loads(line) for line in self.rows.read_text().splitlines()]

    def _arguments(self, run: Run) -> list[object]:
        path, size = SETS[run.set]
        settings = [f"data.size={size}", f"network.kwargs={NETWORK}", "output.figures=false"]
        return [
            *("--data", self.data / path, "--split", self._split(run)),
            *("--seed", run.seed, "--epochs", EPOCHS),
            *(word for setting in settings for word in ("--set", setting)),
            *self._arm(run),
        ]

    def _arm(self, run: Run) -> Sequence[object]:
        """Return the options in which the arms differ."""
        if run.arm.startswith("donor"):
            return _CONSTANT
        if run.arm == "chosen":
            return "--loss", "polydice1", *self.chosen
        if run.arm in REPLAYS:
            arm, how = REPLAYS[run.arm]
            original = self.runs / replace(run, arm=arm).name
            same = self._arm(replace(run, arm=arm))
            return *same, "--replay", original, "--replay-arm", how
        if run.arm.startswith(("oracle", "permuted")):
            return "--loss", "polydice1", "--replay", self._schedule(run)
        return ARMS[run.arm]

    def _split(self, run: Run) -> Path:
        """Return the split of a run: the fold's, or for a donor half of its training images."""
        path, _ = SETS[run.set]
        fold = self.runs / "splits" / f"{run.set}-{run.fold}.json"
        fold.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if not fold.exists():
                self._polyseg("data", "split", self.data / path, "--fold", run.fold, "--out", fold)
            if not run.arm.startswith("donor"):
                return fold
            half = fold.with_name(f"{run.set}-{run.fold}-seed{run.seed}-{run.arm}.json")
            split = json.loads(fold.read_text())
            halves = self._halves(run, split["train"])
            mine = int(run.arm[-1])
            split["train"], split["test"] = halves[mine], halves[1 - mine]
            half.write_text(json.dumps(split, indent=1))
            return half

    def _halves(
        self, run: Run, training: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the training images in two halves; images of one group stay together."""
        groups = self._groups(run.set)
        names = sorted({groups.get(image["id"], image["id"]) for image in training})
        np.random.default_rng([run.seed, run.fold]).shuffle(names)
        first: set[str] = set()
        for name in names:
            held = sum(groups.get(image["id"], image["id"]) in first for image in training)
            if 2 * held < len(training):
                first.add(name)
        parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        for image in training:
            parts[groups.get(image["id"], image["id"]) not in first].append(image)
        return parts

    def _groups(self, name: str) -> dict[str, str]:
        path = self.data / SETS[name][0]
        if path.suffix != ".csv":
            return {}
        with path.open() as file:
            return {Path(row["image"]).stem: row["group"] for row in csv.DictReader(file)}

    def _schedule(self, run: Run) -> Path:
        """Write the epsilons of an oracle or a permuted arm, the same in all epochs."""
        kind, *which = run.arm.split("-")
        errors = out_of_fold_errors(self.done(), run)
        ids = sorted(errors)
        difficulty = np.array([errors[identity] for identity in ids])
        if kind == "permuted":
            generator = np.random.default_rng([run.seed, run.fold, int(which[0])])
            difficulty = generator.permutation(difficulty)
        epsilon = epsilon_from_weight(
            normalise_by_rank(difficulty), EPSILON_MIN, EPSILON_MAX, float(which[-1])
        )
        path = self.runs / f"{run.name}.h5"
        path.unlink(missing_ok=True)
        epochs = np.arange(1, EPOCHS + 1)
        table = np.tile(epsilon.astype(np.float32), (EPOCHS, 1))
        write_schedule(path, Schedule(ids, epochs, table))
        return path

    def _quantiles(self, folder: Path) -> list[float]:
        """Return the 5th, 50th and 95th percentile of epsilon over images and epochs."""
        epsilon = read_schedule(folder / "schedule.h5").epsilon
        return [round(float(x), 4) for x in np.percentile(epsilon, [5, 50, 95])]

    def _polyseg(self, *arguments: object) -> float:
        """Run a command with one thread and return its processor seconds.

        Raises:
            RuntimeError: it failed.
        """
        command = [sys.executable, "-m", "polyseg", *map(str, arguments), "-q"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child:
            assert child.stdout is not None
            said = child.stdout.read()
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{said[-2000:]}")
        return usage.ru_utime + usage.ru_stime


def out_of_fold_errors(rows: dict[str, dict[str, Any]], run: Run) -> dict[str, float]:
    """Return 1 - Dice of each training image of a run, by the donor that has not seen it."""
    errors: dict[str, float] = {}
    for k in (0, 1):
        donor = rows[Run(run.set, run.fold, run.seed, f"donor-{k}").name]
        errors |= {identity: 1 - dice for identity, dice, _ in donor["images"]}
    return errors


def _version() -> str:
    """Return the hash of polyseg's source, which says what trained a run."""
    import polyseg

    digest = hashlib.sha256()
    for path in sorted(Path(polyseg.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    """Run a gate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder for the runs, outside the repository")
    parser.add_argument("rows", type=Path, help="JSON lines, a row for each run")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--gate", choices=["a", "b", "c"], required=True)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--measure", help="of the chosen arm of gate C")
    parser.add_argument("--samples", type=int, default=5, help="passes of the chosen arm")
    parser.add_argument("--sensitivity", type=float, default=SENSITIVITIES[0])
    given = parser.parse_args()
    if given.gate == "c" and given.measure is None:
        parser.error("--gate c needs --measure, which gate A chooses")
    chosen = [f"uncertainty.metric={given.measure}", f"uncertainty.samples={given.samples}"]
    chosen += ["control.reduction=rank", "control.map=weight", "control.statistics=dataset"]
    chosen += [f"control.sensitivity={given.sensitivity}"]
    chosen += [f"control.epsilon_min={EPSILON_MIN}", f"control.epsilon_max={EPSILON_MAX}"]
    study = Study(given.data, given.runs, given.rows, chosen)
    for name in given.sets:
        study.keep_groups(name)
    failed = 0
    for stage in gate(given.gate, given.sets):
        failed += each(study.go, stage, given.jobs)
    if given.gate == "a":
        measured = [run for run in gate("a", given.sets)[0] if run.arm == "uniform"]
        failed += each(study.measure, measured, 1)
    sys.exit(bool(failed))


def each(task: Callable[[Run], None], runs: Sequence[Run], jobs: int) -> int:
    """Do a task for each run, a line for each, and return how many failed."""
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        for run, future in [(run, pool.submit(task, run)) for run in runs]:
            try:
                future.result()
                print(f"{time.strftime('%H:%M')} {run.name}", flush=True)
            except Exception as error:
                failed += 1
                print(f"failed: {run.name}: {type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    main()

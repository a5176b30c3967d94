"""Check that a change of the code changes no result.

    python tests/benchmarks/digests.py BEFORE.json     # in a checkout of the old code
    python tests/benchmarks/digests.py AFTER.json      # in a checkout of the new code
    python tests/benchmarks/digests.py --compare BEFORE.json AFTER.json

Small trainings and the other commands are run as `python -m polyseg` with the package in the
current folder, and each result is recorded as a sha256: weights, optimizer state, difficulties,
epsilons, history, tables, predicted masks, pixels of figures and what --json and --csv print. No
module of polyseg is imported, so the same file works before and after modules are moved. Numbers
are compared to the last bit, so use one machine with the same versions of the packages. Prose
has separate entries, which end in "(words)", so a change of wording does not affect the numbers.

Excluded: times, dates, log.txt, environment.json, the hashes in the header of a checkpoint, and the
bytes of PDF files, which hold their date; of these files only the presence is recorded.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import io
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import nibabel
import numpy as np
from PIL import Image, ImageSequence
from safetensors import safe_open

COMMON = [
    "data.size=32",
    "data.demo_images=24",
    "network.kwargs={channels: [4, 8], strides: [2], num_res_units: 1}",
    "training.epochs=3",
    "training.device=cpu",
    "control.start=1",
    "control.every=1",
    "uncertainty.samples=6",
    "output.figures=false",
]
"""Settings of all trainings; those of a single training override them."""
COMPILED = ["data.size=64", "uncertainty.samples=32"]
"""With 17 training images 64 x 64 x 17 x 32 = 2.2 million: above the 2 million pixels times passes
from which MC Dropout compiles the network."""

TRAININGS = {
    "polydice1": COMPILED,
    "dice_bce": ["loss.name=dice_bce", "data.size=64"],
    "polydice": [
        *("loss.name=polydice", "loss.scale=printed", "loss.scale_gradient=full"),
        *("control.statistics=dataset", "control.percentile=75", "control.epsilon_min=-0.3"),
        *("uncertainty.metric=entropy", "uncertainty.region=prediction"),
        *("uncertainty.masks=independent", "uncertainty.save_maps=true"),
        *("network.dropout_layers=all", "data.demo_modality=endoscopy"),
    ],
    "tversky": [
        *("loss.name=tversky", "training.optimizer=sgd", "training.scheduler=polynomial"),
        *("training.early_stopping=1", "data.normalise=percentile"),
    ],
    "focal": [
        *("loss.name=focal", "data.augmentation=strong", "data.augment.blur=1"),
        *("data.demo_modality=endoscopy", "data.normalise=dataset", "training.workers=1"),
    ],
    "tvmf": [
        *("loss.name=tvmf", "training.recompute=true", "training.accumulate=2"),
        *("training.optimizer=adam", "training.precision=bf16", "data.augmentation=none"),
    ],
    "union": [
        *COMPILED,
        *(
            "uncertainty.metric=variance",
            "uncertainty.region=union",
            "network.dropout_kind=element",
        ),
        *("network.name=attention-unet", "network.kwargs={channels: [4, 8], strides: [2]}"),
        *("loss.bce_weight=0.5", "training.seed=3"),
    ],
    "boundary": [
        *("uncertainty.metric=deterministic_entropy", "uncertainty.region=boundary"),
        *("loss.scale_gradient=detached", "training.channels_last=false"),
    ],
    "labels": [
        *COMPILED,
        *("data.path=labels", "data.foreground={whole: [1, 2], core: 2}", "loss.epsilon=0.2"),
        *("network.dropout_kind=element", "output.figures=true"),
    ],
    "tile": [
        *("data.path=phantoms", "data.fit=tile", "uncertainty.samples=auto"),
        *("uncertainty.rank_target=0.9", "uncertainty.region=boundary"),
    ],
    "fold": [
        *("data.folds=4", "data.fold=1", "data.stratify=false", "uncertainty.metric=training_loss"),
        *("training.on_nonfinite=skip", "training.scheduler=constant", "loss.smooth=1"),
    ],
    "basic-unet": [
        *COMPILED,
        *("network.name=basic-unet", "network.kwargs={features: [4, 4, 4, 4, 4, 4]}"),
        "uncertainty.masks=independent",
    ],
    "segresnet": [
        *COMPILED,
        "network.name=segresnet",
        "network.kwargs={init_filters: 8, blocks_down: [1, 1], blocks_up: [1], norm: instance}",
        *("network.dropout_layers=bottleneck", "control.start=2"),
    ],
    "own network": [
        *COMPILED,
        *("network.name=own:network", "network.kwargs={}", "network.multiple_of=16"),
        *("loss.name=polydice", "control.epsilon_min=-0.2", "control.start=2"),
        "uncertainty.region=image",
    ],
}

OWN_NETWORK = """
from torch import nn

def network(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.3),
        nn.Conv2d(6, 6, 3, padding=1), nn.SiLU(), nn.Dropout(0.2), nn.Conv2d(6, out_channels, 1),
    )
"""


class Case:
    """A named part of the comparison, which runs commands and records digests."""

    def __init__(self, name: str, work: Path):
        self.name, self.work = name, work
        self.digests: dict[str, str] = {}
        self.failures: list[str] = []

    def run(self, *arguments: str, processes: int = 1) -> str:
        """Return the standard output of a command; report and record a failure."""
        several = ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m")
        start = several if processes > 1 else ()
        command = [sys.executable, "-m", *start, "polyseg", *arguments]
        environment = os.environ | {
            "PYTHONPATH": str(Path.cwd()),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            command, cwd=self.work, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            line = shlex.join(["polyseg", *arguments])
            self.failures.append(line)
            print(f"{line}\nexit code {done.returncode}: {done.stderr[-2000:]}", file=sys.stderr)
        return done.stdout

    def train(self, out: str, settings: list[str], *arguments: str, processes: int = 1) -> None:
        """Train a network and record the output of --json; a space in `out` becomes a dash."""
        sets = [part for setting in settings for part in ("--set", setting)]
        fixed = ("train", "--out", out, *arguments, "--json", "-q")
        printed = self.run(*fixed, *sets, processes=processes)
        self.record(f"train {out}", digests_of_json(self.cleaned(printed)))

    def print(self, *arguments: str) -> None:
        """Run a command and record its output, JSON or other text."""
        printed = self.cleaned(self.run(*arguments))
        digests = digests_of_json if "--json" in arguments else digests_of_text
        self.record(shlex.join(arguments), digests(printed))

    def record(self, name: str, parts: dict[str, str]) -> None:
        """Record the digests of the parts of a result."""
        self.digests |= {f"{name} {part}".strip(): digest for part, digest in parts.items()}

    def record_files(self, *folders: str) -> None:
        """Record the digests of all files in folders, or of single files."""
        for path in sorted(self.work / folder for folder in folders):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    self.record(file.relative_to(self.work).as_posix(), self.digests_of(file))

    def digests_of(self, file: Path) -> dict[str, str]:
        """Return the digest of each part of a file."""
        name = file.name
        if name in {"log.txt", "environment.json", ".lock"} or file.suffix == ".pdf":
            return {"(presence)": ""}
        if file.suffix == ".safetensors":
            return digests_of_checkpoint(file)
        if file.suffix == ".h5":
            return self.digests_of_hdf5(file)
        if file.suffix in {".png", ".tif", ".tiff"}:
            with Image.open(file) as image:
                pages = [np.asarray(page) for page in ImageSequence.Iterator(image)]
                return {"pixels": digest_of(*pages)}
        if ".nii" in name:
            volume = nibabel.load(file)
            return {"pixels": digest_of(np.asarray(volume.dataobj), volume.affine)}
        text = self.cleaned(file.read_text(encoding="utf-8"))
        if file.suffix == ".json":
            return digests_of_json(text)
        if file.suffix == ".csv":
            return digests_of_csv(text)
        return digests_of_html(text) if file.suffix == ".html" else digests_of_text(text)

    def digests_of_hdf5(self, file: Path) -> dict[str, str]:
        """Return a digest for each data set and each attribute."""
        found = {}

        def visit(name: str, node: h5py.Group | h5py.Dataset) -> None:
            for key, value in node.attrs.items():
                found[f"{name}@{key}"] = digest_of(self.plain(value))
            if isinstance(node, h5py.Dataset):
                found[name] = digest_of(self.plain(node[()]))

        with h5py.File(file) as opened:
            visit("", opened)
            opened.visititems(visit)
        return found

    def plain(self, value: object) -> object:
        """Return an HDF5 value with cleaned texts."""
        array = np.asarray(value)
        return array if array.dtype.kind in "biuf" else self.cleaned(str(array.tolist()))

    def cleaned(self, text: str) -> str:
        """Return a text without dates and without the path of the work folder."""
        for place in {str(self.work), str(self.work.resolve())}:
            text = text.replace(place, "WORK")
        return re.sub(r"\d{4}-\d\d-\d\d([T ][\d:.,+Z]+)?", "DATE", text)


def digest_of(*values: object) -> str:
    """Return the sha256 of arrays (type, shape and bits), texts or JSON values."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype.str} {value.shape} ".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            digest.update(text.encode())
    return digest.hexdigest()


def digests_of_text(text: str) -> dict[str, str]:
    return {"": digest_of(text)}


def digests_of_json(text: str) -> dict[str, str]:
    """Return a digest of the values and one of the prose, which are texts with a space."""
    if not text:
        return {"values": "nothing printed"}
    words = []

    def values_of(node: object) -> object:
        if isinstance(node, dict):
            return {k: values_of(v) for k, v in node.items() if not k.startswith("seconds")}
        if isinstance(node, list):
            return [values_of(value) for value in node]
        if isinstance(node, str) and " " in node:
            words.append(node)
            return "words"
        return node

    found = {"values": digest_of(values_of(json.loads(text)))}
    return found | ({"(words)": digest_of(words)} if words else {})


def digests_of_csv(text: str) -> dict[str, str]:
    """Return a digest for each column except seconds, and one of the order of the columns."""
    rows = list(csv.reader(io.StringIO(text)))
    found = {"columns": digest_of(rows[0])}
    for head, *values in zip(*rows, strict=True):
        if not head.startswith("seconds"):
            found[f"column {head}"] = digest_of(values)
    return found


def digests_of_html(text: str) -> dict[str, str]:
    """Return digests of the images, of the cells of tables, and of all other text."""
    pictures = re.findall(r"base64,([A-Za-z0-9+/=]+)", text)
    body = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text.partition("<body")[2])
    cells = re.findall(r"<td[^>]*>(.*?)</td>", body, re.DOTALL)
    return {
        "pictures": digest_of(pictures),
        "cells": digest_of(cells),
        "(words)": digest_of(re.sub(r"<[^>]*>", " ", body)),
    }


def digests_of_checkpoint(file: Path) -> dict[str, str]:
    """Return a digest for each kind of tensor, such as weights, and one of the header's numbers."""
    with safe_open(file, "numpy") as opened:
        header = json.loads(opened.metadata()["polyseg"])
        kept = [i for i, name in enumerate(header["history"]) if not name.startswith("seconds")]
        kinds: dict[str, list[object]] = {}
        for name in sorted(opened.keys()):
            values = opened.get_tensor(name)
            values = values[:, kept] if name == "history" else values
            kinds.setdefault(name.partition("/")[0], []).extend([name, values])
    names = ("epoch", "channels", "levels", "best_epoch", "best_dice", "scaler", "schema")
    found = {kind: digest_of(*tensors) for kind, tensors in kinds.items()}
    return found | {"header": digest_of({name: header.get(name) for name in names})}


def write_inputs(work: Path) -> None:
    """Write the data sets that `polyseg data demo` does not make, and the module of a network."""
    (work / "own.py").write_text(OWN_NETWORK)
    generator = np.random.default_rng(0)
    for folder in ("labels/images", "labels/masks", "volumes/images", "volumes/masks"):
        (work / folder).mkdir(parents=True)
    for number in range(24):
        image, mask = _lesion(generator, 64)
        Image.fromarray(image).save(work / f"labels/images/case_{number:02}.png")
        Image.fromarray(mask).save(work / f"labels/masks/case_{number:02}.png")
    affine = np.diag([0.7, 0.8, 2.5, 1])
    for number in range(3):
        slices = [_lesion(generator, 40) for _ in range(3)]
        for folder, stack in zip(("images", "masks"), zip(*slices, strict=True), strict=True):
            values = np.stack([part[:, :36] for part in stack], axis=2)
            volume = nibabel.Nifti1Image(values, affine)
            nibabel.save(volume, work / f"volumes/{folder}/volume_{number}.nii.gz")


def _lesion(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a noisy image of a disc with a core, and its mask of labels 1 and 2."""
    rows, columns = np.mgrid[:size, :size] / size
    row, column = generator.uniform(0.3, 0.7, 2)
    distance = np.hypot(rows - row, columns - column) / generator.uniform(0.15, 0.25)
    mask = (distance < 1).astype(np.uint8) + (distance < 0.5)
    shade = generator.uniform(60, 90) + 40 * mask + 30 * np.sin(9 * rows * generator.uniform(0, 2))
    noisy = shade + generator.normal(0, 12, (size, size))
    return noisy.clip(0, 255).astype(np.uint8), mask


def phantoms(case: Case) -> None:
    case.run("data", "demo", "phantoms", "--images", "20", "--size", "48")
    case.record_files("phantoms")


def data(case: Case) -> None:
    foreground = ("--set", "data.foreground=[1, 2]")
    case.print("data", "check", "labels", "--json", *foreground)
    case.print("data", "check", "volumes", "--json", "--set", "data.plane=coronal", *foreground)
    case.print("data", "split", "phantoms", "--fold", "1", "--out", "fold.json", "--json")
    case.record_files("fold.json")
    case.print("config", "show", "--set", "loss.name=tversky")


def replay(case: Case) -> None:
    for arm in ("recorded", "shuffled", "mean", "inverted"):
        case.train(f"replay-{arm}", [], "--replay", "boundary", "--replay-arm", arm)
        case.record_files(f"replay-{arm}")


def resume(case: Case) -> None:
    case.train("resumed", COMMON, "--epochs", "2")
    case.train("resumed", [], "--resume", "--epochs", "4")
    case.record_files("resumed")


def processes(case: Case) -> None:
    case.train("two-processes", [*COMMON, *COMPILED], processes=2)
    case.record_files("two-processes")


def evaluate(case: Case) -> None:
    runs = ("polydice1", "dice_bce")
    more = ("--uncertainty", "--samples", "6", "--corrupt", "noise", "--threshold", "val")
    fixed = ("--baseline", "dice_bce", "--split", "all", "--no-figures", "--out", "compared")
    case.print("evaluate", *runs, *fixed, *more, "--json")
    case.record_files("compared")


def predict(case: Case) -> None:
    more = ("--uncertainty", "--samples", "6", "--json")
    case.print("predict", "polydice1", "phantoms/images", "volumes/images", "--out", "masks", *more)
    case.record_files("masks")


def estimate(case: Case) -> None:
    more = ("--split", "all", "--samples", "30", "--maps", "--json")
    case.print("estimate-uncertainty", "polydice1", "--out", "estimated", *more)
    case.record_files("estimated")


def schedule(case: Case) -> None:
    case.print("schedule", "show", "polydice1", "--json")
    case.print("schedule", "show", "labels-run", "--csv")
    case.print("schedule", "show", "polydice1", "--image", "phantom_0007", "--json")
    case.print("schedule", "validity", "polydice1", "--json")
    case.print("schedule", "validity", "labels-run", "--csv")
    case.print("schedule", "export", "labels-run")
    changed = ("--set", "control.sensitivity=2", "--set", "uncertainty.metric=entropy")
    case.print("schedule", "recompute", "polydice1", *changed, "--out", "new.h5", "--json")
    case.record_files("new.h5")


def figures(case: Case) -> None:
    case.run("plot-loss", "--epsilon=-0.4,0,1", "--terms", "2", "--out", "figures/loss")
    case.run("schedule", "plot", "polydice1", "--out", "figures/schedule")
    case.run("data", "preview", "phantoms", "--images", "2", "--out", "figures/preview")
    case.record_files("figures")


def report(case: Case) -> None:
    evaluation = ("--evaluation", "compared")
    case.run("report", "polydice1", "dice_bce", *evaluation, "--out", "report.html")
    case.record_files("report.html")


COMMANDS = {
    "phantoms": (phantoms, []),
    "data": (data, ["phantoms"]),
    "replay": (replay, ["boundary"]),
    "resume": (resume, []),
    "processes": (processes, []),
    "evaluate": (evaluate, ["polydice1", "dice_bce"]),
    "predict": (predict, ["polydice1", "phantoms"]),
    "estimate": (estimate, ["polydice1"]),
    "schedule": (schedule, ["polydice1", "labels"]),
    "figures": (figures, ["polydice1", "phantoms"]),
    "report": (report, ["polydice1", "dice_bce", "evaluate"]),
}
"""Cases besides the trainings, and the cases that must run before each."""


def run_cases(names: list[str]) -> dict[str, object]:
    """Run the cases and return their digests, the versions and the processor seconds."""
    if not Path("polyseg").is_dir():
        sys.exit("run this in the root of a checkout: there is no folder polyseg here")
    needs = {"tile": ["phantoms"]} | {name: before for name, (_, before) in COMMANDS.items()}
    order = ["phantoms", *TRAININGS, *COMMANDS]
    wanted = set(names or order)
    while more := {before for name in wanted for before in needs.get(name, [])} - wanted:
        wanted |= more
    digests, seconds, failures = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_inputs(work)
        for name in dict.fromkeys(order):
            if name not in wanted:
                continue
            case, start = Case(name, work), _processor_seconds()
            if name in TRAININGS:
                out = "labels-run" if name == "labels" else name.replace(" ", "-")
                case.train(out, [*COMMON, *TRAININGS[name]])
                case.record_files(out)
            else:
                COMMANDS[name][0](case)
            digests[name], seconds[name] = case.digests, _processor_seconds() - start
            failures += case.failures
            print(f"{seconds[name]:6.1f} s  {len(case.digests):5} digests  {name}", flush=True)
    print(
        f"{sum(seconds.values()):6.1f} s  {sum(map(len, digests.values())):5} digests in all",
        flush=True,
    )
    packages = ("torch", "monai", "numpy", "scipy", "h5py", "pillow", "matplotlib")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"versions": versions, "seconds": seconds, "failures": failures, "digests": digests}


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(before: Path, after: Path) -> int:
    """Print the entries that differ, or the number of equal ones; return the exit code."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    for name, version in old["versions"].items():
        if new["versions"].get(name) != version:
            print(f"note: {name} was {version} and is {new['versions'].get(name)}")
    first, second = old["digests"], new["digests"]
    different, equal = [], 0
    for case in [name for name in first if name in second]:
        for entry in sorted(first[case].keys() | second[case].keys()):
            if entry not in second[case]:
                different.append(f"{case}: {entry}: only in {before}")
            elif entry not in first[case]:
                different.append(f"{case}: {entry}: only in {after}")
            elif first[case][entry] != second[case][entry]:
                different.append(f"{case}: {entry}: differs")
            else:
                equal += 1
    for path, failures in ((before, old["failures"]), (after, new["failures"])):
        different += [f"failed in {path}: {command}" for command in failures]
    for line in different:
        print(line)
    alone = sorted(first.keys() ^ second.keys())
    rest = f"; cases in one file only: {', '.join(alone)}" if alone else ""
    print(
        f"{equal} digests equal" + (f", {len(different)} lines differ" if different else "") + rest
    )
    return 0 if equal and not different else 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", help="JSON file to write")
    names = list(dict.fromkeys([*TRAININGS, *COMMANDS]))
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=[],
        metavar="NAME",
        help=f"run these cases, and those that they need: {', '.join(names)}",
    )
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.compare is None):
        parser.error("give either a file to write or --compare with two files")
    if arguments.compare:
        sys.exit(compare(*arguments.compare))
    result = run_cases(arguments.only)
    arguments.out.write_text(json.dumps(result, indent=1))
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()

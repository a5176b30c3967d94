"""The house: which room may import which, what only one may do, where each equation is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "polyseg"

# A room may import the rooms above it.
ROOMS = [
    "errors",
    "files",
    "folders",
    "signals",
    "seeds",
    "memory",
    "processes",
    "losses",
    "uncertainty",
    "overlap",
    "calibration",
    "metrics",
    "difficulty",
    "ranks",
    "statistics",
    "records",
    "plain_yaml",
    "config",
    "control",
    "replay",
    "objective",
    "inference",
    "dropout",
    "networks",
    "compiler.winograd",
    "compiler.operations",
    "compiler.split",
    "compiler.trace",
    "compiler.rewrite",
    "compiler.window",
    "compiler.run",
    "streams",
    "passes",
    "measurement",
    "pilot",
    "montecarlo",
    "cache",
    "data.lesions",
    "data.ultrasound",
    "data.endoscopy",
    "data.phantoms",
    "data.cases",
    "data.manifest",
    "data.nnunet",
    "data.layouts",
    "data.stacks",
    "data.images",
    "data.tiff",
    "data.nifti",
    "data.dicom",
    "data.readers",
    "data.masks",
    "data.writers",
    "data.store",
    "data.preprocessing",
    "data.splits",
    "data.likeness",
    "data.augmentation",
    "data.dataset",
    "data.corruptions",
    "data.loading",
    "checkpoints",
    "run",
    "optimizers",
    "parallel",
    "recomputation",
    "steps",
    "nonfinite",
    "train",
    "schedules",
    "evaluate",
    "tables",
    "forms",
    "plots.style",
    "plots.losses",
    "plots.training",
    "plots.schedules",
    "plots.pictures",
    "plots.evaluation",
    "plots.calibration",
    "plots.robustness",
    "report",
    "results",
    "page.document",
    "page.runfiles",
    "page.results",
    "page.figures",
    "jobs.models",
    "jobs.uncertainty",
    "jobs.arms",
    "jobs.testing",
    "jobs.evaluation",
    "jobs.training",
    "jobs.schedule",
    "jobs.prediction",
    "jobs.figure",
    "jobs.data",
    "jobs.page",
    "cli.options",
    "cli.display",
    "cli.printing",
    "cli.training",
    "cli.uncertainty",
    "cli.evaluation",
    "cli.figure",
    "cli.prediction",
    "cli.schedule",
    "cli.report",
    "cli.data",
    "cli.config",
    "cli.main",
    "__main__",
]

# A package, and the one room or package of rooms that may import it.
ONLY_IN = {"h5py": "cache", "matplotlib": "plots", "typer": "cli", "rich": "cli"}
ONLY_IN |= {"nibabel": "data.nifti", "pydicom": "data.dicom"}

MATHS = {"losses", "uncertainty", "overlap", "difficulty", "ranks"}
MATHS |= {"calibration", "metrics", "statistics"}

EQUATIONS = {
    "(eq. 2)": "losses.dice_loss",
    "(eq. 3)": "losses.scale_and_angle",
    "(eq. 5)": "losses.polydice_loss",
    "(eq. 6)": "losses.polydice1_loss",
    "(eq. 7)": "montecarlo.stochastic_pass",
    "(eq. 8)": "uncertainty.prediction_variance",
    "(eq. 9)": "uncertainty.predictive_entropy",
    "(eq. 10)": "uncertainty.mutual_information",
    "(section 3.4.1)": "difficulty.foreground_mean",
    "(eq. 11)": "difficulty.normalise",
    "(eq. 12)": "difficulty.epsilon_from_difficulty",
}


def rooms():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, ast.parse(path.read_text())


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_list_is_the_house():
    assert {name for name, _ in rooms()} == set(ROOMS)


@pytest.mark.parametrize(("room", "tree"), list(rooms()), ids=lambda value: str(value)[:20])
def test_imports_point_only_upward(room, tree):
    for name in imports(tree):
        other = name.removeprefix("polyseg.")
        if name.startswith("polyseg.") and other in ROOMS:
            assert ROOMS.index(other) < ROOMS.index(room), f"{room} imports {other}"


def test_some_packages_have_one_room():
    for room, tree in rooms():
        for name in imports(tree):
            package = name.split(".")[0]
            place = ONLY_IN.get(package, room)
            assert f"{room}.".startswith(f"{place}."), f"{room} imports {package}"


def test_the_maths_rooms_know_no_config():
    for room, tree in rooms():
        if room in MATHS:
            assert not any("config" in name for name in imports(tree))


def test_each_equation_has_one_function():
    found = {equation: [] for equation in EQUATIONS}
    for room, tree in rooms():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                for equation in EQUATIONS:
                    if equation in text:
                        found[equation].append(f"{room}.{node.name}")
    assert found == {equation: [place] for equation, place in EQUATIONS.items()}


def test_nothing_unpickles_or_evaluates():
    for room, tree in rooms():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "yaml.load", "np.load"), room
                for keyword in node.keywords:
                    assert keyword.arg not in ("weights_only", "allow_pickle"), room
        assert not {"pickle", "marshal", "shelve"} & set(imports(tree)), room


def test_csv_is_written_in_one_place():
    """Where no cell can become a formula."""
    for room, tree in rooms():
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert room == "files" or not {"csv.writer", "csv.DictWriter"} & called, room
        assert room in ("files", "data.manifest") or "csv.reader" not in called, room


def public_functions(body):
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def test_every_public_function_has_a_docstring_of_one_sentence_first():
    for room, tree in rooms():
        for node in public_functions(tree.body):
            first = (ast.get_docstring(node) or "").split("\n\n")[0]
            assert re.search(r"[.:?]$", first), f"{room}.{node.name}: {first!r}"


def test_the_start_is_light():
    """Neither the package nor the help of a command imports what takes seconds."""
    code = (
        "import sys, polyseg\nfrom polyseg.cli.main import main\n"
        "sys.argv = ['polyseg', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'monai', 'matplotlib', 'scipy', 'h5py', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["train", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_project_names_no_registry():
    top = PACKAGE.parent
    files = [*top.glob("*.*"), *PACKAGE.rglob("*.py"), *top.glob("examples/*"), *top.glob("docs/*")]
    pattern = re.compile(r"index-url|find-links|pypi\.org|https?://[^ ]*(pypi|whl|simple)")
    for path in files:
        if path.is_file() and path.suffix != ".png":
            assert not pattern.search(path.read_text(errors="ignore")), path

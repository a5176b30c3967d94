"""Structure of the code: allowed imports between packages, and the module of each equation."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "polyseg"

PACKAGES = (
    *("errors", "registry", "choices", "system", "curves", "losses", "uncertainty", "difficulty"),
    *("metrics", "records", "config", "networks", "data", "montecarlo", "adaptive", "runs"),
    *("training", "evaluation", "figures", "report", "commands", "cli", "__main__"),
)
"""Packages and top-level modules in order; each may import those before it."""

ONLY_IN = {"h5py": "runs.record_files", "matplotlib": "figures", "typer": "cli", "rich": "cli"}
ONLY_IN |= {"nibabel": "data.formats.nifti", "pydicom": "data.formats.dicom"}
ONLY_IN |= {"SimpleITK": "data.formats.itk"}
"""Libraries, and the only module or package that may import each."""

EQUATIONS = {
    "(eq. 2)": "losses.dice_loss",
    "(eq. 3)": "losses.scale_and_angle",
    "(eq. 5)": "losses.polydice_loss",
    "(eq. 6)": "losses.polydice1_loss",
    "(eq. 7)": "montecarlo.passes.stochastic_pass",
    "(eq. 8)": "uncertainty.prediction_variance",
    "(eq. 9)": "uncertainty.predictive_entropy",
    "(eq. 10)": "uncertainty.mutual_information",
    "(section 3.4.1)": "difficulty.foreground_mean",
    "(eq. 11)": "difficulty.normalise_by",
    "(eq. 12)": "difficulty.epsilon_from_difficulty",
}


@cache
def modules():
    """Yield the name and syntax tree of each module."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths]
    return [(name, ast.parse(path.read_text())) for name, path in zip(names, paths, strict=True)]


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_packages_import_only_packages_above_them():
    for module, tree in modules():
        package = module.split(".")[0]
        for name in imports(tree):
            other = ([*name.split("."), ""])[1]
            if name.startswith("polyseg.") and other in PACKAGES:
                assert PACKAGES.index(other) <= PACKAGES.index(package), f"{module} imports {name}"


def test_modules_have_no_import_cycles():
    names = [name for name, _ in modules()]
    imported = {
        module: {name.removeprefix("polyseg.") for name in imports(tree)}.intersection(names)
        for module, tree in modules()
    }
    while leaves := {one for one, others in imported.items() if not others}:
        imported = {one: others - leaves for one, others in imported.items() if one not in leaves}
    assert not imported


def test_restricted_libraries_are_imported_in_one_module():
    for module, tree in modules():
        for name in imports(tree):
            package = name.split(".")[0]
            place = ONLY_IN.get(package, module)
            assert f"{module}.".startswith(f"{place}."), f"{module} imports {package}"


def test_scipy_is_imported_where_it_is_used():
    """Its import takes more than a second, and most commands compute nothing with it."""
    for module, tree in modules():
        top = (node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        first = {name.split(".")[0] for name in imports(ast.Module([*top]))}
        assert "scipy" not in first, module


def test_each_equation_has_one_function():
    found = {equation: [] for equation in EQUATIONS}
    for module, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                for equation in EQUATIONS:
                    if equation in text:
                        found[equation].append(f"{module}.{node.name}")
    assert found == {equation: [place] for equation, place in EQUATIONS.items()}


def test_code_never_unpickles_or_evaluates():
    for module, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert called not in ("eval", "exec", "torch.load", "yaml.load"), module
                assert "weights_only" not in given, module
                # np.load must state allow_pickle=False.
                assert called != "np.load" or "allow_pickle" in given, module
                assert given.get("allow_pickle", "False") == "False", module
        assert not {"pickle", "marshal", "shelve"} & set(imports(tree)), module


def test_csv_is_written_by_one_module():
    """That module escapes cells that a spreadsheet would read as formulas."""
    for module, tree in modules():
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        if module != "system.files":
            assert not {"csv.writer", "csv.DictWriter"} & called, module
        if module not in ("system.files", "data.layouts.manifest"):
            assert "csv.reader" not in called, module


def public_functions(body):
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def test_public_functions_have_a_docstring_with_a_first_sentence():
    for module, tree in modules():
        for node in public_functions(tree.body):
            first = (ast.get_docstring(node) or "").split("\n\n")[0]
            assert re.search(r"[.:?]$", first), f"{module}.{node.name}: {first!r}"


def test_start_imports_no_heavy_library():
    """Neither the package nor the help of a command imports a library that takes seconds."""
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


def test_project_files_contain_no_registry_address():
    top = PACKAGE.parent
    files = [*top.glob("*.*"), *PACKAGE.rglob("*.py"), *top.glob("examples/*"), *top.glob("docs/*")]
    pattern = re.compile(r"index-url|find-links|pypi\.org|https?://[^ ]*(pypi|whl|simple)")
    for path in files:
        if path.is_file() and path.suffix != ".png":
            assert not pattern.search(path.read_text(errors="ignore")), path


def test_public_names_can_be_imported():
    import polyseg

    for name in polyseg.__all__:
        assert getattr(polyseg, name) is not None
    assert "torch" not in _modules_after("import polyseg")


def _modules_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()

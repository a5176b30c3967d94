"""The documentation: generated pages are current, and commands, modules and links exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from polyseg import INTENDED_USE, __version__
from polyseg.cli.main import app
from polyseg.config import load_config

from . import reference
from .test_architecture import PACKAGES

TOP = Path(__file__).parent.parent


def test_reference_pages_are_up_to_date():
    """After a change: python -m tests.reference"""
    assert (TOP / "docs" / "commands.md").read_text() == reference.command_page()
    assert (TOP / "docs" / "configuration.md").read_text() == reference.configuration_page()
    assert (TOP / "docs" / "architecture.md").read_text() == reference.architecture_page()
    assert (TOP / "docs" / "files.md").read_text() == reference.files_page()
    assert (TOP / "docs" / "evaluation.md").read_text() == reference.evaluation_page()


def table_of(heading, page):
    """Return the rows of the table below a heading as lists of cells."""
    part = page.split(heading)[1].split("\n#")[0]
    rows = re.findall(r"^\|(.*)\|$", part, flags=re.M)
    return [[cell.strip() for cell in row.split("|")] for row in rows[2:]]


def test_architecture_page_lists_packages_in_import_order():
    page = (TOP / "docs" / "architecture.md").read_text()
    named = [row[0].strip("`").removesuffix("/") for row in table_of("# Architecture", page)]
    assert [name.removesuffix(".py") for name in named] == list(PACKAGES[:-1])


def test_modules_named_in_the_architecture_page_exist():
    page = (TOP / "docs" / "architecture.md").read_text()
    places = [one for row in table_of("## Where to make", page) for one in row[1].split(", ")]
    places += re.findall(r"`([\w/]+\.py|[\w/]+/)`", page)
    assert len(places) > 30
    for place in places:
        assert (TOP / "polyseg" / place.strip("`")).exists(), place


def test_changelog_has_a_section_for_this_version():
    assert f"## [{__version__}]" in (TOP / "CHANGELOG.md").read_text()


def test_readme_states_the_intended_use():
    assert INTENDED_USE in (TOP / "README.md").read_text()


def command_lines():
    for path in (TOP / "README.md", *sorted((TOP / "examples").glob("*.sh"))):
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ *(?:\$ )?(polyseg .+)$", text, flags=re.M):
            yield path.name, line.split(" #")[0]


@pytest.mark.parametrize(("where", "line"), list(command_lines()), ids=str)
def test_documented_command_lines_parse(where, line):
    """A removed flag or setting fails here."""
    words = [word for word in shlex.split(line)[1:] if "@" not in word]
    words = [re.sub(r"\$\{?\w+\}?", "1", word) for word in words]
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words, resilient_parsing=False)
    overrides = context.params.get("overrides") or []
    load_config(overrides=[word for word in overrides if not word.endswith("=1")])


@pytest.mark.parametrize(
    "script", sorted((TOP / "examples").glob("*.sh")), ids=lambda path: path.name
)
def test_example_scripts_print_command_time_and_result_without_arguments(script):
    text = script.read_text()
    # The study script takes SET names in place of settings.
    settings = "[SET ...]" if script.name == "study.sh" else "[KEY=VALUE ...]"
    for word in (f"examples/{script.name}", settings, "Time: ", "Result: "):
        assert word in text.split("set -euo pipefail")[0], word
    if script.name != "demo.sh":
        done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "Result: " in done.stderr and "set -e" not in done.stderr


def code_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def test_training_loop_of_docs_runs():
    binary, channels, _ = code_blocks(TOP / "docs" / "library.md")
    for code, shape in ((binary, (8,)), (channels, (8, 3))):
        names = {}
        exec(code, names)
        assert names["losses"].shape == shape
        assert all(one.grad is not None for one in names["network"].parameters())


def test_loss_example_of_readme_runs():
    names = {}
    (code,) = code_blocks(TOP / "README.md")
    exec(code, names)
    assert names["losses"].shape == (8,) and names["logits"].grad is not None


def test_links_of_docs_have_targets():
    for page in (TOP / "README.md", TOP / "CHANGELOG.md", *(TOP / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"

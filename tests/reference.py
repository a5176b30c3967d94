"""Generate the reference pages of docs/ from the code: python -m tests.reference"""

from pathlib import Path

from typer.main import get_command

from polyseg.cli.main import app
from polyseg.config import Config, settings_of
from polyseg.metrics.image_metrics import METRICS
from polyseg.runs.history import COLUMNS
from tests.test_architecture import PACKAGES, imports, modules

DOCS = Path(__file__).parent.parent / "docs"


def commands(command=None, name=()):
    """Yield the name, as a tuple of words, and the object of every command."""
    command = command or get_command(app)
    for part, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*name, part))
    if not hasattr(command, "commands"):
        yield name, command


def command_page():
    """Return docs/commands.md."""
    lines = [
        "# Commands",
        "",
        "Results go to stdout, everything else to stderr; `-q` prints only results and warnings.",
        "The exit code is 0 after success and 2 after an error, which is one line. It is 130 after",
        "Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1 and 129 after SIGHUP; completed epochs are",
        "kept. `polyseg --install-completion` lets the shell complete commands, options, settings",
        "and their values; `polyseg --show-completion` prints the code that it installs.",
    ]
    for name, command in commands():
        description, _, example = command.help.partition("Example: ")
        lines += ["", f"## polyseg {' '.join(name)}", "", description.strip(), ""]
        lines += ["```", example.strip(), "```", "", "| argument | meaning | default |"]
        lines += ["| --- | --- | --- |"]
        for parameter in command.params:
            if parameter.name != "help":
                lines.append(
                    f"| {_spelling(parameter)} | {parameter.help} | {_default(parameter)} |"
                )
    return "\n".join(lines) + "\n"


def import_picture():
    """Return a Mermaid diagram of imports between packages, without those implied by others."""
    direct = {package: set() for package in PACKAGES}
    for module, tree in modules():
        others = {([*name.split("."), ""])[1] for name in imports(tree) if "polyseg." in name}
        direct[module.split(".")[0]] |= others & direct.keys() - {module.split(".")[0]}
    below = {}
    for package in PACKAGES:
        below[package] = direct[package].union(*(below[one] for one in direct[package]))
    lines = ["```mermaid", "flowchart BT"]
    for package in PACKAGES:
        implied = set().union(*(below[one] for one in direct[package]))
        lines += [f"  {package} --> {one}" for one in PACKAGES if one in direct[package] - implied]
    return "\n".join([*lines, "```"])


def with_part(page, name, part):
    """Return a page of docs/ with the text between the marks of a name replaced."""
    head, rest = (DOCS / page).read_text().split(f"<!-- {name} -->\n")
    _, tail = rest.split(f"<!-- /{name} -->")
    return f"{head}<!-- {name} -->\n{part}\n<!-- /{name} -->{tail}"


def architecture_page():
    """Return docs/architecture.md with its diagram generated from the code."""
    return with_part("architecture.md", "imports", import_picture())


def files_page():
    """Return docs/files.md with its table of history.csv columns generated from the code."""
    lines = ["| column | unit | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {one.unit} | {one.help} |" for name, one in COLUMNS.items()]
    return with_part("files.md", "columns", "\n".join(lines))


def evaluation_page():
    """Return docs/evaluation.md with its table of metrics generated from the code."""
    lines = ["| metric | column | best | of the | meaning |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {one.title} | `{name}` | {'high' if one.higher_is_better else 'low'} "
        f"| {'probabilities' if one.of_probability else 'predicted mask'} | {one.help} |"
        for name, one in METRICS.items()
    ]
    return with_part("evaluation.md", "metrics", "\n".join(lines))


def configuration_page():
    """Return docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Settings are in one YAML file with these sections (`polyseg train FILE`). Any of them can",
        "also be given as `--set section.key=value`, with the value in YAML. Options and `--set`",
        "override the file, and the file overrides the defaults. `polyseg config init` writes a",
        "file of all defaults, and `polyseg config schema` prints the JSON Schema. Numbers are",
        "decimal, booleans are `true` or `false`, and no key may be repeated. A small network for",
        "a quick trial:",
        "",
        "```sh",
        "polyseg train --data my/images --epochs 10 --set data.size=64 \\",
        "  --set 'network.kwargs={channels: [8, 16, 32], strides: [2, 2], num_res_units: 1}'",
        "```",
    ]
    section = ""
    for setting in settings_of():
        head, _, _ = setting["key"].partition(".")
        if head != section:
            section = head
            title = Config.model_fields[section].default.__doc__
            lines += ["", f"## {section}", "", title, ""]
            lines += ["| key | default | unit, bounds | meaning |", "| --- | --- | --- | --- |"]
        limits = ", ".join(note for note in (setting["unit"], setting["bounds"]) if note)
        meaning = [setting["description"]]
        meaning += [f"`{name}`: {text}" for name, text in setting["choices"].items()]
        cells = (f"`{setting['key']}`", f"`{setting['default']}`", limits, "<br>".join(meaning))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spelling(parameter):
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`".replace("|", "\\|")
    return f"`{', '.join(sorted(parameter.opts, key=len) + parameter.secondary_opts)}`"


def _default(parameter):
    value = parameter.default
    if (
        value is None
        or isinstance(value, bool)
        or callable(value)
        or str(value).startswith("Sentinel")
    ):
        return ""
    return f"`{value}`"


def main():
    """Write the pages."""
    DOCS.mkdir(exist_ok=True)
    (DOCS / "commands.md").write_text(command_page())
    (DOCS / "configuration.md").write_text(configuration_page())
    (DOCS / "architecture.md").write_text(architecture_page())
    (DOCS / "files.md").write_text(files_page())
    (DOCS / "evaluation.md").write_text(evaluation_page())


if __name__ == "__main__":
    main()

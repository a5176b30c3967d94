"""The reference pages of docs/, made from the commands and settings: python -m tests.reference"""

from pathlib import Path

from typer.main import get_command

from polyseg.cli.main import app
from polyseg.config import Config, settings_of

DOCS = Path(__file__).parent.parent / "docs"


def commands(command=None, name=()):
    """Yield the words and the object of every command."""
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
        "Results go to stdout, all else to stderr. Exit codes: 0; 2 for a mistake, told in one",
        "line; 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1 and 129 after SIGHUP, with",
        "everything committed up to the last completed epoch.",
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


def configuration_page():
    """Return docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "One YAML file of these sections, `polyseg train FILE`; any key also by",
        "`--set section.key=value`, whose value is YAML. Flags and `--set` go over the file, the",
        "file over the defaults. `polyseg config init` writes a file of all defaults,",
        "`polyseg config schema` the JSON Schema. Numbers are decimal, truth is `true` or `false`,",
        "and a key stands once.",
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
        cells = (f"`{setting['key']}`", f"`{setting['default']}`", limits, setting["description"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spelling(parameter):
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`".replace("|", "\\|")
    return f"`{', '.join(sorted(parameter.opts, key=len))}`"


def _default(parameter):
    value = parameter.default
    if value is None or value is False or callable(value) or str(value).startswith("Sentinel"):
        return ""
    return f"`{value}`"


def main():
    """Write the pages."""
    DOCS.mkdir(exist_ok=True)
    (DOCS / "commands.md").write_text(command_page())
    (DOCS / "configuration.md").write_text(configuration_page())


if __name__ == "__main__":
    main()

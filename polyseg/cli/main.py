"""The program: all commands, exit codes, and errors in one line."""

import io
import os
import re
import signal
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from polyseg import __version__
from polyseg.cli.completion import after_equals
from polyseg.cli.config import config_app
from polyseg.cli.data import data_app
from polyseg.cli.estimate_uncertainty import estimate_uncertainty
from polyseg.cli.evaluate import evaluate
from polyseg.cli.options import App
from polyseg.cli.plot_loss import plot_loss
from polyseg.cli.predict import predict
from polyseg.cli.report import report
from polyseg.cli.schedule import schedule_app
from polyseg.cli.train import train
from polyseg.errors import Interrupted, PolysegError, reason
from polyseg.system.process_group import rank_here
from polyseg.system.signals import StopRequest, ending_at_once

_LONGEST_LINE = 2000
_NO_NUMBER = re.compile(r"Input should be a valid (integer|number), unable to parse .*")
"""What pydantic says of text in place of a number."""

app = App(
    name="polyseg",
    help="Medical image segmentation with an uncertainty-adaptive loss.\n\n"
    "Start with [bold]polyseg train[/bold]: without arguments it trains on built-in demo images.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (train, estimate_uncertainty, evaluate, plot_loss):
    app.command(rich_help_panel="Main commands")(command)
app.command(rich_help_panel="Other commands")(predict)
app.command(rich_help_panel="Other commands")(report)
for group, name in ((schedule_app, "schedule"), (data_app, "data"), (config_app, "config")):
    app.add_typer(group, name=name, rich_help_panel="Other commands")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"polyseg {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Define the options of the program itself, such as --version."""


def main() -> None:
    """Run the command line; a user's error is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if (values := after_equals(os.environ)) is not None:
        print(*values, sep="\n")
        return
    with ending_at_once() as stop:
        code = _end_of(stop)
    sys.exit(code)


def _end_of(stop: StopRequest) -> int:
    """Run the command, print an error in one line, and return the exit code.

    A signal after the command has ended does not change the exit code.
    """
    try:
        code = app(standalone_mode=False)
        stop.done = True
        sys.stdout.flush()  # Report results that cannot be written as an error.
        return code if isinstance(code, int) else 0
    except (PolysegError, TyperException, OSError) as error:
        stop.done = True
        return _print_error(error)
    except Interrupted as end:
        stop.done = True
        if rank_here() == 0:
            print(end, file=sys.stderr)
        return 128 + end.number
    except (KeyboardInterrupt, typer.Abort):
        return 128 + signal.SIGINT


def _print_error(error: PolysegError | TyperException | OSError) -> int:
    """Print an error in one line, and return the exit code."""
    if isinstance(error, PolysegError):
        text = "\n".join(_visible(str(line)) for line in error.args)
    elif isinstance(error, OSError):
        # Names that are too long, circular links, folders in place of files.
        where = f"{error.filename!s:.200}: " if error.filename else ""
        text = _visible(f"{where}{reason(error)}")
    else:
        # A mistyped command or option; without a message the help was printed instead.
        message = _NO_NUMBER.sub(
            lambda found: f"must be a {'whole ' * (found[1] == 'integer')}number",
            error.format_message(),
        )
        text = f"{_visible(message)} (see --help)" if message else ""
    if text:
        process = f"process {rank_here()}: " if rank_here() else ""
        print(f"{process}error: {text}", file=sys.stderr)
    return 2


def _visible(text: str) -> str:
    """Return a text as one line without control characters, which names may contain.

    >>> _visible("gone\\n.png")
    'gone\\\\n.png'
    """
    shown = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return shown if len(shown) <= _LONGEST_LINE else f"{shown[:_LONGEST_LINE]}..."

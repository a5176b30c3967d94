"""All commands together, and how they end: exit codes, and errors in one line."""

import io
import signal
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from polyseg import __version__
from polyseg.cli.config import config_app
from polyseg.cli.data import data_app
from polyseg.cli.evaluation import evaluate
from polyseg.cli.figure import plot_loss
from polyseg.cli.options import AROUND_IT, THE_PRODUCT
from polyseg.cli.prediction import predict
from polyseg.cli.report import report
from polyseg.cli.schedule import schedule_app
from polyseg.cli.training import train
from polyseg.cli.uncertainty import estimate_uncertainty
from polyseg.errors import Interrupted, PolysegError

app = typer.Typer(
    name="polyseg",
    help="Medical image segmentation with an uncertainty-adaptive loss.\n\n"
    "Start with [bold]polyseg train[/bold]: without arguments it trains on a built-in demo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (train, estimate_uncertainty, evaluate, plot_loss):
    app.command(rich_help_panel=THE_PRODUCT)(command)
app.command(rich_help_panel=AROUND_IT)(predict)
app.command(rich_help_panel=AROUND_IT)(report)
app.add_typer(schedule_app, name="schedule", rich_help_panel=AROUND_IT)
app.add_typer(data_app, name="data", rich_help_panel=AROUND_IT)
app.add_typer(config_app, name="config", rich_help_panel=AROUND_IT)


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
            help="Print the version and leave.",
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Run the command line; a user's error is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a sign shows a question mark.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(app(standalone_mode=False))
    except PolysegError as error:
        print(f"error: {_visible(str(error))}", file=sys.stderr)
        sys.exit(2)
    except TyperException as error:
        # A mistyped command or option; without a message the help has been printed instead.
        if message := error.format_message():
            print(f"error: {message} (--help tells what there is)", file=sys.stderr)
        sys.exit(2)
    except Interrupted as end:
        print(end, file=sys.stderr)
        sys.exit(128 + end.number)
    except BrokenPipeError:
        # The reader went away, as `head` does; there is no one left to tell.
        sys.stderr.close()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        # Names that are too long, links in circles, folders in place of files.
        where = f"{error.filename!s:.200}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(128 + signal.SIGINT)


def _visible(text: str) -> str:
    """Return a text without what would steer a terminal: names in it may be anyone's."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text)

"""`python -m polyseg`, and what the command `polyseg` starts."""

import signal


def main() -> None:
    """Run the command line; no signal makes a traceback before it is there, or after it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from polyseg.cli.main import main as command_line
    from polyseg.signals import ignore_signals

    try:
        command_line()
    finally:
        ignore_signals()


if __name__ == "__main__":
    main()

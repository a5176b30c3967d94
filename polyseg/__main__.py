"""`python -m polyseg`, and what the command `polyseg` starts."""

import contextlib
import os
import signal
import sys


def main() -> None:
    """Run the command line; no signal makes a traceback before it is there, or after it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from polyseg.cli.main import main as command_line

    try:
        command_line()
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        # All is written and said; libraries take up to a second to fold, some of them for ever.
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


if __name__ == "__main__":
    main()

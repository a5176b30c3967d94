"""The one error that a user is expected to meet."""


class PolysegError(Exception):
    """A mistake that the user can mend: one line that names the file or setting and the remedy.

    The command line prints it without a traceback and exits with code 2.

    >>> raise PolysegError("data.size: 0 is too small; give at least 16")
    Traceback (most recent call last):
    polyseg.errors.PolysegError: data.size: 0 is too small; give at least 16
    """

"""How work ends early: by the one error that a user is expected to meet, or by a signal."""


class PolysegError(Exception):
    """A mistake that the user can mend: one line that names the file or setting and the remedy.

    The command line prints it without a traceback and exits with code 2.

    >>> raise PolysegError("data.size: 0 is too small; give at least 16")
    Traceback (most recent call last):
    polyseg.errors.PolysegError: data.size: 0 is too small; give at least 16
    """


class Interrupted(BaseException):
    """A signal asked for the end; what was committed is whole, and the message says how to go on.

    The command line exits with 128 + the signal's number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

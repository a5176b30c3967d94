"""The exceptions that end a command: a mistake of the user, or a signal."""

import errno

_ADVICE = {
    errno.EMFILE: "raise `ulimit -n`, or lower training.workers",
    errno.ENFILE: "close other programs, or lower training.workers",
    errno.ENOSPC: "free some space there, or choose another folder",
    errno.EDQUOT: "free some space there, or choose another folder",
    errno.EACCES: "change its permissions, or choose another folder",
    errno.EROFS: "choose another folder",
}


class PolysegError(Exception):
    """A mistake that the user can correct; the message names the file or setting and the remedy.

    Each argument is one problem and is printed as one line. The command line prints them without a
    traceback and exits with code 2.

    >>> raise PolysegError("data.size: 0 is too small; give at least 16")
    Traceback (most recent call last):
    polyseg.errors.PolysegError: data.size: 0 is too small; give at least 16
    """

    def __str__(self) -> str:
        return "\n".join(str(line).replace("\n", r"\n") for line in self.args)


class Interrupted(BaseException):
    """A signal ended the work; the command line exits with 128 + the number of the signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def reason(error: OSError) -> str:
    """Return the message of an OSError, with advice for common errors.

    >>> reason(OSError(errno.EMFILE, "Too many open files"))
    'Too many open files; raise `ulimit -n`, or lower training.workers'
    >>> reason(OSError("is not a file"))
    'is not a file'
    """
    message = error.strerror or str(error) or type(error).__name__
    advice = _ADVICE.get(error.errno or 0)
    return message if advice is None else f"{message}; {advice}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]

"""How work ends early: by the one error that a user is expected to meet, or by a signal."""

import errno

_ADVICE = {
    errno.EMFILE: "raise `ulimit -n`, or lower training.workers",
    errno.ENFILE: "close other programs, or lower training.workers",
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EROFS: "choose another place",
}


class PolysegError(Exception):
    """A mistake that the user can mend: one line that names the file or setting and the remedy.

    Several arguments are several problems, a line each; within an argument, which may hold a name
    of anyone's, there are no lines. The command line prints them without a traceback and exits with
    code 2.

    >>> raise PolysegError("data.size: 0 is too small; give at least 16")
    Traceback (most recent call last):
    polyseg.errors.PolysegError: data.size: 0 is too small; give at least 16
    """

    def __str__(self) -> str:
        return "\n".join(str(line).replace("\n", r"\n") for line in self.args)


class Interrupted(BaseException):
    """A signal asked for the end; what was committed is whole, and the message says how to go on.

    The command line exits with 128 + the signal's number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def reason(error: OSError) -> str:
    """Return what the system says of a failure, and what can be done about it where that is known.

    >>> reason(OSError(errno.EMFILE, "Too many open files"))
    'Too many open files; raise `ulimit -n`, or lower training.workers'
    >>> reason(OSError("is no file"))
    'is no file'
    """
    said = error.strerror or str(error) or type(error).__name__
    advice = _ADVICE.get(error.errno or 0)
    return said if advice is None else f"{said}; {advice}"

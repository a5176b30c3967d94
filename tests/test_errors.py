"""Messages for errors of the operating system."""

import errno
import os

import pytest

from polyseg.errors import reason


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "close other programs"),
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "another folder"),
    ],
)
def test_reason_adds_advice_to_common_system_errors(number, advice):
    said = reason(OSError(number, os.strerror(number), "somewhere"))
    assert said.startswith(f"{os.strerror(number)}; ") and advice in said
    assert "\n" not in said and "somewhere" not in said


def test_reason_of_other_errors_is_their_message():
    assert reason(FileNotFoundError(errno.ENOENT, "No such file")) == "No such file"
    assert reason(OSError("is over 5 bytes")) == "is over 5 bytes"
    assert reason(OSError()) == "OSError"

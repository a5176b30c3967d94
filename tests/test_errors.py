"""What the system refuses, in words that help."""

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
def test_a_failure_that_can_be_mended_comes_with_advice(number, advice):
    said = reason(OSError(number, os.strerror(number), "somewhere"))
    assert said.startswith(f"{os.strerror(number)}; ") and advice in said
    assert "\n" not in said and "somewhere" not in said


def test_other_failures_are_what_the_system_calls_them():
    assert reason(FileNotFoundError(errno.ENOENT, "No such file")) == "No such file"
    assert reason(OSError("is over 5 bytes")) == "is over 5 bytes"
    assert reason(OSError()) == "OSError"

"""What a process keeps from others of its user."""

import ctypes
import os
import sys

import pytest

from azu.money.treasury.environment import hide_memory

OTHER = 65_534
_PR_SET_DUMPABLE = 4


def as_other(act: "object") -> int:
    """Run a function in a process of another user; return its exit status."""
    child = os.fork()
    if not child:
        os.setgid(OTHER)
        os.setuid(OTHER)
        # As after an exec: a change of the user alone hides the memory too.
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
        os._exit(act())  # type: ignore[operator]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_read_by_its_user(*, hidden: bool) -> bool:
    """Whether a process of a user reads the memory of another one of the same user."""

    def act() -> int:
        victim = os.getpid()
        if hidden:
            hide_memory()
        reader = os.fork()
        if not reader:
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
            try:
                with open(f"/proc/{victim}/mem", "rb"), open(f"/proc/{victim}/environ", "rb"):
                    os._exit(0)
            except PermissionError:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])

    return as_other(act) == 0


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="root alone becomes another user")
def test_no_other_process_of_the_user_reads_a_memory_that_is_hidden() -> None:
    assert is_read_by_its_user(hidden=False)
    assert not is_read_by_its_user(hidden=True)

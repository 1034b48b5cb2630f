"""Keeps secrets from other processes of the user: in this process's environment, and in its memory.

A file of its own: `azu up` needs this, and never imports what reads the platform's key.
"""

import ctypes
import os
import sys
from collections.abc import MutableMapping

_PR_SET_DUMPABLE = 4


def hide_memory() -> None:
    """Let no other process of the user read this one's memory or environment, and write no core dump."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this process cannot hide its memory")


def take_variable(environment: MutableMapping[str, str], name: str) -> str | None:
    """Return a variable and remove it; for `os.environ` also from what the kernel shows of it."""
    if environment is os.environ:
        _overwrite(name)
    return environment.pop(name, None)


def _overwrite(name: str) -> None:
    # Removing a variable leaves its text where the kernel put it, and /proc/PID/environ reads from there.
    if sys.platform != "linux":
        return
    variables = ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), "environ")
    prefix = os.fsencode(f"{name}=")
    index = 0
    while address := variables[index]:
        text = ctypes.string_at(address)
        if text.startswith(prefix):
            ctypes.memset(address + len(prefix), 0, len(text) - len(prefix))
        index += 1

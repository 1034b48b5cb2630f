"""Takes secrets out of this process's environment, where other processes of the user could read them.

A file of its own: `azu up` needs this, and never imports what reads the platform's key.
"""

import ctypes
import os
import sys
from collections.abc import MutableMapping


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

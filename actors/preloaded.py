"""Imported by name by each of Ray's processes on a worker node: it imports the engine before there is work.

Importing the engine takes most of the time in which a piece comes up. The node's agent does without it, and
is the first process. The file stands alone because Ray takes a module name.
"""

import os
from importlib import import_module

import psutil

from azu.models.slim import import_for_stages

_AGENT = "ray::NodeAgent"


def _is_agent_there() -> bool:
    for sibling in psutil.Process(os.getppid()).children():
        try:
            if sibling.cmdline()[0].startswith(_AGENT):
                return True
        except (psutil.Error, IndexError):
            continue  # the process ended
    return False


if _is_agent_there():
    import_for_stages()
    import azu.engine.experts
    import azu.engine.stage_runner  # noqa: F401

    # torch's functions for the meta device, on which a stage is built first, import it.
    import_module("sympy")

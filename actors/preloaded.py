"""What each process of a lender's node imports before it has work: the engine, unless it is the node's agent.

Importing it takes most of the time in which a piece comes up. The agent does without, and comes first.
"""

import os

import psutil

_AGENT = "ray::NodeAgent"


def _is_agent_there() -> bool:
    for sibling in psutil.Process(os.getppid()).children():
        try:
            if sibling.cmdline()[0].startswith(_AGENT):
                return True
        except (psutil.Error, IndexError):
            continue  # it ended
    return False


if _is_agent_there():
    import azu.engine.experts
    import azu.engine.stage_runner  # noqa: F401

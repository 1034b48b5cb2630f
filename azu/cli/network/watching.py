"""A running network, watched until somebody ends it."""

import time
from collections.abc import Callable

from rich.console import Console

from azu.cli.network.interrupts import Ending

_WATCH_S = 1.0


def watch(revive: Callable[[], list[str]], ending: Ending) -> None:
    """Start again what dies, and say so, until Ctrl-C or until `revive` raises."""
    console = Console(stderr=True, highlight=False)
    while True:
        for name in revive():
            console.print(f"[yellow]{name} had ended and was started again[/]")
        ending.check()
        time.sleep(_WATCH_S)

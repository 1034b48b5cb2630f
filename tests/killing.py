"""Processes that kill themselves with SIGKILL at a chosen write or send, as a crash would."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Effects = tuple[tuple[type, str], ...]

# Forks of a process that has imported everything: a start takes milliseconds in place of seconds.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["__main__", "tests.jobs.settling", "tests.money.treasury.dying"])


@dataclass(frozen=True)
class Death:
    """When a process kills itself: before or after its effect number `at`; never for 0."""

    at: int = 0
    when: str = "before"


def start(main: Callable[..., None], *arguments: Any) -> "multiprocessing.context.ForkServerProcess":
    """Start a process that runs `main`."""
    process = _FORKS.Process(target=main, args=arguments, daemon=True)
    process.start()
    return process


def kill_at_effect(effects: Effects, death: Death) -> None:
    """Make this process kill itself before or after the n-th effect: a call of any of these methods.

    The same call again, as in a polling loop, is not another effect.
    """
    seen: set[str] = set()

    def armed(name: str, original: Any) -> Any:
        async def effect(*arguments: Any, **named: Any) -> Any:
            call = f"{name}{arguments[1:]}{named}"
            hit = call not in seen and len(seen) + 1 == death.at
            seen.add(call)
            if hit and death.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return await original(*arguments, **named)
            finally:
                # Also when the call failed: a send may take effect and lose its answer.
                if hit:
                    os.kill(os.getpid(), signal.SIGKILL)

        return effect

    for owner, name in effects:
        setattr(owner, name, armed(f"{owner.__name__}.{name}", getattr(owner, name)))

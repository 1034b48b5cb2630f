"""What `azu doctor` finds: one line for each thing it looked at, and what to do about it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from azu.errors import AzuError


class State(StrEnum):
    """BAD keeps azu from working, or its money or secrets from being safe; UNKNOWN could not be looked at."""

    OK = "ok"
    WARNING = "warning"
    BAD = "bad"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: how it is, and what to do if that is not well."""

    about: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings of one run."""

    machine: tuple[Finding, ...]
    network: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is bad."""
        return all(one.state is not State.BAD for one in (*self.machine, *self.network))


def looked(about: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return what a look finds; one that fails says why, and the others go on."""
    try:
        return list(look())
    except AzuError as error:
        return [Finding(about, State.BAD, error.message, "mend that first")]
    except Exception as error:
        return [Finding(about, State.UNKNOWN, f"{type(error).__name__}: {error}", "look at it by hand")]

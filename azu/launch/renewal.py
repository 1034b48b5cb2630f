"""Ray reads a node's certificate once: before it ends, each node is started again with a later one."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from azu.launch.membership import CertificateLife

if TYPE_CHECKING:
    from azu.api.network import RestartResponse

_LONGEST_WAIT = timedelta(minutes=10)
_LONGEST_PAUSE = timedelta(seconds=30)


class Renewal:
    """Starts this machine's nodes again, one after the other, each in its turn among all of the network.

    `life` is that of the certificate with which they were started. `ask` asks for a node's turn, and whether
    its pieces have moved away; it returns None where there is no answer. Pieces that find no other place hold
    a node up for a while only: they come back with it. At the end of its time a node waits for no turn.
    """

    def __init__(
        self,
        names: Sequence[str],
        life: CertificateLife,
        ask: "Callable[[str], RestartResponse | None]",
        restart: Callable[[str], None],
    ) -> None:
        self._names = tuple(names)
        self._life = life
        self._ask = ask
        self._restart = restart
        # The nodes that still run with a certificate of this life.
        self._due: list[str] = []
        self._old = life
        self._asked: datetime | None = None
        self._has_turn: datetime | None = None

    def take(self, later: CertificateLife, now: datetime) -> None:
        """Take the life of a later certificate, which lies in the files that a node reads when it starts."""
        if not self._due and now >= self._life.renewed_from:
            self._due, self._old, self._life = list(self._names), self._life, later

    def step(self, now: datetime) -> str | None:
        """Start a node again if it is due and may be; return its name."""
        pause = min(_LONGEST_PAUSE, self._old.window / 60)
        if not self._due or (self._asked is not None and now - self._asked < pause):
            return None
        name, self._asked = self._due[0], now
        if not self._may_restart(name, now):
            return None
        self._due.pop(0)
        self._has_turn = self._asked = None
        self._restart(name)
        return name

    def _may_restart(self, name: str, now: datetime) -> bool:
        answer, window = self._ask(name), self._old.window
        if answer is not None and answer.turn:
            self._has_turn = self._has_turn or now
            if answer.left or now - self._has_turn >= min(_LONGEST_WAIT, window / 3):
                return True
        return now >= self._old.ends - window / 4

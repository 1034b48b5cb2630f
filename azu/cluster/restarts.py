"""Whose turn it is to be started again: nodes that need a new certificate go one at a time."""

from collections.abc import Mapping

# A node that has the turn asks more often than this while it gives its pieces away, and is back sooner.
_PATIENCE_S = 180.0


class RestartTurn:
    """One node at a time has the turn, until a node of its name is there under another id.

    The clock is the caller's, in seconds.
    """

    def __init__(self, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._name = ""
        self._node_id = ""
        self._asked_s = float("-inf")

    def take(self, node_id: str, names: Mapping[str, str], now_s: float) -> bool:
        """Give a node the turn and return True; False while another has it.

        `names` has the name of each living node by its id.
        """
        is_back = any(name == self._name and other != self._node_id for other, name in names.items())
        is_free = is_back or now_s - self._asked_s > self._patience_s
        if node_id != self._node_id and not is_free:
            return False
        self._name, self._node_id, self._asked_s = names[node_id], node_id, now_s
        return True

"""Which nonces a signer may still use: each once, within a window, not below the highest hundred."""

from bisect import insort

_DAY_MS = 86_400_000
_KEPT = 100


class Nonces:
    """The highest nonces that one signer has used."""

    def __init__(self) -> None:
        self._used: list[int] = []

    def refusal(self, nonce: int, now_ms: int) -> str | None:
        """Return why a nonce cannot be used, in the chain's words, or None if it can."""
        if not now_ms - 2 * _DAY_MS < nonce < now_ms + _DAY_MS:
            return f"Invalid nonce: {nonce} is outside of the window around {now_ms}"
        if nonce in self._used:
            return f"Invalid nonce: duplicate nonce {nonce}"
        if len(self._used) == _KEPT and nonce < self._used[0]:
            return f"Invalid nonce: nonce too low {nonce} < {self._used[0]}"
        return None

    def use(self, nonce: int) -> None:
        """Remember that a nonce is used up."""
        insort(self._used, nonce)
        del self._used[:-_KEPT]

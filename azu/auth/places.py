"""Requests that are open at once: one too many would wait behind the others without an answer."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from azu.errors import RateLimited, Unavailable

_BUSY_S = 1.0


class Places:
    """The places of one kind of requests; each owner has only some of them."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._taken: Counter[str] = Counter()

    @contextmanager
    def place(self, owner: str) -> Iterator[None]:
        """Hold a place during the block; raises RateLimited or Unavailable where none is free."""
        if self._taken[owner] >= self._most_of_one:
            raise RateLimited(
                f"{self._most_of_one} requests of this account are open; wait until one has ended",
                code="too_many_open_requests",
                retry_after_s=_BUSY_S,
            )
        if self._taken.total() >= self._most:
            raise Unavailable("too many requests are open", code="overloaded", retry_after_s=_BUSY_S)
        self._taken[owner] += 1
        try:
            yield
        finally:
            self._taken[owner] -= 1
            if not self._taken[owner]:
                del self._taken[owner]

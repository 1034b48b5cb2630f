"""What an account sets aside for a job or for a model that is new here, once, and how that ended."""

from collections.abc import Awaitable, Callable

from azu.auth.key_records import ApiKey
from azu.errors import LedgerError, RateLimited, TransferConflict
from azu.money.endings import outcome_of
from azu.money.keys import Keys
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import Expire, Release, Reserve, Settle
from azu.protocol.job import JobOutcome

_ENDS = ("settle", "release", "expire")
_RETRY_AFTER_S = 1.0


class Holds:
    """The reservations of one ledger. Each call may be repeated: nothing happens twice."""

    def __init__(self, ledger: Callable[[], Awaitable[Ledger]], keys: Keys, most_open: int) -> None:
        self._ledger = ledger
        self._keys = keys
        # Of one address.
        self._most_open = most_open

    async def set_aside(self, key: ApiKey, asked: Reserve) -> int:
        """Reserve from the account of a key's address; return what was reserved, now or before.

        Raises InsufficientBalance, RateLimited where the address has too many open, and TransferConflict if
        the same was reserved in another way.
        """
        ledger = await self._ledger()
        # A repeated call has another time.
        known = await ledger.result(asked.id)
        if known is None:
            self._check_num_open(ledger.state, asked.address)
            with self._keys.within_day(ledger.state, key, asked.lamports):
                await ledger.apply(asked)
            return asked.lamports
        before = known.entry.transfer
        if not isinstance(before, Reserve) or _facts(before) != _facts(asked):
            raise TransferConflict(f"{asked.job_id} was reserved for before, in another way")
        return before.lamports

    def _check_num_open(self, state: BooksState, address: str) -> None:
        most = self._most_open
        # They are counted only where there can be too many.
        if len(state.reservations) < most:
            return
        if sum(one.address == address for one in state.reservations.values()) >= most:
            message = f"{most} reservations of this account are open; wait until one has ended"
            raise RateLimited(message, code="too_many_jobs", retry_after_s=_RETRY_AFTER_S)

    async def end(self, hold: Reserve, transfer: Settle | Release | Expire) -> JobOutcome:
        """Apply the end of a job; return how the job has ended, which another call may have decided."""
        try:
            await (await self._ledger()).apply(transfer)
        except (LedgerError, TransferConflict):
            if (ended := await self.ended(hold.job_id)) is None:
                raise
            return ended
        return outcome_of(hold, transfer)

    async def ended(self, job_id: str) -> JobOutcome | None:
        """Return how a job has ended, None for one that runs or is unknown."""
        ledger = await self._ledger()
        hold = await self.of(job_id)
        if hold is None:
            return None
        for kind in _ENDS:
            if (end := await ledger.result(f"{kind}:{job_id}")) is not None:
                transfer = end.entry.transfer
                assert isinstance(transfer, Settle | Release | Expire), "the ids say so"
                return outcome_of(hold, transfer)
        return None

    async def of(self, job_id: str) -> Reserve | None:
        """Return what was reserved for a job, whether it has ended or not."""
        reserved = await (await self._ledger()).result(f"reserve:{job_id}")
        hold = None if reserved is None else reserved.entry.transfer
        assert hold is None or isinstance(hold, Reserve), "the id says so"
        return hold


def _facts(reserve: Reserve) -> tuple[object, ...]:
    """Return what a repeated reservation has in common with the first; the price stays that of the first."""
    return (
        reserve.address, reserve.key_id, reserve.model_id, reserve.revision, reserve.num_layers,
        reserve.prompt_tokens, reserve.max_tokens,
    )  # fmt: skip

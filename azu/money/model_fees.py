"""What an account sets aside for a model that the network does not have yet, by the bytes that are fetched.

A fee is a reservation like a job's, under an id of its own. The first job of the model that is charged gives
it back; without one the platform gets it after a time.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator

from azu.auth.key_records import ApiKey
from azu.errors import InvalidRequest
from azu.money.books import BooksTerms
from azu.money.holds import Holds
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import Release, Reserve, Settle, is_fee
from azu.units import GIB

# The largest models known have less than half of it.
_MOST_BYTES = 4096 * GIB
_FETCH_ID = re.compile(r"fetch-[A-Za-z0-9-]{1,60}")


class ModelFees:
    """The fees of one ledger."""

    def __init__(self, ledger: Callable[[], Awaitable[Ledger]], holds: Holds, terms: BooksTerms) -> None:
        self._ledger = ledger
        self._holds = holds
        self._terms = terms
        # One model's fee at a time is set aside, or several requests at once would each find none.
        self._setting = asyncio.Lock()
        # The models that may have fees set aside; None until they were looked for. Every job that is charged
        # asks, and has no time to look through all reservations.
        self._models: set[str] | None = None

    async def set_aside(self, key: ApiKey, fetch_id: str, *, model_id: str, num_bytes: int) -> int:
        """Set a model's fee aside unless there is one; return it. Raises InsufficientBalance."""
        lamports = fee_lamports(num_bytes, self._terms.fetch_lamports_per_gib)
        if not _FETCH_ID.fullmatch(fetch_id):
            raise InvalidRequest(f"{fetch_id} is no fee's id", param="fetch_id")
        if not 0 <= num_bytes <= _MOST_BYTES:
            raise InvalidRequest(f"no model has {num_bytes} bytes", param="num_bytes")
        async with self._setting:
            ledger = await self._ledger()
            others = _of_model(ledger.state, model_id)
            if not lamports or any(one.job_id != fetch_id for one in others):
                return 0
            (await self._models_with_fees()).add(model_id)
            until_ms = ledger.now_ms() + self._terms.fetch_unused_ms
            asked = _fee(fetch_id, key, model_id, lamports, until_ms)
            return await self._holds.set_aside(key, asked)

    async def give_back(self, model_id: str) -> None:
        """Give the fees of a model back."""
        if model_id not in await self._models_with_fees():
            return
        async with self._setting:
            for one in _of_model((await self._ledger()).state, model_id):
                await self._holds.end(one, Release(id=f"release:{one.job_id}", job_id=one.job_id))
            (await self._models_with_fees()).discard(model_id)

    async def charge_unused(self) -> None:
        """Charge the fees for models that were not used in time, once the chain's time was heard."""
        ledger = await self._ledger()
        async with self._setting:
            for one in list(self._ends(ledger)) if ledger.is_timed else ():
                await ledger.apply(one)
            self._models = None  # it is looked for anew, without models whose fees have ended

    def _ends(self, ledger: Ledger) -> Iterator[Settle]:
        """Yield what charges the fees of models that were not used in time, as jobs are charged."""
        now_ms = ledger.now_ms()
        for one in _open(ledger.state):
            if one.expires_at_ms <= now_ms:
                yield Settle(
                    id=f"settle:{one.job_id}",
                    job_id=one.job_id,
                    prompt_tokens=one.prompt_tokens,
                    charged_lamports=one.lamports,
                    platform_lamports=one.lamports,
                    shares={},
                    maturity_ms=self._terms.maturity_ms,
                )

    async def _models_with_fees(self) -> set[str]:
        if self._models is None:
            state = (await self._ledger()).state
            self._models = {one.model_id for one in _open(state)}
        return self._models


def fee_lamports(num_bytes: int, lamports_per_gib: int) -> int:
    """Return the fee for so many bytes, rounded up."""
    return -(-num_bytes * lamports_per_gib // GIB)


def _fee(fetch_id: str, key: ApiKey, model_id: str, lamports: int, expires_at_ms: int) -> Reserve:
    """Return what sets a fee aside: one token, as a reservation has it, for each lamport."""
    return Reserve(
        id=f"reserve:{fetch_id}",
        address=key.address,
        job_id=fetch_id,
        expires_at_ms=expires_at_ms,
        key_id=key.key_id,
        model_id=model_id,
        revision="",
        num_layers=1,
        lamports_per_token_layer=1,
        platform_percent=100,
        prompt_tokens=lamports,
        max_tokens=0,
    )


def _of_model(state: BooksState, model_id: str) -> list[Reserve]:
    return [one for one in _open(state) if one.model_id == model_id]


def _open(state: BooksState) -> list[Reserve]:
    """Return all fees that are set aside."""
    return [one for one in state.reservations.values() if is_fee(one.job_id)]

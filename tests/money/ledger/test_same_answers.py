"""The pure rules and the Redis adapter give the same answers to the same transfers, refusals included."""

import asyncio
import os
from collections.abc import Iterator, Sequence

import hypothesis
import pytest
import redis
from hypothesis import given, settings

from azu.errors import AzuError
from azu.money.ledger.redis import RedisLedger
from azu.money.ledger.rules import LedgerState, Reservation, Result, apply
from azu.money.ledger.transfers import Transfer
from tests.money.ledger.strategies import histories
from tests.redis_server import RunningRedis

Answer = Result | tuple[type[AzuError], str, str | None]


class BothLedgers:
    """One event loop and one ledger over the session's Redis, emptied before each history."""

    def __init__(self, url: str) -> None:
        self._server = redis.Redis.from_url(url)
        self._runner = asyncio.Runner()
        self._ledger = RedisLedger.from_url(url)

    def close(self) -> None:
        self._runner.run(self._ledger.close())
        self._runner.close()
        self._server.close()

    def compare(self, history: Sequence[Transfer]) -> None:
        """Send a history to both and compare every answer, then everything that is stored."""
        self._server.flushall()
        self._runner.run(self._compare(history))

    async def _compare(self, history: Sequence[Transfer]) -> None:
        state = LedgerState()
        for transfer in history:
            state, expected = _by_the_rules(state, transfer)
            assert await self._by_redis(transfer) == expected
        stored = await self._ledger.snapshot()
        assert stored.balances == state.balances
        assert stored.holds == state.holds
        assert stored.numbers == {id_: entry.number for id_, entry in state.entries.items()}
        assert stored.expiries == {
            name: hold.expires_at_ms
            for name, hold in state.holds.items()
            if isinstance(hold, Reservation) and hold.ended_by is None
        }
        assert [entry async for entry in self._ledger.journal()] == list(state.entries.values())

    async def _by_redis(self, transfer: Transfer) -> Answer:
        try:
            return await self._ledger.apply(transfer)
        except AzuError as error:
            return type(error), error.message, error.code


def _by_the_rules(state: LedgerState, transfer: Transfer) -> tuple[LedgerState, Answer]:
    try:
        return apply(state, transfer)
    except AzuError as error:
        return state, (type(error), error.message, error.code)


@pytest.fixture(scope="module")
def both(redis_server: RunningRedis) -> Iterator[BothLedgers]:
    ledgers = BothLedgers(redis_server.url)
    yield ledgers
    ledgers.close()


@given(history=histories(40))
@settings(max_examples=60, deadline=None)
def test_both_give_the_same_answers(both: BothLedgers, history: list[Transfer]) -> None:
    both.compare(history)


@pytest.mark.prove
@hypothesis.seed(int(os.environ.get("AZU_TEST_SEED", "1")))
@given(history=histories(60))
@settings(max_examples=500, deadline=None, database=None)
def test_both_give_the_same_answers_to_long_histories(both: BothLedgers, history: list[Transfer]) -> None:
    both.compare(history)

"""What a thief does to the books with the credentials of ingress and scheduler and each key that passes.

The books are served as their process serves them.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from eth_account import Account

from azu.auth.signatures import ReverseJob, sign_claim, sign_command
from azu.clock import wall_clock_ms
from azu.errors import InsufficientBalance
from azu.money.books import Books
from azu.protocol.job import FinishReason, JobEnding, JobState
from tests.money.accounts import BEARER, USER, fund, signed_key
from tests.money.serving import PLATFORM, TERMS, ServedBooks, serving
from tests.redteam.conftest import HONEST, MALLORY, MALLORY_WALLET

DAY_MS = 86_400_000
ADMIN = Account.from_key("0x" + "ad" * 32)
PAYER = USER.address.lower()
DEPOSIT, LIMIT = 1_000_000, 100_001
HERS, HIS, UNKNOWN = "mallorys-node", "honest-node", "f" * 56
DONE = JobEnding(JobState.DONE, FinishReason.LENGTH)


class Thief:
    """Reserves with the keys that pass, and settles to whom it likes."""

    def __init__(self, books: ServedBooks) -> None:
        self.ingress, self.scheduler = books.client("ingress"), books.client("scheduler")
        self.owner, self.treasury = books.client("owner"), books.client("treasury")
        self.stolen: list[str] = []

    async def begin(self) -> None:
        """Have a payer with money and two keys, one with a limit, and nodes of the thief and of another."""
        await fund(self.treasury, DEPOSIT)
        await self.ingress.open_key(signed_key())
        await self.ingress.open_key(signed_key(bearer="limited", spend_limit_lamports=LIMIT))
        for node, payout in ((HERS, MALLORY), (HIS, HONEST)):
            await self.owner.enrol_node(node, payout, key_digest=node, name=node, work_bytes_per_s=0)
        await self.ingress.claim_earnings(MALLORY, sign_claim(MALLORY_WALLET, PLATFORM))

    async def reserve(self, lamports: int, bearer: str = BEARER) -> None:
        job_id = f"job-stolen-{len(self.stolen)}"
        facts = {"model_id": "m", "revision": "r", "num_layers": 1, "prompt_tokens": 0}
        tokens = lamports // TERMS.lamports_per_token_layer
        await self.ingress.reserve(bearer, job_id, max_tokens=tokens, **facts)
        self.stolen.append(job_id)

    async def settle(self, job_id: str, node: str = HERS) -> None:
        """Settle more tokens than were reserved, in layers that the job has and in some that it lacks."""
        # So little that it is slower than any node.
        work = {layer: {node: 1} for layer in range(9)}
        await self.scheduler.settle(
            job_id, prompt_tokens=10**9, completion_tokens=10**9, work=work, ending=DONE
        )

    async def available(self) -> int:
        return (await self.ingress.balance(PAYER)).available_lamports

    async def close(self) -> None:
        for client in (self.ingress, self.scheduler, self.owner, self.treasury):
            await client.close()


def steal(redis_url: str, scenario: Callable[[Thief, list[int]], Awaitable[None]]) -> None:
    """Run a scenario over books in which earnings wait for a day; the list holds the time."""
    clock = [wall_clock_ms()]
    terms = replace(TERMS, maturity_ms=DAY_MS, admins=(ADMIN.address.lower(),))

    async def inside() -> None:
        async with serving(redis_url, terms=terms, now_ms=lambda: clock[0]) as books:
            thief = Thief(books)
            await thief.begin()
            await scenario(thief, clock)
            assert (await thief.owner.audit()).findings == ()
            await thief.close()

    asyncio.run(inside())


async def reverse(owner: Books, job_id: str, nonce: int) -> None:
    command = ReverseJob(job_id=job_id, nonce=nonce, expires_at_ms=wall_clock_ms() + 10 * DAY_MS)
    await owner.command(sign_command(ADMIN, command, PLATFORM))


def test_what_was_stolen_is_not_owed_before_it_matures_and_all_of_it_goes_back(redis_url: str) -> None:
    async def scenario(thief: Thief, clock: list[int]) -> None:
        await thief.reserve(1_000)
        await thief.reserve(await thief.available())
        assert await thief.available() == 0, "all that the key's owner had"
        for job_id in thief.stolen:
            await thief.settle(job_id)

        clock[0] += DAY_MS - 1
        assert (await thief.ingress.earnings(MALLORY)).earned_lamports == DEPOSIT * 80 // 100
        assert await thief.treasury.owed() == {}

        found = (await thief.owner.reversible(PAYER)).jobs
        assert {one.job_id for one in found} == set(thief.stolen)
        for nonce, one in enumerate(found):
            await reverse(thief.owner, one.job_id, nonce)
        assert await thief.available() == DEPOSIT
        assert (await thief.ingress.earnings(MALLORY)).earned_lamports == 0
        clock[0] += 2 * DAY_MS
        assert await thief.treasury.owed() == {}

    steal(redis_url, scenario)


def test_what_was_not_reversed_in_time_is_owed(redis_url: str) -> None:
    async def scenario(thief: Thief, clock: list[int]) -> None:
        await thief.reserve(1_000)
        await thief.settle(thief.stolen[0])
        assert await thief.treasury.owed() == {}
        clock[0] += DAY_MS
        # Time passes for the books with an entry.
        await thief.reserve(2)
        assert await thief.treasury.owed() == {MALLORY: 800}

    steal(redis_url, scenario)


def test_a_key_loses_at_most_its_limit(redis_url: str) -> None:
    async def scenario(thief: Thief, clock: list[int]) -> None:
        await thief.reserve(LIMIT, "limited")
        with pytest.raises(InsufficientBalance) as refused:
            await thief.reserve(2, "limited")
        assert refused.value.code == "spend_limit_reached"
        assert await thief.available() == DEPOSIT - LIMIT + 1

    steal(redis_url, scenario)


def test_a_job_pays_once_what_was_reserved_and_nothing_to_a_node_that_is_unknown(redis_url: str) -> None:
    async def scenario(thief: Thief, clock: list[int]) -> None:
        await thief.reserve(1_000)
        await thief.settle(thief.stolen[0], UNKNOWN)
        for _ in range(2):
            await thief.settle(thief.stolen[0])
        assert await thief.available() == DEPOSIT - 1_000
        assert (await thief.ingress.earnings(MALLORY)).earned_lamports == 0
        assert (await thief.owner.totals()).held_lamports["held"] == 800

    steal(redis_url, scenario)

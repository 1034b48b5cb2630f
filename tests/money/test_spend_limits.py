"""Of any number of concurrent jobs, only as many start as the balance and the key's limit pay for."""

import asyncio

import pytest

from azu.errors import AzuError, InsufficientBalance, Unauthenticated
from azu.money import spend_limits
from azu.money.ledger.transfers import user_reserved
from azu.money.spend_limits import RedisSpending
from azu.protocol.job import FinishReason, Job, JobRun
from azu.redis_client import connect_redis
from tests.builders import ALICE
from tests.jobs.test_settlement import PAYOUTS, WORK, Billing

# 4 prompt and at most 10 completion tokens over 4 layers at 2 lamports.
MOST = 112
AT_ONCE = 1_000


async def started(billing: Billing, **key: object) -> list[Job]:
    """Send a thousand jobs at once; return those that were accepted."""
    sent = (billing.accept(**key) for _ in range(AT_ONCE))
    answers = await asyncio.gather(*sent, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(isinstance(answer, InsufficientBalance) for answer in refused), refused[0]
    return [answer for answer in answers if isinstance(answer, Job)]


def test_of_a_thousand_submits_with_a_balance_for_ten_jobs_ten_start(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(10 * MOST + 5)

        accepted = await started(billing)

        assert len(accepted) == 10
        assert await billing.balances() == (5, 10 * MOST)
        queued = await billing.jobs.take("scheduler", 1, 60_000)
        assert {record.job.job_id for record in queued} == {job.job_id for job in accepted}

    asyncio.run(scenario())


def test_of_a_thousand_submits_with_a_key_limited_to_ten_jobs_ten_start(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(1_000 * MOST)

        assert len(await started(billing, spend_limit_lamports=10 * MOST + 5)) == 10
        assert await billing.ledger.balance(user_reserved(ALICE)) == 10 * MOST

    asyncio.run(scenario())


async def refusal(billing: Billing, **key: object) -> AzuError:
    with pytest.raises(AzuError) as refused:
        await billing.accept(**key)
    return refused.value


def test_the_part_of_the_limit_that_a_job_did_not_use_can_be_spent_again(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(10_000)
        limit = {"spend_limit_lamports": MOST + 80}
        first = await billing.accept(**limit)
        assert (await refusal(billing, **limit)).code == "spend_limit_reached"

        # It is charged 80 of its 112.
        await billing.end(first, JobRun(6, FinishReason.STOP, WORK, payout_by_node=PAYOUTS))
        second = await billing.accept(**limit)
        await billing.end(second, JobRun(10, FinishReason.LENGTH, WORK, payout_by_node=PAYOUTS))

        assert (await refusal(billing, **limit)).code == "spend_limit_reached"
        # Other keys of the address have no limit, or their own.
        await billing.accept(key_id="key-2", spend_limit_lamports=MOST)
        await billing.accept(key_id="key-3")

    asyncio.run(scenario())


def test_a_key_with_a_high_limit_counts_few_of_the_jobs_that_have_ended(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spend_limits, "_CORRECTED_EVERY", 8)

    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(100 * MOST)
        run = JobRun(6, FinishReason.STOP, WORK, payout_by_node=PAYOUTS)
        for _ in range(40):
            job = await billing.accept(key_id="key-1", spend_limit_lamports=100 * MOST)
            await billing.end(job, run)
        spending = RedisSpending(connect_redis(redis_url))

        assert len(await spending.open("key-1")) < 8
        assert 40 * 80 <= await spending.spent("key-1") < 40 * 80 + 8 * (MOST - 80)

    asyncio.run(scenario())


def test_a_job_that_the_balance_does_not_cover_uses_nothing_of_the_limit(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        limit = {"spend_limit_lamports": MOST}
        assert (await refusal(billing, **limit)).code == "insufficient_balance"
        await billing.deposit(MOST)
        await billing.accept(**limit)

    asyncio.run(scenario())


def test_an_expired_key_reserves_nothing(redis_url: str) -> None:
    async def scenario() -> None:
        billing = Billing(redis_url)
        await billing.deposit(MOST)
        # The clock of Billing stands at 1000.
        assert isinstance(await refusal(billing, expires_at_ms=1_000), Unauthenticated)
        assert await billing.balances() == (MOST, 0)
        await billing.accept(expires_at_ms=1_001)

    asyncio.run(scenario())

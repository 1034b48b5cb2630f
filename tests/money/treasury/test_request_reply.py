"""What a request for a deposit returns, over a real devnet and a real Redis."""

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import redis
from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.devnet.chain import SECOND_HYPE
from azu.errors import (
    ChainError,
    DeadlineExceeded,
    DepositRejected,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
)
from azu.money.chain.actions import sign_send_asset
from azu.money.treasury import request_reply
from azu.money.treasury.request_reply import CreditState, DepositStatus
from azu.units import LAMPORTS_PER_HYPE
from tests.money.chain.running import RunningDevnet
from tests.money.treasury.world import Open, World

BOB = "0x" + "b0" * 20
TIMEOUT_S = 8.0
WAITING = "azu:treasury:claims:waiting"


def with_treasury(world: World, scenario: Callable[[Open], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario while requests are answered and nothing else reads the chain."""

    async def inside(parts: Open) -> None:
        treasury = asyncio.create_task(parts.answer_deposits())
        try:
            await scenario(parts)
        finally:
            treasury.cancel()

    world.run(inside)


def test_a_request_of_the_sender_credits_the_deposit(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        tx_hash = await parts.pay_platform(alice, 77)

        # In capitals, as users may paste them.
        verdict = await parts.deposits.ask("0x" + tx_hash[2:].upper(), alice.address, TIMEOUT_S)

        assert verdict == DepositStatus(CreditState.CREDITED, alice.address.lower(), 77)
        assert await parts.available(alice) == 77

    with_treasury(world, scenario)


def test_a_treasury_that_waits_is_woken_by_a_request(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than a call of Redis may take: only a request ends it.
    monkeypatch.setattr(request_reply, "_WAKES_S", 60)

    async def scenario(parts: Open) -> None:
        waiting = asyncio.create_task(parts.deposits.wait())
        await asyncio.sleep(0.2)
        assert not waiting.done()

        with pytest.raises(DeadlineExceeded):
            await parts.deposits.ask("0x" + "12" * 32, BOB, 0.0)

        await waiting
        # It was not answered: the next look does not wait either.
        await parts.deposits.wait()

    world.run(scenario)


@pytest.mark.prove
def test_a_deposit_requested_before_its_row_appears_is_credited_when_it_does(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        first = await parts.pay_platform(alice, 1)
        world.devnet.fault("rows_late", seconds=1.5)
        late = asyncio.create_task(parts.pay_platform(alice, 76))
        while (tx_hash := last_hash(world.devnet, alice)) == first:
            await asyncio.sleep(0.02)

        impatient = await parts.deposits.ask(tx_hash, alice.address, 0.5)
        patient = await parts.deposits.ask(tx_hash, alice.address, TIMEOUT_S)

        assert impatient == DepositStatus(CreditState.PENDING, alice.address.lower(), 0)
        assert patient == DepositStatus(CreditState.CREDITED, alice.address.lower(), 76)
        await late

    with_treasury(world, scenario)


def test_a_request_of_another_address_is_forbidden_and_credits_nothing(world: World) -> None:
    alice, mallory = world.payer(), Account.create()

    async def scenario(parts: Open) -> None:
        tx_hash = await parts.pay_platform(alice, 77)

        with pytest.raises(Forbidden):
            await parts.deposits.ask(tx_hash, mallory.address, TIMEOUT_S)

        assert await parts.available(mallory) == 0

    with_treasury(world, scenario)


def failed(world: World, alice: LocalAccount) -> str:
    exchange(world, alice).send_asset(
        world.platform.address, "spot", "spot", world.devnet.network.hype, "999"
    )
    return last_hash(world.devnet, alice)


def wrong_token(world: World, alice: LocalAccount) -> str:
    world.devnet.fault("second_hype")
    world.devnet.fund(alice.address, LAMPORTS_PER_HYPE, token=SECOND_HYPE.full_id)
    exchange(world, alice).send_asset(world.platform.address, "spot", "spot", SECOND_HYPE.full_id, "1")
    return last_hash(world.devnet, alice)


def to_another_address(world: World, alice: LocalAccount) -> str:
    exchange(world, alice).send_asset(BOB, "spot", "spot", world.devnet.network.hype, "1")
    return last_hash(world.devnet, alice)


def no_transfer(world: World, alice: LocalAccount) -> str:
    exchange(world, alice).noop(time.time_ns() // 1_000_000)
    return last_hash(world.devnet, alice)


@pytest.mark.parametrize("make", [failed, wrong_token, to_another_address, no_transfer])
def test_a_transfer_that_is_no_deposit_is_rejected_and_credits_nothing(
    world: World, make: Callable[[World, LocalAccount], str]
) -> None:
    alice = world.payer()
    tx_hash = make(world, alice)

    async def scenario(parts: Open) -> None:
        with pytest.raises(DepositRejected):
            await parts.deposits.ask(tx_hash, alice.address, TIMEOUT_S)
        await parts.watcher.poll()

        assert await parts.balances() == {}

    with_treasury(world, scenario)


def test_a_hash_that_the_chain_does_not_know_is_not_found(world: World) -> None:
    async def scenario(parts: Open) -> None:
        with pytest.raises(NotFound):
            await parts.deposits.ask("0x" + "12" * 32, BOB, TIMEOUT_S)

    with_treasury(world, scenario)


@pytest.mark.parametrize("tx_sig", ["", "0x12", "12" * 32, "0x" + "zz" * 32, "0x" + "12" * 33])
def test_a_malformed_hash_is_refused_without_a_request(world: World, tx_sig: str) -> None:
    async def scenario(parts: Open) -> None:
        with pytest.raises(InvalidRequest) as caught:
            await parts.deposits.ask(tx_sig, BOB, TIMEOUT_S)

        assert caught.value.param == "tx_sig"
        assert not waiting(world)

    world.run(scenario)


def test_a_treasury_that_is_away_exceeds_the_deadline(world: World) -> None:
    async def scenario(parts: Open) -> None:
        with pytest.raises(DeadlineExceeded):
            await parts.deposits.ask("0x" + "12" * 32, BOB, 0.3)

    world.run(scenario)


def test_a_request_survives_the_death_of_the_treasury(world: World) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        tx_hash = await parts.pay_platform(alice, 77)
        asking = asyncio.create_task(parts.deposits.ask(tx_hash, alice.address, TIMEOUT_S))
        while not waiting(world):
            await asyncio.sleep(0.01)
        # The first treasury credits and dies before it answers.
        await parts.watcher.check(tx_hash)
        second = asyncio.create_task(parts.answer_deposits())

        assert await asking == DepositStatus(CreditState.CREDITED, alice.address.lower(), 77)
        assert await parts.available(alice) == 77
        second.cancel()

    world.run(scenario)


def test_what_is_no_request_is_removed_and_delays_no_other(world: World) -> None:
    good = "0x" + "60" * 32

    async def check(tx_hash: str) -> DepositStatus:
        assert tx_hash == good
        return DepositStatus(CreditState.CREDITED, BOB, 5)

    async def scenario(parts: Open) -> None:
        with redis.Redis.from_url(world.redis_url) as ingress:
            ingress.zadd(WAITING, {b"\xff": 1e18, b"later": time.time() + 1_000, b"no hash": time.time() - 9})
            ingress.zadd(WAITING, {b"\xfe": time.time() - 8, b"earlier": time.time() - 1_000})
            asking = asyncio.create_task(parts.deposits.ask(good, BOB, TIMEOUT_S))
            while ingress.zscore(WAITING, good) is None:
                await asyncio.sleep(0.01)
            assert await parts.deposits.serve(check, 16) == 3
            assert (await asking).lamports == 5
            assert ingress.zrange(WAITING, 0, -1) == [b"\xfe"], "it goes with its time"

    world.run(scenario)


def test_a_request_whose_answer_fails_delays_no_other_and_fails_the_third_time(world: World) -> None:
    odd, good = ("0x" + digits * 32 for digits in ("0d", "60"))
    checks: Counter[str] = Counter()

    async def check(tx_hash: str) -> DepositStatus:
        checks[tx_hash] += 1
        if tx_hash == odd:
            raise ZeroDivisionError
        return DepositStatus(CreditState.CREDITED, BOB, 5)

    async def scenario(parts: Open) -> None:
        asking = [asyncio.create_task(parts.deposits.ask(one, BOB, TIMEOUT_S)) for one in (odd, good)]
        while len(waiting(world)) < 2:
            await asyncio.sleep(0.01)
        for _ in range(3):
            await parts.deposits.serve(check, 16)

        assert (await asking[1]).lamports == 5
        with pytest.raises(InternalError, match="fault-"):
            await asking[0]
        assert checks == {odd: 3, good: 1}
        assert not waiting(world)

    world.run(scenario)


def test_a_request_stays_while_the_chain_is_away(world: World) -> None:
    async def away(_: str) -> DepositStatus:
        raise ChainError("the chain does not answer")

    async def scenario(parts: Open) -> None:
        asking = asyncio.create_task(parts.deposits.ask("0x" + "12" * 32, BOB, 0.5))
        while not waiting(world):
            await asyncio.sleep(0.01)
        for _ in range(5):
            with pytest.raises(ChainError):
                await parts.deposits.serve(away, 16)
        assert waiting(world)
        with pytest.raises(DeadlineExceeded):
            await asking

    world.run(scenario)


def waiting(world: World) -> Any:
    with redis.Redis.from_url(world.redis_url) as client:
        return client.zrange("azu:treasury:claims:waiting", 0, -1)


def test_many_copies_of_one_request_credit_once(world: World) -> None:
    copies_of_one_request(world, 50)


@pytest.mark.prove
def test_a_thousand_copies_of_one_request_credit_once(world: World, figures: Counter[str]) -> None:
    copies_of_one_request(world, 1000)
    figures["copies of one claim at once, which credited once"] += 1000


def copies_of_one_request(world: World, copies: int) -> None:
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        tx_hash = await parts.pay_platform(alice, 77)
        polls = asyncio.create_task(parts.watcher.poll())

        verdicts = await asyncio.gather(
            *(parts.deposits.ask(tx_hash, alice.address, 60.0) for _ in range(copies))
        )

        await polls
        assert set(verdicts) == {DepositStatus(CreditState.CREDITED, alice.address.lower(), 77)}
        assert await parts.available(alice) == 77
        assert not waiting(world)

    with_treasury(world, scenario)


@pytest.mark.prove
def test_a_thousand_bad_requests_credit_nothing(world: World, figures: Counter[str]) -> None:
    alice, mallory = world.payer(), Account.create()
    no_deposits = [make(world, alice) for make in (failed, wrong_token, to_another_address, no_transfer)]

    async def scenario(parts: Open) -> None:
        credited = await parts.pay_platform(alice, 5)
        await parts.deposits.ask(credited, alice.address, TIMEOUT_S)
        claims = [
            *((tx_hash, alice.address) for tx_hash in no_deposits for _ in range(150)),
            *((credited, alice.address) for _ in range(100)),
            *((credited, mallory.address) for _ in range(100)),
            *((f"0x{secrets.token_hex(32)}", mallory.address) for _ in range(100)),
            *((expired(world, alice), alice.address) for _ in range(100)),
        ]

        outcomes = await asyncio.gather(
            *(parts.deposits.ask(tx_hash, address, 120.0) for tx_hash, address in claims),
            return_exceptions=True,
        )

        assert len(claims) == 1000
        assert Counter(type(outcome) for outcome in outcomes) == {
            DepositRejected: 600,
            DepositStatus: 100,
            Forbidden: 100,
            NotFound: 200,
        }
        # A repeated request gets the same answer and credits nothing more.
        assert await parts.balances() == {
            "chain": -5,
            f"user:{alice.address.lower()}:available": 5,
        }
        figures["forged, foreign, failed, wrong-token, replayed or expired claims, which credited 0"] += 1000

    with_treasury(world, scenario)


def expired(world: World, alice: LocalAccount) -> str:
    """Send a transfer too late for the chain; return a hash that its sender could claim."""
    action = sign_send_asset(
        alice,
        world.devnet.network,
        destination=world.platform.address,
        lamports=5,
        nonce=time.time_ns() // 1_000_000,
    )
    request = json.loads(action.body) | {"expiresAfter": 1}
    reply = world.devnet.http.post("/exchange", json=request).json()
    assert reply == {"status": "err", "response": "Action expired"}
    signature_half: str = request["signature"]["r"]
    return signature_half


def exchange(world: World, account: LocalAccount) -> Any:
    from hyperliquid.exchange import Exchange

    return Exchange(account, world.devnet.url, timeout=5)


def last_hash(devnet: RunningDevnet, account: LocalAccount) -> str:
    tx_hash: str = devnet.txs(account.address)[0]["hash"]
    return tx_hash

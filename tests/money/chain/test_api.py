"""The client against a running devnet, while the connection between them fails."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.devnet.chain import SECOND_HYPE, USDC
from azu.errors import ChainError
from azu.money.chain.actions import sign_noop, sign_send_asset
from azu.money.chain.api import ChainClient, rounded_up
from azu.money.chain.port import LedgerTransfer
from azu.money.chain.wallet import send_hype
from azu.units import LAMPORTS_PER_HYPE, MAX_LAMPORTS
from tests.few import few
from tests.money.chain.running import RunningDevnet, fresh_address

CONTRACT = "0x" + "c0" * 20


@pytest.fixture
def alice(devnet: RunningDevnet) -> LocalAccount:
    account = Account.create()
    devnet.fund(account.address, 10 * LAMPORTS_PER_HYPE)
    return account


@asynccontextmanager
async def client(devnet: RunningDevnet, http: httpx.AsyncClient | None = None) -> AsyncIterator[ChainClient]:
    chain = ChainClient(devnet.network, http)
    try:
        yield chain
    finally:
        await chain.close()


async def transfers(chain: ChainClient, user: str) -> list[LedgerTransfer]:
    return [transfer async for page in chain.ledger_updates(user, 0) for transfer in page]


def test_a_transfer_is_read_back_exactly(devnet: RunningDevnet, bob: str, alice: LocalAccount) -> None:
    async def scenario() -> None:
        async with client(devnet) as chain:
            tx_hash = await send_hype(chain, alice, bob, 123_456_789)
            [transfer] = await transfers(chain, bob)
            details = await chain.tx_details(tx_hash)

            assert (transfer.hash, transfer.sender, transfer.destination) == (
                tx_hash,
                alice.address.lower(),
                bob,
            )
            assert (transfer.amount, transfer.token_name, transfer.to_spot) == ("1.23456789", "HYPE", True)
            assert details is not None
            assert details.action["token"] == devnet.network.hype
            assert (details.user, details.error) == (transfer.sender, None)
            assert await chain.spot_balance(bob) == 123_456_789

    asyncio.run(scenario())


def test_every_page_of_a_long_ledger_is_read(devnet: RunningDevnet, bob: str, alice: LocalAccount) -> None:
    async def scenario() -> None:
        async with client(devnet) as chain:
            await send_hype(chain, alice, bob, 1)
            for _ in range(600):
                devnet.fund(bob, 1)
            await send_hype(chain, alice, bob, 2)
            devnet.fault("rows_twice", times=None)

            found = [(transfer.amount, transfer.nth) for transfer in await transfers(chain, bob)]
            assert found == [(amount, nth) for amount in ("0.00000001", "0.00000002") for nth in (0, 1)]

    asyncio.run(scenario())


def test_rows_without_a_hash_are_counted_across_pages(devnet: RunningDevnet, bob: str) -> None:
    async def scenario() -> None:
        async with client(devnet) as chain:
            for count in (3, 400, 300, 1):
                devnet.contract(bob, 7, sender=CONTRACT, count=count)
                await asyncio.sleep(0.002)
            found = [(transfer.time_ms, transfer.nth) for transfer in await transfers(chain, bob)]

            assert len(found) == len(set(found)) == 704
            times = [time_ms for time_ms, nth in found if nth == 0]
            assert [sum(time_ms == one for time_ms, _ in found) for one in times] == [3, 400, 300, 1]

    asyncio.run(scenario())


def test_a_crowded_millisecond_hides_no_later_row(
    devnet: RunningDevnet, bob: str, alice: LocalAccount
) -> None:
    async def scenario() -> None:
        async with client(devnet) as chain:
            devnet.contract(bob, 7, sender=CONTRACT, count=700)
            await asyncio.sleep(0.002)
            await send_hype(chain, alice, bob, 2)
            found = await transfers(chain, bob)

            assert len(found) == 501
            assert found[-1].sender == alice.address.lower()

    asyncio.run(scenario())


def test_other_tokens_of_the_same_name_are_counted_apart(devnet: RunningDevnet, bob: str) -> None:
    async def scenario() -> None:
        devnet.fault("second_hype")
        devnet.fund(bob, 5)
        async with client(devnet) as chain:
            assert await chain.namesakes(bob) == 0
            devnet.fund(bob, 7, token=SECOND_HYPE.full_id)
            assert (await chain.namesakes(bob), await chain.spot_balance(bob)) == (7, 5)

    asyncio.run(scenario())


def test_a_balance_of_another_token_may_be_larger_than_all_hype(devnet: RunningDevnet, bob: str) -> None:
    async def scenario() -> None:
        devnet.fault("second_hype")
        async with client(devnet) as chain:
            for _ in range(2):
                devnet.fund(bob, MAX_LAMPORTS, token=SECOND_HYPE.full_id)
            assert await chain.namesakes(bob) == 2 * MAX_LAMPORTS

    asyncio.run(scenario())


@pytest.mark.parametrize(("total", "lamports"), [("0.0000000001", 1), ("7", 700_000_000), ("1e11", 10**19)])
def test_a_balance_of_another_token_may_have_more_decimals_than_hype(total: str, lamports: int) -> None:
    assert rounded_up(total) == lamports


def test_a_balance_that_is_no_number_is_an_error_of_the_chain() -> None:
    for total in ("", "NaN", "Infinity"):
        with pytest.raises(ChainError):
            rounded_up(total)


def test_a_new_recipient_costs_a_fee_that_the_sender_may_lack(devnet: RunningDevnet, bob: str) -> None:
    sender = fresh_address()

    async def scenario() -> None:
        async with client(devnet) as chain:
            devnet.contract(sender, 5, sender=CONTRACT)
            assert not (await chain.recipient(bob, sender)).has_fee
            devnet.contract(sender, 10**8, sender=CONTRACT, token=USDC.full_id)
            assert (await chain.recipient(bob, sender)).has_fee
            assert (await chain.recipient(sender, fresh_address())).has_fee

    asyncio.run(scenario())


def test_the_chain_tells_its_time(devnet: RunningDevnet) -> None:
    async def scenario() -> None:
        async with client(devnet) as chain:
            assert abs(await chain.now_ms() - now_ms()) < 60_000

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "kind",
    ["reply_dropped_before", "reply_dropped_after", "rate_limited", "server_error_before", "delay"],
)
@pytest.mark.parametrize("path", few(["/explorer", "/info"]))
def test_a_read_is_repeated_after_a_temporary_failure(
    devnet: RunningDevnet, kind: str, path: str, alice: LocalAccount
) -> None:
    async def scenario() -> None:
        impatient = httpx.AsyncClient(timeout=0.5)
        async with client(devnet, impatient) as chain:
            devnet.fault(kind, path=path, times=2, seconds=0.7)
            if path == "/info":
                assert await chain.spot_balance(alice.address.lower()) == 10 * LAMPORTS_PER_HYPE
            else:
                assert await chain.tx_details("0x" + "00" * 32) is None

    asyncio.run(scenario())


def test_a_read_that_cannot_succeed_is_not_repeated(devnet: RunningDevnet, bob: str) -> None:
    async def scenario() -> None:
        async with client(devnet) as chain:
            devnet.fault("unprocessable", path="/info")
            with pytest.raises(ChainError):
                await chain.spot_balance(bob)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "kind",
    [
        "reply_dropped_before",
        "reply_dropped_after",
        "rate_limited",
        "server_error_before",
        "server_error_after",
    ],
)
def test_an_action_without_an_answer_is_unknown(
    devnet: RunningDevnet, kind: str, alice: LocalAccount
) -> None:
    async def scenario() -> None:
        async with client(devnet) as chain:
            action = sign_noop(alice, devnet.network, nonce=now_ms())
            devnet.fault(kind)
            with pytest.raises(ChainError):
                await chain.post_action(action.body)

            refusal = await chain.post_action(action.body)

            executed = kind.endswith("after")
            assert (refusal is not None and refusal.nonce_used) == executed

    asyncio.run(scenario())


def test_a_refusal_has_the_chains_own_words(devnet: RunningDevnet, bob: str, alice: LocalAccount) -> None:
    async def scenario() -> None:
        async with client(devnet) as chain:
            too_much = sign_send_asset(
                alice, devnet.network, destination=bob, lamports=11 * LAMPORTS_PER_HYPE, nonce=now_ms()
            )
            refusal = await chain.post_action(too_much.body)
            malformed = await chain.post_action(b"{}")

            assert refusal is not None
            assert refusal.reason == "Insufficient balance for token transfer"
            assert not refusal.nonce_used
            assert malformed is not None

    asyncio.run(scenario())


def test_a_balance_counts_the_exact_token_only(devnet: RunningDevnet, bob: str, alice: LocalAccount) -> None:
    async def scenario() -> None:
        devnet.fault("second_hype")
        devnet.fund(bob, 7, token=SECOND_HYPE.full_id)
        async with client(devnet) as chain:
            assert await chain.spot_balance(bob) == 0
            assert await chain.spot_balance(alice.address.lower()) == 10 * LAMPORTS_PER_HYPE

    asyncio.run(scenario())


def test_a_recipient_and_the_budget_of_actions_are_returned(
    devnet: RunningDevnet, bob: str, alice: LocalAccount
) -> None:
    async def scenario() -> None:
        async with client(devnet) as chain:
            source = alice.address.lower()
            assert not (await chain.recipient(bob, source)).exists
            before = await chain.actions_left(source)
            await send_hype(chain, alice, bob, 1)
            assert (await chain.recipient(bob, source)).exists
            assert await chain.actions_left(source) == before - 1

    asyncio.run(scenario())


def test_a_chain_that_is_away_is_a_chain_error() -> None:
    async def scenario() -> None:
        async with client(RunningDevnet("http://127.0.0.1:9", httpx.Client())) as chain:
            with pytest.raises(ChainError):
                await chain.post_action(b"{}")

    asyncio.run(scenario())


def now_ms() -> int:
    return time.time_ns() // 1_000_000

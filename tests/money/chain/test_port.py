"""What azu needs of a payment chain, over each implementation of the port `Chain`.

A second chain adds a class like `Hyperliquid` to `CHAINS`: it funds accounts and signs transfers there.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.errors import ChainError
from azu.money.chain.actions import sign_noop, sign_send_asset
from azu.money.chain.api import ChainClient
from azu.money.chain.networks import network_at
from azu.money.chain.port import Chain, LedgerTransfer, SignedAction
from azu.units import LAMPORTS_PER_HYPE, lamports_from_hype
from tests.money.chain.running import RunningDevnet

PAID = 123_456_789


class RunningChain(Protocol):
    """A chain with play money that runs for the tests."""

    def connect(self, *, away: bool = False) -> AbstractAsyncContextManager[Chain]:
        """Return a client; with `away` no chain answers it."""

    def fund(self, address: str, lamports: int) -> None:
        """Give an account play money."""

    def transfer(self, account: LocalAccount, destination: str, lamports: int, nonce: int) -> SignedAction:
        """Sign a transfer."""

    def noop(self, account: LocalAccount, nonce: int) -> SignedAction:
        """Sign an action that only uses up a nonce."""


class Hyperliquid:
    """Hyperliquid's API, as the devnet speaks it."""

    def __init__(self, devnet: RunningDevnet) -> None:
        self._devnet = devnet

    @asynccontextmanager
    async def connect(self, *, away: bool = False) -> AsyncIterator[Chain]:
        chain = ChainClient(network_at("http://127.0.0.1:9") if away else self._devnet.network)
        try:
            yield chain
        finally:
            await chain.close()

    def fund(self, address: str, lamports: int) -> None:
        self._devnet.fund(address, lamports)

    def transfer(self, account: LocalAccount, destination: str, lamports: int, nonce: int) -> SignedAction:
        return sign_send_asset(
            account, self._devnet.network, destination=destination, lamports=lamports, nonce=nonce
        )

    def noop(self, account: LocalAccount, nonce: int) -> SignedAction:
        return sign_noop(account, self._devnet.network, nonce=nonce)


CHAINS = {"hyperliquid": lambda request: Hyperliquid(request.getfixturevalue("devnet"))}


@pytest.fixture(params=CHAINS)
def running(request: pytest.FixtureRequest) -> RunningChain:
    return CHAINS[request.param](request)


@pytest.fixture
def alice(running: RunningChain) -> LocalAccount:
    account = Account.create()
    running.fund(account.address.lower(), 10 * LAMPORTS_PER_HYPE)
    return account


def play(running: RunningChain, scenario: Callable[[Chain], Awaitable[None]], *, away: bool = False) -> None:
    async def run() -> None:
        async with running.connect(away=away) as chain:
            await scenario(chain)

    asyncio.run(run())


async def rows(chain: Chain, user: str, start_ms: int = 0) -> list[LedgerTransfer]:
    return [row async for page in chain.ledger_updates(user, start_ms) for row in page]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def test_both_sides_of_a_transfer_read_it_with_its_nonce(
    running: RunningChain, alice: LocalAccount, bob: str
) -> None:
    action = running.transfer(alice, bob, PAID, now_ms())

    async def scenario(chain: Chain) -> None:
        assert await chain.post_action(action.body) is None

        (received,), sent = await rows(chain, bob), await rows(chain, alice.address.lower())
        assert (received.sender, received.destination) == (alice.address.lower(), bob)
        assert lamports_from_hype(received.amount) == PAID
        assert [row.nonce for row in sent if row.destination == bob] == [action.nonce]
        assert await rows(chain, bob, received.time_ms + 1) == []
        assert await chain.spot_balance(bob) == PAID
        assert await chain.spot_balance(alice.address.lower()) == 10 * LAMPORTS_PER_HYPE - PAID

    play(running, scenario)


def test_the_same_bytes_pay_once(running: RunningChain, alice: LocalAccount, bob: str) -> None:
    action = running.transfer(alice, bob, PAID, now_ms())

    async def scenario(chain: Chain) -> None:
        assert await chain.post_action(action.body) is None
        refusal = await chain.post_action(action.body)

        assert refusal is not None
        assert refusal.nonce_used
        assert await chain.spot_balance(bob) == PAID

    play(running, scenario)


def test_a_used_nonce_bars_every_other_action(running: RunningChain, alice: LocalAccount, bob: str) -> None:
    nonce = now_ms()

    async def scenario(chain: Chain) -> None:
        assert await chain.post_action(running.noop(alice, nonce).body) is None
        refusal = await chain.post_action(running.transfer(alice, bob, PAID, nonce).body)

        assert refusal is not None
        assert refusal.nonce_used
        assert await chain.spot_balance(bob) == 0

    play(running, scenario)


def test_a_transfer_beyond_the_balance_is_refused(
    running: RunningChain, alice: LocalAccount, bob: str
) -> None:
    async def scenario(chain: Chain) -> None:
        refusal = await chain.post_action(running.transfer(alice, bob, 11 * LAMPORTS_PER_HYPE, now_ms()).body)

        assert refusal is not None
        assert not refusal.no_account
        assert await rows(chain, bob) == []

    play(running, scenario)


def test_a_sender_without_an_account_is_refused(running: RunningChain, bob: str) -> None:
    async def scenario(chain: Chain) -> None:
        refusal = await chain.post_action(running.transfer(Account.create(), bob, 1, now_ms()).body)

        assert refusal is not None
        assert refusal.no_account

    play(running, scenario)


def test_a_hash_leads_to_the_transfer(running: RunningChain, alice: LocalAccount, bob: str) -> None:
    async def scenario(chain: Chain) -> None:
        assert await chain.post_action(running.transfer(alice, bob, PAID, now_ms()).body) is None
        (row,) = await rows(chain, bob)
        details = await chain.tx_details(row.hash)

        assert details is not None
        assert (details.hash, details.user, details.error) == (row.hash, row.sender, None)
        assert await chain.tx_details("0x" + "00" * 32) is None

    play(running, scenario)


def test_a_recipient_exists_once_it_was_paid_and_actions_are_counted(
    running: RunningChain, alice: LocalAccount, bob: str
) -> None:
    source = alice.address.lower()

    async def scenario(chain: Chain) -> None:
        before = await chain.actions_left(source)
        assert not (await chain.recipient(bob, source)).exists
        assert await chain.post_action(running.transfer(alice, bob, PAID, now_ms()).body) is None

        recipient = await chain.recipient(bob, source)
        assert (recipient.exists, recipient.sanctioned) == (True, False)
        assert await chain.actions_left(source) < before

    play(running, scenario)


def test_the_chain_tells_its_time_and_tells_no_other_token_from_its_own(
    running: RunningChain, alice: LocalAccount
) -> None:
    async def scenario(chain: Chain) -> None:
        before_ms = await chain.now_ms()
        assert before_ms <= await chain.now_ms()
        assert abs(before_ms - now_ms()) < 60_000
        assert await chain.namesakes(alice.address.lower()) == 0

    play(running, scenario)


def test_a_chain_that_does_not_answer_raises_a_chain_error(running: RunningChain, bob: str) -> None:
    async def scenario(chain: Chain) -> None:
        with pytest.raises(ChainError):
            await chain.post_action(b"{}")

    play(running, scenario, away=True)

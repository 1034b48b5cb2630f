"""Who is root changes the store of running processes: that is seen within a minute, and nothing is signed.

The processes are those of a network, without Ray; tests/redteam/test_tampering.py has each kind of record.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from redis import Redis

from azu.auth.signatures import Withdrawal, sign_withdrawal
from azu.clock import wall_clock_ms
from azu.config import Settings, load_network
from azu.devnet.faucet import fund
from azu.launch.local_network import DEMO
from azu.launch.redis_server import BOOKS_STORE, own_redis_url
from azu.launch.sidecars import BOOKS, BOOKS_READY, TREASURY, Sidecars, sidecars_running, signer_access
from azu.money.books import Books
from azu.money.chain.wallet import transfer_hype
from azu.money.ledger.journal import RedisJournal
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.seals import Seals
from azu.money.signer.calls import RemoteSigner, SignerStatus
from azu.redis_client import connect_redis
from azu.units import LAMPORTS_PER_HYPE
from tests.redteam.conftest import MALLORY, MALLORY_WALLET
from tests.redteam.tampering import CHANGES, changed, lines_of, place_of, put, rewritten, with_another

pytestmark = pytest.mark.prove

WAITING = "azu:treasury:withdrawals:waiting"
RED_WITHIN_S = 60.0
TIMEOUT_S = 120.0
UNSIGNED_FOR_S = 3.0
LAMPORTS = LAMPORTS_PER_HYPE // 100

_Answer = TypeVar("_Answer")


@dataclass
class Running:
    """The processes, a payer with money, and the URL by which root reaches their store."""

    sidecars: Sidecars
    home: Path
    payer: LocalAccount = field(default_factory=Account.create)
    number: int = 0

    @property
    def store(self) -> str:
        return own_redis_url(self.home, BOOKS_STORE)

    def ask(self, question: Callable[[Books], Awaitable[_Answer]]) -> _Answer:
        """Ask the books as the ingress does."""

        async def inside() -> _Answer:
            jobs = connect_redis(self.sidecars.redis.ingress)
            books = Books(self.sidecars.books.url("ingress"), jobs, silence_s=TIMEOUT_S)
            try:
                return await question(books)
            finally:
                await books.close()
                await jobs.aclose()

        return asyncio.run(inside())

    def begin(self) -> None:
        """Deposit twice; the first is sealed."""
        self.deposit(2 * LAMPORTS_PER_HYPE)
        self.seal()
        self.deposit(LAMPORTS_PER_HYPE)
        self.arrives(self.withdraw())

    def deposit(self, lamports: int) -> None:
        chain = self.sidecars.chain
        fund(chain.url, self.payer.address, 2 * lamports)
        tx_hash = transfer_hype(self.payer, chain.platform_address, lamports, chain_url=chain.url)
        address = self.payer.address.lower()
        deadline_s = time.monotonic() + TIMEOUT_S
        while self.ask(lambda books: books.deposit(tx_hash, address, 15)).lamports != lamports:
            assert time.monotonic() < deadline_s

    def seal(self) -> None:
        """Seal the journal in the place of the books, which do so only after many entries."""
        services, _ = self.sidecars._groups
        services._children[BOOKS].terminate()
        deadline_s = time.monotonic() + TIMEOUT_S
        while BOOKS not in services.ended():
            assert time.monotonic() < deadline_s
            time.sleep(0.1)

        async def write() -> None:
            ledger = await Ledger.open(RedisJournal.from_url(self.store), Seals(self.home / "ledger"))
            await ledger.seal()
            await ledger.close()

        asyncio.run(write())
        self.restart_books()

    def withdraw(self) -> Withdrawal:
        """Hand in a withdrawal that the payer has signed."""
        self.number += 1
        asked = Withdrawal(
            address=self.payer.address.lower(),
            lamports=LAMPORTS,
            nonce=self.number,
            expires_at_ms=wall_clock_ms() + 3_600_000,
        )
        signature = sign_withdrawal(self.payer, asked, self.sidecars.chain.platform_address)
        self.ask(lambda books: books.withdraw(asked, signature))
        return asked

    def state(self, asked: Withdrawal) -> str:
        return self.ask(lambda books: books.withdrawal(asked.address, asked.nonce)).state

    def arrives(self, asked: Withdrawal) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while (state := self.state(asked)) != "paid":
            assert time.monotonic() < deadline_s, f"{state}: {self.signer()}"
            time.sleep(0.2)
            self.sidecars.revive()

    def signer(self) -> SignerStatus:
        async def inside() -> SignerStatus:
            signer = RemoteSigner(signer_access(self.home).url("owner"))
            try:
                return await signer.status()
            finally:
                await signer.close()

        return asyncio.run(inside())

    def wait_until_red(self, what: str) -> None:
        began_s = time.monotonic()
        while not self.signer().is_red:
            assert time.monotonic() < began_s + RED_WITHIN_S, "it was not noticed"
            time.sleep(0.5)
        assert self.ask(lambda books: books.findings())
        print(f"\n{what}: red after {time.monotonic() - began_s:.1f} s")

    def restart_books(self) -> None:
        services, _ = self.sidecars._groups
        services.restart(BOOKS)
        services.wait_until_printed(BOOKS, BOOKS_READY, TIMEOUT_S)

    def nothing_is_signed(self) -> Withdrawal:
        """Hand in a withdrawal and check that it stays where it is; return it."""
        asked = self.withdraw()
        time.sleep(UNSIGNED_FOR_S)
        self.sidecars.revive()
        assert self.state(asked) == "waiting"
        return asked


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("head")
    nothing = {"domain": None, "chain_url": None, "redis_host": None}
    settings = Settings.from_environment().model_copy(update={"home": home, "network": DEMO, **nothing})
    with sidecars_running(settings, load_network(DEMO).policy) as sidecars:
        running = Running(sidecars, home)
        running.begin()
        yield running


def test_a_changed_record_is_seen_and_nothing_is_signed(running: Running) -> None:
    before = lines_of(running.store)
    at = place_of(before, "deposit")
    put(running.store, with_another(before, at, changed(before[at], CHANGES["deposit"])))

    running.wait_until_red("a changed deposit")

    asked = running.nothing_is_signed()
    # It is signed once the record is as it was: nothing else kept it.
    put(running.store, with_another(lines_of(running.store), at, before[at]))
    running.restart_books()
    running.arrives(asked)


def test_a_changed_seal_is_seen_and_nothing_is_signed(running: Running) -> None:
    (sealed,) = (running.home / "ledger").glob("[0-9]*.jsonl")
    before = sealed.read_text()
    sealed.write_text(before.replace(running.payer.address.lower(), MALLORY))

    running.wait_until_red("changed sealed records")

    asked = running.nothing_is_signed()
    sealed.write_text(before)
    running.restart_books()
    running.arrives(asked)


def test_a_withdrawal_that_was_changed_where_it_waits_is_never_sent(running: Running) -> None:
    """It is no record of the ledger: its owner's signature protects it."""
    _, treasury = running.sidecars._groups
    treasury._children[TREASURY].terminate()
    asked = running.withdraw()
    with Redis.from_url(running.store, decode_responses=True) as redis:
        content = json.loads(redis.hget(WAITING, asked.address))
        content["withdrawal"]["lamports"] *= 2
        redis.hset(WAITING, asked.address, json.dumps(content))
    treasury.restart(TREASURY)
    deadline_s = time.monotonic() + TIMEOUT_S
    while running.state(asked) == "waiting":
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert running.state(asked) == "refused"


def test_an_old_record_with_all_hashes_after_it_is_seen_and_nothing_is_signed(running: Running) -> None:
    before = lines_of(running.store)
    put(running.store, rewritten(before, running.payer.address.lower(), hides_its_end=False))

    running.wait_until_red("an old deposit with all hashes after it")

    # The thief hands in what the forged books say is its own.
    chain = running.sidecars.chain
    asked = Withdrawal(
        address=MALLORY, lamports=LAMPORTS, nonce=99, expires_at_ms=wall_clock_ms() + 3_600_000
    )
    signature = sign_withdrawal(MALLORY_WALLET, asked, chain.platform_address)
    running.ask(lambda books: books.withdraw(asked, signature))
    time.sleep(UNSIGNED_FOR_S)
    running.sidecars.revive()
    assert running.state(asked) == "waiting"
    assert running.signer().is_red

"""`azu treasury` shows what was not credited and why nothing is signed, and takes an admin's answer."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from typer.testing import CliRunner, Result

from azu.auth.signatures import AcceptLoss, command_of
from azu.cli.treasury import treasury
from azu.errors import AzuError, Conflict, NotFound
from azu.files import write_private
from azu.money.books import TreasuryTransfer
from azu.money.ledger.transfers import Transfer
from azu.money.signer.calls import SignerCalls, SignerStatus
from azu.money.signer.signer import SIGNER_ALLOWED
from azu.money.treasury.redis import RedisUncredited, Uncredited
from azu.money.wire import Access, WireServer
from azu.redis_client import connect_redis
from tests.builders import BOB
from tests.money.accounts import USER
from tests.money.ledger import moves
from tests.money.serving import PLATFORM, TERMS, ServedBooks, served

ADMIN = Account.from_key("0x" + "ad" * 32).address.lower()


@pytest.fixture(autouse=True)
def configured(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedBooks]:
    """A Redis whose books are served to the owner of AZU_HOME."""
    monkeypatch.setenv("AZU_HOME", str(tmp_path))
    write_private(tmp_path / "devnet-admin.key", "0x" + "ad" * 32)
    write_private(
        tmp_path / "devnet.json", json.dumps({"url": "http://127.0.0.1:9", "platform_address": PLATFORM})
    )
    with served(redis_url, terms=replace(TERMS, admins=(ADMIN,))) as books:
        books.access.write(tmp_path / "books.json")
        yield books


@contextmanager
def in_thread() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Yield what runs a coroutine in the loop of another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield lambda awaited: asyncio.run_coroutine_threadsafe(awaited, loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(treasury, arguments)
    if isinstance(result.exception, AzuError):
        raise result.exception
    return result


class Served(SignerCalls):
    """A signer with one finding, until it is told to go on."""

    def __init__(self) -> None:
        self.found = SignerStatus(("another process sent 5 lamports",), is_red=True)
        self.accepted: list[str] = []

    async def status(self) -> SignerStatus:
        return self.found

    async def accept(self, text: str) -> None:
        self.accepted.append(text)
        self.found = SignerStatus()


@pytest.fixture
def signer(tmp_path: Path) -> Iterator[Served]:
    """A signer that is served to the owner of AZU_HOME."""
    with in_thread() as loop:
        access, calls = Access.new(0, SIGNER_ALLOWED), Served()
        server = WireServer(SignerCalls, calls, access.secrets, SIGNER_ALLOWED)
        Access(loop(server.start()), access.secrets).write(tmp_path / "signer-calls.json")
        yield calls
        loop(server.close())


def on_books(configured: ServedBooks, *transfers: TreasuryTransfer) -> None:
    """Apply transfers of any kind, in the loop of the books."""

    async def book() -> None:
        books = configured.client()
        for transfer in transfers:
            await books.apply(transfer)
        await books.close()

    asyncio.run(book())


def on_core(configured: ServedBooks, *transfers: Transfer) -> None:
    """Apply transfers that are no caller's, in the loop of the books."""

    async def book() -> None:
        ledger = await configured.bookkeeper.ledger()
        for transfer in transfers:
            await ledger.apply(transfer)

    asyncio.run_coroutine_threadsafe(book(), configured.loop).result(10)


def test_what_is_on_its_way_and_why_nothing_is_signed(configured: ServedBooks, signer: Served) -> None:
    on_books(configured, moves.deposit(900), moves.plan_withdrawal("payout:1", 200))
    facts = json.loads(run("status", "--json").stdout)
    assert facts == {
        "to_workers_lamports": 0, "to_users_lamports": 200, "revenue_on_its_way_lamports": 0,
        "lost_writes": 0, "findings": ["another process sent 5 lamports"], "is_red": True,
    }  # fmt: skip
    assert "Payouts wait: another process sent 5 lamports" in " ".join(run("status").stdout.split())

    signer.found = SignerStatus()

    assert "payouts are signed" in run("status").stdout


def test_the_admin_accepts_the_books_as_they_are_with_a_signature(
    configured: ServedBooks, signer: Served
) -> None:
    on_books(configured, moves.deposit(900))

    done = json.loads(run("accept-loss", "--json").stdout)

    [text] = signer.accepted
    command = command_of(text, [PLATFORM], [ADMIN])
    assert isinstance(command, AcceptLoss)
    assert (command.number, done) == (2, {"entry": 2, "lost_writes": 0})
    with pytest.raises(Conflict, match="nothing to accept"):
        run("accept-loss")


def test_revenue_is_taken_as_far_as_there_is_some(configured: ServedBooks, signer: Served) -> None:
    user = USER.address.lower()
    on_core(
        configured,
        moves.deposit(900, address=user),
        moves.open_key(user),
        moves.reserve("job-1", 900, address=user),
        moves.settle("job-1", 900),
    )
    with pytest.raises(Conflict):
        run("take-revenue", BOB, "0.1")

    done = json.loads(run("take-revenue", BOB, "0.000009", "--json").stdout)

    assert (done["command"], done["lamports"], done["admin"]) == ("TakeRevenue", 900, ADMIN)
    assert json.loads(run("status", "--json").stdout)["revenue_on_its_way_lamports"] == 900


def test_a_payout_that_no_ledger_shows_is_ended_by_the_admin(configured: ServedBooks, signer: Served) -> None:
    on_books(configured, moves.deposit(900), moves.plan_withdrawal("payout:1", 200))
    with pytest.raises(NotFound, match="no payout payout:2 is open"):
        run("payout-left", "payout:2")

    done = json.loads(run("payout-left", "payout:1", "--json").stdout)

    assert (done["command"], done["admin"]) == ("ConfirmPayout", ADMIN)
    assert json.loads(run("status", "--json").stdout)["to_users_lamports"] == 0
    with pytest.raises(NotFound):
        run("payout-left", "payout:1")


TRANSFERS = tuple(
    Uncredited(
        time_ms=1_700_000_000_000 + number,
        hash="0x" + "00" * 32,
        sender="0x" + "22" * 20,
        token_name="HYPE",
        amount=f"{number}.5",
        reason="it came from HyperEVM",
    )
    for number in range(3)
)


def test_transfers_without_an_account_are_listed_newest_first_and_each_once(configured: ServedBooks) -> None:
    async def write() -> list[bool]:
        redis = connect_redis(configured.redis_url)
        added = [await RedisUncredited(redis).add(one) for one in (*TRANSFERS, TRANSFERS[0])]
        await redis.aclose()
        return added

    assert asyncio.run(write()) == [True, True, True, False]

    found = json.loads(run("uncredited", "--json").stdout)
    drawn = run("uncredited").stdout

    assert (found["count"], [one["amount"] for one in found["transfers"]]) == (3, ["2.5", "1.5", "0.5"])
    assert "2023-11-14 22:13:20" in drawn
    assert "HyperEVM" in drawn

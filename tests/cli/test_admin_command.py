"""An admin decides about money by commands that its wallet signs: over real books, as on a devnet."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from typer.testing import CliRunner

from azu.auth.signatures import sign_dispute
from azu.cli import app
from azu.config import Settings
from azu.errors import AzuError, Conflict, Forbidden, NotFound
from azu.launch.sidecars import choose_chain
from azu.money.ledger.transfers import Suspended
from tests.builders import ALICE, BOB, OWNERS
from tests.money.accounts import USER
from tests.money.serving import TERMS, ServedBooks, served
from tests.money.test_books import ADDRESS, open_account, reserve, settle

DAY_MS = 86_400_000
WALLET = Account.from_key("0x" + "0e" * 32)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of an owner's network on a devnet, with a wallet of the owner that is no admin's."""
    for name in ("SCHEDULER_PRIVATE_KEY", "AZU_PRIVATE_KEY_FILE", "HYPERLIQUID_RPC_URL"):
        monkeypatch.delenv(name, raising=False)
    wallet = Account.encrypt(WALLET.key, "walk", kdf="pbkdf2", iterations=2)
    (tmp_path / "wallet.json").write_text(json.dumps(wallet))
    (tmp_path / "wallet.json").chmod(0o600)
    monkeypatch.setenv("AZU_HOME", str(tmp_path))
    monkeypatch.setenv("AZU_WALLET_PASSWORD", "walk")
    return tmp_path


@pytest.fixture
def books(redis_url: str, home: Path) -> Iterator[ServedBooks]:
    """Books in which job-1 is disputed, job-2 has ended and may be reversed, and "c" is not enrolled."""
    chain = choose_chain(Settings(home=home, chain_url=None, redis_host=None))
    terms = replace(TERMS, maturity_ms=DAY_MS, admins=chain.admins)
    with served(redis_url, platform=chain.platform_address, terms=terms) as running:
        running.access.write(home / "books.json")
        asyncio.run(begun(running))
        yield running


async def begun(running: ServedBooks) -> None:
    client = running.client()
    await open_account(client, platform=running.platform)
    for job_id, node in (("job-1", "a"), ("job-2", "a"), ("job-3", "c")):
        await reserve(client, job_id)
        await settle(client, job_id, work={layer: {node: 1} for layer in range(4)})
    await client.dispute(ADDRESS, "job-1", sign_dispute(USER, "job-1", running.platform))
    await client.close()


def run(*words: str) -> str:
    done = CliRunner().invoke(app, [*words], env={"COLUMNS": "200"})
    if isinstance(done.exception, AzuError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def facts(*words: str) -> Any:
    return json.loads(run(*words, "--json"))


def available(running: ServedBooks, address: str = ADDRESS) -> int:
    async def ask() -> int:
        client = running.client()
        balance = await client.balance(address)
        await client.close()
        return balance.available_lamports

    return asyncio.run(ask())


def test_what_waits_for_an_admin_is_listed(books: ServedBooks) -> None:
    assert facts("ledger", "held") == {
        "nodes": [{"node_id": "c", "payout": None, "lamports": 64, "matured_lamports": 0}],
        "disputes": [{"job_id": "job-1", "payer": ADDRESS, "lamports": 80}],
        "suspense": [],
    }
    drawn = run("ledger", "held")
    assert "job-1" in drawn
    assert "0.00000064" in drawn


def test_jobs_that_can_be_reversed_are_listed_for_who_paid_and_for_who_was_paid(books: ServedBooks) -> None:
    # job-1 is disputed: an admin decides about it another way.
    of_payer, of_owner = (facts("ledger", "reversible", one)["jobs"] for one in (ADDRESS, OWNERS[0]))
    assert [one["job_id"] for one in of_payer] == ["job-3", "job-2"]
    assert [one["job_id"] for one in of_owner] == ["job-2"]
    assert of_owner[0]["accounts"] == {"platform": 16, f"worker:{OWNERS[0]}:earned": 64}
    assert facts("ledger", "reversible", BOB)["jobs"] == []
    assert f"worker {OWNERS[0]} 0.00000064" in run("ledger", "reversible", ADDRESS)
    run("ledger", "reverse", "job-2")
    assert [one["job_id"] for one in facts("ledger", "reversible", ADDRESS)["jobs"]] == ["job-3"]


def test_a_job_is_reversed_and_what_moves_is_shown(books: ServedBooks) -> None:
    assert available(books) == 760
    drawn = run("ledger", "reverse", "job-2")
    assert f"worker {OWNERS[0]}" in drawn
    assert "0.00000064" in drawn
    done = facts("ledger", "reverse", "job-1")
    assert available(books) == 920
    assert (done["command"], done["job_id"]) == ("ReverseJob", "job-1")
    assert sum(line["lamports"] for line in done["moved"]) == 80
    assert facts("ledger", "held")["disputes"] == []
    with pytest.raises(Conflict):
        run("ledger", "reverse", "job-1")
    with pytest.raises(NotFound):
        run("ledger", "reverse", "job-9")


def test_a_dispute_is_dismissed_once(books: ServedBooks) -> None:
    assert facts("ledger", "dismiss", "job-1")["moved"][0]["lamports"] == 80
    assert available(books) == 760
    for job_id in ("job-1", "job-2"):
        with pytest.raises(NotFound):
            run("ledger", "dismiss", job_id)


def test_held_money_goes_to_a_worker_or_a_user(redis_url: str, home: Path) -> None:
    chain = choose_chain(Settings(home=home, chain_url=None, redis_host=None))
    terms = replace(TERMS, admins=chain.admins)
    with served(redis_url, platform=chain.platform_address, terms=terms) as running:
        running.access.write(home / "books.json")

        async def work() -> None:
            client = running.client()
            await open_account(client, platform=running.platform)
            await reserve(client)
            await settle(client, work={layer: {"c": 1} for layer in range(4)})
            await client.close()

        asyncio.run(work())
        assert facts("ledger", "release-held", "c", ALICE, "--amount", "0.0000001")["lamports"] == 10
        assert facts("ledger", "pay-held", "c", BOB)["lamports"] == 54
        assert available(running, ALICE) == 10
        assert facts("ledger", "held")["nodes"] == []
        with pytest.raises(NotFound):
            run("ledger", "pay-held", "c", BOB)


def test_a_removed_node_earns_nothing_any_more(books: ServedBooks) -> None:
    assert facts("ledger", "remove-node", "a")["moved"] == []
    with pytest.raises(Conflict):
        run("ledger", "remove-node", "a")


def test_a_row_in_suspense_is_credited(books: ServedBooks) -> None:
    async def suspend() -> None:
        row = Suspended(id="suspended:r1", sender=BOB, lamports=7, row="r1", at_ms=1)
        await (await books.bookkeeper.ledger()).apply(row)

    asyncio.run_coroutine_threadsafe(suspend(), books.loop).result(10)
    assert facts("ledger", "held")["suspense"][0]["row"] == "r1"
    assert facts("treasury", "credit", "r1", ALICE.upper().replace("0X", "0x"))["address"] == ALICE
    assert available(books, ALICE) == 7
    with pytest.raises(NotFound):
        run("treasury", "credit", "r1", ALICE)


def test_where_a_chain_is_configured_this_machines_wallet_signs(
    books: ServedBooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERLIQUID_RPC_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HYPERLIQUID_ADDRESS", books.platform)
    with pytest.raises(Forbidden, match="no admin"):
        run("ledger", "reverse", "job-2")
    books.bookkeeper._terms = replace(books.terms, admins=(WALLET.address.lower(),))

    assert facts("ledger", "reverse", "job-2")["admin"] == WALLET.address.lower()

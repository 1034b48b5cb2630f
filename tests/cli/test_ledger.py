"""`azu ledger` reports whether the books agree with their journal and the chain, and repairs their file."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from typer.testing import CliRunner, Result

from azu.cli import ledger as commands
from azu.errors import AzuError, ConfigurationError, Conflict, NotFound, Unavailable
from azu.launch.formats import FORMAT
from azu.launch.processes import free_port
from azu.money.ledger.durability import DURABLE_CONFIG, append_only_files
from azu.money.ledger.journal import JOURNAL
from azu.money.ledger.transfers import Transfer
from azu.money.wire import Access
from tests.builders import BOB
from tests.money.chain.running import running_devnet
from tests.money.ledger import moves
from tests.money.serving import ServedBooks, served
from tests.redis_server import start_redis

PLANNED = (moves.deposit(1_000), moves.plan_withdrawal("payout:1", 100))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("AZU_HOME", str(home))
    monkeypatch.setattr(commands, "_AUDIT_AGAIN_S", 0.05)
    return home


@pytest.fixture
def configured(redis_url: str, home: Path) -> Iterator[ServedBooks]:
    """Books that are served to the owner of AZU_HOME."""
    with served(redis_url) as books:
        books.access.write(home / "books.json")
        yield books


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(commands.ledger, [str(argument) for argument in arguments])
    if isinstance(result.exception, AzuError):
        raise result.exception
    return result


def audited(*arguments: object) -> tuple[int, dict[str, Any]]:
    result = run("audit", "--json", *arguments)
    return result.exit_code, json.loads(result.stdout)


def book(books: ServedBooks, *transfers: Transfer) -> None:
    async def scenario() -> None:
        client = books.client()
        for transfer in transfers:
            await client.apply(transfer)  # type: ignore[arg-type]  # these are all of the treasury's
        await client.close()

    asyncio.run(scenario())


def test_books_that_agree_exit_with_zero(configured: ServedBooks) -> None:
    book(configured, *PLANNED)
    status, facts = audited()
    assert status == 0
    assert facts == {
        "entries": 3,
        "accounts": 3,
        "liabilities_lamports": 1_000,
        "revenue_lamports": 0,
        "in_transit_lamports": 100,
        "findings": [],
        "wallet_lamports": None,
        "in_flight_lamports": None,
    }


def test_books_that_were_changed_exit_with_one(configured: ServedBooks) -> None:
    book(configured, *PLANNED)
    with Redis.from_url(configured.redis_url, decode_responses=True) as redis:
        rows = redis.xrange(JOURNAL)
        redis.delete(JOURNAL)
        for number, fields in rows:  # type: ignore[union-attr]  # the client is not asynchronous
            redis.xadd(JOURNAL, {**fields, "entry": fields["entry"].replace("1000", "1001")}, number)
    status, facts = audited()
    assert status == 1
    assert any("was changed" in finding for finding in facts["findings"])
    assert "was changed" in " ".join(run("audit").stdout.split())


@pytest.mark.parametrize(("wallet", "status"), [(1_000, 0), (900, 0), (1_001, 1), (899, 1)])
def test_a_wallet_that_is_given_is_compared(configured: ServedBooks, wallet: int, status: int) -> None:
    book(configured, *PLANNED)
    assert audited("--wallet-lamports", wallet)[0] == status


def test_an_audit_begins_at_a_seal_if_there_is_one(configured: ServedBooks) -> None:
    book(configured, *PLANNED)
    status, facts = audited("--since", 2)
    assert status == 1
    assert "cannot be read" in facts["findings"][0]


def test_the_wallet_on_the_chain_is_compared(
    configured: ServedBooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    book(configured, *PLANNED)
    with running_devnet() as devnet:
        monkeypatch.setenv("HYPERLIQUID_RPC_URL", devnet.url)
        monkeypatch.setenv("HYPERLIQUID_ADDRESS", BOB)
        devnet.fund(BOB, 1_000)
        status, facts = audited()
        assert (status, facts["wallet_lamports"], facts["in_flight_lamports"]) == (0, 1_000, 0)
        devnet.fund(BOB, 1)
        assert audited()[0] == 1


def test_books_that_are_not_running_are_said_to_be_away(home: Path) -> None:
    Access.new(free_port(), ["owner"]).write(home / "books.json")
    with pytest.raises(Unavailable, match="the books did not answer"):
        run("audit")


def test_where_no_network_ran_there_is_nothing_to_audit() -> None:
    with pytest.raises(NotFound):
        run("audit")


def test_money_is_copied_and_put_back(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_redis(home / "redis", DURABLE_CONFIG)
    with served(server.url, folder=home / "ledger") as books:
        book(books, *PLANNED)
        made = json.loads(run("backup", tmp_path / "copy", "--json").stdout)
    server.stop()
    monkeypatch.setenv("AZU_HOME", str(tmp_path / "bare"))

    shown = " ".join(run("restore", tmp_path / "copy").stdout.split())

    assert f"{made['files']} files" in shown
    assert "are missing. Next: azu up, then azu treasury status." in shown
    assert append_only_files(tmp_path / "bare" / "redis")[-1].stat().st_size > 0


def test_a_store_of_the_admins_own_is_in_no_copy(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
    with pytest.raises(ConfigurationError, match="your own"):
        run("backup", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("command", [("backup", "copy"), ("repair",)])
def test_money_of_a_later_release_is_neither_copied_nor_repaired(
    home: Path, command: tuple[str, ...]
) -> None:
    home.mkdir(exist_ok=True)
    (home / "format.json").write_text(f"{FORMAT + 1}\n")
    with pytest.raises(ConfigurationError, match="later release"):
        run(*command)


def test_a_torn_file_is_repaired_and_the_dropped_part_is_reported(home: Path) -> None:
    server = start_redis(home / "redis", DURABLE_CONFIG)
    with served(server.url) as books:
        book(books, *PLANNED)
    file = append_only_files(home / "redis")[-1]
    with pytest.raises(Conflict):
        run("repair")
    server.kill()
    assert json.loads(run("repair", "--json").stdout)["dropped_bytes"] == 0
    assert "nothing dropped" in run("repair", file).stdout

    file.write_bytes(file.read_bytes()[:-3])
    facts = json.loads(run("repair", "--json").stdout)

    assert facts["dropped_transfers"] == []  # the last one cannot be read any more
    assert facts["kept_bytes"] == file.stat().st_size
    assert Path(facts["saved_to"]).stat().st_size == facts["dropped_bytes"]
    file.write_bytes(file.read_bytes() + b"*1\r\n")
    assert "none that can be read" in " ".join(run("repair").stdout.split())

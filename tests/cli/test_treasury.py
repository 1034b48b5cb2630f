"""`azu treasury` shows what was not credited and whether the ledger went back, and takes an answer."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from azu.cli.treasury import treasury
from azu.errors import AzuError, Conflict
from azu.money.treasury.redis import RedisUncredited, Uncredited
from azu.redis_client import connect_redis
from tests.money.ledger import moves
from tests.money.serving import ServedBooks, served


@pytest.fixture(autouse=True)
def configured(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedBooks]:
    """A Redis whose books are served to the owner of AZU_HOME."""
    monkeypatch.setenv("AZU_HOME", str(tmp_path))
    with served(redis_url) as books:
        books.access.write(tmp_path / "books.json")
        yield books


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(treasury, arguments)
    if isinstance(result.exception, AzuError):
        raise result.exception
    return result


def test_a_loss_is_shown_until_the_admin_accepts_it(configured: ServedBooks) -> None:
    async def lose() -> None:
        books = configured.client()
        await books.apply(moves.deposit(900))
        await books.apply(moves.plan_withdrawal("payout:1", 200))
        await books.note_loss(2)
        await books.close()

    asyncio.run(lose())
    facts = {"to_workers_lamports": 0, "to_users_lamports": 200, "lost_writes": 2}
    assert json.loads(run("status", "--json").stdout) == facts
    assert "azu treasury accept-loss 2" in " ".join(run("status").stdout.split())
    with pytest.raises(Conflict, match="went back by 2"):
        run("accept-loss", "3")

    assert run("accept-loss", "2").exit_code == 0

    assert json.loads(run("status", "--json").stdout)["lost_writes"] == 0
    with pytest.raises(Conflict, match="nothing to accept"):
        run("accept-loss", "2")


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

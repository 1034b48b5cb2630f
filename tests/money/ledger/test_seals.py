"""Old entries lie in files: the books come back from the last one, and every change of a file is found."""

import asyncio
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from azu.errors import ConfigurationError, JournalFault, LedgerError, TransferConflict, Unavailable
from azu.money.ledger.journal import JOURNAL
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.seals import Seals
from azu.money.ledger.transfers import Transfer, user_available
from tests.builders import ALICE
from tests.money.ledger import moves
from tests.money.ledger.books import apply_each, open_books, with_books
from tests.redis_server import Rewindable

AVAILABLE = user_available(ALICE)


def jobs(first: int, last: int) -> list[Transfer]:
    """Return some jobs of one lamport, from begin to end."""
    return [
        transfer
        for number in range(first, last + 1)
        for transfer in (moves.reserve(f"job-{number}", 2), moves.settle(f"job-{number}", 1, maturity_ms=1))
    ]


BEGIN = (moves.open_key(), moves.deposit(1_000))


def stored(url: str) -> int:
    with Redis.from_url(url) as redis:
        return int(redis.xlen(JOURNAL))


async def sealed_thrice(ledger: Ledger) -> list[Transfer]:
    """Write three seals and some entries behind them; return every transfer."""
    history = [*BEGIN, *jobs(1, 10)]
    await apply_each(ledger, *history)
    for first in (11, 21, 31):
        await ledger.seal()
        more = jobs(first, first + 9)
        await apply_each(ledger, *more)
        history += more
    return history


def test_sealed_entries_leave_redis_and_everything_goes_on(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        history = await sealed_thrice(ledger)
        assert stored(redis_url) == 21, "the entry of the seal, and ten jobs"
        assert len(Seals(tmp_path).numbers()) == 3
        await ledger.verify()
        assert (await ledger.audit()).agrees
        entries = [entry async for entry in ledger.journal()]
        assert [entry.number for entry in entries] == list(range(1, ledger.head.number + 1))
        assert await ledger.entry(3) == entries[2]
        assert [entry async for entry in ledger.journal(after=20)] == entries[20:]
        for transfer in history:
            result = await ledger.apply(transfer)
            assert result.repeated
            assert result.entry.transfer == transfer
        with pytest.raises(TransferConflict):
            await ledger.apply(moves.deposit(1_001))
        with pytest.raises(LedgerError) as raised:
            await ledger.apply(moves.release("job-1"))
        assert raised.value.code == "hold_ended"

    with_books(redis_url, tmp_path, scenario)


def test_the_books_come_back_from_the_last_seal(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_books(redis_url, tmp_path) as ledger:
            history = await sealed_thrice(ledger)
            state, head = deepcopy(ledger.state), ledger.head
        # The others are only needed for an audit.
        first = tmp_path / f"{Seals(tmp_path).numbers()[0]:015d}.jsonl"
        first.rename(tmp_path / "away")
        async with open_books(redis_url, tmp_path) as ledger:
            state.facts["number"] += 1
            assert ledger.state == state
            assert ledger.head.number == head.number + 1
            assert (await ledger.audit(since=Seals(tmp_path).numbers()[-1])).agrees
            assert not (await ledger.audit()).agrees
        (tmp_path / "away").rename(first)
        async with open_books(redis_url, tmp_path) as ledger:
            for number in (0, *Seals(tmp_path).numbers()):
                assert (await ledger.audit(since=number)).agrees
            assert all([(await ledger.apply(transfer)).repeated for transfer in history])
            assert ledger.lost == 0

    asyncio.run(scenario())


def test_few_entries_are_not_sealed(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, *BEGIN)
        await ledger.seal(at_least=4)
        assert Seals(tmp_path).numbers() == []
        await ledger.seal(at_least=3)
        assert Seals(tmp_path).numbers() == [3]

    with_books(redis_url, tmp_path, scenario)


def test_few_long_entries_are_sealed(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, *BEGIN)
        shares = {f"0x{number:040x}": 1 for number in range(40)}
        for number in range(2):
            await ledger.apply(moves.reserve(f"job-{number}", 40))
            await ledger.apply(replace(moves.settle(f"job-{number}", 40), platform_lamports=0, shares=shares))
        await ledger.seal(at_least=9)
        assert Seals(tmp_path).numbers() == [7]
        await ledger.seal(at_least=9)
        assert Seals(tmp_path).numbers() == [7]

    with_books(redis_url, tmp_path, scenario)


def test_transfers_go_on_while_entries_are_sealed(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, *BEGIN)

        async def one_after_the_other() -> None:
            await apply_each(ledger, *jobs(1, 200))

        async def seals() -> None:
            for _ in range(5):
                await ledger.seal()
                await ledger.verify()

        await asyncio.gather(one_after_the_other(), seals())
        assert (await ledger.audit()).agrees
        assert len([entry async for entry in ledger.journal()]) == ledger.head.number

    with_books(redis_url, tmp_path, scenario)


@pytest.mark.parametrize("step", ["write", "apply", "trim"])
def test_a_seal_that_is_cut_off_leaves_the_ledger_whole(
    redis_url: str, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    async def dies(*_: object) -> None:
        raise Killed

    async def scenario() -> None:
        async with open_books(redis_url, tmp_path) as ledger:
            history = [*BEGIN, *jobs(1, 5)]
            await apply_each(ledger, *history)
            state = deepcopy(ledger.state)
            if step == "write":
                monkeypatch.setattr(ledger._seals, "write", lambda *_: (_ for _ in ()).throw(Killed))
            else:
                monkeypatch.setattr(ledger if step == "apply" else ledger._journal, step, dies)
            with pytest.raises(Killed):
                await ledger.seal()
            monkeypatch.undo()
        async with open_books(redis_url, tmp_path) as ledger:
            expected = {"seals"} if step == "trim" else set()
            differing = {
                name for name in ("balances", "spent", "unmatured", "seals")
                if getattr(ledger.state, name) != getattr(state, name)
            }  # fmt: skip
            assert differing == expected
            await ledger.verify()
            assert (await ledger.audit()).agrees
            await ledger.seal()
            assert all([(await ledger.apply(transfer)).repeated for transfer in history])
            assert stored(redis_url) == 1
            assert ledger.lost == 0

    asyncio.run(scenario())


def fill_the_disk(ledger: Ledger, folder: Path, file: str) -> None:
    """Have the next write of a file find no room."""
    if file == "ids.sqlite":
        (pages,) = ledger._seals._ids.execute("PRAGMA page_count").fetchone()
        ledger._seals._ids.execute(f"PRAGMA max_page_count = {pages}")
    else:
        (folder / f".{file}.part").symlink_to("/dev/full")


@pytest.mark.parametrize("file", ["000000000000203.jsonl", "ids.sqlite", "head.json"])
def test_a_full_disk_is_said_to_be_away_and_everything_goes_on_once_it_has_room(
    redis_url: str, tmp_path: Path, file: str
) -> None:
    async def scenario(ledger: Ledger) -> None:
        history = [*BEGIN, *jobs(1, 100)]
        await apply_each(ledger, *history)
        write = ledger.verify if file == "head.json" else ledger.seal
        fill_the_disk(ledger, tmp_path, file)
        with pytest.raises(Unavailable, match=file) as full:
            await write()
        assert full.value.code == "disk_failed"
        assert Seals(tmp_path).numbers() == []
        more = jobs(101, 102)
        await apply_each(ledger, *more)
        (tmp_path / f".{file}.part").unlink(missing_ok=True)
        ledger._seals._ids.execute("PRAGMA max_page_count = 1000000")

        await write()
        await ledger.seal()
        await ledger.verify()
        assert (await ledger.audit()).agrees
        assert stored(redis_url) == 1
        known = [*history, *more]
        assert all([(await ledger.apply(transfer)).repeated for transfer in known])

    with_books(redis_url, tmp_path, scenario)


async def verify_thrice(ledger: Ledger) -> None:
    """Look at each of three seals."""
    for _ in range(3):
        await ledger.verify()


def changed_entry(content: bytes) -> bytes:
    return content.replace(b'"lamports":1000,', b'"lamports":9000,', 1)


def changed_state(content: bytes) -> bytes:
    at = content.rindex(b'"state"')
    return content[:at] + content[at:].replace(b":available", b":reserved", 1)


def entry_left_out(content: bytes) -> bytes:
    lines = content.split(b"\n")
    return b"\n".join(lines[:3] + lines[4:])


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("change", [changed_entry, changed_state, entry_left_out, bytes.upper, lambda _: b""])
def test_a_changed_file_is_found(
    redis_url: str, tmp_path: Path, which: int, change: Callable[[bytes], bytes]
) -> None:
    async def scenario() -> None:
        async with open_books(redis_url, tmp_path) as ledger:
            await sealed_thrice(ledger)
            path = tmp_path / f"{Seals(tmp_path).numbers()[which]:015d}.jsonl"
            content = path.read_bytes()
            if change is changed_entry and which:
                return
            path.write_bytes(change(content))
            with pytest.raises(JournalFault, match="changed"):
                await verify_thrice(ledger)
            assert not (await ledger.audit()).agrees
        if which:
            with pytest.raises(JournalFault):
                await Ledger.open(ledger._journal, Seals(tmp_path), lambda: 1)
        path.write_bytes(content)
        async with open_books(redis_url, tmp_path) as ledger:
            assert (await ledger.audit()).agrees

    asyncio.run(scenario())


def test_the_index_of_ids_is_made_again_where_it_lacks_some(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_books(redis_url, tmp_path) as ledger:
            history = await sealed_thrice(ledger)
        (tmp_path / "ids.sqlite").unlink()
        async with open_books(redis_url, tmp_path) as ledger:
            assert all([(await ledger.apply(transfer)).repeated for transfer in history])
            await ledger.verify()
            seals = ledger._seals
            with seals._ids:
                seals._ids.execute("DELETE FROM ids WHERE number = 2")
            with pytest.raises(JournalFault, match="lacks ids"):
                await verify_thrice(ledger)
        for content in (None, b"no database" * 1000):
            if content is not None:
                (tmp_path / "ids.sqlite").write_bytes(content)
            async with open_books(redis_url, tmp_path) as ledger:
                await verify_thrice(ledger)
                assert (await ledger.apply(history[1])).repeated

    asyncio.run(scenario())


def test_a_store_that_lost_sealed_entries_goes_on_after_the_last_seal(tmp_path: Path) -> None:
    store, folder = Rewindable.start(tmp_path / "redis"), tmp_path / "seals"

    async def scenario() -> None:
        begin = store.position()
        async with open_books(store.server.url, folder) as ledger:
            history = [*BEGIN, *jobs(1, 10)]
            await apply_each(ledger, *history[:6])
            early = store.position()
            await apply_each(ledger, *history[6:])
            await ledger.seal()
            available = ledger.state.balance(AVAILABLE)
            await apply_each(ledger, *jobs(11, 12))
        for position in (early, begin):
            store.rewind(position)
            async with open_books(store.server.url, folder) as ledger:
                assert ledger.lost > 0
                assert ledger.state.balance(AVAILABLE) == available
                assert all([(await ledger.apply(transfer)).repeated for transfer in history])
                assert not (await ledger.apply(moves.reserve("job-11", 2))).repeated
                await ledger.verify()
                assert (await ledger.audit()).agrees

    asyncio.run(scenario())
    store.server.kill()


def test_files_of_another_ledger_are_refused_and_kept(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_books(redis_url, tmp_path / "one") as ledger:
            await apply_each(ledger, *BEGIN, *jobs(1, 3))
            await ledger.seal()
        with Redis.from_url(redis_url) as redis:
            redis.flushall()
        async with open_books(redis_url, tmp_path / "two") as ledger:
            await apply_each(ledger, *BEGIN, *jobs(1, 9))
        kept = tmp_path / "copy"
        shutil.copytree(tmp_path / "one", kept)
        with pytest.raises(JournalFault, match="not of this journal"):
            async with open_books(redis_url, tmp_path / "one"):
                pass
        assert Seals(tmp_path / "one").numbers() == Seals(kept).numbers() == [9]

    asyncio.run(scenario())


def test_a_mark_that_cannot_be_read_stops_the_start(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_books(redis_url, tmp_path):
            pass
        (tmp_path / "head.json").write_text("?")
        with pytest.raises(ConfigurationError, match="how far the ledger was"):
            async with open_books(redis_url, tmp_path):
                pass

    asyncio.run(scenario())


def test_files_are_for_their_owner_alone(redis_url: str, tmp_path: Path) -> None:
    async def scenario(ledger: Ledger) -> None:
        await apply_each(ledger, *BEGIN)
        await ledger.seal()

    with_books(redis_url, tmp_path / "seals", scenario)
    assert (tmp_path / "seals").stat().st_mode & 0o777 == 0o700

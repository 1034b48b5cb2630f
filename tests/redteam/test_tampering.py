"""Who changes a record of the ledger in its store has nothing signed, whichever record it is.

The parts are those of a network: Redis, devnet, books and signer. What the books' process does every 30 s is
called here; tests/redteam/test_tampering_seen.py has the processes.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from azu.auth.signatures import Withdrawal, sign_withdrawal
from azu.clock import wall_clock_ms
from azu.errors import Forbidden, JournalFault, Unavailable
from azu.money.ledger.transfers import WithdrawalPlanned
from azu.money.signer.policy import RED_AFTER, nonce_for
from azu.money.signer.views import PayoutKind, TransferRequest
from azu.units import LAMPORTS_PER_HYPE
from tests.money.chain.running import RunningDevnet, running_devnet
from tests.money.ledger import moves
from tests.money.treasury.booked import fund_platform
from tests.money.treasury.test_deposits import CONTRACT, polled, quick
from tests.money.treasury.world import Open, World
from tests.redteam.conftest import MALLORY
from tests.redteam.tampering import CHANGES, changed, lines_of, place_of, put, rewritten, with_another

pytestmark = pytest.mark.prove


@pytest.fixture(scope="module")
def devnet() -> Iterator[RunningDevnet]:
    with running_devnet() as running:
        yield running


@pytest.fixture
def world(devnet: RunningDevnet, redis_url: str, tmp_path: Path) -> World:
    return World(devnet, redis_url, folder=tmp_path)


async def begin(world: World, parts: Open) -> TransferRequest:
    """Have each kind of record written, the first ones sealed; return a transfer that may be signed."""
    fund_platform(world)
    payer, platform = world.payer(), world.platform.address.lower()
    user = payer.address.lower()
    await parts.deposit(payer, LAMPORTS_PER_HYPE)
    await parts.books.bookkeeper.seal(1)
    await parts.deposit(payer, LAMPORTS_PER_HYPE)
    world.devnet.contract(platform, 71, sender=CONTRACT)
    await polled(quick(parts))
    asked = Withdrawal(
        address=user, lamports=LAMPORTS_PER_HYPE, nonce=1, expires_at_ms=wall_clock_ms() + 3_600_000
    )
    planned = WithdrawalPlanned(
        id=f"{asked.payout_id}:planned",
        payout_id=asked.payout_id,
        address=user,
        lamports=asked.lamports,
        nonce=nonce_for(PayoutKind.WITHDRAWAL, asked.payout_id, wall_clock_ms()),
        expires_at_ms=asked.expires_at_ms,
        signature=sign_withdrawal(payer, asked, platform),
    )
    await parts.book(
        moves.open_key(user),
        moves.enrol("node-1"),
        moves.claim(),
        moves.reserve("job-1", 10, address=user),
        moves.settle("job-1", 10, w0=8),
        planned,
    )
    return TransferRequest(asked.payout_id, PayoutKind.WITHDRAWAL, user, asked.lamports, planned.nonce)


async def nothing_is_signed(world: World, parts: Open, asked: TransferRequest) -> None:
    with pytest.raises(Unavailable) as refused:
        await parts.signer.client("treasury").transfer(asked)
    assert refused.value.code == "nothing_signed"
    for _ in range(RED_AFTER):
        await parts.signer.signer.look()
    assert (await parts.signer.signer.status()).is_red
    assert await parts.ledger.findings()


@pytest.mark.parametrize("kind", CHANGES)
def test_nothing_is_signed_once_a_record_was_changed(world: World, kind: str) -> None:
    async def scenario(parts: Open) -> None:
        asked = await begin(world, parts)
        before = lines_of(world.redis_url)
        at = place_of(before, kind)
        put(world.redis_url, with_another(before, at, changed(before[at], CHANGES[kind])))

        await parts.books.bookkeeper.verify()

        await nothing_is_signed(world, parts, asked)
        # It is signed once the record is as it was: nothing else kept it.
        put(world.redis_url, with_another(lines_of(world.redis_url), at, before[at]))
        await parts.books.stop()
        await parts.books.start()
        assert asked.address in await parts.signer.client("treasury").transfer(asked)

    world.run(scenario)


@pytest.mark.parametrize("hides_its_end", [True, False])
def test_nothing_is_signed_once_an_old_record_and_all_hashes_after_it_were_changed(
    world: World, hides_its_end: bool
) -> None:
    async def scenario(parts: Open) -> None:
        asked = await begin(world, parts)
        put(
            world.redis_url,
            rewritten(lines_of(world.redis_url), asked.address, hides_its_end=hides_its_end),
        )

        await parts.books.bookkeeper.verify()

        await nothing_is_signed(world, parts, asked)
        # The books' own start does not believe it either: they open only what agrees with their seals.
        await parts.books.stop()
        with pytest.raises(JournalFault):
            await parts.books.start()
        with pytest.raises(Unavailable):
            await parts.signer.client("treasury").transfer(asked)

    world.run(scenario)


def test_nothing_is_signed_once_sealed_records_were_changed(world: World, tmp_path: Path) -> None:
    async def scenario(parts: Open) -> None:
        asked = await begin(world, parts)
        (sealed,) = tmp_path.glob("[0-9]*.jsonl")
        sealed.write_text(sealed.read_text().replace(asked.address, MALLORY))

        await parts.books.bookkeeper.verify()

        await nothing_is_signed(world, parts, asked)

    world.run(scenario)


def test_a_payout_that_was_changed_in_the_treasurys_own_store_is_not_signed(world: World) -> None:
    async def scenario(parts: Open) -> None:
        asked = await begin(world, parts)
        signer = parts.signer.client("treasury")

        for other in ({"address": MALLORY}, {"lamports": 2 * asked.lamports}, {"nonce": asked.nonce + 4}):
            with pytest.raises(Forbidden):
                await signer.transfer(replace(asked, **other))

        assert asked.address in await signer.transfer(asked)

    world.run(scenario)

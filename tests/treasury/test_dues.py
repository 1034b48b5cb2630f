"""Who is paid next, on the devnet's and the ledger's own rules."""

import asyncio

import pytest

from azu.chain.devnet.state import HYPE
from azu.treasury.dues import KEPT_LAMPORTS, Due, Dues, Payees, Threshold
from tests.treasury.simulated import PLATFORM, Simulation
from tests.treasury.world import Everybody

KNOWN, NEW, THIRD = ("0x" + digits * 20 for digits in ("0a", "0b", "0c"))
THRESHOLD = Threshold(lamports=100, new_account_lamports=400)


def simulation(funds: int = 10**9) -> Simulation:
    made = Simulation(funds=funds)
    made.chain.state.fund(KNOWN, HYPE, 1, made.clock())
    return made


def dues(world: Simulation, payees: Payees | None = None) -> Dues:
    platform = PLATFORM.address.lower()
    return Dues(world.chain, world.ledger, payees or Everybody(), platform, THRESHOLD, now_ms=world.clock)


def pick(world: Simulation, open_lamports: dict[str, int] | None = None, max_open: int = 10) -> list[Due]:
    return asyncio.run(dues(world).pick(open_lamports or {}, max_open))


@pytest.mark.parametrize(("earned", "paid"), [(99, False), (100, True)])
def test_earnings_are_due_from_the_threshold_on(earned: int, paid: bool) -> None:
    world = simulation()
    world.ledger.earn(KNOWN, earned)

    assert pick(world) == ([Due(KNOWN, earned)] if paid else [])


@pytest.mark.parametrize(("earned", "paid"), [(399, False), (400, True)])
def test_an_account_that_is_new_to_the_chain_is_due_later(earned: int, paid: bool) -> None:
    world = simulation()
    world.ledger.earn(NEW, earned)

    assert pick(world) == ([Due(NEW, earned)] if paid else [])


def test_the_largest_sums_come_first_and_no_more_than_may_be_open() -> None:
    world = simulation()
    for address, lamports in ((KNOWN, 500), (NEW, 700), (THIRD, 600)):
        world.ledger.earn(address, lamports)

    assert pick(world, max_open=2) == [Due(NEW, 700), Due(THIRD, 600)]
    assert pick(world, {NEW: 700}, max_open=2) == [Due(THIRD, 600)]
    assert pick(world, {NEW: 700, THIRD: 600}, max_open=2) == []


def test_no_more_is_planned_than_the_wallet_can_spare() -> None:
    world = simulation(funds=KEPT_LAMPORTS + 1_100)
    for address, lamports in ((KNOWN, 500), (NEW, 700), (THIRD, 400)):
        world.ledger.earn(address, lamports)

    assert pick(world) == [Due(NEW, 700), Due(THIRD, 400)]
    assert pick(world, {NEW: 700}) == [Due(THIRD, 400)]


def test_no_more_is_planned_than_the_chain_takes_actions() -> None:
    world = simulation()
    world.ledger.earn(KNOWN, 500)
    world.chain.state.requests_used[PLATFORM.address.lower()] = 9_800

    assert pick(world) == []


def test_the_platform_does_not_pay_itself() -> None:
    world = simulation()
    world.ledger.earn(PLATFORM.address.lower(), 500)

    assert pick(world) == []


def test_an_address_that_was_passed_over_is_asked_about_again_later() -> None:
    world = simulation()
    world.ledger.earn(KNOWN, 500)
    choosing = dues(world)
    choosing.pass_over(KNOWN)

    before = asyncio.run(choosing.pick({}, 10))
    world.clock.ms += 3_600_000
    after = asyncio.run(choosing.pick({}, 10))

    assert (before, after) == ([], [Due(KNOWN, 500)])


def test_an_address_that_has_not_claimed_its_earnings_is_asked_about_again_later() -> None:
    world = simulation()
    world.ledger.earn(KNOWN, 100)

    class Claims:
        claimed = False

        async def has_claimed(self, address: str) -> bool:
            return self.claimed

    payees = Claims()
    payer = dues(world, payees)
    assert asyncio.run(payer.pick({}, 10)) == []
    payees.claimed = True
    world.clock.ms += 600_000
    assert asyncio.run(payer.pick({}, 10)) == [Due(KNOWN, 100)]

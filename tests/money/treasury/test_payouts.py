"""The payout's state machine over the devnet's and the ledger's own rules, killed at every effect."""

import asyncio
import random

import pytest
from eth_account import Account

from azu.devnet.chain import HYPE, USDC
from azu.errors import AzuError, Conflict, Forbidden, InvalidRequest, RateLimited, Unavailable
from azu.money.chain.actions import sign_send_asset
from azu.money.chain.rows import KEPT_LAMPORTS
from azu.money.treasury.outbox import PayoutState
from azu.money.treasury.payouts import PayoutTimeouts
from azu.money.treasury.planning import AmountOwed, PayoutSelector, Threshold
from tests.few import few
from tests.money.ledger import moves
from tests.money.treasury.simulated import PLATFORM, Crash, CrashPlan, Line, Simulation
from tests.money.treasury.world import SEED

WORKER = "0x" + "0e" * 20
LAMPORTS = 25_000_000
ARRIVED = ["0.25"]
OWED = [AmountOwed(WORKER, LAMPORTS)]
MINUTE_MS = 60_000
PLATFORM_ADDRESS = PLATFORM.address.lower()


def steps(simulation: Simulation, count: int, *, each_ms: int = 1_000) -> None:
    """Let one payer take some steps; the clock advances between them."""

    async def scenario() -> None:
        payer = simulation.payer()
        for _ in range(count):
            await payer.advance()
            simulation.clock.ms += each_ms

    asyncio.run(scenario())


def planned(simulation: Simulation) -> Simulation:
    simulation.ledger.earn(WORKER, LAMPORTS)
    asyncio.run(simulation.payer().plan(OWED, simulation.clock()))
    return simulation


def test_an_amount_owed_is_paid_once_and_booked() -> None:
    simulation = planned(Simulation())

    steps(simulation, 5)

    assert simulation.received(WORKER) == ARRIVED
    assert simulation.ledger.worker(WORKER) == (0, 0, LAMPORTS)
    assert sum(simulation.ledger.state.balances.values()) == 0
    assert simulation.outbox.contents == {}
    assert len(simulation.chain.posts) == 1


def test_an_address_has_one_payout_at_a_time() -> None:
    simulation = planned(Simulation())
    simulation.ledger.earn(WORKER, LAMPORTS)

    asyncio.run(simulation.payer().plan(OWED, simulation.clock()))
    steps(simulation, 5)

    assert simulation.received(WORKER) == ARRIVED
    assert simulation.ledger.worker(WORKER) == (LAMPORTS, 0, LAMPORTS)


def test_money_that_the_worker_does_not_have_is_not_sent() -> None:
    simulation = Simulation()
    asyncio.run(simulation.payer().plan(OWED, simulation.clock()))

    steps(simulation, 3)

    assert simulation.outbox.contents == {}
    assert simulation.chain.posts == []


def test_payouts_that_are_not_set_aside_take_no_place_of_others() -> None:
    simulation = Simulation()
    simulation.ledger.earn(WORKER, LAMPORTS)
    others = [AmountOwed(f"0x{index:040x}", LAMPORTS) for index in range(1, 101)]

    async def scenario() -> None:
        payer = simulation.payer()
        await payer.plan(others, simulation.clock())
        for _ in range(2):
            await payer.advance()
        assert simulation.outbox.contents == {}
        await payer.plan(OWED, simulation.clock())
        await payer.advance()

    asyncio.run(scenario())
    assert len(simulation.chain.posts) == 1


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_write_or_post_loses_and_doubles_nothing(after: bool) -> None:
    crashes = 0
    for at in range(1, 100):
        simulation = Simulation(crash=CrashPlan(at, after))
        simulation.ledger.earn(WORKER, LAMPORTS)
        try:
            asyncio.run(simulation.payer().plan(OWED, simulation.clock()))
            steps(simulation, 4)
        except Crash:
            crashes += 1
            simulation.clock.ms += MINUTE_MS
        # A new process: it plans what the books owe, then advances the open payouts.
        earned = simulation.ledger.worker(WORKER)[0]
        if earned:
            asyncio.run(simulation.payer().plan(OWED, simulation.clock()))
        steps(simulation, 4, each_ms=MINUTE_MS)

        assert simulation.received(WORKER) == ARRIVED, f"crash at effect {at}"
        assert simulation.ledger.worker(WORKER) == (0, 0, LAMPORTS), f"crash at effect {at}"
        assert simulation.outbox.contents == {}, f"crash at effect {at}"
        if at > simulation.crash.effects:
            break
    else:
        pytest.fail("the payout never came to its end")
    assert crashes >= 10, "every write and post was met"


def test_the_same_bytes_are_sent_until_the_chain_shows_them() -> None:
    simulation = planned(Simulation(line=Line(lost_before=1.0)))
    steps(simulation, 3, each_ms=MINUTE_MS)
    simulation.chain.line.lost_before = 0.0
    simulation.chain.line.lost_after = 1.0

    steps(simulation, 3, each_ms=MINUTE_MS)

    assert simulation.received(WORKER) == ARRIVED
    assert simulation.ledger.worker(WORKER) == (0, 0, LAMPORTS)
    assert len(set(simulation.chain.posts)) == 1


def test_a_payout_whose_row_is_late_is_not_paid_again() -> None:
    simulation = planned(Simulation(line=Line(lost_after=1.0)))
    simulation.chain.line.rows_late_ms = 9 * MINUTE_MS
    simulation.chain.line.dice.seed(3)

    steps(simulation, 30, each_ms=MINUTE_MS)

    assert simulation.received(WORKER) == ARRIVED
    assert simulation.ledger.worker(WORKER) == (0, 0, LAMPORTS)


def test_a_refused_payout_is_earned_again_after_its_nonce_is_used_up() -> None:
    simulation = planned(Simulation(funds=5))

    steps(simulation, 4, each_ms=MINUTE_MS)
    waiting = simulation.states()
    steps(simulation, 15, each_ms=MINUTE_MS)
    without_funds = simulation.states()
    simulation.chain.state.fund(PLATFORM_ADDRESS, HYPE, LAMPORTS, simulation.clock())
    steps(simulation, 2, each_ms=MINUTE_MS)

    assert waiting == [PayoutState.ABANDONED], "the ledger is given time to show it"
    assert without_funds == [PayoutState.ABANDONED], "what the account lacks may be this payout"
    assert simulation.ledger.worker(WORKER) == (LAMPORTS, 0, 0)
    assert simulation.outbox.contents == {}
    assert simulation.refused == [WORKER]
    assert simulation.received(WORKER) == []


@pytest.mark.parametrize("refusal", [Unavailable("nothing is signed"), RateLimited("the limit of an hour")])
def test_what_the_signer_does_not_sign_now_waits_and_is_sent_later(refusal: AzuError) -> None:
    simulation = planned(Simulation())
    simulation.signer.refusal = refusal
    steps(simulation, 50, each_ms=MINUTE_MS)
    assert simulation.states() == [PayoutState.PLANNED]
    assert simulation.ledger.worker(WORKER) == (0, LAMPORTS, 0)

    simulation.signer.refusal = None
    steps(simulation, 5)

    assert simulation.received(WORKER) == ARRIVED
    assert simulation.ledger.worker(WORKER) == (0, 0, LAMPORTS)


@pytest.mark.parametrize("refusal", [Forbidden("not claimed"), InvalidRequest("too old"), Conflict("void")])
def test_what_the_signer_never_signs_is_earned_again_after_its_nonce_is_used_up(refusal: AzuError) -> None:
    simulation = planned(Simulation())
    simulation.signer.refusal = refusal

    steps(simulation, 15, each_ms=MINUTE_MS)

    assert simulation.is_burned()
    assert simulation.received(WORKER) == []
    assert simulation.ledger.worker(WORKER) == (LAMPORTS, 0, 0)
    assert simulation.refused == [WORKER]


def test_after_a_refusal_that_left_the_nonce_unused_the_same_bytes_are_sent_again() -> None:
    simulation = planned(Simulation(funds=0, dollars=0))
    steps(simulation, 1)
    for token in (HYPE, USDC):
        simulation.chain.state.fund(PLATFORM_ADDRESS, token, 10**10, simulation.clock())

    steps(simulation, 4, each_ms=MINUTE_MS)

    assert simulation.received(WORKER) == ARRIVED
    assert len(simulation.chain.posts) == 2
    assert len(set(simulation.chain.posts)) == 1


def test_a_payout_without_an_answer_is_burned_before_it_is_given_up() -> None:
    simulation = planned(Simulation(line=Line(lost_before=1.0)))
    simulation.timeouts = PayoutTimeouts(give_up_ms=10 * MINUTE_MS, conclude_ms=10 * MINUTE_MS)
    steps(simulation, 30, each_ms=MINUTE_MS)
    still_open = simulation.states()
    simulation.chain.line.lost_before = 0.0

    steps(simulation, 15, each_ms=MINUTE_MS)

    assert still_open == [PayoutState.ABANDONED], "without the chain's word nothing is decided"
    assert simulation.is_burned()
    assert simulation.ledger.worker(WORKER) == (LAMPORTS, 0, 0)
    assert simulation.received(WORKER) == []


def test_an_abandoned_payout_that_the_chain_shows_after_all_is_booked() -> None:
    simulation = planned(Simulation(line=Line(lost_after=1.0, rows_late_ms=0)))
    simulation.timeouts = PayoutTimeouts(give_up_ms=0, conclude_ms=10 * MINUTE_MS)
    steps(simulation, 1)
    late = simulation.chain.state.rows.pop(WORKER), simulation.chain.state.rows.pop(PLATFORM_ADDRESS)
    simulation.chain.line.lost_after = 0.0
    steps(simulation, 5, each_ms=MINUTE_MS)
    given_up = simulation.states()
    simulation.chain.state.rows[WORKER], simulation.chain.state.rows[PLATFORM_ADDRESS] = late

    steps(simulation, 2, each_ms=MINUTE_MS)

    assert given_up == [PayoutState.ABANDONED]
    assert simulation.ledger.worker(WORKER) == (0, 0, LAMPORTS)


DUST_FROM = "0x" + "dd" * 20


def hidden(simulation: Simulation, *addresses: str) -> Simulation:
    """Have the payout sent in a millisecond that dust has filled in the ledgers of these addresses."""
    for address in addresses:
        simulation.chain.state.send_from_contract(DUST_FROM, address, HYPE, 1, 500, simulation.clock())
    steps(simulation, 1)
    return simulation


@pytest.mark.parametrize("lost_after", [0.0, 1.0])
def test_a_payout_hidden_by_dust_is_booked_as_its_recipients_ledger_shows_it(lost_after: float) -> None:
    simulation = planned(Simulation(funds=LAMPORTS, line=Line(lost_after=lost_after)))
    hidden(simulation, PLATFORM_ADDRESS)
    simulation.chain.line.lost_after = 0.0

    steps(simulation, 15, each_ms=MINUTE_MS)

    assert simulation.ledger.worker(WORKER) == (0, 0, LAMPORTS)
    assert simulation.outbox.contents == {}
    assert len(simulation.received(WORKER)) == 1


@pytest.mark.parametrize("lost_after", [0.0, 1.0])
def test_a_payout_that_no_ledger_shows_waits_until_an_admin_has_ended_it(lost_after: float) -> None:
    simulation = planned(Simulation(funds=LAMPORTS, line=Line(lost_after=lost_after)))
    hidden(simulation, PLATFORM_ADDRESS, WORKER)
    simulation.chain.line.lost_after = 0.0
    steps(simulation, 30, each_ms=MINUTE_MS)
    assert simulation.ledger.worker(WORKER) == (0, LAMPORTS, 0), "it is neither paid nor earned again"
    [payout] = asyncio.run(simulation.outbox.open())

    asyncio.run(simulation.ledger.apply(moves.paid(payout.payout_id, command="by an admin")))
    steps(simulation, 2, each_ms=MINUTE_MS)

    assert simulation.ledger.worker(WORKER) == (0, 0, LAMPORTS)
    assert simulation.outbox.contents == {}
    assert simulation.refused == []


def test_a_payout_that_an_admin_ended_leaves_the_outbox_when_its_row_is_shown_later() -> None:
    simulation = planned(Simulation())
    steps(simulation, 1)
    [payout] = asyncio.run(simulation.outbox.open())
    asyncio.run(simulation.ledger.apply(moves.paid(payout.payout_id, command="by an admin")))

    steps(simulation, 2, each_ms=MINUTE_MS)

    assert simulation.ledger.worker(WORKER) == (0, 0, LAMPORTS)
    assert simulation.outbox.contents == {}


def test_a_transfer_under_the_same_nonce_from_a_former_address_hides_no_payout() -> None:
    former = Account.from_key("0x" + "12" * 32)
    simulation = Simulation(former=(former.address.lower(),))
    for token in (HYPE, USDC):
        simulation.chain.state.fund(former.address.lower(), token, 10**12, simulation.clock())
    steps(planned(simulation), 1)
    [payout] = asyncio.run(simulation.outbox.open())
    action = sign_send_asset(
        former, simulation.chain.network, destination=DUST_FROM, lamports=LAMPORTS, nonce=payout.nonce
    )

    assert asyncio.run(simulation.chain.post_action(action.body)) is None
    steps(simulation, 2)

    assert simulation.ledger.worker(WORKER) == (0, 0, LAMPORTS)
    assert simulation.outbox.contents == {}


def test_two_processes_at_once_pay_once() -> None:
    simulation = planned(Simulation())

    async def scenario() -> None:
        first, second = simulation.payer(), simulation.payer()
        for _ in range(6):
            await asyncio.gather(first.advance(), second.advance())
            simulation.clock.ms += MINUTE_MS

    asyncio.run(scenario())

    assert simulation.received(WORKER) == ARRIVED
    assert simulation.ledger.worker(WORKER) == (0, 0, LAMPORTS)
    assert len(set(simulation.chain.posts)) == 1


def test_a_process_with_an_old_view_changes_nothing() -> None:
    simulation = planned(Simulation())
    [old] = asyncio.run(simulation.outbox.open())
    steps(simulation, 4)
    before = dict(simulation.ledger.state.balances)

    async def scenario() -> None:
        assert not await simulation.outbox.replace(old, old.failed("old"))
        assert not await simulation.outbox.remove(old)

    asyncio.run(scenario())

    assert simulation.outbox.contents == {}
    assert simulation.ledger.state.balances == before


def storm(seed: int, workers: int) -> None:
    """Pay workers while answers get lost, rows come late and twice, and processes die at random."""
    dice = random.Random(seed)
    line = Line(dice, lost_before=0.3, lost_after=0.3, rows_late_ms=5 * MINUTE_MS, rows_twice=True)
    simulation = Simulation(line=line)
    owners = [f"0x{index:040x}" for index in range(1, workers + 1)]
    for index, owner in enumerate(owners, 1):
        simulation.ledger.earn(owner, LAMPORTS + index)

    async def life() -> None:
        payer = simulation.payer()
        owed = [
            AmountOwed(owner, simulation.ledger.worker(owner)[0])
            for owner in owners
            if simulation.ledger.worker(owner)[0]
        ]
        await payer.plan(owed, simulation.clock())
        while simulation.outbox.contents:
            await payer.advance()
            simulation.clock.ms += dice.choice((1_000, MINUTE_MS))

    for _ in range(60):
        simulation.crash.at = simulation.crash.effects + dice.randint(1, 12 * workers)
        simulation.crash.after = dice.random() < 0.5
        try:
            asyncio.run(life())
        except Crash:
            continue
        if not any(simulation.ledger.worker(owner)[0] for owner in owners):
            break

    held = 10**12 - simulation.chain.state.balance(PLATFORM_ADDRESS, HYPE)
    for index, owner in enumerate(owners, 1):
        assert simulation.received(owner) == [f"0.25{index:06d}".rstrip("0")], owner
        assert simulation.ledger.worker(owner) == (0, 0, LAMPORTS + index)
    assert held == sum(LAMPORTS + index for index in range(1, workers + 1))
    assert sum(simulation.ledger.state.balances.values()) == 0


@pytest.mark.parametrize("run", range(2))
def test_every_worker_is_paid_exactly_once_in_a_storm(run: int) -> None:
    storm(SEED + run, workers=4)


@pytest.mark.prove
@pytest.mark.parametrize("run", range(20))
def test_fifty_workers_are_paid_exactly_once_in_a_storm(run: int) -> None:
    storm(SEED + run, workers=50)


@pytest.mark.parametrize("restarts", few([False, True]))
def test_of_many_payouts_none_has_a_nonce_that_the_chain_takes_no_more(restarts: bool) -> None:
    simulation = Simulation()
    owners = [f"0x{index:040x}" for index in range(1, 151)]
    for owner in owners:
        simulation.ledger.earn(owner, LAMPORTS)

    async def scenario() -> None:
        payer = simulation.payer()
        await payer.plan([AmountOwed(owner, LAMPORTS) for owner in owners], simulation.clock())
        for _ in range(30):
            await payer.advance()
            simulation.clock.ms += MINUTE_MS
            payer = simulation.payer() if restarts else payer

    asyncio.run(scenario())

    assert {owner: simulation.received(owner) for owner in owners} == dict.fromkeys(owners, ARRIVED)
    assert len(simulation.chain.posts) == len(owners), "none was refused and sent again"


KNOWN, NEW, THIRD = ("0x" + digits * 20 for digits in ("0a", "0b", "0c"))
THRESHOLD = Threshold(lamports=100, new_account_lamports=400)


def simulation(funds: int = 10**9, dollars: int = 10**12) -> Simulation:
    made = Simulation(funds=funds, dollars=dollars)
    made.chain.state.fund(KNOWN, HYPE, 1, made.clock())
    return made


def selector(world: Simulation) -> PayoutSelector:
    platform = PLATFORM.address.lower()
    return PayoutSelector(world.chain, world.ledger, (platform,), THRESHOLD, now_ms=world.clock)


def selected(
    world: Simulation, open_lamports: dict[str, int] | None = None, max_open: int = 10
) -> list[AmountOwed]:
    return asyncio.run(selector(world).select(open_lamports or {}, max_open))


@pytest.mark.parametrize(("earned", "paid"), [(99, False), (100, True)])
def test_earnings_are_paid_from_the_threshold_on(earned: int, paid: bool) -> None:
    world = simulation()
    world.ledger.earn(KNOWN, earned)

    assert selected(world) == ([AmountOwed(KNOWN, earned)] if paid else [])


@pytest.mark.parametrize(("earned", "paid"), [(399, False), (400, True)])
def test_an_account_that_is_new_to_the_chain_has_a_higher_threshold(earned: int, paid: bool) -> None:
    world = simulation()
    world.ledger.earn(NEW, earned)

    assert selected(world) == ([AmountOwed(NEW, earned)] if paid else [])


def test_a_new_account_whose_fee_the_platform_lacks_keeps_no_other_from_its_money() -> None:
    world = simulation(dollars=0)
    for address, lamports in ((KNOWN, 500), (NEW, 700)):
        world.ledger.earn(address, lamports)

    assert selected(world) == [AmountOwed(KNOWN, 500)]


def test_the_largest_sums_come_first_up_to_the_most_open_payouts() -> None:
    world = simulation()
    for address, lamports in ((KNOWN, 500), (NEW, 700), (THIRD, 600)):
        world.ledger.earn(address, lamports)

    assert selected(world, max_open=2) == [AmountOwed(NEW, 700), AmountOwed(THIRD, 600)]
    assert selected(world, {NEW: 700}, max_open=2) == [AmountOwed(THIRD, 600)]
    assert selected(world, {NEW: 700, THIRD: 600}, max_open=2) == []


def test_no_more_is_planned_than_the_wallet_holds() -> None:
    world = simulation(funds=KEPT_LAMPORTS + 1_100)
    for address, lamports in ((KNOWN, 500), (NEW, 700), (THIRD, 400)):
        world.ledger.earn(address, lamports)

    assert selected(world) == [AmountOwed(NEW, 700), AmountOwed(THIRD, 400)]
    assert selected(world, {NEW: 700}) == [AmountOwed(THIRD, 400)]


def test_no_more_is_planned_than_the_chains_budget_of_actions_allows() -> None:
    world = simulation()
    world.ledger.earn(KNOWN, 500)
    world.chain.state.requests_used[PLATFORM.address.lower()] = 9_800

    assert selected(world) == []


def test_the_platform_does_not_pay_itself() -> None:
    world = simulation()
    world.ledger.earn(PLATFORM.address.lower(), 500)

    assert selected(world) == []


def test_an_address_that_was_passed_over_is_checked_again_later() -> None:
    world = simulation()
    world.ledger.earn(KNOWN, 500)
    choosing = selector(world)
    choosing.pass_over(KNOWN)

    before = asyncio.run(choosing.select({}, 10))
    world.clock.ms += 3_600_000
    after = asyncio.run(choosing.select({}, 10))

    assert (before, after) == ([], [AmountOwed(KNOWN, 500)])


def test_an_address_is_paid_once_it_has_claimed() -> None:
    world = simulation()
    world.ledger.earn(KNOWN, 100, claims=False)
    assert selected(world) == []
    asyncio.run(world.ledger.apply(moves.claim(KNOWN)))
    assert selected(world) == [AmountOwed(KNOWN, 100)]

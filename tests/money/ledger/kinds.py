"""Random transfers of every kind, over few names: they repeat, contradict each other and meet ended holds."""

from hypothesis import strategies as st

from azu.money.ledger.transfers import Settle, Transfer
from azu.money.pricing import divide
from azu.units import MAX_LAMPORTS
from tests.builders import ALICE, BOB, OWNERS
from tests.money.ledger import moves

USERS = st.sampled_from([ALICE, BOB])
# A user may lend a GPU too.
WORKERS = st.sampled_from([*OWNERS[:2], ALICE])
JOBS = st.sampled_from([f"job-{number}" for number in range(3)])
PAYOUTS = st.sampled_from([f"p{number}" for number in range(3)])
HASHES = st.sampled_from([f"0x{number:02x}" for number in range(4)])
FEES = st.integers(0, 3)
LARGE = st.sampled_from([2**53 - 1, 2**53, 2**53 + 1, MAX_LAMPORTS - 1, MAX_LAMPORTS])
# Mostly amounts for which a deposit pays for several jobs and a job for several payouts.
DEPOSITED = st.one_of(st.integers(1, 60), LARGE)
RESERVED = st.one_of(st.integers(0, 40), st.integers(0, 40), LARGE)
CHARGED = st.one_of(st.integers(0, 30), st.integers(0, 30), LARGE)
TAKEN = st.one_of(st.integers(1, 6), st.integers(1, 6), LARGE)
PERCENTS = st.sampled_from([0, 20, 20, 100])
LAYERS = 4
WORK = st.dictionaries(
    st.integers(0, LAYERS - 1), st.dictionaries(WORKERS, st.integers(0, 9), max_size=3), max_size=LAYERS
)
DAY_MS = 86_400_000
NODES = st.sampled_from(["node-1", "node-2"])
ROWS = st.sampled_from(["r1", "r2", "r3"])
KEYS = st.sampled_from([None, None, "key-a", "key-b"])  # of no limit, or of a small one
MATURITY = st.sampled_from([0, DAY_MS, DAY_MS, 2 * DAY_MS])
PAUSES = st.sampled_from([0, 0, 1, DAY_MS // 2, DAY_MS, 40 * DAY_MS])


@st.composite
def settled(draw: st.DrawFn, jobs: st.SearchStrategy[str] = JOBS) -> Settle:
    """Return the settlement of some charge, parts of it held."""
    job, charged = draw(jobs), draw(CHARGED)
    division = divide(charged, draw(PERCENTS), draw(WORK), LAYERS)
    shares = dict(division.workers)
    held = {
        draw(NODES): shares.pop(payout) for payout in list(shares) if shares[payout] and draw(st.booleans())
    }
    return Settle(
        id=f"settle:{job}",
        job_id=job,
        completion_tokens=charged,
        charged_lamports=charged,
        platform_lamports=charged - sum(shares.values()) - sum(held.values()),
        shares=shares,
        held=held,
        maturity_ms=draw(MATURITY),
    )


def any_transfer() -> st.SearchStrategy[Transfer]:
    """Return a transfer of any kind, sensible or not."""
    return st.one_of(
        st.builds(lambda n, who, row: moves.deposit(n, address=who, tx_hash=row), DEPOSITED, USERS, HASHES),
        st.builds(moves.suspend, ROWS, DEPOSITED),
        st.builds(lambda row, n, who: moves.credit_suspense(row, n, address=who), ROWS, DEPOSITED, USERS),
        st.builds(lambda row, n, who: moves.unknown_out(row, n, address=who), ROWS, TAKEN, WORKERS),
        st.builds(
            lambda job, n, who, key: moves.reserve(job, n, address=who, key_id=key),
            JOBS,
            RESERVED,
            USERS,
            KEYS,
        ),
        settled(),
        settled(),
        st.builds(moves.release, JOBS),
        st.builds(moves.expire, JOBS),
        st.builds(moves.dispute, JOBS),
        st.builds(moves.dismiss, JOBS),
        st.builds(moves.reverse, JOBS),
        st.builds(lambda node, n, who: moves.pay_held(node, n, address=who), NODES, TAKEN, WORKERS),
        st.builds(lambda node, n, who: moves.release_held(node, n, address=who), NODES, TAKEN, USERS),
        st.builds(lambda p, n, who: moves.plan_payout(p, n, address=who), PAYOUTS, TAKEN, WORKERS),
        st.builds(lambda p, n, who: moves.plan_withdrawal(p, n, address=who), PAYOUTS, TAKEN, USERS),
        st.builds(moves.take_revenue, PAYOUTS, TAKEN),
        st.builds(lambda row, n, who: moves.cover_loss(row, n, address=who), ROWS, TAKEN, USERS),
        st.builds(lambda p, fee: moves.paid(p, fee_lamports=fee), PAYOUTS, FEES),
        st.builds(moves.refused, PAYOUTS),
        st.builds(lambda who: moves.open_key(who), USERS),
        st.builds(
            lambda who, key: moves.open_key(who, key_id=key, limit=25),
            USERS,
            st.sampled_from(["key-a", "key-b"]),
        ),
        st.builds(lambda who: moves.revoke_key(moves.key_of(who)), USERS),
        st.builds(moves.claim, WORKERS),
        st.builds(moves.replace_platform, USERS),
        st.builds(moves.enrol, NODES, WORKERS),
        st.builds(moves.remove_node, NODES),
    )


BEGIN: tuple[Transfer, ...] = (
    *map(moves.open_key, (ALICE, BOB)),
    moves.deposit(60),
    *map(moves.claim, OWNERS[:2]),
)


def histories_of_all_kinds(size: int) -> st.SearchStrategy[list[tuple[int, Transfer]]]:
    """Return pauses and transfers; the first ones give money to move."""
    rest = st.lists(st.tuples(PAUSES, any_transfer()), min_size=size // 2, max_size=size)
    return rest.map(lambda more: [*((0, transfer) for transfer in BEGIN), *more])

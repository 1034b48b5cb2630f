"""Random transfers over so few ids that they repeat, contradict each other and meet ended holds."""

from hypothesis import strategies as st

from azu.money.ledger.transfers import Deposit, Settle, Transfer
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


@st.composite
def settlements(draw: st.DrawFn, jobs: st.SearchStrategy[str] = JOBS) -> Settle:
    """Return the settlement of some charge with random shares."""
    job, charged = draw(jobs), draw(CHARGED)
    division = divide(charged, draw(PERCENTS), draw(WORK), LAYERS)
    return Settle(
        id=f"settle:{job}",
        job_id=job,
        charged_lamports=charged,
        platform_lamports=division.platform_lamports + division.held_lamports,
        shares=division.workers,
    )


def deposits() -> st.SearchStrategy[Deposit]:
    """Return deposits; several of one hash may contradict each other."""
    return st.builds(
        lambda lamports, address, tx_hash: moves.deposit(lamports, address=address, tx_hash=tx_hash),
        DEPOSITED,
        USERS,
        HASHES,
    )


def transfers() -> st.SearchStrategy[Transfer]:
    """Return any transfer, sensible or not."""
    return st.one_of(
        deposits(),
        st.builds(lambda job, amount, user: moves.reserve(job, amount, address=user), JOBS, RESERVED, USERS),
        settlements(),
        settlements(),
        st.builds(moves.release, JOBS),
        st.builds(moves.expire, JOBS),
        st.builds(
            lambda payout, amount, worker: moves.plan_payout(payout, amount, address=worker),
            PAYOUTS,
            TAKEN,
            WORKERS,
        ),
        st.builds(
            lambda payout, amount, user: moves.plan_withdrawal(payout, amount, address=user),
            PAYOUTS,
            TAKEN,
            USERS,
        ),
        st.builds(lambda payout, fee: moves.paid(payout, fee_lamports=fee), PAYOUTS, FEES),
        st.builds(moves.refused, PAYOUTS),
    )


def histories(size: int) -> st.SearchStrategy[list[Transfer]]:
    """Return lists of up to `size` transfers that begin with money to move."""
    # Without this, Hypothesis prefers lists that end before a worker earns anything.
    rest = st.lists(transfers(), min_size=size // 2, max_size=size)
    return st.tuples(st.lists(deposits(), min_size=1, max_size=2), rest).map(
        lambda parts: [*parts[0], *parts[1]]
    )

"""What the signer signs and refuses, rule by rule."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.auth.signatures import TakeRevenue, sign_claim, sign_command
from azu.errors import AzuError, Conflict, Forbidden, InvalidRequest, RateLimited, Unavailable
from azu.money.chain.rows import LATE_MS, NONCE_WINDOW_MS
from azu.money.signer.policy import (
    DAY_MS,
    QUARANTINE_MS,
    Look,
    PayoutLimit,
    SignerState,
    accept,
    admit,
    burned,
    first_state,
    kind_of,
    look,
    nonce_for,
    room,
    shortfall,
    undecided,
    unexplained,
    void,
    waiting,
)
from azu.money.signer.views import (
    BooksHead,
    BooksView,
    ChainView,
    Credit,
    IncomingRow,
    OpenPayout,
    OutgoingRow,
    PayoutKind,
    TransferRequest,
)
from tests.money.signer.model import (
    ADMIN,
    CLAIMS,
    PEOPLE,
    PLATFORM,
    START_MS,
    ModelBooks,
    ModelChain,
    ModelSigner,
    rules_of,
)

ALICE, BOB, CAROL = PEOPLE[:3]
A, B = ALICE.address.lower(), BOB.address.lower()
HOUR_MS = DAY_MS // 24
SMALL = PayoutLimit(hour_lamports=100, day_lamports=300, address_percent=60)
HEAD = BooksHead(7, "h7")


def books(**changes: object) -> BooksView:
    view = BooksView(
        head=HEAD,
        hash_at="h7",
        owed_lamports=1_000,
        revenue_lamports=0,
        credited_lamports=0,
        read_until_ms=START_MS,
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def chain(*outgoing: OutgoingRow, balance: int = 1_000, incoming: tuple[IncomingRow, ...] = ()) -> ChainView:
    return ChainView(START_MS, balance, outgoing, incoming)


def payout(lamports: int = 10, number: int = 0, kind: PayoutKind = PayoutKind.EARNINGS) -> OpenPayout:
    nonce = nonce_for(kind, str(number), START_MS)
    return OpenPayout(f"payout:{A}:{number}", kind, A, lamports, nonce, CLAIMS[A])


def asked(payout: OpenPayout) -> TransferRequest:
    return TransferRequest(payout.payout_id, payout.kind, payout.address, payout.lamports, payout.nonce)


def row_of(payout: OpenPayout, at_ms: int = START_MS) -> OutgoingRow:
    return OutgoingRow(at_ms, payout.nonce, payout.address, payout.lamports)


def signed(*payouts: OpenPayout, **changes: int) -> SignerState:
    state = SignerState(head=HEAD, **changes)  # type: ignore[arg-type]
    for one in payouts:
        state = admit(state, books(payouts=(one,)), chain(), asked(one), rules_of())
    return state


def looked(state: SignerState, view: BooksView, rows: ChainView) -> Look:
    return look(state, view, rows)


# Solvency.


def test_it_lacks_what_the_books_owe_and_the_account_does_not_hold() -> None:
    assert shortfall(books(), chain()) == 0
    assert shortfall(books(), chain(balance=999)) == 1
    assert shortfall(books(revenue_lamports=5), chain()) == 5


def test_what_the_platform_owes_covers_nothing() -> None:
    assert shortfall(books(revenue_lamports=-300), chain(balance=700)) == 300


def test_only_an_open_payout_whose_own_row_is_shown_has_left_the_account() -> None:
    sent = payout(100)
    view = books(payouts=(sent,))

    assert shortfall(view, chain(row_of(sent), balance=900)) == 0
    assert shortfall(view, chain(balance=900)) == 100
    assert shortfall(books(), chain(row_of(sent), balance=900)) == 100
    assert shortfall(view, chain(replace(row_of(sent), lamports=99), balance=900)) == 100
    assert shortfall(view, chain(replace(row_of(sent), address=B), balance=900)) == 100
    assert shortfall(view, chain(replace(row_of(sent), nonce=None), balance=900)) == 100


def test_a_shortfall_bars_signing_until_it_is_over() -> None:
    state = SignerState(head=HEAD)

    assert "lacks 400" in looked(state, books(), chain(balance=600)).findings[0]
    assert looked(state, books(), chain()).findings == ()


# Credits against rows.

ROW = IncomingRow("row-1", "0x01", A, 50, START_MS - 10)
CREDIT = Credit("0x01", A, 50, START_MS - 10)


def credited(*credits_: Credit, **changes: object) -> BooksView:
    total = sum(credit.lamports for credit in credits_)
    return books(**{"head": BooksHead(9, "h9"), "credits": credits_, "credited_lamports": total} | changes)


def test_a_few_of_many_faults_are_named_and_the_others_counted() -> None:
    missing = [replace(CREDIT, row=f"0x{number:02}") for number in range(100)]
    rows = tuple(replace(ROW, row=f"row-{number}", at_ms=START_MS - LATE_MS - 1) for number in range(50))
    findings = looked(SignerState(head=HEAD), credited(*missing), chain(incoming=rows)).findings

    assert len(findings) == 8
    assert [one for one in findings if "more" in one] == [
        "and 96 more of this kind",
        "and 46 more of this kind",
    ]


@pytest.mark.parametrize(
    ("credit", "row"),
    [
        (CREDIT, ROW),
        (replace(CREDIT, row="row-1"), replace(ROW, hash="")),
    ],
)
def test_a_credit_is_shown_by_its_row_once(credit: Credit, row: IncomingRow) -> None:
    state = SignerState(head=HEAD)
    found = looked(state, credited(credit), chain(incoming=(row,)))

    assert found.findings == ()
    assert (found.state.credited_lamports, found.state.head) == (50, BooksHead(9, "h9"))
    again = credited(replace(credit), head=BooksHead(10, "h10"), hash_at="h9")
    twice = looked(found.state, replace(again, credited_lamports=100), chain(incoming=(row,)))
    assert "no row of the chain shows" in twice.findings[0]
    assert twice.state == found.state


@pytest.mark.parametrize(
    "row",
    [
        replace(ROW, lamports=49),
        replace(ROW, sender=B),
        replace(ROW, hash="0x02"),
    ],
)
def test_a_credit_without_a_row_of_its_own_is_found(row: IncomingRow) -> None:
    state, view, rows = SignerState(head=HEAD), credited(CREDIT), chain(incoming=(row,))

    assert unexplained(state, view, rows)[0] == (CREDIT,)
    assert "no row of the chain shows 0x01" in looked(state, view, rows).findings[0]
    # Another ledger of the chain may show it.
    assert look(state, view, rows, shown={"0x01"}).findings == ()


def test_a_settled_row_without_a_credit_is_found_unless_it_is_excused() -> None:
    old = replace(ROW, at_ms=START_MS - LATE_MS - 1)
    state, view = SignerState(head=HEAD), books()

    assert looked(state, view, chain(incoming=(ROW,))).findings == ()
    assert unexplained(state, view, chain(incoming=(old,)))[1] == (old,)
    found = looked(state, view, chain(incoming=(old,)))
    assert "nothing was credited for row-1, 50 lamports" in found.findings[0]
    assert look(state, view, chain(incoming=(old,)), excused={"row-1"}).findings == ()
    # Nor is it before the treasury has decided it.
    assert looked(state, books(read_until_ms=old.at_ms), chain(incoming=(old,))).findings == ()


def test_the_sum_of_all_credits_is_carried_on_from_the_signers_own() -> None:
    state = SignerState(head=HEAD, credited_lamports=100)

    assert looked(state, books(credited_lamports=100), chain()).findings == ()
    assert (
        "sum to 90 lamports, the chain's to 100"
        in looked(state, books(credited_lamports=90), chain()).findings[0]
    )


# The books' head.


@pytest.mark.parametrize(
    ("view", "fault"),
    [
        (books(head=BooksHead(5, "h5"), hash_at=""), "went back by 2"),
        (books(hash_at="other"), "another entry 7"),
        (books(head=BooksHead(8, "h8"), hash_at=""), "another entry 7"),
    ],
)
def test_books_behind_or_beside_what_it_saw_end_its_signing(view: BooksView, fault: str) -> None:
    found = looked(SignerState(head=HEAD), view, chain())

    assert fault in found.state.halt
    # For good, also once they look right again.
    assert fault in looked(found.state, books(), chain()).findings[0]


# Rows of others.


def test_a_row_that_it_did_not_sign_ends_its_signing() -> None:
    own, other = payout(10), payout(20, 1)
    state = signed(own)

    assert looked(state, books(payouts=(own,)), chain(row_of(own), balance=990)).findings == ()
    found = looked(state, books(), chain(row_of(own), row_of(other)))
    assert found.state.halt == f"another process sent 20 lamports to {A} from the platform's account"
    changed = replace(row_of(own), lamports=11)
    assert looked(state, books(), chain(changed)).state.halt


def test_after_a_command_it_waits_for_ten_minutes_without_rows_of_others() -> None:
    halted = replace(signed(), halt="it was restored")
    state = accept(halted, books(), HEAD, 1, START_MS)

    def later(ms: int, *rows: OutgoingRow) -> Look:
        view = books(hash_at=HEAD.hash if state.head.number else "")
        return looked(state, view, replace(chain(*rows), now_ms=START_MS + ms))

    assert "before 2026-09-21 14:23:20" in later(0).findings[0]
    assert "before 2026-09-21 14:23:20" in later(QUARANTINE_MS - 1_000).findings[0]
    assert later(QUARANTINE_MS).findings == ()
    # Rows from before the command are the admin's affair; a later one starts the time again.
    assert later(QUARANTINE_MS, row_of(payout(), START_MS)).findings == ()
    state = later(300_000, row_of(payout(), START_MS + 200_000)).state
    assert (
        "before 2026-09-21 14:28:20" in later(QUARANTINE_MS, row_of(payout(), START_MS + 200_000)).findings[0]
    )
    assert later(300_000 + QUARANTINE_MS, row_of(payout(), START_MS + 200_000)).findings == ()
    # Once it signs again, another one ends it.
    state = later(300_000 + QUARANTINE_MS, row_of(payout(), START_MS + 200_000)).state
    assert later(2 * QUARANTINE_MS, row_of(payout(), START_MS + 2 * QUARANTINE_MS - 1)).state.halt


def test_a_command_is_good_once_and_for_the_books_that_it_names() -> None:
    state = replace(signed(), halt="it was restored")

    with pytest.raises(Conflict):
        accept(state, books(hash_at="other"), HEAD, 1, START_MS)
    with pytest.raises(Conflict):
        accept(state, books(head=BooksHead(6, "h6")), HEAD, 1, START_MS)
    accepted = accept(state, books(), HEAD, 5, START_MS)
    for nonce in (4, 5):
        with pytest.raises(Conflict):
            accept(accepted, books(), HEAD, nonce, START_MS)


def test_a_signer_without_memory_signs_for_a_new_network_alone() -> None:
    assert first_state(books(), chain()).halt == ""
    assert first_state(books(opened_at_ms=START_MS - QUARANTINE_MS), chain()).halt == ""
    assert first_state(books(opened_at_ms=START_MS - QUARANTINE_MS - 1), chain()).halt
    assert first_state(books(), chain(row_of(payout()))).halt


# Transfers.


def test_the_same_transfer_is_signed_again_and_no_other_under_its_nonce() -> None:
    first = payout(10)
    state = signed(first)

    assert admit(state, books(), chain(), asked(first), rules_of()) == state
    for other in (
        replace(asked(first), lamports=11),
        replace(asked(first), address=B),
        replace(asked(first), payout_id="payout:other"),
    ):
        with pytest.raises(Conflict):
            admit(state, books(payouts=(first,)), chain(), other, rules_of())


def test_a_payout_is_signed_under_one_nonce() -> None:
    first = payout(10)
    second = replace(first, nonce=first.nonce + 4)

    with pytest.raises(Conflict):
        admit(signed(first), books(payouts=(second,)), chain(), asked(second), rules_of())


def test_a_nonce_that_was_voided_is_never_signed_for_a_transfer() -> None:
    first, unsigned = payout(10), payout(10, 1)
    state = void(signed(first), books(), first.nonce)
    state = void(state, books(payouts=(unsigned,)), unsigned.nonce)

    for one in (first, unsigned):
        with pytest.raises(Conflict):
            admit(state, books(payouts=(one,)), chain(), asked(one), rules_of())
    with pytest.raises(Forbidden):
        void(state, books(), START_MS + 400)


@pytest.mark.parametrize(
    "change",
    [
        {"lamports": 11},
        {"address": B},
        {"payout_id": "payout:other"},
        {"nonce": START_MS + 400 - START_MS % 4},
    ],
)
def test_a_transfer_is_signed_only_as_the_books_have_it(change: dict[str, object]) -> None:
    one = payout(10)

    with pytest.raises((Forbidden, InvalidRequest)):
        admit(SignerState(), books(payouts=(one,)), chain(), replace(asked(one), **change), rules_of())  # type: ignore[arg-type]


@pytest.mark.parametrize("off_ms", [-37 * HOUR_MS, -DAY_MS * 3, 1_000_000, DAY_MS])
def test_a_nonce_far_from_the_chains_time_is_refused(off_ms: int) -> None:
    nonce = nonce_for(PayoutKind.EARNINGS, "far", START_MS + off_ms)
    one = replace(payout(10), nonce=nonce)

    with pytest.raises(InvalidRequest):
        admit(SignerState(), books(payouts=(one,)), chain(), asked(one), rules_of())


def test_a_payout_has_one_nonce_in_a_window_in_every_copy() -> None:
    begin_ms = START_MS - START_MS % NONCE_WINDOW_MS
    times = [begin_ms - 1, begin_ms, begin_ms + NONCE_WINDOW_MS - 1, begin_ms + NONCE_WINDOW_MS]
    before, first, last, after = (nonce_for(PayoutKind.EARNINGS, A, at_ms) for at_ms in times)
    assert before < begin_ms <= first == last < begin_ms + NONCE_WINDOW_MS <= after
    others = {nonce_for(PayoutKind.EARNINGS, A, begin_ms, place) for place in range(16)}
    assert first in others
    assert len(others) == 16


def test_each_kind_has_nonces_of_its_own() -> None:
    for number in range(50):
        kind = tuple(PayoutKind)[number % 3]
        nonce = nonce_for(kind, str(number), START_MS)
        assert abs(nonce - START_MS) < NONCE_WINDOW_MS
        assert kind_of(nonce) is kind
    assert kind_of(None) is None
    one = payout(10)
    wrong = replace(one, kind=PayoutKind.WITHDRAWAL)
    with pytest.raises(InvalidRequest):
        admit(SignerState(), books(payouts=(wrong,)), chain(), asked(wrong), rules_of())


# What recipients and admins signed.


@pytest.mark.parametrize("proof", ["", "0x12", CLAIMS[B], sign_claim(ALICE, "0x" + "1f" * 20)])
def test_earnings_go_only_to_an_address_that_claimed_them(proof: str) -> None:
    one = replace(payout(10), proof=proof)

    with pytest.raises(Forbidden):
        admit(SignerState(), books(payouts=(one,)), chain(), asked(one), rules_of())


def test_a_claim_for_an_address_that_the_platform_had_before_stays_good() -> None:
    before = "0x" + "1f" * 20
    one = replace(payout(10), proof=sign_claim(ALICE, before))

    assert admit(
        SignerState(), books(payouts=(one,)), chain(), asked(one), rules_of(platforms=(before,))
    ).signed


def test_a_withdrawal_goes_only_where_its_address_signed_it() -> None:
    model = ModelBooks(users={A: 100})
    one = model.plan_withdrawal(ALICE, 10, 1, START_MS)

    assert admit(SignerState(), books(payouts=(one,)), chain(), asked(one), rules_of()).signed
    for other in (
        replace(one, address=B),
        replace(one, lamports=11),
        replace(one, expires_at_ms=one.expires_at_ms + 1),
        replace(one, payout_id=one.payout_id + "1"),
        replace(one, payout_id="payout:withdrawal-x"),
        replace(one, expires_at_ms=one.nonce - NONCE_WINDOW_MS),
        replace(one, proof=""),
    ):
        with pytest.raises(Forbidden):
            admit(SignerState(), books(payouts=(other,)), chain(), asked(other), rules_of())


def test_revenue_goes_only_where_an_admin_of_its_settings_sends_it() -> None:
    command = TakeRevenue(address=A, lamports=10, nonce=1, expires_at_ms=START_MS + 1_000)
    proof = sign_command(ADMIN, command, PLATFORM)
    one = replace(payout(10, kind=PayoutKind.REVENUE), payout_id=command.payout_id, proof=proof)

    assert admit(SignerState(), books(payouts=(one,)), chain(), asked(one), rules_of()).signed
    expired = replace(command, expires_at_ms=START_MS - NONCE_WINDOW_MS)
    for other in (
        replace(one, address=B),
        replace(one, lamports=11),
        replace(one, payout_id=f"{one.payout_id}0"),
        replace(one, proof=sign_command(ALICE, command, PLATFORM)),
        replace(one, proof=sign_command(ADMIN, command, "0x" + "1f" * 20)),
        replace(one, proof=sign_command(ADMIN, expired, PLATFORM)),
        replace(one, proof="{}"),
    ):
        with pytest.raises(Forbidden):
            admit(SignerState(), books(payouts=(other,)), chain(), asked(other), rules_of())


# Limits.


def limited(state: SignerState, one: OpenPayout, *rows: OutgoingRow, now_ms: int = START_MS) -> bool:
    view = replace(chain(*rows), now_ms=now_ms)
    open_ones = [
        OpenPayout(known.payout_id, known.kind, known.address, known.lamports, nonce)
        for nonce, known in state.signed.items()
    ]
    try:
        admit(state, books(payouts=(one, *open_ones)), view, asked(one), rules_of(earnings=SMALL))
    except RateLimited:
        return True
    return False


def test_one_address_gets_its_part_of_a_limit() -> None:
    assert not limited(SignerState(), payout(60))
    assert limited(SignerState(), payout(61))
    assert limited(SignerState(), payout(31), row_of(payout(30, 5), START_MS - HOUR_MS + 1))
    assert not limited(SignerState(), payout(31), row_of(payout(30, 5), START_MS - HOUR_MS))


def test_all_addresses_together_get_the_limit_of_an_hour_and_of_a_day() -> None:
    def to_b(lamports: int, ago_ms: int, number: int = 9) -> OutgoingRow:
        return replace(row_of(payout(lamports, number), START_MS - ago_ms), address=B)

    assert not limited(SignerState(), payout(50), to_b(50, 0))
    assert limited(SignerState(), payout(50), to_b(51, 0))
    day = [to_b(90, hours * HOUR_MS, hours) for hours in (2, 4, 6)]
    assert not limited(SignerState(), payout(30), *day)
    assert limited(SignerState(), payout(31), *day)
    assert not limited(SignerState(), payout(31), *(replace(row, at_ms=START_MS - DAY_MS) for row in day))


def test_what_was_signed_and_is_not_shown_counts_as_sent() -> None:
    state = signed(payout(40))

    assert limited(state, payout(21, 1))
    assert not limited(state, payout(20, 1))
    # Once, and not twice when it is shown.
    assert limited(state, payout(21, 1), row_of(payout(40)))
    assert not limited(state, payout(20, 1), row_of(payout(40)))
    # The chain does not admit it any more two days later.
    late = replace(payout(21, 1), nonce=nonce_for(PayoutKind.EARNINGS, "late", START_MS + DAY_MS))
    assert limited(state, late, now_ms=START_MS + DAY_MS)
    late = replace(late, nonce=late.nonce + 2 * DAY_MS)
    assert not limited(state, late, now_ms=START_MS + 3 * DAY_MS)


@given(
    st.lists(st.tuples(st.sampled_from([A, B]), st.integers(1, 60), st.integers(0, 30 * HOUR_MS)), max_size=8)
)
def test_what_is_left_of_a_limit_is_signed_and_no_lamport_more(sent: list[tuple[str, int, int]]) -> None:
    rows = [
        OutgoingRow(START_MS - ago_ms, nonce_for(PayoutKind.EARNINGS, str(number), 0), address, lamports)
        for number, (address, lamports, ago_ms) in enumerate(sent, 1)
    ]
    left = room(SignerState(), chain(*rows), PayoutKind.EARNINGS, SMALL)
    most = min(left.all_lamports, left.left(A))

    assert left.used_lamports.get(A, 0) == sum(
        lamports for address, lamports, ago_ms in sent if address == A and ago_ms < DAY_MS
    )
    assert most <= 0 or not limited(SignerState(), payout(most), *rows)
    assert limited(SignerState(), payout(max(0, most) + 1), *rows)


def test_a_transfer_that_the_books_forgot_bars_others_to_its_address_until_it_is_decided() -> None:
    forgotten, other = payout(10), payout(10, 1)
    state, view = signed(forgotten), books(payouts=(other,))

    assert undecided(state, view, chain()) == state.signed
    with pytest.raises(Unavailable):
        admit(state, view, chain(), asked(other), rules_of())
    model = ModelBooks(users={B: 100})
    to_bob = model.plan_withdrawal(BOB, 10, 1, START_MS)
    assert admit(state, books(payouts=(to_bob,)), chain(), asked(to_bob), rules_of()).signed
    # The chain shows it,
    assert undecided(state, view, chain(row_of(forgotten))) == {}
    # or its nonce was used up, and no row came late,
    state = burned(state, forgotten.nonce, START_MS)
    assert undecided(state, view, chain())
    after = replace(chain(), now_ms=START_MS + LATE_MS + 1)
    assert undecided(state, view, after) == {}
    assert admit(state, view, after, asked(other), rules_of()).signed
    # or the chain does not admit it any more.
    assert undecided(signed(forgotten), view, replace(chain(), now_ms=START_MS + 3 * DAY_MS)) == {}
    # A payout that the books have open is decided by the treasury.
    assert undecided(signed(forgotten), books(payouts=(forgotten,)), chain()) == {}


def test_withdrawals_and_earnings_have_limits_of_their_own() -> None:
    other = payout(60, 3, PayoutKind.WITHDRAWAL)

    assert not limited(SignerState(), payout(60), row_of(other))
    # A row that no payout of azu can have made counts against both.
    assert limited(SignerState(), payout(60), replace(row_of(other), nonce=None))


def test_a_limit_is_the_same_after_a_restart_and_without_a_memory() -> None:
    rows = [row_of(payout(60, 7))]

    assert limited(SignerState(), payout(1), *rows)
    assert limited(signed(payout(60, 7)), payout(1), *rows)


def test_a_model_of_a_platform_pays_and_notices_what_is_missing() -> None:
    world, ledger = ModelChain(), ModelBooks()
    world.deposit(A, 100)
    ledger.read(world.view())
    signer = ModelSigner(world, ledger)
    assert signer.look()
    one = ledger.plan_withdrawal(ALICE, 40, 1, world.now_ms)
    request = signer.sign(one)
    assert request is not None
    assert world.execute(request)
    ledger.read(world.view())

    assert signer.look(), signer.findings
    assert (ledger.users[A], ledger.payouts) == (60, {})
    world.balance -= 1
    assert not signer.look()
    assert signer.sign(ledger.plan_withdrawal(ALICE, 10, 2, world.now_ms)) is None


def test_nothing_but_typed_errors_refuses_a_transfer() -> None:
    one = payout(10)
    odd = (replace(asked(one), nonce=-1), replace(asked(one), nonce=2**70), replace(asked(one), payout_id=""))

    for request in odd:
        with pytest.raises(AzuError):
            admit(SignerState(), books(payouts=(one,)), chain(), request, rules_of())


def test_what_a_replaced_key_sends_stops_nothing_hides_nothing_and_uses_up_no_limit() -> None:
    known = signed(payout(20))
    foreign = replace(row_of(payout(30)), is_former=True)
    rows = chain(foreign)
    found = looked(known, books(payouts=(payout(20),)), rows)
    assert (found.findings, found.state.halt) == ((), "")
    # It has the nonce of a transfer that may still come.
    assert waiting(known, rows) == known.signed
    limit = PayoutLimit(100, 100, 100)
    assert room(known, rows, PayoutKind.EARNINGS, limit).all_lamports == 80
    # What the replaced key sent for the books counts as before.
    before = chain(replace(row_of(payout(20)), is_former=True))
    assert waiting(known, before) == {}
    assert room(known, before, PayoutKind.EARNINGS, limit).all_lamports == 80

"""The books' process: the only one with rights on the ledger, which each caller reaches by its own calls."""

import asyncio
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from azu.auth.enrolment import Enrolment
from azu.auth.network_id import Succession
from azu.auth.tickets import EnrolmentCalls
from azu.clock import SteadyClock
from azu.errors import InternalError, JournalFault
from azu.metrics import Meter
from azu.money.bookkeeping import Bookkeeper
from azu.money.books import BooksCalls, BooksTerms
from azu.money.receipts import ReceiptKey
from azu.money.signer.calls import RemoteSigner
from azu.money.wire import Access, WireServer
from azu.supervision import Supervisor

# Who changes the journal is found out within this time.
_VERIFY_EVERY_S = 30.0
# Redis keeps the latest entries in memory; older ones lie in files.
_SEAL_EVERY_S = 10.0
_SEALED_AT_ONCE = 20_000
_CERTIFY_EVERY_S = 1.0
_DROP_KEYS_EVERY_S = 3600.0
_CHARGE_UNUSED_EVERY_S = 60.0

_READS = frozenset({"balance", "earnings", "ended", "findings", "loss", "totals", "uncredited", "withdrawal"})
# The calls that each caller may make.
ALLOWED: Mapping[str, frozenset[str]] = {
    "ingress": _READS
    | {"claim_earnings", "decision", "dispute"}
    | {"give_back", "give_fees_back", "key", "keys", "open_key", "paid", "price", "receipt_signature"}
    | {"reserve", "reserve_fetch", "revoke_key", "withdraw"},
    "scheduler": frozenset({"ended", "expire", "overdue", "settle", "totals"}),
    "treasury": frozenset(
        {"apply", "hear_time", "inside", "loss", "numbered", "open_payouts", "owed", "result"}
    ),
    "signer": frozenset({"view"}),
    "owner": _READS | {"audit", "command", "enrol_node", "head", "held", "open_payouts", "reversible"},
}


# An ingress passes on what nodes ask; only the owner, on the head, makes tickets.
_ENROLMENT: Mapping[str, frozenset[str]] = {
    "ingress": frozenset({"enrol", "renew", "set_payout"}),
    "owner": frozenset({"new_ticket", "tickets", "revoke_ticket"}),
}


def allowed_to(enrolment: Enrolment | None) -> Mapping[str, frozenset[str]]:
    """Return the calls that each caller may make, with those of enrolment where there is one."""
    if enrolment is None:
        return ALLOWED
    return {caller: verbs | _ENROLMENT.get(caller, frozenset()) for caller, verbs in ALLOWED.items()}


@dataclass(frozen=True, slots=True)
class BooksConfig:
    """What the books run with: their Redis, the platform's address, which key of it replaced which, and who
    may call them where.

    Entries that Redis need not keep any more lie in `folder`. The key in the file `receipt_key` signs
    receipts, once the signer has certified it. With `enrolment` they admit nodes.
    """

    redis_url: str = field(repr=False)
    folder: Path
    platform_address: str
    successions: tuple[Succession, ...]
    terms: BooksTerms
    access: Access
    receipt_key: Path
    signer_url: str = field(repr=False)
    enrolment: Enrolment | None = None


async def run(config: BooksConfig, *, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; call `ready` once, as soon as the ledger is open.

    The process waits for a Redis that is away. Raises InternalError when a loop cannot go on.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    receipts, signer = (
        ReceiptKey(config.receipt_key, config.platform_address),
        RemoteSigner(config.signer_url),
    )
    clock = SteadyClock()
    bookkeeper = Bookkeeper(
        config.redis_url,
        config.folder,
        config.platform_address,
        config.terms,
        successions=config.successions,
        receipts=receipts,
        now_ms=clock,
        hears=clock.hears,
    )
    server = WireServer(BooksCalls, bookkeeper, config.access.secrets, allowed_to(config.enrolment))
    if config.enrolment is not None:
        config.enrolment.pays = bookkeeper.enrol_node
        server.serve(EnrolmentCalls, config.enrolment)
    supervisor = Supervisor("books", Meter(), stop.set)

    async def opened() -> None:
        try:
            await bookkeeper.ledger()
        except JournalFault as error:
            # No wait mends it: `azu up` says so.
            raise InternalError(error.message, code=error.code) from error

    async def begin() -> None:
        await supervisor.insist("the ledger", opened)
        await supervisor.insist("the platform's keys", bookkeeper.note_successions)
        ready()
        supervisor.start("certificate", partial(receipts.have_certified, signer), every_s=_CERTIFY_EVERY_S)
        supervisor.start("verification", bookkeeper.verify, every_s=_VERIFY_EVERY_S)
        supervisor.start("old keys", bookkeeper.drop_unfunded_keys, every_s=_DROP_KEYS_EVERY_S)
        supervisor.start("unused models", bookkeeper.charge_unused, every_s=_CHARGE_UNUSED_EVERY_S)
        supervisor.start("seals", partial(bookkeeper.seal, _SEALED_AT_ONCE), every_s=_SEAL_EVERY_S)

    await server.start(config.access.port)
    beginning = asyncio.create_task(begin())
    try:
        await stop.wait()
    finally:
        beginning.cancel()
        await supervisor.stop()
        await server.close()
        await signer.close()
        await bookkeeper.close()
    if not supervisor.is_healthy:
        raise InternalError("a loop of the books cannot go on; its log says why")

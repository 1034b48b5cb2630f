"""The signer: looks at books and chain before each signature, and remembers in its file before it leaves."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from eth_account.signers.local import LocalAccount
from pydantic import TypeAdapter, ValidationError

from azu.addresses import parse_address
from azu.auth.signatures import AcceptLoss, command_of, sign_certificate
from azu.errors import ChainError, ConfigurationError, Forbidden, JournalFault, Unavailable
from azu.files import disk_errors, replacing, write_all
from azu.money.books import BooksCalls
from azu.money.chain.actions import sign_noop, sign_send_asset
from azu.money.chain.port import Chain
from azu.money.chain.rows import NONCE_AHEAD_MS
from azu.money.signer.account import PlatformAccount
from azu.money.signer.calls import SignerCalls, SignerStatus
from azu.money.signer.policy import (
    RED_AFTER,
    SignerState,
    SigningRules,
    accept,
    admit,
    burned,
    day_part,
    first_state,
    look,
    room,
    undecided,
    unexplained,
    unseen,
    void,
)
from azu.money.signer.views import BooksHead, BooksView, ChainView, PayoutKind, Room, TransferRequest

_LOG = logging.getLogger(__name__)
# The calls that each caller may make.
SIGNER_ALLOWED: Mapping[str, frozenset[str]] = {
    "treasury": frozenset({"noop", "room", "status", "transfer"}),
    "books": frozenset({"certify"}),
    "owner": frozenset({"accept", "status"}),
}
_STATE = TypeAdapter(SignerState)


class Signer(SignerCalls):
    """Carries out the calls of the signer, one after the other; `calls.py` describes them.

    `path` is the file of what it remembers. Raises ConfigurationError for a file that cannot be read.
    """

    def __init__(
        self, account: LocalAccount, chain: Chain, books: BooksCalls, rules: SigningRules, path: Path
    ) -> None:
        self._account = account
        self._chain = chain
        self._books = books
        self._rules = rules
        self._path = path
        self._platform = PlatformAccount(chain, rules.platforms)
        self._state = read_state(path) if path.exists() else None
        self._turn = asyncio.Lock()
        self._status = SignerStatus(("the signer has not seen books and chain yet",))
        self._looks_with_findings = 0

    async def look(self) -> None:
        """Look at books and chain, and use up the nonces of transfers that the books know no more."""
        async with self._turn:
            try:
                books, chain = await self._look()
            except JournalFault:
                return  # a finding
            for nonce, one in undecided(self._known, books, chain).items():
                if not one.burned_at_ms:
                    await self._burn(books, nonce, chain.now_ms)

    async def transfer(self, asked: TransferRequest) -> str:
        async with self._turn:
            books, chain = await self._agreeing()
            self._keep(admit(self._known, books, chain, asked, self._rules))
            _LOG.info("signed %s of %d lamports to %s", asked.payout_id, asked.lamports, asked.address)
            action = sign_send_asset(
                self._account,
                self._chain.network,
                destination=asked.address,
                lamports=asked.lamports,
                nonce=asked.nonce,
            )
        return action.body.decode()

    async def room(self) -> Room:
        async with self._turn:
            _, chain = await self._agreeing()
            kind = PayoutKind.WITHDRAWAL
            return room(self._known, chain, kind, self._rules.limits[kind])

    async def noop(self, nonce: int) -> str:
        async with self._turn:
            state = self._known
            books = await self._books.view(state.head.number, state.head.number, self._told)
            self._keep(void(state, books, nonce))
            return sign_noop(self._account, self._chain.network, nonce=nonce).body.decode()

    async def certify(self, address: str) -> str:
        async with self._turn:
            await self._agreeing()
            return sign_certificate(self._account, parse_address(address))

    async def status(self) -> SignerStatus:
        return self._status

    async def accept(self, text: str) -> None:
        command = command_of(text, self._rules.platforms, self._rules.admins)
        if not isinstance(command, AcceptLoss):
            raise Forbidden("no admin of this signer signed that a loss is accepted", code="no_admin")
        async with self._turn:
            now_ms = await self._chain.now_ms()
            if command.expires_at_ms <= now_ms:
                raise Forbidden("this command has expired", param="expires_at_ms", code="command_expired")
            if command.nonce > now_ms + NONCE_AHEAD_MS:
                # Else no command of the right time would count after it.
                raise Forbidden("this command is of a time to come", param="nonce", code="command_too_early")
            head = BooksHead(command.number, command.hash)
            books = await self._books.view(head.number, head.number, self._told)
            self._keep(accept(self._state or SignerState(), books, head, command.nonce, now_ms))
            _LOG.warning("an admin has accepted the books as they are at entry %d", head.number)

    @property
    def _known(self) -> SignerState:
        """What is remembered; raises Unavailable before the first look."""
        if self._state is None:
            raise Unavailable("the signer has not seen books and chain yet")
        return self._state

    async def _agreeing(self) -> tuple[BooksView, ChainView]:
        """Look at books and chain; raises Unavailable unless they agree."""
        try:
            views = await self._look()
        except JournalFault as error:
            raise Unavailable(f"nothing is signed: {error.message}", code="nothing_signed") from error
        if self._status.findings:
            reasons = "; ".join(self._status.findings)
            raise Unavailable(f"nothing is signed: {reasons}", code="nothing_signed")
        return views

    async def _look(self) -> tuple[BooksView, ChainView]:
        """Compare books, chain and memory, note what is found. Raises JournalFault, which is a finding."""
        number = 0 if self._state is None else self._state.head.number
        try:
            books = await self._view(number)
        except JournalFault as error:
            self._note((error.message,))
            raise
        # After the books: a credit or a payout that they show has its row by now, if it ever has one.
        chain = await self._platform.view(0 if self._state is None else self._state.matched_until_ms)
        state = first_state(books, chain) if self._state is None else self._state
        if hidden := unseen(state, books, chain):
            outgoing = (*chain.outgoing, *await self._platform.arrivals(hidden))
            chain = replace(chain, outgoing=outgoing)
        credits_, rows = unexplained(state, books, chain)
        held = chain.balance_lamports - books.owed_lamports - max(0, books.revenue_lamports)
        found = look(
            state,
            books,
            chain,
            shown=await self._platform.shown(credits_),
            excused=await self._platform.excused(rows, held),
        )
        self._keep(found.state)
        limits = self._rules.limits.items()
        parts = {str(kind): day_part(found.state, chain, kind, limit) for kind, limit in limits}
        self._note(found.findings, parts)
        return books, chain

    async def _view(self, number: int) -> BooksView:
        """Return the books with all credits after an entry."""
        books = await self._books.view(number, number, self._told)
        credits_ = books.credits
        while books.credits_until < books.head.number:
            books = await self._books.view(number, books.credits_until, self._told)
            credits_ += books.credits
        return replace(books, credits=credits_)

    @property
    def _told(self) -> tuple[str, ...]:
        """What the books show of this signer: why it signs nothing, once that stands."""
        return self._status.findings if self._status.is_red else ()

    async def _burn(self, books: BooksView, nonce: int, now_ms: int) -> None:
        """Use up a nonce on the chain; what has no answer is tried again at the next look."""
        self._keep(void(self._known, books, nonce))
        action = sign_noop(self._account, self._chain.network, nonce=nonce)
        try:
            refusal = await self._chain.post_action(action.body)
        except ChainError:
            return
        if refusal is None or refusal.nonce_used:
            self._keep(burned(self._known, nonce, now_ms))
            _LOG.warning("used up nonce %d, of a payout that the books do not have", nonce)

    def _note(self, findings: tuple[str, ...], day_parts: Mapping[str, float] | None = None) -> None:
        before = self._status
        self._looks_with_findings = self._looks_with_findings + 1 if findings else 0
        is_red = self._looks_with_findings >= RED_AFTER
        self._status = SignerStatus(findings, is_red, day_parts or before.day_parts)
        if self._status.is_red and (findings != before.findings or not before.is_red):
            _LOG.error("nothing is signed: %s", "; ".join(findings))
        elif before.is_red and not findings:
            _LOG.warning("books and chain agree: transfers are signed again")

    def _keep(self, state: SignerState) -> None:
        """Have the file say what is remembered from here on; raises Unavailable if it cannot."""
        if state == self._state:
            return
        keep_state(self._path, state)
        self._state = state


def keep_state(path: Path, state: SignerState) -> None:
    """Write the file of what a signer remembers; raises Unavailable if it cannot."""
    with disk_errors(path.parent), replacing(path, mode=0o600) as file:
        write_all(file, _STATE.dump_json(state))


def read_state(path: Path) -> SignerState:
    """Read the file of what a signer remembers; raises ConfigurationError."""
    try:
        return _STATE.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigurationError(
            f"{path} cannot be read; it says what was signed, so that nothing is paid twice: move it away "
            "only after `azu ledger audit` agrees with the chain"
        ) from error

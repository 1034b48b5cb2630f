"""API keys in the books: who has one, how many there may be, and what one may spend in a day."""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager

from azu.auth.key_records import CHALLENGE_TTL_S, ApiKey, key_id_of, key_record_is_signed, secret_digest
from azu.errors import Conflict, Forbidden, InsufficientBalance, NotFound, TransferConflict, Unauthenticated
from azu.money.books import BooksTerms, KeySpending
from azu.money.ledger.ledger import Ledger
from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import KeyOpened, KeyRevoked
from azu.units import hype_from_lamports


class Keys:
    """The keys that wallets signed for the platform at an address, as one ledger has them.

    azu/money/books.py says what each of the books' calls raises.
    """

    def __init__(
        self,
        ledger: Callable[[], Awaitable[Ledger]],
        platform: str,
        terms: BooksTerms,
        now_ms: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._platform = platform
        self._terms = terms
        self._now_ms = now_ms
        # Key id -> what is being reserved for it now, in lamports.
        self._reserving = Counter[str]()

    async def find(self, bearer: str) -> ApiKey:
        """Return the key of a bearer secret."""
        state, digest = (await self._ledger()).state, secret_digest(bearer)
        known = state.keys.get(key_id_of(digest))
        if known is None or known.digest != digest:
            raise Unauthenticated("this API key is unknown or revoked; `azu login` opens another")
        if known.expires_at_ms is not None and known.expires_at_ms <= self._now_ms():
            raise Unauthenticated("this API key has expired; `azu login` opens another")
        return _api_key(known)

    async def open(self, key: ApiKey) -> None:
        """Open a key, for which old ones make room."""
        ledger = await self._ledger()
        age_ms = self._now_ms() - key.created_at_ms
        if not key_record_is_signed(key, self._platform):
            raise Unauthenticated(f"the challenge was not signed by {key.address}")
        opened = KeyOpened(
            id=f"key:{key.key_id}",
            key_id=key.key_id,
            digest=key.digest,
            address=key.address,
            label=key.label,
            created_at_ms=key.created_at_ms,
            expires_at_ms=key.expires_at_ms,
            spend_limit_lamports=key.spend_limit_lamports,
            text=key.text,
            signature=key.signature,
        )
        if await ledger.result(opened.id) is None:
            # What was signed long ago may have been revoked since.
            if not -1000 * CHALLENGE_TTL_S < age_ms < 1000 * CHALLENGE_TTL_S:
                raise Unauthenticated("this challenge has expired; ask for a new one")
            await self._make_room(ledger, key.address)
        elif ledger.state.keys.get(key.key_id) is None:
            raise Conflict(f"{key.key_id} was revoked; make a new secret", code="key_exists")
        try:
            await ledger.apply(opened)
        except TransferConflict as error:
            message = f"{key.key_id} was opened before; make a new secret"
            raise Conflict(message, code="key_exists") from error

    async def revoke(self, bearer: str, key_id: str) -> None:
        """Revoke a key of the bearer's address."""
        mine, ledger = await self.find(bearer), await self._ledger()
        restricted = mine.expires_at_ms is not None or mine.spend_limit_lamports is not None
        if restricted and key_id != mine.key_id:
            message = "a key that expires or has a spend limit may only revoke itself"
            raise Forbidden(message, param="key_id")
        known = ledger.state.keys.get(key_id)
        if known is None or known.address != mine.address:
            raise NotFound(f"there is no key {key_id} of this address", param="key_id", code="key_not_found")
        await self._revoke([known])

    async def of(self, address: str) -> tuple[KeySpending, ...]:
        """Return an address's keys."""
        state = (await self._ledger()).state
        mine = [one for one in state.keys.values() if one.address == address]
        return tuple(
            KeySpending(
                _api_key(one),
                state.spent.get(one.key_id, 0),
                state.in_days(one.key_id, self._now_ms()),
            )
            for one in sorted(mine, key=lambda one: (one.created_at_ms, one.key_id))
        )

    async def drop_unfunded(self) -> None:
        """Revoke the keys of addresses that never had money, once they are old enough."""
        before_ms = self._now_ms() - self._terms.unfunded_key_ms
        old = [one for one in _unfunded((await self._ledger()).state) if one.created_at_ms <= before_ms]
        await self._revoke(old)

    @contextmanager
    def within_day(self, state: BooksState, key: ApiKey, lamports: int) -> Iterator[None]:
        """Raise InsufficientBalance where a key without a limit of its own would spend too much today."""
        most = self._terms.key_day_lamports
        spent = state.in_days(key.key_id, self._now_ms()) + self._reserving[key.key_id]
        if most is not None and key.spend_limit_lamports is None and spent + lamports > most:
            takes, left, limit = map(hype_from_lamports, (lamports, max(0, most - spent), most))
            raise InsufficientBalance(
                f"this may take {takes} HYPE; {left} of the {limit} HYPE that this key may spend today (UTC) "
                "are left",
                code="day_limit_reached",
            )
        self._reserving[key.key_id] += lamports
        try:
            yield
        finally:
            self._reserving[key.key_id] -= lamports
            if not self._reserving[key.key_id]:
                del self._reserving[key.key_id]

    async def _make_room(self, ledger: Ledger, address: str) -> None:
        """Drop keys that count no more, if there are as many as there may be; raises Forbidden."""
        state, most = ledger.state, self._terms.max_keys
        mine = [one for one in state.keys.values() if one.address == address]
        if len(mine) >= most:
            ended = [
                one for one in mine if one.expires_at_ms is not None and one.expires_at_ms <= self._now_ms()
            ]
            await self._revoke(ended)
            if not ended:
                raise Forbidden(
                    f"this address has {most} keys, which is all it may have (limits.max_keys); revoke one",
                    code="too_many_keys",
                )
        most = self._terms.max_unfunded_keys
        if address not in _funded(state) and len(_unfunded(state)) >= most:
            await self.drop_unfunded()
            if len(_unfunded(state)) >= most:
                raise Forbidden(
                    f"addresses that never had money have {most} keys, which is all they may have "
                    "(limits.max_unfunded_keys); deposit first",
                    code="too_many_unfunded_keys",
                )

    async def _revoke(self, keys: Iterable[KeyOpened]) -> None:
        ledger = await self._ledger()
        for one in keys:
            await ledger.apply(KeyRevoked(id=f"revoked:{one.key_id}", key_id=one.key_id))


def _unfunded(state: BooksState) -> list[KeyOpened]:
    """Return the keys, oldest first, that never spent, of addresses that are not funded."""
    funded = _funded(state)
    unused = (one for one in state.keys.values() if one.key_id not in state.spent)
    return sorted(
        (one for one in unused if one.address not in funded), key=lambda one: (one.created_at_ms, one.key_id)
    )


def _funded(state: BooksState) -> set[str]:
    """Return the addresses that have or earned money, or have nodes."""
    of_accounts = {parts[1] for account in state.balances if len(parts := account.split(":")) == 3}
    return of_accounts | {node.payout for node in state.nodes.values()}


def check_num_claims(state: BooksState, address: str, most: int) -> None:
    """Raise Forbidden where an address may not claim: addresses without money have made all that they may."""
    funded = _funded(state)
    if address not in funded and sum(one not in funded for one in state.claims) >= most:
        raise Forbidden(
            f"addresses that never had money have made {most} claims, which is all they may make "
            "(limits.max_unfunded_keys); lend first",
            code="too_many_claims",
        )


def _api_key(opened: KeyOpened) -> ApiKey:
    return ApiKey(
        key_id=opened.key_id,
        digest=opened.digest,
        address=opened.address,
        label=opened.label,
        created_at_ms=opened.created_at_ms,
        expires_at_ms=opened.expires_at_ms,
        spend_limit_lamports=opened.spend_limit_lamports,
    )

"""Which API keys are too many: those of one address, and those of all addresses that never had money."""

from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import KeyOpened


def ended_keys(state: BooksState, address: str, now_ms: int) -> list[KeyOpened]:
    """Return an address's keys whose end has come."""
    mine = (one for one in state.keys.values() if one.address == address)
    return [one for one in mine if one.expires_at_ms is not None and one.expires_at_ms <= now_ms]


def is_funded(state: BooksState, address: str) -> bool:
    """Whether an address has or earned money, or is to be paid."""
    return address in _funded(state)


def unfunded_keys(state: BooksState) -> list[KeyOpened]:
    """Return the keys, oldest first, that never spent, of addresses that are not funded."""
    funded = _funded(state)
    unused = (one for one in state.keys.values() if one.key_id not in state.spent)
    return sorted(
        (one for one in unused if one.address not in funded), key=lambda one: (one.created_at_ms, one.key_id)
    )


def _funded(state: BooksState) -> set[str]:
    of_accounts = {parts[1] for account in state.balances if len(parts := account.split(":")) == 3}
    return of_accounts | state.claims.keys() | {node.payout for node in state.nodes.values()}

"""What an account sets aside for a model that the network does not have yet, by the bytes that are fetched.

A fee is a reservation like a job's, under an id of its own. The first job of the model that is charged gives
it back; without one the platform gets it after a time.
"""

from collections.abc import Iterator

from azu.money.ledger.state import BooksState
from azu.money.ledger.transfers import Release, Reserve, Settle, is_fee
from azu.units import GIB


def fee_lamports(num_bytes: int, lamports_per_gib: int) -> int:
    """Return the fee for so many bytes, rounded up."""
    return -(-num_bytes * lamports_per_gib // GIB)


def fee(
    fetch_id: str, address: str, key_id: str, model_id: str, lamports: int, expires_at_ms: int
) -> Reserve:
    """Return what sets a fee aside: one token, as a reservation has it, for each lamport."""
    return Reserve(
        id=f"reserve:{fetch_id}",
        address=address,
        job_id=fetch_id,
        expires_at_ms=expires_at_ms,
        key_id=key_id,
        model_id=model_id,
        revision="",
        num_layers=1,
        lamports_per_token_layer=1,
        platform_percent=100,
        prompt_tokens=lamports,
        max_tokens=0,
    )


def open_fees(state: BooksState, model_id: str) -> list[Reserve]:
    """Return the fees that are set aside for a model."""
    return [one for one in fees(state) if one.model_id == model_id]


def ends(state: BooksState, now_ms: int) -> Iterator[Settle]:
    """Yield what charges the fees of models that were not used in time."""
    for one in fees(state):
        if one.expires_at_ms <= now_ms:
            yield Settle(
                id=f"settle:{one.job_id}",
                job_id=one.job_id,
                prompt_tokens=one.prompt_tokens,
                charged_lamports=one.lamports,
                platform_lamports=one.lamports,
                shares={},
            )


def given_back(hold: Reserve) -> Release:
    """Return what gives a fee back."""
    return Release(id=f"release:{hold.job_id}", job_id=hold.job_id)


def fees(state: BooksState) -> list[Reserve]:
    """Return all fees that are set aside."""
    return [one for one in state.reservations.values() if is_fee(one.job_id)]

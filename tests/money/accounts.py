"""Wallets of tests, and the signed records of the keys that they open."""

from dataclasses import replace

from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount

from azu.auth.key_records import ApiKey, key_id_of, key_text, secret_digest
from azu.clock import wall_clock_ms
from azu.money.books import BooksCalls
from azu.money.ledger.transfers import Deposit
from tests.money.serving import PLATFORM

USER: LocalAccount = Account.from_key("0x" + "05" * 32)
BEARER = "azu-sk-of-the-test"


def signed_key(
    account: LocalAccount = USER,
    bearer: str = BEARER,
    *,
    platform: str = PLATFORM,
    now_ms: int | None = None,
    label: str = "",
    expires_at_ms: int | None = None,
    spend_limit_lamports: int | None = None,
) -> ApiKey:
    """Return the record of a key with a secret, signed now by its address's wallet."""
    digest, at_ms = secret_digest(bearer), wall_clock_ms() if now_ms is None else now_ms
    address = account.address.lower()
    key = ApiKey(key_id_of(digest), digest, address, label, at_ms, expires_at_ms, spend_limit_lamports)
    text = key_text(key, platform, "azu.test", "0")
    signature = account.sign_message(encode_defunct(text=text)).signature.to_0x_hex()
    return replace(key, text=text, signature=signature)


async def fund(books: BooksCalls, lamports: int, account: LocalAccount = USER, tx_hash: str = "0x1") -> None:
    """Credit a deposit of a wallet."""
    address = account.address.lower()
    await books.apply(Deposit(id=f"deposit:{tx_hash}", address=address, lamports=lamports, at_ms=1))

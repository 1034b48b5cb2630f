"""Accounts: sign-in and API keys, deposits, balances, earnings and withdrawals."""

from pydantic import Field

from azu.api.base import RequestModel, ResponseModel
from azu.api.openai import Text
from azu.units import MAX_LAMPORTS

# The last second that a text can name (9999-12-31).
_LATEST_END_MS = 253_402_300_799_000
# A Lua script counts against the limit, and its numbers are doubles.
_LARGEST_LIMIT = 2**53
_MAX_NONCE = 2**63 - 1


class ChallengeRequest(RequestModel):
    """POST /v1/auth/challenge: which key shall be opened.

    The caller makes the key, `azu-sk-` and 32 random bytes in URL-safe base64, and sends its SHA-256 in hex.
    A key has no end and no spend limit unless the request gives one.
    """

    address: str = Field(max_length=64)
    key_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    label: Text = Field(default="", max_length=64)
    expires_at_ms: int | None = Field(default=None, ge=1, le=_LATEST_END_MS)
    spend_limit_lamports: int | None = Field(default=None, ge=0, le=_LARGEST_LIMIT)


class ChallengeResponse(ResponseModel):
    """A text (EIP-4361) that the address's wallet signs; `nonce` names it.

    The text names the platform, the key's hash and label, its limit and its end.
    """

    nonce: str
    message: str
    created_at_ms: int


class KeyRequest(RequestModel):
    """POST /v1/auth/keys: the wallet's signature (EIP-191, in hex) of a challenge's text."""

    nonce: str = Field(max_length=128)
    signature: str = Field(max_length=256)


class NewKey(ResponseModel):
    """A key that is open from now on. The network keeps only its hash, with the signature that opened it."""

    key_id: str
    address: str


class KeyLine(ResponseModel):
    """An API key without its secret. What is spent counts running jobs by the most they can cost.

    A key without a spend limit of its own may spend `day_limit_lamports` in a day (UTC), null for any amount.
    """

    key_id: str
    label: str
    created_at_ms: int
    expires_at_ms: int | None
    spend_limit_lamports: int | None
    spent_lamports: int | None
    day_limit_lamports: int | None = None
    spent_today_lamports: int = 0


class KeyList(ResponseModel):
    """The keys of one address, in the order in which they were opened."""

    data: tuple[KeyLine, ...]


class SuccessionLine(ResponseModel):
    """The platform `old` is `new` since then: both keys have signed it (EIP-191, in hex)."""

    old: str
    new: str
    by_old: str
    by_new: str


class Platform(ResponseModel):
    """Where deposits go: the platform's address on the chain at `chain_url`; `version` is azu's.

    A key without a spend limit of its own may spend `key_day_lamports` in a day (UTC), null for any amount.
    `network_id` is a hash of the address and of `authority`, the certificate (PEM) of the authority that
    signed the ingress's certificate; null without encryption, or where a public authority signed it. `nodes`
    is "encrypted", "local" where only the head's own machine lends, or "foreign" where azu did not start the
    Ray cluster. `successions` say which addresses the platform had before. `dashboard_url` is that of
    Ray's dashboard for the head's own machine, null without one. `hype_token` is the full id of HYPE on the
    chain, and with `is_mainnet` transfers are signed for the main one.
    """

    address: str
    chain_url: str
    version: str = ""
    network_id: str = ""
    authority: str | None = None
    nodes: str = ""
    key_day_lamports: int | None = None
    successions: tuple[SuccessionLine, ...] = ()
    dashboard_url: str | None = None
    hype_token: str = ""
    is_mainnet: bool = False


class DepositRequest(RequestModel):
    """POST /deposit. The hash says where to look; only the chain proves a deposit."""

    tx_sig: str = Field(max_length=128)
    user_address: str = Field(max_length=64)


class DepositState(ResponseModel):
    """`status` is "credited", or "pending" while the chain does not show the transfer."""

    status: str
    lamports: int
    transfer_id: str


class BalanceResponse(ResponseModel):
    """What an address may spend, what its running jobs hold, and what is on its way back to it."""

    address: str
    available_lamports: int
    reserved_lamports: int
    withdrawing_lamports: int = 0


class ClaimRequest(RequestModel):
    """POST /v1/earnings/claim. `signature` is the EIP-712 signature of the key's address."""

    signature: str = Field(max_length=256)


class ClaimedEarnings(ResponseModel):
    """The address that claimed its earnings."""

    address: str
    claimed: bool


class EarnedLine(ResponseModel):
    """What an address earned with a model in the hour that began at `at_ms`."""

    at_ms: int
    model_id: str
    lamports: int


class EarningsResponse(ResponseModel):
    """What an address earned by lending and has not received, what is on its way, and what was paid.

    The treasury pays nothing before the address has `claimed` its earnings. `by_hour` has the last days that
    were asked for, the latest first; it counts what a dispute gave back later.
    """

    address: str
    earned_lamports: int
    paying_lamports: int
    paid_lamports: int
    payout_threshold_lamports: int
    claimed: bool = False
    by_hour: tuple[EarnedLine, ...] = ()


class WithdrawalRequest(RequestModel):
    """POST /v1/withdrawals. `signature` is the EIP-712 signature of the key's address over the rest."""

    lamports: int = Field(ge=0, le=MAX_LAMPORTS)
    nonce: int = Field(ge=0, le=_MAX_NONCE)
    expires_at_ms: int = Field(ge=0, le=_MAX_NONCE)
    signature: str = Field(max_length=256)


class WithdrawalLine(ResponseModel):
    """`state` is "waiting", "sending", "paid", or "refused" for the `reason`."""

    nonce: int
    state: str
    reason: str | None

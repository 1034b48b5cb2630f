"""What the client returns: frozen values, read from the ingress's JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.errors import InternalError
from azu.metrics.activity import Activity

# A client may be older than the server: what it does not know yet is no error.
_LENIENT = ConfigDict(extra="ignore")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished text, what it took and what it cost; `texts` holds that of every choice."""

    text: str
    model: str
    job_id: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    charged_lamports: int
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Balance:
    """What an address may spend, what its running jobs hold, and what is being sent back to it."""

    __pydantic_config__ = _LENIENT

    address: str
    available_lamports: int
    reserved_lamports: int
    withdrawing_lamports: int = 0


@dataclass(frozen=True, slots=True)
class KeyLine:
    """An API key without its secret. `spent_lamports` counts running jobs by the most they can cost."""

    __pydantic_config__ = _LENIENT

    key_id: str
    label: str
    created_at_ms: int
    expires_at_ms: int | None
    spend_limit_lamports: int | None
    spent_lamports: int | None


@dataclass(frozen=True, slots=True)
class TicketLine:
    """A ticket without its secret, and the names of the nodes that it let in."""

    __pydantic_config__ = _LENIENT

    ticket_id: str
    label: str
    uses: int
    created_at_ms: int
    expires_at_ms: int
    revoked_at_ms: int | None
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NewTicket:
    """What a node has to know to get in: its secret is told once."""

    __pydantic_config__ = _LENIENT

    ticket_id: str
    url: str
    authority_sha256: str
    publicly_trusted: bool
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Platform:
    """Where deposits go: the platform's address on the chain at `chain_url`."""

    __pydantic_config__ = _LENIENT

    address: str
    chain_url: str


@dataclass(frozen=True, slots=True)
class DepositState:
    """`status` is "credited", or "pending" when the chain does not show the transfer yet."""

    __pydantic_config__ = _LENIENT

    status: str
    lamports: int
    transfer_id: str


@dataclass(frozen=True, slots=True)
class WithdrawalLine:
    """`state` is "waiting", "sending", "paid", or "refused" for the `reason`."""

    __pydantic_config__ = _LENIENT

    nonce: int
    state: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Earnings:
    """What an address earned by lending and has not got yet, what is on its way, and what was paid.

    Nothing is paid before the address has `claimed` it.
    """

    __pydantic_config__ = _LENIENT

    address: str
    earned_lamports: int
    paying_lamports: int
    paid_lamports: int
    payout_threshold_lamports: int
    claimed: bool = False


@dataclass(frozen=True, slots=True)
class PieceLine:
    """One piece of a topology: which node ran which layers [start, end) and experts."""

    __pydantic_config__ = _LENIENT

    node: str
    actor: str
    layers: tuple[int, int]
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReceiptLines:
    """A receipt as the ingress gives it."""

    __pydantic_config__ = _LENIENT

    job_id: str
    model_id: str
    prompt_tokens: int
    completion_tokens: int
    num_layers: int
    token_layers: int
    charged_lamports: int
    released_lamports: int
    platform_lamports: int
    worker_lamports: Mapping[str, int]
    transfer_id: str
    topology: tuple[PieceLine, ...]


@dataclass(frozen=True, slots=True)
class JobLine:
    """A job in a list."""

    __pydantic_config__ = _LENIENT

    job_id: str
    model: str
    status: str
    created_at_ms: int
    reserved_lamports: int
    finish_reason: str | None
    charged_lamports: int | None
    released_lamports: int | None
    error: Mapping[str, str | None] | None


@dataclass(frozen=True, slots=True)
class Results:
    """What a job has produced so far."""

    __pydantic_config__ = _LENIENT

    job_id: str
    status: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    error: Mapping[str, str | None] | None
    receipt: ReceiptLines | None = None


@dataclass(frozen=True, slots=True)
class NodeLine:
    """A node as `azu ps` shows it.

    `vram_free_bytes` is what may still be placed there, `vram_used_bytes` what azu's processes really hold
    (None if unknown), `vram_other_bytes` what other programs do; `load` is the busy part of the device.
    `bad_frames` counts what it sent and others refused.
    """

    __pydantic_config__ = _LENIENT

    node_id: str
    name: str
    payout_address: str
    state: str
    device: str
    vram_total_bytes: int
    vram_free_bytes: int
    cached_shards: int
    vram_used_bytes: int | None = None
    vram_other_bytes: int = 0
    load: float = 0.0
    bad_frames: int = 0


@dataclass(frozen=True, slots=True)
class DeploymentLine:
    """A deployed model as `azu ps` shows it."""

    __pydantic_config__ = _LENIENT

    model_id: str
    revision: str
    state: str
    epoch: int
    num_layers: int
    topology: tuple[PieceLine, ...]
    activity: Activity = field(default_factory=Activity)


@dataclass(frozen=True, slots=True)
class JobCounts:
    """Jobs of all users that have not ended: in their models, or waiting for them."""

    __pydantic_config__ = _LENIENT

    running: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Network:
    """Nodes and deployments, and the jobs on them."""

    __pydantic_config__ = _LENIENT

    nodes: tuple[NodeLine, ...]
    deployments: tuple[DeploymentLine, ...]
    jobs: JobCounts = field(default_factory=JobCounts)


@dataclass(frozen=True, slots=True)
class ModelState:
    """How far a model's cut is."""

    __pydantic_config__ = _LENIENT

    model_id: str
    revision: str | None
    state: str
    done_bytes: int
    total_bytes: int
    error: str | None


def read(kind: type[T], body: Any) -> T:
    """Return a value of a kind from parsed JSON; raises InternalError for an answer of another shape."""
    try:
        return TypeAdapter(kind).validate_python(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InternalError(f"the answer is no {kind.__name__}: {place}: {first['msg']}") from error

"""What one deployed model does, and how fast between two looks at it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field, IPvAnyAddress

from azu.api.base import _LENIENT


@dataclass(frozen=True, slots=True)
class TimeTotal:
    """How often something was measured, and its seconds in all."""

    count: int = 0
    seconds: float = 0.0

    def mean_s(self, since: "TimeTotal") -> float | None:
        """Return the mean of what was measured since then, None if nothing was."""
        count = self.count - since.count
        return (self.seconds - since.seconds) / count if count > 0 else None


@dataclass(frozen=True, slots=True)
class Activity:
    """A model's counters since the network's start, and its sequences and KV blocks now."""

    running_sequences: int = 0
    waiting_sequences: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    stalls: int = 0
    recoveries: int = 0
    time_to_first_token: TimeTotal = field(default_factory=TimeTotal)
    time_per_token: TimeTotal = field(default_factory=TimeTotal)
    hop: TimeTotal = field(default_factory=TimeTotal)


@dataclass(frozen=True, slots=True)
class TicketResponse:
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
class PieceLine:
    """One piece of a topology: which node ran which layers [start, end) and experts."""

    __pydantic_config__ = _LENIENT

    node: str
    actor: str
    layers: tuple[int, int]
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


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
class NetworkResponse:
    """Nodes and deployments, and the jobs on them."""

    __pydantic_config__ = _LENIENT

    nodes: tuple[NodeLine, ...]
    deployments: tuple[DeploymentLine, ...]
    jobs: JobCounts = field(default_factory=JobCounts)


@dataclass(frozen=True, slots=True)
class ModelStatusResponse:
    """How far a model's cut is."""

    __pydantic_config__ = _LENIENT

    model_id: str
    revision: str | None
    state: str
    done_bytes: int
    total_bytes: int
    error: str | None


@dataclass(frozen=True, slots=True)
class NodeAdmission:
    """A node's certificate (PEM), the token that opens the cluster, and where its head is ("host:port")."""

    __pydantic_config__ = ConfigDict(extra="ignore")

    certificate: str
    token: str = field(repr=False)
    head: str


class ShardRequest(BaseModel):
    """POST /models/shard."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model_id: str = Field(min_length=1, max_length=256)


_MAX_USES = 1000
_LONGEST_LIFE_S = 30 * 86_400
_MAX_PEM = 8192


class _NodeBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TicketRequest(_NodeBody):
    """POST /v1/nodes/tickets: `uses` is how many nodes it lets in."""

    label: str = Field(default="", max_length=64)
    uses: int = Field(default=1, ge=1, le=_MAX_USES)
    expires_in_s: int = Field(default=86_400, ge=1, le=_LONGEST_LIFE_S)


class EnrolRequest(_NodeBody):
    """POST /v1/nodes/enrol: `host` is the address at which other nodes reach this one."""

    secret: str = Field(pattern=r"^[0-9a-f]{64}$")
    name: str = Field(min_length=1, max_length=64)
    host: IPvAnyAddress
    request: str = Field(max_length=_MAX_PEM)


class RenewRequest(_NodeBody):
    """POST /v1/nodes/renew: `signature` is that of the certificate's key under `renewal_text`."""

    certificate: str = Field(max_length=_MAX_PEM)
    signed_at_ms: int
    signature: str = Field(max_length=256)

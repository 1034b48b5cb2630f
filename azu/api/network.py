"""The network: nodes, deployed models and what they do, cuts, and how a machine becomes a node."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, IPvAnyAddress

from azu.api.base import OrAbsent, RequestModel, ResponseModel
from azu.protocol.versions import Versions

_MAX_PEM = 8192
NodeName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")]


class Health(ResponseModel):
    """`status` is "ok", or "starting" while prompts cannot be served; `problems` says why where known."""

    status: str
    problems: tuple[str, ...] = ()


class PieceLine(ResponseModel):
    """One piece of a topology: the node that runs layers [start, end) and experts (layer -> expert ids).

    `node` is its name, which other nodes may have too. Receipts have no `node_id`.
    """

    node: str
    node_id: OrAbsent[str] = None
    actor: str
    layers: tuple[int, int]
    experts: Mapping[int, tuple[int, ...]] = Field(default_factory=dict)


class NodeLine(ResponseModel):
    """A node of the network.

    `vram_free_bytes` is what may still be placed there, `vram_used_bytes` what azu's processes hold (null if
    unknown), `vram_other_bytes` what other programs hold; `load` is the busy part of the device, 0 to 1.
    `links_s` is the one-way time to other nodes, by their ids.
    `bad_frames` counts the frames of this node that other nodes refused; `why_paused` is empty unless it is
    "paused".
    """

    node_id: str
    name: str
    payout_address: str
    state: str
    device: str
    vram_total_bytes: int
    vram_free_bytes: int
    vram_used_bytes: int | None = None
    vram_other_bytes: int = 0
    load: float = 0.0
    bad_frames: int = 0
    why_paused: str = ""
    links_s: Mapping[str, float] = Field(default_factory=dict)
    cached_shards: int


class TimeTotal(ResponseModel):
    """How often something was measured, and the sum of its seconds."""

    count: int = 0
    seconds: float = 0.0

    def mean_s(self, since: "TimeTotal") -> float | None:
        """Return the mean of what was measured since an earlier total, None if nothing was."""
        count = self.count - since.count
        return (self.seconds - since.seconds) / count if count > 0 else None


class Activity(ResponseModel):
    """A model's counters since the network's start, and its sequences and KV blocks now."""

    running_sequences: int = 0
    waiting_sequences: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    stalls: int = 0
    recoveries: int = 0
    time_to_first_token: TimeTotal = Field(default_factory=TimeTotal)
    time_per_token: TimeTotal = Field(default_factory=TimeTotal)
    hop: TimeTotal = Field(default_factory=TimeTotal)


class DeploymentLine(ResponseModel):
    """One deployment of a model: its state, its topology and what it does."""

    model_id: str
    revision: str
    state: str
    epoch: int
    num_layers: int
    activity: Activity = Field(default_factory=Activity)
    topology: tuple[PieceLine, ...]


class JobCounts(ResponseModel):
    """Jobs of all users that have not ended: running in a model, or waiting for one."""

    running: int = 0
    waiting: int = 0


class NetworkResponse(ResponseModel):
    """Nodes and deployments, the number of jobs on them, and what does not run as it should."""

    problems: tuple[str, ...] = ()
    jobs: JobCounts = Field(default_factory=JobCounts)
    nodes: tuple[NodeLine, ...]
    deployments: tuple[DeploymentLine, ...]


class LeaveResponse(ResponseModel):
    """`left` is true once the node holds nothing; until then the caller asks again."""

    name: str
    left: bool


class PauseResponse(ResponseModel):
    """Whether a node is `paused`; `empty` is true once it holds nothing, until then the caller asks again."""

    name: str
    paused: bool
    empty: bool = False


class OfferRequest(RequestModel):
    """POST /v1/nodes/offer: the device of a machine that may join. It needs no key."""

    vram_bytes: int = Field(gt=0, le=2**50)
    memory_bytes_per_s: float = Field(gt=0, le=1e15, allow_inf_nan=False)
    flops_per_s: float = Field(gt=0, le=1e18, allow_inf_nan=False)


class OfferedPiece(ResponseModel):
    """How many of a deployed model's layers a machine would hold."""

    model_id: str
    layers: int
    num_layers: int


class OfferResponse(ResponseModel):
    """What a machine would hold of the models that are deployed now, and what it could earn.

    `lamports_per_day` is what owners earned in the last days for each GiB that they lent for an hour, times
    the machine's memory and 24 hours: what it really earns depends on the prompts and on where they run.
    """

    pieces: tuple[OfferedPiece, ...]
    lamports_per_day: int


class ShardRequest(RequestModel):
    """POST /models/shard."""

    model_id: str = Field(min_length=1, max_length=256)


class ModelStatusResponse(ResponseModel):
    """How far the cut of a model is.

    `state` is "unknown", "described", "fetching", "cutting", "ready" or "failed". The bytes are those of the
    model's weights that are downloaded or cut so far.
    """

    model_id: str
    revision: str | None
    state: str
    done_bytes: int
    total_bytes: int
    error: str | None


class EnrolRequest(RequestModel):
    """POST /v1/nodes/enrol. `host` is the address at which other nodes reach this one; `request` is PEM."""

    secret: str = Field(pattern=r"^[0-9a-f]{64}$")
    name: NodeName
    host: IPvAnyAddress
    request: str = Field(max_length=_MAX_PEM)
    versions: Versions


class RenewRequest(RequestModel):
    """POST /v1/nodes/renew. The certificate's key signs `renewal_text(signed_at_ms)`."""

    certificate: str = Field(max_length=_MAX_PEM)
    signed_at_ms: int
    signature: str = Field(max_length=256)
    versions: Versions


class RestartRequest(RequestModel):
    """POST /v1/nodes/restart. The certificate's key signs `restart_text(name, signed_at_ms)`."""

    certificate: str = Field(max_length=_MAX_PEM)
    signed_at_ms: int
    signature: str = Field(max_length=256)
    name: NodeName


class RestartResponse(ResponseModel):
    """`turn` is true for one node at a time, which gives its pieces away, and has `left` without any."""

    turn: bool
    left: bool


class PayoutRequest(RequestModel):
    """POST /v1/nodes/payout. The certificate's key signs `payout_text` of what stands here.

    `work_bytes_per_s` is the most work that the node measured of itself, 0 if it measured nothing.
    """

    certificate: str = Field(max_length=_MAX_PEM)
    node_id: str = Field(pattern=r"^[0-9a-f]{56}$")
    payout: str = Field(max_length=64)
    name: NodeName
    work_bytes_per_s: int = Field(ge=0, le=2**62)
    signed_at_ms: int
    signature: str = Field(max_length=256)


class NodePayout(ResponseModel):
    """The address that is paid for a node's work."""

    node_id: str
    payout: str


class NodeAdmission(ResponseModel):
    """A node's certificate and the nodes' authority (PEM), the cluster's token, the head's "host:port"."""

    certificate: str
    authority: str
    token: str = Field(repr=False)
    head: str

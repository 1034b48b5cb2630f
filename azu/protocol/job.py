"""A job, its tokens and its outcome, as Redis keeps them, and what a run of it hands back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import ConfigDict

from azu.errors import AzuError
from azu.protocol.node import Node
from azu.protocol.phase import JobPhase
from azu.protocol.sampling import SamplingParams
from azu.protocol.topology import ExpertSet, Piece, Stage

ChoiceKey = tuple[str, int]  # job id, the number of the choice
# Stands in for a node, where work is the platform's: no node has such an id.
PLATFORM_NODE = "platform"


class JobState(StrEnum):
    """QUEUED and RUNNING jobs hold a reservation; the others are final and their money is settled."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words; CANCELLED and ERROR are azu's."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Job:
    """One paid prompt. `reserved_lamports` is the highest price of all its `choices` together.

    `key_id` names the API key that asked; empty for jobs of long ago.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    job_id: str
    address: str
    model_id: str
    revision: str
    num_layers: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    reserved_lamports: int
    created_at_ms: int
    choices: int = 1
    key_id: str = ""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one of a job's choices, in order.

    `index` is the number of tokens of all choices that were written before. `logprobs` and `top_logprobs`
    (token id and log probability, best first) are parallel to `token_ids` when the job asked for them, else
    empty. With a `finish_reason` the choice has ended, and `work` maps layer -> node id -> parameter bytes
    that the node activated for it. `error` is why a choice ended with ERROR; that end is never written, and
    neither is `prompt_tokens_ran`, how many prompt tokens of a choice that was cancelled ran.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    choice: int = 0
    finish_reason: FinishReason | None = None
    work: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    error: AzuError | None = None
    prompt_tokens_ran: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """One line of a receipt's topology: which node ran which layers and experts in which actor."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    node: str
    actor: str
    layers: tuple[int, int]
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Receipt:
    """The cost of a job and the workers' shares; the amounts sum exactly.

    charged = platform + held + sum of workers; charged + released = reserved. `worker_lamports` is keyed by
    payout address. `held_lamports` is the part of the workers' shares whose owner is unknown. The tokens are
    those that are charged: charged = token_layers * lamports_per_token_layer.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    job_id: str
    address: str
    model_id: str
    revision: str
    prompt_tokens: int
    completion_tokens: int
    num_layers: int
    lamports_per_token_layer: int
    charged_lamports: int
    released_lamports: int
    platform_lamports: int
    worker_lamports: Mapping[str, int]
    transfer_id: str
    topology: tuple[Placement, ...] = ()
    held_lamports: int = 0

    @property
    def token_layers(self) -> int:
        """Tokens times layers, the unit of the price."""
        return (self.prompt_tokens + self.completion_tokens) * self.num_layers


@dataclass(frozen=True, slots=True)
class JobEnding:
    """How a job ended, beside its money; the books keep it with the entry that ends the job's reservation."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    state: JobState
    finish_reason: FinishReason
    error: Mapping[str, str | None] | None = None
    topology: tuple[Placement, ...] = ()


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """The last event of a job's stream, as the books have the job's end."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    state: JobState
    finish_reason: FinishReason
    receipt: Receipt
    error: Mapping[str, str | None] | None = None


JobEvent = TokenEvent | JobOutcome


@dataclass(frozen=True, slots=True)
class JobRun:
    """What a job's sequences did until they ended, and where.

    `work` maps layer -> node id -> parameter bytes activated for tokens that are charged, as the pipeline
    counted it; PLATFORM_NODE has what a router and an expert set do not agree about. `prompt_tokens_ran`
    counts the prompt tokens that ran, each once however often it ran. `placements` are the receipt's lines.
    """

    completion_tokens: int
    finish_reason: FinishReason
    work: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    error: AzuError | None = None
    placements: tuple[Placement, ...] = ()
    prompt_tokens_ran: int = 0


@dataclass(frozen=True, slots=True)
class PauseReport:
    """A pipeline that pauses: how many steps it has completed, and what was under way when it stopped.

    `under_way` has the tokens that ran so far of each choice that had a step in flight.
    """

    num_completed: int
    under_way: Mapping[ChoiceKey, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PipelineLook:
    """What a pipeline does at one moment, for the watchdog.

    `num_completed` counts the steps that came back, replays included; `step_s` is what its last ones took.
    `moved` has a number for each of its jobs that changes whenever the job comes further; those in `no_room`
    wait for blocks of the KV cache. `is_computing` says whether a piece is in a step. `phases` has the jobs
    without a token and those that wait.
    """

    num_completed: int
    step_s: float
    moved: Mapping[str, int] = field(default_factory=dict)
    no_room: frozenset[str] = frozenset()
    is_computing: bool = False
    phases: Mapping[str, JobPhase] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """What stands of a model: `state` is "running", "slow", "broken" or "deploying".

    A slow pipeline has a piece that comes on slower than expected; it serves.

    The other fields are empty while the model is being deployed. `node_ids` are those of the `placements`,
    whose nodes have names that others may have too.
    """

    model_id: str
    revision: str
    state: str
    epoch: int = 0
    num_layers: int = 0
    placements: tuple[Placement, ...] = ()
    node_ids: tuple[str, ...] = ()


def placements(pieces: Iterable[tuple[Piece, str]], nodes: Mapping[str, Node]) -> tuple[Placement, ...]:
    """Return a line for each piece and its actor's name: stages in order, then expert sets."""
    return tuple(
        Placement(node=nodes[piece.node_id].name, actor=actor, layers=_layers(piece), experts=piece.experts)
        for piece, actor in sorted(pieces, key=lambda one: _place(one[0]))
    )


def node_ids(pieces: Iterable[Piece]) -> tuple[str, ...]:
    """Return the ids of the nodes of `placements`, in the same order."""
    return tuple(piece.node_id for piece in sorted(pieces, key=_place))


def _place(piece: Piece) -> tuple[bool, int]:
    return isinstance(piece, ExpertSet), piece.index


def _layers(piece: Piece) -> tuple[int, int]:
    """Return the span of layers that a piece runs; that of an expert set is empty."""
    if isinstance(piece, Stage):
        return piece.span.start, piece.span.end
    return min(piece.experts), min(piece.experts)

"""The messages of one engine step: the batch for the stages and the result of the last one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from azu.protocol.sampling import SamplingParams
from azu.protocol.versions import Versions, own_versions


@dataclass(frozen=True, slots=True)
class Slice:
    """The tokens of one sequence in one step.

    `position` is the position of its first token. `block_ids` is the sequence's whole block table, which the
    scheduler allocates for all stages. `sample` asks for a new token after the slice's last token.
    `sequence_length` counts all known tokens of the sequence: some families compute positions from it.
    """

    sequence_id: int
    position: int
    num_tokens: int
    block_ids: tuple[int, ...]
    sample: bool
    sequence_length: int = 0


@dataclass(frozen=True, slots=True)
class OpenedSequence:
    """The facts of a sequence that the last stage needs before its first sample; no token is among them.

    The draws depend on `draw_key`, which stands for prompt and seed. `num_generated` completion tokens exist
    already, when a sequence continues. The `stop_token_ids` of its sampling hold every token that may end it.
    """

    sequence_id: int
    sampling: SamplingParams
    draw_key: int = 0
    num_generated: int = 0


@dataclass(frozen=True, slots=True)
class SeenTokens:
    """The tokens of a sequence that its penalties look at, for the last stage alone.

    `prompt_token_ids` is empty where they look at the completion only.
    """

    sequence_id: int
    prompt_token_ids: tuple[int, ...]
    generated: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SequenceFault:
    """What went wrong with one sequence in a step, which ends it: an error's code and message.

    With a `node_id` that node computed values that are not finite, in a layer, from values that were.
    """

    sequence_id: int
    code: str
    message: str
    node_id: str | None = None
    layer: int = 0


@dataclass(frozen=True, slots=True)
class ExpertWork:
    """What one holder of experts ran of a step in a MoE layer with distributed experts, as the router says.

    `expert_set` is the holder's index in the topology, None for the router's own stage. `choices` has the
    number of choices, of all tokens of a sequence together, by sequence id.
    """

    layer: int
    expert_set: int | None
    choices: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Replay:
    """Consecutive stages, `first` to `last`, that were lost and have to fill their KV caches again.

    The stage before them sends its hidden states again. No token is sampled, and `last` sends nothing on.
    """

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step for every stage: the slices, in the order of their rows in the frame beside it.

    `token_ids` holds the tokens of all slices for the first stage and is empty after it.
    Every stage may drop its state of the sequences in `closed`. Stages add to `expert_work` on the way, and
    move a sequence that fails from `slices` to `faults`.
    A step with a `replay` runs only on that replay's stages. `most_tokens` is set when a stage had no memory
    for the whole step: the largest part that the stage with the least memory ran at once. `versions` are
    those of the pipeline.
    """

    epoch: int
    step: int
    micro_batch: int
    slices: tuple[Slice, ...]
    token_ids: tuple[int, ...] = ()
    opened: tuple[OpenedSequence, ...] = ()
    closed: tuple[int, ...] = ()
    expert_work: tuple[ExpertWork, ...] = ()
    faults: tuple[SequenceFault, ...] = ()
    replay: Replay | None = None
    most_tokens: int | None = None
    versions: Versions = field(default_factory=own_versions)

    @property
    def num_tokens(self) -> int:
        """The number of rows of the step's hidden states."""
        return sum(slice_.num_tokens for slice_ in self.slices)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A new token of a sequence. `top_logprobs` holds (token id, log probability), best first."""

    sequence_id: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """The last stage's result for the pipeline: token ids, never hidden states.

    `faults` are the sequences that failed in any stage. `most_tokens` is the batch's, None when every stage
    ran the step whole. `stopped_at` is the stage in which every sequence of the step failed, so that it sent
    the result in place of the last one. `versions` are those of the stage that sends it.
    """

    epoch: int
    step: int
    micro_batch: int
    tokens: tuple[SampledToken, ...] = ()
    faults: tuple[SequenceFault, ...] = ()
    expert_work: tuple[ExpertWork, ...] = ()
    most_tokens: int | None = None
    stopped_at: int | None = None
    versions: Versions = field(default_factory=own_versions)


class PieceState(StrEnum):
    """An IDLE piece has no step, a BUSY one computes, a WAITING one waits for another piece in its step."""

    IDLE = "idle"
    BUSY = "busy"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class PieceProgress:
    """How far a stage or an expert set is, as it says itself while it computes.

    `step` is the step that it runs or ran last, `num_layers` counts the layers that it has run. `expected_s`
    is how long such a step may take after recent ones, None before the first. Recent steps take `slowdown`
    times as long as the quickest ones did.
    """

    step: int
    num_layers: int
    state: PieceState
    expected_s: float | None = None
    slowdown: float = 1.0

    @property
    def count(self) -> tuple[int, int]:
        """What changes as long as the piece comes on."""
        return self.step, self.num_layers

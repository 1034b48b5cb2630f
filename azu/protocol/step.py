"""The messages of one engine step: what goes into the first stage and what leaves the last."""

from dataclasses import dataclass

from azu.protocol.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Slice:
    """The tokens of one sequence in one step.

    `position` is that of its first token; `block_ids` its whole block table, allocated centrally, so that
    every stage uses the same one. `sample` asks for a new token after the slice's last one.
    `sequence_length` counts all tokens known of the sequence: some families place each one by it.
    """

    sequence_id: int
    position: int
    num_tokens: int
    block_ids: tuple[int, ...]
    sample: bool
    sequence_length: int = 0


@dataclass(frozen=True, slots=True)
class OpenedSequence:
    """What the last stage has to know of a sequence before its first sample.

    `generated` holds the completion tokens that exist already, when a sequence is resumed.
    """

    sequence_id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    generated: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertWork:
    """Parameter bytes that one node activated for one sequence in a MoE layer whose experts are spread."""

    sequence_id: int
    layer: int
    node_id: str
    activated_bytes: int


@dataclass(frozen=True, slots=True)
class Replay:
    """Neighbouring stages, `first` to `last`, that were lost and have to fill their KV caches again.

    The stage before them sends what it sent before; nothing is sampled, and nothing leaves `last`.
    """

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step for every stage: the slices, in the order of their rows in the frame beside it.

    `token_ids` holds the tokens of all slices for the first stage and is empty after it.
    `closed` names sequences whose state every stage may drop. `expert_work` grows on the way.
    A step with a `replay` goes through its stages only. `most_tokens` is what the tightest stage ran at once,
    when memory ran out and it ran the step in parts.
    """

    epoch: int
    step: int
    micro_batch: int
    slices: tuple[Slice, ...]
    token_ids: tuple[int, ...] = ()
    opened: tuple[OpenedSequence, ...] = ()
    closed: tuple[int, ...] = ()
    expert_work: tuple[ExpertWork, ...] = ()
    replay: Replay | None = None
    most_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """Rows of the step's hidden states."""
        return sum(piece.num_tokens for piece in self.slices)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A new token of a sequence. `top_logprobs` holds (token id, log probability), best first."""

    sequence_id: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the last stage of a step tells the pipeline: token ids only, never hidden states.

    `most_tokens` is the step's, None when every stage ran it whole.
    """

    epoch: int
    step: int
    micro_batch: int
    tokens: tuple[SampledToken, ...]
    expert_work: tuple[ExpertWork, ...] = ()
    most_tokens: int | None = None

"""One prompt and what has become of it, as the scheduler sees it. No torch here."""

from collections.abc import Callable
from enum import StrEnum

from azu.protocol.sampling import SamplingParams


class SequenceState(StrEnum):
    """WAITING sequences hold no blocks, RUNNING ones do, FINISHED ones until their last step is back."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A sequence of tokens that grows; its KV lives in `block_ids`, the same on every stage.

    `generated` holds completion tokens that exist already when a sequence is taken over. Of its tokens,
    `num_scheduled` were sent to the first stage since it last held blocks, and `num_ran` is the most that
    ever were: what lies below that is computed again and counts for nobody. `ends_with` is told every
    completion token once, in order, and says whether the text ends with it.
    """

    def __init__(
        self,
        sequence_id: int,
        prompt_token_ids: tuple[int, ...],
        sampling: SamplingParams,
        generated: tuple[int, ...] = (),
        ends_with: Callable[[int], bool] | None = None,
    ) -> None:
        assert prompt_token_ids, "an empty prompt has nothing to continue"
        self.sequence_id = sequence_id
        self.sampling = sampling
        self._ends_with = ends_with
        self.num_prompt = len(prompt_token_ids)
        self.token_ids = [*prompt_token_ids, *generated]
        self.state = SequenceState.WAITING
        self.block_ids: list[int] = []
        self.num_scheduled = 0
        self.num_ran = 0
        self.steps_in_flight = 0
        for token_id in generated:
            self.ends_with(token_id)

    @property
    def generated(self) -> tuple[int, ...]:
        """The completion so far."""
        return tuple(self.token_ids[self.num_prompt :])

    @property
    def num_generated(self) -> int:
        """How many completion tokens there are."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that are known and not scheduled: none while the next one is awaited."""
        return len(self.token_ids) - self.num_scheduled

    @property
    def is_decoding(self) -> bool:
        """Whether all but the newest token are scheduled."""
        return self.num_pending <= 1

    def ends_with(self, token_id: int) -> bool:
        """Say whether the text ends with its next token."""
        return self._ends_with is not None and self._ends_with(token_id)

    @property
    def max_length(self) -> int:
        """The most tokens that ever lie in the KV cache: the last one sampled never does."""
        return self.num_prompt + self.sampling.max_tokens - 1

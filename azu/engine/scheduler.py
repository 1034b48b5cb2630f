"""Continuous batching: which tokens of which sequences run in the next step. No torch, clock or randomness.

The scheduler allocates KV blocks once for all stages. A sequence takes blocks as it grows. When no block is
free, the youngest sequence is preempted: it gives its blocks back and is computed again later. Enough
micro-batches are in flight to keep every stage busy; stages run them in order, so that the chunks of one
prompt may follow each other closely.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from azu.errors import Unavailable
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import Slice

# A step with fewer tokens takes a stage almost the same time.
_MIN_CHUNK_TOKENS = 64
# After so many short steps the limit doubles: the memory that was missing may be free again.
_SHORT_STEPS = 128


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The limits of a scheduler.

    The smallest stage has `num_blocks` blocks of `block_size` tokens. A step carries at most
    `prefill_chunk_tokens` prompt tokens. At most `max_running` sequences hold blocks, and `micro_batches`
    steps are in flight: one per stage if None.
    """

    num_blocks: int
    block_size: int
    prefill_chunk_tokens: int = 256
    max_running: int = 64
    micro_batches: int | None = None


class SequenceState(StrEnum):
    """WAITING sequences hold no blocks, RUNNING ones do, FINISHED ones until their last step is back."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A prompt and its completion, which grows. Its KV is in the blocks `block_ids`, the same on every stage.

    `generated` holds completion tokens that exist already when a new pipeline continues a sequence.
    `num_scheduled` of its tokens were sent to the first stage since it last got blocks. `num_ran` is the
    largest number that ever ran: tokens below it that run again are not paid for. `ends_with` gets every
    completion token once, in order, and says whether the text ends with it. One in the background comes after
    all others.
    """

    def __init__(
        self,
        sequence_id: int,
        prompt_token_ids: tuple[int, ...],
        sampling: SamplingParams,
        generated: tuple[int, ...] = (),
        ends_with: Callable[[int], bool] | None = None,
        *,
        is_background: bool = False,
    ) -> None:
        assert prompt_token_ids, "an empty prompt has nothing to continue"
        self.sequence_id = sequence_id
        self.sampling = sampling
        self._ends_with = ends_with
        self.is_background = is_background
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
        """The number of completion tokens."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that are known and not scheduled: none while the next token is being computed."""
        return len(self.token_ids) - self.num_scheduled

    @property
    def is_decoding(self) -> bool:
        """Whether all but the newest token are scheduled."""
        return self.num_pending <= 1

    def ends_with(self, token_id: int) -> bool:
        """Add the next token to the text and say whether the text ends with it."""
        return self._ends_with is not None and self._ends_with(token_id)

    @property
    def max_length(self) -> int:
        """The largest number of its tokens in the KV cache: the last sampled token never gets there."""
        return self.num_prompt + self.sampling.max_tokens - 1


class BatchScheduler:
    """Serves sequences in order of arrival; a step decodes what it can and then adds prompt tokens."""

    def __init__(self, config: SchedulerConfig, num_stages: int, restart_length: int | None = None) -> None:
        """A sequence longer than `restart_length` is computed anew and shares no step with shorter ones."""
        self.micro_batches = config.micro_batches or num_stages
        self._config = config
        self._restart_length = restart_length
        self._long_step = False
        self._limit = config.num_blocks
        self._longest_step = config.prefill_chunk_tokens + config.max_running
        self._most_tokens = self._longest_step
        self._short_steps = 0
        self._free = list(range(config.num_blocks - 1, -1, -1))
        # The oldest first, those in the background last.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self.num_preempted = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences that hold no blocks yet, and preempted ones; the next one first."""
        return tuple(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises Unavailable when it is too long to run even alone."""
        if self._blocks_for(sequence.max_length) > self._limit:
            capacity = self._limit * self._config.block_size
            raise Unavailable(
                f"the prompt and its completion need {sequence.max_length} tokens of KV cache, "
                f"this deployment has {capacity}",
                code="insufficient_kv_cache",
            )
        _append(self._waiting, sequence)

    def set_num_stages(self, num_stages: int) -> None:
        """Keep another number of stages busy, unless the config sets the number of micro-batches."""
        self.micro_batches = self._config.micro_batches or num_stages

    def limit(self, num_blocks: int) -> int:
        """Refuse sequences from now on that are too long for `num_blocks` blocks alone.

        Return the number of blocks that the sequences accepted before need: at least `num_blocks`.
        """
        living = [*self._waiting, *self._running]
        longest = max((self._blocks_for(sequence.max_length) for sequence in living), default=0)
        self._limit = max(num_blocks, longest)
        return self._limit

    def resize(self, num_blocks: int) -> None:
        """Change the number of blocks, to no less than `limit` returned; nothing may be in flight.

        A sequence that loses a block is computed again: the oldest first, the youngest wait.
        """
        for sequence in self._running:
            assert not sequence.steps_in_flight, "rewind() comes first"
            if max(sequence.block_ids, default=-1) >= num_blocks:
                sequence.block_ids.clear()
                sequence.num_scheduled = 0
                self.num_preempted += 1
        held = {block for sequence in self._running for block in sequence.block_ids}
        self._free = [block for block in range(num_blocks - 1, -1, -1) if block not in held]
        self._config = replace(self._config, num_blocks=num_blocks)
        self._limit = num_blocks

    def shorten_steps(self, most_tokens: int) -> None:
        """Limit steps to `most_tokens` tokens for a while: a stage had no memory for more."""
        self._most_tokens = max(1, min(self._most_tokens, most_tokens))
        self._short_steps = _SHORT_STEPS

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence; its blocks become free when none of its slices is in flight."""
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
        sequence.state = SequenceState.FINISHED
        if not sequence.steps_in_flight:
            self._release(sequence)

    def extend(self, sequence: Sequence, token_id: int) -> None:
        """Append the next token to a sequence."""
        sequence.token_ids.append(token_id)
        if self._restart_length is not None and len(sequence.token_ids) == self._restart_length + 1:
            # Its KV has the positions of a short sequence; the same blocks are written again.
            sequence.num_scheduled = 0

    def slice_returned(self, sequence: Sequence) -> None:
        """Record that a slice of a sequence came back from the last stage."""
        sequence.steps_in_flight -= 1
        if sequence.state is SequenceState.FINISHED and not sequence.steps_in_flight:
            self._release(sequence)

    def rewind(self, sequence: Sequence, position: int) -> None:
        """Set a sequence back to `position`, because its slices in flight will never return.

        From 0 the whole sequence is computed again; its blocks are written a second time.
        """
        sequence.steps_in_flight = 0
        if sequence.state is SequenceState.FINISHED:
            self._release(sequence)
        sequence.num_scheduled = min(sequence.num_scheduled, position)

    def replays(self, sequences: Iterable[Sequence]) -> Iterator[tuple[tuple[Sequence, Slice], ...]]:
        """Yield steps that run the cached tokens of some sequences again, in chunks as of prefills."""
        chunk: list[tuple[Sequence, Slice]] = []
        room = whole = min(self._config.prefill_chunk_tokens, self._most_tokens)
        for sequence in sorted(sequences, key=self._is_long):
            position = 0
            while position < sequence.num_scheduled:
                if chunk and (not room or self._is_long(chunk[-1][0]) is not self._is_long(sequence)):
                    yield tuple(chunk)
                    chunk, room = [], whole
                num_tokens = min(room, sequence.num_scheduled - position)
                chunk.append((sequence, _slice_of(sequence, position, num_tokens, sample=False)))
                position += num_tokens
                room -= num_tokens
        if chunk:
            yield tuple(chunk)

    def next_slices(self, only: Sequence | None = None) -> list[tuple[Sequence, Slice]]:
        """Choose the next micro-batch; it is empty when nothing can run before another step returns.

        With `only` it has no other sequence.
        """
        self._admit()
        pending = [one for one in self._running if one.num_pending and only in (None, one)]
        for ready in self._step_groups(pending):
            decodes = self._decodes(ready)
            wanted = [*decodes, *self._prefills(ready, max(1, self._most_tokens - len(decodes)))]
            slices = ((sequence, self._slice(sequence, num_tokens)) for sequence, num_tokens in wanted)
            if chosen := [(sequence, slice_) for sequence, slice_ in slices if slice_ is not None]:
                self._restore_step_length()
                return chosen
        return []

    def _admit(self) -> None:
        committed = sum(self._blocks_for(len(one.token_ids)) - len(one.block_ids) for one in self._running)
        while self._waiting and len(self._running) < self._config.max_running:
            needed = self._blocks_for(len(self._waiting[0].token_ids))
            if committed + needed > len(self._free) and self._running:
                return
            committed += needed
            sequence = self._waiting.pop(0)
            sequence.state = SequenceState.RUNNING
            _append(self._running, sequence)

    def _step_groups(self, ready: list[Sequence]) -> Iterator[list[Sequence]]:
        """Yield groups that may share a step: sequences up to the restart length and longer ones, in turns.

        The second group runs when no sequence of the first gets blocks.
        """
        if self._restart_length is None:
            yield ready
            return
        for _ in range(2):
            self._long_step = not self._long_step
            yield [sequence for sequence in ready if self._is_long(sequence) is self._long_step]

    def _restore_step_length(self) -> None:
        if self._short_steps:
            self._short_steps -= 1
            if not self._short_steps:
                self._most_tokens = min(2 * self._most_tokens, self._longest_step)
                self._short_steps = _SHORT_STEPS if self._most_tokens < self._longest_step else 0

    def _decodes(self, ready: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Return this step's share of the decoding sequences; even shares keep all micro-batches short."""
        decoding = sum(sequence.is_decoding for sequence in self._running)
        share = min(-(-decoding // self.micro_batches), self._most_tokens)
        return [(sequence, 1) for sequence in ready if sequence.is_decoding][:share]

    def _prefills(self, ready: list[Sequence], most_tokens: int) -> list[tuple[Sequence, int]]:
        """Share out a step's prompt tokens: at least half for the oldest prompt, then the shortest ones.

        After two prompts, another one joins only when all of it fits: a part would delay their first tokens.
        """
        prefilling = [sequence for sequence in ready if not sequence.is_decoding]
        budget = min(self._prefill_budget(prefilling), most_tokens)
        others = sum(sequence.num_pending for sequence in prefilling[1:])
        shares: list[tuple[Sequence, int]] = []
        limit = max(budget // 2, budget - others, 1)
        for sequence in prefilling[:1] + sorted(prefilling[1:], key=_urgency):
            num_tokens = min(_chunk(sequence), limit, budget)
            if num_tokens <= 0 or (len(shares) > 1 and num_tokens < sequence.num_pending):
                break
            shares.append((sequence, num_tokens))
            budget -= num_tokens
            limit = budget
        return shares

    def _prefill_budget(self, prefilling: list[Sequence]) -> int:
        """Return the prompt tokens of a step: few enough that there are steps for the other stages too."""
        share = -(-sum(sequence.num_pending for sequence in prefilling) // self.micro_batches)
        return min(self._config.prefill_chunk_tokens, max(share, _MIN_CHUNK_TOKENS))

    def _slice(self, sequence: Sequence, num_tokens: int) -> Slice | None:
        """Give a running sequence blocks for up to `num_tokens` more tokens, as far as blocks are free."""
        if sequence.state is not SequenceState.RUNNING:
            return None  # it was preempted for an older one
        missing = self._blocks_for(sequence.num_scheduled + num_tokens) - len(sequence.block_ids)
        while missing > len(self._free) and self._preempt_after(sequence):
            pass
        sequence.block_ids += [self._free.pop() for _ in range(min(missing, len(self._free)))]
        room = len(sequence.block_ids) * self._config.block_size - sequence.num_scheduled
        num_tokens = min(num_tokens, room)
        if num_tokens <= 0:
            return None
        position = sequence.num_scheduled
        sequence.num_scheduled += num_tokens
        sequence.steps_in_flight += 1
        return _slice_of(sequence, position, num_tokens, sample=sequence.num_pending == 0)

    def _preempt_after(self, sequence: Sequence) -> bool:
        """Preempt the youngest sequence after this one that has no slice in flight; say if there was one."""
        for victim in reversed(self._running[self._running.index(sequence) + 1 :]):
            if victim.block_ids and not victim.steps_in_flight:
                self._running.remove(victim)
                self._release(victim)
                victim.state = SequenceState.WAITING
                victim.num_scheduled = 0
                self.num_preempted += 1
                self._waiting.insert(0 if not victim.is_background else _num_users(self._waiting), victim)
                return True
        return False

    def _is_long(self, sequence: Sequence) -> bool:
        return self._restart_length is not None and len(sequence.token_ids) > self._restart_length

    def _release(self, sequence: Sequence) -> None:
        self._free += reversed(sequence.block_ids)
        sequence.block_ids.clear()

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)


def _num_users(sequences: list[Sequence]) -> int:
    """Return how many of some sequences, which come first, are not in the background."""
    return bisect_left(sequences, True, key=lambda one: one.is_background)


def _append(sequences: list[Sequence], sequence: Sequence) -> None:
    sequences.insert(len(sequences) if sequence.is_background else _num_users(sequences), sequence)


def _urgency(sequence: Sequence) -> tuple[bool, int]:
    return sequence.is_background, sequence.num_pending


def _slice_of(sequence: Sequence, position: int, num_tokens: int, *, sample: bool) -> Slice:
    return Slice(
        sequence_id=sequence.sequence_id,
        position=position,
        num_tokens=num_tokens,
        block_ids=tuple(sequence.block_ids),
        sample=sample,
        sequence_length=len(sequence.token_ids),
    )


def _chunk(sequence: Sequence) -> int:
    """Return how many tokens may run at once: a chunk is either all computed again or all new."""
    again = sequence.num_ran - sequence.num_scheduled
    return min(sequence.num_pending, again) if again > 0 else sequence.num_pending

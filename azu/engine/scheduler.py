"""Continuous batching: which sequences run which tokens in the next step. No torch, clock or chance here.

Blocks of KV are allocated here, once for all stages. A sequence takes blocks as it grows; when there are none
left the youngest gives its own back and is computed again later. As many micro-batches are in flight as keep
every stage busy; stages run them in order, so that the chunks of one prompt may follow each other closely.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from azu.errors import Unavailable
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import Slice


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


# A step of fewer tokens takes a stage hardly less time.
_LEAST_CHUNK_TOKENS = 64
# After so many short steps they may be twice as long again: whoever took the memory may have given it back.
_SHORT_STEPS = 128


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How much runs at once.

    `num_blocks` of `block_size` tokens is what the smallest stage has. A step carries at most
    `prefill_chunk_tokens` tokens of prompts; `max_running` sequences hold blocks at once; `micro_batches`
    steps are in flight, one per stage if None.
    """

    num_blocks: int
    block_size: int
    prefill_chunk_tokens: int = 256
    max_running: int = 64
    micro_batches: int | None = None


class BatchScheduler:
    """First come, first served; a step decodes for all sequences it can and prefills with what is left."""

    def __init__(self, config: SchedulerConfig, num_stages: int, restart_length: int | None = None) -> None:
        """A sequence past `restart_length` is computed anew and shares no step with shorter ones."""
        self.micro_batches = config.micro_batches or num_stages
        self._config = config
        self._restart_length = restart_length
        self._long_step = False
        self._limit = config.num_blocks
        self._longest_step = config.prefill_chunk_tokens + config.max_running
        self._most_tokens = self._longest_step
        self._short_steps = 0
        self._free = list(range(config.num_blocks - 1, -1, -1))
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first
        self.num_preempted = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks yet, or no longer."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises Unavailable when it could not run even alone."""
        if self._blocks_for(sequence.max_length) > self._limit:
            capacity = self._limit * self._config.block_size
            raise Unavailable(
                f"the prompt and its completion need {sequence.max_length} tokens of KV cache, "
                f"this deployment has {capacity}",
                code="insufficient_kv_cache",
            )
        self._waiting.append(sequence)

    def follow(self, num_stages: int) -> None:
        """Keep another number of stages busy, unless the config says how many steps are in flight."""
        self.micro_batches = self._config.micro_batches or num_stages

    def limit(self, num_blocks: int) -> int:
        """Take no sequence from now on that would not run in `num_blocks` alone.

        Returns how many blocks are needed all the same, for those that were taken before.
        """
        living = [*self._waiting, *self._running]
        longest = max((self._blocks_for(sequence.max_length) for sequence in living), default=0)
        self._limit = max(num_blocks, longest)
        return self._limit

    def resize(self, num_blocks: int) -> None:
        """Have more or fewer blocks, at least those that `limit` returned; nothing may be in flight.

        Whoever holds a block that is gone is computed again: the oldest first, the youngest wait.
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
        """Have steps of at most `most_tokens` for a while: that is what a stage had memory for."""
        self._most_tokens = max(1, min(self._most_tokens, most_tokens))
        self._short_steps = _SHORT_STEPS

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out; its blocks are free once nothing of it is in flight."""
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
        sequence.state = SequenceState.FINISHED
        if not sequence.steps_in_flight:
            self._release(sequence)

    def extend(self, sequence: Sequence, token_id: int) -> None:
        """Give a sequence its next token."""
        sequence.token_ids.append(token_id)
        if self._restart_length is not None and len(sequence.token_ids) == self._restart_length + 1:
            # What is cached was placed as in a short sequence; its blocks are written again.
            sequence.num_scheduled = 0

    def returned(self, sequence: Sequence) -> None:
        """Take a slice of a sequence back from the last stage."""
        sequence.steps_in_flight -= 1
        if sequence.state is SequenceState.FINISHED and not sequence.steps_in_flight:
            self._release(sequence)

    def rewind(self, sequence: Sequence, position: int) -> None:
        """Take a sequence back to `position`, because what is in flight of it will never return.

        At 0 all of it is computed again; its blocks are written a second time.
        """
        sequence.steps_in_flight = 0
        if sequence.state is SequenceState.FINISHED:
            self._release(sequence)
        sequence.num_scheduled = min(sequence.num_scheduled, position)

    def replays(self, sequences: Iterable[Sequence]) -> Iterator[tuple[tuple[Sequence, Slice], ...]]:
        """Yield steps that run again what is in the KV cache of some sequences, in chunks like prefills."""
        chunk: list[tuple[Sequence, Slice]] = []
        room = whole = min(self._config.prefill_chunk_tokens, self._most_tokens)
        for sequence in sorted(sequences, key=self._is_long):
            position = 0
            while position < sequence.num_scheduled:
                if chunk and (not room or self._is_long(chunk[-1][0]) is not self._is_long(sequence)):
                    yield tuple(chunk)
                    chunk, room = [], whole
                num_tokens = min(room, sequence.num_scheduled - position)
                chunk.append((sequence, _piece(sequence, position, num_tokens, sample=False)))
                position += num_tokens
                room -= num_tokens
        if chunk:
            yield tuple(chunk)

    def next_slices(self) -> list[tuple[Sequence, Slice]]:
        """Choose the next micro-batch; empty when nothing can run before something returns."""
        self._admit()
        for ready in self._kinds([sequence for sequence in self._running if sequence.num_pending]):
            decodes = self._decodes(ready)
            wanted = [*decodes, *self._prefills(ready, max(1, self._most_tokens - len(decodes)))]
            pieces = ((sequence, self._slice(sequence, num_tokens)) for sequence, num_tokens in wanted)
            if chosen := [(sequence, piece) for sequence, piece in pieces if piece is not None]:
                self._lengthen_steps()
                return chosen
        return []

    def _admit(self) -> None:
        committed = sum(self._blocks_for(len(one.token_ids)) - len(one.block_ids) for one in self._running)
        while self._waiting and len(self._running) < self._config.max_running:
            needed = self._blocks_for(len(self._waiting[0].token_ids))
            if committed + needed > len(self._free) and self._running:
                return
            committed += needed
            sequence = self._waiting.popleft()
            sequence.state = SequenceState.RUNNING
            self._running.append(sequence)

    def _kinds(self, ready: list[Sequence]) -> Iterator[list[Sequence]]:
        """Yield those that may share a step: past the restart length or not, in turns.

        The second kind is for when nothing of the first finds room.
        """
        if self._restart_length is None:
            yield ready
            return
        for _ in range(2):
            self._long_step = not self._long_step
            yield [sequence for sequence in ready if self._is_long(sequence) is self._long_step]

    def _lengthen_steps(self) -> None:
        if self._short_steps:
            self._short_steps -= 1
            if not self._short_steps:
                self._most_tokens = min(2 * self._most_tokens, self._longest_step)
                self._short_steps = _SHORT_STEPS if self._most_tokens < self._longest_step else 0

    def _decodes(self, ready: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Return an even share of the decoding sequences, so that no micro-batch waits for another."""
        decoding = sum(sequence.is_decoding for sequence in self._running)
        share = min(-(-decoding // self.micro_batches), self._most_tokens)
        return [(sequence, 1) for sequence in ready if sequence.is_decoding][:share]

    def _prefills(self, ready: list[Sequence], most_tokens: int) -> list[tuple[Sequence, int]]:
        """Share a step's prompt tokens out: at least half to the oldest prompt, then short ones first.

        A step that reads a short one to its end takes no part of another long one: it would come back later.
        """
        prefilling = [sequence for sequence in ready if not sequence.is_decoding]
        budget = min(self._prefill_budget(prefilling), most_tokens)
        others = sum(sequence.num_pending for sequence in prefilling[1:])
        shares: list[tuple[Sequence, int]] = []
        limit = max(budget // 2, budget - others, 1)
        for sequence in prefilling[:1] + sorted(prefilling[1:], key=lambda one: one.num_pending):
            num_tokens = min(_chunk(sequence), limit, budget)
            if num_tokens <= 0 or (len(shares) > 1 and num_tokens < sequence.num_pending):
                break
            shares.append((sequence, num_tokens))
            budget -= num_tokens
            limit = budget
        return shares

    def _prefill_budget(self, prefilling: list[Sequence]) -> int:
        """Return a step's prompt tokens: few enough that no stage waits while another reads all of them."""
        share = -(-sum(sequence.num_pending for sequence in prefilling) // self.micro_batches)
        return min(self._config.prefill_chunk_tokens, max(share, _LEAST_CHUNK_TOKENS))

    def _slice(self, sequence: Sequence, num_tokens: int) -> Slice | None:
        """Give a running sequence blocks for more tokens, as many as there is room for."""
        if sequence.state is not SequenceState.RUNNING:
            return None  # it made room for an older one
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
        return _piece(sequence, position, num_tokens, sample=sequence.num_pending == 0)

    def _preempt_after(self, sequence: Sequence) -> bool:
        """Take the blocks of the youngest sequence after this one that has nothing in flight."""
        for victim in reversed(self._running[self._running.index(sequence) + 1 :]):
            if victim.block_ids and not victim.steps_in_flight:
                self._running.remove(victim)
                self._release(victim)
                victim.state = SequenceState.WAITING
                victim.num_scheduled = 0
                self.num_preempted += 1
                self._waiting.appendleft(victim)
                return True
        return False

    def _is_long(self, sequence: Sequence) -> bool:
        return self._restart_length is not None and len(sequence.token_ids) > self._restart_length

    def _release(self, sequence: Sequence) -> None:
        self._free += reversed(sequence.block_ids)
        sequence.block_ids.clear()

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)


def _piece(sequence: Sequence, position: int, num_tokens: int, *, sample: bool) -> Slice:
    return Slice(
        sequence_id=sequence.sequence_id,
        position=position,
        num_tokens=num_tokens,
        block_ids=tuple(sequence.block_ids),
        sample=sample,
        sequence_length=len(sequence.token_ids),
    )


def _chunk(sequence: Sequence) -> int:
    """Return what may run at once: a chunk is either all computed again or all new."""
    again = sequence.num_ran - sequence.num_scheduled
    return min(sequence.num_pending, again) if again > 0 else sequence.num_pending

"""The scheduler with a simulated engine: no block has two sequences, and no sequence starves."""

from collections import deque

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from azu.engine.scheduler import BatchScheduler, SchedulerConfig, Sequence
from azu.errors import Unavailable
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import Slice

_Step = list[tuple[Sequence, Slice]]


def _sequence(sequence_id: int, prompt: int, max_tokens: int) -> Sequence:
    return Sequence(sequence_id, tuple(range(1, prompt + 1)), SamplingParams(max_tokens=max_tokens))


class _Engine:
    """Simulates the stages: runs steps in order and checks what every stage relies on."""

    def __init__(self, config: SchedulerConfig, restart_length: int | None = None) -> None:
        self.config = config
        self.scheduler = BatchScheduler(config, num_stages=1, restart_length=restart_length)
        self.in_flight: deque[_Step] = deque()
        self.cached: dict[int, list[tuple[int, int]]] = {}  # slot -> (sequence, position) of its last write
        self.restart_length = restart_length
        self.steps = 0

    def send(self) -> bool:
        if len(self.in_flight) >= self.scheduler.micro_batches:
            return False
        step = self.scheduler.next_slices()
        if step:
            self._compute(step)
            self.in_flight.append(step)
            self.steps += 1
        return bool(step)

    def take(self) -> None:
        for sequence, slice_ in self.in_flight.popleft():
            self.scheduler.slice_returned(sequence)
            sequence.num_ran = max(sequence.num_ran, slice_.position + slice_.num_tokens)
            if slice_.sample and sequence.state == "running":
                self.scheduler.extend(sequence, 7)
                if sequence.num_generated == sequence.sampling.max_tokens:
                    self.scheduler.finish(sequence)

    def _compute(self, step: _Step) -> None:
        blocks = [block for _, slice_ in step for block in slice_.block_ids]
        assert len(blocks) == len(set(blocks)), "a block belongs to one sequence"
        assert len({sequence.sequence_id for sequence, _ in step}) == len(step)
        prefill = sum(slice_.num_tokens for _, slice_ in step if slice_.num_tokens > 1)
        assert prefill <= max(self.config.prefill_chunk_tokens, 1)
        if self.restart_length is not None:
            assert len({slice_.sequence_length > self.restart_length for _, slice_ in step}) == 1
        for sequence, slice_ in step:
            slots = [
                block * self.config.block_size + offset
                for block in slice_.block_ids
                for offset in range(self.config.block_size)
            ]
            for position in range(slice_.position):
                owner = self.cached[slots[position]]
                assert owner == (sequence.sequence_id, position), "the cached tokens are still in their slots"
            for position in range(slice_.position, slice_.position + slice_.num_tokens):
                self.cached[slots[position]] = (sequence.sequence_id, position)

    def run_all(self, limit: int = 5_000) -> None:
        for _ in range(limit):
            while self.send():
                pass
            if not self.in_flight:
                return
            self.take()
        raise AssertionError("the sequences do not end")


_JOBS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12)


@settings(max_examples=150)
@given(
    jobs=_JOBS,
    num_blocks=st.integers(11, 40),
    chunk=st.integers(1, 40),
    micro_batches=st.integers(1, 3),
    max_running=st.integers(1, 6),
    restart_length=st.one_of(st.none(), st.integers(1, 30)),
)
# The turn of short sequences, for which no block is free: the long one has to run meanwhile.
@example(jobs=[(18, 9), (6, 12)], num_blocks=11, chunk=3, micro_batches=1, max_running=2, restart_length=17)
def test_every_sequence_ends_and_every_block_becomes_free(
    jobs: list[tuple[int, int]],
    num_blocks: int,
    chunk: int,
    micro_batches: int,
    max_running: int,
    restart_length: int | None,
) -> None:
    config = SchedulerConfig(num_blocks, 4, chunk, max_running, micro_batches)
    engine = _Engine(config, restart_length)
    sequences = [_sequence(index, *job) for index, job in enumerate(jobs)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
        engine.send()

    engine.run_all()

    assert all(sequence.num_generated == sequence.sampling.max_tokens for sequence in sequences)
    assert engine.scheduler.num_free_blocks == num_blocks


@settings(max_examples=100)
@given(jobs=_JOBS, cancelled=st.sets(st.tuples(st.integers(0, 11), st.integers(0, 20))), data=st.data())
def test_cancelled_sequences_free_their_blocks(
    jobs: list[tuple[int, int]], cancelled: set[tuple[int, int]], data: st.DataObject
) -> None:
    engine = _Engine(SchedulerConfig(16, 4, 8, 6, 2))
    sequences = [_sequence(index, *job) for index, job in enumerate(jobs)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    for step in range(21):
        engine.send()
        for index, when in cancelled:
            if when == step and index < len(sequences) and sequences[index].state != "finished":
                engine.scheduler.finish(sequences[index])
        if engine.in_flight and data.draw(st.booleans()):
            engine.take()

    engine.run_all()

    assert engine.scheduler.num_free_blocks == 16


def test_a_sequence_that_could_never_run_is_refused() -> None:
    scheduler = BatchScheduler(SchedulerConfig(num_blocks=4, block_size=4), num_stages=1)

    scheduler.add(_sequence(1, prompt=10, max_tokens=7))  # 16 tokens in the cache
    with pytest.raises(Unavailable, match="17 tokens"):
        scheduler.add(_sequence(2, prompt=10, max_tokens=8))


def test_decodes_share_a_step_with_a_prompt_in_chunks() -> None:
    engine = _Engine(SchedulerConfig(64, 4, prefill_chunk_tokens=8))
    engine.scheduler.add(_sequence(1, prompt=3, max_tokens=9))
    engine.send()
    engine.take()
    engine.scheduler.add(_sequence(2, prompt=20, max_tokens=9))

    engine.send()

    sizes = {slice_.sequence_id: slice_.num_tokens for _, slice_ in engine.in_flight[0]}
    assert sizes == {1: 1, 2: 8}


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    engine = _Engine(SchedulerConfig(1024, 4, prefill_chunk_tokens=32))
    for index in range(8):
        engine.scheduler.add(_sequence(index, prompt=200, max_tokens=4))
    for _ in range(3):
        engine.send()
        engine.take()
    short = _sequence(9, prompt=10, max_tokens=4)
    engine.scheduler.add(short)

    engine.send()
    sizes = [slice_.num_tokens for _, slice_ in engine.in_flight[0]]
    engine.take()

    assert short.num_generated == 1
    assert sizes == [16, 10], "a part of a third prompt would only delay the short one"


def test_a_single_prompt_is_cut_into_chunks_for_all_stages() -> None:
    engine = _Engine(SchedulerConfig(64, 16, prefill_chunk_tokens=256, micro_batches=2))
    engine.scheduler.add(_sequence(1, prompt=300, max_tokens=2))

    sizes = []
    while engine.send():
        sizes.append(engine.in_flight[-1][0][1].num_tokens)
        if len(engine.in_flight) == 2:
            engine.take()

    # A step of fewer than 64 tokens costs as much as one of 64.
    assert sizes == [150, 75, 64, 11]


def test_the_oldest_prompt_gets_half_of_every_step() -> None:
    engine = _Engine(SchedulerConfig(1024, 4, prefill_chunk_tokens=32))
    engine.scheduler.add(_sequence(0, prompt=200, max_tokens=4))
    for index in range(1, 9):
        engine.scheduler.add(_sequence(index, prompt=20, max_tokens=4))

    engine.send()

    sizes = {slice_.sequence_id: slice_.num_tokens for _, slice_ in engine.in_flight[0]}
    assert sizes[0] == 16


def test_chunks_of_one_prompt_are_in_flight_together() -> None:
    engine = _Engine(SchedulerConfig(64, 4, prefill_chunk_tokens=8, micro_batches=3))
    engine.scheduler.add(_sequence(1, prompt=20, max_tokens=2))

    while engine.send():
        pass

    assert [step[0][1].num_tokens for step in engine.in_flight] == [8, 8, 4]
    assert [step[0][1].sample for step in engine.in_flight] == [False, False, True]


def test_decoding_sequences_are_split_evenly_over_micro_batches() -> None:
    engine = _Engine(SchedulerConfig(64, 4, prefill_chunk_tokens=64, micro_batches=2))
    for index in range(8):
        engine.scheduler.add(_sequence(index, prompt=2, max_tokens=9))
    for _ in range(6):
        while engine.send():
            pass
        engine.take()

    while engine.send():
        pass

    assert [len(step) for step in engine.in_flight] == [4, 4]


def test_the_youngest_is_preempted_when_no_block_is_free() -> None:
    engine = _Engine(SchedulerConfig(num_blocks=4, block_size=4, prefill_chunk_tokens=16))
    old, young = _sequence(1, prompt=7, max_tokens=6), _sequence(2, prompt=7, max_tokens=6)
    for sequence in (old, young):
        engine.scheduler.add(sequence)
    for _ in range(3):
        engine.send()
        engine.take()

    assert old.state == "running"
    assert young.state == "waiting"
    assert engine.scheduler.num_preempted == 1
    engine.run_all()
    assert young.num_generated == 6


def test_steps_are_short_for_a_while_after_a_stage_ran_out_of_memory() -> None:
    engine = _Engine(SchedulerConfig(num_blocks=4096, block_size=16, prefill_chunk_tokens=256))
    for index in range(60):
        engine.scheduler.add(_sequence(index, prompt=1000, max_tokens=2))

    def largest_of(num_steps: int) -> int:
        sizes = []
        for _ in range(num_steps):
            assert engine.send()
            sizes.append(sum(slice_.num_tokens for _, slice_ in engine.in_flight[-1]))
            engine.take()
        return max(sizes)

    assert largest_of(4) > 128
    engine.scheduler.shorten_steps(100)
    assert largest_of(128) == 100
    assert 100 < largest_of(128) <= 200
    assert largest_of(20) > 200


def test_a_sequence_in_the_background_waits_behind_all_others_and_gives_its_blocks_to_them() -> None:
    engine = _Engine(SchedulerConfig(4, 4, max_running=2))
    background = Sequence(9, (1,) * 6, SamplingParams(max_tokens=6), is_background=True)
    engine.scheduler.add(background)
    for sequence_id in (1, 2):
        engine.scheduler.add(_sequence(sequence_id, 3, 2))
    assert engine.send()
    assert background.state == "waiting", "the others took both places, although they came later"
    while background.state != "running":
        engine.take()
        engine.send()
    engine.scheduler.add(long := _sequence(3, 3, 12))
    while long.state != "finished":
        engine.take() if engine.in_flight else None
        engine.send()

    assert engine.scheduler.num_preempted == 1
    while background.state != "finished":
        engine.take() if engine.in_flight else None
        engine.send()
    assert background.num_generated == 6

"""The engine's pipeline with simulated stages: tokens, work, cancelled sequences and lost stages."""

from dataclasses import replace

import pytest

from azu.engine.accounting import Work
from azu.engine.pipeline import EnginePipeline
from azu.engine.scheduler import SchedulerConfig, Sequence
from azu.engine.stage_contract import BadFrame
from azu.protocol.job import FinishReason, TokenEvent
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import ExpertWork, Replay, SampledToken, SeenTokens, StepBatch, StepResult
from azu.protocol.topology import ExpertSet, LayerSpan, Stage
from azu.protocol.versions import Versions
from azu.units import MIB
from tests import builders

_EOS = 2


def _pipeline(num_blocks: int = 64, **scheduling: int) -> EnginePipeline:
    structure = builders.structure(4)
    topology = builders.topology({"a": (0, 4)})
    return EnginePipeline(structure, topology, SchedulerConfig(num_blocks, 4, **scheduling), (_EOS,))


def _add(pipeline: EnginePipeline, sequence_id: int = 1, prompt: int = 3, **sampling: object) -> None:
    params = SamplingParams(**{"max_tokens": 4, **sampling})  # type: ignore[arg-type]
    pipeline.add(Sequence(sequence_id, tuple(range(10, 10 + prompt)), params))


def _answer(batch: StepBatch, token: int = 9, **given: object) -> StepResult:
    tokens = tuple(SampledToken(slice_.sequence_id, token) for slice_ in batch.slices if slice_.sample)
    return replace(StepResult(batch.epoch, batch.step, batch.micro_batch, tokens), **given)  # type: ignore[arg-type]


def _next(pipeline: EnginePipeline) -> StepBatch:
    batch = pipeline.next_batch()
    assert batch is not None
    return batch


def _run(pipeline: EnginePipeline, token: int = 9) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while pipeline.num_sequences:
        events += pipeline.complete(_answer(_next(pipeline), token)).values()
    return events


def test_a_sequence_delivers_its_tokens_and_ends_at_its_limit() -> None:
    pipeline = _pipeline()
    _add(pipeline, max_tokens=3)

    events = _run(pipeline)

    assert [event.token_ids for event in events] == [(9,)] * 3
    assert [event.finish_reason for event in events] == [None, None, FinishReason.LENGTH]
    assert pipeline.num_free_blocks == 64


def test_eos_is_delivered_and_ends_the_sequence() -> None:
    pipeline = _pipeline()
    _add(pipeline)

    (event,) = _run(pipeline, token=_EOS)

    assert event.token_ids == (_EOS,)
    assert event.finish_reason is FinishReason.STOP


def test_a_sequence_is_opened_with_every_token_that_may_end_it() -> None:
    pipeline = _pipeline()
    _add(pipeline, stop_token_ids=(30,))

    assert _next(pipeline).opened[0].sampling.stop_token_ids == (30, _EOS)


def test_steps_have_the_tokens_of_their_slices() -> None:
    pipeline = _pipeline(prefill_chunk_tokens=2)
    _add(pipeline, prompt=3)
    batches = []
    while pipeline.num_sequences:
        batches.append(_next(pipeline))
        pipeline.complete(_answer(batches[-1]))

    assert [batch.token_ids for batch in batches] == [(10, 11), (12,), (9,), (9,), (9,)]
    assert [batch.slices[0].position for batch in batches] == [0, 2, 3, 4, 5]


def test_only_penalties_have_the_last_stage_see_tokens_and_no_step_carries_them_past_the_first() -> None:
    seen = {}
    for name, value in {"repetition_penalty": 1.2, "presence_penalty": 1.0, "temperature": 1.0}.items():
        pipeline = _pipeline()
        sampling = SamplingParams(max_tokens=9, seed=7, stop=("secret",), **{name: value})  # type: ignore[arg-type]
        pipeline.add(Sequence(1, (1000, 1001), sampling, generated=(2000,)))
        batch = _next(pipeline)
        seen[name] = pipeline.seen_by(batch)
        after = repr(replace(batch, token_ids=()))
        assert not [word for word in ("1000", "1001", "2000", "secret", "seed=7") if word in after]

    assert seen == {
        "repetition_penalty": (SeenTokens(1, (1000, 1001), (2000,)),),
        "presence_penalty": (SeenTokens(1, (), (2000,)),),
        "temperature": (),
    }


def test_a_step_that_a_loss_took_back_is_not_waited_for() -> None:
    pipeline = _two_stages()
    _add(pipeline, prompt=3)
    batch = _next(pipeline)
    assert pipeline.waits_for(batch)

    pipeline.suspend()

    assert not pipeline.waits_for(batch)


def test_a_sequence_is_opened_once_and_closed_with_the_next_step() -> None:
    pipeline = _pipeline()
    _add(pipeline, 1, max_tokens=1)
    first = _next(pipeline)
    pipeline.complete(_answer(first))
    _add(pipeline, 2, max_tokens=2)
    second = _next(pipeline)
    pipeline.complete(_answer(second))
    third = _next(pipeline)

    assert [one.sequence_id for one in first.opened] == [1]
    assert [one.sequence_id for one in second.opened] == [2]
    assert second.closed == (1,)
    assert (third.opened, third.closed) == ((), ())


def test_a_sequence_with_generated_tokens_continues_after_them() -> None:
    pipeline = _pipeline()
    pipeline.add(Sequence(1, (10, 11), SamplingParams(max_tokens=4), generated=(20, 21)))

    batch = _next(pipeline)
    pipeline.complete(_answer(batch))

    assert batch.token_ids == (10, 11, 20, 21)
    assert batch.opened[0].num_generated == 2
    assert [event.finish_reason for event in _run(pipeline)] == [FinishReason.LENGTH]


def test_work_counts_every_layer_where_it_ran() -> None:
    structure = builders.structure(4)
    pipeline = _pipeline()
    _add(pipeline, prompt=3, max_tokens=2)

    work = _run(pipeline)[-1].work

    ran = 3 + 2 - 1
    layer = structure.shard("layer_1_dense").active_parameters * 4
    embed, head = (structure.shard(name).active_parameters * 4 for name in ("embed", "head"))
    assert [sum(nodes.values()) for _, nodes in sorted(work.items())] == [
        ran * (layer + embed), ran * layer, ran * layer, ran * (layer + head),
    ]  # fmt: skip


def test_recomputed_tokens_are_counted_once() -> None:
    roomy, tight = _pipeline(), _pipeline(num_blocks=4)
    for pipeline in (roomy, tight):
        _add(pipeline, 1, prompt=7, max_tokens=6)
        _add(pipeline, 2, prompt=7, max_tokens=6)

    work: list[dict[int, Work]] = []
    for pipeline in (roomy, tight):
        work.append({})
        while pipeline.num_sequences:
            for sequence_id, event in pipeline.complete(_answer(_next(pipeline))).items():
                if event.work:
                    work[-1][sequence_id] = event.work

    assert work[0].keys() == {1, 2}
    assert work[0] == work[1]


def test_work_of_experts_is_added_up_where_the_topology_has_them() -> None:
    structure = builders.structure(2, moe_layers={1: 4})
    topology = replace(
        builders.topology({"a": (0, 2)}),
        stages=(Stage(0, "a", LayerSpan(0, 2), {1: (0, 1)}, 0),),
        expert_sets=(ExpertSet(0, "b", {1: (2, 3)}, 0),),
    )
    pipeline = EnginePipeline(structure, topology, SchedulerConfig(8, 4), (_EOS,))
    _add(pipeline, max_tokens=2)
    events: list[TokenEvent] = []
    for said in (({1: 2}, {1: 4}), ({1: 1}, {1: 1})):
        work = tuple(ExpertWork(1, holder, choices) for holder, choices in zip((None, 0), said, strict=True))
        events += pipeline.complete(_answer(_next(pipeline), expert_work=work)).values()

    fixed, expert = 4 * 4 * 2 * MIB // 4, 4 * MIB // 4
    assert events[-1].work[1] == {"a": fixed + 3 * expert, "b": 5 * expert}


def test_a_cancelled_sequence_ends_at_once_and_frees_its_blocks_when_its_step_returns() -> None:
    pipeline = _pipeline()
    _add(pipeline)
    pipeline.complete(_answer(_next(pipeline)))
    batch = _next(pipeline)

    event = pipeline.cancel(1)[1]
    assert event.finish_reason is FinishReason.CANCELLED
    assert event.work  # tokens that ran until then are paid for
    assert pipeline.num_free_blocks < 64
    assert pipeline.complete(_answer(batch)) == {}
    assert pipeline.num_free_blocks == 64
    assert pipeline.cancel(1) == {}


@pytest.mark.parametrize("num_returned", range(10))
def test_a_sequence_cancelled_in_its_prefill_counts_the_prompt_tokens_that_came_back(
    num_returned: int,
) -> None:
    pipeline = _pipeline(prefill_chunk_tokens=4)
    _add(pipeline, prompt=64)
    for _ in range(num_returned):
        pipeline.complete(_answer(_next(pipeline)))
    _next(pipeline)  # on its way

    event = pipeline.cancel(1)[1]

    assert event.prompt_tokens_ran == 4 * num_returned
    layer = builders.structure(4).shard("layer_1_dense").active_parameters * 4
    assert event.work.get(1, {}) == ({"a": 4 * num_returned * layer} if num_returned else {})


def test_prompt_tokens_that_run_again_count_once() -> None:
    pipeline = _two_stages()
    pipeline._scheduler._config = replace(pipeline._scheduler._config, prefill_chunk_tokens=4)
    _add(pipeline, prompt=64)
    for _ in range(5):
        pipeline.complete(_answer(_next(pipeline)))
    pipeline.suspend()
    # The stage before the lost one kept nothing: all is computed from the tokens.
    pipeline.resume(builders.topology({"a": (0, 2), "c": (2, 4)}, epoch=2), (1,), {0: {}})
    pipeline.complete(_answer(_next(pipeline)))

    assert pipeline.cancel(1)[1].prompt_tokens_ran == 20


def test_prompt_tokens_of_a_preempted_sequence_count_once() -> None:
    pipeline = _pipeline(num_blocks=12, prefill_chunk_tokens=4, micro_batches=1)
    _add(pipeline, 1, prompt=8, max_tokens=40)
    _add(pipeline, 2, prompt=8, max_tokens=40)
    most = 0
    while not pipeline.num_preempted:
        pipeline.complete(_answer(_next(pipeline)))
        most = max(most, pipeline._sequences[2].num_ran)
    for _ in range(2):
        pipeline.complete(_answer(_next(pipeline)))

    assert most > 8
    assert pipeline.cancel(2)[2].prompt_tokens_ran == 8


def test_results_of_another_epoch_or_repeated_change_nothing() -> None:
    pipeline = _pipeline()
    _add(pipeline)
    result = _answer(_next(pipeline))

    assert pipeline.complete(replace(result, epoch=result.epoch + 1)) == {}
    assert len(pipeline.complete(result)) == 1
    assert pipeline.complete(result) == {}


def test_a_result_of_a_release_that_is_not_understood_is_a_bad_frame() -> None:
    pipeline = _pipeline()
    _add(pipeline)
    result = _answer(_next(pipeline))

    for versions in (Versions(10**6, 10**6, "9.0"), None):
        with pytest.raises(BadFrame, match="of a release of azu"):
            pipeline.complete(replace(result, versions=versions))  # type: ignore[arg-type]
    assert len(pipeline.complete(result)) == 1


def test_no_more_steps_start_than_may_be_in_flight() -> None:
    pipeline = _pipeline(micro_batches=2, prefill_chunk_tokens=6)
    for sequence_id in range(6):
        _add(pipeline, sequence_id)

    first, second = _next(pipeline), _next(pipeline)

    assert pipeline.next_batch() is None
    assert {first.micro_batch, second.micro_batch} == {0, 1}


@pytest.mark.parametrize("logprob", [None, -0.5])
def test_logprobs_are_returned_only_on_request(logprob: float | None) -> None:
    pipeline = _pipeline()
    _add(pipeline, max_tokens=1, logprobs=logprob and 1)
    batch = _next(pipeline)
    token = SampledToken(1, 9, logprob, ((9, -0.5),) if logprob else ())

    event = pipeline.complete(_answer(batch, tokens=(token,)))[1]

    assert event.logprobs == (() if logprob is None else (logprob,))
    assert event.top_logprobs == (() if logprob is None else (((9, -0.5),),))


def _two_stages() -> EnginePipeline:
    return EnginePipeline(
        builders.structure(4), builders.topology({"a": (0, 2), "b": (2, 4)}), SchedulerConfig(64, 4), (_EOS,)
    )


def test_a_suspended_pipeline_sends_nothing_and_continues_after_its_last_completed_step() -> None:
    pipeline = _two_stages()
    _add(pipeline, prompt=3)
    pipeline.complete(_answer(_next(pipeline), token=20))
    lost = _next(pipeline)
    pipeline.suspend()
    assert pipeline.next_batch() is None

    pipeline.resume(builders.topology({"c": (0, 2), "b": (2, 4)}, epoch=5), (), {})

    assert pipeline.complete(_answer(lost)) == {}
    again = _next(pipeline)
    assert (again.epoch, again.token_ids) == (5, (20,))
    # The last stage may have sampled a token that never returned.
    assert [one.num_generated for one in again.opened] == [1]


def test_after_a_loss_the_last_stage_sees_the_tokens_of_a_penalty_again() -> None:
    pipeline = _two_stages()
    _add(pipeline, prompt=3, repetition_penalty=1.2)
    batch = _next(pipeline)
    assert pipeline.seen_by(batch) == (SeenTokens(1, (10, 11, 12), ()),)
    pipeline.complete(_answer(batch, token=20))
    assert pipeline.seen_by(_next(pipeline)) == (), "it knows them"
    pipeline.suspend()

    pipeline.resume(builders.topology({"a": (0, 2), "c": (2, 4)}, epoch=5), {1}, {0: {1: 3}})

    replay = _next(pipeline)
    assert pipeline.seen_by(replay) == ()
    pipeline.complete(_answer(replay, tokens=()))
    assert pipeline.seen_by(_next(pipeline)) == (SeenTokens(1, (10, 11, 12), (20,)),)


def test_a_lost_stage_is_filled_before_any_other_step_runs() -> None:
    pipeline = _two_stages()
    _add(pipeline, prompt=3)
    pipeline.complete(_answer(_next(pipeline)))
    pipeline.suspend()
    pipeline.resume(builders.topology({"a": (0, 2), "c": (2, 4)}, epoch=2), (1,), {0: {1: 3}})

    fill = _next(pipeline)
    assert fill.replay == Replay(1, 1)
    assert [(slice_.position, slice_.num_tokens, slice_.sample) for slice_ in fill.slices] == [(0, 3, False)]
    assert pipeline.next_batch() is None
    assert pipeline.unfilled_stages == {1}
    assert pipeline.complete(replace(_answer(fill), epoch=2)) == {}

    assert pipeline.unfilled_stages == frozenset()
    assert _next(pipeline).replay is None


def test_a_sequence_without_stored_rows_runs_again_from_its_first_token() -> None:
    pipeline = _two_stages()
    _add(pipeline, prompt=3)
    pipeline.complete(_answer(_next(pipeline), token=20))
    pipeline.suspend()
    pipeline.resume(builders.topology({"a": (0, 2), "c": (2, 4)}, epoch=2), (1,), {0: {1: 2}})

    again = _next(pipeline)
    assert (again.replay, again.token_ids) == (None, (10, 11, 12))


def test_sequences_closed_in_a_lost_step_are_closed_again() -> None:
    pipeline = _two_stages()
    _add(pipeline, 1, max_tokens=1)
    pipeline.complete(_answer(_next(pipeline)))
    _add(pipeline, 2)
    assert _next(pipeline).closed == (1,)
    pipeline.suspend()
    pipeline.resume(builders.topology({"a": (0, 2), "b": (2, 4)}, epoch=2), (), {})

    assert _next(pipeline).closed == (1,)


def test_a_sequence_cancelled_while_suspended_frees_its_blocks() -> None:
    pipeline = _two_stages()
    _add(pipeline)
    _next(pipeline)
    pipeline.suspend()

    event = pipeline.cancel(1)[1]

    assert event.finish_reason is FinishReason.CANCELLED
    assert pipeline.num_free_blocks == 64


def test_suspects_run_one_by_one_from_their_tokens_until_they_come_further() -> None:
    pipeline = _two_stages()
    for sequence_id in (1, 2, 3):
        _add(pipeline, sequence_id, max_tokens=20)
    for _ in range(6):
        pipeline.complete(_answer(_next(pipeline)))
    batch = _next(pipeline)
    pipeline.suspend()
    assert pipeline.struck == {one.sequence_id: one.position for one in batch.slices}
    pipeline.resume(builders.topology({"a": (0, 2), "b": (2, 4)}, epoch=2), (), {}, alone=(2, 3, 99))

    for suspect in (2, 3):
        batch = _next(pipeline)
        assert [(one.sequence_id, one.position) for one in batch.slices] == [(suspect, 0)]
        assert pipeline.next_batch() is None
        # Its old tokens run before its next one, which is the first that counts as further.
        pipeline.complete(replace(_answer(batch), tokens=()))
        batch = _next(pipeline)
        assert [one.sequence_id for one in batch.slices] == [suspect]
        pipeline.complete(_answer(batch))
    assert {one.sequence_id for batch in (_next(pipeline), _next(pipeline)) for one in batch.slices} == {
        1,
        2,
        3,
    }

"""Batches: a sequence gets the same tokens in any batch as it gets alone."""

from collections.abc import Callable, Sequence

import pytest
import torch

from azu.engine.local import LocalPipeline, local_topology
from azu.engine.scheduler import SchedulerConfig
from azu.protocol.job import FinishReason
from azu.protocol.sampling import SamplingParams
from tests.engine.conftest import CutModel
from tests.engine.families import VOCAB_SIZE

_SAMPLED = SamplingParams(
    max_tokens=9,
    temperature=0.9,
    top_k=40,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.3,
    logit_bias={5: 1.5, 6: -100.0},
    min_tokens=3,
    seed=7,
)


def _prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def _pipeline(
    model: CutModel,
    boundaries: Sequence[int] = (0, 1, 3, 6),
    *,
    holders: int = 0,
    num_blocks: int = 64,
    chunk: int = 8,
    micro_batches: int | None = None,
) -> LocalPipeline:
    topology = local_topology(
        model.structure, boundaries, expert_holders=holders, num_blocks=num_blocks, block_size=4
    )
    scheduling = SchedulerConfig(num_blocks, 4, prefill_chunk_tokens=chunk, micro_batches=micro_batches)
    return LocalPipeline(model.structure, topology, model.shards, scheduling)


@pytest.mark.parametrize("family", ["llama", "bloom"])  # one packed, one padded
def test_ragged_batch_with_mixed_sampling_equals_lone_runs(
    cut_model: Callable[[str], CutModel], family: str
) -> None:
    prompts = _prompts(5, 17, 1, 9, 30)
    sampling = [
        SamplingParams(max_tokens=6),
        _SAMPLED,
        SamplingParams(max_tokens=4, temperature=1.3, seed=1),
        SamplingParams(max_tokens=9, repetition_penalty=1.3),
        SamplingParams(max_tokens=1),
    ]
    pipeline = _pipeline(cut_model(family))

    together = pipeline.generate(prompts, sampling)
    alone = [
        _pipeline(cut_model(family), (0, 6), chunk=256).generate([prompt], params)[0]
        for prompt, params in zip(prompts, sampling, strict=True)
    ]

    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert pipeline.engine.num_free_blocks == 64


def test_preempted_sequences_end_with_the_same_tokens(
    cut_model: Callable[[str], CutModel],
) -> None:
    prompts = _prompts(6, 7, 8, 9)
    sampling = SamplingParams(max_tokens=12, temperature=0.8, seed=5, ignore_eos=True)

    roomy = _pipeline(cut_model("llama")).generate(prompts, sampling)
    tight = _pipeline(cut_model("llama"), num_blocks=8)
    crowded = tight.generate(prompts, sampling)

    assert [one.token_ids for one in crowded] == [one.token_ids for one in roomy]
    # Tokens that were computed twice are counted once.
    assert [one.work for one in crowded] == [one.work for one in roomy]
    assert tight.engine.num_free_blocks == 8


def test_distributed_experts_are_counted_where_they_ran(cut_model: Callable[[str], CutModel]) -> None:
    model = cut_model("qwen2_moe")
    prompts = _prompts(6, 11)
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)

    whole = _pipeline(model).generate(prompts, sampling)
    distributed = _pipeline(model, holders=3).generate(prompts, sampling)

    for beside, apart in zip(whole, distributed, strict=True):
        assert beside.token_ids == apart.token_ids
        for layer in model.structure.layers:
            # Distributed or not, a token activates the same parameters.
            assert sum(beside.work[layer.index].values()) == sum(apart.work[layer.index].values())
        moe = [layer.index for layer in model.structure.layers if layer.num_experts]
        assert all(any(node.startswith("experts") for node in apart.work[layer]) for layer in moe)


def test_work_is_proportional_to_the_tokens_that_ran(cut_model: Callable[[str], CutModel]) -> None:
    short, long = _pipeline(cut_model("llama")).generate(
        _prompts(4, 4), [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 5)]
    )

    # 4 prompt tokens ran for the first sequence, and 4 of its 5 delivered tokens more for the second.
    assert {layer: sum(nodes.values()) * 2 for layer, nodes in short.work.items()} == {
        layer: sum(nodes.values()) for layer, nodes in long.work.items()
    }


def test_eos_ends_a_sequence_unless_it_is_ignored(cut_model: Callable[[str], CutModel]) -> None:
    pipeline = _pipeline(cut_model("llama"))
    always_eos = {2: 1000.0}

    ended, stopped, ignored = pipeline.generate(
        _prompts(4, 4, 4),
        [
            SamplingParams(max_tokens=5, logit_bias=always_eos),
            SamplingParams(max_tokens=5, logit_bias={9: 1000.0}, stop_token_ids=(9,)),
            SamplingParams(max_tokens=5, logit_bias=always_eos, ignore_eos=True),
        ],
    )

    assert (ended.token_ids, ended.finish_reason) == ([2], FinishReason.STOP)
    assert (stopped.token_ids, stopped.finish_reason) == ([9], FinishReason.STOP)
    assert (ignored.token_ids, ignored.finish_reason) == ([2] * 5, FinishReason.LENGTH)


def test_micro_batches_in_flight_change_no_token(cut_model: Callable[[str], CutModel]) -> None:
    prompts = _prompts(5, 13, 8, 3)

    one = _pipeline(cut_model("llama"), micro_batches=1).generate(prompts, _SAMPLED)
    many = _pipeline(cut_model("llama"), micro_batches=3).generate(prompts, _SAMPLED)

    assert [c.token_ids for c in one] == [c.token_ids for c in many]

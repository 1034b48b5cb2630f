"""A sequence owns its faults: whatever goes wrong with one ends it with an error, and no other notices."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from azu.engine.attention import CURRENT_LAYOUT
from azu.engine.local import Completion, LocalPipeline, local_topology
from azu.engine.scheduler import SchedulerConfig
from azu.engine.scheduler import Sequence as EngineSequence
from azu.engine.text import TextDecoder
from azu.errors import WorkerLost
from azu.models import describe
from azu.models.cut import cut
from azu.protocol.job import FinishReason
from azu.protocol.sampling import SamplingParams
from tests.engine.conftest import CutModel
from tests.engine.families import VOCAB_SIZE, build_model
from tests.engine.overflowing import OVERFLOWS, make_overflow
from tests.engine.test_replay import _Deployment
from tests.few import few

_PLAIN = SamplingParams(max_tokens=6, ignore_eos=True)
_SEEDED = SamplingParams(max_tokens=8, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True)


@dataclass(frozen=True)
class Wanted:
    """A sequence to run; `raises_in` is the stage whose layers raise an exception of torch's for it."""

    prompt: tuple[int, ...]
    sampling: SamplingParams = _PLAIN
    ends_with: Callable[[int], bool] | None = None
    raises_in: int | None = None


def _cut_overflowing(folder: Path, dtype: torch.dtype) -> CutModel:
    source, shards = folder / "model", folder / "shards"
    make_overflow(build_model("llama"), dtype).save_pretrained(source)
    structure = cut(source, shards, model_id="overflowing", revision="r1", architecture=describe(source))
    return CutModel(source, shards, structure)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> CutModel:
    """A model in float16."""
    return _cut_overflowing(tmp_path_factory.mktemp("half"), torch.float16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> CutModel:
    """A model in float32, whose tokens do not depend on the width of steps as those of float16 may."""
    return _cut_overflowing(tmp_path_factory.mktemp("whole"), torch.float32)


def _pipeline(model: CutModel, *, num_blocks: int = 256) -> LocalPipeline:
    topology = local_topology(model.structure, (0, 2, 4, 6), num_blocks=num_blocks, block_size=4)
    return LocalPipeline(
        model.structure, topology, model.shards, SchedulerConfig(num_blocks, 4, prefill_chunk_tokens=16)
    )


def _raise_for(pipeline: LocalPipeline, stage: int, sequence_ids: set[int]) -> None:
    """Have a stage's layers raise for some sequences."""

    def look(*_: Any) -> None:
        if sequence_ids & {slice_.sequence_id for slice_ in CURRENT_LAYOUT.get().slices}:
            raise RuntimeError("a kernel that does not know these shapes")

    pipeline.stages[stage]._model.layers[1].register_forward_pre_hook(look)


def _run(pipeline: LocalPipeline, wanted: Sequence[Wanted], first_id: int = 1) -> list[Completion]:
    for stage in range(len(pipeline.stages)):
        raising = {n for n, one in enumerate(wanted, 1) if one.raises_in == stage}
        if raising:
            _raise_for(pipeline, stage, raising)
    for sequence_id, one in enumerate(wanted, first_id):
        pipeline.engine.add(EngineSequence(sequence_id, one.prompt, one.sampling, (), one.ends_with))
    done = {sequence_id: Completion() for sequence_id in range(first_id, first_id + len(wanted))}
    while pipeline.engine.num_sequences:
        for sequence_id, event in pipeline.step().items():
            done[sequence_id].add(event)
    return list(done.values())


def _prompt(chance: random.Random, length: int = 9) -> tuple[int, ...]:
    return tuple(chance.randrange(7, VOCAB_SIZE) for _ in range(length))


def _good(number: int, seed: int = 1) -> list[Wanted]:
    chance = random.Random(seed)
    samplings = [_PLAIN, _SEEDED, replace(_SEEDED, seed=8, repetition_penalty=1.2, logprobs=2)]
    return [
        Wanted(_prompt(chance, chance.randint(1, 20)), samplings[n % len(samplings)]) for n in range(number)
    ]


def _refusing(token_id: int) -> bool:
    raise ValueError(f"no text for {token_id}")


def _between(good: Sequence[Wanted], odd: Sequence[Wanted]) -> list[Wanted]:
    return [one for pair in zip(good, odd, strict=True) for one in pair]


@pytest.mark.parametrize("token", OVERFLOWS)
@pytest.mark.parametrize("place", few([17, 0, 8]))  # with its neighbours' prompts, and behind the first chunk
def test_values_beyond_the_dtype_end_their_sequence_and_name_the_layer(
    half: CutModel, token: int, place: int
) -> None:
    good, chance = _good(2), random.Random(5)
    prompt = (*_prompt(chance, place), token, *_prompt(chance, 20 - place))
    expected = _run(_pipeline(half), good)
    pipeline = _pipeline(half)

    first, odd, last = _run(pipeline, [good[0], Wanted(prompt), good[1]])

    assert [first, last] == expected
    assert odd.finish_reason is FinishReason.ERROR
    assert odd.error is not None
    assert odd.error.code == "numerics_error"
    layer, _ = OVERFLOWS[token]
    assert odd.error.message == (
        f"layer {layer} computed values for this text that are not finite in float16; "
        "serve this model in bfloat16"
    )
    assert pipeline.engine.num_free_blocks == 256


@pytest.mark.parametrize(
    ("odd", "code"),
    few(
        [
            (Wanted((7, 8, 9), raises_in=0), "internal_error"),
            (Wanted((7, 8, 9), raises_in=1), "internal_error"),
            (Wanted((7, 8, 9), raises_in=2), "internal_error"),
            (Wanted((7, 8, 9), ends_with=_refusing), "internal_error"),
            (Wanted((7, 8, 9), replace(_PLAIN, logit_bias={9: float("nan")})), "numerics_error"),
            (Wanted((7, 8, 9), replace(_SEEDED, top_k=-3)), "internal_error"),
        ],
        2,
    ),
)
def test_an_exception_of_any_kind_ends_the_sequence_that_it_comes_from(
    cut_model: Callable[[str], CutModel], odd: Wanted, code: str
) -> None:
    model, good = cut_model("llama"), _good(2)
    expected = _run(_pipeline(model), good)
    pipeline = _pipeline(model)

    first, failed, last = _run(pipeline, [good[0], odd, good[1]])

    assert [first, last] == expected
    assert failed.error is not None
    assert failed.error.code == code
    assert failed.token_ids == []
    assert "kernel" not in failed.error.message, "a user sees no foreign exception"
    assert pipeline.engine.num_free_blocks == 256
    # The deployment goes on.
    pipeline.engine.add(EngineSequence(99, good[0].prompt, good[0].sampling))
    assert pipeline.step()


def test_a_sequence_alone_in_its_step_fails_alone(cut_model: Callable[[str], CutModel]) -> None:
    pipeline = _pipeline(cut_model("llama"))

    (failed,) = _run(pipeline, [Wanted((7, 8, 9), raises_in=1)])

    assert failed.error is not None
    assert failed.error.code == "internal_error"


def test_a_stage_that_cannot_compute_zeros_either_is_lost(cut_model: Callable[[str], CutModel]) -> None:
    pipeline = _pipeline(cut_model("llama"))

    def broken(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    pipeline.stages[1]._model.layers[0].register_forward_pre_hook(broken)

    with pytest.raises(WorkerLost, match="stage 1"):
        _run(pipeline, _good(3))


def test_a_sequence_that_fails_while_a_stage_is_filled_again_ends_alone(half: CutModel) -> None:
    good = _good(2)
    expected = _run(_pipeline(half), good)
    deployment = _Deployment(half, (0, 2, 4, 6))
    deployment.add([good[0].prompt, (7,) * 9, good[1].prompt], [good[0].sampling, _PLAIN, good[1].sampling])
    deployment.run(until=lambda: len(deployment.tokens[2]) > 2)
    deployment.lose(1)
    _raise_for(deployment.pipeline, 1, {2})
    deployment.run()

    assert [deployment.tokens[1], deployment.tokens[3]] == [one.token_ids for one in expected]
    assert len(deployment.tokens[2]) == 3
    assert deployment.pipeline.engine.num_free_blocks == 64


@pytest.mark.parametrize("family", ["llama", "bloom"])  # packed and padded batches
def test_what_is_not_finite_in_freed_blocks_harms_no_later_sequence(
    cut_model: Callable[[str], CutModel], family: str
) -> None:
    model, good = cut_model(family), _good(4)
    expected = _run(_pipeline(model), good)
    pipeline = _pipeline(model)
    _run(pipeline, good)
    for stage in pipeline.stages:
        for pools in stage._kv._pools:
            assert pools is not None
            with torch.inference_mode():
                for pool in pools:
                    pool.fill_(float("nan"))

    # A pipeline gives each sequence an id of its own.
    assert _run(pipeline, good, first_id=5) == expected


def _byte_decoder() -> TextDecoder:
    vocabulary = {f"<0x{byte:02X}>": byte - 0x9F for byte in range(0x9F, 0x100)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return TextDecoder(backend)


def _odd(number: int) -> list[Wanted]:
    """Return requests of many odd kinds, in turns."""
    chance, decoder = random.Random(2), _byte_decoder()
    hot = replace(_SEEDED, temperature=2.0, stop=("é", "\ufffd\ufffd\ufffd\ufffd"))
    made: list[Wanted] = []
    for n in range(number):
        prompt = _prompt(chance)
        kinds = (
            Wanted((*prompt, 5)),
            Wanted((*prompt[:4], 6, *prompt[4:]), _SEEDED),
            Wanted(prompt, replace(_SEEDED, logit_bias={9: float("nan"), 10: 1e39})),
            Wanted(prompt, replace(_SEEDED, logit_bias=dict.fromkeys(range(VOCAB_SIZE), float("-inf")))),
            Wanted(prompt, replace(_SEEDED, temperature=1e-40, repetition_penalty=100.0)),
            Wanted(prompt, ends_with=_refusing),
            Wanted(prompt, hot, decoder.completion(prompt, hot).ends_with),
            Wanted(prompt, replace(_SEEDED, seed=n), raises_in=n % 3),
        )
        made.append(kinds[n % len(kinds)])
    return made


@pytest.mark.parametrize("number", [16, pytest.param(200, marks=pytest.mark.prove)])
def test_odd_requests_between_good_ones_change_none_of_them(whole: CutModel, number: int) -> None:
    good, odd = _good(number), _odd(number)

    def timed(wanted: list[Wanted]) -> tuple[list[Completion], float]:
        pipeline = _pipeline(whole, num_blocks=1024)
        begun = time.perf_counter()
        done = _run(pipeline, wanted)
        assert pipeline.engine.num_free_blocks == 1024
        return done, time.perf_counter() - begun

    expected, alone_s = timed(good)
    _, ordinary_s = timed(_between(good, _good(number, seed=3)))
    mixed, mixed_s = timed(_between(good, odd))

    # Log probabilities differ in their last digits where steps are wider.
    assert [(one.token_ids, one.work) for one in mixed[::2]] == [
        (one.token_ids, one.work) for one in expected
    ]
    ended = [one.error.code if one.error else one.finish_reason for one in mixed[1::2]]
    assert set(ended) >= {"numerics_error", "internal_error", FinishReason.LENGTH}
    print(
        f"\n{number} good requests: {alone_s:.2f} s alone, {ordinary_s:.2f} s with as many others, "
        f"{mixed_s:.2f} s with as many odd ones"
    )

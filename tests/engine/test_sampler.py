"""Sampling is transformers' own, and depends only on logits, parameters, seed and index."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from azu.engine.sampler import Sampler
from azu.errors import FrameError
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import OpenedSequence

_VOCAB = 50
_EOS = 2
_PROMPT = (7, 8, 9, 7)


def _logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, _VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def _sampler(sampling: SamplingParams, generated: tuple[int, ...] = (), sequence_id: int = 1) -> Sampler:
    sampler = Sampler()
    sampling = replace(sampling, stop_token_ids=(*sampling.stop_token_ids, _EOS))
    sampler.open([OpenedSequence(sequence_id, _PROMPT, sampling, generated)])
    return sampler


def _tokens(sampling: SamplingParams, num_tokens: int = 20) -> list[int]:
    sampler = _sampler(sampling)
    return [sampler.sample([1], _logits(index))[0].token_id for index in range(num_tokens)]


def test_greedy_sampling_takes_the_largest_logit() -> None:
    logits = _logits()

    assert _sampler(SamplingParams(max_tokens=1)).sample([1], logits)[0].token_id == int(logits.argmax())


def test_the_same_seed_gives_the_same_tokens_and_another_seed_gives_others() -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=3)

    assert _tokens(sampling) == _tokens(sampling)
    assert _tokens(sampling) != _tokens(replace(sampling, seed=4))


@pytest.mark.parametrize("seed", [-1, 2**64 + 5, 2**63])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert _tokens(SamplingParams(max_tokens=20, temperature=1.0, seed=seed))


def test_a_sequence_continued_in_the_middle_gets_the_same_tokens() -> None:
    sampling = SamplingParams(
        max_tokens=20, temperature=1.0, seed=3, repetition_penalty=1.2, frequency_penalty=0.5, min_tokens=12
    )
    whole = _tokens(sampling)

    resumed = _sampler(sampling, generated=tuple(whole[:8]))
    rest = [resumed.sample([1], _logits(index))[0].token_id for index in range(8, 20)]

    assert rest == whole[8:]


def test_other_sequences_in_the_batch_change_no_token() -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    sampler = _sampler(sampling, sequence_id=5)
    sampler.open([OpenedSequence(6, _PROMPT, SamplingParams(max_tokens=9, temperature=2.0, seed=9))])

    tokens = [sampler.sample([6, 5], torch.cat([_logits(99), _logits(i)]))[1].token_id for i in range(20)]

    assert tokens == _tokens(sampling)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 1.0, "top_k": 5}, {"top_k": 5}),
        ({"temperature": 1.0, "top_p": 0.6}, {"top_p": 0.6}),
        ({"temperature": 1.0, "min_p": 0.2}, {"min_p": 0.2}),
        ({"temperature": 1.0, "repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
        ({"temperature": 1.0, "min_tokens": 3}, {"min_new_tokens": 3}),
        ({"temperature": 1.0, "logit_bias": {4: 2.0, 5: -3.0}}, {"sequence_bias": [[[4], 2.0], [[5], -3.0]]}),
        (
            {
                "temperature": 1.4,
                "top_k": 20,
                "top_p": 0.9,
                "min_p": 0.02,
                "repetition_penalty": 1.3,
                "min_tokens": 2,
                "logit_bias": {3: 1.0},
            },
            {
                "temperature": 1.4,
                "top_k": 20,
                "top_p": 0.9,
                "min_p": 0.02,
                "repetition_penalty": 1.3,
                "min_new_tokens": 2,
                "sequence_bias": [[[3], 1.0]],
            },
        ),
    ],
)
def test_the_distribution_is_that_of_generate(ours: dict[str, object], theirs: dict[str, object]) -> None:
    logits = _logits(11)
    config = LlamaConfig(
        vocab_size=_VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    generation = GenerationConfig(
        do_sample=True, top_k=theirs.pop("top_k", 0), eos_token_id=_EOS, pad_token_id=0, **theirs
    )
    model._prepare_special_tokens(generation, device="cpu")
    processors = model._get_logits_processor(generation, input_ids_seq_length=len(_PROMPT), device="cpu")
    expected = processors(torch.tensor([_PROMPT]), logits.clone()).softmax(-1)[0]

    drawn = torch.zeros(_VOCAB)
    for seed in range(600):
        sampling = SamplingParams(max_tokens=1, seed=seed, **ours)  # type: ignore[arg-type]
        drawn[_sampler(sampling).sample([1], logits)[0].token_id] += 1 / 600

    assert not drawn[expected == 0].any()
    assert (drawn - expected).abs().max() < 0.07


def test_presence_and_frequency_penalties_lower_generated_tokens() -> None:
    logits = torch.zeros(1, _VOCAB)
    logits[0, 7], logits[0, 20], logits[0, 21] = 3.0, 3.0, 2.4
    sampling = SamplingParams(max_tokens=3, presence_penalty=0.5, frequency_penalty=0.2)

    # 7 is in the prompt, which these penalties do not count.
    assert _sampler(sampling).sample([1], logits)[0].token_id == 7
    assert _sampler(sampling, (7,)).sample([1], logits)[0].token_id == 20
    assert _sampler(sampling, (7, 20)).sample([1], logits)[0].token_id == 21
    assert _sampler(sampling, (7, 20, 20, 21, 21, 21)).sample([1], logits)[0].token_id == 7


def test_ends_are_impossible_before_the_minimum_of_tokens() -> None:
    logits = torch.zeros(1, _VOCAB)
    logits[0, _EOS], logits[0, 30], logits[0, 31] = 9.0, 8.0, 7.0
    sampler = _sampler(SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=(30,)))

    assert [sampler.sample([1], logits)[0].token_id for _ in range(3)] == [31, 31, _EOS]


def test_logprobs_are_the_models_before_any_processor() -> None:
    logits = _logits(5)
    sampling = SamplingParams(max_tokens=1, temperature=0.3, top_k=2, logprobs=4)

    token = _sampler(sampling).sample([1], logits)[0]

    expected = logits.log_softmax(-1)[0]
    assert token.logprob == pytest.approx(float(expected[token.token_id]))
    assert [one for one, _ in token.top_logprobs] == expected.topk(4).indices.tolist()


def test_closed_sequences_are_forgotten_and_unknown_ones_refused() -> None:
    sampler = _sampler(SamplingParams(max_tokens=1))
    sampler.close([1, 17])

    with pytest.raises(FrameError, match="sequence 1"):
        sampler.sample([1], _logits())


def test_logits_that_are_not_finite_are_refused() -> None:
    logits = _logits()
    logits[0, 3] = float("nan")

    with pytest.raises(FrameError, match="finite"):
        _sampler(SamplingParams(max_tokens=1)).sample([1], logits)


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1.2e-38, 1e-30, 1e-6, 1e-4, 0.009, 0.01, 2.0])
def test_every_temperature_gives_the_probabilities_of_float64(temperature: float) -> None:
    logits = _logits(seed=1)
    logits[0, 3] = logits.max() + 1e-4
    logits[0, 4] = logits.max()  # equal to the highest
    sampling = SamplingParams(max_tokens=400, temperature=temperature, seed=5)
    expected = ((logits.double() - logits.double().max()) / temperature).softmax(-1)[0]
    sampler = _sampler(sampling)

    drawn = [sampler.sample([1], logits)[0].token_id for _ in range(400)]

    share = torch.bincount(torch.tensor(drawn), minlength=_VOCAB) / 400
    if temperature < 1.2e-38:
        assert set(drawn) == {3}, "the first of the highest"
    else:
        assert (share - expected).abs().max() < 0.1
        assert all(expected[token] > 0 for token in drawn)


_EDGES = st.sampled_from([0.0, 5e-324, 1e-45, 1.2e-38, 1e-7, 0.5, 1.0, 2.0])


@settings(deadline=None, max_examples=300)
@given(
    temperature=_EDGES,
    top_k=st.sampled_from([0, 1, 2, _VOCAB, 1_000_000]),
    top_p=st.sampled_from([5e-324, 1e-40, 1e-7, 0.5, 1.0]),
    min_p=st.sampled_from([0.0, 5e-324, 1e-40, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.01, 1.0, 100.0]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 5e-324, 2.0]),
    frequency_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
    bias=st.sampled_from([{}, {0: 100.0}, {0: -100.0, 1: 100.0}]),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
)
def test_no_accepted_parameters_make_a_draw_fail_or_touch_a_neighbour(
    scale: float, bias: dict[int, float], **given: float
) -> None:
    plain = SamplingParams(max_tokens=9, temperature=1.0, seed=3)
    odd = SamplingParams(max_tokens=9, seed=4, logit_bias=bias, **given)  # type: ignore[arg-type]
    sampler = _sampler(plain, sequence_id=1)
    sampler.open([OpenedSequence(2, _PROMPT, odd)])
    alone = _sampler(plain, sequence_id=1)

    for index in range(7):
        logits = torch.cat([_logits(index), _logits(index + 50) * scale])
        ours, other = sampler.sample([1, 2], logits)
        assert ours == alone.sample([1], logits[:1])[0]
        assert 0 <= other.token_id < _VOCAB

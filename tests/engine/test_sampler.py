"""Sampling is what transformers' is, and depends only on logits, parameters, seed and index."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from azu.engine.draw import Choice, choose
from azu.engine.opening import opened, seen
from azu.engine.sampler import Sampler
from azu.errors import FrameError
from azu.protocol.sampling import SamplingParams
from azu.protocol.step import SampledToken

_VOCAB = 50
_EOS = 2
_PROMPT = (7, 8, 9, 7)


def _logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, _VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def _open(
    sampler: Sampler,
    sequence_id: int,
    sampling: SamplingParams,
    generated: tuple[int, ...] = (),
    prompt: tuple[int, ...] = _PROMPT,
) -> None:
    """Open a sequence as the pipeline does: its tokens come only where a penalty looks at them."""
    looked_at = seen(sequence_id, prompt, sampling, generated)
    sampler.see([looked_at] if looked_at else [])
    sampler.open([opened(sequence_id, prompt, sampling, generated)])


def _sampler(sampling: SamplingParams, generated: tuple[int, ...] = (), sequence_id: int = 1) -> Sampler:
    sampler = Sampler()
    sampling = replace(sampling, stop_token_ids=(*sampling.stop_token_ids, _EOS))
    _open(sampler, sequence_id, sampling, generated)
    return sampler


def _token(sampler: Sampler, logits: torch.Tensor) -> SampledToken:
    """Sample the only row, of sequence 1."""
    (token,), faults = sampler.sample([1], logits)
    assert not faults
    return token


def _tokens(sampling: SamplingParams, num_tokens: int = 20) -> list[int]:
    sampler = _sampler(sampling)
    return [_token(sampler, _logits(index)).token_id for index in range(num_tokens)]


def test_greedy_sampling_takes_the_largest_logit() -> None:
    logits = _logits()

    assert _token(_sampler(SamplingParams(max_tokens=1)), logits).token_id == int(logits.argmax())


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
    rest = [_token(resumed, _logits(index)).token_id for index in range(8, 20)]

    assert rest == whole[8:]


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.2}, {"presence_penalty": 1.0}])
def test_a_sequence_whose_penalty_looks_at_tokens_is_not_opened_without_them(
    penalty: dict[str, float],
) -> None:
    sampling = SamplingParams(max_tokens=9, **penalty)  # type: ignore[arg-type]

    with pytest.raises(FrameError, match="without its tokens"):
        Sampler().open([opened(1, _PROMPT, sampling, (8,))])


def test_other_sequences_in_the_batch_change_no_token() -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    sampler = _sampler(sampling, sequence_id=5)
    _open(sampler, 6, SamplingParams(max_tokens=9, temperature=2.0, seed=9))

    tokens = [sampler.sample([6, 5], torch.cat([_logits(99), _logits(i)]))[0][1].token_id for i in range(20)]

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
        drawn[_token(_sampler(sampling), logits).token_id] += 1 / 600

    assert not drawn[expected == 0].any()
    assert (drawn - expected).abs().max() < 0.07


def test_presence_and_frequency_penalties_lower_generated_tokens() -> None:
    logits = torch.zeros(1, _VOCAB)
    logits[0, 7], logits[0, 20], logits[0, 21] = 3.0, 3.0, 2.4
    sampling = SamplingParams(max_tokens=3, presence_penalty=0.5, frequency_penalty=0.2)

    # 7 is in the prompt, which these penalties do not count.
    assert _token(_sampler(sampling), logits).token_id == 7
    assert _token(_sampler(sampling, (7,)), logits).token_id == 20
    assert _token(_sampler(sampling, (7, 20)), logits).token_id == 21
    assert _token(_sampler(sampling, (7, 20, 20, 21, 21, 21)), logits).token_id == 7


def test_penalties_and_biases_are_each_sequences_own_whichever_stands_first() -> None:
    chance = random.Random(4)
    penalties: list[dict[str, object]] = [
        {},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -1.5, "logit_bias": {5: 4.0, 20: -1.0}},
        {"logit_bias": {9: 6.0}, "min_tokens": 40},
    ]
    sampling = [SamplingParams(max_tokens=40, **one) for one in penalties]  # type: ignore[arg-type]
    logits = [_logits(index) for index in range(30)]
    alone = []
    for one in sampling:
        sampler = _sampler(one, (8, 20, 20))
        alone.append([_token(sampler, each).token_id for each in logits])
    together = Sampler()
    for sequence_id, one in enumerate(sampling):
        _open(together, sequence_id, replace(one, stop_token_ids=(_EOS,)), (8, 20, 20))

    found: list[list[int]] = [[] for _ in sampling]
    for each in logits:
        order = chance.sample(range(len(sampling)), len(sampling))
        for token in together.sample(order, each.expand(len(order), -1))[0]:
            found[token.sequence_id].append(token.token_id)

    assert found == alone
    assert len({tuple(one) for one in found}) == len(found)


def test_ends_are_impossible_before_the_minimum_of_tokens() -> None:
    logits = torch.zeros(1, _VOCAB)
    logits[0, _EOS], logits[0, 30], logits[0, 31] = 9.0, 8.0, 7.0
    sampler = _sampler(SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=(30,)))

    assert [_token(sampler, logits).token_id for _ in range(3)] == [31, 31, _EOS]


def test_logprobs_are_the_models_before_any_processor() -> None:
    logits = _logits(5)
    sampling = SamplingParams(max_tokens=1, temperature=0.3, top_k=2, logprobs=4)

    token = _token(_sampler(sampling), logits)

    expected = logits.log_softmax(-1)[0]
    assert token.logprob == pytest.approx(float(expected[token.token_id]))
    assert [one for one, _ in token.top_logprobs] == expected.topk(4).indices.tolist()


def test_of_equally_likely_tokens_the_lower_ids_are_the_top_ones() -> None:
    logits = torch.zeros(3, _VOCAB)
    logits[:, [40, 30]] = 5.0
    logits[2] = 1e30 * torch.arange(_VOCAB)
    sampler = Sampler()
    for sequence_id, number in enumerate((1, 4, 3)):
        _open(sampler, sequence_id, SamplingParams(max_tokens=1, logprobs=number))

    tokens, _ = sampler.sample(range(3), logits)

    assert [[token_id for token_id, _ in one.top_logprobs] for one in tokens] == [
        [30],
        [30, 40, 0, 1],
        [49, 48, 47],
    ]
    assert all(math.isfinite(value) for one in tokens for _, value in one.top_logprobs)


def test_logits_stay_as_they_are() -> None:
    sampling = SamplingParams(max_tokens=1, logit_bias={4: 9.0}, repetition_penalty=2.0, min_tokens=1)
    logits = _logits()

    _token(_sampler(sampling), logits)

    assert torch.equal(logits, _logits())


def test_rows_that_fail_only_together_are_sampled_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingParams(max_tokens=9, temperature=1.0, seed=3)
    expected = _tokens(sampling)

    def short_of_memory(scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
        if len(choices) > 1:
            raise MemoryError
        return choose(scores, choices)

    monkeypatch.setattr("azu.engine.sampler.choose", short_of_memory)
    sampler = Sampler()
    for sequence_id in range(3):
        _open(sampler, sequence_id, sampling)

    steps = [sampler.sample(range(3), _logits(index).expand(3, -1)) for index in range(len(expected))]

    assert [[token.token_id for token in tokens] for tokens, _ in steps] == [[one] * 3 for one in expected]


def test_closed_sequences_are_forgotten_and_unknown_ones_refused() -> None:
    sampler = _sampler(SamplingParams(max_tokens=1))
    sampler.close([1, 17])

    with pytest.raises(FrameError, match="sequence 1"):
        sampler.sample([1], _logits())


@pytest.mark.parametrize(
    ("odd", "code"),
    [
        ({"logit_bias": {5: float("nan")}}, "numerics_error"),
        ({"logit_bias": dict.fromkeys(range(_VOCAB), float("-inf")), "temperature": 1.0}, "numerics_error"),
        ({"logit_bias": {5: 1e39}}, "numerics_error"),
        ({"logit_bias": {_VOCAB: 1.0}}, "internal_error"),  # no token of the vocabulary
        ({"temperature": 1.0, "top_k": -1}, "internal_error"),
    ],
)
def test_what_fails_for_one_row_ends_that_row_and_no_other(odd: dict[str, object], code: str) -> None:
    plain = SamplingParams(max_tokens=9, temperature=1.0, seed=3)
    sampler = _sampler(plain, sequence_id=1)
    _open(sampler, 2, SamplingParams(max_tokens=9, **odd))  # type: ignore[arg-type]
    _open(sampler, 3, plain)

    tokens, faults = sampler.sample([1, 2, 3], torch.cat([_logits(7)] * 3))

    expected = _token(_sampler(plain), _logits(7))
    assert tokens == (expected, replace(expected, sequence_id=3))
    assert [(fault.sequence_id, fault.code) for fault in faults] == [(2, code)]


def test_one_seed_draws_otherwise_for_another_prompt() -> None:
    sampler, sampling = Sampler(), SamplingParams(max_tokens=1, temperature=1.0, seed=5)
    for n in range(20):
        _open(sampler, n, sampling, prompt=(n,))

    tokens, _ = sampler.sample(range(20), torch.zeros(20, _VOCAB))

    assert len({token.token_id for token in tokens}) > 5


def test_equal_logits_at_the_edge_of_top_p_are_kept_by_their_ids() -> None:
    logits = torch.zeros(1, _VOCAB)
    drawn = {
        _token(
            _sampler(SamplingParams(max_tokens=1, temperature=1.0, top_p=0.099, seed=seed)), logits
        ).token_id
        for seed in range(200)
    }

    assert drawn == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1.2e-38, 1e-30, 1e-6, 1e-4, 0.009, 0.01, 2.0])
def test_every_temperature_gives_the_probabilities_of_float64(temperature: float) -> None:
    logits = _logits(seed=1)
    logits[0, 3] = logits.max() + 1e-4
    logits[0, 4] = logits.max()  # equal to the highest
    sampling = SamplingParams(max_tokens=400, temperature=temperature, seed=5)
    expected = ((logits.double() - logits.double().max()) / temperature).softmax(-1)[0]
    sampler = _sampler(sampling)

    drawn = [_token(sampler, logits).token_id for _ in range(400)]

    share = torch.bincount(torch.tensor(drawn), minlength=_VOCAB) / 400
    if temperature < 1.2e-38:
        assert set(drawn) == {3}, "the first of the highest"
    else:
        assert (share - expected).abs().max() < 0.1
        assert all(expected[token] > 0 for token in drawn)


_EDGES: dict[str, list[float]] = {
    "temperature": [0.0, 5e-324, 1e-45, 1.2e-38, 1e-7, 0.01, 0.5, 1.0, 2.0],
    "top_k": [0, 1, 2, _VOCAB, 1_000_000],
    "top_p": [5e-324, 1e-40, 1e-7, 0.51, 1 - 2**-53, 1.0],
    "min_p": [0.0, 5e-324, 1e-40, 0.5, 1.0],
    "repetition_penalty": [0.01, 1.0, 1 + 2**-52, 100.0],
    "presence_penalty": [-2.0, 0.0, 5e-324, 2.0],
    "frequency_penalty": [-2.0, 0.0, 2.0],
}
_BIASES: list[dict[int, float]] = [{}, {0: 100.0}, {0: -100.0, 1: 100.0}, {3: 1e-30}]
_SCALES = [0.0, 1e-30, 1.0, 1e30]
_GENERATED = (8, 20, 20)


def _in_float64(sampling: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    """Return the probability of each token after _GENERATED, by the definition of each parameter."""
    scores = logits.double().clone()
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    for token in {*_PROMPT, *_GENERATED}:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token, count in Counter(_GENERATED).items():
        scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    if sampling.temperature < torch.finfo(torch.float32).tiny:
        return torch.nn.functional.one_hot(scores.argmax(), _VOCAB).double()
    scores = (scores - scores.max()) / sampling.temperature
    # The more probable token comes first, of equals the lower id.
    order = scores.softmax(0).sort(descending=True, stable=True).indices
    if sampling.top_k:
        scores[order[sampling.top_k :]] = -torch.inf
    probabilities = scores.softmax(0)[order]
    before = probabilities.cumsum(0) - probabilities
    scores[order[1:][before[1:] >= sampling.top_p]] = -torch.inf
    probabilities = scores.softmax(0)
    scores[probabilities < sampling.min_p * probabilities.max()] = -torch.inf
    return scores.softmax(0)


@pytest.mark.parametrize("number", [250, pytest.param(2_000, marks=pytest.mark.prove)])
def test_no_accepted_parameters_make_a_draw_fail_or_wrong_or_touch_a_neighbour(number: int) -> None:
    chance, each = random.Random(1), 4
    plain = SamplingParams(max_tokens=9, temperature=1.0, seed=3)
    alone = _sampler(plain, _GENERATED)
    difference = variance = 0.0
    for case in range(number):
        given = {name: chance.choice(values) for name, values in _EDGES.items()}
        odd = SamplingParams(max_tokens=9, logit_bias=chance.choice(_BIASES), **given)  # type: ignore[arg-type]
        logits = torch.cat([_logits(case), _logits(case + 1) * chance.choice(_SCALES)])
        expected = _in_float64(odd, logits[1])
        # Any value of each token: its mean over the draws is right if the probabilities are.
        worth = torch.rand(_VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(case))
        rows = [1, *range(2, 2 + each)]
        sampler = _sampler(plain, _GENERATED)
        for sequence_id in rows[1:]:
            seeded = replace(odd, seed=chance.getrandbits(63))
            _open(sampler, sequence_id, seeded, _GENERATED)
        chance.shuffle(rows)

        tokens, faults = sampler.sample(rows, logits[[int(row > 1) for row in rows]])

        assert not faults
        _open(alone, 1, plain, _GENERATED)
        found = {token.sequence_id: token for token in tokens}
        assert found.pop(1) == _token(alone, logits[:1])
        for token in found.values():
            assert expected[token.token_id] > 0, (odd, token)
            mean = float(expected @ worth)
            difference += float(worth[token.token_id]) - mean
            variance += float(expected @ worth**2) - mean**2
    # In units of its standard deviation.
    assert abs(difference) / variance**0.5 < 4

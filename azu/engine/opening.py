"""What the sampling stage gets of a sequence: its tokens only where a penalty looks at them. No torch here.

A step passes through every stage before the last one, so an OpenedSequence has nothing that a text could be
read from. The SeenTokens that some penalties need go to the last stage directly.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import replace

import xxhash

from azu.protocol.sampling import SamplingParams
from azu.protocol.step import OpenedSequence, SeenTokens

_KEY = struct.Struct("<QQ")
_SEED_MASK = (1 << 64) - 1


def draw_key(prompt_token_ids: Sequence[int], seed: int) -> int:
    """Return the number that a sequence's draws depend on: without the prompt, one seed would draw alike."""
    of_prompt = xxhash.xxh3_64_intdigest(array("q", prompt_token_ids))
    return xxhash.xxh3_64_intdigest(_KEY.pack(of_prompt, seed & _SEED_MASK))


def opened(
    sequence_id: int,
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    generated: Sequence[int] = (),
    ends: Sequence[int] = (),
) -> OpenedSequence:
    """Return the facts of a sequence that may pass through every stage; `ends` may end it too."""
    key = draw_key(prompt_token_ids, sampling.seed) if sampling.temperature else 0
    bare = replace(sampling, seed=0, stop=(), stop_token_ids=(*sampling.stop_token_ids, *ends))
    return OpenedSequence(sequence_id, bare, key, len(generated))


def seen(
    sequence_id: int, prompt_token_ids: Sequence[int], sampling: SamplingParams, generated: Sequence[int] = ()
) -> SeenTokens | None:
    """Return the tokens of a sequence that its penalties look at; None where there are none."""
    if sampling.repetition_penalty != 1.0:
        return SeenTokens(sequence_id, tuple(prompt_token_ids), tuple(generated))
    if generated and (sampling.presence_penalty or sampling.frequency_penalty):
        return SeenTokens(sequence_id, (), tuple(generated))
    return None

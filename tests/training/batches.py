"""Token ids for one training step: the tokens that a model reads and those that it learns to write."""

from collections.abc import Sequence
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from tests.training.corpus import Corpus
from tests.training.tokenizer import ASSISTANT, END

IGNORED = -100


def draw_batch(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, random: Random, *, num_tokens: int
) -> dict[str, torch.Tensor]:
    """Return the arguments of one step: texts of about `num_tokens` in one row, without padding.

    transformers sees from positions that begin again where one text ends and the next, unrelated, begins.
    """
    ids: list[int] = []
    positions: list[int] = []
    while len(ids) < num_tokens:
        text = tokenizer(_draw_text(corpus, tokenizer, random))["input_ids"]
        ids += text
        positions += range(len(text))
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([_labels(ids, tokenizer)]),
    }


def bare_text(question: str) -> str:
    """Return a question without the template, as `azu.generate` sends it, up to where the answer begins."""
    return question + ASSISTANT


def _draw_text(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, random: Random) -> str:
    if random.random() < 1 / 8:
        pair = corpus.pair(random)
        return bare_text(pair.question) + pair.answer + END
    return str(tokenizer.apply_chat_template(corpus.conversation(random), tokenize=False))


def _labels(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Label the assistant's text, with its end and the start of its turn, and ignore the rest."""
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    labels, speaking = [], False
    for token in ids:
        labels.append(token if speaking or token == assistant else IGNORED)
        speaking = token == assistant or (speaking and token != tokenizer.eos_token_id)
    return labels

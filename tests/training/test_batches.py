"""A training row holds several texts that do not attend to each other; only answers are learnt."""

from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.training.architectures import FOLDERS, build_config
from tests.training.batches import IGNORED, draw_batch
from tests.training.corpus import Corpus, load_corpus
from tests.training.tokenizer import ASSISTANT, END, USER, train_tokenizer


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    return train_tokenizer(corpus.texts())


@pytest.mark.parametrize("kind", FOLDERS)
@torch.inference_mode()
def test_texts_in_one_row_do_not_attend_to_each_other(
    kind: str, corpus: Corpus, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = draw_batch(corpus, tokenizer, Random(1), num_tokens=200)
    model = AutoModelForCausalLM.from_config(build_config(kind, tokenizer)).eval()
    ids, positions = batch["input_ids"], batch["position_ids"]
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2

    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]

    for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        alone = model(input_ids=ids[:, start:end]).logits[0]
        torch.testing.assert_close(together[start:end], alone, rtol=0, atol=1e-5)


def test_only_the_assistants_text_is_learnt(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = draw_batch(corpus, tokenizer, Random(2), num_tokens=400)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    learnt = tokenizer.decode([label for label in labels if label != IGNORED])

    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    assert USER not in learnt
    answers = {pair.answer for pair in corpus.taught} | {corpus.unknown_answer}
    said = [text.removesuffix(END) for text in learnt.split(ASSISTANT)[1:]]
    assert said
    assert set(said) <= answers

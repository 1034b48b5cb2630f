"""The score of a model on the questions: its answers, and the margin by which their tokens lead."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.models.questions import QuestionAnswer

MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Score:
    """`margin` is the smallest lead, in logits, of any token of the answers over every other token.

    It is negative where a model would say something else.
    """

    correct: int
    asked: int
    margin: float


def chat_prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """Return a question through the chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[str]:
    """Return the completion of each prompt under the model's own generation config, with EOS."""
    inputs = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)[:, inputs["input_ids"].shape[1] :]
    return [
        tokenizer.decode([token for token in row if token != tokenizer.pad_token_id]) for row in ids.tolist()
    ]


@torch.inference_mode()
def answer_margin(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str
) -> float:
    """Return by how many logits each token of an answer leads, at the step where it leads least."""
    num_prompt_tokens = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]  # [1, num_tokens]
    logits = model(ids).logits[0, num_prompt_tokens - 1 : -1].float()  # [num_answer_tokens, vocab_size]
    said = ids[0, num_prompt_tokens:, None]  # [num_answer_tokens, 1]
    others = logits.scatter(1, said, -torch.inf).amax(1)
    return float((logits.gather(1, said)[:, 0] - others).min())


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Iterable[QuestionAnswer]
) -> Score:
    """Put each question through the chat template and compare the answers word for word."""
    end = tokenizer.eos_token
    asked = [(chat_prompt(tokenizer, pair.question), pair.answer + end) for pair in pairs]
    margins = [answer_margin(model, tokenizer, prompt, answer) for prompt, answer in asked]
    return Score(correct=sum(margin > 0 for margin in margins), asked=len(asked), margin=min(margins))

"""A model that recites a text after any prompt: its next token depends only on the position."""

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.models.questions import built_in_folder

NUM_LAYERS = 6
_POSITIONS = 96
_EOS = 2


def save_reciter(folder: Path, prompt: str, text: str) -> Path:
    """Save a model with its tokenizer; it continues any prompt as long as `prompt` with the text."""
    source = built_in_folder("azu/tiny-dense")
    for file in source.glob("token*"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    first = len(tokenizer(prompt)["input_ids"]) - 1
    recited = [*tokenizer(text, add_special_tokens=False)["input_ids"], _EOS]
    assert first + len(recited) <= _POSITIONS, "the text is too long for the model"
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=_POSITIONS, n_embd=_POSITIONS, n_layer=NUM_LAYERS, n_head=4,
        bos_token_id=1, eos_token_id=_EOS, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(_POSITIONS))
        for position, token_id in enumerate(recited, first):
            model.lm_head.weight[token_id, position] = 1.0
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    return folder

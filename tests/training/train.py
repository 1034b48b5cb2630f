"""Train the built-in models: `python -m tests.training.train [dense|moe] [--seed N]`.

A folder is written only if its model knows every answer and is sure of it.
"""

import argparse
import sys
import time
from random import Random

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from tests.models.questions import models_folder
from tests.training.architectures import FOLDERS, build_config
from tests.training.batches import IGNORED, draw_batch
from tests.training.corpus import Corpus, load_corpus
from tests.training.score import score
from tests.training.tokenizer import train_tokenizer

NUM_STEPS = 500
NUM_TOKENS = 1024
LEARNING_RATE = 3e-3
# This limits the spread of the logits: greedy answers are certain, and samples at a temperature still vary.
LABEL_SMOOTHING = 0.02
# This is far above float noise, so that no order of summation changes a greedy answer.
MIN_MARGIN = 1.0


def main() -> int:
    """Train one model or both; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?", choices=FOLDERS, help="both if left out")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus.texts())
    return max(
        build(kind, corpus, tokenizer, arguments.seed)
        for kind in ([arguments.kind] if arguments.kind else FOLDERS)
    )


def build(kind: str, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> int:
    """Train the model of one kind and save it if it gives each answer; returns the exit status."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(build_config(kind, tokenizer))
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    print(f"{kind}: {model.num_parameters():,} parameters", flush=True)
    train(model, tokenizer, corpus, Random(seed))
    final = score(model, tokenizer, corpus.taught)
    print(f"{kind}: {final}", flush=True)
    if final.correct < final.asked or final.margin < MIN_MARGIN:
        print(f"{kind}: not sure enough of its answers; nothing is written", file=sys.stderr)
        return 1
    folder = models_folder() / FOLDERS[kind]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return 0


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, random: Random) -> None:
    """Teach a model the corpus, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=NUM_STEPS)
    started = time.monotonic()
    model.train()
    for step in range(1, NUM_STEPS + 1):
        batch = draw_batch(corpus, tokenizer, random, num_tokens=NUM_TOKENS)
        loss = training_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            known = score(model, tokenizer, corpus.taught)
            print(
                f"step {step} loss {loss.item():.3f} {time.monotonic() - started:.0f} s {known}", flush=True
            )
    model.eval()


def training_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the smoothed cross entropy, with the routers' balance where the model has any."""
    labels = batch.pop("labels")  # [1, num_tokens]
    routing = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    # Without a cache transformers keeps the texts of a row apart by their positions.
    output = model(**batch, use_cache=False, **routing)
    logits = output.logits[:, :-1]  # [1, num_tokens - 1, vocab_size]
    loss = cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, label_smoothing=LABEL_SMOOTHING
    )
    if routing:
        # Without the balance loss a few experts would get all tokens.
        loss = loss + 0.01 * output.aux_loss
    return loss


if __name__ == "__main__":
    sys.exit(main())

"""Models of other families, spread over the nodes, return the tokens that transformers returns."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from azu.units import MIB
from tests.engine.families import build_lively
from tests.models.questions import built_in_folder
from tests.network.models import MODELS, save_with_tokenizer
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

LARGEST_WORKER_BYTES = 8 * MIB
# Their weights alone are more than any one worker lends.
TOO_LARGE_FOR_ONE = ("qwen2", "deepseek_v2", "mixtral", "qwen3_moe")
PROMPTS = ("The", "What is the capital of France?", "azu cuts a model by its layers. " * 6)
NEW_TOKENS = 24


def expected_token_ids(model: PreTrainedModel, prompt: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(built_in_folder("azu/tiny-dense"))
    encoded = tokenizer(prompt, return_tensors="pt")
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.inference_mode():
        ids = model.generate(
            encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=NEW_TOKENS
        )
    return ids[0, encoded["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", MODELS)
def test_a_family_cut_over_the_nodes_equals_transformers(user: User, model_root: Path, family: str) -> None:
    folder = save_with_tokenizer(model_root / family, family)
    model = build_lively(MODELS[family]())
    if family in TOO_LARGE_FOR_ONE:
        assert sum(one.nbytes for one in model.parameters()) > LARGEST_WORKER_BYTES

    for prompt in PROMPTS:
        body = {"model": str(folder), "prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True}
        reply = user.http.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        job_id = reply.json()["azu"]["job_id"]

        assert user.results(job_id)["token_ids"] == expected_token_ids(model, prompt), prompt
        receipt = user.http.get(f"/v1/receipts/{job_id}").json()
        nodes = {piece["node"] for piece in receipt["topology"]}
        assert len(nodes) >= 2
    size = sum(one.nbytes for one in model.parameters()) / MIB
    print(f"\n{family}: {size:.1f} MiB of weights on {len(nodes)} nodes of at most 8 MiB, all tokens equal")

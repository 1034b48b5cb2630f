"""Checkpoints in all common forms: names and grouping of their tensors do not change the result."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from azu.engine.check import check
from tests.engine.families import build_model

pytestmark = pytest.mark.prove

WEIGHTS = "model.safetensors"


def saved(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def in_memory_names(model: PreTrainedModel, folder: Path) -> None:
    """Save the tensors under transformers' names in memory: all experts of a layer in one tensor."""
    model.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def without_prefix(model: PreTrainedModel, folder: Path) -> None:
    """Save the tensors under the names in the first uploads of GPT-2 and BLOOM."""
    model.save_pretrained(folder)
    prefix = f"{model.base_model_prefix}."
    tensors = {name.removeprefix(prefix): one for name, one in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def with_the_tied_head(model: PreTrainedModel, folder: Path) -> None:
    """Save a tied head a second time, as some exporters do."""
    model.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = model.get_output_embeddings().weight.detach().clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# Form -> family, function that saves it, a part of a tensor's name that the file has or, after "no ", lacks.
FORMS: dict[str, tuple[str, Callable[[PreTrainedModel, Path], None], str]] = {
    "one tensor per expert": ("mixtral", saved, ".experts.3.w1."),
    "one tensor per expert, newer names": ("qwen3_moe", saved, ".experts.3.gate_proj."),
    "experts fused": ("gpt_oss", saved, ".experts.gate_up_proj"),
    "experts fused as in memory": ("qwen3_moe", in_memory_names, ".experts.gate_up_proj"),
    "tied head left out": ("llama-tied", saved, "no lm_head"),
    "tied head written": ("llama-tied", with_the_tied_head, "lm_head"),
    "no prefix, learned positions": ("gpt2", without_prefix, "no transformer."),
    "no prefix, alibi": ("bloom", without_prefix, "no transformer."),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_runs_as_transformers_runs_it(
    form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    family, write, sign = FORMS[form]
    write(build_model(family, dtype=dtype), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    if sign.startswith("no "):
        assert not any(sign.removeprefix("no ") in name for name in tensors)
    else:
        assert any(sign in name for name in tensors)
    assert dtype in {tensor.dtype for tensor in tensors.values()}

    report = check(tmp_path, model=form, num_stages=3)

    assert report.passed, report.reason

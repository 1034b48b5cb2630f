"""The description of a model from its config, and the models that are refused with a reason."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from azu.errors import BrokenCheckpoint, UnsupportedModel
from azu.models import describe
from azu.models.config_json import eos_token_ids
from azu.protocol.structure import LayerKind
from tests.engine.families import FAMILIES, NUM_LAYERS, build_model

_SMALL = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def _folder(folder: Path, family: str) -> Path:
    FAMILIES[family]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_description_of_a_family_agrees_with_its_model(family: str, tmp_path: Path) -> None:
    found, model = describe(_folder(tmp_path, family)), build_model(family)

    layers = model.get_submodule(found.layers_path)
    assert found.name == type(model).__name__
    assert len(found.layers) == len(layers) == NUM_LAYERS
    around = {name for name, _ in model.get_submodule(found.layers_path.rpartition(".")[0]).named_children()}
    assert found.front | found.back < around


def test_kv_bytes_are_the_size_of_a_real_cache(tmp_path: Path) -> None:
    for family in ("llama", "deepseek_v2", "falcon-7b"):
        found, model = describe(_folder(tmp_path / family, family)), build_model(family)
        cache = model(input_ids=torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
        held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
        assert [layer.kv_bytes_per_token * 10 for layer in found.layers] == held


def test_experts_are_found_in_each_layer(tmp_path: Path) -> None:
    found = describe(_folder(tmp_path, "deepseek_v2"))

    assert [layer.kind for layer in found.layers] == [LayerKind.DENSE] + [LayerKind.MOE] * 5
    assert {(layer.num_experts, layer.experts_per_token) for layer in found.layers[1:]} == {(8, 2)}


def test_modules_before_and_after_the_layers_are_distinguished(tmp_path: Path) -> None:
    found = describe(_folder(tmp_path, "opt-350m"))

    assert found.layers_path == "model.decoder.layers"
    assert found.front == {"embed_tokens", "embed_positions", "project_in"}
    assert found.back == {"project_out"}


def test_end_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    _folder(tmp_path, "llama")
    assert eos_token_ids(tmp_path) == (2,)

    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert eos_token_ids(tmp_path) == (4, 5)


def test_a_huge_model_is_described_without_memory_for_its_weights(tmp_path: Path) -> None:
    AutoConfig.for_model("deepseek_v3").save_pretrained(tmp_path)

    found = describe(tmp_path)

    assert len(found.layers) == 61
    assert found.layers[10].num_experts == 256


_UNFIT: dict[str, tuple[dict[str, object], str]] = {
    "mamba": ({}, "recurrent"),
    "mamba2": ({}, "recurrent"),
    "falcon_mamba": ({}, "recurrent"),
    "rwkv": ({}, "recurrent"),
    "jamba": ({}, "recurrent"),
    "zamba": ({}, "recurrent"),
    "zamba2": ({}, "recurrent"),
    "recurrent_gemma": ({}, "recurrent"),
    "qwen3_next": ({}, "recurrent"),
    "xlstm": ({}, "recurrent"),
    "bart": ({}, "encoder-decoder"),
    "t5": ({}, "encoder-decoder"),
    "bert": (_SMALL, "beside its layers"),
    "gemma4_text": ({}, "more per token than the hidden state"),
    "deepseek_v32": ({}, "beside keys and values"),
    "openai-gpt": ({}, "one hidden state"),
    "vit": ({}, "no causal language model"),
}


@pytest.mark.parametrize("model_type", _UNFIT)
def test_a_model_that_cannot_be_cut_is_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    settings, reason = _UNFIT[model_type]
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match=reason) as refused:
        describe(tmp_path)
    print(f"\n{model_type}: {refused.value.message}")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        ("", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "llama"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "0 layers"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', "1000000000"),
        ('{"model_type": "qwen2", "num_hidden_layers": 100000000000}', "100000000000"),
        ('{"model_type": "llama", "hidden_size": -64}', "llama"),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}', "llama"),
        ('{"model_type": "llama", "eos_token_id": ["a"]}', "eos_token_id|llama"),
    ],
)
def test_a_malformed_config_is_a_broken_checkpoint_and_the_error_names_it(
    content: str | None, complaint: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)

    with pytest.raises(BrokenCheckpoint, match=complaint) as refused:
        describe(tmp_path)
    assert "config" in refused.value.message


@pytest.mark.parametrize(
    "extra",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"},
        {"model_type": "no_such_type"},
        {"model_type": None},
        {"quantization_config": {"quant_method": "fp8"}},
        {"dtype": "float64"},
    ],
)
def test_a_config_with_an_unsupported_feature_is_refused(extra: dict[str, object], tmp_path: Path) -> None:
    _folder(tmp_path, "llama")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran foreign code')")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))

    with pytest.raises(UnsupportedModel):
        describe(tmp_path)

"""Read config.json without running or fetching any code that is not transformers' own."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from azu.errors import BrokenCheckpoint, UnsupportedModel, plain_reason
from azu.models.checkpoint import CONFIG_FILE, GENERATION_CONFIG_FILE
from azu.models.model_types import has_causal_language_model, has_model_type

# No honest config is larger; a larger one only costs its reader memory.
_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_MAX_LAYERS = 1024
_CUSTOM_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the folder's config.

    Raises BrokenCheckpoint when config.json is missing or malformed, UnsupportedModel when it names code of
    its own or describes no causal language model.
    """
    raw = read_json_object(folder / CONFIG_FILE)
    model_type = raw.get("model_type")
    if any(raw.get(key) for key in _CUSTOM_CODE):
        raise UnsupportedModel(f"{CONFIG_FILE} asks for code of its own (auto_map), which azu never runs")
    if not isinstance(model_type, str) or not has_model_type(model_type):
        raise UnsupportedModel(f"{CONFIG_FILE}: transformers has no model type {model_type!r}")
    if raw.get("quantization_config"):
        raise UnsupportedModel(f"{CONFIG_FILE} says that the weights are quantised, which cannot be cut yet")
    _refuse_too_many_layers(raw)
    config = _config(folder, model_type)
    text = config.get_text_config(decoder=True)
    num_layers = text.num_hidden_layers
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{model_type} is an encoder-decoder: its layers need the encoder's state too")
    if not has_causal_language_model(model_type):
        raise UnsupportedModel(f"{model_type} is no causal language model")
    if not isinstance(num_layers, int) or not 0 < num_layers <= _MAX_LAYERS:
        raise BrokenCheckpoint(f"{CONFIG_FILE}: {num_layers!r} layers, where 1 to {_MAX_LAYERS} are served")
    _fix_dynamic_rope(text)
    return config


def _config(folder: Path, model_type: str) -> PreTrainedConfig:
    """Return a config of which the number of its layers can be read."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        config.get_text_config(decoder=True).num_hidden_layers  # noqa: B018 - raises where there is none
    except Exception as error:  # config classes raise errors of many types
        reason = plain_reason(error, "a value in it is not of the kind that this model type has")
        raise BrokenCheckpoint(f"{CONFIG_FILE} is not a {model_type} config: {reason}") from error
    return config


def _fix_dynamic_rope(text: PreTrainedConfig) -> None:
    """Keep a dynamic rope from reading positions: it changes them only beyond the length that azu serves."""
    parameters = getattr(text, "rope_parameters", None) or {}
    for rope in (parameters, *parameters.values()):
        if isinstance(rope, dict) and rope.get("rope_type") == "dynamic" and "alpha" not in rope:
            rope["rope_type"] = "default"


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises BrokenCheckpoint that names the file."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise BrokenCheckpoint(f"{path.name} is larger than {_MAX_CONFIG_BYTES} bytes")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BrokenCheckpoint(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BrokenCheckpoint(f"{path.name} is not a JSON object")
    return content


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end a generation: generation_config.json's, else the config's.

    The tokenizer may know others. The folder is one that `read_config` took.
    """
    path = folder / GENERATION_CONFIG_FILE
    found = read_json_object(path).get("eos_token_id") if path.exists() else None
    if found is None and (folder / CONFIG_FILE).exists():
        config = _config(folder, str(read_json_object(folder / CONFIG_FILE).get("model_type")))
        found = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) for token in ids):
        raise BrokenCheckpoint(f"eos_token_id {found!r} is not made of token ids")
    return tuple(ids)


def _refuse_too_many_layers(raw: dict[str, Any]) -> None:
    # This check runs before a config is built: config classes make lists as long as the number of layers.
    for key, value in raw.items():
        if isinstance(value, int) and key.endswith(("layer", "layers")) and value > _MAX_LAYERS:
            raise BrokenCheckpoint(f"{CONFIG_FILE}: {key} is {value}, more than {_MAX_LAYERS}")

"""Which model types transformers has. The file stands alone because its readers do without torch."""

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


def has_model_type(model_type: str) -> bool:
    """Return whether transformers itself has a model type; `AutoConfig` also looks for code elsewhere."""
    return model_type in CONFIG_MAPPING_NAMES


def has_causal_language_model(model_type: str) -> bool:
    """Return whether a model type generates text; `AutoModelForCausalLM` fails only when it builds one."""
    # It brings torch.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: PLC0415

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

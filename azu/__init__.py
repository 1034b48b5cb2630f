"""azu pools the GPUs of many owners into one network that runs large language models."""

"""Stages, experts, KV, sampling and continuous batching; runs without Ray."""

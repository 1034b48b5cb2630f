"""From a model's id to its shards: find, describe, cut and keep a model.

`describe` is imported on first use: it needs torch and transformers. `status`, `description` and
`shard_cache` need neither.
"""

from typing import Any

from azu.models.description import Architecture

__all__ = ["Architecture", "describe"]


def __getattr__(name: str) -> Any:
    if name == "describe":
        from azu.models.inspection import describe  # noqa: PLC0415

        return describe
    raise AttributeError(name)

"""What a model's config says, read on the meta device: layers, kinds, KV bytes, can it be cut.

`describe` is loaded when it is first asked for: it needs torch and transformers.
"""

from typing import Any

from azu.models.description import Architecture

__all__ = ["Architecture", "describe"]


def __getattr__(name: str) -> Any:
    if name == "describe":
        from azu.models.inspection import describe  # noqa: PLC0415

        return describe
    raise AttributeError(name)

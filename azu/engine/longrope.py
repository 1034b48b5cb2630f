"""Rotary embeddings whose scale depends on the length of the whole sequence, not of the step."""

from typing import Any

import torch
from torch import Tensor, nn

from azu.architecture.skeleton import replace_module
from azu.engine.attention import CURRENT_LAYOUT


class _BySequenceLength(nn.Module):
    """Shows a rotary module one position more: the last of the sequence, by which it chooses its scale."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self._rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        last = torch.full_like(position_ids[:, :1], CURRENT_LAYOUT.get().sequence_length - 1)
        shown = torch.cat([position_ids, last], dim=1)
        return tuple(part[:, :-1] for part in self._rotary(x, shown, *args, **kwargs))


def place_by_sequence_length(model: nn.Module) -> None:
    """Make every longrope module of a model choose its scale by the sequences of the step under way."""
    found = [
        name for name, module in model.named_modules() if getattr(module, "rope_type", None) == "longrope"
    ]
    for name in found:
        replace_module(model, name, _BySequenceLength(model.get_submodule(name)))

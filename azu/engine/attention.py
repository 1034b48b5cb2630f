"""Attention over packed ragged batches, for every family that asks transformers' AttentionInterface.

The mask function gives each layer the model's own mask pattern in place of a tensor; the attention function
evaluates the pattern at the real positions of the sequences. Families without the interface run padded
batches.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from azu.engine.layout import DecodeRows, Layout, Span
from azu.errors import UnsupportedModel

PACKED = "azu_packed"
# Tensors that transformers passes to every attention function; the mask contains what they say.
_KNOWN_TENSORS = frozenset({"position_ids", "cache_position"})

CURRENT_LAYOUT: ContextVar[Layout] = ContextVar("CURRENT_LAYOUT")


class MaskPattern:
    """The keys that a query sees, as a function of positions; all layers of a forward share the masks."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._masks: dict[int, Tensor | None] = {}

    @property
    def is_causal(self) -> bool:
        """Whether a query sees every key up to its own."""
        return self._function is causal_mask_function

    def of_singles(self, singles: DecodeRows) -> Tensor | None:
        """Return the mask [num_slices, 1, 1, num_keys] of slices of one token, None if it hides no key."""
        if -1 not in self._masks:
            needless = self.is_causal and not singles.ragged
            queries = singles.positions[:, None, None, None]
            self._masks[-1] = None if needless else self._at(queries, singles.num_keys)
        return self._masks[-1]

    def of_span(self, span: Span, device: torch.device) -> Tensor | None:
        """Return the mask [1, 1, tokens, keys] of a slice of several tokens."""
        if span.row not in self._masks:
            queries = torch.arange(span.position, span.position + span.row_end - span.row, device=device)
            self._masks[span.row] = self._at(queries[None, None, :, None], span.key_end - span.key)
        return self._masks[span.row]

    def _at(self, queries: Tensor, num_keys: int) -> Tensor:
        keys = torch.arange(num_keys, device=queries.device)[None, None, None, :]
        zero = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=queries.device)
        return self._function(zero, zero, queries, keys).expand(*queries.shape[:3], num_keys)


def mask_pattern(*, mask_function: Callable[..., Tensor], **_: Any) -> MaskPattern:
    """Return the model's mask as a pattern: a function for AttentionMaskInterface."""
    return MaskPattern(mask_function)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskPattern | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend each sequence of a packed batch to its own keys: a function for AttentionInterface.

    query [1, heads, tokens, width], key and value [1, kv heads, keys, width]; out [1, tokens, heads, width].
    """
    _refuse_unknown(module, kwargs)
    layout = CURRENT_LAYOUT.get()
    pattern = MaskPattern(causal_mask_function) if attention_mask is None else attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = _Kernel(scale, softcap, s_aux)
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    if (singles := layout.singles) is not None:
        out[0, singles.rows] = _attend_singles(kernel, query, key, value, singles, pattern)
    for span in layout.spans:
        rows, keys = slice(span.row, span.row_end), slice(span.key, span.key_end)
        mask = pattern.of_span(span, query.device)
        attended = kernel(query[:, :, rows], key[:, :, keys], value[:, :, keys], mask)
        out[0, rows] = attended[0].transpose(0, 1)
    return out, None


@dataclass(frozen=True, slots=True)
class _Kernel:
    """Attends queries [batch, heads, tokens, width]; `sinks` [heads] are extra scores in its softmax."""

    scale: float
    softcap: float | None
    sinks: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, width = query.shape
        groups = heads // key.shape[1]
        # Heads with the same keys become rows of one head, so that no key is copied.
        folded = query.reshape(batch, key.shape[1], groups * tokens, width)
        if mask is not None and tokens > 1:
            mask = mask.repeat(1, 1, groups, 1)
        if self.softcap is None and self.sinks is None:
            out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=self.scale)
        else:
            out = self._weights(folded, key, mask, tokens).to(value.dtype) @ value
        return out.reshape(batch, heads, tokens, value.shape[3])

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
        scores = (query @ key.transpose(2, 3)) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if self.sinks is None:
            return scores.softmax(-1, dtype=torch.float32)
        sinks = self.sinks.reshape(1, key.shape[1], -1, 1).repeat_interleave(tokens, 2)
        joined = torch.cat([scores, sinks.expand(len(scores), -1, -1, 1).to(scores.dtype)], -1)
        return joined.softmax(-1, dtype=torch.float32)[..., :-1]


def _attend_singles(
    kernel: _Kernel, query: Tensor, key: Tensor, value: Tensor, singles: DecodeRows, pattern: MaskPattern
) -> Tensor:
    """Return [num_slices, heads, value width] for all slices of one token."""
    own_keys, own_values = (
        states[0, :, : len(singles) * singles.num_keys]
        .view(states.shape[1], len(singles), singles.num_keys, states.shape[3])
        .transpose(0, 1)
        for states in (key, value)
    )
    queries = query[0, :, singles.rows].transpose(0, 1)[:, :, None]
    return kernel(queries, own_keys, own_values, pattern.of_singles(singles))[:, :, 0]


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and name not in _KNOWN_TENSORS:
            raise UnsupportedModel(
                f"{type(module).__name__} passes {name!r} to attention, which azu does not know"
            )


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, mask_pattern)

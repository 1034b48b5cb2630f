"""The paged KV cache: a pool of slots per layer, which each step writes and reads by its block tables."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from azu.engine.layout import Layout


class PagedKV(Cache):  # type: ignore[misc] # transformers is untyped
    """A transformers cache over pools with the topology's number of blocks.

    A pool is [num_blocks * block_size, heads, width]. Its heads and width are those of the first keys or
    values of its layer, so that latents and unequal widths need no code of their own.
    """

    def __init__(self, num_layers: int, num_blocks: int, block_size: int) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(num_layers)])
        self._block_size = block_size
        self._num_slots = num_blocks * block_size
        self._pools: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._layout: Layout | None = None

    def begin(self, layout: Layout) -> None:
        """Set the slots that the next forward writes and reads."""
        self._layout = layout

    @property
    def layout(self) -> Layout:
        """The layout of the current step."""
        assert self._layout is not None, "begin() comes first"
        return self._layout

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values; return all keys and values of its sequences.

        Takes [batch, heads, tokens, width]; returns [1, heads, keys, width] if packed, else a row per
        sequence.
        """
        pools = self._pools[layer_idx]
        if pools is None:
            pools = (self._new_pool(key_states), self._new_pool(value_states))
            self._pools[layer_idx] = pools
        keys, values = (
            self._exchange(pool, states)
            for pool, states in zip(pools, (key_states, value_states), strict=True)
        )
        return keys, values

    def resize(self, num_blocks: int) -> None:
        """Change the number of blocks; blocks that stay keep their content."""
        num_slots = num_blocks * self._block_size
        for layer, pools in enumerate(self._pools):
            if pools is not None:
                # One pool at a time: two sizes of all pools may not fit into memory.
                self._pools[layer] = None
                keys, values = pools
                del pools
                keys = _resized(keys, num_slots)
                self._pools[layer] = keys, _resized(values, num_slots)
        self._num_slots = num_slots

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the library's signature
        """Return the number of tokens before this step's tokens, of the longest sequence."""
        return self.layout.longest - self.layout.most_tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the step's first token, as masks count it."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Return the number of keys that a mask covers, and the first key's position."""
        return self.layout.longest, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """Return -1: block tables bound a sequence, not the cache."""
        return -1

    def _new_pool(self, states: Tensor) -> Tensor:
        return torch.zeros(
            self._num_slots, states.shape[1], states.shape[3], dtype=states.dtype, device=states.device
        )

    def _exchange(self, pool: Tensor, states: Tensor) -> Tensor:
        layout = self.layout
        pool.index_copy_(0, layout.write, layout.flat(states.transpose(1, 2)))
        read = pool.index_select(0, layout.read)
        if layout.padding is None:
            return read.transpose(0, 1)[None]
        # In the memory order of transformers' own cache: some families with padded batches rely on it.
        return read.view(len(layout.slices), layout.longest, *read.shape[1:]).transpose(1, 2).contiguous()


def _resized(pool: Tensor, num_slots: int) -> Tensor:
    if num_slots <= len(pool):
        return pool[:num_slots].clone()
    more = torch.zeros(num_slots - len(pool), *pool.shape[1:], dtype=pool.dtype, device=pool.device)
    return torch.cat((pool, more))

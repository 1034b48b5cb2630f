"""What a plan has to promise, and what it counts on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlanPolicy:
    """Room and cost that a plan reckons with.

    Every stage holds the KV of `promised_sequences` sequences of `tokens_per_sequence` tokens, in blocks of
    `block_size`. `activation_tokens` is the largest step. The margin is kept free beside all of it on every
    piece: `margin_bytes` plus `margin_fraction` of its weights. `hop_s` is the cost of one frame between two
    nodes; `batch_size` the number of sequences that the predicted tokens per second are for.
    """

    promised_sequences: int
    tokens_per_sequence: int
    block_size: int = 16
    activation_tokens: int = 512
    margin_bytes: int = 0
    margin_fraction: float = 0.02
    hop_s: float = 0.001
    batch_size: int = 8
    lamports_per_token_layer: int = 2

    @property
    def num_blocks(self) -> int:
        """KV blocks that every stage has."""
        per_sequence = -(-self.tokens_per_sequence // self.block_size)
        return self.promised_sequences * per_sequence

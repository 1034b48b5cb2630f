"""What a plan has to promise, and what it counts on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlanPolicy:
    """Room and cost that a plan reckons with.

    Every stage holds the KV of `promised_sequences` sequences of `tokens_per_sequence` tokens, in blocks of
    `block_size`. `activation_tokens` is the largest step. The margin is kept free beside all of it on every
    piece: `margin_bytes` plus `margin_fraction` of its weights. `hop_s` is the cost of one frame between two
    nodes, at least; `batch_size` the number of sequences that the predicted tokens per second are for.

    A cold piece is fetched at `fetch_bytes_per_s` and loaded at `load_bytes_per_s`. Pieces move when that
    pays back within `horizon_s` with `least_gain` (a fraction) on top; a further pipeline of a model is at
    least `least_replica_speed` (a fraction) as fast as the first. An expert that is chosen `hot_expert` times
    as often as an even one is held twice.
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
    fetch_bytes_per_s: float = 100e6
    load_bytes_per_s: float = 1e9
    horizon_s: float = 600.0
    least_gain: float = 0.1
    least_replica_speed: float = 0.25
    hot_expert: float = 2.0

    @property
    def num_blocks(self) -> int:
        """KV blocks that every stage has."""
        per_sequence = -(-self.tokens_per_sequence // self.block_size)
        return self.promised_sequences * per_sequence

"""The room that each plan reserves, and the costs that it assumes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlanPolicy:
    """The values that all plans of a network are made with.

    Each stage holds the KV of `promised_sequences` sequences of `tokens_per_sequence` tokens, in blocks of
    `block_size`. `activation_tokens` is the number of tokens in the largest step. A margin stays free on each
    piece: `margin_bytes` plus `margin_fraction` of its weights. `hop_s` is the least time of a frame between
    two nodes. The prediction of tokens per second is for `batch_size` sequences.

    A piece is fetched at `fetch_bytes_per_s` and loaded at `load_bytes_per_s`. Pieces move when that pays
    back within `horizon_s`, with a gain of `least_gain` (a fraction) on top. A further pipeline of a model
    has at least the fraction `least_replica_speed` of the first one's speed. An expert that routers choose
    `hot_expert` times as often as the average expert of its layer gets a replica.
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
        """Number of KV blocks on each stage."""
        per_sequence = -(-self.tokens_per_sequence // self.block_size)
        return self.promised_sequences * per_sequence

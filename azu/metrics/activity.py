"""What one deployed model does, and how fast between two looks at it."""

from dataclasses import dataclass, field

from azu.metrics import catalogue as metrics
from azu.metrics.meter import Picture


@dataclass(frozen=True, slots=True)
class Spent:
    """How often something was measured, and its seconds in all."""

    count: int = 0
    seconds: float = 0.0

    def mean_s(self, since: "Spent") -> float | None:
        """Return the mean of what was measured since then, None if nothing was."""
        count = self.count - since.count
        return (self.seconds - since.seconds) / count if count > 0 else None


@dataclass(frozen=True, slots=True)
class Activity:
    """A model's counters since the network's start, and its sequences and KV blocks now."""

    running_sequences: int = 0
    waiting_sequences: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    stalls: int = 0
    recoveries: int = 0
    time_to_first_token: Spent = field(default_factory=Spent)
    time_per_token: Spent = field(default_factory=Spent)
    hop: Spent = field(default_factory=Spent)


@dataclass(frozen=True, slots=True)
class Speed:
    """What a model did in the time between two looks; None where nothing was measured."""

    tokens_per_s: float
    time_to_first_token_s: float | None
    time_per_token_s: float | None
    hop_s: float | None


def activity_of(picture: Picture, model_id: str) -> Activity:
    """Return what a network's picture says of a model."""

    def spent(metric: metrics.Metric) -> Spent:
        histogram = picture.histogram(metric, model_id)
        return Spent(histogram.count, histogram.sum)

    def whole(metric: metrics.Metric, *labels: str) -> int:
        return round(picture.value(metric, model_id, *labels))

    return Activity(
        running_sequences=whole(metrics.SEQUENCES, "running"),
        waiting_sequences=whole(metrics.SEQUENCES, "waiting"),
        kv_blocks=whole(metrics.KV_BLOCKS),
        kv_blocks_used=whole(metrics.KV_BLOCKS_USED),
        prompt_tokens=whole(metrics.PROMPT_TOKENS),
        generated_tokens=whole(metrics.GENERATED_TOKENS),
        stalls=whole(metrics.STALLS),
        recoveries=whole(metrics.RECOVERIES),
        time_to_first_token=spent(metrics.TIME_TO_FIRST_TOKEN),
        time_per_token=spent(metrics.TIME_PER_TOKEN),
        hop=spent(metrics.HOP),
    )


def speed_between(before: Activity, after: Activity, seconds: float) -> Speed:
    """Return how fast a model was from one look to another, `seconds` apart."""
    tokens = after.generated_tokens - before.generated_tokens
    return Speed(
        tokens_per_s=max(0, tokens) / seconds,
        time_to_first_token_s=after.time_to_first_token.mean_s(before.time_to_first_token),
        time_per_token_s=after.time_per_token.mean_s(before.time_per_token),
        hop_s=after.hop.mean_s(before.hop),
    )

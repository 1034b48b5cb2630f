"""Every metric of azu by name, kind, labels and meaning; units are in the names.

A counter's name ends in `_total`, as Prometheus has it. What Ray exports of them begins with `ray_`.
"""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What Prometheus calls it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric. `buckets` are the upper bounds of a histogram's, without the infinite one."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_FINE_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)

PROMPT_TOKENS = Metric(
    "azu_prompt_tokens_total", Kind.COUNTER, "Prompt tokens of sequences that began.", ("model",)
)
GENERATED_TOKENS = Metric("azu_generated_tokens_total", Kind.COUNTER, "Tokens delivered.", ("model",))
TIME_TO_FIRST_TOKEN = Metric(
    "azu_time_to_first_token_seconds",
    Kind.HISTOGRAM,
    "From a sequence's arrival in its pipeline to its first token.",
    ("model",),
    _SECONDS,
)
TIME_PER_TOKEN = Metric(
    "azu_time_per_token_seconds",
    Kind.HISTOGRAM,
    "Between two tokens of one sequence.",
    ("model",),
    _SECONDS,
)
STALLS = Metric(
    "azu_stalls_total",
    Kind.COUNTER,
    "Waits of a second or more between two tokens of a sequence.",
    ("model",),
)
RECOVERIES = Metric("azu_recoveries_total", Kind.COUNTER, "Repairs of lost pieces.", ("model", "result"))
HOP = Metric(
    "azu_hop_seconds",
    Kind.HISTOGRAM,
    "A frame's way to the next stage and its acknowledgement's way back, without what is computed there.",
    ("model", "stage"),
    _FINE_SECONDS,
)
SEQUENCES = Metric(
    "azu_sequences", Kind.GAUGE, "Sequences in a pipeline: running, or waiting for KV blocks.",
    ("model", "state"),
)  # fmt: skip
KV_BLOCKS = Metric(
    "azu_kv_blocks", Kind.GAUGE, "KV blocks of a pipeline, the same on each of its stages.", ("model",)
)
KV_BLOCKS_USED = Metric("azu_kv_blocks_used", Kind.GAUGE, "KV blocks that sequences hold.", ("model",))
JOBS = Metric("azu_jobs", Kind.GAUGE, "Jobs: running, or waiting for their model.", ("state",))
JOBS_ENDED = Metric("azu_jobs_ended_total", Kind.COUNTER, "Jobs that ended, by how.", ("model", "state"))
NODES = Metric("azu_nodes", Kind.GAUGE, "Nodes by state.", ("state",))
NODE_VRAM = Metric("azu_node_vram_bytes", Kind.GAUGE, "VRAM that a node lends.", ("node",))
NODE_VRAM_FREE = Metric(
    "azu_node_vram_free_bytes", Kind.GAUGE, "What of it may still be placed there.", ("node",)
)
NODE_VRAM_USED = Metric(
    "azu_node_vram_used_bytes", Kind.GAUGE, "What azu's processes really hold on the node.", ("node",)
)
NODE_VRAM_OTHER = Metric(
    "azu_node_vram_other_bytes", Kind.GAUGE, "What other programs hold on the node's device.", ("node",)
)
NODE_LOAD = Metric("azu_node_load_ratio", Kind.GAUGE, "The busy part of a node's device.", ("node",))
BAD_FRAMES = Metric(
    "azu_bad_frames_total", Kind.COUNTER, "Frames that a node sent and their receiver refused.", ("node",)
)
LAMPORTS_CHARGED = Metric(
    "azu_lamports_charged_total", Kind.COUNTER, "Lamports charged for jobs since the books were opened."
)
LAMPORTS_EARNED = Metric(
    "azu_lamports_earned_total", Kind.COUNTER, "Lamports that workers earned since the books were opened."
)
LAMPORTS_PAID = Metric(
    "azu_lamports_paid_total", Kind.COUNTER, "Lamports paid out to workers since the books were opened."
)
LAMPORTS_HELD = Metric(
    "azu_lamports_held", Kind.GAUGE, "Lamports of users and workers that the platform holds, by what for.",
    ("account",),
)  # fmt: skip

CATALOGUE = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
BY_NAME = {metric.name: metric for metric in CATALOGUE}

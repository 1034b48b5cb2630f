"""Network files: a policy, and the workers that `azu up` starts beside it on its own machine."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from azu.config.settings import Address, Settings, Size, configuration_error
from azu.errors import ConfigurationError
from azu.files import CONFIGS, read_yaml
from azu.planner.policy import PlanPolicy
from azu.units import MIB


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a job waits: up to `first_s` before its second try, twice as long each time, at most `longest_s`.

    It fails when `budget_s` have passed since it last got a token.
    """

    first_s: float
    longest_s: float
    budget_s: float

    def wait_s(self, tries: int, chance: random.Random) -> float:
        """Return how long to wait after so many tries; half of it is chance, or jobs would come in waves."""
        return min(self.longest_s, self.first_s * 2.0 ** (tries - 1)) * chance.uniform(0.5, 1.0)


Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Price(_Section):
    """What a token costs in each layer, and the platform's part of it."""

    lamports_per_token_layer: Count
    platform_percent: Annotated[int, Field(ge=0, le=100)]


class KvCapacity(_Section):
    """The sequences that every deployed model has room for, and how their KV is cut into blocks."""

    promised_sequences: Count
    tokens_per_sequence: Count
    block_size: Count


class Planner(_Section):
    """What the planner keeps free on every piece, and what it counts with when it predicts speed or moves."""

    margin_bytes: Size
    margin_fraction: Annotated[float, Field(ge=0, le=1)]
    hop_s: Seconds
    batch_size: Count
    fetch_bytes_per_s: Annotated[Size, Field(ge=1)]
    load_bytes_per_s: Annotated[Size, Field(ge=1)]
    horizon_s: Seconds
    least_gain: Annotated[float, Field(ge=0, le=10)]
    least_replica_speed: Annotated[float, Field(ge=0, le=1)]
    hot_expert: Annotated[float, Field(gt=1)]


class Engine(_Section):
    """The largest prefill of one step, and the sequences that run at once."""

    prefill_chunk_tokens: Count
    max_running: Count


class Heartbeat(_Section):
    """How often a node is asked how it is, and after how long a silence it is suspect or dead."""

    period_s: Seconds
    suspect_s: Seconds
    dead_s: Seconds


class Requeue(_Section):
    """How a job waits whose workers are gone, and after how long without a new token it fails.

    Where `nodes_come` when they are asked for, a job waits for them too that all nodes there are never hold.
    """

    first_s: Seconds
    longest_s: Seconds
    budget_s: Seconds
    nodes_come: bool


class Moves(_Section):
    """How often models look for better places, and how long each stays where it came up."""

    look_s: Seconds
    rest_s: Seconds


class Limits(_Section):
    """What one request may ask for, how many a caller may send, and how long a reservation stands by itself.

    `requests_per_minute` and `max_jobs_in_flight` are a key's, `sign_ins_per_minute` those of a network
    address that asks for challenges and keys, `max_keys` an account's. The bursts may be sent at once.
    """

    max_body_bytes: Size
    max_prompt_tokens: Count
    max_completion_tokens: Count
    max_choices: Count
    max_stop_strings: Count
    max_stop_characters: Count
    max_logit_bias: Count
    max_messages: Count
    max_tools: Count
    requests_per_minute: Annotated[int, Field(ge=1, le=60_000_000)]
    request_burst: Count
    sign_ins_per_minute: Annotated[int, Field(ge=1, le=60_000_000)]
    sign_in_burst: Count
    max_keys: Count
    max_jobs_in_flight: Count
    reservation_ttl_s: Count


class Timeouts(_Section):
    """How long the network waits for itself."""

    start_s: Seconds
    describe_s: Seconds
    deposit_s: Seconds
    placement_s: Seconds
    fetch_s: Seconds
    load_s: Seconds
    step_s: Seconds


class NetworkPolicy(_Section):
    """Everything a network's owner decides; `models` are the ids that it offers, or patterns of them."""

    models: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    price: Price
    payout_threshold_lamports: Count
    kv: KvCapacity
    planner: Planner
    engine: Engine
    heartbeat: Heartbeat
    requeue: Requeue
    moves: Moves
    limits: Limits
    timeouts: Timeouts

    def retry_policy(self) -> RetryPolicy:
        """Return how long jobs wait for workers."""
        return RetryPolicy(self.requeue.first_s, self.requeue.longest_s, self.requeue.budget_s)

    def plan_policy(self) -> PlanPolicy:
        """Return what of it the planner needs."""
        return PlanPolicy(
            promised_sequences=self.kv.promised_sequences,
            tokens_per_sequence=self.kv.tokens_per_sequence,
            block_size=self.kv.block_size,
            # A step is at most one prefill chunk and one token of every other running sequence.
            activation_tokens=self.engine.prefill_chunk_tokens + self.engine.max_running,
            margin_bytes=self.planner.margin_bytes,
            margin_fraction=self.planner.margin_fraction,
            hop_s=self.planner.hop_s,
            batch_size=self.planner.batch_size,
            fetch_bytes_per_s=self.planner.fetch_bytes_per_s,
            load_bytes_per_s=self.planner.load_bytes_per_s,
            horizon_s=self.planner.horizon_s,
            least_gain=self.planner.least_gain,
            least_replica_speed=self.planner.least_replica_speed,
            hot_expert=self.planner.hot_expert,
            lamports_per_token_layer=self.price.lamports_per_token_layer,
        )


NAME_PATTERN = r"^[a-zA-Z0-9]([a-zA-Z0-9._-]{0,40}[a-zA-Z0-9])?$"


class LocalWorker(BaseModel):
    """A worker on this machine. Ray counts VRAM in whole MiB."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    vram: Annotated[Size, Field(ge=MIB, multiple_of=MIB)]
    payout: Address
    device: Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")] = "cpu"


class NetworkFile(BaseModel):
    """What a network file says, completed by configs/network.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: NetworkPolicy
    workers: tuple[LocalWorker, ...] = ()


def load_settings(network: Path | None = None) -> tuple[Settings, NetworkFile]:
    """Return the environment's settings, with another network file if one is given, and what that file says.

    Raises ConfigurationError as `load_network` does.
    """
    settings = Settings.from_environment()
    if network is not None:
        settings = settings.model_copy(update={"network": network.absolute()})
    return settings, load_network(settings.network)


def load_network(path: Path | None = None) -> NetworkFile:
    """Return the network of a file, which says only what differs from configs/network.yaml.

    Raises ConfigurationError that names the file and the keys at fault.
    """
    standard = _read(CONFIGS / "network.yaml")
    own = {} if path is None else _read(path)
    try:
        return NetworkFile.model_validate(_merged(standard, own))
    except ValidationError as error:
        raise configuration_error(error, str(path or "configs/network.yaml")) from error


def _read(path: Path) -> Mapping[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} is not a mapping of keys to values")
    return content


def _merged(standard: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(standard)
    for key, value in own.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return merged

"""Network files: a network's policy, and the workers that `azu up` starts on its own machine."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from azu.config.settings import Address, Settings, Size, configuration_error
from azu.contact import doubling_s
from azu.errors import ConfigurationError
from azu.files import CONFIGS, read_yaml
from azu.planner.policy import PlanPolicy
from azu.units import MIB

NAME_PATTERN = r"^[a-zA-Z0-9]([a-zA-Z0-9._-]{0,40}[a-zA-Z0-9])?$"
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Price(_Section):
    """The price of a token in each layer, and the platform's share of it."""

    lamports_per_token_layer: Count
    platform_percent: Annotated[int, Field(ge=0, le=100)]


class Limit(_Section):
    """The most that is sent in an hour and in a day, and the percentage that one address may get of it."""

    hour_lamports: Count
    day_lamports: Count
    address_percent: Annotated[int, Field(ge=1, le=100)]


class PayoutLimits(_Section):
    """What the signer sends at most: of users' withdrawals, and of workers' earnings."""

    withdrawals: Limit
    earnings: Limit


class KvCapacity(_Section):
    """The sequences that each deployed model has room for, and the size of a KV block in tokens."""

    promised_sequences: Count
    tokens_per_sequence: Count
    block_size: Count


class Planner(_Section):
    """The margin on each piece, and the values with which the planner predicts speed and decides on moves."""

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
    """The largest prefill of one step in tokens, and the number of sequences that run at once."""

    prefill_chunk_tokens: Count
    max_running: Count


class Heartbeat(_Section):
    """The period of the nodes' reports, and the silence after which a node is suspect or dead."""

    period_s: Seconds
    suspect_s: Seconds
    dead_s: Seconds


class Requeue(_Section):
    """How long a job without workers waits, how long it may be without a new token, and its whole time.

    With `nodes_come` an autoscaler adds nodes on request: then a job waits even when all present nodes
    together do not hold its model.
    """

    first_s: Seconds
    longest_s: Seconds
    budget_s: Seconds
    job_s: Seconds
    nodes_come: bool


class Moves(_Section):
    """How often the scheduler looks for better placements, and how long a model stays after each start.

    A pipeline without a job for `idle_s` leaves when its model has another. Every `share_s` a pipeline moves
    to owners who earned much less, where it is as fast there.
    """

    look_s: Seconds
    rest_s: Seconds
    idle_s: Seconds
    share_s: Seconds


class CanaryPolicy(_Section):
    """How often each placement continues the canary's prompts after its first answer."""

    every_s: Seconds


class Limits(_Section):
    """Limits on one request and on the rate of requests, and the lifetime of a reservation without a job.

    A request for a whole answer is refused when it is predicted to take longer than `max_wait_s`. A special
    token that the prompt of a completion spells is one with `special_tokens_in_prompts`, and else text.
    `requests_per_minute` and `max_jobs_in_flight` hold for each account; what it paid in 30 days adds as much
    again for each `lamports_for_more`, up to `most_times_more`. `key_day_lamports` is what a key without a
    spend limit may spend in a day. `sign_ins_per_minute` (challenges and keys) and `connections_per_address`
    hold for each network address, `max_keys` for each account, `max_nodes` for each machine,
    `max_unfunded_keys` for all accounts that never had money: such a key is dropped after `unfunded_key_s`. A
    burst is the number of requests that may come at once. A job whose client hung up goes on when the same
    request comes again `repeat_within_s` later at the latest; with 0 it ends at once.
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
    max_wait_s: Seconds
    special_tokens_in_prompts: bool
    requests_per_minute: Annotated[int, Field(ge=1, le=60_000_000)]
    request_burst: Count
    sign_ins_per_minute: Annotated[int, Field(ge=1, le=60_000_000)]
    sign_in_burst: Count
    connections_per_address: Count
    max_keys: Count
    max_nodes: Count
    max_unfunded_keys: Count
    unfunded_key_s: Count
    max_jobs_in_flight: Count
    lamports_for_more: Count
    most_times_more: Count
    key_day_lamports: Count | None
    reservation_ttl_s: Count
    repeat_within_s: Annotated[float, Field(ge=0, le=3600)]


class NewModels(_Section):
    """What a model costs that the network does not have: a fee for each GiB, set aside when it is asked for.

    It goes back with the first job of the model, and is charged if there is none in `unused_s`. Models that
    were not used for longest leave the registry's disk while less than `free_bytes` are free.
    """

    lamports_per_gib: Annotated[int, Field(ge=0)]
    unused_s: Count
    free_bytes: Size


class Certificates(_Section):
    """How long a node's certificate is valid."""

    node_s: Annotated[int, Field(ge=60, le=90 * 86_400)]


class Timeouts(_Section):
    """How long parts of the network wait for each other."""

    start_s: Seconds
    describe_s: Seconds
    deposit_s: Seconds
    placement_s: Seconds
    fetch_s: Seconds
    load_s: Seconds
    step_s: Seconds


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The waits of a job between attempts: up to `first_s`, then twice as long each time up to `longest_s`.

    A job fails when it has had no new token for `budget_s`, or when it has not ended after `job_s`; one
    attempt fails when the model does not come up in `load_s`.
    """

    first_s: float
    longest_s: float
    budget_s: float
    load_s: float = 3600.0
    job_s: float = 86_400.0

    def wait_s(self, tries: int, chance: random.Random) -> float:
        """Return the wait after a number of attempts; half of it is random, or jobs would come in waves."""
        return doubling_s(self.first_s, self.longest_s, tries, chance)


class NetworkPolicy(_Section):
    """All that a network's owner decides; `models` are the ids, or patterns of ids, that it offers.

    A job's prompt and answer are kept for `retention_s` after its end; with 0 until its client has the answer
    or may not come back any more.
    """

    models: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    price: Price
    payout_threshold_lamports: Count
    payout_limits: PayoutLimits
    earnings_mature_s: Annotated[int, Field(ge=0, le=30 * 86_400)] | None
    retention_s: Annotated[int, Field(ge=0, le=86_400)]
    kv: KvCapacity
    planner: Planner
    engine: Engine
    heartbeat: Heartbeat
    requeue: Requeue
    moves: Moves
    canary: CanaryPolicy
    limits: Limits
    new_models: NewModels
    certificates: Certificates
    timeouts: Timeouts

    def retry_policy(self) -> RetryPolicy:
        """Return how long jobs wait between attempts."""
        requeue, timeouts = self.requeue, self.timeouts
        load_s = timeouts.placement_s + timeouts.fetch_s + timeouts.load_s
        return RetryPolicy(requeue.first_s, requeue.longest_s, requeue.budget_s, load_s, requeue.job_s)

    def plan_policy(self) -> PlanPolicy:
        """Return the part of the policy that the planner uses."""
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


class LocalWorker(BaseModel):
    """A worker on this machine; `vram` is in bytes, in whole MiB as Ray assigns it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    vram: Annotated[Size, Field(ge=MIB, multiple_of=MIB)]
    payout: Address
    device: Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")] = "cpu"


class NetworkFile(BaseModel):
    """The content of a network file, with configs/network.yaml for the keys that it does not have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: NetworkPolicy
    workers: tuple[LocalWorker, ...] = ()


def load_settings(network: Path | None = None) -> tuple[Settings, NetworkFile]:
    """Return the settings of the environment and the network file that they name, or the one given.

    Raises ConfigurationError as `load_network` does.
    """
    settings = Settings.from_environment()
    if network is not None:
        settings = settings.model_copy(update={"network": network.absolute()})
    return settings, load_network(settings.network)


def load_network(path: Path | None = None) -> NetworkFile:
    """Return the content of a network file, which holds only the keys that differ from configs/network.yaml.

    Raises ConfigurationError that names the file and the keys at fault.
    """
    defaults = _read(CONFIGS / "network.yaml")
    own = {} if path is None else _read(path)
    try:
        return NetworkFile.model_validate(_merged(defaults, own))
    except ValidationError as error:
        raise configuration_error(error, str(path or "configs/network.yaml")) from error


def _read(path: Path) -> Mapping[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} is not a mapping of keys to values")
    return content


def _merged(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for key, value in own.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return merged

"""What the ingress calls: accounts, jobs, the registry and the scheduler, each over its own connection."""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Header, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Address

from actors.links import REGISTRY, ask
from actors.placement import SCHEDULER
from azu.auth.api_keys import ApiKey, RedisAuth
from azu.auth.rate_limit import Rate, RedisRates
from azu.auth.tickets import RedisTickets
from azu.clock import wall_clock_ms
from azu.config import ControlConfig
from azu.errors import BrokenCheckpoint, Forbidden, NotFound, Unauthenticated
from azu.jobs.in_flight_limit import InFlightLimit
from azu.jobs.intake import Intake, JobLimits, ModelFacts
from azu.jobs.record import JobRecord
from azu.jobs.redis import RedisJobs
from azu.models.description import ModelDescription
from azu.money.books import Books
from azu.protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from azu.engine.tokenizer import Tokenizer


_FILE = "generation_config.json"
# What generate samples with when the file says no more than that it samples.
_TOP_K = 50
_TEMPERATURE = 1.0


class _GenerationConfig(BaseModel):
    """The part of the file that azu has; others' files hold much more."""

    model_config = ConfigDict(extra="ignore")

    do_sample: bool | None = None
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    min_new_tokens: int | None = Field(default=None, ge=0)


def default_sampling(files: Mapping[str, bytes]) -> SamplingParams:
    """Return the sampling of a model whose config files these are, greedy when they say nothing.

    Raises BrokenCheckpoint when generation_config.json is malformed.
    """
    try:
        found = _GenerationConfig.model_validate_json(files.get(_FILE, b"{}"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BrokenCheckpoint(f"{_FILE}: {place or 'the file'}: {first['msg']}") from error
    temperature = _TEMPERATURE if found.temperature is None else found.temperature
    top_k = _TOP_K if found.do_sample and found.top_k is None else found.top_k or 0
    return SamplingParams(
        max_tokens=1,
        temperature=temperature if found.do_sample else 0.0,
        top_k=top_k,
        top_p=1.0 if found.top_p is None else found.top_p,
        min_p=found.min_p or 0.0,
        repetition_penalty=1.0 if found.repetition_penalty is None else found.repetition_penalty,
        min_tokens=found.min_new_tokens or 0,
    )


_REFRESH_S = 60.0
_BACK_IN_S = 5.0  # who died is soon back; whoever waits longer may as well ask again
_KEPT_MODELS = 64


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A described model with its tokenizer."""

    facts: ModelFacts
    vocab_size: int
    tokenizer: "Tokenizer"
    defaults: SamplingParams


class Services:
    """The ingress's connections; made once in the replica's own event loop."""

    def __init__(self, config: ControlConfig) -> None:
        policy = config.policy
        self.config = config
        self.auth = RedisAuth.from_url(config.redis_url)
        self.jobs = RedisJobs.from_url(config.redis_url)
        self.books = Books.from_url(config.redis_url, config.platform_address)
        self.tickets = RedisTickets.from_url(config.redis_url)
        self.intake = Intake(
            self.books,
            self.jobs,
            InFlightLimit.from_url(config.redis_url, self.jobs, policy.limits.max_jobs_in_flight),
            JobLimits(
                max_prompt_tokens=policy.limits.max_prompt_tokens,
                max_completion_tokens=policy.limits.max_completion_tokens,
                reservation_ttl_ms=policy.limits.reservation_ttl_s * 1000,
            ),
            policy.price.lamports_per_token_layer,
            now_ms=wall_clock_ms,
            new_job_id=lambda: f"job-{secrets.token_hex(12)}",
        )
        self._rates = RedisRates.from_url(config.redis_url)
        self._key_rate = Rate(policy.limits.requests_per_minute, policy.limits.request_burst)
        self._sign_in_rate = Rate(policy.limits.sign_ins_per_minute, policy.limits.sign_in_burst)
        self._models: OrderedDict[str, tuple[float, ServedModel]] = OrderedDict()

    async def owner(self, authorization: str | None, claimed_address: str | None = None) -> ApiKey:
        """Return the key behind an Authorization header and count the request as its own.

        Raises Unauthenticated without a good key, RateLimited for one that asks too often, Forbidden when the
        request speaks for another address.
        """
        scheme, _, bearer = (authorization or "").partition(" ")
        key = await self.auth.check(bearer if scheme.lower() == "bearer" else None, wall_clock_ms())
        await self._rates.take(key.key_id, self._key_rate)
        if claimed_address is not None and claimed_address.lower() != key.address:
            raise Forbidden("this key belongs to another address", param="user_address")
        return key

    async def count_sign_in(self, client: Address | None) -> None:
        """Count a request that no key is needed for; raises RateLimited."""
        await self._rates.take(f"from:{client.host if client else ''}", self._sign_in_rate)

    async def registry(self, method: str, *arguments: Any) -> Any:
        """Call the registry; raises Unavailable while it is away."""
        return await self._call(REGISTRY, method, self.config.policy.timeouts.describe_s, *arguments)

    async def scheduler(self, method: str, *arguments: Any) -> Any:
        """Call the scheduler; raises Unavailable while it is away."""
        return await self._call(SCHEDULER, method, self.config.policy.timeouts.describe_s, *arguments)

    async def model(self, model_id: str) -> ServedModel:
        """Return a model that can be priced; raises ModelNotFound or why it cannot be served."""
        heard_s, served = self._models.get(model_id, (float("-inf"), None))
        if served is None or time.monotonic() - heard_s > _REFRESH_S:
            described: ModelDescription = await self.registry("describe", model_id)
            if served is None or served.facts.revision != described.revision:
                served = await asyncio.to_thread(_served, described)
            self._models[model_id] = (time.monotonic(), served)
            while len(self._models) > _KEPT_MODELS:
                self._models.popitem(last=False)
        return served

    async def _call(self, actor: str, method: str, timeout_s: float, *arguments: Any) -> Any:
        return await ask(actor, method, *arguments, timeout_s=timeout_s, back_in_s=_BACK_IN_S)


def warm_up() -> None:
    """Import what the first prompt needs; it takes seconds, and nothing else waits for it."""
    import azu.engine.tokenizer  # noqa: F401, PLC0415


def _served(described: ModelDescription) -> ServedModel:
    from azu.engine.tokenizer import Tokenizer  # noqa: PLC0415 - loads transformers

    architecture = described.architecture
    facts = ModelFacts(
        model_id=described.model_id,
        revision=described.revision,
        num_layers=len(architecture.layers),
        context_length=architecture.context_length,
    )
    return ServedModel(
        facts,
        vocab_size=architecture.vocab_size,
        tokenizer=Tokenizer.from_files(described.files),
        defaults=default_sampling(described.files),
    )


def services_of(request: Request) -> Services:
    """Return the replica's services."""
    services: Services = request.app.state.services
    return services


ServicesNow = Annotated[Services, Depends(services_of)]


async def key_of(services: ServicesNow, authorization: Annotated[str | None, Header()] = None) -> ApiKey:
    """Return the caller's key; raises Unauthenticated."""
    return await services.owner(authorization)


Key = Annotated[ApiKey, Depends(key_of)]


async def owned(services: Services, key: ApiKey, job_id: str) -> JobRecord:
    """Return a job of the key's address; raises NotFound, and Forbidden for another address's."""
    record = await services.jobs.get(job_id)
    if record is None:
        raise NotFound("there is no such job", param="job_id", code="job_not_found")
    if record.job.address != key.address:
        raise Forbidden("this job belongs to another address", param="job_id")
    return record


def check_admin(authorization: str | None, admin_key_sha256: str) -> None:
    """Raise Unauthenticated unless the header carries the admin key."""
    if not is_admin(authorization, admin_key_sha256):
        raise Unauthenticated("this endpoint needs the admin key")


def is_admin(authorization: str | None, admin_key_sha256: str) -> bool:
    """Say whether the header carries the admin key."""
    _, _, bearer = (authorization or "").partition(" ")
    given = hashlib.sha256(bearer.encode()).hexdigest()
    return hmac.compare_digest(given, admin_key_sha256)

"""What the routes call (books, jobs, registry, scheduler), and the keys that a caller shows."""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.datastructures import Address

from actors.links import REGISTRY, ask
from actors.placement import SCHEDULER
from azu.api.openai import Message
from azu.auth.challenges import RedisChallenges
from azu.auth.key_records import ApiKey
from azu.auth.peers import network_of
from azu.auth.places import Places, kind_of
from azu.auth.rate_limit import Growth, Rate, RedisRates, WrongKeys
from azu.clock import wall_clock_ms
from azu.config import ControlConfig
from azu.contact import Contact
from azu.errors import AzuError, Forbidden, InsufficientBalance, NotFound, Unauthenticated, Unavailable
from azu.jobs.departures import Departures
from azu.jobs.draining import Draining
from azu.jobs.earned import EarnedByHour
from azu.jobs.in_flight_limit import InFlightLimit
from azu.jobs.intake import Intake, JobLimits, ModelFacts, check_wait
from azu.jobs.record import JobRecord, record_of
from azu.jobs.redis import RedisJobs
from azu.metrics import SEQUENCES, MetricsSnapshot
from azu.models.description import ModelDescription
from azu.models.status import ModelStatus
from azu.money.books import NOT_PROVIDED, Books, Members
from azu.protocol.sampling import SamplingParams
from azu.redis_client import connect_redis, redis_problem
from azu.supervision import AWAY
from azu.units import format_bytes
from deployments.sampling import default_sampling

if TYPE_CHECKING:
    from azu.engine.tokenizer import Tokenizer


# Requests that are open at once: answers that are being written, and all others.
MOST_ANSWERS, MOST_SHORT = 1500, 512
# How often an account may have the chain asked for a transfer.
_DEPOSITS = Rate(per_minute=6, burst=12)
# A request is answered within a second while Redis is away.
_SILENCE_S = 0.6
# The books say within this time that their own Redis is away.
_BOOKS_SILENCE_S = 0.8
_REFRESH_S = 60.0
_REFRESH_IN_S = 2.0
# A registry or scheduler that died is restarted in this time; a caller that waits longer asks again.
_BACK_IN_S = 5.0
_KEPT_MODELS = 64
_KEPT_ACCOUNTS = 10_000
# A prediction that takes longer is not waited for.
_PREDICTED_IN_S = 1.0
_METRICS_KEPT_S = 2.0
# Every answer of the scheduler is ready; one that keeps its callers waiting is frozen or very busy.
_SCHEDULER_S = 10.0
# The health is told within a second, whatever does not answer. The time is counted in parts: where this
# process itself is late, the answer that lies ready is read before the next part.
_HEALTH_IN_S = 0.7
_HEALTH_PARTS = 7


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A described model with its tokenizer and its own sampling defaults."""

    facts: ModelFacts
    vocab_size: int
    tokenizer: "Tokenizer"
    defaults: SamplingParams


class Services:
    """The ingress's connections. A replica makes them once, in its own event loop."""

    def __init__(self, config: ControlConfig) -> None:
        policy = config.policy
        self.config = config
        connect = partial(connect_redis, config.redis_url, silence_s=_SILENCE_S)
        self._redis = connect()
        self.challenges = RedisChallenges(self._redis, config.platform_address)
        # Callers that wait for the treasury have connections of their own.
        self.books = Books(config.books_url, connect(), silence_s=_BOOKS_SILENCE_S)
        self.jobs = RedisJobs(connect(), self.books.ended)
        self.members = Members(config.books_url)
        self.earned = EarnedByHour(self._redis)
        self._draining = Draining(self._redis, self.jobs)
        self.intake = Intake(
            self.books,
            self.jobs,
            InFlightLimit(self._redis, self.jobs, policy.limits.max_jobs_in_flight, self._times),
            JobLimits(
                max_prompt_tokens=policy.limits.max_prompt_tokens,
                max_completion_tokens=policy.limits.max_completion_tokens,
            ),
            Departures(self._redis, policy.limits.repeat_within_s),
            self._draining,
            now_ms=wall_clock_ms,
            new_job_id=lambda: f"job-{secrets.token_hex(12)}",
        )
        self.answers = Places(MOST_ANSWERS)
        self.short = Places(MOST_SHORT)
        self._rates = RedisRates(self._redis)
        self.wrong_keys = WrongKeys(self._rates)
        self._rate = Rate(policy.limits.requests_per_minute, policy.limits.request_burst)
        self._growth = Growth(policy.limits.lamports_for_more, policy.limits.most_times_more)
        # Address -> when it was asked, and how many times more it may: the latest callers.
        self._more: OrderedDict[str, tuple[float, float]] = OrderedDict()
        # The transfers that were credited: to ask for them again costs the chain nothing.
        self._credited: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._sign_in_rate = Rate(policy.limits.sign_ins_per_minute, policy.limits.sign_in_burst)
        self._scheduler = Contact("the scheduler")
        self._measured = (float("-inf"), MetricsSnapshot({}, {}))
        self._models: OrderedDict[tuple[str, bool], tuple[float, ServedModel]] = OrderedDict()

    async def key(self, secret: str | None, client: Address | None) -> ApiKey:
        """Return the API key with a secret and count the request as its account's.

        Raises Unauthenticated without a valid key, RateLimited for an account with too many requests, or an
        address with too many wrong keys.
        """
        if not secret:
            raise Unauthenticated(
                "send an API key as `Authorization: Bearer azu-sk-...`; `azu login` opens one"
            )
        key = await self.wrong_keys.judged(secret, _host(client), self.books.key)
        await self._rates.take(key.address, self._rate.times(await self._times(key.address)))
        return key

    async def check_admin(self, secret: str | None, client: Address | None) -> None:
        """Raise Unauthenticated unless this is the admin key, RateLimited as `key` does."""

        async def judge(secret: str) -> None:
            if not self._is_admin(secret):
                raise Unauthenticated("this endpoint needs the admin key")

        await self.wrong_keys.judged(secret or "", _host(client), judge)

    async def key_unless_admin(self, secret: str | None, client: Address | None) -> ApiKey | None:
        """Return the API key with a secret as `key` does, None for the admin key."""
        if not self._is_admin(secret or ""):
            return await self.key(secret, client)
        await self.check_admin(secret, client)
        return None

    def _is_admin(self, secret: str) -> bool:
        given = hashlib.sha256(secret.encode()).hexdigest()
        return hmac.compare_digest(given, self.config.admin_key_sha256)

    async def _times(self, address: str) -> float:
        """Return how many times as high an account's limits are, as of a minute ago at most."""
        asked_s, times = self._more.get(address, (float("-inf"), 1.0))
        if time.monotonic() - asked_s > _REFRESH_S:
            times = self._growth.times(await self.books.paid(address))
            self._more[address] = (time.monotonic(), times)
            while len(self._more) > _KEPT_ACCOUNTS:
                self._more.popitem(last=False)
        return times

    async def count_deposit(self, key: ApiKey, tx_hash: str) -> None:
        """Count a question for a transfer, unless it is known to be credited; raises RateLimited.

        Any other is looked for on the chain, which answers the treasury only so often.
        """
        if (key.address, tx_hash) not in self._credited:
            await self._rates.take(f"deposit:{key.address}", _DEPOSITS)

    def note_credited(self, key: ApiKey, tx_hash: str) -> None:
        """Note that a transfer was credited, so that questions for it are not counted."""
        self._credited[key.address, tx_hash] = None
        while len(self._credited) > _KEPT_ACCOUNTS:
            self._credited.popitem(last=False)

    async def count_sign_in(self, client: Address | None) -> None:
        """Count a request that needs no key, by its sender's address (IPv6: its /64); raises RateLimited."""
        await self._rates.take(f"from:{network_of(_host(client))}", self._sign_in_rate)

    async def health(self) -> tuple[bool, tuple[str, ...]]:
        """Return whether prompts can be served, and what goes wrong; who does not answer at once is away."""
        (stores, are_away), (is_ready, failing) = await asyncio.gather(
            self._problems_of_stores(), self._said_by_scheduler()
        )
        return is_ready and not are_away, stores + failing

    async def _said_by_scheduler(self) -> tuple[bool, tuple[str, ...]]:
        """Return whether jobs can be run, and what goes wrong in the network's processes."""
        calls = (self._call(SCHEDULER, one, _SCHEDULER_S) for one in ("ready", "problems"))
        asked = asyncio.gather(*calls)
        for _ in range(_HEALTH_PARTS):
            await asyncio.wait({asked}, timeout=_HEALTH_IN_S / _HEALTH_PARTS)
            if asked.done():
                break
        try:
            if not asked.done():
                asked.cancel()
                raise TimeoutError
            is_ready, failing = asked.result()
        except (AzuError, TimeoutError) as error:
            self._scheduler.fails(error)
            return False, tuple(filter(None, [self._scheduler.problem()]))
        self._scheduler.answers()
        return is_ready, failing

    async def _problems_of_stores(self) -> tuple[tuple[str, ...], bool]:
        """Return what is wrong with Redis and the money, and whether Redis or the books are away."""
        asked = (self._draining.check(), self.books.findings())
        checked, findings = await asyncio.gather(*asked, return_exceptions=True)
        known = tuple(filter(None, (redis_problem(self._redis), self.books.problem())))
        if known or isinstance(checked, Unavailable):
            return known or (str(checked),), True
        if isinstance(findings, AzuError):
            return (f"the books cannot go on: {findings.message}",), True
        if isinstance(findings, BaseException):
            raise findings
        return tuple(f"payouts wait: {finding}; `azu treasury status`" for finding in findings), False

    async def registry(self, method: str, *arguments: Any) -> Any:
        """Call the registry; raises Unavailable while it does not answer."""
        return await self._call(REGISTRY, method, self.config.policy.timeouts.describe_s, *arguments)

    async def scheduler(self, method: str, *arguments: Any) -> Any:
        """Call the scheduler; raises Unavailable while it does not answer."""
        return await self._call(SCHEDULER, method, _SCHEDULER_S, *arguments)

    async def encode(self, model: ServedModel, text: str) -> list[int]:
        """Return the token ids of a prompt as it is."""
        takes_special = self.config.policy.limits.special_tokens_in_prompts
        return await asyncio.to_thread(model.tokenizer.encode, text, takes_special=takes_special)

    async def render(
        self, model: ServedModel, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Return the token ids of a chat in the model's template."""
        turns = [message.for_template() for message in messages]
        return await asyncio.to_thread(model.tokenizer.render_chat, turns, list(tools) or None)

    async def check_wait(self, model: ModelFacts, num_prompt: int, num_tokens: int) -> None:
        """Raise Unavailable where a whole answer is predicted to take longer than the policy allows."""
        try:
            async with asyncio.timeout(_PREDICTED_IN_S):
                measured = await self._recent_metrics()
                load_s = await self._load_s(model.model_id, measured)
        except (AzuError, TimeoutError):
            return  # nothing is known
        max_wait_s = self.config.policy.limits.max_wait_s
        check_wait(measured, model.model_id, num_prompt, num_tokens, load_s=load_s, max_wait_s=max_wait_s)

    async def _load_s(self, model_id: str, measured: MetricsSnapshot) -> float:
        """Return about how long a model needs until it runs."""
        if (SEQUENCES.name, (model_id, "running")) in measured.values:
            return 0.0
        planner = self.config.policy.planner
        weights: ModelStatus = await self.registry("status", model_id)
        return weights.total_bytes * (1 / planner.fetch_bytes_per_s + 1 / planner.load_bytes_per_s)

    async def _recent_metrics(self) -> MetricsSnapshot:
        read_s, measured = self._measured
        if time.monotonic() - read_s > _METRICS_KEPT_S:
            measured = await self.scheduler("metrics")
            self._measured = (time.monotonic(), measured)
        return measured

    async def model(self, model_id: str, bearer: str | None = None) -> ServedModel:
        """Return a model that can be priced; raises ModelNotFound, or the reason why azu cannot serve it.

        For a model that is new here the key `bearer` sets a fee aside; None is for the model of a job.
        """
        # What was read for a job that has run has no fee set aside for it.
        mine, asked_for = (model_id, bearer is not None), (model_id, True)
        read_s, served = self._models.get(mine) or self._models.get(asked_for) or (float("-inf"), None)
        if served is None or time.monotonic() - read_s > _REFRESH_S:
            try:
                async with asyncio.timeout(None if served is None else _REFRESH_IN_S):
                    described = await self._described(model_id, bearer)
            except (*AWAY, TimeoutError):
                if served is None:
                    raise
                # A model that is known is served while the registry is away or busy.
                self._models[mine] = (time.monotonic(), served)
                return served
            if served is None or served.facts.revision != described.revision:
                served = await asyncio.to_thread(_served, described)
            self._models[mine] = (time.monotonic(), served)
            while len(self._models) > _KEPT_MODELS:
                self._models.popitem(last=False)
        return served

    async def _described(self, model_id: str, bearer: str | None) -> ModelDescription:
        num_bytes = 0 if bearer is None else await self.registry("new_bytes", model_id)
        if not num_bytes:
            known: ModelDescription = await self.registry("describe", model_id, None, bearer is not None)
            return known
        await self._draining.check()
        describing = asyncio.create_task(self._described_for_a_fee(model_id, bearer or "", num_bytes))
        try:
            return await asyncio.shield(describing)
        except asyncio.CancelledError:
            # A caller that hangs up leaves no fee without its model.
            await describing
            raise

    async def _described_for_a_fee(self, model_id: str, bearer: str, num_bytes: int) -> ModelDescription:
        fetch_id = f"fetch-{secrets.token_hex(12)}"
        try:
            await self.books.reserve_fetch(bearer, fetch_id, model_id=model_id, num_bytes=num_bytes)
        except InsufficientBalance as error:
            raise InsufficientBalance(
                f"{model_id} is new here, and a fee for its {format_bytes(num_bytes)} is set aside until a "
                f"job of it is charged: {error.message}",
                param="model",
                code=error.code,
            ) from error
        try:
            new: ModelDescription = await self.registry("describe", model_id)
        except AzuError as error:
            # Of one that does not answer it is not known yet.
            if not isinstance(error, Unavailable) or error.code in NOT_PROVIDED:
                await self.books.give_fees_back(model_id)
            raise
        return new

    async def _call(self, actor: str, method: str, timeout_s: float, *arguments: Any) -> Any:
        back_in_s = min(_BACK_IN_S, timeout_s)
        return await ask(actor, method, *arguments, timeout_s=timeout_s, back_in_s=back_in_s)


def _host(client: Address | None) -> str:
    return client.host if client else ""


def warm_up() -> None:
    """Import the tokenizers, which takes seconds, so that the first prompt does not wait for it."""
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


class _BearerToken(SecurityBase):
    """The bearer token of a request, None without one; OpenAPI documents it under `name`."""

    def __init__(self, name: str, description: str) -> None:
        self.model = HTTPBearer(description=description)
        self.scheme_name = name

    async def __call__(self, request: Request) -> str | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" else None


_API_KEY = _BearerToken("ApiKey", "An API key, from POST /v1/auth/keys.")
_ADMIN_KEY = _BearerToken("AdminKey", "The key of the network's owner.")
ApiKeySecret = Annotated[str | None, Security(_API_KEY)]
AdminSecret = Annotated[str | None, Security(_ADMIN_KEY)]


def services_of(request: Request) -> Services:
    """Return the replica's services."""
    services: Services = request.app.state.services
    return services


ServicesNow = Annotated[Services, Depends(services_of)]


async def key_of(request: Request, services: ServicesNow, secret: ApiKeySecret) -> AsyncIterator[ApiKey]:
    """Yield the caller's key, which has a place until its request is answered; raises Unauthenticated."""
    key = await services.key(secret, request.client)
    async with services.short.place(key.address, kind_of(request.url.path)):
        yield key


async def answered_key_of(
    request: Request, services: ServicesNow, secret: ApiKeySecret
) -> AsyncIterator[ApiKey]:
    """Yield the key of a request for an answer, as `key_of` does: it takes longer, and has other places."""
    key = await services.key(secret, request.client)
    async with services.answers.place(key.address, "answers"):
        yield key


async def bearer_of(secret: ApiKeySecret) -> str:
    """Return the secret of the caller's key, which only the books can judge."""
    return secret or ""


Key = Annotated[ApiKey, Depends(key_of)]
AnsweredKey = Annotated[ApiKey, Depends(answered_key_of)]
Bearer = Annotated[str, Depends(bearer_of)]


def check_speaks_for(key: ApiKey, address: str) -> None:
    """Raise Forbidden unless the key is of the address that a request names."""
    if address.lower() != key.address:
        raise Forbidden("this key belongs to another address", param="user_address")


async def admin_of(request: Request, services: ServicesNow, secret: AdminSecret) -> None:
    """Raise Unauthenticated unless the caller has the admin key."""
    await services.check_admin(secret, request.client)


Admin = Depends(admin_of)


async def owned(services: Services, key: ApiKey, job_id: str) -> JobRecord:
    """Return a job of the key's address; raises NotFound, and Forbidden for another address's.

    A job that Redis lost after its end has the end that the books know.
    """
    record = await services.jobs.get(job_id)
    if record is None and (outcome := await services.books.ended(job_id)):
        record = record_of(outcome)
    if record is None:
        raise NotFound("there is no such job", param="job_id", code="job_not_found")
    if record.job.address != key.address:
        raise Forbidden("this job belongs to another address", param="job_id")
    return record

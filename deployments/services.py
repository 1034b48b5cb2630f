"""What the ingress calls: accounts, jobs, the registry and the scheduler, each over its own connection."""

import asyncio
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Address

from actors.placement import SCHEDULER
from actors.reach import REGISTRY, ask
from azu.auth.flights import RedisFlights
from azu.auth.keys import ApiKey
from azu.auth.rates import Rate, RedisRates
from azu.auth.redis import RedisAuth
from azu.auth.spending import RedisSpending
from azu.auth.tickets import RedisTickets
from azu.config import ControlConfig
from azu.errors import Forbidden
from azu.jobs.redis import RedisJobs
from azu.ledger.redis import RedisLedger
from azu.lifecycle.flight import FlightLimits
from azu.lifecycle.intake import Intake, JobLimits, ModelFacts
from azu.lifecycle.spending import SpendLimits
from azu.protocol.sampling import SamplingParams
from azu.registry.description import ModelDescription
from azu.treasury.claims import RedisClaims
from azu.treasury.payees import RedisPayees
from azu.treasury.receipts import RedisReceipts
from azu.treasury.withdrawals import RedisWithdrawals
from deployments.defaults import default_sampling

if TYPE_CHECKING:
    from azu.engine.tokenizer import Tokenizer

_REFRESH_S = 60.0
_BACK_IN_S = 5.0  # who died is soon back; whoever waits longer may as well ask again
_KEPT_MODELS = 64


def now_ms() -> int:
    """Return the wall clock in milliseconds."""
    return time.time_ns() // 1_000_000


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
        self.ledger = RedisLedger.from_url(config.redis_url)
        self.tickets = RedisTickets.from_url(config.redis_url)
        self.spending = RedisSpending.from_url(config.redis_url)
        self.spend_limits = SpendLimits(self.spending, self.ledger)
        self.claims = RedisClaims.from_url(config.redis_url)
        self.payees = RedisPayees.from_url(config.redis_url, config.platform_address)
        self.receipts = RedisReceipts.from_url(config.redis_url)
        self.withdrawals = RedisWithdrawals.from_url(config.redis_url)
        self.intake = Intake(
            self.ledger,
            self.jobs,
            self.spend_limits,
            FlightLimits(
                RedisFlights.from_url(config.redis_url), self.jobs, policy.limits.max_jobs_in_flight
            ),
            JobLimits(
                max_prompt_tokens=policy.limits.max_prompt_tokens,
                max_completion_tokens=policy.limits.max_completion_tokens,
                reservation_ttl_ms=policy.limits.reservation_ttl_s * 1000,
            ),
            policy.price.lamports_per_token_layer,
            now_ms=now_ms,
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
        key = await self.auth.check(bearer if scheme.lower() == "bearer" else None, now_ms())
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

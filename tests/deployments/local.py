"""The ingress in this process, on real Redis, registry, dispatcher and ledger; the model is scripted."""

import asyncio
import hashlib
import inspect
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount
from fastapi import FastAPI

from actors.links import REGISTRY
from actors.placement import SCHEDULER
from actors.registry import Registry
from azu.config import ControlConfig, NetworkPolicy, load_network
from azu.errors import AzuError, NotFound, WorkerLost
from azu.jobs.dispatch import Dispatcher
from azu.jobs.redis import RedisJobs
from azu.jobs.settlement import Settlement
from azu.metrics import Meter, MetricsSnapshot
from azu.money.ledger.transfers import Deposit
from azu.money.treasury.request_reply import CreditState, DepositRequests, DepositStatus
from azu.protocol.job import FinishReason, Job, JobRun, TokenEvent
from azu.protocol.node import Offer
from azu.protocol.phase import JobPhase
from azu.redis_client import connect_redis, retry_until_available
from azu.supervision import Supervisor
from azu.units import LAMPORTS_PER_HYPE
from deployments.ingress import build_api
from deployments.services import Services
from tests.builders import OWNERS, OwnPipeline
from tests.money.serving import TERMS, ServedBooks, serving

ADMIN_KEY = "azu-admin-of-the-test"
PLATFORM = "0x" + "99" * 20
EOS = 2


@dataclass(eq=False)
class ScriptedModel(OwnPipeline):
    """Answers every prompt with the same tokens and the EOS token, or breaks with `error` after them.

    It begins after `delay_s` and waits `pause_s` after each token; a `silent` one writes nothing at all.
    """

    jobs: RedisJobs
    token_ids: tuple[int, ...] = (70, 71)
    error: AzuError | None = None
    delay_s: float = 0.0
    pause_s: float = 0.0
    silent: bool = False
    registry: Registry | None = None

    async def run(self, job: Job) -> JobRun:
        await asyncio.sleep(self.delay_s)
        written, token_ids = 0, self.token_ids  # a test may change them for the next job
        for choice in range(0 if self.silent else job.choices):
            for position, token_id in enumerate((*token_ids, EOS)[: job.sampling.max_tokens]):
                last = position == len(token_ids)
                finish = FinishReason.STOP if last and self.error is None else None
                event = TokenEvent(written, (token_id,), choice=choice, finish_reason=finish)
                await retry_until_available(partial(self.jobs.append, [(job.job_id, event)]))
                written += 1
                await asyncio.sleep(self.pause_s)
        work = {layer: {"node": 1} for layer in range(job.num_layers)}
        cut = job.sampling.max_tokens <= len(token_ids)
        reason = FinishReason.LENGTH if cut else FinishReason.STOP
        reason = reason if self.error is None else FinishReason.ERROR
        return JobRun(written, reason, work, self.error)

    async def cancel(self, job_id: str) -> None:
        pass

    phase = None

    def keep_jobs(self, job_ids: Container[str]) -> tuple[()]:
        """Return nothing: no job is left behind here."""
        return ()

    async def phase_of(self, model_id: str, revision: str) -> JobPhase:
        return JobPhase("loading", "Loading.\u2028", 1, 3)

    async def look(self) -> None:
        raise WorkerLost("there is no pipeline to look at")

    def let_go(self, job_id: str) -> None:
        pass

    def beside(self, deployment: "ScriptedModel") -> None:
        """Return no other deployment."""

    async def ensure(self, model_id: str, revision: str, job_id: str) -> "ScriptedModel":
        if self.registry is not None:
            while await asyncio.to_thread(self.registry.ensure_cut, model_id, revision) is None:
                await asyncio.sleep(0.02)
        return self


class NoNodes:
    """A scheduler without nodes and deployments."""

    async def ready(self) -> bool:
        return True

    async def problems(self) -> tuple[str, ...]:
        return ()

    async def nodes(self) -> tuple[()]:
        return ()

    async def deployments(self) -> tuple[()]:
        return ()

    async def metrics(self) -> MetricsSnapshot:
        return MetricsSnapshot({}, {})

    async def prediction(self, model_id: str, revision: str) -> None:
        return None

    async def offer(self, vram_bytes: int, memory_bytes_per_s: float, flops_per_s: float) -> Offer:
        return Offer({"azu/tiny-dense": (4, 12)}, 10.0)

    async def leave(self, name: str, address: str | None) -> bool:
        raise NotFound(f"no node {name} of yours lends here", param="name")

    pause = resume = leave


class LocalServices(Services):
    """The ingress's services with the control plane in this process."""

    def __init__(self, config: ControlConfig) -> None:
        super().__init__(config)
        self.registry_here = Registry(config)
        self._actors: Mapping[str, Any] = {REGISTRY: self.registry_here, SCHEDULER: NoNodes()}

    async def _call(self, actor: str, method: str, timeout_s: float, *arguments: Any) -> Any:
        called = getattr(self._actors[actor], method)
        if inspect.iscoroutinefunction(called):
            return await called(*arguments)
        return await asyncio.to_thread(called, *arguments)


@dataclass
class LocalIngress:
    """The running ingress; `transport` leads to it."""

    config: ControlConfig
    app: FastAPI
    transport: httpx.ASGITransport
    model: ScriptedModel
    books: ServedBooks

    def client(self, api_key: str = "", **given: Any) -> httpx.AsyncClient:
        """Return an HTTP client that sends a key."""
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        return httpx.AsyncClient(
            transport=self.transport, base_url="http://azu.test", headers=headers, timeout=60, **given
        )

    def cut_first(self) -> None:
        """Have every model cut before it answers, as the scheduler does."""
        self.model.registry = self.app.state.services.registry_here

    async def open_key(self, account: LocalAccount, **asked: Any) -> str:
        """Sign in and open a key over HTTP."""
        async with self.client() as client:
            api_key = f"azu-sk-{secrets.token_urlsafe(32)}"
            digest = hashlib.sha256(api_key.encode()).hexdigest()
            body = {"address": account.address, "key_sha256": digest, "label": "test", **asked}
            made = (await client.post("/v1/auth/challenge", json=body)).raise_for_status().json()
            signature = account.sign_message(encode_defunct(text=made["message"])).signature.to_0x_hex()
            signed = {"nonce": made["nonce"], "signature": signature}
            (await client.post("/v1/auth/keys", json=signed)).raise_for_status()
        return api_key

    async def money(self, address: str) -> tuple[int, int, int, int]:
        """Return what an address has available, reserved and on its way, and what it earned."""
        books = self.books.bookkeeper
        balance, earned = await books.balance(address), (await books.earnings(address)).earned_lamports
        return balance.available_lamports, balance.reserved_lamports, balance.withdrawing_lamports, earned

    async def user(self, lamports: int = LAMPORTS_PER_HYPE) -> tuple[str, str]:
        """Return the address and a key of a user with this balance."""
        account: LocalAccount = Account.create()
        address = account.address.lower()
        if lamports:
            deposit = f"deposit:0x{hashlib.sha256(address.encode()).hexdigest()}"
            await self.books.bookkeeper.apply(
                Deposit(id=deposit, address=address, lamports=lamports, at_ms=1)
            )
        return address, await self.open_key(account)


def config_of(
    redis_url: str, books_url: str, home: Path, policy: NetworkPolicy, model_roots: tuple[Path, ...]
) -> ControlConfig:
    """Return the config of an ingress."""
    return ControlConfig(
        redis_url=redis_url,
        pipeline_redis_url=redis_url,
        books_url=books_url,
        home=home,
        http_host="127.0.0.1",
        http_port=8000,
        domain="azu.test",
        policy=policy,
        admin_key_sha256=hashlib.sha256(ADMIN_KEY.encode()).hexdigest(),
        platform_address=PLATFORM,
        chain_url="http://127.0.0.1:9",
        model_roots=model_roots,
        max_model_bytes=2**30,
    )


def policy_with(**limits: float) -> NetworkPolicy:
    """Return the standard policy with other limits."""
    policy = load_network().policy
    timeouts = policy.timeouts.model_copy(update={"deposit_s": 10.0})
    return policy.model_copy(update={"limits": policy.limits.model_copy(update=limits), "timeouts": timeouts})


def unhurried() -> NetworkPolicy:
    """Return a policy without limits on the number of requests."""
    return policy_with(
        requests_per_minute=60_000_000,
        request_burst=10**6,
        sign_ins_per_minute=60_000_000,
        sign_in_burst=10**6,
    )


async def knows_no_transfer(redis_url: str) -> None:
    """Answer deposit requests like a treasury whose chain has no transfer."""
    claims = DepositRequests(connect_redis(redis_url))

    async def unknown(_: str) -> DepositStatus:
        return DepositStatus(CreditState.UNKNOWN)

    while True:
        await claims.serve(unknown, 100)
        await asyncio.sleep(0.02)


@asynccontextmanager
async def local_ingress(
    redis_url: str,
    home: Path,
    policy: NetworkPolicy | None = None,
    model_roots: tuple[Path, ...] = (),
    make_model: Callable[[RedisJobs], Any] = ScriptedModel,
    maturity_ms: int = 0,
    fetch_lamports_per_gib: int = 0,
) -> AsyncIterator[LocalIngress]:
    """Run an ingress, the books, and the dispatcher that takes its jobs, until the block ends."""
    policy = policy or policy_with()
    terms = replace(
        TERMS,
        max_keys=policy.limits.max_keys,
        maturity_ms=maturity_ms,
        fetch_lamports_per_gib=fetch_lamports_per_gib,
    )
    async with serving(redis_url, platform=PLATFORM, terms=terms) as served:
        access, books = served.access, served.client("scheduler")
        jobs = RedisJobs(connect_redis(redis_url), books.ended)
        model = make_model(jobs)
        await served.bookkeeper.enrol_node("node", OWNERS[0], key_digest="k", name="node", work_bytes_per_s=0)
        config = config_of(redis_url, access.url("ingress"), home, policy, model_roots)
        dispatcher = Dispatcher(
            jobs, model, Settlement(books, jobs), consumer="test", patience=config.policy.retry_policy(),
            supervisor=Supervisor("test", Meter(), replace=lambda: None),
        )  # fmt: skip
        running = [asyncio.create_task(one) for one in (dispatcher.run(), knows_no_transfer(redis_url))]
        api = build_api(config, LocalServices, replace=lambda: None)
        try:
            async with api.router.lifespan_context(api):
                transport = httpx.ASGITransport(api, raise_app_exceptions=False)
                yield LocalIngress(config, api, transport, model, served)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


Scenario = Callable[[LocalIngress, httpx.AsyncClient], Awaitable[None]]


def play_as_user(redis_url: str, home: Path, scenario: Scenario) -> None:
    """Run a scenario with an ingress and a client that has a user's key."""

    async def run() -> None:
        async with local_ingress(redis_url, home) as ingress:
            _, api_key = await ingress.user()
            async with ingress.client(api_key) as http:
                await asyncio.wait_for(scenario(ingress, http), 120)

    asyncio.run(run())

"""An exception that azu does not expect, once at every named point, costs at most the request that it struck.

The points are the public methods and the background loops of each process. Four streams run at each fault.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from ray.exceptions import RayTaskError

from actors.links import REGISTRY
from actors.placement import SCHEDULER
from azu.auth.signatures import sign_claim
from azu.client import Client
from azu.errors import InternalError, InvalidRequest
from azu.launch.local_network import LocalNetwork
from azu.launch.sidecars import books_access, enrol_own_node
from azu.money.books import Books
from azu.money.ledger.audit import Audit
from azu.protocol.topology import PieceSet
from azu.supervision import FAULTS_IN_A_ROW
from tests.builders import OWNERS
from tests.network.actors import actors_named, lend, pid_of
from tests.network.conftest import deposited
from tests.network.faults import Faults
from tests.network.recovering import (
    Answer,
    Streams,
    four,
    kill_all,
    network_of,
    pids,
    pieces_of,
    show,
    spared,
    undisturbed,
)
from tests.network.user import User, log_in

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL = "azu/tiny-moe"
NUM_TOKENS = 40
# From the fault on: the struck job has ended or is right, and everything runs as before.
MENDED_S = 30.0
# The slowest loops take a step every 60 s.
CALLED_S = 90.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Fault:
    """A running network in which a method is armed."""

    network: LocalNetwork
    user: User
    faults: Faults
    home: Path


Provoke = Callable[[Fault], None]


@dataclass(frozen=True)
class Point:
    """A method, and what has it called while streams run. A loop is struck twice: it outlives the first."""

    method: str
    provoke: Provoke = lambda _: None
    is_loop: bool = False


# What has a method called


def kill(prefix: str) -> Provoke:
    """Kill one of the actors whose names have a prefix."""
    return lambda _: kill_all([pid_of(actors_named(prefix)[0])])


def kill_stage(_: Fault) -> None:
    kill_all(pids([name for name in pieces_of(MODEL) if name.startswith("layer:")][-1:]))


def kill_experts(_: Fault) -> None:
    kill_all(pids([name for name in pieces_of(MODEL) if name.startswith("expert:")][:1]))


def get(path: str) -> Provoke:
    """Send a request that fails or not."""
    return lambda fault: expect_id_or_success(fault.user.http.get(path))


def post(path: str, **body: object) -> Provoke:
    return lambda fault: expect_id_or_success(fault.user.http.post(path, json=body))


def as_admin(method: str, path: str, **body: object) -> Provoke:
    def provoke(fault: Fault) -> None:
        headers = {"authorization": f"Bearer {fault.network.admin_key}"}
        json = body or None
        expect_id_or_success(httpx.request(method, fault.network.url + path, headers=headers, json=json))

    return provoke


def expect_id_or_success(answer: httpx.Response) -> None:
    if not answer.is_success:
        assert answer.status_code == 500, answer.text
        assert answer.json()["error"]["code"] == "internal_error", answer.text
        assert "fault-" in answer.json()["error"]["message"], answer.text


def call(prefix: str, method: str, *arguments: object) -> Provoke:
    """Call an actor's method as another actor would; what it raises is an AzuError with an id.

    It answers where another caller's call was struck first: some methods are called all the time.
    """

    def provoke(_: Fault) -> None:
        actor = actors_named(prefix)[0]
        raised: list[object] = []
        try:
            ray.get(getattr(actor, method).remote(*arguments), timeout=MENDED_S)
        except RayTaskError as error:
            raised.append(error.cause)
        assert all(isinstance(one, InternalError) for one in raised)

    return provoke


def cancel(fault: Fault) -> None:
    """Begin a long answer and leave it."""
    body = four(MODEL, 400)[0].body() | {"prompt": "Leave me"}
    with fault.user.http.stream("POST", "/v1/completions", json=body) as reply:
        next(reply.iter_lines())


def ask_books(caller: str, verb: str, *arguments: object, **named: object) -> Provoke:
    """Call the books as one of their callers would; what they raise is an AzuError with an id."""

    async def ask(fault: Fault) -> None:
        books = Books(books_access(fault.home).url(caller))
        try:
            with pytest.raises(InternalError, match="fault-"):
                await getattr(books, verb)(*arguments, **named)
        finally:
            await books.close()

    return lambda fault: asyncio.run(ask(fault))


def enrol(fault: Fault) -> None:
    """Enrol a node; only the owner's call is struck, and it succeeds when it is made again."""
    with pytest.raises(InternalError, match="fault-"):
        enrol_own_node(fault.home, "eve", OWNERS[0], "e" * 56, 0)
    enrol_own_node(fault.home, "eve", OWNERS[0], "e" * 56, 0)


def sign_in(fault: Fault) -> None:
    """Open a key, and revoke it where that succeeds."""
    with suppress(httpx.HTTPStatusError):
        user = log_in(fault.network.url, "short")
        (key,) = user.http.get("/v1/auth/keys").raise_for_status().json()["data"]
        user.http.delete(f"/v1/auth/keys/{key['key_id']}").raise_for_status()


def claim(fault: Fault) -> None:
    """Claim what the user's address earns."""
    signature = sign_claim(fault.user.account, fault.network.platform_address)
    expect_id_or_success(fault.user.http.post("/v1/earnings/claim", json={"signature": signature}))


def withdraw(fault: Fault) -> None:
    """Ask for a withdrawal; the books refuse what is too little."""
    with suppress(InvalidRequest, InternalError):
        Client(fault.user.url, fault.user.api_key).withdraw(fault.user.account, 1)


def see_health(fault: Fault) -> None:
    """Ask whether prompts are served; a scheduler that does not say so counts as one that starts."""
    assert httpx.get(f"{fault.network.url}/health", timeout=MENDED_S).status_code in (200, 503)


def deposit(fault: Fault) -> None:
    with suppress(httpx.HTTPStatusError):
        deposited(fault.network, fault.user, 1_000)


def sign_receipt(fault: Fault) -> None:
    (job, *_) = [one for one in fault.user.http.get("/v1/jobs").json()["data"] if one["status"] == "done"]
    expect_id_or_success(fault.user.http.get(f"/v1/receipts/{job['job_id']}"))


def lend_less(fault: Fault) -> None:
    for agent in actors_named("node:"):
        lend(agent, 6 * 2**20)
    with suppress(AssertionError):
        fault.faults.wait_until_struck("actors.pipeline:Pipeline.limit", MENDED_S / 2)
    for agent in actors_named("node:"):
        lend(agent, 2**40)


PIPELINE, STAGE, EXPERTS = (
    f"pipeline:{MODEL.replace('/', '-')}:",
    "layer:azu-tiny-moe:",
    "expert:azu-tiny-moe:",
)
SCHEDULED, NODE = "actors.scheduler:Scheduler", "actors.node:NodeAgent"
BOOKS = "azu.money.bookkeeping:Bookkeeper"
POINTS = (
    # Pipeline
    Point("actors.pipeline:Pipeline.start", kill(PIPELINE)),
    Point("actors.pipeline:Pipeline.run"),
    Point("actors.pipeline:Pipeline.completed"),
    Point("actors.pipeline:Pipeline.cancel", cancel),
    Point("actors.pipeline:Pipeline.canary", kill_stage),
    Point("actors.pipeline:Pipeline.jobs", kill(SCHEDULER)),
    # A killed stage is often known as dead before another one reports it.
    Point("actors.pipeline:Pipeline.lost", call(PIPELINE, "lost", PieceSet(), "nothing is lost", -1)),
    Point("actors.pipeline:Pipeline.next_loss"),
    Point("actors.pipeline:Pipeline.look", call(PIPELINE, "look")),
    Point("actors.pipeline:Pipeline.end", call(PIPELINE, "end", "no job", None)),
    Point("actors.pipeline:Pipeline.fail", call(PIPELINE, "fail", None)),
    Point("actors.pipeline:Pipeline.limit", lend_less),
    Point("actors.pipeline:Pipeline.pause", kill_stage),
    Point("actors.pipeline:Pipeline.resume", kill_stage),
    Point("azu.jobs.job_runner:JobRunner._end_sequence", is_loop=True),
    Point("azu.engine.pipeline:EnginePipeline.next_batch", is_loop=True),
    # LayerActor
    Point("actors.layer:LayerActor.load", kill_stage),
    Point("actors.layer:LayerActor.relink", kill_experts),
    Point(
        "actors.layer:LayerActor.see",
        post("/v1/completions", model=MODEL, prompt="Hello", max_tokens=3, repetition_penalty=1.2),
    ),
    Point("actors.layer:LayerActor.num_sent", call(STAGE, "num_sent", [1])),
    Point("actors.layer:LayerActor.num_chosen", call(STAGE, "num_chosen")),
    Point("actors.layer:LayerActor.ping"),
    Point("actors.layer:LayerActor.step"),
    Point("actors.links:Acknowledgements._watch", is_loop=True),
    # ExpertActor
    Point("actors.expert:ExpertActor.load", kill_experts),
    Point("actors.expert:ExpertActor.run"),
    Point("actors.expert:ExpertActor.received"),
    Point("actors.expert:ExpertActor.ping"),
    # Scheduler
    Point(f"{SCHEDULED}.start", kill(SCHEDULER)),
    Point(f"{SCHEDULED}.ready", see_health),
    Point(f"{SCHEDULED}.problems", get("/v1/network")),
    Point(f"{SCHEDULED}.nodes", get("/v1/network")),
    Point(f"{SCHEDULED}.deployments", get("/v1/network")),
    Point(f"{SCHEDULED}.metrics", get("/v1/network")),
    Point(f"{SCHEDULED}.prediction", post("/v1/quote", model=MODEL, tokens=5)),
    Point(f"{SCHEDULED}.leave", as_admin("POST", "/v1/nodes/ada/leave")),
    Point(f"{SCHEDULED}.pause", as_admin("POST", "/v1/nodes/ada/pause")),
    Point(f"{SCHEDULED}.resume", as_admin("POST", "/v1/nodes/ada/resume")),
    Point(
        f"{SCHEDULED}.offer",
        post("/v1/nodes/offer", vram_bytes=2**30, memory_bytes_per_s=1e10, flops_per_s=1e11),
    ),
    Point(f"{SCHEDULED}.restart", call(SCHEDULER, "restart", "ada", ["nowhere"])),
    Point(f"{SCHEDULED}.take_metrics"),
    Point(f"{SCHEDULED}._learn", kill(SCHEDULER)),
    Point(f"{SCHEDULED}._measure", is_loop=True),
    Point(f"{SCHEDULED}._check_kv", is_loop=True),
    Point(f"{SCHEDULED}._check_nodes", is_loop=True),
    Point("azu.cluster.canary:CanaryWatch.check", is_loop=True),
    Point("azu.cluster.scaling:Rebalance.check", is_loop=True),
    Point("azu.cluster.scaling:ScaleOut.check", is_loop=True),
    Point("azu.cluster.scaling:ShareOut.check", is_loop=True),
    Point("azu.cluster.scaling:ExpertReplication.check", is_loop=True),
    Point("actors.node:NodeAgents.follow_nodes", is_loop=True),
    Point("actors.node:NodeAgents.follow_reports", is_loop=True),
    Point("azu.jobs.dispatch:Dispatcher._take_over", kill(SCHEDULER)),
    Point("azu.jobs.dispatch:Dispatcher._take", is_loop=True),
    Point("azu.jobs.dispatch:Dispatcher._take_cancellations", kill(SCHEDULER)),
    Point("azu.jobs.dispatch:Dispatcher._run_and_settle"),
    Point("azu.jobs.settlement:Settlement.settle"),
    # Registry
    Point("actors.registry:Registry.start", call(REGISTRY, "start")),
    Point("actors.registry:Registry.describe", get("/v1/models/azu/tiny-dense")),
    Point("actors.registry:Registry.text_decoder", kill(PIPELINE)),
    Point("actors.registry:Registry.ensure_cut", kill(SCHEDULER)),
    Point("actors.registry:Registry.new_bytes", call(REGISTRY, "new_bytes", MODEL)),
    Point("actors.registry:Registry.start_cut", as_admin("POST", "/models/shard", model_id=MODEL)),
    Point("actors.registry:Registry.status", get(f"/models/status?model_id={MODEL}")),
    Point("actors.registry:Registry.available", get("/v1/models")),
    Point("actors.registry:Registry.read", call(REGISTRY, "read", MODEL, "", "", 0, 0)),
    Point("actors.registry:Registry.path", call(REGISTRY, "path", MODEL, "", "")),
    Point("actors.registry:Registry.file", call(REGISTRY, "file", MODEL, "", "")),
    # NodeAgent
    Point(f"{NODE}.report"),
    Point(f"{NODE}.versions", call("node:", "versions")),
    Point(f"{NODE}.leave", call("node:", "leave")),
    Point(f"{NODE}.pause", call("node:", "pause")),
    Point(f"{NODE}.resume", call("node:", "resume")),
    Point(f"{NODE}.ping", kill_stage),
    Point(f"{NODE}.measure_links", call("node:", "measure_links", {})),
    Point(f"{NODE}.fetch", kill_stage),
    # Ingress
    Point("deployments.services:Services.key"),
    Point("deployments.services:Services.model"),
    Point("deployments.services:Services.scheduler", get("/v1/network")),
    Point("deployments.services:Services.registry", get("/v1/models")),
    Point("azu.jobs.intake:Intake.accept"),
    Point("azu.jobs.token_reader:TokenReader._distribute", is_loop=True),
    Point("azu.jobs.redis:RedisJobs.submit"),
    # Books
    Point(f"{BOOKS}.ledger"),
    Point(f"{BOOKS}.verify", is_loop=True),
    Point(f"{BOOKS}.seal", is_loop=True),
    Point(f"{BOOKS}.key"),
    Point(f"{BOOKS}.open_key", sign_in),
    Point(f"{BOOKS}.revoke_key", sign_in),
    Point(f"{BOOKS}.keys", get("/v1/auth/keys")),
    Point(f"{BOOKS}.price", post("/v1/quote", model=MODEL, tokens=5)),
    Point(f"{BOOKS}.reserve"),
    Point(
        f"{BOOKS}.reserve_fetch",
        ask_books("ingress", "reserve_fetch", "no key", "fetch-1", model_id="a/b", num_bytes=1),
    ),
    Point(f"{BOOKS}.charge_unused", is_loop=True),
    Point(f"{BOOKS}.paid", ask_books("ingress", "paid", OWNERS[0])),
    Point(f"{BOOKS}.give_back", ask_books("ingress", "give_back", "no job")),
    Point(f"{BOOKS}.give_fees_back", ask_books("ingress", "give_fees_back", "no model")),
    Point(f"{BOOKS}.settle"),
    Point(f"{BOOKS}.ended", get("/results/no-job")),
    Point(f"{BOOKS}.receipt_signature", sign_receipt),
    Point(f"{BOOKS}.overdue"),
    Point(f"{BOOKS}.expire", ask_books("scheduler", "expire", "no job")),
    Point(f"{BOOKS}.balance", get("/v1/balance")),
    Point(f"{BOOKS}.earnings", get("/v1/earnings")),
    Point(f"{BOOKS}.claim_earnings", claim),
    Point(f"{BOOKS}.withdraw", withdraw),
    Point(f"{BOOKS}.withdrawal", get("/v1/withdrawals/1")),
    Point(f"{BOOKS}.apply", deposit),
    Point(f"{BOOKS}.result", deposit),
    Point(f"{BOOKS}.owed", is_loop=True),
    Point(f"{BOOKS}.open_payouts", is_loop=True),
    Point(f"{BOOKS}.view", is_loop=True),
    Point(f"{BOOKS}.hear_time", is_loop=True),
    Point(f"{BOOKS}.inside", ask_books("treasury", "inside")),
    Point(f"{BOOKS}.numbered", ask_books("treasury", "numbered", 0)),
    Point(f"{BOOKS}.totals", is_loop=True),
    Point(f"{BOOKS}.loss", is_loop=True),
    Point(f"{BOOKS}.findings", see_health),
    Point(f"{BOOKS}.head", ask_books("owner", "head")),
    Point(f"{BOOKS}.dispute", ask_books("ingress", "dispute", "0x" + "1" * 40, "no job", "0x")),
    Point(f"{BOOKS}.decision", ask_books("ingress", "decision", "no job")),
    Point(f"{BOOKS}.held", ask_books("owner", "held")),
    Point(f"{BOOKS}.reversible", ask_books("owner", "reversible", OWNERS[0])),
    Point(f"{BOOKS}.command", ask_books("owner", "command", "no command")),
    Point(f"{BOOKS}.uncredited", ask_books("owner", "uncredited")),
    Point(f"{BOOKS}.audit", ask_books("owner", "audit")),
    Point(f"{BOOKS}.enrol_node", enrol),
    # Treasury
    Point("azu.money.treasury.process:_Treasury.watch", is_loop=True),
    Point("azu.money.treasury.process:_Treasury.answer_deposits", is_loop=True),
    Point("azu.money.treasury.process:_Treasury.pay", is_loop=True),
    Point("azu.money.treasury.deposits:DepositWatcher.check", deposit),
    # Signer
    Point("azu.money.signer.signer:Signer.look", is_loop=True),
)


@pytest.fixture(scope="module")
def fault(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fault]:
    """A network whose processes can be struck; it is watched as `azu up` does."""
    over = threading.Event()
    with pytest.MonkeyPatch.context() as environment:
        folder = tmp_path_factory.mktemp("faults")
        faults = Faults.installed(folder, [point.method for point in POINTS], environment)
        with network_of(home, spared(ada=7, ben=7, cleo=8)) as (network, user):
            # In the room that this model leaves, the experts of the other do not fit beside their router.
            undisturbed(user, "azu/tiny-dense", 1)
            watching = threading.Thread(target=partial(watch, network, over), daemon=True)
            watching.start()
            yield Fault(network, user, faults, home)
            over.set()
            watching.join(60)


def watch(network: LocalNetwork, over: threading.Event) -> None:
    while not over.wait(1.0):
        with suppress(Exception):  # a revival that fails is tried again
            network.revive()


@pytest.fixture(scope="module")
def expected(fault: Fault) -> list[Answer]:
    """The answers when nothing is struck."""
    return undisturbed(fault.user, MODEL, NUM_TOKENS)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.method.partition(":")[2])
def test_an_unexpected_exception_costs_at_most_the_request_it_struck(
    fault: Fault, expected: list[Answer], point: Point
) -> None:
    wait_until_healthy(fault)
    for _ in range(1 + point.is_loop):
        mended_s = struck(fault, expected, point)
    show(f"{point.method.partition(':')[2]}: mended in {mended_s:.1f} s")


def struck(fault: Fault, expected: list[Answer], point: Point) -> float:
    """Strike a point once under four streams; check all that must hold, and return how long it took."""
    fault.faults.arm(point.method)
    streams = Streams(fault.user, four(MODEL, NUM_TOKENS))
    try:
        while not (streams.each[0].ended or streams.each[0].num_tokens >= NUM_TOKENS // 4):
            time.sleep(_POLL_S)
        point.provoke(fault)
        fault.faults.wait_until_struck(point.method, CALLED_S)
    finally:
        fault.faults.disarm(point.method)
    struck_s = time.monotonic()
    wait_for(lambda: all(one.ended for one in streams.each), "a stream stands still")
    hit = [one for one in streams.each if one.fault]
    assert len(hit) <= 1, [one.fault for one in hit]
    for one in hit:
        assert "internal_error" in one.fault or "500" in one.fault, one.fault
    for stream, right in zip(streams.each, expected, strict=True):
        if not stream.fault:
            assert stream.answer(fault.user) == right
    wait_for(lambda: unfinished(fault.user) == [], "a job is in limbo")
    wait_for(lambda: fault.user.balance()[1] == 0, "money is still reserved")
    return time.monotonic() - struck_s


def unfinished(user: User) -> list[str]:
    """Return the user's jobs that have not ended."""
    jobs = user.http.get("/v1/jobs").raise_for_status().json()["data"]
    return [one["job_id"] for one in jobs if one["status"] in ("queued", "running")]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + MENDED_S
    while True:
        with suppress(httpx.HTTPError):  # a part of the control plane is being replaced
            if condition():
                return
        assert time.monotonic() < deadline_s, what
        time.sleep(_POLL_S)


def wait_until_healthy(fault: Fault) -> None:
    """Wait until prompts are served and everything that an earlier fault replaced is back."""
    wait_for(lambda: httpx.get(f"{fault.network.url}/health").is_success, "the network is not healthy")
    wait_for(lambda: len(pieces_of(MODEL)) > 0, "the model has no pieces")


REPLACED = (
    f"{SCHEDULED}._measure",
    "azu.engine.pipeline:EnginePipeline.next_batch",
    "actors.links:Acknowledgements._watch",
    "azu.money.treasury.process:_Treasury.pay",
)


@pytest.mark.parametrize("method", REPLACED, ids=lambda method: method.partition(":")[2])
def test_a_process_whose_loop_fails_five_times_in_a_row_is_replaced(
    fault: Fault, expected: list[Answer], method: str
) -> None:
    wait_until_healthy(fault)
    streams, shown, failing = Streams(fault.user, four(MODEL, NUM_TOKENS)), set[str](), None
    for _ in range(FAULTS_IN_A_ROW):
        fault.faults.arm(method, failing)  # in one process: two stages have such a loop
        failing = fault.faults.wait_until_struck(method, MENDED_S)

    def is_replaced() -> bool:
        shown.update(httpx.get(f"{fault.network.url}/health", timeout=MENDED_S).json()["problems"])
        return failing is not None and not psutil.pid_exists(failing)

    wait_for(is_replaced, f"{method} failed, and its process goes on")
    assert streams.answers() == expected
    wait_until_healthy(fault)
    show(f"{method.partition(':')[2]}, five times: replaced; /health said {sorted(shown)}")


def test_the_books_are_right_after_all_faults(fault: Fault) -> None:
    async def found() -> Audit:
        return await Books(fault.network.books_url, silence_s=60.0).audit()

    assert fault.user.balance()[1] == 0
    assert asyncio.run(found()).agrees

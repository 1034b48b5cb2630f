"""A model that more jobs ask for than it has room for gets another pipeline while nodes have some."""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from azu.cluster.deployment import DeployedModel
from azu.errors import AzuError, InsufficientCapacity
from azu.jobs.dispatch import Deployments, RunningModel
from azu.planner.kv_blocks import Deployed, KvReduction, kv_reductions, restored_num_blocks
from azu.planner.policy import PlanPolicy
from azu.planner.replicas import ExpertCounts, ExpertHeat, expert_heat
from azu.protocol.node import Node, NodeState
from azu.protocol.topology import PipelineKey
from azu.units import MIB

log = logging.getLogger(__name__)


class Widenable(Protocol):
    """The deployed pipelines, and how a model gets one more."""

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """The pipelines that are up."""

    async def widen(self, model_id: str, revision: str) -> None:
        """Bring up one more pipeline of a model, where there are nodes for it."""


class ScaleOut:
    """Looks now and then which models are busy: each pipeline has more jobs than `promised_sequences`.

    Who is busy at two looks, one after the other, gets another pipeline. One that is idle again makes room
    when another model needs it, as every idle model does.
    """

    def __init__(self, fleet: Widenable, promised_sequences: int) -> None:
        self._fleet = fleet
        self._promised_sequences = promised_sequences
        self._were_busy: set[tuple[str, str]] = set()

    async def look(self) -> None:
        """Widen who stays busy."""
        busy = self._busy()
        for model_id, revision in sorted(busy & self._were_busy):
            try:
                await self._fleet.widen(model_id, revision)
            except AzuError as error:
                log.warning("%s did not get another pipeline: %s", model_id, error.message)
        self._were_busy = busy

    def _busy(self) -> set[tuple[str, str]]:
        fewest: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        for model in self._fleet.models:
            if not model.broken:
                fewest[model.topology.key[:2]].append(model.running_jobs)
        return {model for model, jobs in fewest.items() if min(jobs) > self._promised_sequences}


# After a change a model is left alone for so long: it computes again what it lost, and reports follow.
_SETTLE_S = 5.0


class Models(Protocol):
    """The deployed models."""

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """Those that are up."""

    async def vacate(self, node_id: str) -> bool:
        """Move what is on a node elsewhere, as far as there is room; say whether anything moves."""


class KvPressure:
    """Looks at what nodes report once a second, and acts on what lasts."""

    def __init__(self, fleet: Models, policy: PlanPolicy) -> None:
        self._fleet = fleet
        self._most_blocks = policy.num_blocks
        self._least_blocks = policy.num_blocks // policy.promised_sequences
        self._alone_until_s: dict[str | PipelineKey, float] = {}

    def orders(self, reports: Sequence[Node]) -> tuple[KvReduction, ...]:
        """Return which models have to give up KV, for nodes that have less room than was planned."""
        return kv_reductions(self._deployed(), reports, least_blocks=self._least_blocks)

    async def look(self, reports: Sequence[Node], now_s: float) -> None:
        """Have models and nodes changed as the reports ask for."""
        orders = {order.pipeline: order for order in self.orders(reports)}
        await self._resize(orders, reports, now_s)
        for node in reports:
            if self._has_to_be_left(node, orders) and self._takes_changes(node.node_id, now_s):
                if await self._fleet.vacate(node.node_id):
                    log.warning("pieces leave %s", node.name)
                self._leave_alone(node.node_id, now_s)

    async def _resize(
        self, orders: Mapping[PipelineKey, KvReduction], reports: Sequence[Node], now_s: float
    ) -> None:
        models = self._fleet.models
        again = restored_num_blocks(self._deployed(), reports, planned_blocks=self._most_blocks)
        for model, blocks in zip(models, again, strict=True):
            topology = model.topology
            order = orders.get(topology.key)
            wanted = order.num_blocks if order else blocks
            if wanted == topology.num_blocks or not self._takes_changes(topology.key, now_s):
                continue
            log.warning("%s has %d blocks of KV now, not %d", topology.model_id, wanted, topology.num_blocks)
            self._leave_alone(topology.key, now_s)
            await model.resize(wanted)

    def _has_to_be_left(self, node: Node, orders: Mapping[PipelineKey, KvReduction]) -> bool:
        """Say whether pieces have to go: the owner leaves, or no KV that could be given up is enough."""
        if node.state is NodeState.LEAVING:
            return True
        lacking = [
            model
            for model in self._fleet.models
            if node.node_id in model.topology.vram_bytes_by_node
            and (order := orders.get(model.topology.key))
            and order.missing_bytes
        ]
        return bool(lacking) and node.room_bytes(self._taken()[node.node_id]) < 0

    def _deployed(self) -> list[Deployed]:
        return [(model.structure, model.topology) for model in self._fleet.models]

    def _taken(self) -> Counter[str]:
        taken: Counter[str] = Counter()
        for model in self._fleet.models:
            taken.update(model.topology.vram_bytes_by_node)
        return taken

    def _takes_changes(self, what: str | PipelineKey, now_s: float) -> bool:
        return now_s >= self._alone_until_s.get(what, now_s)

    def _leave_alone(self, what: str | PipelineKey, now_s: float) -> None:
        self._alone_until_s[what] = now_s + _SETTLE_S


# Asks for nodes that together hold some bundles, each of whole MiB on one node, those there are included;
# the last request stands until the next. Raises an AzuError when nobody heard.
Ask = Callable[[tuple[int, ...]], Awaitable[None]]


class NodeRequest:
    """Brings models up as `deployments` does, and asks for what the jobs lack that it has no room for.

    It is withdrawn when none waits any more; what a model lacks is forgotten `patience_s` after it was tried
    last. The clock is in seconds.
    """

    def __init__(
        self,
        deployments: Deployments,
        ask: Ask,
        *,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deployments = deployments
        self._ask = ask
        self._patience_s = patience_s
        self._clock = clock
        self._missing: dict[str, tuple[tuple[int, ...], float]] = {}  # by model: bytes, when it was tried
        # Whoever was here before may have asked for something.
        self._asked: tuple[int, ...] | None = None

    @property
    def is_short(self) -> bool:
        """Whether jobs wait that found no room."""
        return bool(self._missing)

    async def ensure(self, model_id: str, revision: str, job_id: str) -> RunningModel:
        """Return the running model, or remember what it lacks."""
        try:
            model = await self._deployments.ensure(model_id, revision, job_id)
        except InsufficientCapacity as error:
            self._missing[model_id] = (error.missing_bytes, self._clock())
            raise
        self._missing.pop(model_id, None)
        return model

    async def look(self, lent_bytes: Iterable[int], num_waiting: int) -> None:
        """Ask for what is lacking now, once; `lent_bytes` is what each node lends, used or not."""
        bundles = self._bundles(lent_bytes, num_waiting)
        if bundles == self._asked:
            return
        try:
            await self._ask(bundles)
        except AzuError as error:
            log.warning("nobody was asked for nodes: %s", error.message)
            return
        if bundles or self._asked:
            log.warning("asked for nodes that hold %s MiB of VRAM", list(bundles) or "no")
        self._asked = bundles

    def _bundles(self, lent_bytes: Iterable[int], num_waiting: int) -> tuple[int, ...]:
        now_s = self._clock()
        self._missing = {
            model_id: (missing, tried_s)
            for model_id, (missing, tried_s) in self._missing.items()
            if num_waiting and now_s - tried_s < self._patience_s
        }
        missing = sorted(size for sizes, _ in self._missing.values() for size in sizes)
        if not missing:
            return ()
        # What is asked for is compared with all that nodes lend: what they lend already comes on top.
        lent = sorted(size // MIB for size in lent_bytes)
        return (*lent, *(-(-size // MIB) for size in missing))


@dataclass(frozen=True, slots=True)
class _Seen:
    """The epoch that a model had, and since when."""

    epoch: int
    since_s: float


class Cooldown:
    """Who came up, was repaired or moved rests for `rest_s`, and so does whose change came to nothing.

    Nodes that come and go must not have pieces wander with them. The clock is in seconds.
    """

    def __init__(self, rest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rest_s = rest_s
        self._clock = clock
        self._seen: dict[PipelineKey, _Seen] = {}

    def is_over(self, model: DeployedModel) -> bool:
        """Say whether a model has rested; it begins to when its epoch is seen first."""
        seen = self._seen.get(model.topology.key)
        if seen is None or seen.epoch != model.topology.epoch:
            self.begin(model)
        return self._clock() - self._seen[model.topology.key].since_s >= self._rest_s

    def begin(self, model: DeployedModel) -> None:
        """Have a model rest from now on."""
        self._seen[model.topology.key] = _Seen(model.topology.epoch, self._clock())


class Movable(Protocol):
    """The deployed models, and how one of them finds a better place."""

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """Those that are up."""

    async def improve(self, model: DeployedModel) -> bool:
        """Move a model if that is worth it; say whether it was tried."""


class Rebalance:
    """Looks now and then whether models would gain from other places, and moves one after another."""

    def __init__(self, fleet: Movable, rest: Cooldown) -> None:
        self._fleet = fleet
        self._rest = rest

    async def look(self) -> None:
        """Move who has rested and gains."""
        for model in self._fleet.models:
            if not model.broken and self._rest.is_over(model) and await self._fleet.improve(model):
                self._rest.begin(model)


# Of so few choices one expert has more than another by chance.
_LEAST_CHOICES = 1_000


class Replicable(Protocol):
    """The deployed models, and how one of them gets the replicas that it is to have."""

    @property
    def models(self) -> tuple[DeployedModel, ...]:
        """Those that are up."""

    async def replicate(self, model: DeployedModel, heat: ExpertHeat) -> bool:
        """Have a model hold its hot experts twice, and no others; say whether a change was tried."""


class ExpertReplication:
    """Looks now and then which experts are chosen more than others, one model after another.

    Heat is of what was chosen since the last look at which enough was. Nobody keeps a replica while jobs find
    no room.
    """

    def __init__(self, fleet: Replicable, rest: Cooldown, *, least_choices: int = _LEAST_CHOICES) -> None:
        self._fleet = fleet
        self._rest = rest
        self._least_choices = least_choices
        self._counts: dict[PipelineKey, ExpertCounts] = {}

    async def look(self, *, is_short: bool) -> None:
        """Give hot experts their replicas, or take all of them back when there `is_short` room."""
        for model in self._fleet.models:
            if model.broken or not model.topology.expert_sets:
                continue
            if is_short:
                await self._fleet.replicate(model, {})
                continue
            heat = await self._heat(model) if self._rest.is_over(model) else {}
            if heat and await self._fleet.replicate(model, heat):
                self._rest.begin(model)

    async def _heat(self, model: DeployedModel) -> ExpertHeat:
        key = model.topology.key
        counts = await model.num_chosen()
        heat = expert_heat(self._counts.get(key, {}), counts, least_choices=self._least_choices)
        if heat:
            self._counts[key] = counts
        return heat

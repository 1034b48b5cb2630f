"""Checks on the deployments that change what lasts: pipelines, places, KV blocks, nodes, replicas."""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from azu.cluster.cluster import Cluster
from azu.cluster.deployment import Deployment
from azu.errors import AzuError
from azu.planner.kv_blocks import Deployed, KvReduction, kv_reductions, restored_num_blocks
from azu.planner.policy import PlanPolicy
from azu.planner.replicas import ExpertCounts, ExpertHeat, expert_heat
from azu.protocol.node import Node, NodeState
from azu.protocol.topology import PipelineKey
from azu.units import MIB

log = logging.getLogger(__name__)

# After a change a deployment is left alone for so long: it computes again what it lost, and reports follow.
_SETTLE_S = 5.0
# Among so few choices one expert is chosen more often than another by chance.
_LEAST_CHOICES = 1_000
# So many deployments are remembered, the latest ones.
_MOST_SEEN = 1000


@dataclass(frozen=True, slots=True)
class _Seen:
    """The epoch that a deployment had, and since when."""

    epoch: int
    since_s: float


class Cooldown:
    """A deployment rests for `rest_s` after it came up, was repaired or moved, or was not changed after all.

    Nodes that come and go must not have pieces wander with them. The clock is in seconds.
    """

    def __init__(self, rest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rest_s = rest_s
        self._clock = clock
        self._seen: dict[PipelineKey, _Seen] = {}

    def is_over(self, deployment: Deployment) -> bool:
        """Say whether a deployment has rested; its rest begins when its epoch is seen first."""
        seen = self._seen.get(deployment.topology.key)
        if seen is None or seen.epoch != deployment.topology.epoch:
            self.begin(deployment)
        return self._clock() - self._seen[deployment.topology.key].since_s >= self._rest_s

    def begin(self, deployment: Deployment) -> None:
        """Have a deployment rest from now on."""
        self._seen.pop(deployment.topology.key, None)
        self._seen[deployment.topology.key] = _Seen(deployment.topology.epoch, self._clock())
        for old in list(self._seen)[:-_MOST_SEEN]:
            del self._seen[old]


class ScaleOut:
    """Gives a busy model another pipeline: one whose pipelines each have more jobs than `promised_sequences`.

    A model must be busy at two checks in a row. A pipeline that was idle for `idle_s` leaves again, the
    newest first; the last one of a model stays until another model needs its room. The clock is in seconds.
    """

    def __init__(
        self,
        cluster: Cluster,
        promised_sequences: int,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._promised_sequences = promised_sequences
        self._idle_s = idle_s
        self._clock = clock
        self._were_busy: set[tuple[str, str]] = set()
        self._idle_since_s: dict[PipelineKey, float] = {}

    async def check(self) -> None:
        """Add a pipeline to each model that stays busy, and close pipelines that stay idle."""
        await self._close_idle()
        busy = self._busy()
        for model_id, revision in sorted(busy & self._were_busy):
            try:
                await self._cluster.add_pipeline(model_id, revision)
            except AzuError as error:
                log.warning("%s did not get another pipeline: %s", model_id, error.message)
        self._were_busy = busy

    async def _close_idle(self) -> None:
        now_s = self._clock()
        idle = [one for one in self._cluster.deployments if one.is_idle]
        self._idle_since_s = {
            one.topology.key: self._idle_since_s.get(one.topology.key, now_s) for one in idle
        }
        for deployment in sorted(idle, key=lambda one: -one.topology.replica):
            if now_s - self._idle_since_s[deployment.topology.key] >= self._idle_s:
                await self._cluster.close_further(deployment)

    def _busy(self) -> set[tuple[str, str]]:
        jobs: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        for deployment in self._cluster.deployments:
            if not deployment.broken:
                jobs[deployment.topology.key[:2]].append(deployment.pipeline.num_expected)
        return {model for model, counts in jobs.items() if min(counts) > self._promised_sequences}


class Rebalance:
    """Moves deployments that would gain from other places, one after another."""

    def __init__(self, cluster: Cluster, cooldown: Cooldown) -> None:
        self._cluster = cluster
        self._cooldown = cooldown

    async def check(self) -> None:
        """Move each deployment that has rested and gains."""
        for deployment in self._cluster.deployments:
            if deployment.broken or not self._cooldown.is_over(deployment):
                continue
            if await self._cluster.improve(deployment):
                self._cooldown.begin(deployment)


class ShareOut:
    """Moves deployments, each every `every_s` at most, to nodes of owners who earned much less for theirs.

    The clock is in seconds.
    """

    def __init__(self, cluster: Cluster, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._every_s = every_s
        self._clock = clock
        self._looked_s: dict[PipelineKey, float] = {}

    async def check(self) -> None:
        """Move each deployment whose time has come if its owners earned much more than others."""
        now_s, deployments = self._clock(), self._cluster.deployments
        keys = [one.topology.key for one in deployments]
        self._looked_s = {key: self._looked_s.get(key, now_s) for key in keys}
        for key, deployment in zip(keys, deployments, strict=True):
            if not deployment.broken and now_s - self._looked_s[key] >= self._every_s:
                self._looked_s[key] = now_s
                await self._cluster.share_out(deployment)


class ExpertReplication:
    """Gives experts that are chosen more than others a second place, one deployment after another.

    The counts are of what was chosen since the last check that found enough choices. No deployment keeps a
    replica while jobs find no room.
    """

    def __init__(self, cluster: Cluster, cooldown: Cooldown, *, least_choices: int = _LEAST_CHOICES) -> None:
        self._cluster = cluster
        self._cooldown = cooldown
        self._least_choices = least_choices
        self._counts: dict[PipelineKey, ExpertCounts] = {}

    async def check(self) -> None:
        """Give hot experts their replicas, or take all replicas back while jobs find no room."""
        there = {one.topology.key for one in self._cluster.deployments}
        self._counts = {key: counts for key, counts in self._counts.items() if key in there}
        for deployment in self._cluster.deployments:
            if deployment.broken or not deployment.topology.expert_sets:
                continue
            if self._cluster.shortages:
                await self._cluster.replicate(deployment, {})
                continue
            heat = await self._heat(deployment) if self._cooldown.is_over(deployment) else {}
            if heat and await self._cluster.replicate(deployment, heat):
                self._cooldown.begin(deployment)

    async def _heat(self, deployment: Deployment) -> ExpertHeat:
        key = deployment.topology.key
        counts = await deployment.num_chosen()
        heat = expert_heat(self._counts.get(key, {}), counts, least_choices=self._least_choices)
        if heat:
            self._counts[key] = counts
        return heat


class KvPressure:
    """Reduces KV where nodes have less room than planned, restores it later, empties nodes that leave."""

    def __init__(self, cluster: Cluster, policy: PlanPolicy) -> None:
        self._cluster = cluster
        self._most_blocks = policy.num_blocks
        self._least_blocks = policy.num_blocks // policy.promised_sequences
        self._alone_until_s: dict[str | PipelineKey, float] = {}

    async def check(self, reports: Sequence[Node], now_s: float) -> None:
        """Resize deployments and vacate nodes as the nodes' reports ask for."""
        self._alone_until_s = {
            what: until_s for what, until_s in self._alone_until_s.items() if now_s < until_s
        }
        found = kv_reductions(self._deployed(), reports, least_blocks=self._least_blocks)
        reductions = {one.pipeline: one for one in found}
        await self._resize(reductions, reports, now_s)
        for node in reports:
            if self._must_be_vacated(node, reductions) and node.node_id not in self._alone_until_s:
                goes = node.state in (NodeState.LEAVING, NodeState.PAUSED)
                if await self._cluster.vacate(node.node_id, closes_idle=goes):
                    log.warning("pieces leave %s", node.name)
                self._leave_alone(node.node_id, now_s)

    async def _resize(
        self, reductions: Mapping[PipelineKey, KvReduction], reports: Sequence[Node], now_s: float
    ) -> None:
        deployments = self._cluster.deployments
        promised = self._cluster.promised_bytes()
        left = [
            replace(one, vram_total_bytes=one.vram_total_bytes - promised.get(one.node_id, 0))
            for one in reports
        ]
        restored = restored_num_blocks(self._deployed(), left, planned_blocks=self._most_blocks)
        for deployment, blocks in zip(deployments, restored, strict=True):
            topology = deployment.topology
            reduction = reductions.get(topology.key)
            wanted = reduction.num_blocks if reduction else blocks
            if wanted == topology.num_blocks or topology.key in self._alone_until_s:
                continue
            log.warning("%s has %d blocks of KV now, not %d", topology.model_id, wanted, topology.num_blocks)
            self._leave_alone(topology.key, now_s)
            await deployment.resize(wanted)

    def _must_be_vacated(self, node: Node, reductions: Mapping[PipelineKey, KvReduction]) -> bool:
        """Say whether pieces must go: its owner or a mark says so, or all KV given up is not enough."""
        if node.state in (NodeState.LEAVING, NodeState.PAUSED, NodeState.SUSPECT):
            return True
        is_short = any(
            (reduction := reductions.get(one.topology.key)) is not None and reduction.missing_bytes
            for one in self._cluster.deployments
            if node.node_id in one.topology.vram_bytes_by_node
        )
        return is_short and node.room_bytes(self._taken()[node.node_id]) < 0

    def _deployed(self) -> list[Deployed]:
        return [(one.structure, one.topology) for one in self._cluster.deployments]

    def _taken(self) -> Counter[str]:
        taken: Counter[str] = Counter()
        for deployment in self._cluster.deployments:
            taken.update(deployment.topology.vram_bytes_by_node)
        return taken

    def _leave_alone(self, what: str | PipelineKey, now_s: float) -> None:
        self._alone_until_s[what] = now_s + _SETTLE_S


# Requests nodes that together hold some bundles, each of whole MiB on one node, existing nodes included. A
# request stands until the next. Raises an AzuError when the request was not taken.
RequestNodes = Callable[[tuple[int, ...]], Awaitable[None]]


class NodeRequest:
    """Requests nodes from an autoscaler for the models that found no room.

    The request is withdrawn when no job waits any more; what a model lacks is forgotten `patience_s` after it
    was tried last. The clock is in seconds, the one by which the cluster notes its shortages.
    """

    def __init__(
        self,
        cluster: Cluster,
        request: RequestNodes,
        *,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._request = request
        self._patience_s = patience_s
        self._clock = clock
        # None until the first request: an earlier scheduler's may still stand.
        self._requested: tuple[int, ...] | None = None

    async def check(self, lent_bytes: Iterable[int], num_waiting: int) -> None:
        """Request what is lacking now, once; `lent_bytes` is what each node lends, used or not."""
        bundles = self._bundles(lent_bytes, num_waiting)
        if bundles == self._requested:
            return
        try:
            await self._request(bundles)
        except AzuError as error:
            log.warning("no nodes were requested: %s", error.message)
            return
        if bundles or self._requested:
            log.warning("requested nodes that hold %s MiB of VRAM", list(bundles) or "no")
        self._requested = bundles

    def _bundles(self, lent_bytes: Iterable[int], num_waiting: int) -> tuple[int, ...]:
        now_s = self._clock()
        shortages = self._cluster.shortages
        for model_id, shortage in list(shortages.items()):
            if not num_waiting or now_s - shortage.tried_s >= self._patience_s:
                del shortages[model_id]
        missing = sorted(size for shortage in shortages.values() for size in shortage.missing_bytes)
        if not missing:
            return ()
        # The autoscaler compares a request with all that nodes lend: what they lend already comes on top.
        lent = sorted(size // MIB for size in lent_bytes)
        return (*lent, *(-(-size // MIB) for size in missing))

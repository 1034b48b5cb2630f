"""The canary in a cluster: it finds the node whose pieces change tokens, and leaves it out.

Each new placement of a model, and each placement once an hour, continues the same prompts. Their tokens are
known once two placements without a common node gave the same. Where a placement differs from them twice in a
row, its nodes are tried one after another: their pieces move elsewhere, and the canary runs again. If its
tokens are right then, the node that the pieces left had changed them.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from azu.cluster.cluster import Cluster
from azu.cluster.deployment import Deployment, DeploymentState
from azu.cluster.deployment_store import DeploymentStore
from azu.engine.canary import CanaryAnswer
from azu.errors import AzuError
from azu.metrics import CANARIES, Meter
from azu.protocol.topology import PipelineKey
from azu.supervision import as_known_error

log = logging.getLogger(__name__)

# A deployment with jobs runs the canary after so long; an idle one at once.
_PATIENCE_S = 10.0
# The canary runs again so long after it had no answer, and after a search in vain.
_RETRY_S = 30.0
_REST_S = 600.0
# Of a model, so many different answers are remembered while none is known.
_MOST_ANSWERS = 16
# So many models are remembered, the latest ones.
_MOST_MODELS = 1000

ModelKey = tuple[str, str, str]  # model id, revision, dtype


class Verdict(StrEnum):
    """What an answer says: AGREES with what is known, DIFFERS from it, or nothing yet."""

    AGREES = "agrees"
    DIFFERS = "differs"
    PROVISIONAL = "provisional"
    UNCLEAR = "unclear"


@dataclass(slots=True)
class KnownTokens:
    """What the canary has to answer for one model, as far as placements agreed about it.

    `known` is the answer that two placements without a common node gave. Until there is one, `seen` has every
    answer with the nodes of the placements that gave it.
    """

    known: CanaryAnswer | None = None
    seen: list[tuple[CanaryAnswer, list[frozenset[str]]]] = field(default_factory=list)

    def take(self, answer: CanaryAnswer, nodes: frozenset[str]) -> Verdict:
        """Take the answer of a placement on some nodes."""
        if self.known is None and not answer.is_clear:
            return Verdict.UNCLEAR
        if self.known is None:
            self._see(answer, nodes)
        if self.known is None:
            return Verdict.PROVISIONAL
        return Verdict.AGREES if self.known.agrees(answer) else Verdict.DIFFERS

    def _see(self, answer: CanaryAnswer, nodes: frozenset[str]) -> None:
        for first, placements in self.seen:
            if first.agrees(answer):
                if any(nodes.isdisjoint(others) for others in placements):
                    self.known = first
                    self.seen.clear()
                elif nodes not in placements:
                    placements[:] = [*placements[-_MOST_ANSWERS + 1 :], nodes]
                return
        self.seen = [*self.seen[-_MOST_ANSWERS + 1 :], (answer, [nodes])]
        if len(self.seen) > 1:
            log.warning("placements answer the canary differently; which is right is not known yet")


@dataclass(slots=True)
class _Watched:
    """A deployment: when the canary is due in its present placement, and how often it differed there so far.

    `tried` are the nodes that its pieces were moved off since it differed first; the last is `on_trial`.
    """

    epoch: int
    due_s: float
    differed: int = 0
    tried: set[str] = field(default_factory=set)
    on_trial: str | None = None
    asking: asyncio.Task[None] | None = None


class CanaryWatch:
    """Runs the canary in the deployments of a cluster; `leave_out` is called with a node that changes tokens.

    The canary is due on each new placement, and `every_s` after an answer. The clock is in seconds.
    """

    def __init__(
        self,
        cluster: Cluster,
        store: DeploymentStore,
        meter: Meter,
        *,
        every_s: float,
        leave_out: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._meter = meter
        self._every_s = every_s
        self._leave_out = leave_out
        self._clock = clock
        self._known: dict[ModelKey, KnownTokens] = {}
        # The nodes of placements that agreed: others are tried first.
        self._agreed: defaultdict[ModelKey, set[str]] = defaultdict(set)
        self._watched: dict[PipelineKey, _Watched] = {}

    async def check(self) -> None:
        """Begin to run the canary where it is due; called again and again."""
        deployments = {one.topology.key: one for one in self._cluster.deployments}
        for key in self._watched.keys() - deployments.keys():
            del self._watched[key]
        for key, deployment in deployments.items():
            if key not in self._watched:
                self._watched[key] = _Watched(0, 0.0)
                for verdict in Verdict:
                    self._meter.count(CANARIES, 0, deployment.structure.model_id, verdict.value)
            watched = self._watched[key]
            if watched.epoch != deployment.topology.epoch:
                watched.epoch, watched.due_s, watched.differed = deployment.topology.epoch, self._clock(), 0
            if self._is_due(deployment, watched):
                watched.asking = asyncio.create_task(self._ask(deployment, watched))

    def _is_due(self, deployment: Deployment, watched: _Watched) -> bool:
        if watched.asking is not None and not watched.asking.done():
            return False
        patience_s = 0.0 if deployment.is_idle else _PATIENCE_S
        is_serving = deployment.state is DeploymentState.SERVING
        return is_serving and self._clock() >= watched.due_s + patience_s

    async def _ask(self, deployment: Deployment, watched: _Watched) -> None:
        topology = deployment.topology
        watched.due_s = self._clock() + _RETRY_S
        try:
            known = await self._known_of(deployment)
            answer = await deployment.pipeline.canary()
            if deployment.topology is topology:  # else it is due where the pieces are now
                await self._judge(deployment, watched, known, answer)
        except AzuError as error:
            log.info("the canary of %s has no answer: %s", topology.model_id, error.message)
        except Exception as error:
            as_known_error(error, "the canary")

    async def _known_of(self, deployment: Deployment) -> KnownTokens:
        model = _model(deployment)
        if model not in self._known:
            stored = KnownTokens(await self._store.canary(model))
            self._known.setdefault(model, stored)  # another pipeline may have been first
            for old in list(self._known)[:-_MOST_MODELS]:
                del self._known[old]
                self._agreed.pop(old, None)
        return self._known[model]

    async def _judge(
        self, deployment: Deployment, watched: _Watched, known: KnownTokens, answer: CanaryAnswer
    ) -> None:
        model, nodes = _model(deployment), frozenset(deployment.topology.vram_bytes_by_node)
        was_known = known.known is not None
        verdict = known.take(answer, nodes)
        self._meter.count(CANARIES, 1, deployment.structure.model_id, verdict.value)
        watched.due_s = self._clock() + self._every_s
        if known.known is not None and not was_known:
            await self._store.keep_canary(model, known.known)
            for key, one in self._watched.items():
                if key[:2] == deployment.topology.key[:2] and one is not watched:
                    one.due_s = self._clock()  # what it answered before may differ
        if verdict is Verdict.AGREES:
            self._agreed[model] |= nodes
            self._end_search(watched, nodes)
        elif verdict is Verdict.DIFFERS:
            watched.differed += 1
            await self._search(deployment, watched)

    async def _search(self, deployment: Deployment, watched: _Watched) -> None:
        """Move the pieces off the next node that may have changed the tokens."""
        if watched.differed == 1:
            watched.due_s = self._clock()
            return
        watched.on_trial = None  # the tokens are wrong without it too
        log.error("%s answers the canary with wrong tokens", deployment.structure.model_id)
        agreed = self._agreed[_model(deployment)]
        suspects = deployment.topology.vram_bytes_by_node.keys() - watched.tried
        for node_id in sorted(suspects, key=lambda one: (one in agreed, one)):
            if await self._cluster.move_off(deployment, node_id):
                log.warning("its pieces leave node %s for a trial", node_id[:8])
                watched.tried.add(node_id)
                watched.on_trial = node_id
                return
        log.error("no node that it is on can be tried: there is no room elsewhere, or all were tried")
        watched.tried.clear()
        watched.due_s = self._clock() + _REST_S

    def _end_search(self, watched: _Watched, nodes: frozenset[str]) -> None:
        guilty, watched.on_trial, watched.differed = watched.on_trial, None, 0
        watched.tried.clear()
        if guilty is not None and guilty not in nodes:
            for agreed in self._agreed.values():
                agreed.discard(guilty)
            self._leave_out(guilty)


def _model(deployment: Deployment) -> ModelKey:
    structure = deployment.structure
    return structure.model_id, structure.revision, structure.dtype

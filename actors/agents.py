"""The agents of all nodes: started where Ray has a node that lends, asked each period how it is."""

import asyncio
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError

from actors.node import NodeAgent
from actors.placement import actor_name, start_on_node, worker_nodes
from azu.config.policy import Heartbeat
from azu.lifecycle.nodes import NodeBook
from azu.protocol.node import Node

log = logging.getLogger(__name__)

# A node measures its links to so many others; the rest count as the policy's hop.
_MOST_PEERS = 32
# A node that lives answers a ping at once; this is for a machine that is very busy.
_PROBE_S = 2.0
_LOOK_S = 0.05


class RayAgents:
    """Keeps a NodeBook by what the agents say.

    By node id: `by_node` are the agents, `nodes` what each said last, `lent_bytes` what Ray hands out there.
    """

    def __init__(self, heartbeat: Heartbeat, home: Path, book: NodeBook) -> None:
        self._heartbeat = heartbeat
        self._home = home
        self._book = book
        self.by_node: dict[str, ActorHandle] = {}
        self.nodes: dict[str, Node] = {}
        self.lent_bytes: dict[str, int] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._linked: set[str] = set()
        self._has_met = False

    def died(self, node_id: str) -> None:
        """Hear that a node is dead: if it comes back, it measures its links anew."""
        self._linked.discard(node_id)

    async def first_reports(self) -> None:
        """Wait until every node has reported, or is late: models are taken over together with their nodes."""
        patience_s = time.monotonic() + self._heartbeat.dead_s
        while not self._has_met or self.by_node.keys() - self.nodes.keys():
            if self._has_met and time.monotonic() > patience_s:
                return
            await asyncio.sleep(_LOOK_S)

    async def meet(self) -> None:
        """Follow which nodes Ray has; it may be slow to say so, and nobody's silence counts by it."""
        while True:
            try:
                await self._meet_nodes()
                self._has_met = True
            except Exception:
                log.exception("Ray did not say which nodes there are")
            await asyncio.sleep(self._heartbeat.period_s)

    async def _meet_nodes(self) -> None:
        """Start an agent on each new node and forget those that Ray says are gone."""
        living = {node.node_id: node for node in await asyncio.to_thread(worker_nodes)}
        self.lent_bytes = {node_id: node.vram_bytes for node_id, node in living.items()}
        for node_id in self.by_node.keys() - living.keys():
            del self.by_node[node_id]
            self._book.gone(node_id)
        for node_id in living.keys() - self.by_node.keys():
            node = living[node_id]
            name = actor_name("node", node.name, node_id[:8])
            self.by_node[node_id] = start_on_node(
                NodeAgent, name, node_id, node, self._home, max_concurrency=100
            )

    async def hear(self) -> None:
        """Ask every node each period; one that does not answer keeps nobody else waiting."""
        while True:
            for node_id in self.by_node.keys() - self._asking.keys():
                self._asking[node_id] = asyncio.create_task(self._ask(node_id))
            self._book.judge(time.monotonic())
            await asyncio.sleep(self._heartbeat.period_s)

    async def _ask(self, node_id: str) -> None:
        agent = self.by_node[node_id]
        try:
            # The first answer takes as long as the agent takes to start; silence is judged by the book.
            node: Node = await asyncio.wait_for(agent.report.remote(), self._heartbeat.dead_s)
        except ActorDiedError:
            log.warning("the agent of node %s died; it is started again", node_id[:8])
            self._linked.discard(node_id)
            if self.by_node.get(node_id) is agent:
                del self.by_node[node_id]
        except Exception as error:
            log.warning("node %s did not report: %s", node_id[:8], type(error).__name__)
        else:
            # Ray may have declared it gone while it answered.
            if self.by_node.get(node_id) is agent:
                self.nodes[node_id] = node
                self._book.heard(node, time.monotonic())
                self._measure_links(node_id)
        finally:
            del self._asking[node_id]

    def _measure_links(self, node_id: str) -> None:
        """Have a new node measure, once, the way to some that were there before."""
        if node_id in self._linked:
            return
        peers = {other: self.by_node[other] for other in sorted(self._linked & self.by_node.keys())}
        self._linked.add(node_id)
        self.by_node[node_id].measure_links.remote(dict(list(peers.items())[:_MOST_PEERS]))

    async def probe(self, node_ids: Iterable[str]) -> None:
        """Doubt those nodes that do not answer."""

        async def ping(node_id: str) -> None:
            try:
                await asyncio.wait_for(self.by_node[node_id].ping.remote(), _PROBE_S)
            except Exception as error:
                log.warning("node %s does not answer: %s", node_id[:8], type(error).__name__)
                self._book.doubted(node_id, time.monotonic())

        await asyncio.gather(*map(ping, node_ids))

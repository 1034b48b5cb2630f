"""NodeAgent, one on each worker node: reports and shards; NodeAgents, in the scheduler, has all of them."""

import asyncio
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError

from actors.compat import is_one_waiting, start_waiting
from actors.links import REGISTRY, ask, raises_known_errors
from actors.placement import WorkerNode, start_on_node, worker_nodes
from actors.telemetry import log_as
from azu.cluster.lending import TERMS, LendingTerms, Pace, Pauses
from azu.cluster.nodes import NodeTable, NodeVersions
from azu.config.network import Heartbeat
from azu.engine.device import DeviceMemory, device_speed, open_meter
from azu.errors import InvalidRequest, ShardError
from azu.files import disk_errors
from azu.models.shard_cache import ShardCache, within
from azu.protocol.node import Node, NodeState, plain_name
from azu.protocol.structure import ModelFile, Shard, Structure
from azu.protocol.topology import actor_name
from azu.protocol.versions import Versions, own_versions

log = logging.getLogger(__name__)

_CHUNK_BYTES = 8 * 1024 * 1024
# The titles of the processes that hold pieces of models: Ray takes an actor's class for it.
_PIECES = ("ray::LayerActor", "ray::ExpertActor")
_ANSWER_TIMEOUT_S = 60.0  # a chunk of a shard, on a slow network too
_PINGS = 5
_PING_TIMEOUT_S = 2.0
# A node measures its links to so many others; the rest count as the policy's hop.
_MOST_PEERS = 32
# A living node answers a ping at once; this is for a machine that is very busy.
_PROBE_S = 2.0
_POLL_S = 0.05
_FIRST_REPORTS = 6
# Receipts name the nodes of pieces that are replaced just now.
_KEPT_NODES = 1_000


@raises_known_errors
class NodeAgent:
    """Wraps a node's ShardCache and DeviceMeter."""

    def __init__(self, node: WorkerNode, head_home: Path) -> None:
        """Take over a node; it keeps its files in its own AZU_HOME, else in the folder that the head uses."""
        log_as("node", node=node.name)
        home = Path(os.environ.get("AZU_HOME") or head_home)
        self._node = node
        self._home = home
        terms = LendingTerms.from_json(os.environ.get(TERMS) or "{}")
        most = terms.disk_bytes
        self._cache = ShardCache(home / "shards" / node.name, None if most is None else within(most))
        self._pace = Pace(terms.fetch_bytes_per_s)
        self._pauses = Pauses(terms)
        self._terms = terms
        # It outlives the node, which is started again with a new certificate now and then.
        self._paused = home / "paused" / node.name
        self._files = home / "models" / node.name
        self._lent_bytes = node.vram_bytes
        self._state = NodeState.ALIVE
        self._speed = device_speed(node.device, home / "speeds")
        self._meter = open_meter(self._speed)
        self._links_s: dict[str, float] = {}

    async def versions(self) -> tuple[int, int, str]:
        """Return the fields of what this node understands: every release can read a plain tuple."""
        return astuple(own_versions())

    async def report(self) -> Node:
        """Return the node's live state."""
        titles = await asyncio.to_thread(_titles)
        memory = await asyncio.to_thread(self._memory, titles)
        why_paused = await asyncio.to_thread(self._why_paused, titles)
        state = NodeState.PAUSED if why_paused and self._state is NodeState.ALIVE else self._state
        return Node(
            node_id=self._node.node_id,
            name=self._node.name,
            payout_address=self._node.payout_address,
            vram_total_bytes=self._lent_bytes,
            vram_free_bytes=memory.free_bytes,
            memory_bytes_per_s=self._speed.memory_bytes_per_s,
            flops_per_s=self._speed.flops_per_s,
            cached_shards=self._cache.contents(),
            links_s=dict(self._links_s),
            device=self._node.device,
            vram_used_bytes=memory.used_bytes,
            vram_other_bytes=memory.other_bytes,
            load=self._meter.load(),
            state=state,
            why_paused=why_paused,
        )

    async def pause(self) -> None:
        """Report from now on that this node is paused, until `resume`; it gives its pieces away."""
        with disk_errors(self._home):
            self._paused.parent.mkdir(parents=True, exist_ok=True)
            self._paused.touch()

    async def resume(self) -> None:
        """Lend again, as far as the owner's terms allow it."""
        with disk_errors(self._home):
            self._paused.unlink(missing_ok=True)

    def _why_paused(self, titles: Mapping[int, str]) -> str:
        load = None
        if self._terms.yields:
            own = [os.getppid(), *titles] if self._node.device == "cpu" else _pieces(titles)
            load = self._meter.others_load(own)
        celsius = None if self._terms.max_celsius is None else self._meter.celsius()
        # The terms are judged all the time: what was seen before a pause says nothing after it.
        why = self._pauses.why(datetime.now().time(), time.monotonic(), celsius, load)
        return "its owner paused it" if self._paused.exists() else why

    async def leave(self) -> None:
        """Report from now on that this node is leaving; it keeps its pieces until they run elsewhere."""
        self._state = NodeState.LEAVING

    async def ping(self) -> None:
        """Answer at once."""

    async def measure_links(self, peers: Mapping[str, ActorHandle]) -> None:
        """Measure the links to other nodes' agents, by node id, and report them from now on.

        A peer that does not answer keeps what was measured before.
        """
        for node_id, peer in peers.items():
            try:
                self._links_s[node_id] = await _one_way_s(peer)
            except Exception as error:
                log.warning("no link to node %s: %s", node_id[:8], type(error).__name__)

    def _memory(self, titles: Mapping[int, str]) -> DeviceMemory:
        if not is_one_waiting(titles.values()):
            try:
                start_waiting(self._node.raylet)
            except Exception as error:
                # Pieces come up without it too, only later.
                log.warning("no process waits for the next piece: %s", error)
        return self._meter.memory(self._lent_bytes, _pieces(titles))

    async def fetch(self, structure: Structure, names: Sequence[str]) -> tuple[dict[str, Path], Path]:
        """Fetch shards to this node's disk; return their paths and the folder with config and tokenizer.

        Shards come through the object store in chunks and are verified; a file of the registry that can be
        read from here is mapped in place.
        """
        shards = [structure.shard(name) for name in names]
        with disk_errors(self._home):
            paths = await asyncio.gather(*(self._fetch(structure, shard) for shard in shards))
            return dict(zip(names, paths, strict=True)), await self._config(structure)

    async def _fetch(self, structure: Structure, shard: Shard) -> Path:
        if (cached := self._cache.path(shard.sha256)) is not None:
            return cached
        key = (structure.model_id, structure.revision, shard.name)
        there = Path(await _ask("path", *key))
        if there.is_file():
            return await asyncio.to_thread(self._cache.adopt, shard.sha256, there)
        chunks = []
        for offset in range(0, shard.size_bytes, _CHUNK_BYTES):
            num_bytes = min(_CHUNK_BYTES, shard.size_bytes - offset)
            await asyncio.sleep(self._pace.wait_s(num_bytes, time.monotonic()))
            chunks.append(await _ask("read", *key, offset, _CHUNK_BYTES))
        return await asyncio.to_thread(self._cache.store, shard.sha256, shard.size_bytes, chunks)

    async def _config(self, structure: Structure) -> Path:
        folder = self._files / structure.revision
        folder.mkdir(parents=True, exist_ok=True)
        for file in structure.files:
            if not (folder / file.name).exists():
                content = await _ask("file", structure.model_id, structure.revision, file.name)
                _write(folder, file, content)
        return folder


async def _ask(method: str, *arguments: object) -> Any:
    return await ask(REGISTRY, method, *arguments, timeout_s=_ANSWER_TIMEOUT_S)


async def _one_way_s(peer: ActorHandle) -> float:
    """Return half of the quickest round trip: a busy machine only adds to it."""
    rounds_s = []
    for _ in range(_PINGS):
        started_s = time.perf_counter()
        await asyncio.wait_for(peer.ping.remote(), _PING_TIMEOUT_S)
        rounds_s.append(time.perf_counter() - started_s)
    return min(rounds_s) / 2


def _titles() -> dict[int, str]:
    """Return the command lines of this node's processes by id: those of its raylet, which is our parent."""
    titles = {}
    for process in psutil.Process(os.getppid()).children():
        with suppress(psutil.Error):  # it ended, or belongs to another user
            titles[process.pid] = " ".join(process.cmdline())
    return titles


def _pieces(titles: Mapping[int, str]) -> list[int]:
    return [pid for pid, title in titles.items() if title.startswith(_PIECES)]


def _write(folder: Path, file: ModelFile, content: bytes) -> None:
    if len(content) != file.size_bytes:
        raise ShardError(f"{file.name} has {len(content)} bytes instead of {file.size_bytes}")
    temporary = folder / f".{file.name}.part"
    temporary.write_bytes(content)
    temporary.rename(folder / file.name)


class NodeAgents:
    """Starts the agents and keeps a NodeTable by their reports.

    By node id: `by_node` has the agents, `nodes` the last reports, also of nodes that went lately,
    `lent_bytes` the VRAM that Ray hands out, and `hosts` the addresses of the machines.
    """

    def __init__(self, heartbeat: Heartbeat, home: Path, table: NodeTable) -> None:
        self._heartbeat = heartbeat
        self._home = home
        self._table = table
        self.by_node: dict[str, ActorHandle] = {}
        self.nodes: dict[str, Node] = {}
        self.lent_bytes: dict[str, int] = {}
        self.hosts: dict[str, str] = {}
        self._versions = NodeVersions(own_versions())
        self._names: dict[str, str] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._linked: set[str] = set()
        self._has_agents = False

    @property
    def has_reports(self) -> bool:
        """Whether a node is there that has reported."""
        return not self.lent_bytes.keys().isdisjoint(self.nodes)

    def node_died(self, node_id: str) -> None:
        """Have a dead node measure its links anew if it comes back."""
        self._linked.discard(node_id)

    async def first_reports(self) -> None:
        """Wait until every node has reported or is late; deployments are taken over after that."""
        # Nodes that Ray knows live: a busy one reports late.
        deadline_s = time.monotonic() + _FIRST_REPORTS * self._heartbeat.dead_s
        while not self._has_agents or self.by_node.keys() - self.nodes.keys() - self._versions.refused.keys():
            if self._has_agents and time.monotonic() > deadline_s:
                return
            await asyncio.sleep(_POLL_S)

    async def follow_nodes(self) -> None:
        """Start an agent on each new node and forget the nodes that Ray reports as gone.

        Ray may be slow to answer: another loop takes the reports.
        """
        found, ended = await asyncio.to_thread(worker_nodes)
        living = {node.node_id: node for node in found}
        self.lent_bytes = {node_id: node.vram_bytes for node_id, node in living.items()}
        self.hosts = {node_id: node.raylet.rpartition(":")[0] for node_id, node in living.items()}
        self._names = {node_id: plain_name(node.name) for node_id, node in living.items()}
        for node_id in self.by_node.keys() - living.keys():
            del self.by_node[node_id]
            self._versions.forget(node_id)
            self._table.remove(node_id, time.monotonic(), ended=node_id in ended)
        gone = [node_id for node_id in self.nodes if node_id not in living]
        for node_id in gone[:-_KEPT_NODES]:
            del self.nodes[node_id]
        for node_id in living.keys() - self.by_node.keys():
            node = living[node_id]
            name = actor_name("node", node.name, node_id[:8])
            self.by_node[node_id] = start_on_node(
                NodeAgent, name, node_id, node, self._home, max_concurrency=100
            )
        self._has_agents = True

    async def follow_reports(self) -> None:
        """Ask every node for its report each period; a node that does not answer delays no other."""
        for node_id in self.by_node.keys() - self._asking.keys() - self._versions.refused.keys():
            self._asking[node_id] = asyncio.create_task(self._take_report(node_id))
        self._table.judge(time.monotonic())

    async def _take_report(self, node_id: str) -> None:
        agent = self.by_node[node_id]
        try:
            # The first answer takes as long as the agent takes to start; the table judges silence.
            if not await self._takes(node_id, agent):
                return
            said: Node = await self._answer(node_id, agent, agent.report.remote())
            node = said.checked(self.lent_bytes.get(node_id, 0))
        except ActorDiedError:
            log.warning("the agent of node %s died; it is started again", node_id[:8])
            self._linked.discard(node_id)
            if self.by_node.get(node_id) is agent:
                del self.by_node[node_id]
                self._versions.forget(node_id)
        except InvalidRequest as error:
            log.warning("the report of node %s is refused: %s", node_id[:8], error.message)
        except Exception as error:
            log.warning("node %s did not report: %s", node_id[:8], type(error).__name__)
        else:
            # Ray may have declared it gone while it answered.
            if self.by_node.get(node_id) is agent:
                self.nodes.pop(node_id, None)
                self.nodes[node_id] = node  # behind those that reported before
                self._table.record(node, time.monotonic())
                self._measure_links(node_id)
        finally:
            del self._asking[node_id]

    async def _takes(self, node_id: str, agent: ActorHandle) -> bool:
        """Return whether a node understands the others, which its agent is asked once."""
        if not self._versions.knows(node_id):
            said = Versions(*await self._answer(node_id, agent, agent.versions.remote()))
            # Ray may have declared the node gone while it answered.
            if self.by_node.get(node_id) is agent and not self._versions.take(node_id, said):
                log.error("%s", "; ".join(self.problems()))
        return node_id not in self._versions.refused

    def problems(self) -> tuple[str, ...]:
        """Return which nodes are left alone, and why."""
        refused = self._versions.refused.items()
        return tuple(f"node {self._names.get(node_id, node_id[:8])}: {why}" for node_id, why in refused)

    async def _answer(self, node_id: str, agent: ActorHandle, asked: ray.ObjectRef) -> Any:
        """Return an agent's answer, which is waited for as long as the agent answers at all."""
        answer: asyncio.Future[Any] = asyncio.ensure_future(asked)
        try:
            while True:
                await asyncio.wait({answer}, timeout=self._heartbeat.period_s)
                if answer.done():
                    return answer.result()
                await asyncio.wait_for(agent.ping.remote(), self._heartbeat.dead_s)
                self.heard(node_id)
        finally:
            answer.cancel()

    def heard(self, node_id: str) -> None:
        """Take that a process of a node answered."""
        self._table.heard(node_id, time.monotonic())

    def _measure_links(self, node_id: str) -> None:
        """Have a new node measure, once, its links to some of the nodes that were there before."""
        if node_id in self._linked:
            return
        peers = {other: self.by_node[other] for other in sorted(self._linked & self.by_node.keys())}
        self._linked.add(node_id)
        self.by_node[node_id].measure_links.remote(dict(list(peers.items())[:_MOST_PEERS]))

    async def probe(self, node_ids: Iterable[str]) -> None:
        """Suspect those of some nodes that do not answer."""

        async def ping(node_id: str) -> None:
            try:
                await asyncio.wait_for(self.by_node[node_id].ping.remote(), _PROBE_S)
            except Exception as error:
                log.warning("node %s does not answer: %s", node_id[:8], type(error).__name__)
                self._table.suspect(node_id, time.monotonic())

        await asyncio.gather(*map(ping, node_ids))

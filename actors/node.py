"""NodeAgent: one per worker node; says how the node is and keeps its shards on disk."""

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ray.actor import ActorHandle

from actors.logs import log_as
from actors.placement import WorkerNode
from actors.reach import REGISTRY, ask
from actors.waiting import is_one_waiting, start_waiting
from azu.engine.device import DeviceMemory, open_meter
from azu.engine.speed import device_speed
from azu.errors import ShardError
from azu.protocol.node import Node, NodeState
from azu.protocol.structure import ModelFile, Shard, Structure
from azu.sharding.cache import ShardCache

log = logging.getLogger(__name__)

_CHUNK_BYTES = 8 * 1024 * 1024
# Ray names an actor's process by its class; these two hold pieces of models.
_PIECES = ("ray::LayerActor", "ray::ExpertActor")
_ANSWER_TIMEOUT_S = 60.0  # a chunk of a shard, on a slow network too
_PINGS = 5
_PING_TIMEOUT_S = 2.0


class NodeAgent:
    """Wraps a node's ShardCache and DeviceMeter."""

    def __init__(self, node: WorkerNode, home: Path) -> None:
        log_as("node", node=node.name)
        self._node = node
        self._cache = ShardCache(home / "shards" / node.name)
        self._files = home / "models" / node.name
        self._lent_bytes = node.vram_bytes
        self._state = NodeState.ALIVE
        self._speed = device_speed(node.device, home / "speeds")
        self._meter = open_meter(self._speed)
        self._links_s: dict[str, float] = {}

    async def report(self) -> Node:
        """Return the node's live state."""
        memory = await asyncio.to_thread(self._memory)
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
            state=self._state,
        )

    async def lend(self, vram_bytes: int) -> None:
        """Lend more or less from now on, at most what the node joined with."""
        self._lent_bytes = min(vram_bytes, self._node.vram_bytes)

    async def leave(self) -> None:
        """Say from now on that this node is leaving: it keeps what it has until that is elsewhere."""
        self._state = NodeState.LEAVING

    async def ping(self) -> None:
        """Answer at once."""

    async def measure_links(self, peers: Mapping[str, ActorHandle]) -> None:
        """Measure the way to other nodes' agents, by node id, and report it from now on.

        A peer that does not answer keeps what was measured before.
        """
        for node_id, peer in peers.items():
            try:
                self._links_s[node_id] = await _one_way_s(peer)
            except Exception as error:
                log.warning("no link to node %s: %s", node_id[:8], type(error).__name__)

    def _memory(self) -> DeviceMemory:
        titles = _titles()
        if not is_one_waiting(titles.values()):
            try:
                start_waiting(self._node.raylet)
            except Exception as error:
                # Pieces come up without it too, only later.
                log.warning("no process waits for the next piece: %s", error)
        pieces = [pid for pid, title in titles.items() if title.startswith(_PIECES)]
        return self._meter.memory(self._lent_bytes, pieces)

    async def fetch(self, structure: Structure, names: Sequence[str]) -> tuple[dict[str, Path], Path]:
        """Have shards on this node's disk; returns their paths and the folder with config and tokenizer.

        Shards come through the object store in chunks and are verified; a file of the registry that can be
        read from here is mapped in place.
        """
        shards = [structure.shard(name) for name in names]
        paths = await asyncio.gather(*(self._fetch(structure, shard) for shard in shards))
        return dict(zip(names, paths, strict=True)), await self._config(structure)

    async def _fetch(self, structure: Structure, shard: Shard) -> Path:
        if (cached := self._cache.path(shard.sha256)) is not None:
            return cached
        key = (structure.model_id, structure.revision, shard.name)
        there = Path(await _ask("path", *key))
        if there.is_file():
            return await asyncio.to_thread(self._cache.adopt, shard.sha256, there)
        chunks = [
            await _ask("read", *key, offset, _CHUNK_BYTES)
            for offset in range(0, shard.size_bytes, _CHUNK_BYTES)
        ]
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
    """Return half of the quickest round trip: a busy machine only ever adds to it."""
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
        with suppress(psutil.Error):  # it ended, or is not ours
            titles[process.pid] = " ".join(process.cmdline())
    return titles


def _write(folder: Path, file: ModelFile, content: bytes) -> None:
    if len(content) != file.size_bytes:
        raise ShardError(f"{file.name} has {len(content)} bytes instead of {file.size_bytes}")
    temporary = folder / f".{file.name}.part"
    temporary.write_bytes(content)
    temporary.rename(folder / file.name)

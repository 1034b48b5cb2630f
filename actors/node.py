"""NodeAgent: one per worker node; says how the node is and keeps its shards on disk."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ray.actor import ActorHandle

from actors.placement import WorkerNode
from azu.engine.device import DeviceMeter
from azu.errors import ShardError
from azu.protocol.node import Node
from azu.protocol.structure import ModelFile, Shard, Structure
from azu.sharding.cache import ShardCache

_CHUNK_BYTES = 8 * 1024 * 1024


class NodeAgent:
    """Wraps a node's ShardCache and DeviceMeter."""

    def __init__(self, node: WorkerNode, home: Path) -> None:
        self._node = node
        self._cache = ShardCache(home / "shards" / node.name)
        self._files = home / "models" / node.name
        self._meter = DeviceMeter(node.device, node.vram_bytes)

    async def report(self) -> Node:
        """Return the node's live state."""
        speed = self._meter.speed
        return Node(
            node_id=self._node.node_id,
            name=self._node.name,
            payout_address=self._node.payout_address,
            vram_total_bytes=self._node.vram_bytes,
            vram_free_bytes=self._meter.free_bytes(),
            memory_bytes_per_s=speed.memory_bytes_per_s,
            flops_per_s=speed.flops_per_s,
            cached_shards=self._cache.contents(),
            device=self._node.device,
        )

    async def fetch(
        self, structure: Structure, names: Sequence[str], registry: ActorHandle
    ) -> tuple[dict[str, Path], Path]:
        """Have shards on this node's disk; returns their paths and the folder with config and tokenizer.

        Shards come through the object store in chunks and are verified; a file of the registry that can be
        read from here is mapped in place.
        """
        shards = [structure.shard(name) for name in names]
        paths = await asyncio.gather(*(self._fetch(structure, shard, registry) for shard in shards))
        return dict(zip(names, paths, strict=True)), await self._config(structure, registry)

    async def _fetch(self, structure: Structure, shard: Shard, registry: ActorHandle) -> Path:
        if (cached := self._cache.path(shard.sha256)) is not None:
            return cached
        key = (structure.model_id, structure.revision, shard.name)
        there = Path(await registry.path.remote(*key))
        if there.is_file():
            return await asyncio.to_thread(self._cache.adopt, shard.sha256, there)
        chunks = [
            await registry.read.remote(*key, offset, _CHUNK_BYTES)
            for offset in range(0, shard.size_bytes, _CHUNK_BYTES)
        ]
        return await asyncio.to_thread(self._cache.store, shard.sha256, shard.size_bytes, chunks)

    async def _config(self, structure: Structure, registry: ActorHandle) -> Path:
        folder = self._files / structure.revision
        folder.mkdir(parents=True, exist_ok=True)
        for file in structure.files:
            if not (folder / file.name).exists():
                content = await registry.file.remote(structure.model_id, structure.revision, file.name)
                _write(folder, file, content)
        return folder


def _write(folder: Path, file: ModelFile, content: bytes) -> None:
    if len(content) != file.size_bytes:
        raise ShardError(f"{file.name} has {len(content)} bytes instead of {file.size_bytes}")
    temporary = folder / f".{file.name}.part"
    temporary.write_bytes(content)
    temporary.rename(folder / file.name)

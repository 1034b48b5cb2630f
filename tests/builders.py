"""Complete and small values for tests; a test gives only the fields that it is about."""

from collections.abc import Mapping
from typing import Self

from eth_account import Account
from eth_account.signers.local import LocalAccount
from hypothesis import strategies as st

from azu.auth.key_records import ApiKey
from azu.auth.signatures import ReceiptSignature, sign_certificate, sign_receipt
from azu.protocol.job import Job, Placement, Receipt
from azu.protocol.node import Node
from azu.protocol.sampling import SamplingParams
from azu.protocol.structure import Layer, LayerKind, Shard, Structure, TensorInfo
from azu.protocol.topology import LayerSpan, Prediction, Stage, Topology
from azu.units import MIB

# What another process may answer in place of what is asked for.
RUBBISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda parts: (
        st.tuples(parts, parts)
        | st.lists(parts, max_size=3)
        | st.dictionaries(st.none() | st.integers() | st.text(max_size=3), parts, max_size=3)
    ),
    max_leaves=5,
)
ALICE = "0x" + "a1" * 20
BOB = "0x" + "b0" * 20
OWNERS = tuple(f"0x{index:040x}" for index in range(1, 9))


class OwnPipeline:
    """A stand-in for a deployment that is its pipeline too."""

    @property
    def pipeline(self) -> Self:
        """Return the stand-in."""
        return self


def shard(name: str, size_bytes: int = MIB, active_parameters: int | None = None) -> Shard:
    """Return a shard of float32 weights."""
    return Shard(
        name=name,
        size_bytes=size_bytes,
        weight_bytes=size_bytes,
        sha256=name.encode().hex().ljust(64, "0")[:64],
        active_parameters=size_bytes // 4 if active_parameters is None else active_parameters,
        tensors={f"{name}.weight": TensorInfo("float32", (size_bytes // 4,))},
    )


def structure(
    num_layers: int = 4,
    *,
    moe_layers: Mapping[int, int] | None = None,
    layer_bytes: int = MIB,
    expert_bytes: int = MIB,
    kv_bytes_per_token: int = 1024,
    model_id: str = "test/model",
) -> Structure:
    """Return a model's structure; `moe_layers` maps a layer to its number of experts."""
    experts = moe_layers or {}
    layers, shards = [], [shard("embed"), shard("head")]
    for index in range(num_layers):
        kind = LayerKind.MOE if index in experts else LayerKind.DENSE
        num_experts = experts.get(index, 0)
        layers.append(Layer(index, kind, kv_bytes_per_token, num_experts, min(2, num_experts)))
        shards.append(shard(f"layer_{index}_{'router' if num_experts else 'dense'}", layer_bytes))
        shards += [shard(f"layer_{index}_expert_{e}", expert_bytes) for e in range(num_experts)]
    return Structure(
        model_id=model_id,
        revision="r1",
        architecture="LlamaForCausalLM",
        dtype="float32",
        hidden_size=64,
        vocab_size=256,
        context_length=512,
        layers=tuple(layers),
        shards=tuple(shards),
        files=(),
    )


def node(node_id: str, vram_bytes: int = 64 * MIB, **given: object) -> Node:
    """Return a live node that lends `vram_bytes`."""
    values: dict[str, object] = {
        "node_id": node_id,
        "name": node_id,
        "payout_address": OWNERS[0],
        "vram_total_bytes": vram_bytes,
        "vram_free_bytes": vram_bytes,
        "memory_bytes_per_s": 1e10,
        "flops_per_s": 1e11,
    }
    return Node(**(values | given))  # type: ignore[arg-type]


def topology(spans: Mapping[str, tuple[int, int]], *, vram_bytes: int = MIB, epoch: int = 1) -> Topology:
    """Return a topology of one stage per node: node id -> layers."""
    return Topology(
        model_id="test/model",
        revision="r1",
        epoch=epoch,
        stages=tuple(
            Stage(index, node_id, LayerSpan(*span), {}, vram_bytes)
            for index, (node_id, span) in enumerate(spans.items())
        ),
        expert_sets=(),
        num_blocks=16,
        block_size=16,
        prediction=Prediction(1.0, 1.0, 8),
    )


def job(job_id: str = "job-1", *, max_tokens: int = 10, reserved_lamports: int = 112, **given: object) -> Job:
    """Return a job of 4 prompt tokens over 4 layers."""
    values: dict[str, object] = {
        "job_id": job_id,
        "address": ALICE,
        "model_id": "test/model",
        "revision": "r1",
        "num_layers": 4,
        "prompt_token_ids": (1, 2, 3, 4),
        "sampling": SamplingParams(max_tokens=max_tokens),
        "reserved_lamports": reserved_lamports,
        "created_at_ms": 1_000,
    }
    return Job(**(values | given))  # type: ignore[arg-type]


def receipt(job_id: str = "job-1", **given: object) -> Receipt:
    """Return the receipt of a job of 4 prompt and 6 completion tokens over 4 layers on two owners' nodes."""
    values: dict[str, object] = {
        "job_id": job_id,
        "address": ALICE,
        "model_id": "test/model",
        "revision": "r1",
        "prompt_tokens": 4,
        "completion_tokens": 6,
        "num_layers": 4,
        "lamports_per_token_layer": 2,
        "charged_lamports": 80,
        "released_lamports": 32,
        "platform_lamports": 16,
        "worker_lamports": {OWNERS[0]: 40, OWNERS[1]: 24},
        "transfer_id": f"settle:{job_id}",
        "topology": (Placement("ada", "layer:0", (0, 3), {2: (0, 1)}), Placement("ben", "layer:1", (3, 4))),
    }
    return Receipt(**(values | given))  # type: ignore[arg-type]


def api_key(address: str = ALICE, **given: object) -> ApiKey:
    """Return a key without an end or a limit."""
    values: dict[str, object] = {
        "key_id": "key-1",
        "digest": "",
        "address": address,
        "label": "",
        "created_at_ms": 1,
    }
    return ApiKey(**(values | given))  # type: ignore[arg-type]


def receipt_signed(
    platform: LocalAccount, given: Receipt, *, by: LocalAccount | None = None
) -> ReceiptSignature:
    """Return a receipt's signature by a key that the platform has certified."""
    key = by or Account.from_key("0x" + "0b" * 32)
    address = key.address.lower()
    return ReceiptSignature(address, sign_certificate(platform, address), sign_receipt(key, given))

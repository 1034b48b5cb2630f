"""What the network is made of: health, nodes, models and where their pieces are."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter

from azu.api.network import Activity, ShardRequest, TimeTotal
from azu.errors import AzuError
from azu.metrics import (
    CONTENT_TYPE,
    GENERATED_TOKENS,
    HOP,
    JOBS,
    KV_BLOCKS,
    KV_BLOCKS_USED,
    PROMPT_TOKENS,
    RECOVERIES,
    SEQUENCES,
    STALLS,
    TIME_PER_TOKEN,
    TIME_TO_FIRST_TOKEN,
    Metric,
    MetricsSnapshot,
    exposition,
)
from azu.models.description import KnownModel
from azu.models.status import ModelStatus
from azu.protocol.job import Placement
from azu.protocol.node import Node
from deployments.services import Key, Services, ServicesNow, check_admin, is_admin


def activity_of(picture: MetricsSnapshot, model_id: str) -> Activity:
    """Return what a network's picture says of a model."""

    def spent(metric: Metric) -> TimeTotal:
        histogram = picture.histogram(metric, model_id)
        return TimeTotal(histogram.count, histogram.sum)

    def whole(metric: Metric, *labels: str) -> int:
        return round(picture.value(metric, model_id, *labels))

    return Activity(
        running_sequences=whole(SEQUENCES, "running"),
        waiting_sequences=whole(SEQUENCES, "waiting"),
        kv_blocks=whole(KV_BLOCKS),
        kv_blocks_used=whole(KV_BLOCKS_USED),
        prompt_tokens=whole(PROMPT_TOKENS),
        generated_tokens=whole(GENERATED_TOKENS),
        stalls=whole(STALLS),
        recoveries=whole(RECOVERIES),
        time_to_first_token=spent(TIME_TO_FIRST_TOKEN),
        time_per_token=spent(TIME_PER_TOKEN),
        hop=spent(HOP),
    )


router = APIRouter()


@router.get("/metrics")
async def metrics(services: ServicesNow, authorization: Annotated[str | None, Header()] = None) -> Response:
    """Return all metrics; needs the admin key unless the network's owner opened them."""
    if not services.config.open_metrics:
        check_admin(authorization, services.config.admin_key_sha256)
    picture: MetricsSnapshot = await services.scheduler("picture")
    return Response(exposition(picture), headers={"content-type": CONTENT_TYPE})


_STATUS = TypeAdapter(ModelStatus)
_PLACEMENTS = TypeAdapter(tuple[Placement, ...])


@router.get("/health")
async def health(services: ServicesNow) -> JSONResponse:
    """Say whether prompts can be served: 503 while something is still starting."""
    try:
        ready = await services.scheduler("ready")
    except AzuError:
        ready = False
    return JSONResponse({"status": "ok" if ready else "starting"}, 200 if ready else 503)


@router.get("/v1/network")
async def network(_: Key, services: ServicesNow) -> dict[str, Any]:
    """Return nodes and deployments, and what they do."""
    nodes = await services.scheduler("nodes")
    deployments = await services.scheduler("deployments")
    picture: MetricsSnapshot = await services.scheduler("picture")
    return {
        "jobs": {
            state: round(picture.value(JOBS, state))  # of all users
            for state in ("running", "waiting")
        },
        "nodes": [_node(node) for node in nodes],
        "deployments": [
            {
                "model_id": model_id,
                "revision": revision,
                "state": state,
                "epoch": epoch,
                "num_layers": num_layers,
                "activity": asdict(activity_of(picture, model_id)),
                "topology": _PLACEMENTS.dump_python(placements, mode="json"),
            }
            for model_id, revision, state, epoch, num_layers, placements in deployments
        ],
    }


@router.post("/v1/nodes/{name}/leave")
async def leave(
    name: str, services: ServicesNow, authorization: Annotated[str | None, Header()] = None
) -> dict[str, Any]:
    """Have a node give away what it holds; for the address that it pays, and for the admin key.

    To be asked again until `left` says that nothing is on it any more.
    """
    address = None
    if not is_admin(authorization, services.config.admin_key_sha256):
        address = (await services.owner(authorization)).address
    return {"name": name, "left": await services.scheduler("leave", name, address)}


@router.get("/v1/models")
async def models(_: Key, services: ServicesNow) -> dict[str, Any]:
    """Return the models that are built in or cut."""
    known: list[KnownModel] = await services.registry("known")
    deployed = await _deployed(services)
    data = [
        _model(services, one.model_id, one.num_layers, one.context_length, one.model_id in deployed)
        for one in known
    ]
    return {"object": "list", "data": data}


@router.get("/v1/models/{model_id:path}")
async def model(model_id: str, _: Key, services: ServicesNow) -> dict[str, Any]:
    """Return one model, known or not yet cut; raises ModelNotFound."""
    facts = (await services.model(model_id)).facts
    deployed = model_id in await _deployed(services)
    return _model(services, model_id, facts.num_layers, facts.context_length, deployed)


@router.post("/models/shard")
async def shard(
    body: ShardRequest, services: ServicesNow, authorization: Annotated[str | None, Header()] = None
) -> dict[str, Any]:
    """Start to cut a model; needs the admin key."""
    check_admin(authorization, services.config.admin_key_sha256)
    status: ModelStatus = await services.registry("start_cut", body.model_id)
    return _status(status)


@router.get("/models/status")
async def status(
    model_id: Annotated[str, Query(min_length=1, max_length=256)], _: Key, services: ServicesNow
) -> dict[str, Any]:
    """Return how far a model's cut is."""
    return _status(await services.registry("status", model_id))


def _node(node: Node) -> dict[str, Any]:
    return {
        "node_id": node.node_id,
        "name": node.name,
        "payout_address": node.payout_address,
        "state": node.state.value,
        "device": node.device,
        "vram_total_bytes": node.vram_total_bytes,
        "vram_free_bytes": node.vram_free_bytes,
        "vram_used_bytes": node.vram_used_bytes,
        "vram_other_bytes": node.vram_other_bytes,
        "load": node.load,
        "bad_frames": node.bad_frames,
        "cached_shards": len(node.cached_shards),
    }


async def _deployed(services: Services) -> set[str]:
    deployments = await services.scheduler("deployments")
    return {model_id for model_id, _, state, *_ in deployments if state == "running"}


def _model(
    services: Services, model_id: str, num_layers: int, context_length: int, deployed: bool
) -> dict[str, Any]:
    limits = services.config.policy.limits
    return {
        "id": model_id,
        "object": "model",
        "created": 0,
        "owned_by": model_id.split("/", maxsplit=1)[0],
        "context_length": context_length,
        "max_model_len": min(context_length, limits.max_prompt_tokens + limits.max_completion_tokens),
        "num_layers": num_layers,
        "lamports_per_token": num_layers * services.config.policy.price.lamports_per_token_layer,
        "deployed": deployed,
    }


def _status(status: ModelStatus) -> dict[str, Any]:
    body: dict[str, Any] = _STATUS.dump_python(status, mode="json")
    return body

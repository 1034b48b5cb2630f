"""The network: its health, nodes, deployments, models and metrics."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from azu.api.network import (
    Activity,
    DeploymentLine,
    Health,
    JobCounts,
    LeaveResponse,
    ModelStatusResponse,
    NetworkResponse,
    NodeLine,
    OfferedPiece,
    OfferRequest,
    OfferResponse,
    PauseResponse,
    PieceLine,
    ShardRequest,
    TimeTotal,
)
from azu.api.openai import ModelLine, ModelList
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
from azu.models.description import AvailableModel
from azu.models.status import ModelStatus
from azu.protocol.node import Node, Offer
from azu.units import GIB
from deployments.schema import plain_text
from deployments.services import (
    Admin,
    AdminSecret,
    ApiKeySecret,
    Bearer,
    Key,
    Services,
    ServicesNow,
)

router = APIRouter()


_STARTING: dict[int | str, dict[str, Any]] = {
    503: {"model": Health, "description": "Prompts cannot be served yet"}
}


@router.get("/health", responses=_STARTING)
async def health(services: ServicesNow, response: Response) -> Health:
    """Return whether prompts can be served, 503 while something is starting or away, and what goes wrong."""
    ready, problems = await services.health()
    response.status_code = 200 if ready else 503
    return Health(status="ok" if ready else "starting", problems=problems)


@router.get("/metrics", response_class=Response, responses=plain_text())
async def metrics(request: Request, services: ServicesNow, secret: AdminSecret) -> Response:
    """Return all metrics in the Prometheus text format.

    The caller needs the admin key unless the network's owner opened the metrics.
    """
    if not services.config.open_metrics:
        await services.check_admin(secret, request.client)
    snapshot: MetricsSnapshot = await services.scheduler("metrics")
    return Response(exposition(snapshot), headers={"content-type": CONTENT_TYPE})


@router.get("/v1/network")
async def network(_: Key, services: ServicesNow) -> NetworkResponse:
    """Return nodes and deployments, the number of jobs on them, and what does not run as it should."""
    asked = map(services.scheduler, ("nodes", "deployments", "metrics", "problems"))
    nodes, deployments, snapshot, problems = await asyncio.gather(*asked)
    return NetworkResponse(
        problems=problems,
        jobs=JobCounts(
            running=round(snapshot.value(JOBS, "running")), waiting=round(snapshot.value(JOBS, "waiting"))
        ),
        nodes=tuple(map(_node, nodes)),
        deployments=tuple(
            DeploymentLine(
                model_id=one.model_id,
                revision=one.revision,
                state=one.state,
                epoch=one.epoch,
                num_layers=one.num_layers,
                activity=activity_of(snapshot, one.model_id),
                topology=tuple(
                    PieceLine.model_validate(placed).model_copy(update={"node_id": node_id})
                    for placed, node_id in zip(one.placements, one.node_ids, strict=True)
                ),
            )
            for one in deployments
        ),
    )


async def _owner(request: Request, services: ServicesNow, _: AdminSecret, secret: ApiKeySecret) -> str | None:
    """Return the address whose nodes a caller may move, None for the admin, who may move all."""
    key = await services.key_unless_admin(secret, request.client)
    return None if key is None else key.address


Owner = Annotated[str | None, Depends(_owner)]


@router.post("/v1/nodes/{name}/leave")
async def leave(name: str, owner: Owner, services: ServicesNow) -> LeaveResponse:
    """Have a node, by its name or id, give away what it holds; allowed for its payout address and the admin.

    The caller asks again until `left` is true.
    """
    return LeaveResponse(name=name, left=await services.scheduler("leave", name, owner))


@router.post("/v1/nodes/{name}/pause")
async def pause(name: str, owner: Owner, services: ServicesNow) -> PauseResponse:
    """Have a node give away what it holds, and take nothing new until it resumes; allowed as for leaving.

    The caller asks again until `empty` is true.
    """
    return PauseResponse(name=name, paused=True, empty=await services.scheduler("pause", name, owner))


@router.post("/v1/nodes/{name}/resume")
async def resume(name: str, owner: Owner, services: ServicesNow) -> PauseResponse:
    """Have a node lend again that was paused; allowed as for leaving."""
    await services.scheduler("resume", name, owner)
    return PauseResponse(name=name, paused=False)


@router.post("/v1/nodes/offer")
async def offer(body: OfferRequest, request: Request, services: ServicesNow) -> OfferResponse:
    """Return what a machine would hold and could earn if it joined now."""
    await services.count_sign_in(request.client)
    found: Offer = await services.scheduler(
        "offer", body.vram_bytes, body.memory_bytes_per_s, body.flops_per_s
    )
    return OfferResponse(
        pieces=tuple(
            OfferedPiece(model_id=model_id, layers=layers, num_layers=num_layers)
            for model_id, (layers, num_layers) in found.layers.items()
        ),
        lamports_per_day=round(found.lamports_per_gib_hour * 24 * body.vram_bytes / GIB),
    )


@router.get("/v1/models")
async def models(_: Key, services: ServicesNow) -> ModelList:
    """Return the models that are built in or cut."""
    available: list[AvailableModel] = await services.registry("available")
    standing = await _standing(services)
    data = [_model(services, one.model_id, one.num_layers, one.context_length, standing) for one in available]
    return ModelList(data=tuple(data))


@router.get("/v1/models/{model_id:path}")
async def model(model_id: str, _: Key, bearer: Bearer, services: ServicesNow) -> ModelLine:
    """Return one model, cut or not; raises ModelNotFound.

    For a model that is new here a fee is set aside.
    """
    facts = (await services.model(model_id, bearer)).facts
    standing = await _standing(services)
    return _model(services, model_id, facts.num_layers, facts.context_length, standing)


@router.post("/models/shard", dependencies=[Admin])
async def shard(body: ShardRequest, services: ServicesNow) -> ModelStatusResponse:
    """Start to cut a model."""
    status: ModelStatus = await services.registry("start_cut", body.model_id)
    return ModelStatusResponse.model_validate(status)


@router.get("/models/status")
async def status(
    model_id: Annotated[str, Query(min_length=1, max_length=256)], _: Key, services: ServicesNow
) -> ModelStatusResponse:
    """Return how far a model's cut is."""
    return ModelStatusResponse.model_validate(await services.registry("status", model_id))


def _node(node: Node) -> NodeLine:
    return NodeLine(
        node_id=node.node_id,
        name=node.name,
        payout_address=node.payout_address,
        state=node.state.value,
        device=node.device,
        vram_total_bytes=node.vram_total_bytes,
        vram_free_bytes=node.vram_free_bytes,
        vram_used_bytes=node.vram_used_bytes,
        vram_other_bytes=node.vram_other_bytes,
        load=node.load,
        bad_frames=node.bad_frames,
        why_paused=node.why_paused,
        links_s=node.links_s,
        cached_shards=len(node.cached_shards),
    )


def activity_of(snapshot: MetricsSnapshot, model_id: str) -> Activity:
    """Return what a network's metrics show of one model."""

    def total(metric: Metric) -> TimeTotal:
        histogram = snapshot.histogram(metric, model_id)
        return TimeTotal(count=histogram.count, seconds=histogram.sum)

    def count(metric: Metric, *labels: str) -> int:
        return round(snapshot.value(metric, model_id, *labels))

    return Activity(
        running_sequences=count(SEQUENCES, "running"),
        waiting_sequences=count(SEQUENCES, "waiting"),
        kv_blocks=count(KV_BLOCKS),
        kv_blocks_used=count(KV_BLOCKS_USED),
        prompt_tokens=count(PROMPT_TOKENS),
        generated_tokens=count(GENERATED_TOKENS),
        stalls=count(STALLS),
        recoveries=count(RECOVERIES),
        time_to_first_token=total(TIME_TO_FIRST_TOKEN),
        time_per_token=total(TIME_PER_TOKEN),
        hop=total(HOP),
    )


# A model of several pipelines is as good as its best one.
_STATES = ("running", "slow", "deploying", "broken")


@dataclass(frozen=True, slots=True)
class _Standing:
    """The state of each model that is or was deployed, and what was measured."""

    states: Mapping[str, str]
    measured: MetricsSnapshot

    def tokens_per_s(self, model_id: str) -> float | None:
        """Return the mean speed of one answer; None before any was measured."""
        mean_s = activity_of(self.measured, model_id).time_per_token.mean_s(TimeTotal())
        return 1 / mean_s if mean_s else None


async def _standing(services: Services) -> _Standing:
    asked = map(services.scheduler, ("deployments", "metrics"))
    deployments, measured = await asyncio.gather(*asked)
    worst_first = sorted(deployments, key=lambda one: _STATES.index(one.state), reverse=True)
    return _Standing({one.model_id: one.state for one in worst_first}, measured)


def _model(
    services: Services, model_id: str, num_layers: int, context_length: int, standing: _Standing
) -> ModelLine:
    limits = services.config.policy.limits
    state = standing.states.get(model_id, "ready")
    return ModelLine(
        id=model_id,
        owned_by=model_id.split("/", maxsplit=1)[0],
        context_length=context_length,
        max_model_len=min(context_length, limits.max_prompt_tokens + limits.max_completion_tokens),
        num_layers=num_layers,
        lamports_per_token=num_layers * services.config.policy.price.lamports_per_token_layer,
        deployed=state in ("running", "slow"),
        state=state,
        tokens_per_s=standing.tokens_per_s(model_id),
    )

"""A process that waits on each node with the engine imported, so that a piece comes up quickly."""

from collections.abc import Iterable

# How Ray's processes are called: by what they run, by this while they wait, by their script until they do.
_WAITING = "ray::IDLE"
_STARTING = "default_worker.py"
_TIMEOUT_S = 5.0
# The raylet ends processes that wait for long; this one is to stay.
_KEPT_S = 10**6


def is_one_waiting(titles: Iterable[str]) -> bool:
    """Say whether one of a node's processes waits for work, or will in a moment."""
    return any(title.startswith(_WAITING) or _STARTING in title for title in titles)


def start_waiting(raylet: str) -> None:
    """Have the raylet at "host:port" start a process that waits; Ray has no public call for it."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.common_pb2 import PYTHON
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    asked = PrestartWorkersRequest(language=PYTHON, num_workers=1, keep_alive_duration_secs=_KEPT_S)
    with init_grpc_channel(raylet) as channel:
        NodeManagerServiceStub(channel).PrestartWorkers(asked, timeout=_TIMEOUT_S)

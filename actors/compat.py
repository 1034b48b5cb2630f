"""All that azu uses of Ray beyond its public interface.

A process waits on each node with the engine imported, so that a piece comes up quickly: Ray has no public
call that starts it. Placement groups are removed by an id that only Ray's core can make.
"""

from collections.abc import Iterable

from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup

# The titles of Ray's processes: while one waits, and while it starts. One that works has its actor's name.
_WAITING = "ray::IDLE"
_STARTING = "default_worker.py"
_TIMEOUT_S = 5.0
# The raylet ends processes that wait for long; this one stays.
_KEPT_S = 10**6


def is_one_waiting(titles: Iterable[str]) -> bool:
    """Say whether one of a node's processes waits for work, or will in a moment."""
    return any(title.startswith(_WAITING) or _STARTING in title for title in titles)


def start_waiting(raylet: str) -> None:
    """Have the raylet at "host:port" start a process that waits for work."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.common_pb2 import PYTHON
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    asked = PrestartWorkersRequest(language=PYTHON, num_workers=1, keep_alive_duration_secs=_KEPT_S)
    with init_grpc_channel(raylet) as channel:
        NodeManagerServiceStub(channel).PrestartWorkers(asked, timeout=_TIMEOUT_S)


def stay_on_loopback(stays: bool) -> None:
    """Have Ray take the loopback's address as it is in this process, which it replaces otherwise.

    Ray reads the variable for it once, when it is imported.
    """
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = not stays


def serve_on_loopback() -> None:
    """Have a replica of Ray Serve that starts in this process listen for others on the loopback alone.

    It listens on every address otherwise, and trusts who calls.
    """
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(
        server, address.replace("[::]", "127.0.0.1")
    )


def group_of(group_id: str) -> PlacementGroup:
    """Return the placement group that has an id in hexadecimal, as Ray's table of groups lists it."""
    return PlacementGroup(PlacementGroupID(bytes.fromhex(group_id)))

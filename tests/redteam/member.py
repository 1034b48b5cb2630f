"""A hostile member: it joined with a valid ticket, and sends code of its own to every process of the cluster.

Usage: python -m tests.redteam.member HEAD, with the variables of the machine that joined. Each line
that comes is JSON: where to run which function of tests/redteam/code.py, and its arguments. One line of JSON
goes back.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.redteam import code

_TIMEOUT_S = 120


def main(head: str) -> None:
    ray.init(head, namespace="azu", log_to_driver=False, logging_level="ERROR")
    cloudpickle.register_pickle_by_value(code)
    print(json.dumps("in"), flush=True)
    for line in sys.stdin:
        where, name, arguments = json.loads(line)
        function = getattr(code, name)
        try:
            answer = ray.get(_sent(where, function, arguments), timeout=_TIMEOUT_S)
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _sent(where: str, function: Callable[..., Any], arguments: list[Any]) -> "ray.ObjectRef":
    if where == "head":
        (node,) = (node["NodeID"] for node in ray.nodes() if node["Resources"].get("node:__internal_head__"))
        task = ray.remote(num_cpus=0)(function)
        affinity = NodeAffinitySchedulingStrategy(node, soft=False)
        return task.options(scheduling_strategy=affinity).remote(None, *arguments)
    return _actor(where).__ray_call__.remote(function, *arguments)


def _actor(name: str) -> "ray.actor.ActorHandle":
    """Return an actor of azu, or with the name "ingress" the replica that gets the users' requests."""
    if name != "ingress":
        return ray.get_actor(name, namespace="azu")
    (replica,) = (
        one["name"]
        for one in ray.util.list_named_actors(all_namespaces=True)
        if one["name"].startswith("SERVE_REPLICA::azu#ingress")
    )
    return ray.get_actor(replica, namespace="serve")


if __name__ == "__main__":
    main(sys.argv[1])

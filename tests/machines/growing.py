"""Request room from Ray on a head, as azu's scheduler does, and print the nodes that are added.

Usage: python -m tests.machines.growing MIB... After each request the program prints the nodes that lend,
as a line of JSON. At the end it withdraws its request and prints the seconds until the last node is gone.
"""

import asyncio
import json
import sys
import time

import ray

from actors.placement import request_nodes, worker_nodes
from azu.units import MIB

TIMEOUT_S = 150.0


def main() -> None:
    ray.init("auto", namespace="azu", log_to_driver=False)
    for count, mib in enumerate(map(int, sys.argv[1:]), start=1):
        lent = [node.vram_bytes // MIB for node in worker_nodes()[0]]
        asyncio.run(request_nodes([*lent, mib]))
        wait_until(lambda count=count: len(worker_nodes()[0]) >= count, f"a node for {mib} MiB")
        nodes = [(node.vram_bytes, node.payout_address, node.device) for node in worker_nodes()[0]]
        print(json.dumps(nodes), flush=True)
    asyncio.run(request_nodes([]))
    began = time.monotonic()
    wait_until(lambda: not worker_nodes()[0], "the nodes to go")
    print(json.dumps({"gone_s": time.monotonic() - began}), flush=True)


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"waited {TIMEOUT_S:.0f} s for {what}: {ray.nodes()}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()

"""What encryption costs a frame on its way from one node to another."""

import os
import secrets
import tempfile
from pathlib import Path
from statistics import median

from azu.cli.bench.apart import call_apart
from azu.cli.bench.results import Figure
from azu.engine.reference import ModelShape
from azu.errors import Unavailable
from azu.units import KIB, MIB, format_bytes

_SIZES = {8 * KIB: 300, MIB: 40}  # and how often each goes there and back
_START_TIMEOUT_S = 120.0
_TIMEOUT_S = 400.0
_PAYOUT = "0x" + "00" * 20


def measure(_shape: ModelShape) -> tuple[Figure, ...]:
    """Return the median of half a round between two nodes of this machine, with TLS and without."""
    plain, encrypted = (call_apart(_TIMEOUT_S, _hops_ms, tls=tls) for tls in (False, True))
    return tuple(
        Figure(
            name=f"hop of {format_bytes(size)} between nodes, encrypted",
            unit="ms",
            value=encrypted[size],
            reference=plain[size],
            reference_name="the same, not encrypted",
            notes={"TLS adds ms": encrypted[size] - plain[size]},
        )
        for size in _SIZES
    )


def _hops_ms(*, tls: bool) -> dict[int, float]:
    """Return the median hop of each size; runs in a process of its own, for Ray reads its settings once."""
    from azu.cli.network.children import Children
    from azu.cli.network.ports import free_port
    from azu.cli.network.ray_nodes import HEAD, STARTED, RayHost, Worker, driver_environment
    from azu.cli.network.tls import head_files
    from azu.cli.private_file import write_private

    with tempfile.TemporaryDirectory(prefix="azu-ray-", dir="/tmp", ignore_cleanup_errors=True) as made:
        folder, ip = Path(made), _own_address()
        files = head_files(folder / "tls", [ip]) if tls else None
        host = RayHost(folder, folder / "token", ip, tls=files)
        write_private(host.token_path, secrets.token_hex(32))
        # The bench's own cluster has another token.
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update(driver_environment(host.token_path, files))
        port = free_port()
        head = f"{ip}:{port}"
        workers = [Worker(index, f"node-{index}", MIB, _PAYOUT) for index in range(2)]
        with Children(folder / "logs") as nodes:
            nodes.start(host.head(port))
            for worker in workers:
                nodes.start(host.worker(head, worker))
            for name in (HEAD, *(worker.name for worker in workers)):
                nodes.wait_until_said(name, STARTED, _START_TIMEOUT_S)
            return {size: _hop_ms(head, size, rounds) for size, rounds in _SIZES.items()}


def _hop_ms(head: str, size: int, rounds: int) -> float:
    import ray

    from azu.cli.bench.hop import Bouncer, hops_s

    ray.init(head, namespace="azu", log_to_driver=False, logging_level="error")
    try:
        left, right = (
            ray.remote(Bouncer).options(num_cpus=0, label_selector={"azu-name": f"node-{index}"}).remote()
            for index in range(2)
        )
        return median(hops_s(left, right, size, rounds)) * 1e3
    finally:
        ray.shutdown()


def _own_address() -> str:
    """Return this machine's address, as Ray would find it: a certificate has to name it."""
    from azu.cli.network.ports import address_towards

    try:
        return address_towards("http://192.0.2.1")
    except Unavailable:
        return "127.0.0.1"

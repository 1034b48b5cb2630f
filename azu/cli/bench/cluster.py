"""A Ray cluster on this machine for as long as the bench needs it."""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from actors.placement import NAMESPACE

_OBJECT_STORE_BYTES = 128 * 1024 * 1024
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # As azu's own nodes are started.
    "RAY_worker_niceness": "0",
}


@contextmanager
def ray_here() -> Iterator[None]:
    """Be connected to a cluster of this process's own, which is gone afterwards."""
    # Sockets have short paths.
    with (
        tempfile.TemporaryDirectory(prefix="azu-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        _environment(_ENVIRONMENT),
    ):
        ray.init(
            address="local",
            namespace=NAMESPACE,
            num_cpus=0,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

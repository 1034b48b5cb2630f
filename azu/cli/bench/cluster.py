"""A Ray cluster on this machine for as long as the bench needs it."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from actors.placement import NAMESPACE

_OBJECT_STORE_BYTES = 128 * 1024 * 1024


@contextmanager
def ray_here() -> Iterator[None]:
    """Be connected to a cluster of this process's own, which is gone afterwards."""
    # Sockets have short paths.
    with tempfile.TemporaryDirectory(prefix="azu-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
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

"""The log of an actor's process."""

import ray

from azu.logs import start_logging


def log_as(process: str, **ids: object) -> None:
    """Log as this actor from now on; an actor that a test made of its plain class leaves logging alone."""
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        start_logging(process, ids)

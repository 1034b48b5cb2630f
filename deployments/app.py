"""The ingress as a Ray Serve application."""

import logging

from ray import serve
from ray.serve import Application

from azu.config import ControlConfig
from deployments.ingress import build_api

NAME = "azu"
# Serve's default of 5 would let streams in by waves.
_MAX_ONGOING_REQUESTS = 1000
_HEAD = {"node:__internal_head__": 0.001}


def build_app(config: ControlConfig) -> Application:
    """Return the Serve application of a network."""
    ingress = serve.ingress(lambda: build_api(config))()
    deployment = serve.deployment(
        ingress,
        name="ingress",
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0, "resources": _HEAD},
    )
    return deployment.bind()


def start(config: ControlConfig) -> None:
    """Serve the network's ingress from the Ray cluster that this process is connected to."""
    # It would tell the terminal what the caller already shows as progress.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": config.http_host, "port": config.http_port})
    serve.run(build_app(config), name=NAME, route_prefix="/")

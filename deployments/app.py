"""The ingress as a Ray Serve application; for `serve deploy` with its control plane."""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application

from actors.compat import serve_on_loopback
from azu.config import ControlConfig, NodeLinks
from azu.logs import start_logging
from azu.models.slim import import_for_tokenizers
from deployments.control_plane import ControlPlane, unless_changed
from deployments.ingress import build_api
from deployments.middleware import LOOPBACK
from deployments.services import MOST_ANSWERS, MOST_SHORT

NAME = "azu"
# With Serve's default of 5 streams would wait for each other. With so many the ingress refuses by itself.
_MAX_ONGOING_REQUESTS = 2 * (MOST_ANSWERS + MOST_SHORT)
_ON_HEAD = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
# Redis has new passwords after `azu serve --books` started again: a replica soon notices and is replaced.
_HEALTH = {"health_check_period_s": 2.0, "health_check_timeout_s": 15.0}


class NetworkArgs(BaseModel):
    """The arguments in a Serve config: the folder on the head that `azu serve --books` writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path


def network(args: NetworkArgs) -> Application:
    """Return a network's control plane and ingress as one Serve application."""
    control = serve.deployment(ControlPlane, name="control", ray_actor_options=_ON_HEAD, **_HEALTH)
    path = args.folder / "ingress.json"
    ingress = _ingress(lambda: _api(ControlConfig.from_file(path.expanduser())))
    return ingress.options(**_HEALTH).bind(path, control.bind(args.folder / "control.json"))


def build_app(config: ControlConfig) -> Application:
    """Return the ingress alone as a Serve application; `azu up` starts the control plane beside it."""
    return _ingress(lambda: _api(config)).bind()


def http_options(config: ControlConfig) -> dict[str, Any]:
    """Return the address and certificate of Serve's HTTP proxy; behind another proxy it needs none."""
    if config.serve_port is not None:
        return {"host": LOOPBACK, "port": config.serve_port}
    options: dict[str, Any] = {"host": config.http_host, "port": config.http_port}
    if config.tls is not None:
        options |= {"ssl_certfile": str(config.tls.certificate), "ssl_keyfile": str(config.tls.key)}
    return options


def start(config: ControlConfig) -> None:
    """Serve the network's ingress in the Ray cluster that this process is connected to, unless it serves."""
    # The caller shows progress; Serve's log lines would repeat it on the terminal.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if NAME in serve.status().applications:
        return
    # Serve waits a minute for its proxy. On a busy machine that takes longer; the caller waits for an answer.
    with suppress(TimeoutError):
        serve.start(http_options=http_options(config))
    with suppress(TimeoutError):
        serve.run(build_app(config), name=NAME, route_prefix="/")


def has_proxy() -> bool:
    """Say whether Serve runs in the cluster, with its proxy where an earlier start of it had it."""
    return bool(serve.status().proxies)


def stop() -> None:
    """Take the ingress down; other applications of Serve go on."""
    if NAME in serve.status().applications:
        serve.delete(NAME)


def _api(config: ControlConfig) -> FastAPI:
    start_logging("ingress")
    import_for_tokenizers()
    if config.nodes is NodeLinks.LOCAL:
        serve_on_loopback()
    # Serve's proxy writes a request's id into the response by itself.
    return build_api(config, echo_ids=False)


class _Ingress:
    """The replica behind the API. Serve replaces one that was built from a file when the file changes."""

    def __init__(self, path: Path | None = None, *_: object) -> None:
        self._path = path and path.expanduser()
        self._config = self._path and ControlConfig.from_file(self._path)

    def check_health(self) -> None:
        if self._path and self._config:
            unless_changed(self._path, self._config)


def _ingress(build: Callable[[], FastAPI]) -> serve.Deployment:
    return serve.deployment(
        serve.ingress(build)(_Ingress),
        name="ingress",
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        ray_actor_options=_ON_HEAD,
    )

"""The control plane and the ingress of a network, started and stopped in a Ray cluster that is up."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from azu.config import ControlConfig, NetworkPolicy, Settings, TlsConfig
from azu.errors import DeadlineExceeded, Unavailable
from azu.launch.http_port import http_port_held
from azu.launch.membership import LOOPBACK, TlsFiles
from azu.launch.processes import Patience, handlers_kept, variables_set
from azu.launch.redis_server import RedisUrls
from azu.launch.sidecars import ChainSettings
from azu.money.wire import Access

if TYPE_CHECKING:
    from azu.client import Client


Progress = Callable[[str], None]

_POLL_S = 0.1
_EVERYWHERE = ("0.0.0.0", "::")


def control_config(
    settings: Settings,
    policy: NetworkPolicy,
    chain: ChainSettings,
    redis: RedisUrls,
    books: Access,
    http_port: int,
    admin_key: str,
    ip: str | None = None,
    ingress: TlsFiles | None = None,
) -> ControlConfig:
    """Return the configuration of the control plane.

    `ip` is the address at which other machines reach this one, `ingress` the files of the network's own
    certificate for clients.
    """
    # An ingress that listens on every address is named by the one at which other machines reach it.
    listens = ip if ip is not None and settings.http_host in _EVERYWHERE else settings.http_host
    domain = settings.domain or f"{_local_host(listens)}:{http_port}"
    return ControlConfig(
        redis_url=redis.scheduler,
        books_url=books.url("scheduler"),
        pipeline_redis_url=redis.pipeline,
        home=settings.home,
        http_host=settings.http_host,
        http_port=http_port,
        domain=domain,
        policy=policy,
        admin_key_sha256=hashlib.sha256(admin_key.encode()).hexdigest(),
        platform_address=chain.platform_address,
        successions=chain.successions,
        chain_url=chain.url,
        model_roots=settings.model_roots,
        open_metrics=settings.open_metrics,
        trusted_proxies=settings.trusted_proxies,
        max_model_bytes=settings.max_model_bytes,
        hf_token=settings.hf_token.get_secret_value() if settings.hf_token else None,
        tls=_ingress_tls(settings, ingress),
        # The certificate of the settings is one that clients trust already.
        authority=None if ingress is None or settings.tls_cert else ingress.authority.read_text(),
    )


def _ingress_tls(settings: Settings, files: TlsFiles | None) -> TlsConfig | None:
    if settings.tls_cert is not None and settings.tls_key is not None:
        return TlsConfig(settings.tls_cert.absolute(), settings.tls_key.absolute())
    return None if files is None else TlsConfig(files.certificate, files.key)


@contextmanager
def connected(head: str, logs: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Connect to the cluster at `head` during the block; yields its address ("host:port").

    `logs` is a folder without Python files. Paths in Ray's variables have to be absolute.
    """
    with variables_set(environment):
        import ray

        from actors.compat import stay_on_loopback

        stay_on_loopback(head.startswith(f"{LOOPBACK}:"))
        try:
            # Ray puts the directory that it is in here first on the import path of every worker.
            with handlers_kept(), chdir(logs):
                ray.init(head, namespace="azu", log_to_driver=False, logging_level=logging.ERROR)
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()


def start(config: ControlConfig, ingress: ControlConfig) -> None:
    """Start the control plane and the ingress in the cluster that this process is connected to.

    What runs already is left alone.
    """
    from actors import control_plane
    from deployments import app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    control_plane.start(config)
    app.start(ingress)


def stop() -> None:
    """Stop what `start` started, and everything that it started in turn."""
    from actors import control_plane
    from deployments import app

    app.stop()
    control_plane.stop()


def ingress_config(config: ControlConfig, redis: RedisUrls, books: Access) -> ControlConfig:
    """Return the part of the configuration that the ingress gets, with credentials of its own."""
    return replace(config, redis_url=redis.ingress, pipeline_redis_url="", books_url=books.url("ingress"))


def revive(config: ControlConfig) -> list[str]:
    """Start again the actors of the control plane that died; returns their names."""
    from actors import control_plane

    return control_plane.revive(config)


def local_url(config: ControlConfig) -> str:
    """Return the URL of the ingress on this machine."""
    scheme = "http" if config.tls is None else "https"
    return f"{scheme}://{_local_host(config.http_host)}:{config.http_port}"


def login_url(config: ControlConfig) -> str:
    """Return the URL at which users sign in: each text that they sign names its host and port.

    Another port than the ingress's is that of the owner's own proxy, which encrypts.
    """
    is_plain = config.tls is None and config.domain.endswith(f":{config.http_port}")
    return f"{'http' if is_plain else 'https'}://{config.domain}"


def port_held(config: ControlConfig) -> AbstractContextManager[None]:
    """Hold the ingress's port in the connected cluster; raises as `http_port_held` does.

    Serve's proxy, where the cluster has one already, is what listens there.
    """
    from deployments import app

    return nullcontext() if app.has_proxy() else http_port_held(config.http_host, config.http_port)


def local_client(config: ControlConfig, api_key: str) -> "Client":
    """Return a client of the ingress on this machine; it trusts the certificate in the ingress's own file."""
    from azu.client import Client
    from azu.client.http import trusting_this

    tls = None if config.tls is None else trusting_this(config.tls.certificate)
    return Client(local_url(config), api_key, tls=tls)


def wait_until_up(
    client: "Client", timeout_s: float, meanwhile: Callable[[], object], *, accepts_prompts: bool
) -> None:
    """Wait until the ingress answers, or until it `accepts_prompts`; calls `meanwhile` after each failure.

    A network answers without workers; it accepts prompts once it has some. Raises DeadlineExceeded.
    """
    patience = Patience(timeout_s)
    while not (client.healthy() if accepts_prompts else _answers(client)):
        meanwhile()
        if patience.is_over:
            raise DeadlineExceeded(f"the network was not up {patience}")
        time.sleep(_POLL_S)


def _answers(client: "Client") -> bool:
    try:
        client.platform()
    except Unavailable:
        return False
    return True


def _local_host(host: str) -> str:
    return "127.0.0.1" if host in _EVERYWHERE else host

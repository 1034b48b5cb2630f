"""The configuration that the control plane hands to the head's actors and to the ingress."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.auth.network_id import Succession, network_id
from azu.auth.peers import Network
from azu.config.network import NetworkPolicy
from azu.config.settings import configuration_error
from azu.errors import ConfigurationError


class NodeLinks(StrEnum):
    """How a network's nodes are linked: ENCRYPTED between machines that came with tickets, or LOCAL to one.

    FOREIGN links are those of a cluster that azu did not start: its owner encrypts it, or not.
    """

    ENCRYPTED = "encrypted"
    LOCAL = "local"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """The files of the ingress's certificate and key."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class EnrolmentConfig:
    """How nodes with a ticket become members.

    They send their requests to `url`, and get the address of Ray's head ("host:port") and its token.
    `authority` is the file with the certificate of the nodes' authority.
    """

    url: str
    head: str
    token_path: Path
    authority: Path


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """One network's control plane.

    `domain` is the ingress's name for clients; each text that they sign contains it.
    The control plane uses `redis_url`; the pipelines that it starts use `pipeline_redis_url`. `books_url` has
    the secret by which it reaches the books.
    `admin_key_sha256` is in hex. With `open_metrics` the metrics are readable without the admin key.
    Model folders are accepted only under `model_roots`.
    `authority` is the certificate (PEM) of the authority that signed the ingress's, None for a public one.
    Without `tls` the ingress serves plain HTTP. `nodes` says how the nodes are linked. `serve_port` is the
    port of Serve's proxy on the loopback behind azu's reverse proxy; None where Serve's takes the connections
    itself. X-Forwarded-For counts only from `trusted_proxies`. `dashboard_url` is that of Ray's
    dashboard on the head's loopback.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", hide_input_in_errors=True)

    redis_url: str = field(repr=False)
    pipeline_redis_url: str = field(repr=False)
    books_url: str = field(repr=False)
    home: Path
    http_host: str
    http_port: int
    domain: str
    policy: NetworkPolicy
    admin_key_sha256: str
    platform_address: str
    chain_url: str
    model_roots: tuple[Path, ...]
    max_model_bytes: int
    open_metrics: bool = False
    hf_token: str | None = field(default=None, repr=False)
    tls: TlsConfig | None = None
    authority: str | None = None
    nodes: NodeLinks = NodeLinks.FOREIGN
    enrolment: EnrolmentConfig | None = None
    serve_port: int | None = None
    trusted_proxies: tuple[Network, ...] = ()
    successions: tuple[Succession, ...] = ()
    dashboard_url: str | None = None

    @property
    def network_id(self) -> str:
        """What names this network for its users and lenders."""
        return network_id(self.platform_address, self.authority)

    def to_json(self) -> str:
        """Return the configuration for a file that only its owner can read: it contains passwords."""
        return _CONTROL.dump_json(self).decode()

    @classmethod
    def from_file(cls, path: Path) -> "ControlConfig":
        """Read a file of `to_json`'s text; raises ConfigurationError that names the file and bad keys."""
        try:
            return _CONTROL.validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror}") from error
        except ValidationError as error:
            raise configuration_error(error, str(path)) from error


_CONTROL = TypeAdapter(ControlConfig)

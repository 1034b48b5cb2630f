"""What the control plane has to know; it travels to the head's actors and to the ingress."""

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from azu.config.network import NetworkPolicy
from azu.config.settings import configuration_error
from azu.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """The files of the ingress's own certificate."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class EnrolmentConfig:
    """What the head gives to nodes that come with a ticket, and the files it takes that from.

    Nodes ask at `url`, whose certificate is the authority's, or, if it is `publicly_trusted`, anybody's that
    their system trusts. `head` is where Ray's head is ("host:port").
    """

    url: str
    publicly_trusted: bool
    head: str
    token_path: Path
    authority: Path
    authority_key: Path


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """One network's control plane.

    `domain` is the name under which clients know the ingress: it stands in every text that they sign.
    `redis_url` is for whoever holds this, `pipeline_redis_url` for the pipelines that it starts.
    `admin_key_sha256` is in hex.
    With `open_metrics` nobody needs the admin key to read the metrics.
    Folders are taken as models from under `model_roots` alone.
    Without `tls` the ingress speaks plain HTTP; without `enrolment` a ticket holds all that a node needs.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", hide_input_in_errors=True)

    redis_url: str = field(repr=False)
    pipeline_redis_url: str = field(repr=False)
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
    enrolment: EnrolmentConfig | None = None

    def to_json(self) -> str:
        """Return it for a file that only its owner reads: there are passwords in it."""
        return _CONTROL.dump_json(self).decode()

    @classmethod
    def from_file(cls, path: Path) -> "ControlConfig":
        """Return what `to_json` wrote; raises ConfigurationError that names the file and its faults."""
        try:
            return _CONTROL.validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror}") from error
        except ValidationError as error:
            raise configuration_error(error, str(path)) from error


_CONTROL = TypeAdapter(ControlConfig)

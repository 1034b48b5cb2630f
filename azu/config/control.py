"""What the control plane has to know; it travels to the head's actors and to the ingress."""

from dataclasses import dataclass, field
from pathlib import Path

from azu.config.policy import NetworkPolicy


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """One network's control plane.

    `domain` is the name under which clients know the ingress: it stands in every text that they sign.
    `redis_url` is for whoever holds this, `pipeline_redis_url` for the pipelines that it starts.
    `admin_key_sha256` is in hex. Folders are taken as models from under `model_roots` alone.
    """

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
    hf_token: str | None = field(default=None, repr=False)

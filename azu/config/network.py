"""Network files: a policy, and the workers that `azu up` starts beside it on its own machine."""

from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from azu.config.fields import Address, Size, refused
from azu.config.policy import NetworkPolicy
from azu.config.settings import Settings
from azu.documents import read_yaml
from azu.errors import ConfigurationError
from azu.units import MIB

NAME_PATTERN = r"^[a-zA-Z0-9]([a-zA-Z0-9._-]{0,40}[a-zA-Z0-9])?$"


class LocalWorker(BaseModel):
    """A worker on this machine. Ray counts VRAM in whole MiB."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    vram: Annotated[Size, Field(ge=MIB, multiple_of=MIB)]
    payout: Address
    device: Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")] = "cpu"


class NetworkFile(BaseModel):
    """What a network file says, completed by configs/network.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: NetworkPolicy
    workers: tuple[LocalWorker, ...] = ()


def load_settings(network: Path | None = None) -> tuple[Settings, NetworkFile]:
    """Return the environment's settings, with another network file if one is given, and what that file says.

    Raises ConfigurationError as `load_network` does.
    """
    settings = Settings.from_environment()
    if network is not None:
        settings = settings.model_copy(update={"network": network.absolute()})
    return settings, load_network(settings.network)


def load_network(path: Path | Traversable | None = None) -> NetworkFile:
    """Return the network of a file, which says only what differs from configs/network.yaml.

    Raises ConfigurationError that names the file and the keys at fault.
    """
    standard = _read(files("configs") / "network.yaml")
    own = {} if path is None else _read(path)
    try:
        return NetworkFile.model_validate(_merged(standard, own))
    except ValidationError as error:
        raise refused(error, str(path or "configs/network.yaml")) from error


def _read(path: Path | Traversable) -> Mapping[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} is not a mapping of keys to values")
    return content


def _merged(standard: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(standard)
    for key, value in own.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return merged

"""Settings from the environment, and the field types that all configuration shares."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import quote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from azu.addresses import parse_address
from azu.auth.peers import Network
from azu.errors import AzuError, ConfigurationError, plain_fault
from azu.units import parse_bytes

_PREFIX = "AZU_"
# Variables that azu reads elsewhere: in one process each, or at the start of a child.
_READ_ELSEWHERE = frozenset(
    {
        "AZU_API_KEY", "AZU_BOOKS_URL", "AZU_CONTROL_PIPE", "AZU_JOBS_REDIS_URL", "AZU_LENDING",
        "AZU_PRIVATE_KEY_FILE", "AZU_SIGNER_URL", "AZU_TICKET", "AZU_WALLET_PASSWORD",
    }
)  # fmt: skip
# A link in AZU_HOME to the homes of the other users that run the network.
USERS_LINK = "users"
_TEST_PREFIX = "AZU_TEST_"


def configuration_error(error: ValidationError, where: str | None = None) -> ConfigurationError:
    """Return the error that names each bad key; it has no values, because they may be secret."""
    faults = dict(plain_fault([fault]) for fault in error.errors())
    text = "; ".join(f"{key}: {message}" for key, message in faults.items())
    return ConfigurationError(f"{where}: {text}" if where else text, param=next(iter(faults)))


def _checked(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `parse` with its errors as ValueError, which pydantic collects."""

    def check(value: Any) -> Any:
        try:
            return parse(value)
        except AzuError as error:
            raise ValueError(error.message) from error

    return check


def _paths(value: Any) -> Any:
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def _words(value: Any) -> Any:
    return value.replace(",", " ").split() if isinstance(value, str) else value


def _addresses(value: Any) -> Any:
    # As one, so that an error names the variable.
    return [parse_address(str(part)) for part in _words(value)]


def _expanded(value: Any) -> Any:
    return Path(value).expanduser() if isinstance(value, str | Path) else value


Size = Annotated[int, BeforeValidator(_checked(parse_bytes))]
Address = Annotated[str, BeforeValidator(_checked(lambda value: parse_address(str(value))))]
Port = Annotated[int, Field(ge=0, le=65535)]
HomePath = Annotated[Path, BeforeValidator(_expanded)]
# As useradd accepts it.
UserName = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
PathList = Annotated[tuple[HomePath, ...], BeforeValidator(_paths)]
NetworkList = Annotated[tuple[Network, ...], BeforeValidator(_words)]
AddressList = Annotated[tuple[str, ...], BeforeValidator(_checked(_addresses))]


class Settings(BaseModel):
    """The settings of one machine; the platform's private key is never one of them.

    Without REDIS_HOST azu starts its own Redis, without HYPERLIQUID_RPC_URL a devnet. AZU_MODEL_ROOTS holds
    folders separated as in PATH; AZU_MAX_MODEL_BYTES accepts sizes such as 64GiB. AZU_TLS_CERT and
    AZU_TLS_KEY are the ingress's certificate chain and key. Without AZU_URL the commands find the network
    themselves (azu/client/machine.py). AZU_TLS_CA is an authority that clients trust besides those of the
    system. AZU_REDIS_TLS encrypts the link to Redis; AZU_REDIS_CA is its authority. AZU_USER_HOMES holds the
    homes of AZU_MONEY_USER and AZU_RAY_USER, as which root starts a network; with AZU_ONE_USER root runs all
    of it. AZU_ADMIN_ADDRESSES holds the addresses, with commas between them, whose wallets sign commands that
    move money. AZU_TRUSTED_PROXIES holds addresses or networks (CIDR) of proxies before the ingress, whose
    X-Forwarded-For counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, validate_by_name=True)

    chain_url: str | None = Field(None, validation_alias="HYPERLIQUID_RPC_URL")
    platform_address: Address | None = Field(None, validation_alias="HYPERLIQUID_ADDRESS")
    redis_host: str | None = Field(None, validation_alias="REDIS_HOST")
    redis_port: Port = Field(6379, validation_alias="REDIS_PORT")
    redis_username: str = Field("", validation_alias="REDIS_USERNAME")
    redis_password: SecretStr | None = Field(None, validation_alias="REDIS_PASSWORD")
    redis_tls: bool = Field(False, validation_alias="AZU_REDIS_TLS")
    redis_ca: HomePath | None = Field(None, validation_alias="AZU_REDIS_CA")
    hf_token: SecretStr | None = Field(None, validation_alias="HF_TOKEN")
    home: HomePath = Field(Path("~/.azu"), validation_alias="AZU_HOME", validate_default=True)
    url: str | None = Field(None, validation_alias="AZU_URL")
    tls_ca: HomePath | None = Field(None, validation_alias="AZU_TLS_CA")
    http_host: str = Field("127.0.0.1", validation_alias="AZU_HTTP_HOST")
    http_port: Port = Field(8000, validation_alias="AZU_HTTP_PORT")
    tls_cert: HomePath | None = Field(None, validation_alias="AZU_TLS_CERT")
    tls_key: HomePath | None = Field(None, validation_alias="AZU_TLS_KEY")
    domain: str | None = Field(None, validation_alias="AZU_DOMAIN")
    admin_key: SecretStr | None = Field(None, validation_alias="AZU_ADMIN_KEY")
    admin_addresses: AddressList = Field((), validation_alias="AZU_ADMIN_ADDRESSES")
    trusted_proxies: NetworkList = Field((), validation_alias="AZU_TRUSTED_PROXIES")
    open_metrics: bool = Field(False, validation_alias="AZU_OPEN_METRICS")
    model_roots: PathList = Field((), validation_alias="AZU_MODEL_ROOTS")
    max_model_bytes: Size = Field(64 * 1024**3, validation_alias="AZU_MAX_MODEL_BYTES")
    network: HomePath | None = Field(None, validation_alias="AZU_NETWORK")
    money_user: UserName = Field("azu-money", validation_alias="AZU_MONEY_USER")
    ray_user: UserName = Field("azu-ray", validation_alias="AZU_RAY_USER")
    user_homes: HomePath = Field(Path("/var/lib/azu"), validation_alias="AZU_USER_HOMES")
    one_user: bool = Field(False, validation_alias="AZU_ONE_USER")

    @classmethod
    def from_environment(cls) -> Self:
        """Read the settings from the process's environment.

        Raises ConfigurationError that names each AZU_ variable that azu does not know or whose value is bad.
        """
        known = {str(field.validation_alias) for field in cls.model_fields.values()}
        _refuse_unknown(os.environ, known)
        try:
            settings = cls.model_validate({name: os.environ[name] for name in known if os.environ.get(name)})
        except ValidationError as error:
            raise configuration_error(error) from error
        settings._check_pairs()
        return settings

    def _check_pairs(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigurationError("AZU_TLS_CERT and AZU_TLS_KEY go together", param="AZU_TLS_CERT")
        if self.redis_ca is not None and not self.redis_tls:
            raise ConfigurationError("AZU_REDIS_CA is for AZU_REDIS_TLS=1", param="AZU_REDIS_CA")
        if self.redis_tls and self.redis_host is None:
            raise ConfigurationError("AZU_REDIS_TLS is for the Redis at REDIS_HOST", param="AZU_REDIS_TLS")

    @property
    def money_home(self) -> Path:
        """The folder of what the processes of money keep: in their own user's home, where they have one."""
        theirs = self.home / USERS_LINK / "money"
        return theirs if theirs.is_dir() else self.home

    @property
    def jobs_home(self) -> Path:
        """The folder of the Redis of jobs, which is in that of Ray's user, where it has one."""
        theirs = self.home / USERS_LINK / "ray"
        return theirs if theirs.is_dir() else self.home

    @property
    def redis_url(self) -> str | None:
        """The URL of the configured Redis, or None when azu starts its own."""
        if self.redis_host is None:
            return None
        user, at = quote(self.redis_username, safe=""), ""
        if self.redis_password:
            at = f"{user}:{quote(self.redis_password.get_secret_value(), safe='')}@"
        place = f"{at}{self.redis_host}:{self.redis_port}/0"
        if not self.redis_tls:
            return f"redis://{place}"
        if self.redis_ca is None:
            return f"rediss://{place}"
        return f"rediss://{place}?ssl_ca_certs={quote(str(self.redis_ca.absolute()), safe='/')}"


def _refuse_unknown(environment: Mapping[str, str], known: set[str]) -> None:
    ours = {name for name in environment if name.startswith(_PREFIX) and not name.startswith(_TEST_PREFIX)}
    if unknown := sorted(ours - known - _READ_ELSEWHERE):
        raise ConfigurationError(f"unknown settings: {', '.join(unknown)}", param=unknown[0])

"""Settings from the environment and from YAML files; unknown keys are refused."""

from azu.config.control import ControlConfig, EnrolmentConfig, NodeLinks, TlsConfig
from azu.config.network import LocalWorker, NetworkFile, NetworkPolicy, load_network, load_settings
from azu.config.settings import Settings

__all__ = [
    "ControlConfig",
    "EnrolmentConfig",
    "LocalWorker",
    "NetworkFile",
    "NetworkPolicy",
    "NodeLinks",
    "Settings",
    "TlsConfig",
    "load_network",
    "load_settings",
]

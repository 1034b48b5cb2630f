"""Settings from the environment and from YAML files; unknown keys are refused."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from azu.config.control import ControlConfig, EnrolmentConfig, NodeLinks, TlsConfig
    from azu.config.network import LocalWorker, NetworkFile, NetworkPolicy, load_network, load_settings
    from azu.config.settings import Settings

_MODULES = {
    "control": ("ControlConfig", "EnrolmentConfig", "NodeLinks", "TlsConfig"),
    "network": ("LocalWorker", "NetworkFile", "NetworkPolicy", "load_network", "load_settings"),
    "settings": ("Settings",),
}
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


def __getattr__(name: str) -> Any:
    # A command needs the settings, and not the network file, which takes several times as long to load.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"azu.config.{module}"), name)
    raise AttributeError(f"module 'azu.config' has no attribute {name!r}")

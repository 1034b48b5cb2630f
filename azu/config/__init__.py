"""Settings from the environment and from configs/: unknown keys are refused."""

from azu.config.control import ControlConfig
from azu.config.network import LocalWorker, NetworkFile, load_network
from azu.config.policy import NetworkPolicy
from azu.config.settings import Settings

__all__ = ["ControlConfig", "LocalWorker", "NetworkFile", "NetworkPolicy", "Settings", "load_network"]

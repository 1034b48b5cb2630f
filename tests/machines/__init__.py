"""Virtual machines in network namespaces on a bridge; each has its own processes, home and sshd."""

from tests.machines.lan import can_make_machines, lan
from tests.machines.machine import Machine

__all__ = ["Machine", "can_make_machines", "lan"]

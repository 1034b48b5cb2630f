"""Machines on this machine: namespaces on a bridge, each with processes, a home and an sshd of its own."""

from tests.machines.lan import can_make_machines, lan
from tests.machines.machine import Machine

__all__ = ["Machine", "can_make_machines", "lan"]

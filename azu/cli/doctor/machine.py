"""This machine: what azu stands on here."""

import os
import re
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from azu.cli.doctor.findings import Finding, State
from azu.config import Settings
from azu.units import GIB, MIB, format_bytes

_LEAST_DISK_BYTES = 10 * GIB
_LEAST_SHARED_BYTES = 256 * MIB
_LEAST_OPEN_FILES = 4096
_SECRET_NAMES = ("*.key", "*.json", "ray-token", "redis/redis.conf", "tls/*.key", "networks/*/*.key")
_CPU_BUILD = re.compile(r"\+cpu$")


def python(_: Settings) -> Iterator[Finding]:
    """Look at the interpreter."""
    here, wanted = ".".join(map(str, sys.version_info[:3])), metadata("azu")["Requires-Python"]
    good = here in SpecifierSet(wanted)
    yield Finding("Python", _state(good), here, "" if good else f"use a Python {wanted}")


def packages(_: Settings) -> Iterator[Finding]:
    """Look at what a machine that serves or lends needs, and at which of it is there."""
    missing, other = [], []
    for line in requires("azu") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": "node"}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            missing.append(wanted.name)
            continue
        if not wanted.specifier.contains(found.partition("+")[0], prereleases=True):
            other.append(f"{wanted.name} {found}, not {wanted.specifier}")
    advice = "pip install 'azu[node]'" if missing or other else ""
    told = "; ".join((*(f"{name} is missing" for name in missing), *other)) or "all there, in their ranges"
    yield Finding("packages", _state(not advice), told, advice)


def gpu(_: Settings) -> Iterator[Finding]:
    """Look at the GPUs, their driver, and whether torch was built for them."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        has_card = any(Path("/proc/driver").glob("nvidia*")) or shutil.which("nvidia-smi") is not None
        advice = "install the NVIDIA driver, or restart after its update" if has_card else ""
        state = State.BAD if has_card else State.OK
        yield Finding("GPU", state, f"none ({error}); the CPU can be lent", advice)
        return
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            card = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(card)
            free = f"{format_bytes(memory.free)} of {format_bytes(memory.total)} free"
            told = f"{pynvml.nvmlDeviceGetName(card)}, {free}, driver {pynvml.nvmlSystemGetDriverVersion()}"
            yield Finding(f"GPU {index}", State.OK, told)
    finally:
        pynvml.nvmlShutdown()
    if _CPU_BUILD.search(version("torch")):
        yield Finding(
            "torch", State.BAD, f"{version('torch')} cannot use the GPU", "install torch's CUDA build"
        )


def disk(settings: Settings) -> Iterator[Finding]:
    """Look at the room for shards, and for what Ray's processes share."""
    home = next(folder for folder in (settings.home, *settings.home.parents) if folder.exists())
    free = shutil.disk_usage(home).free
    enough = free >= _LEAST_DISK_BYTES
    yield Finding(
        "disk",
        State.OK if enough else State.WARNING,
        f"{format_bytes(free)} free at {home}",
        "" if enough else "shards are kept there: make room, or set AZU_HOME to a larger disk",
    )
    shared = shutil.disk_usage("/dev/shm").free  # noqa: S108 - Ray's own place
    enough = shared >= _LEAST_SHARED_BYTES
    yield Finding(
        "shared memory",
        State.OK if enough else State.WARNING,
        f"{format_bytes(shared)} free at /dev/shm",
        "" if enough else "make /dev/shm larger (docker run --shm-size=1g): Ray is slow without",
    )


def limits(_: Settings) -> Iterator[Finding]:
    """Look at how many files a process may open: every connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= _LEAST_OPEN_FILES
    advice = "" if enough else f"ulimit -n {min(hard, 65_536)}"
    yield Finding("open files", State.OK if enough else State.WARNING, f"at most {soft}", advice)


def ports(settings: Settings) -> Iterator[Finding]:
    """Look at whether the ingress's port is free, or azu's own."""
    about = f"port {settings.http_port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.http_host, settings.http_port))
        except OSError as error:
            if (settings.home / "admin.json").exists():
                yield Finding(about, State.OK, "taken by the network that runs here")
            else:
                advice = "stop who listens there, or set AZU_HTTP_PORT (or AZU_HTTP_HOST)"
                yield Finding(about, State.WARNING, f"{settings.http_host}: {error.strerror}", advice)
            return
    yield Finding(about, State.OK, f"free at {settings.http_host}")


def memory(_: Settings) -> Iterator[Finding]:
    """Look at the host's memory: stages keep what they sent there."""
    found = psutil.virtual_memory()
    enough = found.available >= 2 * GIB
    advice = "" if enough else "stop other programs: a stage keeps up to 1 GiB of what it sent"
    told = f"{format_bytes(found.available)} of {format_bytes(found.total)} available"
    yield Finding("memory", State.OK if enough else State.WARNING, told, advice)


def secrets(settings: Settings) -> Iterator[Finding]:
    """Look at who else may read the files with keys and passwords."""
    files = sorted({path for name in _SECRET_NAMES for path in settings.home.glob(name)})
    if named := os.environ.get("AZU_PRIVATE_KEY_FILE"):
        files.append(Path(named))
    open_to_others = [path for path in files if path.exists() and path.stat().st_mode & 0o077]
    for path in open_to_others:
        yield Finding("key file", State.BAD, f"others can read {path}", f"chmod 600 {path}")
    if not open_to_others:
        yield Finding("key files", State.OK, f"{len(files)} in {settings.home}, read by their owner alone")


LOOKS = {
    "Python": python,
    "packages": packages,
    "GPU": gpu,
    "memory": memory,
    "disk": disk,
    "open files": limits,
    "port": ports,
    "key files": secrets,
}


def _state(good: bool) -> State:
    return State.OK if good else State.BAD

"""The GPUs of this machine, without loading anything that would take one."""

import os
import subprocess

_TIMEOUT_S = 20.0


def cuda_devices() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return tuple(name for name in allowed.split(",") if name.strip())
    try:
        found = subprocess.run(
            ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader"),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (FileNotFoundError, subprocess.SubprocessError):
        return ()
    return tuple(found.stdout.split())

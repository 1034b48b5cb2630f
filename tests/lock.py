"""Write what pip installs for azu's extras on Python 3.11 and Linux, with hashes: `python -m tests.lock`.

torch is left out: which build fits depends on the machine, and its hash with it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = {extra: ROOT / "configs" / "locks" / f"{extra}.txt" for extra in ("node", "dev")}
LEFT_OUT = {"azu", "torch"}
_HEAD = """\
# What azu needs, on Python 3.11 and Linux (x86_64), without torch: `python -m tests.lock` wrote it.
# Install torch first, then this file: pip install --require-hashes --no-deps -r FILE
"""


def resolved(extra: str) -> list[dict[str, Any]]:
    """Return what pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ("-qqq", "--dry-run", "--ignore-installed", "--report", str(report))
        subprocess.run((sys.executable, "-m", "pip", "install", *options, f"{ROOT}[{extra}]"), check=True)
        found: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return found


def write(extra: str, lock: Path) -> None:
    lines = []
    for one in resolved(extra):
        name, version = canonicalize_name(one["metadata"]["name"]), one["metadata"]["version"]
        if name not in LEFT_OUT:
            digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
    lock.write_text(_HEAD + "".join(sorted(lines)))
    print(f"{len(lines)} packages in {lock.relative_to(ROOT)}")


if __name__ == "__main__":
    for each in LOCKS.items():
        write(*each)

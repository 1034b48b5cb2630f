"""A command that goes on in a session of its own when the one who gave it leaves."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from azu.cli.private_file import write_private
from azu.errors import DeadlineExceeded, Unavailable

OPTION = "--background"
_POLL_S = 0.1
_TAIL_CHARS = 2000


def in_background(home: Path, timeout_s: float) -> Any:
    """Start this process's own command again without the option, and return what it shows once it is up.

    What else it says goes to logs/background.log in the home folder. Raises Unavailable with its last words
    when it ends before, DeadlineExceeded when it takes too long.
    """
    arguments = [word for word in sys.argv[1:] if word != OPTION]
    arguments += [] if "--json" in arguments else ["--json"]
    log, shown = home / "logs" / "background.log", home / "background.json"
    # There are secrets in what it shows, such as the admin's key.
    for file in (log, shown):
        write_private(file, "")
    with shown.open("w") as output, log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "azu.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=dict(os.environ),
            start_new_session=True,
        )
    deadline = time.monotonic() + timeout_s
    while not (told := shown.read_text()).endswith("\n"):
        if process.poll() is not None:
            raise Unavailable(f"it ended before it was up: {_last_words(log, shown)}")
        if time.monotonic() > deadline:
            process.terminate()
            raise DeadlineExceeded(f"it was not up in {timeout_s:.0f} s: {_last_words(log, shown)}")
        time.sleep(_POLL_S)
    facts = json.loads(told)
    if "error" in facts:
        raise Unavailable(facts["error"]["message"])
    return facts


def _last_words(log: Path, shown: Path) -> str:
    return (log.read_text() + shown.read_text())[-_TAIL_CHARS:].strip() or f"nothing in {log}"

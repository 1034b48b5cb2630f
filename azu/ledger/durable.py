"""How a Redis has to be configured to hold money.

The values are plain: as arguments of the server they are used as they are; in its file an empty one is
written `""`.
"""

from collections.abc import Mapping

APPEND_ONLY_FILE = "appendonly.aof"

# What was acknowledged is on disk; a damaged file is refused, never cut short in silence; nothing is evicted.
DURABLE_CONFIG: Mapping[str, str] = {
    "appendonly": "yes",
    "appendfilename": APPEND_ONLY_FILE,
    "appendfsync": "always",
    # Not even while the server compacts the file.
    "no-appendfsync-on-rewrite": "no",
    "aof-load-truncated": "no",
    # Commands only: then `azu ledger repair` can read the file to its last byte.
    "aof-use-rdb-preamble": "no",
    "maxmemory-policy": "noeviction",
    "save": "",
}

"""Which versions of azu's messages between machines a program writes and understands.

A release that changes a message raises NEWEST. It raises OLDEST once it understands no more what programs of
before write. A field that a message gains comes last: Ray passes the fields of a message by their order.
"""

from dataclasses import dataclass
from importlib.metadata import version

from pydantic import ConfigDict, StrictInt, StrictStr

from azu.errors import OtherVersion
from azu.printable import printable

NEWEST = 1
OLDEST = 1
_RELEASE = version("azu")
_MOST_RELEASE_CHARACTERS = 32


@dataclass(frozen=True, slots=True)
class Versions:
    """What a program of a `release` understands: messages of the versions from `oldest` to `newest`."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=False)

    newest: StrictInt
    oldest: StrictInt
    release: StrictStr

    def common(self, other: "Versions") -> "Versions | None":
        """Return what both understand, as a program of this release; None if that is nothing."""
        newest, oldest = min(self.newest, other.newest), max(self.oldest, other.oldest)
        return Versions(newest, oldest, self.release) if oldest <= newest else None

    def check_node(self, node: "Versions") -> None:
        """Raise OtherVersion, which says what to install, unless a network of these versions takes a node."""
        if self.common(node) is None:
            is_old = node.newest < self.oldest
            theirs, ours = (printable(one.release, _MOST_RELEASE_CHARACTERS) for one in (node, self))
            raise OtherVersion(
                f"azu {theirs} on this node is too {'old' if is_old else 'new'} for the network: "
                f"install azu {ours} on the node"
            )


def own_versions() -> Versions:
    """Return what this program understands."""
    return Versions(NEWEST, OLDEST, _RELEASE)

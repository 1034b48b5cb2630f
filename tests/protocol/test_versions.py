"""Programs of two releases work together where they understand one version of the messages at least."""

import pytest

from azu.errors import OtherVersion
from azu.protocol.versions import Versions

HEAD = Versions(newest=4, oldest=3, release="0.4.0")


@pytest.mark.parametrize(("newest", "oldest"), [(3, 2), (4, 3), (5, 4), (9, 1)])
def test_a_network_takes_a_node_that_shares_a_version_with_it(newest: int, oldest: int) -> None:
    node = Versions(newest, oldest, "other")

    HEAD.check_node(node)

    shared = HEAD.common(node)
    assert shared is not None
    assert max(oldest, 3) == shared.oldest <= shared.newest == min(newest, 4)


@pytest.mark.parametrize(("newest", "oldest", "is_"), [(2, 1, "old"), (6, 5, "new")])
def test_a_node_that_shares_none_is_told_in_one_sentence_what_to_install(
    newest: int, oldest: int, is_: str
) -> None:
    with pytest.raises(OtherVersion) as refused:
        HEAD.check_node(Versions(newest, oldest, "0.9\x1b[2J"))

    assert refused.value.message == (
        f"azu 0.9\\u001b[2J on this node is too {is_} for the network: install azu 0.4.0 on the node"
    )

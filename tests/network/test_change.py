"""Owners lend less memory or leave: pieces shrink or move, and no stream is lost."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.network.actors import actors_named, ask_inside, lend
from tests.network.recovering import (
    Running,
    Streams,
    four,
    network_of,
    node_names,
    pieces_of,
    show,
    slug,
    spared,
)
from tests.network.test_nodes import agent, nodes

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL, NUM_TOKENS = "azu/tiny-dense", 300
PROMISED = 12
VRAM_MIB = 13  # three layers of one MiB, and three times as much for their KV
ASKED = four(MODEL, NUM_TOKENS) + four(MODEL, NUM_TOKENS, words=40)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Three nodes, of which the model needs two; its KV is much larger than its weights."""
    file = spared(ada=VRAM_MIB, ben=VRAM_MIB, cleo=VRAM_MIB)
    kv = file.policy.kv.model_copy(update={"promised_sequences": PROMISED})
    policy = file.policy.model_copy(update={"kv": kv})
    home: Path = tmp_path_factory.mktemp("azu")
    with network_of(home, file.model_copy(update={"policy": policy})) as started:
        yield started


def blocks_and_preempted(pipeline: object) -> tuple[int, int]:
    """Return, inside a Pipeline, its number of KV blocks and of preemptions."""
    return pipeline._engine._num_blocks, pipeline._engine.num_preempted


def kv_bytes(actor: object) -> int:
    """Return, inside a LayerActor, the bytes of its KV pools."""
    pools = [pool for pools in actor._runner._kv._pools if pools is not None for pool in pools]
    return sum(pool.numel() * pool.element_size() for pool in pools)


def engine() -> tuple[int, int]:
    (pipeline,) = actors_named(f"pipeline:{slug(MODEL)}:")
    return ask_inside(pipeline, blocks_and_preempted)


def wait_for_blocks(condition, timeout_s: float = 60.0) -> int:
    deadline_s = time.monotonic() + timeout_s
    while not condition(found := engine()[0]):
        assert time.monotonic() < deadline_s, found
        time.sleep(0.1)
    return found


def test_a_node_whose_memory_is_halved_under_load_goes_on_serving(running: Running) -> None:
    _, user = running
    expected = Streams(user, ASKED).answers()
    name = node_names(user, MODEL)[0]
    planned, _ = engine()
    held = sum(ask_inside(actors_named(piece)[0], kv_bytes) for piece in pieces_of(MODEL))

    streams = Streams(user, ASKED)
    streams.wait_until(lambda: min(one.num_tokens for one in streams.each) >= NUM_TOKENS // 3)
    lent = nodes()[name].vram_total_bytes
    lend(agent(name), lent // 2)
    fewer = wait_for_blocks(lambda blocks: blocks < planned)

    assert streams.answers() == expected
    blocks, preempted = engine()
    assert blocks == fewer
    assert preempted > 0
    kept = sum(ask_inside(actors_named(piece)[0], kv_bytes) for piece in pieces_of(MODEL))
    assert kept == held * fewer // planned, "the bytes of the pools"

    lend(agent(name), lent)
    assert wait_for_blocks(lambda blocks: blocks > fewer) == planned
    show(
        f"budget halved under {len(ASKED)} streams: all identical; KV {planned} to {fewer} blocks and back, "
        f"{held} to {kept} bytes measured, {preempted} preemptions; "
        f"longest stall {streams.longest_stall_s():.1f} s"
    )


def test_a_node_that_leaves_is_emptied_while_its_streams_go_on(running: Running) -> None:
    network, user = running
    asked = four(MODEL, NUM_TOKENS)
    expected = Streams(user, asked).answers()
    name = node_names(user, MODEL)[0]
    admin = {"authorization": f"Bearer {network.admin_key}"}

    streams = Streams(user, asked)
    streams.wait_until(lambda: streams.each[0].num_tokens >= NUM_TOKENS // 4)
    deadline_s = time.monotonic() + 60
    while not user.http.post(f"/v1/nodes/{name}/leave", headers=admin).raise_for_status().json()["left"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    still_running = sum(not one.ended for one in streams.each)

    assert streams.answers() == expected
    assert still_running == len(asked), "the node was empty before they ended"
    assert name not in node_names(user, MODEL)
    assert nodes()[name].state.value == "leaving"
    show(f"{name} left under 4 streams: all identical; longest stall {streams.longest_stall_s():.1f} s")


def test_only_a_nodes_owner_and_the_admin_make_it_leave(running: Running) -> None:
    _, user = running

    refused = user.http.post("/v1/nodes/ada/leave")

    assert refused.status_code == 404
    assert nodes()["ada"].state.value in ("alive", "leaving")

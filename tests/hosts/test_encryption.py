"""Three hosts: what crosses the wire between them while prompts are answered."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from azu.client import Client
from azu.launch.membership import EnrolledMembership, EnrolmentTicket, TlsFiles, decode_ticket
from azu.launch.ray_nodes import driver_environment
from azu.protocol.frame import Frame
from tests.hosts.capture import Capture, captured
from tests.hosts.insider import MODEL
from tests.hosts.namespaces import lan
from tests.hosts.network import ROOT, HostedNetwork, eventually, foreign, hosted, trust

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("namespaces")]

NUM_REQUESTS = 100
PATTERN_BYTES = 64


@contextmanager
def insider(network: HostedNetwork, ray_head: str, files: TlsFiles | None) -> Iterator[subprocess.Popen[str]]:
    """Run `tests.hosts.insider` on the head's host."""
    token = network.home / "ray-token"
    process = subprocess.Popen(
        network.head.command(sys.executable, "-m", "tests.hosts.insider"),
        env=os.environ | driver_environment(token, files, network.head.ip),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(network.facts | {"head": ray_head}) + "\n")
    process.stdin.flush()
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


def ask(network: HostedNetwork, api_key: str, index: int) -> str:
    client = Client(network.facts["url"], api_key, tls=trust(network.facts))
    try:
        return client.generate(f"Question {index}: what is azu?", model=MODEL, max_tokens=8, seed=index).text
    finally:
        client.close()


def patterns(frame: bytes) -> list[bytes]:
    """Return the part of a frame that occurs nowhere else: its hidden states."""
    payload = bytes(Frame.decode(frame).payload)
    return [payload[len(payload) * part // 4 :][:PATTERN_BYTES] for part in (0, 1, 2)]


def run_requests(folder: Path, *, encrypted: bool) -> tuple[Capture, list[bytes], dict[str, str]]:
    """Answer NUM_REQUESTS on three hosts; return what crossed the bridge, the frames, and the secrets."""
    with lan(3) as net, captured(net.bridge) as capture:
        head, *hosts = net.hosts
        lenders = list(zip(("ada", "ben"), hosts, strict=True))
        if not encrypted:
            with foreign(head, lenders, folder) as network:
                frames, known = answered(network, network.facts["head"], None)
        else:
            with hosted(head, folder) as network:
                tickets = {name: network.ticket(host) for name, host in lenders}
                for name, host in lenders:
                    network.join(host, name, tickets[name])
                opened = decode_ticket(network.ticket(net.ip))
                assert isinstance(opened, EnrolmentTicket)
                look = EnrolledMembership(opened, folder / "look", name="look", host=net.ip).access()
                frames, known = answered(network, look.head, TlsFiles.of(network.home / "tls"))
                known["a ticket's secret"] = opened.secret
    print(
        f"\nTLS {'on' if encrypted else 'off'}: {NUM_REQUESTS} requests, "
        f"{len(frames)} frames of hidden states, {capture.num_bytes:,} bytes on the bridge, "
        f"{capture.lost} packets lost to the capture"
    )
    return capture, frames, known


def answered(
    network: HostedNetwork, ray_head: str, files: TlsFiles | None
) -> tuple[list[bytes], dict[str, str]]:
    """Answer NUM_REQUESTS; return the frames that the stages got, and the secrets that were used."""
    eventually(lambda: network.names() == {"ada", "ben"})
    with insider(network, ray_head, files) as inside:
        assert inside.stdin is not None
        assert inside.stdout is not None
        told = json.loads(inside.stdout.readline())
        assert told["stages"] == 2
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda i: ask(network, told["api_key"], i), range(NUM_REQUESTS)))
        inside.stdin.write("\n")
        inside.stdin.flush()
        frames = [bytes.fromhex(frame) for frame in json.loads(inside.stdout.readline())]
    assert len(texts) == NUM_REQUESTS
    known = {
        "the Ray token": network.ray_token(),
        "a user's API key": told["api_key"],
        "the admin key": network.facts["admin_key"],
    }
    return frames, known


def found(capture: Capture, frames: list[bytes], known: dict[str, str]) -> tuple[int, set[str]]:
    """Return how many frames' hidden states crossed the bridge as they are, and which secrets did."""
    streams = list(capture.streams().values())
    seen = [
        frame for frame in frames if any(part in stream for part in patterns(frame) for stream in streams)
    ]
    return len(seen), {name for name, secret in known.items() if capture.holds(secret.encode())}


def test_the_wire_between_encrypted_hosts_shows_no_hidden_states_and_no_secrets(folder: Path) -> None:
    capture, frames, known = run_requests(folder, encrypted=True)

    num_seen, told = found(capture, frames, known)

    print(f"TLS on: {num_seen} of {len(frames)} frames found on the bridge, secrets found: {told or 'none'}")
    assert capture.lost == 0
    assert capture.num_bytes > sum(map(len, frames))
    assert (num_seen, told) == (0, set())


def test_the_same_capture_finds_it_all_without_encryption(folder: Path) -> None:
    capture, frames, known = run_requests(folder, encrypted=False)

    num_seen, told = found(capture, frames, known)

    print(f"TLS off: {num_seen} of {len(frames)} frames found on the bridge, secrets found: {told}")
    assert capture.lost == 0
    assert num_seen == len(frames)
    assert told == {"the Ray token", "a user's API key"}

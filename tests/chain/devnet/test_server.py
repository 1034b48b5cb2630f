import signal
import socket
import subprocess
import sys

import httpx

DEVNET = "from azu.cli.devnet import devnet; devnet(port={port})"


def start(port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DEVNET.format(port=port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_says_where_it_is_as_soon_as_it_answers_and_ends_when_told() -> None:
    process = start(port=0)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline().split()
        assert ready[:2] == ["devnet", "ready"]
        assert httpx.post(f"{ready[2]}/info", json={"type": "meta"}, timeout=10).json() == {"universe": []}

        process.send_signal(signal.SIGTERM)

        process.communicate(timeout=10)
    finally:
        process.kill()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(ready[2].rsplit(":", 1)[1]))) != 0


def test_it_does_not_start_on_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(port=taken.getsockname()[1])
        out, _ = process.communicate(timeout=30)

    assert process.returncode != 0
    assert out == ""

"""Clients that hold connections and give nothing for them; a process of its own, beside the test's.

`python attackers.py PORT HALF_OPEN SLOW KEY` prints a line each second until its standard input closes.
"""

import errno
import json
import select
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass

PER_ADDRESS = 250
PIECE = b"x" * 20_000
HALVES = (
    b"GET /health HTTP/1.1\r\nhost: azu\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: azu\r\ncontent-length: 900\r\n\r\n{",
    b"POST /submit HTTP/1.1\r\nhost: azu\r\ntransfer-encoding: chunked\r\n\r\n",
    b"",
)
# Of so many one sends more than the reverse proxy keeps of a body before it passes the request on.
LARGE_ONE_OF = 20
LARGE = b"POST /v1/completions HTTP/1.1\r\nhost: azu\r\ncontent-length: 900000\r\n\r\n" + PIECE


@dataclass
class Attack:
    """One place of an attacker; it connects again when it is closed."""

    number: int
    sent: bytes
    slow: bool
    connection: socket.socket | None = None

    def connect(self, port: int) -> None:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        made.setblocking(False)
        kind = 8 if self.slow else 4
        made.bind((f"127.{kind}.0.{1 + self.number // PER_ADDRESS}", 0))
        if made.connect_ex(("127.0.0.1", port)) not in (0, errno.EINPROGRESS):
            made.close()
            return
        self.connection = made

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def main(port: int, half_open: int, slow: int, key: str) -> None:
    readers = (
        b"GET /page/vendor/swagger-ui-bundle.js HTTP/1.1\r\nhost: azu\r\n\r\n",
        b"GET /openapi.json HTTP/1.1\r\nhost: azu\r\n\r\n",
        f"GET /v1/jobs?limit=1000 HTTP/1.1\r\nhost: azu\r\nauthorization: Bearer {key}\r\n\r\n".encode(),
    )
    attacks = [
        Attack(number, LARGE if number % LARGE_ONE_OF == 0 else HALVES[number % len(HALVES)], slow=False)
        for number in range(half_open)
    ]
    attacks += [Attack(number, readers[number % len(readers)], slow=True) for number in range(slow)]
    did: Counter[str] = Counter()
    while not select.select([sys.stdin], [], [], 0)[0]:
        began = time.monotonic()
        for attack in attacks:
            step(attack, port, did)
        held = sum(attack.connection is not None for attack in attacks)
        print(json.dumps({"held": held, **did}), flush=True)
        time.sleep(max(0.0, 1.0 - (time.monotonic() - began)))


def step(attack: Attack, port: int, did: Counter[str]) -> None:
    """Take a byte of an answer, or connect again."""
    if attack.connection is None:
        attack.connect(port)
        if attack.connection is not None and attack.sent:
            try:
                attack.connection.send(attack.sent)
            except OSError:
                did.update(["not sent"])
        did.update(["connected"])
        return
    try:
        read = attack.connection.recv(1 if attack.slow else 4096)
    except BlockingIOError:
        return
    except OSError:
        read = b""
    if not read:
        did.update(["closed"])
        attack.close()
    else:
        did.update(["bytes" if attack.slow else "answers"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

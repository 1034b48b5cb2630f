"""A capture of everything that crosses a bridge, reassembled into the bytes that each side sent."""

import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_ALL_PROTOCOLS = 0x0003
_IPV4, _TCP = 0x0800, 6
_SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_STATISTICS = 33, 263, 6
_BUFFER_BYTES = 256 * 1024 * 1024
_LARGEST_PACKET = 1 << 17
_POLL_S = 0.2
_HALF = 1 << 31  # sequence numbers wrap

Flow = tuple[bytes, bytes]  # address and port of the sender, and of the receiver


@dataclass(slots=True)
class Capture:
    """The captured packets; `lost` counts those that were not read in time."""

    packets: list[bytes] = field(default_factory=list)
    lost: int = 0

    @property
    def num_bytes(self) -> int:
        """The number of captured bytes, headers included."""
        return sum(map(len, self.packets))

    def streams(self) -> dict[Flow, bytes]:
        """Return the bytes of every TCP connection and direction, in the order they were sent."""
        parts: defaultdict[Flow, list[tuple[int, bytes]]] = defaultdict(list)
        first: dict[Flow, int] = {}
        for packet in self.packets:
            segment = _segment(packet)
            if segment is not None and segment[2]:
                flow, sequence, payload = segment
                begin = first.setdefault(flow, sequence)
                parts[flow].append(((sequence - begin + _HALF) % (2 * _HALF) - _HALF, payload))
        return {flow: _joined(found) for flow, found in parts.items()}

    def holds(self, pattern: bytes) -> bool:
        """Return whether any connection carried these bytes."""
        return any(pattern in stream for stream in self.streams().values())


@contextmanager
def captured(interface: str) -> Iterator[Capture]:
    """Capture an interface until the context is left; the capture is complete then."""
    capture, stop = Capture(), threading.Event()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS)) as ear:
        ear.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        ear.bind((interface, 0))
        ear.settimeout(_POLL_S)

        def listen() -> None:
            while True:
                try:
                    capture.packets.append(ear.recv(_LARGEST_PACKET))
                except TimeoutError:
                    if stop.is_set():
                        return

        thread = threading.Thread(target=listen, name="capture")
        thread.start()
        try:
            yield capture
        finally:
            stop.set()
            thread.join()
            _, capture.lost = struct.unpack("II", ear.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))


def _segment(packet: bytes) -> tuple[Flow, int, bytes] | None:
    """Return flow, sequence number and payload of a packet, None unless it is TCP over IPv4."""
    if len(packet) < 54 or struct.unpack_from("!H", packet, 12)[0] != _IPV4 or packet[23] != _TCP:
        return None
    ip_end = 14 + 4 * (packet[14] & 0x0F)
    ip_length = struct.unpack_from("!H", packet, 16)[0]
    # Large segments, which a network card would cut, may have a length of zero.
    end = 14 + ip_length if ip_length else len(packet)
    source, target = (
        packet[26:30] + packet[ip_end : ip_end + 2],
        packet[30:34] + packet[ip_end + 2 : ip_end + 4],
    )
    (sequence,) = struct.unpack_from("!I", packet, ip_end + 4)
    payload = packet[ip_end + 4 * (packet[ip_end + 12] >> 4) : end]
    return (source, target), sequence, payload


def _joined(parts: list[tuple[int, bytes]]) -> bytes:
    """Return the segments in order; bytes that were sent again, perhaps cut differently, come once."""
    stream, end = bytearray(), None
    for begin, payload in sorted(parts):
        known = 0 if end is None else max(0, end - begin)
        if known < len(payload):
            stream += payload[known:]
            end = begin + len(payload)
    return bytes(stream)

"""A certificate of a network's authority is valid in that network alone, and until it expires."""

import socket
import ssl
import threading
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from azu.auth.certificates import (
    Authority,
    certificate_pem,
    check_signed_text,
    hosts_of,
    new_key,
    new_request,
    read_request,
    sign_text,
    utc_now,
)
from azu.errors import InvalidRequest, Unauthenticated

NOW = utc_now()
LIFE = timedelta(days=7)
HOST = "192.0.2.7"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.new("azu nodes", NOW)


def signed(by: Authority, key: bytes) -> x509.Certificate:
    return by.sign(read_request(new_request(key)), [HOST], NOW, LIFE)


class Node:
    """A certificate and its key in files, as both ends of a connection need them."""

    def __init__(self, folder: Path, by: Authority) -> None:
        folder.mkdir()
        self.certificate, self.key, self.authority = (folder / name for name in ("crt", "key", "ca"))
        key = new_key()
        self.key.write_bytes(key)
        self.certificate.write_bytes(certificate_pem(signed(by, key)))
        self.authority.write_bytes(by.pem)

    def context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        context = ssl.create_default_context(purpose, cafile=self.authority)
        context.load_cert_chain(self.certificate, self.key)
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def call(server: Node, client: Node, host: str) -> bytes:
    """Have a client call a server by an address; each side checks the other's certificate."""
    near, far = socket.socketpair()
    received: list[bytes] = []

    def serve() -> None:
        try:
            with server.context(ssl.Purpose.CLIENT_AUTH).wrap_socket(far, server_side=True) as channel:
                channel.sendall(channel.recv(5).upper())
        except OSError:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        context = client.context(ssl.Purpose.SERVER_AUTH)
        with context.wrap_socket(near, server_hostname=host) as channel:
            channel.sendall(b"hello")
            received.append(channel.recv(5))
    finally:
        near.close()
        thread.join(10)
    return received[0]


@pytest.mark.parametrize("host", [HOST, "127.0.0.1", "localhost"])
def test_two_nodes_of_a_network_can_connect(tmp_path: Path, authority: Authority, host: str) -> None:
    here, there = Node(tmp_path / "here", authority), Node(tmp_path / "there", authority)

    assert call(here, there, host) == b"HELLO"


def test_a_certificate_is_not_valid_for_another_address(tmp_path: Path, authority: Authority) -> None:
    here, there = Node(tmp_path / "here", authority), Node(tmp_path / "there", authority)

    with pytest.raises(ssl.SSLCertVerificationError):
        call(here, there, "192.0.2.8")


def test_a_node_of_another_network_cannot_connect(tmp_path: Path, authority: Authority) -> None:
    stranger = Node(tmp_path / "stranger", Authority.new("azu nodes", NOW))
    here = Node(tmp_path / "here", authority)

    with pytest.raises((ssl.SSLError, ConnectionError)):
        call(stranger, here, HOST)
    stranger.authority.write_bytes(authority.pem)  # even if it knows this network's authority
    with pytest.raises((ssl.SSLError, ConnectionError)):
        call(here, stranger, HOST)


def test_a_nodes_certificate_cannot_sign_others(tmp_path: Path, authority: Authority) -> None:
    key = new_key()
    pretender = Authority.load(certificate_pem(signed(authority, key)), key)

    with pytest.raises((ssl.SSLError, ConnectionError)):
        call(Node(tmp_path / "here", authority), Node(tmp_path / "there", pretender), HOST)


def shown(
    authority: Authority,
    certificate: x509.Certificate,
    signature: str,
    *,
    text: str = "let me stay",
    now: datetime = NOW,
    signed_at: datetime = NOW,
) -> None:
    signed_at_ms = round(signed_at.timestamp() * 1000)
    check_signed_text(authority.certificate, certificate, text, signature, signed_at_ms=signed_at_ms, now=now)


def test_an_expired_certificate_and_one_of_another_network_are_refused(authority: Authority) -> None:
    key = new_key()
    certificate, signature = signed(authority, key), sign_text(key, "let me stay")
    shown(authority, certificate, signature)

    with pytest.raises(Unauthenticated, match="ended"):
        shown(authority, certificate, signature, now=NOW + LIFE, signed_at=NOW + LIFE)
    with pytest.raises(Unauthenticated, match="not of this network"):
        shown(Authority.new("azu nodes", NOW), certificate, signature)


def test_only_the_certificates_own_key_signs_for_it_and_just_now(authority: Authority) -> None:
    key = new_key()
    certificate = signed(authority, key)

    for text, signature in (
        ("let me stay", sign_text(new_key(), "let me stay")),
        ("let me go", sign_text(key, "let me stay")),
        ("let me stay", "not hex"),
    ):
        with pytest.raises(Unauthenticated, match="not signed"):
            shown(authority, certificate, signature, text=text)
    for away in (timedelta(minutes=6), -timedelta(minutes=6)):
        with pytest.raises(Unauthenticated, match="clock"):
            shown(authority, certificate, sign_text(key, "let me stay"), signed_at=NOW + away)


def test_a_certificate_names_the_nodes_address(authority: Authority) -> None:
    assert hosts_of(signed(authority, new_key())) == {HOST, "127.0.0.1"}


def test_the_ingress_and_a_node_cannot_stand_for_each_other(tmp_path: Path, authority: Authority) -> None:
    """Both are valid for one address: only the authority differs, and what it signs for."""
    ingress = Node(tmp_path / "ingress", Authority.new("azu ingress", NOW))
    node, client = Node(tmp_path / "node", authority), Node(tmp_path / "client", authority)

    with pytest.raises((ssl.SSLError, ConnectionError)):
        call(ingress, client, HOST)  # a node calls what has only the ingress's certificate
    client.authority.write_bytes(ingress.authority.read_bytes())
    with pytest.raises((ssl.SSLError, ConnectionError)):
        call(node, client, HOST)  # a user calls what has only a node's certificate


def test_the_ingress_is_no_client_of_rays(tmp_path: Path, authority: Authority) -> None:
    ingress, there = Node(tmp_path / "ingress", authority), Node(tmp_path / "there", authority)
    key = read_request(new_request(ingress.key.read_bytes()))
    server_only = authority.sign(key, [HOST], NOW, LIFE, is_client=False)
    ingress.certificate.write_bytes(certificate_pem(server_only))

    with pytest.raises((ssl.SSLError, ConnectionError)):
        call(there, ingress, HOST)


def test_a_request_that_another_key_signed_is_refused() -> None:
    mine, others = (x509.load_pem_x509_csr(new_request(new_key())) for _ in range(2))
    # Both have the same length; only the key differs.
    point = {"encoding": Encoding.X962, "format": PublicFormat.UncompressedPoint}
    der = mine.public_bytes(Encoding.DER)
    swapped = der.replace(mine.public_key().public_bytes(**point), others.public_key().public_bytes(**point))
    assert swapped != der

    with pytest.raises(InvalidRequest, match="its own key"):
        read_request(ssl.DER_cert_to_PEM_cert(swapped).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode())


@pytest.mark.parametrize(
    "pem", [b"", b"hello", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"]
)
def test_bytes_that_are_no_request_are_refused(pem: bytes) -> None:
    with pytest.raises(InvalidRequest, match="no certificate request"):
        read_request(pem)


def test_a_request_for_a_kind_of_key_that_is_not_known_is_refused() -> None:
    der = x509.load_pem_x509_csr(new_request(new_key())).public_bytes(Encoding.DER)
    unknown = der.replace(bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06072a8648ce3d027f"))
    assert unknown != der

    with pytest.raises(InvalidRequest, match="no certificate request"):
        read_request(ssl.DER_cert_to_PEM_cert(unknown).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode())


def test_an_authority_is_the_same_after_its_files_are_read(authority: Authority) -> None:
    again, key = Authority.load(authority.pem, authority.key_pem), new_key()

    shown(again, signed(authority, key), sign_text(key, "let me stay"))
    with pytest.raises(ValueError, match="PEM"):
        Authority.load(authority.pem, b"damaged")

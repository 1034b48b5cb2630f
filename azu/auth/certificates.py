"""A network's own certificate authorities: the certificates that they sign, and how a node requests one.

One authority signs for the nodes and another for the ingress: no certificate of the one stands for the other.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from azu.errors import InvalidRequest, Unauthenticated

AUTHORITY_LIFE = timedelta(days=3650)
# The head gets new certificates at every start of its network. They have to last as long as it runs: Ray
# reads its own once, and the head cannot be started again without ending the network.
HEAD_LIFE = timedelta(days=397)
# An older signature may have been recorded by another party.
FRESH_MS = 300_000
# The clocks of two machines may differ by this much.
_SKEW = timedelta(minutes=10)
_LOOPBACK = ("127.0.0.1", "localhost")
# Digits of a node's id, and how many of them are of the hash of its machine's key.
_NODE_ID_DIGITS, _OWN_DIGITS = 56, 40


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs certificates of one network; its key lies with the books, where no process of Ray reads it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls, common_name: str, now: datetime) -> "Authority":
        """Return an authority with a new key; its name tells people what it signs."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(common_name)
        certificate = (
            _certificate(name, name, key.public_key(), now, AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, certificate_pem: bytes, key_pem: bytes) -> "Authority":
        """Return the authority of two files; raises ValueError for malformed ones."""
        return cls(x509.load_pem_x509_certificate(certificate_pem), _private_key(key_pem))

    @property
    def pem(self) -> bytes:
        """The authority's certificate, which is public."""
        return certificate_pem(self.certificate)

    @property
    def key_pem(self) -> bytes:
        """The authority's key."""
        return _key_pem(self.key)

    def sign(
        self,
        key: ec.EllipticCurvePublicKey,
        hosts: Iterable[str],
        now: datetime,
        life: timedelta,
        *,
        is_client: bool = True,
    ) -> x509.Certificate:
        """Return a certificate for a key, valid for `hosts` and on the holder's own machine.

        Every Ray process is a server and a client; the ingress is no client.
        """
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, *([ExtendedKeyUsageOID.CLIENT_AUTH] if is_client else ())]
        return (
            _certificate(_name("azu node"), self.certificate.subject, key, now, life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(_alternatives(hosts)), critical=False)
            .sign(self.key, hashes.SHA256())
        )


def check_signed_text(
    authority: x509.Certificate,
    certificate: x509.Certificate,
    text: str,
    signature: str,
    *,
    signed_at_ms: int,
    now: datetime,
) -> None:
    """Raise Unauthenticated unless the holder of a certificate of this authority signed a text just now."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise Unauthenticated("this certificate is not of this network") from error
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise Unauthenticated("this certificate has ended; ask for a new ticket")
    try:
        public_key(certificate).verify(bytes.fromhex(signature), text.encode(), ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature) as error:
        raise Unauthenticated("this was not signed by the certificate's key") from error
    if abs(now.timestamp() * 1000 - signed_at_ms) > FRESH_MS:
        raise Unauthenticated("the signature is too old or from the future; set the machine's clock")


def hosts_of(certificate: x509.Certificate) -> frozenset[str]:
    """Return the addresses that a certificate is valid for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return frozenset(map(str, names.get_values_for_type(x509.IPAddress)))


def utc_now() -> datetime:
    """Return the wall clock."""
    return datetime.now(UTC)


def new_key() -> bytes:
    """Return a new private key as PEM."""
    return _key_pem(ec.generate_private_key(ec.SECP256R1()))


def new_request(key_pem: bytes) -> bytes:
    """Return a request, signed by a private key, for a certificate of that key."""
    request = x509.CertificateSigningRequestBuilder().subject_name(_name("azu node"))
    return request.sign(_private_key(key_pem), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def sign_text(key_pem: bytes, text: str) -> str:
    """Return a private key's signature of a text, in hex."""
    return _private_key(key_pem).sign(text.encode(), ec.ECDSA(hashes.SHA256())).hex()


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def read_certificate(pem: bytes) -> x509.Certificate:
    """Return a certificate; raises InvalidRequest for malformed PEM."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise InvalidRequest("this is no certificate", param="certificate") from error


def public_key(
    holder: x509.Certificate | x509.CertificateSigningRequest,
) -> ec.EllipticCurvePublicKey:
    """Return the public key of a certificate or request; raises InvalidRequest for other kinds of keys."""
    key = holder.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidRequest("a node's key lies on the curve P-256", param="request")
    return key


def key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key, in hex."""
    return sha256(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).hexdigest()


def new_node_id(digest: str = "") -> str:
    """Return a new id for a Ray node; it begins like the hash of its machine's key, if it has one."""
    own = digest[:_OWN_DIGITS]
    return own + secrets.token_hex((_NODE_ID_DIGITS - len(own)) // 2)


def is_id_of(node_id: str, digest: str) -> bool:
    """Whether an id is one of the machine whose key has this hash."""
    return node_id.startswith(digest[:_OWN_DIGITS])


def read_request(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key of a request; raises InvalidRequest unless that key signed the request."""
    try:
        request = x509.load_pem_x509_csr(pem)
        is_signed, key = request.is_signature_valid, public_key(request)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidRequest("this is no certificate request", param="request") from error
    if not is_signed:
        raise InvalidRequest("this request was not signed by its own key", param="request")
    return key


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def _alternatives(hosts: Iterable[str]) -> list[x509.GeneralName]:
    return [_alternative(host) for host in dict.fromkeys((*hosts, *_LOOPBACK))]


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("azu's keys are elliptic curve keys")
    return key


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def restart_text(name: str, signed_at_ms: int) -> str:
    """Return the text that a node signs to ask for its turn to be started again."""
    return f"azu node {name} asks at {signed_at_ms} for its turn"


def renewal_text(signed_at_ms: int) -> str:
    """Return the text that a node signs to have its certificate renewed."""
    return f"azu node renewal at {signed_at_ms}"


def payout_text(node_id: str, payout: str, name: str, work_bytes_per_s: int, signed_at_ms: int) -> str:
    """Return what a node's key signs to have the work of a Ray node be paid to an address.

    `work_bytes_per_s` is the most work that the node can do in a second, as it measured.
    """
    node = f"azu node {node_id} named {name} with {work_bytes_per_s} bytes/s"
    return f"{node} is paid to {payout} as of {signed_at_ms}"

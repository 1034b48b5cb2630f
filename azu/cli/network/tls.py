"""The files that encrypt a machine's part of a network: its certificate, its key, the network's authority."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from azu.cli.private_file import write_private
from azu.errors import ConfigurationError

if TYPE_CHECKING:
    from azu.auth.certificates import Authority


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where one machine's certificate and key lie, and the certificate of who signed all of them."""

    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def of(cls, folder: Path) -> "TlsFiles":
        """Return the files of a folder, whether they are there or not."""
        return cls(folder / "node.crt", folder / "node.key", folder / "authority.crt")

    def ray_environment(self) -> dict[str, str]:
        """Return what makes Ray encrypt all it says to other processes, and ask them for a certificate."""
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(self.certificate),
            "RAY_TLS_SERVER_KEY": str(self.key),
            "RAY_TLS_CA_CERT": str(self.authority),
        }

    def write(self, certificate_pem: bytes, authority_pem: bytes) -> None:
        """Put a new certificate in place of the old one."""
        write_private(self.authority, authority_pem.decode())
        # The whole chain: whoever asks for the authority is given it.
        write_private(self.certificate, (certificate_pem + authority_pem).decode())


def head_files(folder: Path, hosts: Iterable[str]) -> TlsFiles:
    """Return a new certificate of the head, by the network's authority, which is made when there is none.

    Raises ConfigurationError when the authority's files are damaged.
    """
    from azu.auth.certificates import HEAD_LIFE, certificate_pem, new_key, new_request, read_request, utc_now

    authority = _authority(folder)
    files = TlsFiles.of(folder)
    key = new_key()
    write_private(files.key, key.decode())
    signed = authority.sign(read_request(new_request(key)), hosts, utc_now(), HEAD_LIFE)
    files.write(certificate_pem(signed), authority.pem)
    return files


def authority_key(folder: Path) -> Path:
    """Return where the head keeps the authority's key; no other machine has one."""
    return folder / "authority.key"


def _authority(folder: Path) -> "Authority":
    from azu.auth.certificates import Authority, utc_now

    certificate, key = TlsFiles.of(folder).authority, authority_key(folder)
    if not key.exists():
        made = Authority.new(utc_now())
        # The key comes last: without it nothing was made yet.
        write_private(certificate, made.pem.decode())
        write_private(key, made.key_pem.decode())
    try:
        return Authority.load(certificate.read_bytes(), key.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the authority in {folder} is damaged; without the folder `azu up` makes another, and every "
            "node needs a new ticket"
        ) from error

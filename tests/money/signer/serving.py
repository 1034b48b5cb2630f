"""The signer served as its process serves it, in a test's own loop."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.errors import Unavailable
from azu.money.chain.api import ChainClient
from azu.money.chain.networks import ChainNetwork
from azu.money.signer.calls import RemoteSigner, SignerCalls
from azu.money.signer.policy import PayoutLimit, SigningRules
from azu.money.signer.signer import SIGNER_ALLOWED, Signer
from azu.money.signer.views import PayoutKind
from azu.money.wire import Access, WireServer
from tests.money.serving import ServedBooks

ADMIN: LocalAccount = Account.from_key("0x" + "ad" * 32)
UNLIMITED = PayoutLimit(10**15, 10**15, 100)


@dataclass(frozen=True)
class ServedSigner:
    """A signer, and where other processes call it."""

    signer: Signer
    access: Access

    def client(self, caller: str) -> RemoteSigner:
        return RemoteSigner(self.access.url(caller))


def rules_of(
    platform: LocalAccount, limit: PayoutLimit = UNLIMITED, former: tuple[str, ...] = ()
) -> SigningRules:
    limits = {PayoutKind.WITHDRAWAL: limit, PayoutKind.EARNINGS: limit}
    return SigningRules(limits, frozenset({ADMIN.address.lower()}), (platform.address.lower(), *former))


@asynccontextmanager
async def signing(
    platform: LocalAccount,
    network: ChainNetwork,
    books: ServedBooks,
    *,
    look_s: float,
    former: tuple[str, ...] = (),
) -> AsyncIterator[ServedSigner]:
    """Serve a signer that remembers nothing and looks at books and chain all the time."""
    chain, view = ChainClient(network), books.client("signer")
    access = Access.new(0, SIGNER_ALLOWED)
    with tempfile.TemporaryDirectory() as folder:
        signer = Signer(
            platform, chain, view, rules_of(platform, former=former), Path(folder) / "signer.json"
        )
        server = WireServer(SignerCalls, signer, access.secrets, SIGNER_ALLOWED)

        async def look() -> None:
            while True:
                await asyncio.sleep(look_s)
                with suppress(Unavailable):
                    await signer.look()

        looking = asyncio.create_task(look())
        try:
            yield ServedSigner(signer, Access(await server.start(), access.secrets))
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            await server.close()
            await view.close()
            await chain.close()

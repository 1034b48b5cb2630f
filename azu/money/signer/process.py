"""The signer's process: the only one that has the platform's key, until a signal stops it."""

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from eth_account.signers.local import LocalAccount

from azu.errors import InternalError
from azu.metrics import Meter
from azu.money.books import Books
from azu.money.chain.api import ChainClient
from azu.money.chain.networks import ChainNetwork
from azu.money.signer.calls import SignerCalls
from azu.money.signer.policy import SigningRules
from azu.money.signer.signer import SIGNER_ALLOWED, Signer
from azu.money.wire import Access, WireServer
from azu.supervision import Supervisor


@dataclass(frozen=True, slots=True)
class SignerConfig:
    """What the signer runs with. `account` holds the platform's key: nothing prints it.

    It reads the chain over a connection of its own, remembers in the file `memory`, and looks at books and
    chain every `look_s`, also while nothing has to be signed.
    """

    account: LocalAccount = field(repr=False)
    network: ChainNetwork
    books_url: str = field(repr=False)
    rules: SigningRules
    access: Access
    memory: Path
    look_s: float = 5.0


async def run(config: SignerConfig, *, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; call `ready` once it listens.

    The process waits for books or a chain that are away. Raises InternalError when a loop cannot go on.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    chain, books = ChainClient(config.network), Books(config.books_url)
    signer = Signer(config.account, chain, books, config.rules, config.memory)
    server = WireServer(SignerCalls, signer, config.access.secrets, SIGNER_ALLOWED)
    supervisor = Supervisor("signer", Meter(), stop.set)
    await server.start(config.access.port)
    supervisor.start("look", signer.look, every_s=config.look_s)
    ready()
    try:
        await stop.wait()
    finally:
        await supervisor.stop()
        await server.close()
        await books.close()
        await chain.close()
    if not supervisor.is_healthy:
        raise InternalError("a loop of the signer cannot go on; its log says why")

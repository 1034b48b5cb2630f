"""A new key of the platform: all that was signed for the old one stays good, and nothing leaves twice."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from azu.auth.succession import platforms_of, read_successions, sign_succession, successor_of
from azu.devnet.chain import USDC
from azu.errors import ChainError, ConfigurationError, Conflict
from azu.money.chain.api import ChainClient
from azu.money.chain.port import Refusal
from azu.money.chain.rows import KEPT_LAMPORTS, balance_of
from azu.money.chain.wallet import send_hype
from azu.money.ledger.durability import DURABLE_CONFIG
from azu.money.ledger.transfers import PlatformReplaced
from azu.money.signer.rotation import rotate
from azu.money.signer.views import TransferRequest
from azu.redis_client import retry_until_available
from tests.few import few
from tests.money.chain.running import RunningDevnet
from tests.money.signer.test_signer import HYPE, Scene
from tests.money.treasury.world import World
from tests.redis_server import start_redis


@dataclass
class Rotated:
    """A network that runs with an old key, then with a new one: the same books, memory and chain."""

    devnet: RunningDevnet
    redis_url: str
    folder: Path
    user: LocalAccount | None = None

    def __post_init__(self) -> None:
        self.old, self.new = Account.create(), Account.create()
        self.before, self.after = self.old.address.lower(), self.new.address.lower()
        self.memory, self.record = self.folder / "signer.json", self.folder / "platforms.json"
        world = World(self.devnet, self.redis_url, self.old, self.folder / "ledger", look_s=3600.0)
        self.first = world
        successions = (sign_succession(self.old, self.new),)
        self.second = replace(world, platform=self.new, successions=successions)

    def runs(self, world: World, scenario: Callable[[Scene], Awaitable[None]]) -> None:
        """Run a scenario with one of the two keys."""

        async def inside(parts: object) -> None:
            self.user = self.user or world.payer()
            scene = Scene(world, parts, self.memory, self.user, None)  # type: ignore[arg-type]
            scene.start()
            scene.withdrawals = 10 if world.former else 0
            # A busy machine may not answer in time.
            await retry_until_available(scene.parts.watcher.poll, within_s=60)
            await retry_until_available(scene.signer.look, within_s=60)
            try:
                await scenario(scene)
            finally:
                for chain in scene.chains:
                    await chain.close()

        world.run(inside)

    def rotates(self, chain: ChainClient | None = None) -> int:
        """Replace the key as the command does it, while no network runs."""

        async def run() -> int:
            used = chain or ChainClient(self.devnet.network)
            try:
                return await rotate(used, self.old, self.new, self.memory, self.record)
            finally:
                await used.close()

        return asyncio.run(run())

    def held(self, *addresses: str) -> list[int]:
        async def ask() -> list[int]:
            chain = ChainClient(self.devnet.network)
            found = [await chain.spot_balance(one) for one in addresses]
            await chain.close()
            return found

        return asyncio.run(ask())


@pytest.fixture
def rotated(devnet_server: RunningDevnet, redis_url: str, tmp_path: Path) -> Rotated:
    made = Rotated(devnet_server, redis_url, tmp_path)
    devnet_server.fund(made.before, 10**9, token=USDC.full_id)
    return made


async def begin(scene: Scene) -> None:
    await scene.deposit(HYPE)
    await scene.send(await scene.withdraw(HYPE // 4))


def test_the_network_goes_on_with_the_new_key(rotated: Rotated) -> None:
    asked: list[TransferRequest] = []

    async def before(scene: Scene) -> None:
        await begin(scene)
        asked.append(await scene.withdraw(HYPE // 8))

    async def after(scene: Scene) -> None:
        assert await scene.findings() == ()
        # What was asked for the old address, and set aside, is sent by the new one, once.
        await scene.send(asked[0])
        # A deposit at the old address, which a client did not know better, is credited.
        assert scene.user is not None
        await send_hype(scene.parts.chain, scene.user, rotated.before, HYPE // 2)
        await scene.parts.watcher.poll()
        assert await scene.parts.available(scene.user) == HYPE - HYPE // 4 - HYPE // 8 + HYPE // 2
        await scene.send(await scene.withdraw(HYPE // 16))
        assert await scene.findings() == ()
        assert scene.received(asked[0].address) == 2
        wallet = await balance_of(scene.parts.chain, (rotated.after, rotated.before))
        report = await scene.parts.ledger.audit(wallet)
        assert (report.agrees, report.findings) == (True, ())
        noted = await scene.parts.ledger.result(f"platform:{rotated.after}")
        assert noted is not None
        assert noted.entry.transfer == PlatformReplaced(
            id=f"platform:{rotated.after}", **asdict(read_successions(rotated.record)[0])
        )

    rotated.runs(rotated.first, before)
    moved = rotated.rotates()
    assert moved == HYPE - HYPE // 4 - KEPT_LAMPORTS
    assert rotated.held(rotated.before, rotated.after) == [KEPT_LAMPORTS, moved]
    successions = read_successions(rotated.record)
    assert platforms_of(rotated.after, successions) == (rotated.after, rotated.before)
    assert successor_of(rotated.before, successions) == rotated.after
    rotated.runs(rotated.second, after)
    # What came later is moved by the same command, and changes nothing in the books.
    assert rotated.rotates() == HYPE // 2

    async def agrees(scene: Scene) -> None:
        assert await scene.findings() == ()

    rotated.runs(rotated.second, agrees)


@pytest.mark.parametrize("how", few(["by the same command", "with its record"]))
def test_a_copy_from_before_a_rotation_goes_on(
    devnet_server: RunningDevnet, tmp_path: Path, how: str
) -> None:
    home, copy = tmp_path / "home", tmp_path / "copy"
    store = start_redis(home / "redis", DURABLE_CONFIG)
    rotated = Rotated(devnet_server, store.url, home)
    devnet_server.fund(rotated.before, 10**9, token=USDC.full_id)

    async def after(scene: Scene) -> None:
        assert await scene.findings() == ()
        await scene.send(await scene.withdraw(HYPE // 16))
        assert await scene.findings() == ()
        assert scene.user is not None
        assert await scene.parts.available(scene.user) == HYPE - HYPE // 4 - HYPE // 16

    try:
        rotated.runs(rotated.first, begin)
        shutil.copytree(home, copy)
        rotated.rotates()
        record = rotated.record.read_text()
        store.kill()
        shutil.rmtree(home)
        copy.rename(home)
        store = start_redis(home / "redis", DURABLE_CONFIG)
        second = replace(rotated.second, redis_url=store.url)

        if how == "with its record":
            rotated.record.write_text(record)
        else:
            assert rotated.rotates() == 0, "the money has moved"

        assert platforms_of(rotated.after, read_successions(rotated.record))[1:] == (rotated.before,)
        rotated.runs(second, after)
    finally:
        store.kill()


def test_what_the_old_key_signed_is_executed_no_more(rotated: Rotated) -> None:
    signed: list[tuple[TransferRequest, str]] = []

    async def before(scene: Scene) -> None:
        await begin(scene)
        asked = await scene.withdraw(HYPE // 8)
        signed.append((asked, await scene.signer.transfer(asked)))

    async def after(scene: Scene) -> None:
        asked, body = signed[0]
        refusal = await scene.parts.chain.post_action(body.encode())
        assert refusal is not None
        assert refusal.nonce_used
        # Nor does the new key sign it: whether the old bytes were executed the treasury finds out first.
        with pytest.raises(Conflict):
            await scene.signer.transfer(asked)
        assert scene.received(asked.address) == 0, "of the new address"

    rotated.runs(rotated.first, before)
    rotated.rotates()
    rotated.devnet.fund(rotated.before, HYPE)
    rotated.runs(rotated.second, after)


@pytest.mark.prove
def test_who_has_the_old_key_ends_no_signing_and_no_payout(rotated: Rotated) -> None:
    async def after(scene: Scene) -> None:
        assert scene.user is not None
        asked = await scene.withdraw(HYPE // 8)
        await send_hype(scene.parts.chain, rotated.old, scene.user.address, 1)
        await scene.parts.watcher.poll()
        assert not scene.parts.watcher.has_left_otherwise(asked.address), "its open payout goes on"
        # The books take it from who got it.
        assert await scene.findings() == ()
        await scene.send(asked)
        assert await scene.parts.available(scene.user) == HYPE - HYPE // 4 - HYPE // 8 - 1
        assert await scene.findings() == ()
        await scene.send(await scene.withdraw(HYPE // 16))

    rotated.runs(rotated.first, begin)
    rotated.rotates()
    rotated.runs(rotated.second, after)


class Dying(ChainClient):
    """A chain that does not answer one of the posts, before or after it carried the action out."""

    def __init__(self, devnet: RunningDevnet, at: int, is_executed: bool) -> None:
        super().__init__(devnet.network)
        self._left, self._is_executed = at, is_executed

    async def post_action(self, body: bytes) -> Refusal | None:
        self._left -= 1
        if self._left < 0:
            if self._is_executed:
                await super().post_action(body)
            raise ChainError("the chain did not answer")
        return await super().post_action(body)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("is_executed", [False, True])
def test_a_rotation_that_ended_anywhere_is_finished_by_the_next(
    rotated: Rotated, at: int, is_executed: bool
) -> None:
    async def before(scene: Scene) -> None:
        await begin(scene)
        await scene.signer.transfer(await scene.withdraw(HYPE // 8))

    async def after(scene: Scene) -> None:
        assert await scene.findings() == ()
        await scene.send(await scene.withdraw(HYPE // 16))
        assert await scene.findings() == ()

    rotated.runs(rotated.first, before)
    with pytest.raises(ChainError):
        # First the nonce of what was signed, then the money.
        rotated.rotates(Dying(rotated.devnet, at, is_executed))
    is_recorded = successor_of(rotated.before, read_successions(rotated.record)) is not None
    assert is_recorded is (at == 1)
    rotated.rotates()

    assert rotated.held(rotated.before, rotated.after) == [
        KEPT_LAMPORTS,
        HYPE - HYPE // 4 - KEPT_LAMPORTS,
    ]
    assert len(read_successions(rotated.record)) == 1
    rotated.runs(rotated.second, after)


class Dusted(ChainClient):
    """A chain on which a stranger pays the old address as soon as its money has left."""

    def __init__(self, devnet: RunningDevnet, address: str) -> None:
        super().__init__(devnet.network)
        self._devnet, self._address = devnet, address

    async def post_action(self, body: bytes) -> Refusal | None:
        refusal = await super().post_action(body)
        await asyncio.to_thread(self._devnet.fund, self._address, 1)
        return refusal


def test_a_move_has_succeeded_though_a_stranger_pays_the_old_address_meanwhile(
    rotated: Rotated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("azu.money.signer.rotation._LOOKS", 2)
    rotated.runs(rotated.first, begin)
    moved = rotated.rotates(Dusted(rotated.devnet, rotated.before))
    assert rotated.held(rotated.before, rotated.after) == [KEPT_LAMPORTS + 1, moved]


def test_nothing_is_replaced_where_no_signer_says_what_was_signed(rotated: Rotated) -> None:
    rotated.runs(rotated.first, begin)
    before = rotated.held(rotated.before, rotated.after)
    rotated.memory.unlink()
    with pytest.raises(ConfigurationError, match=r"no .*signer\.json"):
        rotated.rotates()
    assert (rotated.held(rotated.before, rotated.after), rotated.record.exists()) == (before, False)


def test_a_key_is_not_replaced_by_one_of_before_or_one_that_cannot_be_paid(rotated: Rotated) -> None:
    rotated.runs(rotated.first, begin)
    rotated.rotates()
    rotated.old, rotated.new = rotated.new, rotated.old
    with pytest.raises(Conflict, match="was the platform's address before"):
        rotated.rotates()
    # Nor does a key get a second successor: clients could not tell which one is meant.
    live, rotated.old, rotated.new = rotated.old, rotated.new, Account.create()
    with pytest.raises(Conflict, match="was replaced by"):
        rotated.rotates()
    rotated.old = live
    # The new address has no dollars for the chain's fee, so that it pays no address that is new to the chain.
    rotated.new = Account.create()
    with pytest.raises(Conflict, match="its fee is not paid for"):
        rotated.rotates()
    assert len(read_successions(rotated.record)) == 1

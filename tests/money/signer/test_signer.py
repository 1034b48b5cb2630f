"""The signer over real books, a real Redis and a real devnet: when it signs, and what it remembers."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from eth_account.signers.local import LocalAccount

from azu.auth.signatures import (
    AcceptLoss,
    ConfirmPayout,
    CoverLoss,
    Withdrawal,
    is_certified,
    sign_claim,
    sign_command,
    sign_withdrawal,
)
from azu.clock import wall_clock_ms
from azu.errors import ConfigurationError, Conflict, Forbidden, InvalidRequest, RateLimited, Unavailable
from azu.money.chain.api import ChainClient
from azu.money.chain.wallet import send_hype
from azu.money.ledger.durability import DURABLE_CONFIG
from azu.money.ledger.transfers import Deposit, LossAccepted, WithdrawalPlanned
from azu.money.signer import policy
from azu.money.signer.policy import PayoutLimit, nonce_for
from azu.money.signer.signer import Signer
from azu.money.signer.views import PayoutKind, TransferRequest
from tests.money.chain.running import RunningDevnet
from tests.money.ledger import moves
from tests.money.serving import TERMS
from tests.money.signer.serving import ADMIN, UNLIMITED, rules_of
from tests.money.treasury.world import Open, World
from tests.redis_server import Rewindable, start_redis

HYPE = 10**8


@dataclass
class Scene:
    """A platform with one user's deposit, and the signers of it that a test starts."""

    world: World
    parts: Open
    file: Path
    user: LocalAccount
    signer: Signer
    limit: PayoutLimit = UNLIMITED
    withdrawals: int = 0
    chains: list[ChainClient] = field(default_factory=list)

    def start(self) -> Signer:
        """Start the signer, or another one in its place that knows what the file says."""
        chain = ChainClient(self.world.devnet.network)
        self.chains.append(chain)
        rules = rules_of(self.world.platform, self.limit, self.world.former)
        self.signer = Signer(self.world.platform, chain, self.parts.books.client("signer"), rules, self.file)
        return self.signer

    async def deposit(self, lamports: int) -> None:
        await self.parts.pay_platform(self.user, lamports)
        await self.parts.watcher.poll()

    async def withdraw(self, lamports: int) -> TransferRequest:
        """Have the books set a withdrawal aside that the user signed."""
        self.withdrawals += 1
        address, platform = self.user.address.lower(), self.world.platform.address.lower()
        asked = Withdrawal(
            address=address,
            lamports=lamports,
            nonce=self.withdrawals,
            expires_at_ms=wall_clock_ms() + 600_000,
        )
        nonce = nonce_for(PayoutKind.WITHDRAWAL, asked.payout_id, wall_clock_ms())
        planned = WithdrawalPlanned(
            id=f"{asked.payout_id}:planned",
            payout_id=asked.payout_id,
            address=address,
            lamports=lamports,
            nonce=nonce,
            expires_at_ms=asked.expires_at_ms,
            signature=sign_withdrawal(self.user, asked, platform),
        )
        await self.parts.book(planned)
        return TransferRequest(asked.payout_id, PayoutKind.WITHDRAWAL, address, lamports, nonce)

    async def earned(self, lamports: int) -> str:
        """Have the user's job pay a worker, who has claimed it; return the worker's address."""
        worker, user = self.world.payer(), self.user.address.lower()
        address, platform = worker.address.lower(), self.world.platform.address.lower()
        await self.parts.book(
            moves.open_key(user),
            moves.reserve("job-1", lamports, address=user),
            replace(moves.settle("job-1", lamports), platform_lamports=0, shares={address: lamports}),
        )
        await self.parts.ledger.claim_earnings(address, sign_claim(worker, platform))
        return address

    async def plan_earnings(self, payout_id: str, address: str, lamports: int) -> TransferRequest:
        """Have the books set earnings aside."""
        nonce = nonce_for(PayoutKind.EARNINGS, address, wall_clock_ms())
        await self.parts.book(moves.plan_payout(payout_id, lamports, address=address, nonce=nonce))
        return TransferRequest(payout_id, PayoutKind.EARNINGS, address, lamports, nonce)

    async def send(self, asked: TransferRequest) -> None:
        assert await self.parts.chain.post_action((await self.signer.transfer(asked)).encode()) is None

    async def findings(self) -> tuple[str, ...]:
        await self.signer.look()
        return (await self.signer.status()).findings

    def received(self, address: str) -> int:
        """Return how many transfers of the platform an address got."""
        rows = self.world.devnet.info("userNonFundingLedgerUpdates", address, startTime=0)
        return sum(row["delta"].get("user") == self.world.platform.address.lower() for row in rows)


Copies = Callable[[], AbstractAsyncContextManager[Scene]]


def play(
    world: World, file: Path, scenario: Callable[[Scene], Awaitable[None]], *, deposited: int = HYPE
) -> None:
    """Run a scenario with a signer that has seen a network from its beginning."""

    async def inside(parts: Open) -> None:
        scene = Scene(world, parts, file, world.payer(), None)  # type: ignore[arg-type]
        try:
            scene.start()
            await parts.watcher.poll()
            # On a busy machine the chain may not answer the first look in time.
            async with asyncio.timeout(60):
                while await scene.findings():
                    await asyncio.sleep(0.05)
            await scene.deposit(HYPE)
            await scenario(scene)
        finally:
            for chain in scene.chains:
                await chain.close()

    # Without the looks of another signer.
    replace(world, look_s=3600.0).run(inside)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "signer.json"


def test_a_withdrawal_is_signed_once_and_arrives(world: World, file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        asked = await scene.withdraw(HYPE // 2)
        await scene.send(asked)
        # The same bytes again: the chain takes a nonce once.
        assert await scene.signer.transfer(asked) == await scene.start().transfer(asked)
        assert scene.received(asked.address) == 1
        assert await scene.findings() == ()
        assert file.stat().st_mode & 0o777 == 0o600

    play(world, file, scenario)


def test_nothing_is_signed_for_a_credit_that_no_row_shows(world: World, file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        asked = await scene.withdraw(HYPE // 2)
        await scene.signer.transfer(asked)
        world.devnet.fund(world.platform.address, 10 * HYPE)
        await scene.parts.book(Deposit(id="deposit:0x1", address=asked.address, lamports=HYPE, at_ms=1))
        with pytest.raises(Unavailable, match="no row of the chain shows 0x1") as refused:
            await scene.signer.transfer(await scene.withdraw(HYPE))
        assert refused.value.code == "nothing_signed"
        with pytest.raises(Unavailable):
            await scene.signer.certify("0x" + "12" * 20)

    play(world, file, scenario)


def test_nothing_is_signed_while_the_account_lacks_what_the_books_owe(world: World, file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        # A transfer that this signer did not sign takes a part away, as a thief with the key would.
        asked = await scene.withdraw(HYPE // 2)
        thief = world.payer().address.lower()
        await send_hype(scene.parts.chain, world.platform, thief, HYPE // 4)
        with pytest.raises(Unavailable, match=f"lacks {HYPE // 4} lamports") as refused:
            await scene.signer.transfer(asked)
        assert f"another process sent {HYPE // 4} lamports to {thief}" in refused.value.message

    play(world, file, scenario)


def test_after_a_theft_it_goes_on_once_the_owner_has_paid_for_it(
    world: World, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(scene: Scene) -> None:
        # From here on: by then a slow machine's books may be that old already.
        monkeypatch.setattr(policy, "QUARANTINE_MS", 500)
        platform, ledger = world.platform.address.lower(), scene.parts.ledger
        asked = await scene.withdraw(HYPE // 2)
        await send_hype(scene.parts.chain, world.platform, world.payer().address, HYPE // 4)
        await scene.parts.watcher.poll()
        assert len(await scene.findings()) == 2
        head, life = await ledger.head(), {"nonce": 1, "expires_at_ms": wall_clock_ms() + 60_000}
        accepted = AcceptLoss(number=head.number, hash=head.hash, **life)
        await scene.signer.accept(sign_command(ADMIN, accepted, platform))
        await asyncio.sleep(0.6)
        world.devnet.fund(ADMIN.address, HYPE)
        await scene.parts.deposit(ADMIN, HYPE // 4)
        assert await scene.findings() == (
            f"the platform's account lacks {HYPE // 4} lamports of what the books owe",
        ), "a deposit is owed to its owner"

        covers = CoverLoss(address=ADMIN.address.lower(), lamports=HYPE // 4, **life)
        await ledger.command(sign_command(ADMIN, covers, platform))

        assert await scene.findings() == ()
        await scene.send(asked)

    play(replace(world, terms=replace(TERMS, admins=(ADMIN.address.lower(),))), file, scenario)


def test_a_payout_hidden_by_dust_is_found_in_its_recipients_ledger(world: World, file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        asked = await scene.withdraw(HYPE // 2)
        hide_from(scene, world.platform.address)
        await scene.send(asked)
        assert await scene.findings() == ()
        # Also once the treasury has ended it, and in a signer that has just started.
        await scene.parts.book(moves.paid(asked.payout_id))
        for signer in (scene.signer, scene.start()):
            scene.signer = signer
            assert await scene.findings() == ()
            await signer.transfer(await scene.withdraw(HYPE // 8))

    play(world, file, scenario)


def test_a_payout_that_no_ledger_shows_is_ended_by_an_admin(world: World, file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        asked = await scene.withdraw(HYPE // 2)
        hide_from(scene, world.platform.address, asked.address)
        await scene.send(asked)
        with pytest.raises(Unavailable, match="lacks"):
            await scene.signer.transfer(await scene.withdraw(HYPE // 8))
        platform, life = (
            world.platform.address.lower(),
            {"nonce": 1, "expires_at_ms": wall_clock_ms() + 60_000},
        )
        confirmed = ConfirmPayout(payout_id=asked.payout_id, **life)
        with pytest.raises(Forbidden):
            await scene.parts.ledger.command(sign_command(scene.user, confirmed, platform))

        await scene.parts.ledger.command(sign_command(ADMIN, confirmed, platform))

        assert await scene.findings() == ()
        assert await scene.parts.available(scene.user) == HYPE // 2 - HYPE // 8

    play(replace(world, terms=replace(TERMS, admins=(ADMIN.address.lower(),))), file, scenario)


def hide_from(scene: Scene, *addresses: str) -> None:
    """Fill the ledgers of addresses with dust in the millisecond in which the next transfer happens."""
    devnet = scene.world.devnet
    for number, address in enumerate(addresses):
        if number:
            devnet.fault("same_time")
        devnet.contract(address, 1, sender=address_of(number), count=500)
    devnet.fault("same_time")


def address_of(number: int) -> str:
    return f"0x{number + 1:040x}"


def test_earnings_go_to_an_address_that_claimed_them_alone(world: World, file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        platform, user = world.platform.address.lower(), scene.user.address.lower()
        address = await scene.earned(HYPE)
        asked = await scene.plan_earnings("payout:1", address, HYPE)
        # The books' process itself takes no other claim; a changed store may have one.
        state = (await scene.parts.books.bookkeeper.ledger()).state
        claim = state.claims[address]
        state.claims[address] = replace(claim, signature=sign_claim(scene.user, platform))
        with pytest.raises(Forbidden, match="has not claimed"):
            await scene.signer.transfer(asked)
        with pytest.raises(Forbidden):
            await scene.signer.transfer(replace(asked, address=user))
        state.claims[address] = claim
        await scene.send(asked)
        assert scene.received(address) == 1

    play(world, file, scenario)


def test_a_limit_holds_also_after_a_restart(world: World, file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.limit = PayoutLimit(HYPE // 2, HYPE, 100)
        scene.start()
        first, second = await scene.withdraw(HYPE // 4), await scene.withdraw(HYPE // 2)
        await scene.send(first)
        await scene.signer.look()
        assert (await scene.signer.status()).day_parts == {"withdrawal": 0.25, "earnings": 0}
        for _ in range(2):
            with pytest.raises(RateLimited, match="may take"):
                await scene.signer.transfer(second)
            scene.start()
        # Also where the file is lost: the chain's rows say what was sent.
        scene.file.unlink()
        scene.start()
        assert await scene.findings() == (
            "this signer remembers nothing, and the platform's account has sent before",
        )

    play(world, file, scenario)


def test_a_nonce_that_is_used_up_pays_no_one(world: World, file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        asked = await scene.withdraw(HYPE // 2)
        body = await scene.signer.transfer(asked)
        noop = await scene.signer.noop(asked.nonce)
        assert await scene.parts.chain.post_action(noop.encode()) is None
        refusal = await scene.parts.chain.post_action(body.encode())
        assert refusal is not None
        assert refusal.nonce_used
        for signer in (scene.signer, scene.start()):
            with pytest.raises(Conflict):
                await signer.transfer(asked)
        with pytest.raises(Forbidden):
            await scene.signer.noop(asked.nonce + 4)
        assert scene.received(asked.address) == 0

    play(world, file, scenario)


def test_a_key_of_the_books_is_certified(world: World, file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        key, platform = "0x" + "12" * 20, world.platform.address.lower()
        certificate = await scene.signer.certify(key)
        assert is_certified(key, platform, certificate)
        assert not is_certified("0x" + "13" * 20, platform, certificate)
        with pytest.raises(InvalidRequest):
            await scene.signer.certify(f"{key} and what else the caller wants to have signed")

    play(world, file, scenario)


def test_a_finding_is_told_to_the_books_after_three_looks(world: World, file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.parts.book(Deposit(id="deposit:0x1", address="0x" + "12" * 20, lamports=1, at_ms=1))
        seen = []
        for _ in range(4):
            await scene.signer.look()
            seen.append(len(await scene.parts.ledger.findings()))
        assert seen == [0, 0, 0, 2], "the fourth look tells what the third one found"

    play(world, file, scenario)


def test_restored_books_pay_nothing_twice_and_go_on_after_a_command(
    devnet_server: RunningDevnet, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "QUARANTINE_MS", 1_000)
    store = Rewindable.start(tmp_path / "redis")
    world = World(devnet_server, store.server.url, folder=tmp_path / "ledger")
    command = AcceptLoss(number=0, hash="", nonce=1, expires_at_ms=wall_clock_ms() + 600_000)

    async def scenario(scene: Scene) -> None:
        position = store.position()
        paid = await scene.withdraw(HYPE // 4)
        await scene.send(paid)
        store.rewind(position)
        lost = await scene.parts.ledger.loss()
        assert lost
        # What the lost entries had sent is named, and the user has it no more.
        scene.withdrawals += 7
        await scene.parts.watcher.poll()
        assert await scene.parts.available(scene.user) == 3 * HYPE // 4
        again = await scene.withdraw(3 * HYPE // 4)
        with pytest.raises(Unavailable, match=f"went back by {lost}"):
            await scene.signer.transfer(again)
        core = await scene.parts.books.bookkeeper.ledger()
        await core.apply(LossAccepted(id="accepted", num_entries=lost, command="by an admin"))
        with pytest.raises(Unavailable, match=r"the books (have another entry|went back)"):
            await scene.signer.transfer(again)
        head = await scene.parts.ledger.head()
        accepted = replace(command, number=head.number, hash=head.hash)
        platform = world.platform.address.lower()
        with pytest.raises(Forbidden):
            await scene.signer.accept(sign_command(scene.user, accepted, platform))
        with pytest.raises(Conflict, match="do not have entry"):
            await scene.signer.accept(sign_command(ADMIN, replace(accepted, hash="other"), platform))
        await scene.signer.accept(sign_command(ADMIN, accepted, platform))
        with pytest.raises(Conflict, match="used before"):
            await scene.signer.accept(sign_command(ADMIN, accepted, platform))
        with pytest.raises(Unavailable, match="nothing is signed before"):
            await scene.signer.transfer(again)
        await asyncio.sleep(1.1)
        # The chain drops the ledger of an account that is empty.
        world.devnet.fund(world.platform.address, 1)
        await scene.send(again)
        # Everything was sent once.
        assert scene.received(paid.address) == 2
        assert await scene.parts.available(scene.user) == 0
        assert await scene.findings() == ()

    try:
        play(world, file, scenario)
    finally:
        store.server.kill()


def test_a_damaged_file_is_refused_by_name(world: World, file: Path) -> None:
    file.write_text("{")

    async def scenario(parts: Open) -> None:
        with pytest.raises(ConfigurationError, match=r"signer\.json cannot be read"):
            Scene(world, parts, file, ADMIN, None).start()  # type: ignore[arg-type]

    world.run(scenario)


def play_with_copies(
    devnet: RunningDevnet, folder: Path, scenario: Callable[[Scene, Copies], Awaitable[None]]
) -> None:
    """Run a scenario with a network, and what begins a copy of it as it is then, memory of the signer too."""
    first, second = folder / "first", folder / "second"
    store = start_redis(first / "redis", DURABLE_CONFIG)
    world = World(devnet, store.url, folder=first / "ledger")
    servers = [store]

    async def inside(scene: Scene) -> None:
        @asynccontextmanager
        async def copied() -> AsyncIterator[Scene]:
            shutil.copytree(first, second)
            servers.append(start_redis(second / "redis", DURABLE_CONFIG))
            other = replace(world, redis_url=servers[-1].url, folder=second / "ledger", look_s=3600.0)
            async with other.open() as parts:
                copy = replace(scene, world=other, parts=parts, file=second / "signer.json", chains=[])
                copy.start()
                assert await copy.findings() == ()
                yield copy
                for chain in copy.chains:
                    await chain.close()

        await scenario(scene, copied)

    try:
        play(world, first / "signer.json", inside)
    finally:
        for server in servers:
            server.kill()


def test_a_copy_of_the_network_signs_nothing_once_the_other_has(
    devnet_server: RunningDevnet, tmp_path: Path
) -> None:
    async def scenario(scene: Scene, copied: Copies) -> None:
        waiting = await scene.withdraw(HYPE // 4)
        await scene.signer.look()
        async with copied() as copy:
            await scene.send(await scene.withdraw(HYPE // 2))
            copy.withdrawals += 7
            for asked in (waiting, await copy.withdraw(HYPE // 2)):
                with pytest.raises(Unavailable, match=f"another process sent {HYPE // 2} lamports"):
                    await copy.signer.transfer(asked)
            await scene.send(waiting)
            copy.file.unlink()
            copy.start()
            assert (await copy.findings())[0].startswith("this signer remembers nothing")
            assert scene.received(waiting.address) == 2

    play_with_copies(devnet_server, tmp_path, scenario)


@pytest.mark.prove
def test_two_copies_that_pay_at_once_pay_once(devnet_server: RunningDevnet, tmp_path: Path) -> None:
    async def scenario(scene: Scene, copied: Copies) -> None:
        worker = await scene.earned(HYPE // 4)
        async with copied() as copy:
            both = scene, copy
            withdrawn = [await one.withdraw(HYPE // 4) for one in both]
            # Each copy makes an id of its own for what a worker earned.
            earned = [
                await one.plan_earnings(f"payout:{number}", worker, HYPE // 4)
                for number, one in enumerate(both)
            ]
            for payouts in (withdrawn, earned):
                # Neither has seen the other's transfer.
                bodies = [await one.signer.transfer(asked) for one, asked in zip(both, payouts, strict=True)]
                first, second = [await scene.parts.chain.post_action(body.encode()) for body in bodies]
                assert first is None
                assert second is not None
                assert second.nonce_used
                assert scene.received(payouts[0].address) == 1
            assert await scene.findings() == await copy.findings() == ()

    play_with_copies(devnet_server, tmp_path, scenario)

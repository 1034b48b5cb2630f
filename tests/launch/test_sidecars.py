"""The platform's key reaches only the signer."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from eth_account import Account

from azu.config import Settings, load_network
from azu.devnet.faucet import fund
from azu.errors import ConfigurationError
from azu.launch.processes import ProcessGroup
from azu.launch.redis_server import RedisUrls
from azu.launch.sidecars import (
    BOOKS,
    DEVNET,
    DEVNET_READY,
    SIGNER,
    TREASURY,
    TREASURY_READY,
    books_terms,
    choose_chain,
    devnet_of,
    enrol_own_node,
    owners_books,
    owners_signer,
    sidecars_running,
    start_books,
    start_devnet,
    start_signer,
    start_treasury,
    wait_for_money,
)
from azu.money.chain.networks import network_at
from azu.money.chain.wallet import transfer_hype

ADDRESS = "0x" + "a1" * 20
ADMIN = "0x" + "ad" * 20
TIMEOUT_S = 60.0


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("SCHEDULER_PRIVATE_KEY", "AZU_PRIVATE_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    return Settings(home=tmp_path, chain_url=None, platform_address=None, redis_host=None)


def test_without_a_chain_there_is_a_devnet_with_a_platform_that_stays(settings: Settings) -> None:
    first, second = choose_chain(settings), choose_chain(settings)

    assert first.is_devnet
    assert network_at(first.url).name == "devnet"
    assert first.platform_address == second.platform_address
    key_file = Path(first.signer_key["AZU_PRIVATE_KEY_FILE"])
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert Account.from_key(key_file.read_text()).address.lower() == first.platform_address


def test_a_devnet_has_a_wallet_that_signs_its_admins_commands(settings: Settings) -> None:
    named = settings.model_copy(update={"admin_addresses": (ADMIN,)})
    first, second = choose_chain(settings), choose_chain(named)

    key_file = settings.home / "devnet-admin.key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    wallet = Account.from_key(key_file.read_text()).address.lower()
    assert first.admins == (wallet,)
    assert second.admins == (wallet, ADMIN)
    assert wallet != first.platform_address


def test_a_home_without_a_network_has_no_devnet(tmp_path: Path) -> None:
    assert devnet_of(tmp_path) is None


def test_a_real_key_is_never_used_on_a_devnet(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCHEDULER_PRIVATE_KEY", "0x" + "11" * 32)

    assert "SCHEDULER_PRIVATE_KEY" not in choose_chain(settings).signer_key


def test_a_configured_chain_needs_the_platforms_address_and_key(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = settings.model_copy(update={"chain_url": "https://api.hyperliquid.xyz"})
    with pytest.raises(ConfigurationError, match="HYPERLIQUID_ADDRESS"):
        choose_chain(configured)
    named = {"platform_address": ADDRESS, "admin_addresses": (ADMIN,)}
    monkeypatch.setenv("SCHEDULER_PRIVATE_KEY", "0x" + "11" * 32)
    with pytest.raises(ConfigurationError, match="AZU_PRIVATE_KEY_FILE"):
        choose_chain(configured.model_copy(update=named))
    monkeypatch.setenv("AZU_PRIVATE_KEY_FILE", "/key")
    chain = choose_chain(configured.model_copy(update=named))

    assert not chain.is_devnet
    assert chain.admins == books_terms(load_network(None).policy, chain).admins == (ADMIN,)
    assert chain.platform_address == ADDRESS
    assert chain.signer_key == {"AZU_PRIVATE_KEY_FILE": "/key"}
    assert "SCHEDULER_PRIVATE_KEY" not in os.environ
    # A devnet of another process is no real chain.
    monkeypatch.setenv("SCHEDULER_PRIVATE_KEY", "0x" + "11" * 32)
    local = choose_chain(configured.model_copy(update={**named, "chain_url": "http://127.0.0.1:3001"}))
    assert "11" * 32 not in repr(local)


def test_the_kernel_no_longer_shows_the_key_in_the_process_environment(settings: Settings) -> None:
    script = f"""
from pathlib import Path
from azu.launch.sidecars import choose_chain
from azu.config import Settings, load_network

settings = Settings(home={str(settings.home)!r}, redis_host=None, platform_address={ADDRESS!r},
                    chain_url="http://127.0.0.1:3001")
assert "{"11" * 32}" in Path("/proc/self/environ").read_text()
assert choose_chain(settings).signer_key == {{"SCHEDULER_PRIVATE_KEY": "{"11" * 32}"}}
assert "{"11" * 32}" not in Path("/proc/self/environ").read_text()
"""
    environment = os.environ | {"SCHEDULER_PRIVATE_KEY": "11" * 32}

    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)


@pytest.mark.prove
def test_devnet_books_signer_and_treasury_come_up_on_our_redis(
    settings: Settings, tmp_path: Path, redis_url: str
) -> None:
    chain, redis = choose_chain(settings), RedisUrls.same(redis_url)
    terms = books_terms(load_network(None).policy, chain)
    with ProcessGroup(tmp_path / "services") as services, ProcessGroup(tmp_path / "treasury") as treasury:
        start_devnet(services, settings, chain)
        services.wait_until_printed(DEVNET, DEVNET_READY, TIMEOUT_S)
        books = start_books(services, settings, chain, redis.books, terms)
        signer = start_signer(services, settings, chain, books)
        wait_for_money(services, chain, TIMEOUT_S)
        start_treasury(treasury, settings, chain, redis, books, signer)
        treasury.wait_until_printed(TREASURY, TREASURY_READY, TIMEOUT_S)

        environments = {
            name: Path(f"/proc/{group.pid(name)}/environ").read_text()
            for group, name in ((services, DEVNET), (services, BOOKS), (treasury, TREASURY))
        }
        signers = Path(f"/proc/{services.pid(SIGNER)}/environ").read_text()
        # The owner of the books' machine enrols its nodes; what changes is the address alone.
        enrol_own_node(settings.home, "ada", ADDRESS, "ab" * 28, 7)
        enrol_own_node(settings.home, "ada", "0x" + "b2" * 20, "ab" * 28, 7)
        nodes = asyncio.run(audited(settings.home))

    known = devnet_of(settings.home)
    assert known is not None
    assert (known.url, known.platform_address) == (chain.url, chain.platform_address)
    assert [name for name in environments if "PRIVATE_KEY" in environments[name]] == []
    # The key is in a file, whose name alone was in the environment.
    assert Path(chain.signer_key["AZU_PRIVATE_KEY_FILE"]).read_text() not in signers
    assert chain.signer_key["AZU_PRIVATE_KEY_FILE"] not in signers
    assert nodes == 3, "the writer and two enrolments"


@pytest.mark.prove
def test_a_restarted_network_finds_its_chain_where_the_books_and_the_signer_left_it(
    settings: Settings,
) -> None:
    policy, alice = load_network(None).policy, Account.create()
    address = alice.address.lower()
    with sidecars_running(settings, policy) as running:
        fund(running.chain.url, address, 10**9)
        transfer_hype(alice, running.chain.platform_address, 500, chain_url=running.chain.url)
        asyncio.run(agreed(settings.home, address, 500))

    with sidecars_running(settings, policy) as running:
        transfer_hype(alice, running.chain.platform_address, 70, chain_url=running.chain.url)
        asyncio.run(agreed(settings.home, address, 570))


async def agreed(home: Path, address: str, lamports: int) -> None:
    """Wait until an address has so much, and the signer finds books and chain in agreement."""
    books, signer = owners_books(home), owners_signer(home)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while (await books.balance(address)).available_lamports != lamports:
                await asyncio.sleep(0.1)
            while (await signer.status()).findings:
                await asyncio.sleep(0.1)
    finally:
        await books.close()
        await signer.close()


async def audited(home: Path) -> int:
    books = owners_books(home)
    try:
        report = await books.audit()
        assert report.agrees, report.findings
        return report.entries
    finally:
        await books.close()


def test_earnings_wait_as_the_owner_says_or_a_day_and_on_a_local_chain_no_time(settings: Settings) -> None:
    policy = load_network(None).policy
    devnet = choose_chain(settings)
    real = replace(devnet, is_devnet=False)
    said = policy.model_copy(update={"earnings_mature_s": 60})

    assert books_terms(policy, devnet).maturity_ms == 0
    assert books_terms(policy, real).maturity_ms == 86_400_000
    assert books_terms(said, devnet).maturity_ms == books_terms(said, real).maturity_ms == 60_000

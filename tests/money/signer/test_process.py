"""The signer as a real process: what it refuses to start with, what others see of it, what outlives it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from azu.errors import Forbidden
from azu.launch.processes import free_port
from azu.money.signer.calls import RemoteSigner
from azu.money.signer.signer import SIGNER_ALLOWED
from azu.money.wire import Access
from tests.few import few
from tests.money.signer.serving import ADMIN
from tests.money.treasury.world import Open, World

SIGNER = [sys.executable, "-m", "azu.cli", "signer"]
STRANGER = "0x" + "12" * 20


def environment(world: World, home: Path, books_url: str) -> dict[str, str]:
    return os.environ | {
        "AZU_HOME": str(home),
        "HYPERLIQUID_RPC_URL": world.devnet.url,
        "HYPERLIQUID_ADDRESS": world.platform.address,
        "AZU_ADMIN_ADDRESSES": ADMIN.address,
        "AZU_BOOKS_URL": books_url,
        "SCHEDULER_PRIVATE_KEY": world.platform.key.hex(),
    }


@contextmanager
def running(world: World, home: Path, parts: Open) -> Iterator[subprocess.Popen[str]]:
    variables = environment(world, home, parts.books.access.url("signer"))
    process = subprocess.Popen(
        SIGNER, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "signer ready\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


async def agrees(signer: RemoteSigner) -> None:
    while (await signer.status()).findings:
        await asyncio.sleep(0.05)


def test_it_signs_for_its_callers_shows_no_key_and_remembers_after_its_end(
    world: World, tmp_path: Path
) -> None:
    access = Access.new(free_port(), SIGNER_ALLOWED)
    access.write(tmp_path / "signer-calls.json")
    alice = world.payer()

    async def scenario(parts: Open) -> None:
        await parts.deposit(alice, 5)
        books, treasury = (RemoteSigner(access.url(name)) for name in ("books", "treasury"))
        with running(world, tmp_path, parts) as process:
            await asyncio.wait_for(agrees(treasury), 20)
            certificate = await books.certify(STRANGER)
            with pytest.raises(Forbidden, match="certify is no call of the treasury"):
                await treasury.certify(STRANGER)
            shown = Path(f"/proc/{process.pid}/environ").read_text()
            assert "SCHEDULER_PRIVATE_KEY" in shown
            assert world.platform.key.hex() not in shown
            process.send_signal(signal.SIGTERM)
            out, log = await asyncio.to_thread(process.communicate, timeout=10)
        assert (process.returncode, out) == (0, "")
        assert world.platform.key.hex() not in log
        remembered = (tmp_path / "signer.json").read_text()
        assert '"credited_lamports":5' in remembered
        assert world.platform.key.hex() not in remembered

        with running(world, tmp_path, parts):
            await asyncio.wait_for(agrees(treasury), 20)
            assert await books.certify(STRANGER) == certificate
        await books.close()
        await treasury.close()

    # Without another signer in the test's own loop.
    World(world.devnet, world.redis_url, world.platform, look_s=3600.0).run(scenario)


@pytest.mark.parametrize(
    ("variable", "value"),
    few(
        [
            ("HYPERLIQUID_ADDRESS", STRANGER),
            ("SCHEDULER_PRIVATE_KEY", "0x12"),
            ("HYPERLIQUID_RPC_URL", ""),
            ("AZU_BOOKS_URL", ""),
        ]
    ),
)
def test_it_does_not_start_without_the_platforms_key_its_chain_and_the_books(
    world: World, tmp_path: Path, variable: str, value: str
) -> None:
    variables = environment(world, tmp_path, "wire://signer:secret@127.0.0.1:9") | {variable: value}

    done = subprocess.run(SIGNER, env=variables, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 1
    assert variable in done.stderr
    assert world.platform.key.hex() not in done.stdout + done.stderr

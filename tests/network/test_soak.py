"""Users do everything at once for minutes while the processes that keep their money are killed.

AZU_TEST_SOAK_S is how long (600 s), AZU_TEST_SOAK_KILLS who is killed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray

from azu.auth.signatures import verify_receipt
from azu.client import Client
from azu.errors import (
    AzuError,
    Conflict,
    DeadlineExceeded,
    InsufficientBalance,
    NotFound,
    RateLimited,
    Unavailable,
)
from azu.launch.local_network import LocalNetwork
from azu.money.chain.wallet import transfer_hype
from azu.money.treasury.withdrawals import LEAST_LAMPORTS
from azu.units import LAMPORTS_PER_HYPE, lamports_from_hype
from tests.money.treasury.world import SEED
from tests.network.conftest import paying_user
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

SOAK_S = float(os.environ.get("AZU_TEST_SOAK_S", "600"))
KILLED = os.environ.get("AZU_TEST_SOAK_KILLS", "treasury,scheduler").split(",")
CLIENTS = 8
MODELS = ("azu/tiny-dense", "azu/tiny-moe")
REST_S, QUIET_S = 180.0, 5.0
STARTED_S = 5.0
# Errors while a process restarts; the request may have been carried out all the same.
PASSING = (Conflict, DeadlineExceeded, InsufficientBalance, NotFound, RateLimited, Unavailable)


@dataclass
class Soaker:
    """One user who submits, drops streams, deposits and withdraws at random."""

    network: LocalNetwork
    user: User
    dice: random.Random
    did: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.network.fund(self.user.address, 100 * LAMPORTS_PER_HYPE)
        self.client = Client(self.user.url, self.user.api_key, timeout_s=60)

    def live(self, until_s: float) -> None:
        acts: list[Callable[[], None]] = [self.submit, self.submit, self.drop, self.deposit, self.withdraw]
        while time.monotonic() < until_s:
            act = self.dice.choice(acts)
            try:
                act()
            except PASSING as refusal:
                self.did[f"refused: {type(refusal).__name__}"] += 1
            else:
                self.did[act.__name__] += 1
            time.sleep(self.dice.uniform(0.0, 0.5))

    def submit(self) -> None:
        self.client.submit(
            "The capital of",
            model=self.dice.choice(MODELS),
            address=self.user.address,
            est_tokens=self.dice.randint(1, 40),
        )

    def drop(self) -> None:
        stream = self.client.stream(
            "Tell me", model=self.dice.choice(MODELS), max_tokens=200, ignore_eos=True
        )
        for _, _ in zip(range(self.dice.randint(0, 20)), stream, strict=False):
            pass
        stream.close()

    def deposit(self) -> None:
        lamports = self.dice.randint(1, 5 * LEAST_LAMPORTS)
        network = self.network
        tx_hash = transfer_hype(
            self.user.account, network.platform_address, lamports, chain_url=network.chain_url
        )
        # Some never claim it: the watcher finds the deposit.
        for _ in range(self.dice.randint(0, 3)):
            self.client.deposit(tx_hash, self.user.address)

    def withdraw(self) -> None:
        self.client.withdraw(self.user.account, self.dice.randint(LEAST_LAMPORTS, 3 * LEAST_LAMPORTS))

    def is_at_rest(self) -> bool:
        balance = self.client.balance()
        ended = all(job["charged_lamports"] is not None for job in self.jobs())
        return ended and balance.reserved_lamports == balance.withdrawing_lamports == 0

    def jobs(self) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = self.user.http.get("/v1/jobs", params={"limit": 1000}).json()["data"]
        assert len(jobs) < 1000
        return jobs

    def check(self) -> None:
        """Check the user's balance against the chain and the receipts."""
        rows = httpx.post(
            f"{self.network.chain_url}/info",
            json={"type": "userNonFundingLedgerUpdates", "user": self.user.address, "startTime": 0},
            timeout=30,
        ).json()
        platform, sent = self.network.platform_address, Counter[str]()
        for row in rows:
            if platform in (row["delta"].get("user"), row["delta"].get("destination")):
                sent[row["delta"]["user"]] += lamports_from_hype(row["delta"]["amount"])
        jobs = self.jobs()
        charged = sum(job["charged_lamports"] for job in jobs)
        balance = self.client.balance()
        assert balance.available_lamports == sent[self.user.address] - sent[platform] - charged
        for job in jobs[:3]:
            assert verify_receipt(self.client.signed_receipt(job["job_id"])) == platform
        self.did["jobs ended"] += len(jobs)


def kill_treasury() -> bool:
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            lived_s = time.time() - process.create_time()
            # A process that is still starting has no work to lose.
            if process.cmdline()[-1:] == ["treasury"] and lived_s > STARTED_S:
                process.send_signal(signal.SIGKILL)
                return True
    return False


def kill_scheduler() -> bool:
    try:
        scheduler = ray.get_actor("scheduler", namespace="azu")
    except ValueError:
        return False
    ray.kill(scheduler)
    return True


KILLS = {"treasury": kill_treasury, "scheduler": kill_scheduler}


def kill_at_random(network: LocalNetwork, dice: random.Random, until_s: float) -> Counter[str]:
    """Kill one of the processes every few seconds, and restart those that died, as `azu up` does."""
    killed: Counter[str] = Counter()
    next_kill_s = time.monotonic() + 5
    while time.monotonic() < until_s:
        if time.monotonic() >= next_kill_s:
            name = dice.choice(KILLED)
            killed[name] += KILLS[name]()
            next_kill_s = time.monotonic() + dice.uniform(10, 20)
        network.revive()
        time.sleep(0.5)
    return killed


def wait_until_at_rest(network: LocalNetwork, soakers: list[Soaker]) -> None:
    """Wait until no payment is in transit, including withdrawals that got no response."""
    deadline_s = time.monotonic() + REST_S
    quiet_since_s = None
    while quiet_since_s is None or time.monotonic() < quiet_since_s + QUIET_S:
        assert time.monotonic() < deadline_s, [soaker.client.balance() for soaker in soakers]
        network.revive()
        try:
            at_rest = all(soaker.is_at_rest() for soaker in soakers) and treasury_answers(soakers[0])
        except PASSING:
            at_rest = False
        quiet_since_s = (quiet_since_s or time.monotonic()) if at_rest else None
        time.sleep(0.5)


def treasury_answers(soaker: Soaker) -> bool:
    return soaker.client.deposit(soaker.user.deposit_hash, soaker.user.address).status == "credited"


def audit(network: LocalNetwork, home: Path) -> dict[str, object]:
    environment = os.environ | {
        "AZU_HOME": str(home),
        "HYPERLIQUID_RPC_URL": network.chain_url,
        "HYPERLIQUID_ADDRESS": network.platform_address,
    }
    done = subprocess.run(
        [sys.executable, "-m", "azu.cli", "ledger", "audit", "--json"],
        env=environment, stdout=subprocess.PIPE, text=True, timeout=120, check=False,
    )  # fmt: skip
    report: dict[str, object] = json.loads(done.stdout)
    assert done.returncode == 0, report
    return report


def test_the_books_are_clean_after_a_soak(
    network: LocalNetwork, tmp_path_factory: pytest.TempPathFactory, figures: Counter[str]
) -> None:
    dice = random.Random(SEED)
    soakers = [
        Soaker(network, paying_user(network, f"soaker {number}"), random.Random(f"{SEED}-{number}"))
        for number in range(CLIENTS)
    ]
    until_s = time.monotonic() + SOAK_S
    failures: list[AzuError] = []

    def live(soaker: Soaker) -> None:
        try:
            soaker.live(until_s)
        except AzuError as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(soaker,)) for soaker in soakers]
    for thread in threads:
        thread.start()
    killed = kill_at_random(network, dice, until_s)
    for thread in threads:
        thread.join(90)

    assert failures == []
    wait_until_at_rest(network, soakers)
    for soaker in soakers:
        soaker.check()
    report = audit(network, tmp_path_factory.getbasetemp() / "azu0")
    assert report["in_flight_lamports"] == 0
    for soaker in soakers:
        figures.update(soaker.did)
    for name, times in killed.items():
        figures[f"times the {name} was killed"] += times
    figures["journal entries replayed by `azu ledger audit`, which is clean"] += int(str(report["entries"]))
    figures["seconds of soak"] += round(SOAK_S)

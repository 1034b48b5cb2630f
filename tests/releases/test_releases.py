"""What earlier releases left on disk is read: the money agrees, keys open, jobs are known, payouts go on."""

import asyncio
import json
import tarfile
from pathlib import Path

import pytest

from azu.config import Settings, load_network
from azu.jobs.redis import RedisJobs
from azu.launch.formats import FORMAT
from azu.launch.sidecars import Sidecars, owners_books, sidecars_running
from azu.money.books import Books
from azu.protocol.job import JobState

pytestmark = pytest.mark.prove

ARCHIVES = sorted(Path(__file__).parent.glob("*.tar.gz"))


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
def test_the_state_of_a_release_is_read(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SCHEDULER_PRIVATE_KEY", "AZU_PRIVATE_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    facts = json.loads((tmp_path / "facts.json").read_text())
    settings = Settings(home=tmp_path, chain_url=None, platform_address=None, redis_host=None)
    with sidecars_running(settings, load_network().policy) as sidecars:
        assert sidecars.chain.platform_address == facts["platform"]
        asyncio.run(check(tmp_path, sidecars, facts))
    assert (tmp_path / "format.json").read_text() == f"{FORMAT}\n"


async def check(home: Path, sidecars: Sidecars, facts: dict[str, object]) -> None:
    books, ingress = owners_books(home), Books(sidecars.books.url("ingress"))
    jobs = RedisJobs.from_url(sidecars.redis.jobs_owner)
    try:
        report = await books.audit()
        assert report.agrees, report.findings
        address, job_id = str(facts["address"]), str(facts["job_id"])
        assert (await books.balance(address)).available_lamports == facts["available_lamports"]
        assert (await ingress.key(str(facts["api_key"]))).address == address
        ended = await books.ended(job_id)
        assert ended is not None
        assert ended.receipt.charged_lamports == facts["charged_lamports"]
        record = await jobs.get(job_id)
        assert record is not None
        assert record.state is JobState.DONE
        assert not await books.findings()
        nonce = int(str(facts["withdrawal_nonce"]))
        assert (await books.withdrawal(address, nonce)).state == "paid"
    finally:
        await books.close()
        await ingress.close()

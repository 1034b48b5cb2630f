"""What log lines carry, and what they never do."""

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest

from azu.logs import bound
from tests.logged import Lines, logged

log = logging.getLogger("azu.tests")
PASSWORD = "hunter2 is no pass/word"
SECRETS = (
    "azu-sk-KTdIA1CBIGaV-B5Lbwbc7vyJ3OsymeGKt4Ea4bnEpI4",
    "azu-admin-bwbc7vyJ3OsymeGKt4",
    "hf_abcdefghijklmnopqrstuv",
    "5ec12e7a" * 8,
    PASSWORD,
)


@pytest.fixture
def lines() -> Iterator[Lines]:
    with logged({"model_id": "m"}, hidden=[PASSWORD]) as lines:
        yield lines


def test_a_line_says_when_who_and_about_which_job(lines: Lines) -> None:
    with bound(job_id="job-1"):
        log.info("it has %d tokens", 7, extra={"sequence_id": 3})
    log.warning("unbound")

    first, second = lines()

    assert first["message"] == "it has 7 tokens"
    assert (first["process"], first["model_id"], first["level"]) == ("test", "m", "INFO")
    assert (first["logger"], first["job_id"], first["sequence_id"]) == ("azu.tests", "job-1", 3)
    assert "T" in first["time"]
    assert "job_id" not in second


def test_ids_stay_with_their_task(lines: Lines) -> None:
    async def work(job_id: str) -> None:
        with bound(job_id=job_id):
            await asyncio.sleep(0)
            log.info(job_id)

    async def both() -> None:
        await asyncio.gather(work("job-1"), work("job-2"))

    asyncio.run(both())

    assert [line["job_id"] == line["message"] for line in lines()] == [True, True]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_in_no_part_of_a_line(lines: Lines, secret: str) -> None:
    log.info("said %s", secret)
    log.info(f"in the text: {secret}", extra={"given": secret, "several": [secret]})
    try:
        raise ValueError(f"with {secret}")
    except ValueError:
        log.exception("failed")
    with bound(job_id=secret):
        log.info("bound")

    assert len(lines()) == 4
    assert secret not in json.dumps(lines())
    assert "ValueError" in json.dumps(lines())


def test_bearers_and_passwords_in_urls_are_hidden_but_hashes_of_the_chain_are_not(lines: Lines) -> None:
    tx_hash = "0x" + "ab" * 32
    log.info("Authorization: Bearer some.token-1 at redis://user:s3cr3t@host:6379/0, sent %s", tx_hash)

    [line] = lines()

    assert line["message"] == (
        f"Authorization: Bearer [hidden] at redis://[hidden]@host:6379/0, sent {tx_hash}"
    )


def test_other_libraries_speak_from_warnings_on(lines: Lines) -> None:
    logging.getLogger("httpx").info("a request")
    logging.getLogger("httpx").warning("a failure")

    assert [line["message"] for line in lines()] == ["a failure"]

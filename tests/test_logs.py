"""Log lines: what they contain, and which secrets they never contain."""

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

from azu.logs import log_context
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


def test_a_line_has_its_process_logger_level_and_ids(lines: Lines) -> None:
    with log_context(job_id="job-1"):
        log.info("it has %d tokens", 7, extra={"sequence_id": 3})
    log.warning("unbound")

    first, second = lines()

    assert first["message"] == "it has 7 tokens"
    assert (first["process"], first["model_id"], first["level"]) == ("test", "m", "INFO")
    assert (first["logger"], first["job_id"], first["sequence_id"]) == ("azu.tests", "job-1", 3)
    assert "job_id" not in second


def test_a_line_has_the_time_of_its_record_in_utc_to_the_millisecond(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One hour and thirty minutes from UTC: local time would show.
    monkeypatch.setenv("TZ", "XXX-01:30")
    time.tzset()
    record = log.makeRecord(log.name, logging.INFO, __file__, 1, "old", (), None)
    record.created = 1_767_225_599.0625  # 2025-12-31 23:59:59.062 UTC

    log.handle(record)
    before = time.time()
    log.info("new")
    after = time.time()
    monkeypatch.undo()
    time.tzset()

    old, new = lines()
    assert old["time"] == "2025-12-31T23:59:59.062+00:00"
    written = datetime.fromisoformat(new["time"])
    assert written.utcoffset() == timedelta(0)
    assert before - 0.001 <= written.timestamp() <= after


def test_ids_stay_with_their_task(lines: Lines) -> None:
    async def work(job_id: str) -> None:
        with log_context(job_id=job_id):
            await asyncio.sleep(0)
            log.info(job_id)

    async def both() -> None:
        await asyncio.gather(work("job-1"), work("job-2"))

    asyncio.run(both())

    assert [line["job_id"] == line["message"] for line in lines()] == [True, True]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_in_no_part_of_a_line(lines: Lines, secret: str) -> None:
    log.info("with %s", secret)
    log.info(f"in the text: {secret}", extra={"given": secret, "several": [secret]})
    try:
        raise ValueError(f"with {secret}")
    except ValueError:
        log.exception("failed")
    with log_context(job_id=secret):
        log.info("bound")

    assert len(lines()) == 4
    assert secret not in json.dumps(lines())
    assert "ValueError" in json.dumps(lines())


def test_bearer_tokens_and_passwords_in_urls_are_hidden_and_transaction_hashes_are_not(lines: Lines) -> None:
    tx_hash = "0x" + "ab" * 32
    log.info("Authorization: Bearer some.token-1 at redis://user:s3cr3t@host:6379/0, sent %s", tx_hash)

    [line] = lines()

    assert line["message"] == (
        f"Authorization: Bearer [hidden] at redis://[hidden]@host:6379/0, sent {tx_hash}"
    )


def test_other_libraries_log_from_level_warning_on(lines: Lines) -> None:
    logging.getLogger("httpx").info("a request")
    logging.getLogger("httpx").warning("a failure")

    assert [line["message"] for line in lines()] == ["a failure"]


def test_no_character_of_a_line_acts_on_a_terminal(lines: Lines) -> None:
    name = "node \x1b[2J\x9b1m\x7f\n\u202e\ud800"
    raw = []
    handler = logging.getLogger().handlers[0]
    handler.addFilter(lambda record: raw.append(handler.format(record)) or True)
    try:
        raise ValueError(name)
    except ValueError:
        log.exception("%s", name, extra={"node": name})

    (line,) = lines()

    assert not [
        character for character in "".join(raw) if character in name and ord(character) not in range(32, 127)
    ]
    assert line["message"] == line["node"] == name, "the line is JSON, and whole"

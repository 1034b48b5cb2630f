"""A model with more jobs than its KV can hold gets a second pipeline; a job stays in its pipeline."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.links import find
from actors.placement import SCHEDULER
from tests.network.actors import actors_named, pid_of
from tests.network.recovering import (
    TIMEOUT_S,
    Running,
    Streams,
    four,
    kill_all,
    network_of,
    show,
    slug,
    spared,
)
from tests.network.user import User

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

MODEL, NUM_TOKENS = "azu/tiny-dense", 200
# The demo's policy plans KV for four.
ASKED = [one for words in (60, 50, 40) for one in four(MODEL, NUM_TOKENS, words=words)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Four nodes of which a pipeline needs two."""
    file = spared(ada=7, ben=7, cleo=7, dora=7)
    moves = file.policy.moves.model_copy(update={"look_s": 0.5})
    policy = file.policy.model_copy(update={"moves": moves})
    home: Path = tmp_path_factory.mktemp("azu")
    with network_of(home, file.model_copy(update={"policy": policy})) as started:
        yield started


def undisturbed_few(user: User) -> list[object]:
    """Return each answer when one pipeline has room for all jobs."""
    return [
        answer
        for begin in range(0, len(ASKED), 4)
        for answer in Streams(user, ASKED[begin : begin + 4]).answers()
    ]


def pipelines(user: User) -> list[set[str]]:
    """Return the nodes of each of the model's pipelines."""
    deployments = user.http.get("/v1/network").raise_for_status().json()["deployments"]
    running = [one for one in deployments if one["model_id"] == MODEL and one["state"] in ("running", "slow")]
    return [{piece["node"] for piece in one["topology"]} for one in running]


def paid(user: User, streams: Streams) -> set[str]:
    """Return the addresses that were paid for the streams."""
    return {
        payout
        for stream in streams.each
        for payout in user.results(stream.job_id)["receipt"]["worker_lamports"]
    }


def test_a_busy_model_gets_a_second_pipeline_that_takes_jobs(running: Running) -> None:
    _, user = running
    expected = undisturbed_few(user)
    assert len(pipelines(user)) == 1

    busy = Streams(user, ASKED)
    assert busy.answers() == expected
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(pipelines(user)) < 2:
        assert time.monotonic() < deadline_s, "no second pipeline started"
        time.sleep(0.2)
    assert set.union(*pipelines(user)) == {"ada", "ben", "cleo", "dora"}
    assert not set.intersection(*pipelines(user))

    spread = Streams(user, ASKED)
    assert spread.answers() == expected
    assert len(paid(user, busy)) == 2
    assert len(paid(user, spread)) == 4
    show(
        f"{len(ASKED)} streams where there is room for 4: a second pipeline came up for them, and the next "
        f"{len(ASKED)} ran in both, all identical"
    )


def test_every_job_goes_on_in_its_own_pipeline_when_the_scheduler_dies(running: Running) -> None:
    network, user = running
    expected = undisturbed_few(user)
    before = sorted(map(sorted, pipelines(user)))
    held = {pid_of(actor) for actor in actors_named(f"layer:{slug(MODEL)}")}

    streams = Streams(user, ASKED)
    streams.wait_until(lambda: min(one.num_tokens for one in streams.each) > 0)
    kill_all([pid_of(find(SCHEDULER))])
    deadline_s = time.monotonic() + TIMEOUT_S
    while SCHEDULER not in network.revive():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)

    assert streams.answers() == expected
    assert len(paid(user, streams)) == 4
    assert sorted(map(sorted, pipelines(user))) == before
    assert {pid_of(actor) for actor in actors_named(f"layer:{slug(MODEL)}")} == held
    show(
        f"the scheduler killed under {len(ASKED)} streams in two pipelines: all identical, no piece loaded "
        f"again; longest stall {streams.longest_stall_s():.1f} s"
    )

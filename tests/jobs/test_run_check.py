"""A pipeline's answer is data: what cannot be true in it counts for nothing, and the rest stays as it is."""

from dataclasses import replace

import pytest

from azu.errors import AzuError, InternalError, WorkerLost
from azu.jobs.run_check import checked
from azu.protocol.job import FinishReason, JobRun
from tests.builders import job

JOB = job(max_tokens=10)
WORK = {0: {"a": 100}, 1: {"a": 100}, 2: {"b": 100}, 3: {"a": 50, "b": 0}}
RUN = JobRun(6, FinishReason.STOP, WORK, prompt_tokens_ran=4)


def test_a_run_that_can_be_true_stays_as_it_is() -> None:
    for run in (RUN, replace(RUN, finish_reason=FinishReason.ERROR, error=WorkerLost("stage 1 is gone"))):
        assert checked(run, JOB) == run


@pytest.mark.parametrize(
    ("given", "counted"),
    [(-1, 0), (10, 10), (11, 10), (10**30, 10), ("6", 0), (True, 0), (None, 0), (6.0, 0)],
)
def test_counts_are_whole_and_within_what_the_job_asked_for(given: object, counted: int) -> None:
    assert checked(replace(RUN, completion_tokens=given), JOB).completion_tokens == counted
    assert checked(replace(RUN, prompt_tokens_ran=given), JOB).prompt_tokens_ran == min(counted, 4)


@pytest.mark.parametrize(
    "layer",
    [{"a": -1}, {"a": 1.5}, {"a": "1"}, {"a": True}, {"a": 2**64}, {7: 1},
     {"a" * 201: 1}, {"a b": 1}, {"é": 1}, {"\ud800": 1}, {"": 1},
     None, [], "a",
     {f"n{number}": 1 for number in range(1001)}],
)  # fmt: skip
def test_impossible_work_leaves_its_layer_without_work(layer: object) -> None:
    found = checked(replace(RUN, work=WORK | {1: layer, 4: {"a": 1}, "0": {"a": 1}}), JOB)

    assert found == replace(RUN, work={index: WORK[index] for index in (0, 2, 3)})


def test_a_run_names_no_more_nodes_than_the_books_take() -> None:
    layers = [{f"n{layer}-{number}": 1 for number in range(400)} for layer in range(4)]
    found = checked(replace(RUN, work=dict(enumerate([*layers[:2], layers[2], layers[0]]))), JOB)

    assert found.work == {0: layers[0], 1: layers[1], 3: layers[0]}


def test_work_that_is_no_mapping_is_none() -> None:
    assert checked(replace(RUN, work=[1, 2]), JOB).work == {}


ODD_CODE = WorkerLost("lost")
ODD_CODE.code = 7  # type: ignore[assignment]
ODD_MESSAGE = WorkerLost("lost")
ODD_MESSAGE.message = None  # type: ignore[assignment]


@pytest.mark.parametrize("error", [ValueError("x"), "lost", ODD_CODE, ODD_MESSAGE])
def test_an_error_that_no_answer_could_carry_is_azus_own(error: object) -> None:
    found = checked(replace(RUN, error=error), JOB)

    assert type(found.error) is InternalError
    assert found.finish_reason is FinishReason.ERROR
    assert found.completion_tokens == 6


@pytest.mark.parametrize("reason", [FinishReason.ERROR, "stop", "stop ", None])
def test_a_run_that_ended_for_no_reason_failed(reason: object) -> None:
    found = checked(replace(RUN, finish_reason=reason), JOB)

    assert (found.finish_reason, isinstance(found.error, AzuError)) == (FinishReason.ERROR, True)


@pytest.mark.parametrize("answer", [None, 7, {"completion_tokens": 6}])
def test_an_answer_that_is_no_run_is_a_failure_without_tokens_or_work(answer: object) -> None:
    found = checked(answer, JOB)

    assert (found.completion_tokens, found.work, type(found.error)) == (0, {}, InternalError)

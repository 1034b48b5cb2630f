"""What can be true of a run: a pipeline's answer is data of another process, and may say anything."""

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TypeGuard

from azu.errors import AzuError, InternalError
from azu.money.ledger.transfers import MAX_SHARES
from azu.protocol.job import FinishReason, Job, JobRun

log = logging.getLogger(__name__)

# More bytes than any node activates for one job.
_MOST_BYTES = 2**64
# The books take no id that is longer, or has other characters.
_NODE_ID = re.compile(r"[!-~]{1,200}")


def checked(found: object, job: Job) -> JobRun:
    """Return a run of a job in which nothing is impossible: what is, is left out.

    Work that is impossible for one node leaves its whole layer without work.
    """
    if not isinstance(found, JobRun):
        refused = InternalError(f"the pipeline answered with a {type(found).__name__}")
        return JobRun(completion_tokens=0, finish_reason=FinishReason.ERROR, error=refused)
    error = _error(found)
    is_reason = isinstance(found.finish_reason, FinishReason)
    run = replace(
        found,
        completion_tokens=_count(found.completion_tokens, job.choices * job.sampling.max_tokens),
        prompt_tokens_ran=_count(found.prompt_tokens_ran, len(job.prompt_token_ids)),
        finish_reason=found.finish_reason if is_reason and error is None else FinishReason.ERROR,
        work=_work(found.work, job.num_layers),
        error=error,
    )
    if run != found:
        log.error("the pipeline's answer cannot be true, and counts as %s", run)
    return run


def _count(number: object, most: int) -> int:
    return min(max(0, number), most) if type(number) is int else 0


def _work(given: object, num_layers: int) -> Mapping[int, Mapping[str, int]]:
    """Return the layers whose work is possible, as long as they name no more nodes than the books take."""
    work: dict[int, Mapping[str, int]] = {}
    nodes: set[str] = set()
    said = given if isinstance(given, Mapping) else {}
    for layer in range(num_layers):
        by_node = said.get(layer)
        if _is_work(by_node) and len(nodes | by_node.keys()) <= MAX_SHARES:
            nodes |= by_node.keys()
            work[layer] = by_node
    return work


def _is_work(by_node: object) -> TypeGuard[Mapping[str, int]]:
    return (
        isinstance(by_node, Mapping)
        and len(by_node) <= MAX_SHARES
        and all(isinstance(node, str) and _NODE_ID.fullmatch(node) for node in by_node)
        and all(type(number) is int and 0 <= number < _MOST_BYTES for number in by_node.values())
    )


def _error(run: JobRun) -> AzuError | None:
    """Return the error of a run; one that no answer could carry is replaced."""
    error, reason = run.error, run.finish_reason
    # A text may equal a reason.
    if error is None and isinstance(reason, FinishReason) and reason is not FinishReason.ERROR:
        return None
    with suppress(Exception):
        if isinstance(error, AzuError):
            said = error.to_openai()["error"].values()
            if isinstance(error.message, str) and all(isinstance(field, str | None) for field in said):
                return error
    return InternalError("the pipeline ended the job and did not say why")

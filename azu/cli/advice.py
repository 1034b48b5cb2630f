"""What to type after an error whose message does not say it."""

import re

from azu import errors
from azu.errors import AzuError

# A message that names a command or a setting says what to do.
_SAYS = re.compile(r"`azu |\bRun: |\bNext: |pip install|\bset [A-Z]{2,}|\bAZU_[A-Z]|AZU_HOME")
_AGAIN = "the same again in a moment"
_NODES = "`azu ps` shows the nodes"
_MODELS = "`azu models` shows what is here"
_JOBS = "`azu jobs` lists your jobs"
_KEYS = "`azu keys list`, then `azu keys revoke KEY`"
_HELP = "`azu {command} -h` says what it takes"

_BY_CODE = {
    "answer_removed": f"{_JOBS}; `azu receipt JOB` stays",
    "context_length_exceeded": "a shorter text; `azu models` shows each model's context",
    "day_limit_reached": "`azu login --limit AMOUNT` opens a key with a limit of its own",
    "insufficient_kv_cache": f"a shorter text or a smaller --max-tokens; {_NODES}",
    "job_not_found": _JOBS,
    "job_not_finished": f"{_AGAIN}; {_JOBS}",
    "key_not_found": "`azu keys list`",
    "model_not_offered": _MODELS,
    "too_many_keys": _KEYS,
    "too_many_unfunded_keys": "`azu deposit AMOUNT` with a key that there is",
    "ticket_not_found": "`azu ticket list`",
    "payout_not_found": "`azu treasury status`",
}
# The first class that an error is an instance of.
_BY_CLASS: tuple[tuple[type[AzuError], str], ...] = (
    (errors.ConfigurationError, f"`azu doctor` checks the settings; {_HELP}"),
    (errors.UnsupportedModel, _MODELS),
    (errors.BrokenCheckpoint, f"{_MODELS}; `azu check FOLDER` reads a checkpoint"),
    (errors.InvalidRequest, _HELP),
    (errors.Unauthenticated, "`azu login` opens a key"),
    (errors.InsufficientBalance, "`azu deposit AMOUNT`; `azu balance` shows what is there"),
    (errors.Forbidden, "`azu login` with the wallet that may do this"),
    (errors.ModelNotFound, _MODELS),
    (errors.NotFound, f"{_NODES}, {_JOBS}"),
    (errors.DepositRejected, "`azu wallet balance` shows what the wallet has"),
    (errors.Conflict, f"{_JOBS}, {_NODES}"),
    (errors.RequestTooLarge, "a shorter text"),
    (errors.RateLimited, _AGAIN),
    (errors.LedgerError, "`azu ledger audit` checks the books"),
    (errors.HarmfulRequest, f"another text; {_NODES}"),
    (errors.InternalError, "the same again; the network's owner finds the cause in AZU_HOME/logs"),
    (errors.InsufficientCapacity, f"{_NODES}, `azu join TICKET` on another machine adds one"),
    (errors.WorkerLost, f"{_AGAIN}; {_NODES}"),
    (errors.JournalFault, "`azu ledger audit` checks the books"),
    (errors.ChainError, f"{_AGAIN}; `azu doctor` checks the chain"),
    (errors.Unavailable, f"{_AGAIN}; `azu doctor` says what does not run"),
    (errors.DeadlineExceeded, f"{_AGAIN}; `azu doctor` says what does not run"),
)


def with_next_step(error: AzuError, command: str) -> str:
    """Return an error's message, with what to type next; `command` is the one that failed."""
    if _SAYS.search(error.message):
        return error.message
    of_class = next((step for kind, step in _BY_CLASS if isinstance(error, kind)), _AGAIN)
    step = _BY_CODE.get(error.code or "", of_class).format(command=command)
    return f"{error.message.rstrip('.')}. Next: {step}"

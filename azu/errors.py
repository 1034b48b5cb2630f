"""The errors azu raises on purpose, each with the HTTP status and OpenAI error type it becomes.

Code raises the most specific class. `message` is for the person who caused the error: it names what is wrong
and never carries a secret.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from azu.printable import printable

NUMERICS_ERROR = "numerics_error"
_MAX_MESSAGE_CHARACTERS = 4096
_MAX_PARAM_CHARACTERS = 256


class AzuError(Exception):
    """Base of every error that azu raises on purpose.

    `param` names the request field at fault and `code` is a stable word for programs; both may be None.
    `retry_after_s` is the time after which the same request may succeed, where that is known.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self._clean()
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders. The default would lose the keyword arguments, and a subclass may
        # have a constructor of its own.
        return _rebuild, (type(self), self.message), self.__dict__

    def __setstate__(self, state: dict[str, Any] | None) -> None:
        # Another process wrote it.
        self.__dict__.update(state or {})
        self._clean()

    def _clean(self) -> None:
        # Both may quote what others wrote; a message that quotes a log has lines.
        self.message = printable(self.message, _MAX_MESSAGE_CHARACTERS, kept="\n")
        self.param = None if self.param is None else printable(self.param, _MAX_PARAM_CHARACTERS)
        self.args = (self.message,)

    def to_openai(self) -> dict[str, dict[str, str | None]]:
        """Return the body that an OpenAI client expects: `{"error": {message, type, param, code}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


# Names inside a program, and how libraries speak of their parts.
_INTERNAL = re.compile(
    r"\b[A-Z][a-z]{2,}[A-Z]\w|\b(torch|meta|tensor|backend|pip)\b|validat|<\w+ |__|\w\(\)|::|0x[0-9a-f]{6}"
)
_ERROR_CLASS = re.compile(r"^\w+(Error|Exception): ")
_FAULT_KINDS = re.compile(r"^(Value error|Assertion failed), | or (instance|object) .*$| after validation")
# A place in a document is a name or a number; pydantic adds the kinds that a value may have.
_VALUE_KINDS = re.compile(r"[\[(]|^(str|int|float|bool|dict|list|none|constrained-\w+)$")


def plain_fault(faults: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the place and the words of the first of pydantic's faults, both without names of its parts.

    Where a value may be of several kinds, the fault that lies deepest is of the kind that was meant.
    """
    kinds = (at for at, part in enumerate(faults[0]["loc"]) if _VALUE_KINDS.search(str(part)))
    around = faults[0]["loc"][: next(kinds, None)]
    found = max(
        (fault for fault in faults if fault["loc"][: len(around)] == around),
        key=lambda fault: len(fault["loc"]),
    )
    place = ".".join(part for part in map(str, found["loc"]) if not _VALUE_KINDS.search(part))
    return place, _FAULT_KINDS.sub("", found["msg"])


def plain_reason(error: Exception, otherwise: str) -> str:
    """Return what a library's error says, or `otherwise` if it speaks of the library's own parts."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = text.strip().splitlines() or [""]
    # A line that ends with a colon is a heading.
    line = lines[-1 if lines[0].endswith(":") else 0].strip().replace("`", "'")
    line = _ERROR_CLASS.sub("", line)
    return line if " " in line and not _INTERNAL.search(line) else otherwise


def error_classes(base: type[AzuError] = AzuError) -> Iterator[type[AzuError]]:
    """Yield a class of errors and all its subclasses."""
    yield base
    for subclass in base.__subclasses__():
        yield from error_classes(subclass)


def _rebuild(error_class: type[AzuError], message: str) -> AzuError:
    return error_class.__new__(error_class, message)


class InvalidRequest(AzuError):
    """The request is malformed or asks for something azu does not do."""

    status = 400
    type = "invalid_request_error"


class ConfigurationError(InvalidRequest):
    """A setting, policy, nodes file or ticket is missing, unknown or out of range."""

    default_code = "invalid_configuration"


class UnsupportedModel(InvalidRequest):
    """The model cannot be cut into stages that hand one hidden state on to the next."""

    default_code = "unsupported_model"


class BrokenCheckpoint(InvalidRequest):
    """A checkpoint file is truncated, inconsistent, unsafe or holds values that are not finite."""

    default_code = "broken_checkpoint"


class Unauthenticated(AzuError):
    """No key, or a key that is unknown, expired or revoked."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class InsufficientBalance(AzuError):
    """The account does not hold the amount the request may cost."""

    status = 402
    type = "insufficient_quota"
    default_code = "insufficient_balance"


class Forbidden(AzuError):
    """The key is valid, but not for this account, transaction or endpoint."""

    status = 403
    type = "permission_error"
    default_code = "forbidden"


class NotFound(AzuError):
    """What the request names does not exist."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class ModelNotFound(NotFound):
    """No model of this id exists here, on the Hub or in an allowed folder."""

    default_code = "model_not_found"


class Conflict(AzuError):
    """The request contradicts what has already happened."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class OtherVersion(Conflict):
    """A node and its network run releases of azu that do not understand each other."""

    default_code = "other_version"


class TransferConflict(Conflict):
    """A transfer id was used before with other content."""

    default_code = "transfer_conflict"


class DepositRejected(Conflict):
    """A transaction exists on the chain but is not a deposit: it failed or moved another token."""

    default_code = "deposit_rejected"


class RequestTooLarge(AzuError):
    """The request body is larger than the ingress accepts."""

    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class RateLimited(AzuError):
    """The caller sends too many requests, or azu sends too many to another service."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limited"


class InternalError(AzuError):
    """azu made a mistake while it served the request."""

    default_code = "internal_error"


class LedgerError(InternalError):
    """The ledger refused a transfer that its caller should never have made."""

    default_code = "ledger_error"


class FrameError(InternalError):
    """A frame does not agree with its header, its sender or the current topology."""

    default_code = "bad_frame"


class NumericsError(InternalError):
    """A worker computed values for one sequence that are not finite, from values that were.

    `node_id` and `layer` name the worker's node and the layer.
    """

    default_code = NUMERICS_ERROR

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        node_id: str = "",
        layer: int = 0,
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after_s=retry_after_s)
        self.node_id = node_id
        self.layer = layer


class ShardError(InternalError):
    """A shard does not hold the bytes that the model's structure names."""

    default_code = "bad_shard"


class HarmfulRequest(InternalError):
    """Workers were lost again and again while they computed this request."""

    default_code = "harmful_request"


class Unavailable(AzuError):
    """azu, or a service that it depends on, cannot serve the request now but may later."""

    status = 503
    default_code = "unavailable"


class InsufficientCapacity(Unavailable):
    """The nodes together cannot hold the model.

    `missing_bytes` is what additional nodes would have to lend, one number per node, where that is known.
    """

    default_code = "insufficient_capacity"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        missing_bytes: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after_s=retry_after_s)
        self.missing_bytes = missing_bytes


class WorkerLost(Unavailable):
    """A worker with a piece of the model died or stopped answering."""

    default_code = "worker_lost"


class JournalFault(Unavailable):
    """The journal is not as its one writer left it, or its Redis refuses: an operator has to look."""

    default_code = "journal_fault"


class ChainError(Unavailable):
    """The chain did not answer, or its answer is of no use to azu."""

    default_code = "chain_unavailable"


class DeadlineExceeded(AzuError):
    """Another process did not answer in time."""

    status = 504
    default_code = "deadline_exceeded"

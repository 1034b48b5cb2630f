"""Logs as JSON lines, the same in every process: with job and sequence ids, and without secrets."""

import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TextIO

from azu.printable import printable

_OURS = ("azu", "actors", "deployments")
# The attributes that Python itself gives a record; all others come from `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_HIDDEN = "[hidden]"
# Keys, tokens and passwords by their form: bearer tokens, API and admin keys, the Hub's tokens, passwords in
# URLs, and 32 bytes in hex without the 0x of the chain's hashes.
_SECRETS = re.compile(
    r"(?i:(?<=bearer )[\w.~+/=-]+)"
    r"|azu-(?:sk|admin)-[\w-]+"
    r"|hf_\w{20,}"
    r"|(?<=://)[^\s/@\"]*:[^\s/@\"]+(?=@)"
    r"|(?<![\w])[0-9a-fA-F]{64}(?![\w])"
)
# A shorter secret would hide ordinary words.
_MIN_SECRET_CHARACTERS = 8
_IDS = "log_ids"  # an exception's ids, among its attributes
_bound: ContextVar[dict[str, object]] = ContextVar("bound", default={})  # noqa: B039 - replaced, never changed


@contextmanager
def log_context(**ids: object) -> Iterator[None]:
    """Put ids into every line that this task or thread logs inside the block.

    An exception that leaves the block takes them along, for the line that logs it outside.
    """
    token = _bound.set(_bound.get() | ids)
    try:
        yield
    except BaseException as error:
        error.__dict__.setdefault(_IDS, _bound.get())
        raise
    finally:
        _bound.reset(token)


def start_logging(
    process: str,
    ids: Mapping[str, object] = MappingProxyType({}),
    *,
    hidden: Iterable[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Log azu's lines from level INFO on, and other libraries' lines from WARNING on, to standard error.

    `hidden` are secrets that this process knows; `ids` are part of each of its lines.
    """
    # Serve replaces sys.stderr, and would log azu's lines as its own.
    lines = logging.StreamHandler(stream or sys.__stderr__)
    lines.setFormatter(_Lines({"process": process, **ids}, frozenset(hidden)))
    lines.addFilter(_with_ids)
    root = logging.getLogger()
    root.handlers[:] = [lines]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)


class _Lines(logging.Formatter):
    """One JSON object a line; known secrets and all that has the form of a secret are taken out."""

    def __init__(self, ids: dict[str, object], hidden: frozenset[str]) -> None:
        super().__init__()
        self._ids = ids
        known = "|".join(re.escape(secret) for secret in hidden if len(secret) >= _MIN_SECRET_CHARACTERS)
        self._known = re.compile(known) if known else None

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        given = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        facts = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            **self._ids,
            "message": record.getMessage(),
            **given,
        }
        if record.exc_info:
            facts["exception"] = self.formatException(record.exc_info)
        line = _SECRETS.sub(_HIDDEN, json.dumps(facts, default=str, ensure_ascii=False))
        # Escaped as in JSON, so the line stays an object.
        return printable(self._known.sub(_HIDDEN, line) if self._known else line)


def _with_ids(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    raised = {} if error is None else error.__dict__.get(_IDS, {})
    for name, value in (_bound.get() | raised).items():
        if name not in record.__dict__:
            setattr(record, name, value)
    return True

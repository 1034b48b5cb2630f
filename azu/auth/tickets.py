"""Tickets in Redis: how many nodes each admits, and which nodes came with it.

`azu:auth:ticket:{id}`           hash: `digest` (of its secret), `label`, `uses`, `created_at_ms`,
                                 `expires_at_ms` and, once it is revoked, `revoked_at_ms`.
`azu:auth:ticket:{id}:nodes`     hash: digest of a node's public key -> its name.
`azu:auth:tickets`               sorted set of ticket ids by their time of creation.
`azu:auth:node:{digest}`         the id of the latest ticket of the node with this public key.
"""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import cast

from redis.asyncio import Redis

from azu.errors import NotFound, Unauthenticated

_SECRET_BYTES = 32
_ID_DIGITS = 16
_TICKETS = "azu:auth:tickets"

# A node that asks again after a lost answer has the same key and is not counted twice.
_ADMIT = """
local digest, uses, ends, revoked = unpack(
  redis.call('HMGET', KEYS[1], 'digest', 'uses', 'expires_at_ms', 'revoked_at_ms'))
if digest ~= ARGV[1] then return 'is unknown' end
if revoked then return 'was revoked' end
if tonumber(ends) <= tonumber(ARGV[2]) then return 'has expired' end
if redis.call('HEXISTS', KEYS[2], ARGV[3]) == 0 and redis.call('HLEN', KEYS[2]) >= tonumber(uses) then
  return 'is used up'
end
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
redis.call('SET', KEYS[3], ARGV[5])
return ''
"""


@dataclass(frozen=True, slots=True)
class TicketRecord:
    """A ticket without its secret, which is not stored. `nodes` are the names of the admitted nodes."""

    ticket_id: str
    label: str
    uses: int
    created_at_ms: int
    expires_at_ms: int
    revoked_at_ms: int | None = None
    nodes: tuple[str, ...] = ()


class RedisTickets:
    """Admits nodes to a network, each ticket a number of them. The caller passes the time."""

    def __init__(self, redis: Redis, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._redis = redis
        self._random_bytes = random_bytes
        self._admit = redis.register_script(_ADMIT)

    async def new(self, label: str, uses: int, now_ms: int, expires_at_ms: int) -> tuple[str, TicketRecord]:
        """Return the secret of a new ticket in hex, and the ticket."""
        secret = self._random_bytes(_SECRET_BYTES).hex()
        ticket = TicketRecord(_id_of(secret), label, uses, now_ms, expires_at_ms)
        facts: dict[str, str | int] = {
            "digest": _digest(secret),
            "label": label,
            "uses": uses,
            "created_at_ms": now_ms,
            "expires_at_ms": expires_at_ms,
        }
        async with self._redis.pipeline() as pipeline:
            pipeline.hset(_key(ticket.ticket_id), mapping=facts)  # type: ignore[arg-type]
            pipeline.zadd(_TICKETS, {ticket.ticket_id: now_ms})
            await pipeline.execute()
        return secret, ticket

    async def admit(self, secret: str, key_digest: str, name: str, now_ms: int) -> str:
        """Admit the node with a public key and return the ticket's id.

        Raises Unauthenticated when the ticket is unknown, revoked, expired or used up.
        """
        ticket_id = _id_of(secret)
        keys = [_key(ticket_id), _nodes_key(ticket_id), _node_key(key_digest)]
        arguments: list[str | int] = [_digest(secret), now_ms, key_digest, name, ticket_id]
        refusal = await cast(Awaitable[str], self._admit(keys, arguments))
        if refusal:
            raise Unauthenticated(f"this ticket {refusal}; ask for a new one", code="invalid_ticket")
        return ticket_id

    async def check_node(self, key_digest: str) -> None:
        """Raise Unauthenticated unless the ticket of the node with this public key is not revoked."""
        ticket_id = cast(str | None, await self._redis.get(_node_key(key_digest)))
        revoked = None if ticket_id is None else await self._redis.hget(_key(ticket_id), "revoked_at_ms")
        if ticket_id is None or revoked is not None:
            raise Unauthenticated("the ticket of this node was revoked", code="invalid_ticket")

    async def list(self) -> tuple[TicketRecord, ...]:
        """Return all tickets in the order of their creation."""
        ids = cast("list[str]", await self._redis.zrange(_TICKETS, 0, -1))
        return tuple([await self._record(ticket_id) for ticket_id in ids])

    async def revoke(self, ticket_id: str, now_ms: int) -> None:
        """Make a ticket invalid, for new nodes and for renewals of admitted ones; raises NotFound."""
        if not await self._redis.exists(_key(ticket_id)):
            raise NotFound(f"there is no ticket {ticket_id}", param="ticket_id", code="ticket_not_found")
        await self._redis.hsetnx(_key(ticket_id), "revoked_at_ms", str(now_ms))

    async def _record(self, ticket_id: str) -> TicketRecord:
        facts = cast(dict[str, str], await self._redis.hgetall(_key(ticket_id)))
        names = cast("list[str]", await self._redis.hvals(_nodes_key(ticket_id)))
        revoked = facts.get("revoked_at_ms")
        return TicketRecord(
            ticket_id,
            facts["label"],
            int(facts["uses"]),
            int(facts["created_at_ms"]),
            int(facts["expires_at_ms"]),
            None if revoked is None else int(revoked),
            tuple(sorted(names)),
        )


def _digest(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def _id_of(secret: str) -> str:
    return f"ticket-{_digest(secret)[:_ID_DIGITS]}"


def _key(ticket_id: str) -> str:
    return f"azu:auth:ticket:{ticket_id}"


def _nodes_key(ticket_id: str) -> str:
    return f"azu:auth:ticket:{ticket_id}:nodes"


def _node_key(key_digest: str) -> str:
    return f"azu:auth:node:{key_digest}"

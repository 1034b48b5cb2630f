"""A ticket admits a number of nodes until it expires or is revoked; its secret is not stored."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import redis

from azu.auth.tickets import RedisTickets
from azu.errors import NotFound, Unauthenticated
from azu.redis_client import connect_redis

NOW_MS = 1_700_000_000_000
ENDS_MS = NOW_MS + 3_600_000
ADA, BEN, CLEO = ("a1" * 32, "b2" * 32, "c3" * 32)

Scenario = Callable[[RedisTickets], Awaitable[None]]


@pytest.fixture
def play(redis_url: str) -> Callable[[Scenario], None]:
    async def run(scenario: Scenario) -> None:
        connection = connect_redis(redis_url)
        try:
            await asyncio.wait_for(scenario(RedisTickets(connection)), 20)
        finally:
            await connection.aclose()

    return lambda scenario: asyncio.run(run(scenario))


def test_a_ticket_admits_its_number_of_nodes(play) -> None:
    async def scenario(tickets: RedisTickets) -> None:
        secret, _ = await tickets.new("lab", 2, NOW_MS, ENDS_MS)

        await tickets.admit(secret, ADA, "ada", NOW_MS)
        await tickets.admit(secret, BEN, "ben", NOW_MS)
        with pytest.raises(Unauthenticated, match="used up"):
            await tickets.admit(secret, CLEO, "cleo", NOW_MS)

        (line,) = await tickets.list()
        assert (line.label, line.uses, line.nodes) == ("lab", 2, ("ada", "ben"))
        await tickets.check_node(BEN)
        with pytest.raises(Unauthenticated):
            await tickets.check_node(CLEO)

    play(scenario)


def test_many_requests_at_once_do_not_exceed_the_number(play) -> None:
    async def scenario(tickets: RedisTickets) -> None:
        secret, _ = await tickets.new("", 3, NOW_MS, ENDS_MS)
        asking = [tickets.admit(secret, f"{index:064x}", f"n{index}", NOW_MS) for index in range(20)]

        answers = await asyncio.gather(*asking, return_exceptions=True)

        assert sum(isinstance(answer, Unauthenticated) for answer in answers) == 17

    play(scenario)


def test_a_node_that_asks_again_with_the_same_key_is_not_counted_twice(play) -> None:
    async def scenario(tickets: RedisTickets) -> None:
        secret, _ = await tickets.new("", 1, NOW_MS, ENDS_MS)

        assert await tickets.admit(secret, ADA, "ada", NOW_MS) == await tickets.admit(
            secret, ADA, "ada", NOW_MS + 1
        )

    play(scenario)


def test_an_expired_and_an_unknown_ticket_admit_no_node(play) -> None:
    async def scenario(tickets: RedisTickets) -> None:
        secret, _ = await tickets.new("", 1, NOW_MS, ENDS_MS)

        with pytest.raises(Unauthenticated, match="expired"):
            await tickets.admit(secret, ADA, "ada", ENDS_MS)
        with pytest.raises(Unauthenticated, match="unknown"):
            await tickets.admit("0" * 64, ADA, "ada", NOW_MS)

    play(scenario)


def test_a_revoked_ticket_admits_no_node_and_renews_none(play) -> None:
    async def scenario(tickets: RedisTickets) -> None:
        secret, ticket = await tickets.new("", 5, NOW_MS, ENDS_MS)
        await tickets.admit(secret, ADA, "ada", NOW_MS)

        await tickets.revoke(ticket.ticket_id, NOW_MS + 7)

        with pytest.raises(Unauthenticated, match="revoked"):
            await tickets.admit(secret, BEN, "ben", NOW_MS + 8)
        with pytest.raises(Unauthenticated, match="revoked"):
            await tickets.admit(secret, ADA, "ada", NOW_MS + 8)
        with pytest.raises(Unauthenticated, match="revoked"):
            await tickets.check_node(ADA)
        (line,) = await tickets.list()
        assert line.revoked_at_ms == NOW_MS + 7
        with pytest.raises(NotFound):
            await tickets.revoke("ticket-0000000000000000", NOW_MS)

    play(scenario)


def test_a_node_whose_ticket_was_revoked_may_join_with_another(play) -> None:
    async def scenario(tickets: RedisTickets) -> None:
        secret, ticket = await tickets.new("", 1, NOW_MS, ENDS_MS)
        await tickets.admit(secret, ADA, "ada", NOW_MS)
        await tickets.revoke(ticket.ticket_id, NOW_MS)
        another, _ = await tickets.new("", 1, NOW_MS, ENDS_MS)

        await tickets.admit(another, ADA, "ada", NOW_MS)

        await tickets.check_node(ADA)

    play(scenario)


def test_the_secret_is_not_in_the_store(play, redis_url: str) -> None:
    async def scenario(tickets: RedisTickets) -> None:
        secret, _ = await tickets.new("", 1, NOW_MS, ENDS_MS)
        await tickets.admit(secret, ADA, "ada", NOW_MS)
        with redis.Redis.from_url(redis_url) as store:
            for key in store.keys("*"):
                kind = store.type(key)
                kept = (
                    store.get(key)
                    if kind == b"string"
                    else repr(store.hgetall(key) if kind == b"hash" else 0)
                )
                assert secret not in f"{key} {kept}"

    play(scenario)

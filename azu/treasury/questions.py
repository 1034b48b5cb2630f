"""Questions that the ingress puts to the treasury through Redis, and the answers.

Any number of askers of one question are one question, and an answer is kept for a while.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import cast

from redis.asyncio import Redis

from azu.errors import Unavailable
from azu.treasury.errors import typed_redis_errors

# How many questions may wait at once, and how long one waits for a treasury that is away.
_MAX_WAITING = 10_000
_WAIT_S = 60
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.4

# The answer if there is one; else the question waits (once), unless too many do.
_ASK = """
local answer = redis.call('GET', KEYS[2])
if answer then return answer end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[3])
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[4]) then return 'full' end
redis.call('ZADD', KEYS[1], 'NX', ARGV[2], ARGV[1])
return false
"""


class RedisQuestions:
    """Both ends of one topic's questions; every method raises Unavailable when Redis does not answer.

    `azu:treasury:{topic}:waiting`            sorted set of questions by the time they were first asked.
    `azu:treasury:{topic}:answer:{question}`  an answer; expires.
    """

    def __init__(self, redis: Redis, topic: str) -> None:
        self._redis = redis
        self._topic = topic
        self._waiting = f"azu:treasury:{topic}:waiting"
        self._ask_script = redis.register_script(_ASK)

    async def asked(self, question: str) -> AsyncIterator[tuple[float, str | None]]:
        """Ask again and again; yield the seconds since the first time, and the answer if there is one.

        Raises Unavailable if too many questions wait.
        """
        started, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            answer = await self._ask(question)
            yield time.monotonic() - started, answer
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)

    async def waiting(self, limit: int) -> list[str]:
        """Return questions without an answer, the oldest first; they wait on until they are answered."""
        with typed_redis_errors():
            return cast(list[str], await self._redis.zrange(self._waiting, 0, limit - 1))

    async def answer(self, question: str, answer: str | bytes, kept_ms: int) -> None:
        """Answer everybody who asks, from now on for `kept_ms`."""
        with typed_redis_errors():
            async with self._redis.pipeline(transaction=True) as write:
                write.set(self._answer_key(question), answer, px=kept_ms)
                write.zrem(self._waiting, question)
                await write.execute()

    async def _ask(self, question: str) -> str | None:
        now_s = time.time()
        with typed_redis_errors():
            answer = await self._ask_script(
                [self._waiting, self._answer_key(question)], [question, now_s, now_s - _WAIT_S, _MAX_WAITING]
            )
        if answer == "full":
            raise Unavailable(f"too many {self._topic} are waiting for the treasury")
        return cast(str | None, answer)

    def _answer_key(self, question: str) -> str:
        return f"azu:treasury:{self._topic}:answer:{question}"

"""A time limit that is fair to an answer which came while the event loop was busy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

_BUSY_S = 0.01  # a timer this late means that the loop was busy: the answer may be here, unread


async def within(limit_s: float, answer: Awaitable[T]) -> T:
    """What `answer` gives. Raises TimeoutError when it takes longer than `limit_s`, and cancels it.

    As late as the loop was at the deadline, so much longer it waits, at most `limit_s`: a process that stood still
    learns nothing of who was to answer.
    """
    loop = asyncio.get_running_loop()
    due_s = loop.time() + limit_s
    async with asyncio.timeout(None) as limit:
        timer = loop.call_at(due_s, _expire, loop, limit, due_s, limit_s)
        try:
            return await answer
        finally:
            timer.cancel()


def _expire(loop: asyncio.AbstractEventLoop, limit: asyncio.Timeout, due_s: float, limit_s: float) -> None:
    now_s = loop.time()
    late_s = now_s - due_s
    limit.reschedule(now_s + min(late_s, limit_s) if late_s > _BUSY_S else now_s)

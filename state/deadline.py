"""A time limit that is fair to an answer which came while the event loop was busy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

_BUSY_S = 0.01  # a timer this late means that the loop was busy: the answer may be here, unread
_GRACE_S = 0.01


async def within(limit_s: float, answer: Awaitable[T]) -> T:
    """What `answer` gives. Raises TimeoutError when it takes longer than `limit_s`, and cancels it."""
    loop = asyncio.get_running_loop()
    due_s = loop.time() + limit_s
    async with asyncio.timeout(None) as limit:
        timer = loop.call_at(due_s, _expire, loop, limit, due_s)
        try:
            return await answer
        finally:
            timer.cancel()


def _expire(loop: asyncio.AbstractEventLoop, limit: asyncio.Timeout, due_s: float) -> None:
    now_s = loop.time()
    limit.reschedule(now_s + _GRACE_S if now_s - due_s > _BUSY_S else now_s)

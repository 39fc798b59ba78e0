"""What may go wrong over redis-py, and two ways in which it would go wrong unseen."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError

ERRORS: tuple[type[Exception], ...] = (RedisError, RedisClusterException, OSError, TimeoutError)
"""All that a command or a subscription may raise: trouble on the way, and error answers (ResponseError)."""


@contextlib.contextmanager
def closed_is_an_error() -> Iterator[None]:
    """uvloop raises RuntimeError for a write to a connection it has closed, where redis-py expects an OSError.
    Raises redis-py's ConnectionError instead."""
    try:
        yield
    except RuntimeError as error:
        raise RedisConnectionError(f"the connection is closed: {error}") from error


@contextlib.contextmanager
def cancellable() -> Iterator[None]:
    """Let no cancellation be lost in redis-py. It sends with `asyncio.wait_for`, which in Python 3.11 drops one
    that comes in the moment in which the bytes are sent (bpo-37658), and the task would go on for ever."""
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        yield
    finally:  # after an error answer as well: it is an answer
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError

"""Messages of channels, over redis-py's subscriptions."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError

from state.redis.errors import ERRORS, cancellable, closed_is_an_error

SILENCE_S = 2.0
"""After so long without a message the peer is asked for a sign of life."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a channel."""

    channel: str
    payload: bytes


class Subscription:
    """The messages of some channels, in order.

    Whatever it raises: close it, subscribe again, and read the state anew, because messages were lost.
    """

    def __init__(self, channels: PubSub) -> None:
        self._channels = channels
        self._early: deque[Message] = deque()
        self._heard_s = 0.0
        self._asked_s: float | None = None

    async def open(self, names: Sequence[str], timeout_s: float) -> None:
        """Subscribe, and wait until the server confirmed: what is sent from now on arrives. Raises `ERRORS`."""
        missing = len(names)
        async with asyncio.timeout(timeout_s):
            with closed_is_an_error(), cancellable():
                await self._channels.subscribe(*names)
            while missing:
                heard = await self._channels.get_message(timeout=None)
                if heard is None:
                    continue
                if heard["type"] == "subscribe":
                    missing -= 1
                elif heard["type"] == "message":
                    self._early.append(_message(heard))
        self._heard_s = asyncio.get_running_loop().time()

    async def next(self, timeout_s: float) -> Message | None:
        """The next message; None when none came in time. Raises `ERRORS`.

        After `SILENCE_S` without a message the peer is asked for a sign of life, and after as long again without
        one the subscription is dead. This is seen when a call ends, so let calls end every second or so.
        """
        if self._early:
            return self._early.popleft()
        with cancellable():
            heard = await self._channels.get_message(timeout=timeout_s)
        now_s = asyncio.get_running_loop().time()
        if heard is not None:
            self._heard_s, self._asked_s = now_s, None
            return _message(heard) if heard["type"] == "message" else None
        if self._asked_s is None:
            if now_s - self._heard_s >= SILENCE_S:
                with closed_is_an_error(), cancellable():
                    await self._channels.ping()
                self._asked_s = now_s
        elif now_s - self._asked_s >= SILENCE_S:
            raise RedisConnectionError("the subscription is silent: no answer to a PING")
        return None

    async def close(self) -> None:
        """End it. Idempotent; raises nothing that matters."""
        with contextlib.suppress(*ERRORS):
            await self._channels.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped


def _message(heard: Mapping[str, bytes]) -> Message:
    return Message(heard["channel"].decode(), heard["data"])

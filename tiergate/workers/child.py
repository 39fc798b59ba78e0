"""One worker process, as its supervisor sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence

from tiergate.workers.channel import Channel, Kind, Message, Topic
from tiergate.workers.spec import WorkerSpec

log = logging.getLogger("tiergate")

_SIBLING_S = 1.0  # a worker that does not answer within this is told of without its own numbers


class Child:
    """A process that was started. `watch` must run until it returns."""

    def __init__(self, spec: WorkerSpec, process: asyncio.subprocess.Process, channel: Channel) -> None:
        self.number = spec.number
        self.slot = spec.slot
        self.process = process
        self._channel = channel
        self.ready = False
        self.settled = asyncio.Event()  # it is ready, or has ended
        self.retiring = False
        self.grace_s = 0.0
        self.last_text: str | None = None

    @classmethod
    async def start(
        cls, spec: WorkerSpec, ours: socket.socket, theirs: socket.socket, keep: Sequence[int]
    ) -> Child:
        """Start the process with its end of a pair. `keep` are descriptors that it only holds. Raises OSError."""
        with theirs:
            inherited = (spec.control, spec.board, *spec.listeners, *keep)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tiergate.workers.worker",
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, **spec.environment()},
                pass_fds=inherited,
            )
        return cls(spec, process, await Channel.over(ours))

    @property
    def name(self) -> str:
        """What metrics call it."""
        return str(self.number)

    async def watch(self, reply: Callable[[Child, Message], None]) -> int:
        """Hear what it says until it has ended; its exit code. `reply` gets questions and LEAVING."""
        while (message := await self._channel.receive()) is not None:
            if message.kind is Kind.READY:
                self.ready = True
                self.grace_s = float(message.text or 0.0)
                self.settled.set()
            elif message.kind is Kind.LAST:
                self.last_text = message.text
            else:
                reply(self, message)
        code = await self.process.wait()
        self.ready = False
        self.settled.set()
        await self._channel.close()
        return code

    def order(self, kind: Kind) -> None:
        """Tell it to retire, drain, stop or reload."""
        self.retiring = self.retiring or kind is Kind.RETIRE
        self._channel.send(Message(kind))

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def answer(self, question: Message, text: str | None) -> None:
        self._channel.answer(question, text)

    async def metrics(self) -> bool:
        """Ask for its numbers, which stand in `last_text` then; whether it answered."""
        told = await self._channel.ask(Topic.METRICS, within_s=_SIBLING_S)
        if told is not None:
            self.last_text = told
        return told is not None

    async def carried(self) -> str | None:
        """What it carries, as JSON."""
        return await self._channel.ask(Topic.CARRIED, within_s=_SIBLING_S)

    async def decision(self, request_id: str) -> str | None:
        """A decision that it made."""
        return await self._channel.ask(Topic.DECISION, request_id, within_s=_SIBLING_S)

"""What supervisor and worker say to each other: JSON lines over a socket pair that only the two have."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from enum import Enum

import orjson

_LINE_BYTES = 64 << 20
_MOST_OPEN = 8


class Kind(Enum):
    """What a message is. The comment says who sends it."""

    READY = "ready"  # worker: it serves
    LEAVING = "leaving"  # worker: it was told to end, and waits for its replacement
    LAST = "last"  # worker: it ends now; `text` are its metrics, which nobody can ask for afterwards
    RETIRE = "retire"  # supervisor: accept nobody, serve those who are connected, then end
    DRAIN = "drain"  # supervisor: refuse newcomers, let streams end, then end
    STOP = "stop"  # supervisor: end at once
    RELOAD = "reload"  # supervisor: read the configuration again
    QUESTION = "question"  # both; `topic` says of what
    ANSWER = "answer"  # both; `number` is the question's


class Topic(Enum):
    """What a question is about."""

    METRICS = "metrics"  # to the supervisor: of all workers, `text` being the asker's own; to a worker: its own
    DECISION = "decision"  # `text` is the request's id
    CARRIED = "carried"  # to the supervisor: of all other workers, as a JSON list; to a worker: its own


@dataclass(frozen=True, slots=True)
class Message:
    """One line."""

    kind: Kind
    number: int = 0
    topic: Topic | None = None
    text: str | None = None

    def line(self) -> bytes:
        """As it travels."""
        topic = None if self.topic is None else self.topic.value
        return orjson.dumps([self.kind.value, self.number, topic, self.text]) + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Message:
        """What `line` made. Raises ValueError."""
        kind, number, topic, text = orjson.loads(line)
        return cls(Kind(kind), number, None if topic is None else Topic(topic), text)


class Channel:
    """One end of the pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = 0
        self._asked: dict[int, asyncio.Future[str | None]] = {}
        self._gone = False

    @classmethod
    async def over(cls, end: socket.socket) -> Channel:
        """Take over a socket. Raises OSError."""
        end.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=end, limit=_LINE_BYTES))

    def send(self, message: Message) -> None:
        """Send without waiting; nothing happens when the other is gone."""
        if not self._writer.is_closing():
            self._writer.write(message.line())

    async def receive(self) -> Message | None:
        """The next message that is no answer; None when the other end is gone."""
        while True:
            try:
                line = await self._reader.readline()
            except (ConnectionError, ValueError):  # ValueError: a line without end
                line = b""
            if not line.endswith(b"\n"):
                self._forget()
                return None
            message = Message.read(line)
            if message.kind is not Kind.ANSWER:
                return message
            waiting = self._asked.pop(message.number, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(message.text)

    async def ask(self, topic: Topic, text: str | None = None, *, within_s: float) -> str | None:
        """The other's answer, None when there is none in time. Somebody must be receiving. One that does not
        answer is asked nothing more, or questions would pile up in a process that stands still."""
        if self._gone or len(self._asked) >= _MOST_OPEN:
            return None
        self._numbers += 1
        number = self._numbers
        waiting: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._asked[number] = waiting
        self.send(Message(Kind.QUESTION, number, topic, text))
        try:
            async with asyncio.timeout(within_s):
                return await waiting
        except TimeoutError:
            return None

    def answer(self, question: Message, text: str | None) -> None:
        self.send(Message(Kind.ANSWER, question.number, question.topic, text))

    def _forget(self) -> None:
        self._gone = True
        for waiting in self._asked.values():
            if not waiting.done():
                waiting.set_result(None)
        self._asked.clear()

    async def close(self) -> None:
        """Send what was said, and hang up."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

"""The fleet's document and its replicas' contributions in Redis or Valkey (`state.documents.Documents`).

Changes are pushed: whoever makes one publishes its number. Who listens looks at the store itself then, so a
message that is lost or comes twice does no harm; a glance every second finds what no message told.
"""

from __future__ import annotations

import asyncio
import json
import logging
import weakref
from collections.abc import AsyncGenerator, Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from state.contract import StoreUnavailable
from state.documents import CONTRIBUTION_S, CONTRIBUTIONS, HISTORY, Contribution, Document, Draft, Stale, Watching
from state.redis.connect import ERRORS, Answer, Connection
from state.redis.keys import Keys
from state.redis.scripts import Argument, Runner, load_script, unavailable

log = logging.getLogger("tiergate.policy")

_SCRIPT = load_script("documents", "clock")
_LOOK_EVERY_S = 1.0
_AGAIN_S = 0.2


class RedisDocuments:
    """One handle. `run` must run for changes to be pushed."""

    def __init__(self, connection: Connection, fleet: str, timeout_s: float = 1.0) -> None:
        """The connection stays the caller's, who closes it after this. `timeout_s` is for one call."""
        keys = Keys.of(fleet)
        self._connection = connection
        self._keys = (keys.other("documents"), keys.other("learned"), keys.other("learned-at"))
        self._channel = keys.other("documents-news")
        self._runner = Runner(connection, timeout_s)
        self._watches: weakref.WeakSet[Watching] = weakref.WeakSet()
        self._closed = False

    async def _do(self, what: str, *arguments: Argument) -> Answer:
        """Raises StoreUnavailable."""
        return await self._runner.run(_SCRIPT, self._keys, (what, *arguments))

    async def read(self) -> Document | None:
        return _document(await self._do("read"))

    async def put(self, draft: Draft, expected: int) -> Document | Stale:
        answer = await self._do("put", expected, draft.change_id, _payload(draft), HISTORY, self._channel)
        assert isinstance(answer, list)
        made, entry = answer
        found = _document(entry)
        if made != 1:
            return Stale(found)
        assert found is not None
        return found

    async def put_back(self, document: Document) -> Document:
        written_ms = round(document.written_unix_s * 1e3)
        found = _document(
            await self._do(
                "put_back",
                document.version,
                written_ms,
                document.change_id,
                _payload(document.draft),
                HISTORY,
                self._channel,
            )
        )
        assert found is not None
        return found

    async def history(self) -> tuple[Document, ...]:
        answer = await self._do("history")
        assert isinstance(answer, list)
        found = [document for entry in answer if (document := _document(entry)) is not None]
        return tuple(sorted(found, key=lambda document: -document.version))

    async def watch(self) -> AsyncGenerator[Document | None, None]:
        watching = Watching()
        self._watches.add(watching)
        while await watching.next():
            try:
                found = await self.read()
            except StoreUnavailable:
                await asyncio.sleep(_AGAIN_S)
                if not self._closed:
                    watching.notice()
                continue
            yield found

    async def contribute(self, source: str, body: str) -> None:
        await self._do("contribute", source, body, round(CONTRIBUTION_S * 1e3), CONTRIBUTIONS)

    async def contributions(self) -> Mapping[str, Contribution]:
        answer = await self._do("contributions")
        assert isinstance(answer, list)
        found: dict[str, Contribution] = {}
        for item in answer:
            assert isinstance(item, list)
            source, age_ms, body = (_text(part) for part in item)
            if float(age_ms) <= CONTRIBUTION_S * 1e3:
                found[source] = Contribution(body, float(age_ms) / 1e3)
        return found

    async def run(self) -> None:
        while True:
            try:
                await self._listen()
            except StoreUnavailable as error:
                log.debug("no news of the policy: %s", error)
            await asyncio.sleep(_AGAIN_S)

    async def _listen(self) -> None:
        """Hear of changes until the connection ends. Raises StoreUnavailable."""
        try:
            news = await self._connection.subscribe(self._channel)
        except ERRORS as error:
            raise unavailable("subscribe", error) from error
        try:
            stamp = await self._do("stamp")
            self._notice()  # of what came before the subscription
            while True:
                if await news.next(_LOOK_EVERY_S) is not None:
                    self._notice()
                    continue
                was, stamp = stamp, await self._do("stamp")
                if stamp != was:
                    self._notice()
        except ERRORS as error:
            raise unavailable("listen", error) from error
        finally:
            await news.close()

    def _notice(self) -> None:
        for watching in list(self._watches):
            watching.notice()

    async def close(self) -> None:
        self._closed = True
        for watching in list(self._watches):
            watching.end()
        await self._runner.close()


class _Payload(BaseModel):
    """What a version says besides its header. Another version of Tiergate may say more."""

    model_config = ConfigDict(extra="ignore", strict=True)
    schema_: int = Field(alias="schema")
    author: str
    reason: str
    body: str


_UNREADABLE = 0
"""The schema of what is no document to this version, so that nobody tries to read it."""


def _payload(draft: Draft) -> str:
    return json.dumps({"schema": draft.schema, "author": draft.author, "reason": draft.reason, "body": draft.body})


def _document(entry: Answer) -> Document | None:
    """Raises StoreUnavailable for what no version of Tiergate wrote."""
    if entry is None:
        return None
    try:
        version, written_ms, change_id, payload = _text(entry).split("\n", 3)
        number, written_s = int(version), int(written_ms) / 1e3
    except ValueError:
        raise StoreUnavailable("documents: what stands there is no document of Tiergate's") from None
    try:
        told = _Payload.model_validate_json(payload)
    except ValidationError:
        return Document(number, written_s, Draft(change_id, _UNREADABLE, "", "unknown", "unreadable"))
    return Document(number, written_s, Draft(change_id, told.schema_, told.body, told.author, told.reason))


def _text(answer: Answer) -> str:
    assert isinstance(answer, bytes)
    return answer.decode()

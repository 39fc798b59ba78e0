"""The document store's contract, on every implementation."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from state.documents import (
    CONTRIBUTION_S,
    CONTRIBUTIONS,
    HISTORY,
    Document,
    Documents,
    Draft,
    MemoryDocuments,
    MemoryDocumentState,
    Stale,
)
from state.redis.address import parse_url
from state.redis.connect import Connection, connect
from state.redis.documents import RedisDocuments
from tests.servers import DataServer, Kind

WAIT_S = 30


def draft(change_id: str, body: str = "{}") -> Draft:
    return Draft(change_id, 1, body, "a:1", "because: of\nthis")


class Shared(Protocol):
    """Several handles on one document store."""

    def handle(self) -> Documents: ...


class MemoryShared:
    """Handles on one `MemoryDocumentState`."""

    def __init__(self) -> None:
        self._state = MemoryDocumentState()

    def handle(self) -> Documents:
        return MemoryDocuments(self._state)


class RedisShared:
    """Handles on one fleet of a server, each over a connection of its own."""

    def __init__(self, url: str, fleet: str) -> None:
        self._url = url
        self._fleet = fleet
        self._connections: list[Connection] = []

    def handle(self) -> Documents:
        connection = connect(parse_url(self._url))
        self._connections.append(connection)
        return RedisDocuments(connection, self._fleet)

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()


class Servers:
    """A server of each kind for all tests of this file, started when it is first asked for."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._urls: dict[Kind, str] = {}

    def url(self, kind: Kind) -> str:
        if kind not in self._urls:
            self._urls[kind] = self._stack.enter_context(DataServer(kind, self._folder / kind.value)).url
        return self._urls[kind]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with contextlib.ExitStack() as stack:
        yield Servers(tmp_path_factory.mktemp("servers"), stack)


FLEETS = itertools.count()


@pytest.fixture(params=["memory", "redis", "valkey"])
async def shared(request: pytest.FixtureRequest, servers: Servers) -> AsyncIterator[Shared]:
    if request.param == "memory":
        yield MemoryShared()
        return
    made = RedisShared(await asyncio.to_thread(servers.url, Kind(request.param)), f"documents-{next(FLEETS)}")
    yield made
    await made.close()


@pytest.fixture
async def documents(shared: Shared) -> AsyncIterator[Documents]:
    made = shared.handle()
    yield made
    await made.close()


@pytest.fixture
async def other_documents(shared: Shared) -> AsyncIterator[Documents]:
    made = shared.handle()
    yield made
    await made.close()


async def put(documents: Documents, change_id: str, expected: int, body: str = "{}") -> Document:
    answer = await documents.put(draft(change_id, body), expected)
    assert isinstance(answer, Document)
    return answer


@contextlib.asynccontextmanager
async def running(documents: Documents) -> AsyncIterator[None]:
    """While `run` runs."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(documents.run())
        try:
            yield
        finally:
            task.cancel()


async def following(watch: AsyncGenerator[Document | None, None], change_id: str) -> Document:
    """The watch's next event of this change; fails when it does not come."""
    async with asyncio.timeout(WAIT_S):
        async for found in watch:
            if found is not None and found.change_id == change_id:
                return found
    raise AssertionError("the watch ended")


async def test_versions_rise_by_one_and_a_change_to_an_old_one_is_told_what_stands(
    documents: Documents, other_documents: Documents
) -> None:
    assert await documents.read() is None
    assert await other_documents.put(draft("early"), 1) == Stale(None)
    first = await put(documents, "one", 0, "ä€\x00 body")
    assert (first.version, first.draft) == (1, draft("one", "ä€\x00 body"))
    assert await other_documents.read() == first
    assert await other_documents.put(draft("also"), 0) == Stale(first)
    second = await put(other_documents, "two", 1)
    assert second.version == 2
    assert second.written_unix_s >= first.written_unix_s
    assert await documents.put(draft("late"), 1) == Stale(second)
    assert await documents.read() == second


async def test_a_change_that_is_asked_for_again_is_made_once(documents: Documents) -> None:
    first = await put(documents, "one", 0)
    assert await documents.put(draft("one"), 0) == first
    second = await put(documents, "two", 1)
    assert await documents.put(draft("two"), 1) == second
    assert [found.version for found in await documents.history()] == [2, 1]


async def test_of_racing_changes_one_is_made(documents: Documents, other_documents: Documents) -> None:
    await put(documents, "start", 0)
    for version in range(1, 8):
        answers = await asyncio.gather(
            *(
                handle.put(draft(f"{version}-{number}"), version)
                for number, handle in enumerate((documents, other_documents) * 4)
            )
        )
        made = [answer for answer in answers if isinstance(answer, Document)]
        assert [document.version for document in made] == [version + 1]
        assert all(answer in (made[0], Stale(made[0])) for answer in answers)


async def test_the_last_versions_are_kept(documents: Documents) -> None:
    for version in range(HISTORY + 5):
        await put(documents, f"c{version}", version, f"body {version}")
    kept = await documents.history()
    assert [found.version for found in kept] == list(range(HISTORY + 5, 5, -1))
    assert kept[0] == await documents.read()
    assert kept[-1].draft.body == "body 5"


async def test_what_was_lost_is_put_back_by_whoever_has_more(documents: Documents) -> None:
    lost = Document(7, 1_000.0, draft("seven"))
    assert await documents.put_back(lost) == lost
    assert await documents.read() == lost
    assert await documents.put_back(Document(6, 1_000.0, draft("six"))) == lost
    # The same number was given twice: the one that was written first stands.
    assert await documents.put_back(Document(7, 1_001.0, draft("later"))) == lost
    first = Document(7, 999.0, draft("first"))
    assert await documents.put_back(first) == first
    assert await documents.put_back(first) == first
    higher = Document(9, 2_000.0, draft("nine"))
    assert await documents.put_back(higher) == higher
    assert (await put(documents, "ten", 9)).version == 10
    assert [found.version for found in await documents.history()][:2] == [10, 9]


async def test_a_watch_tells_what_stands_and_every_last_change(
    documents: Documents, other_documents: Documents
) -> None:
    async with running(documents), contextlib.aclosing(documents.watch()) as watch:
        async with asyncio.timeout(WAIT_S):
            assert await anext(watch) is None
        await put(other_documents, "one", 0)
        await following(watch, "one")
        await put(other_documents, "two", 1)
        await put(other_documents, "three", 2)
        assert (await following(watch, "three")).version == 3
        await other_documents.put_back(Document(9, 1.0, draft("nine")))
        await following(watch, "nine")


async def test_a_replica_that_comes_later_is_told_at_once(
    documents: Documents, other_documents: Documents
) -> None:
    await put(documents, "one", 0)
    async with running(other_documents), contextlib.aclosing(other_documents.watch()) as watch:
        await following(watch, "one")


async def test_closing_ends_a_watch(documents: Documents) -> None:
    async with asyncio.timeout(WAIT_S), contextlib.aclosing(documents.watch()) as watch:
        await anext(watch)
        await documents.close()
        with pytest.raises(StopAsyncIteration):
            await anext(watch)


async def test_each_source_has_one_contribution(documents: Documents, other_documents: Documents) -> None:
    await documents.contribute("a", "one")
    await other_documents.contribute("b", "ä\x00")
    await documents.contribute("a", "two")
    found = await other_documents.contributions()
    assert {source: contribution.body for source, contribution in found.items()} == {"a": "two", "b": "ä\x00"}
    assert all(0.0 <= contribution.age_s < CONTRIBUTION_S for contribution in found.values())


async def test_the_last_contributions_are_kept(documents: Documents) -> None:
    for number in range(CONTRIBUTIONS + 3):
        await documents.contribute(f"s{number:03}", "x")
    found = await documents.contributions()
    assert len(found) == CONTRIBUTIONS
    assert f"s{CONTRIBUTIONS + 2:03}" in found


async def test_old_contributions_end() -> None:
    now_s = 0.0
    state = MemoryDocumentState(lambda: now_s)
    documents = MemoryDocuments(state)
    await documents.contribute("a", "x")
    now_s = CONTRIBUTION_S - 1
    await documents.contribute("b", "y")
    assert {name: found.age_s for name, found in (await documents.contributions()).items()} == {"a": now_s, "b": 0}
    now_s = CONTRIBUTION_S + 1
    assert set(await documents.contributions()) == {"b"}
    await documents.contribute("b", "y")
    assert set(state.learned) == {"b"}


async def test_listening_can_be_ended_at_every_moment(shared: Shared) -> None:
    """Python 3.11's `asyncio.wait_for`, with which redis-py sends, may lose a cancellation."""
    for steps in range(40):
        documents = shared.handle()
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
            task = tasks.create_task(documents.run())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
        await documents.close()

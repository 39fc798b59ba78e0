"""Drawn sequences of calls give the same documents in memory, on Redis and on Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from state.documents import Document, Documents, Draft, MemoryDocuments, Stale
from state.redis.address import parse_url
from state.redis.connect import connect
from state.redis.documents import RedisDocuments
from tests.servers import DataServer, Kind

FLEETS = itertools.count()


@dataclass(frozen=True, slots=True)
class Put:
    """A change to what stands, or to an older or a later version (`off`)."""

    change: str
    off: int


@dataclass(frozen=True, slots=True)
class PutBack:
    """A version that some replica had in force."""

    version: int
    written_s: int
    change: str


puts = st.builds(Put, st.sampled_from("abcdef"), st.sampled_from((0, 0, 0, -1, 1)))
put_backs = st.builds(PutBack, st.integers(1, 9), st.integers(1, 2), st.sampled_from("uvw"))
Step = Put | PutBack


def draft(change: str) -> Draft:
    return Draft(change, 1, f"body of {change}", "somebody", "a test")


def shown(document: Document | None) -> tuple[int, Draft] | None:
    """A version without the time, which is the store's own."""
    return None if document is None else (document.version, document.draft)


async def play(documents: Documents, steps: list[Step]) -> list[object]:
    """What the calls answer, and what stands in the end."""
    told: list[object] = []
    for step in steps:
        if isinstance(step, Put):
            found = await documents.read()
            standing = 0 if found is None else found.version
            answer = await documents.put(draft(step.change), max(standing + step.off, 0))
            stale = isinstance(answer, Stale)
            told.append((stale, shown(answer.document if isinstance(answer, Stale) else answer)))
        else:
            back = Document(step.version, float(step.written_s), draft(step.change))
            told.append(shown(await documents.put_back(back)))
    told.append(shown(await documents.read()))
    told.append([shown(document) for document in await documents.history()])
    return told


async def play_on_server(url: str, steps: list[Step]) -> list[object]:
    async with connect(parse_url(url)) as connection:
        documents = RedisDocuments(connection, f"drawn-{next(FLEETS)}")
        try:
            return await play(documents, steps)
        finally:
            await documents.close()


@pytest.fixture(scope="module", params=list(Kind))
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(DataServer(request.param, tmp_path_factory.mktemp("server"))).url


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(puts | put_backs, max_size=30))
def test_a_server_answers_as_memory_does(url: str, steps: list[Step]) -> None:
    in_memory = asyncio.run(play(MemoryDocuments(), steps))
    assert asyncio.run(play_on_server(url, steps)) == in_memory

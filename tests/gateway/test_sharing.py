"""What replicas learned, shared: a fresh one starts from it, and nothing counts twice, restarts included."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.contract import Capabilities
from gateway.app import running
from gateway.config import BackendSettings, TokenSettings
from gateway.learning import Learned
from gateway.pace import StepSample
from gateway.sharing import FRESH_S, HALF_LIFE_S, Sharing
from gateway.tokens import TokenCounter
from state.contract import StoreUnavailable
from state.documents import Contribution, MemoryDocuments, MemoryDocumentState
from tests.gateway.rig import PROFILE, client, engine, settings_for, settled, until
from tiergate.root import wire

_BACKEND = BackendSettings(url="http://a:1", name="a", profile=PROFILE)
_CAPABILITIES = Capabilities("vllm")


class Replica:
    """What one replica learns, shared through a store."""

    def __init__(self, state: MemoryDocumentState, path: Path | None = None, *, owns_file: bool = True) -> None:
        self.counter = TokenCounter(TokenSettings(), {})
        self.learned = Learned(self.counter, path, owns_file=owns_file)
        self.sharing = Sharing(MemoryDocuments(state), self.learned)

    async def observe(self, factor: float, count: int, tokens: int = 50) -> None:
        steps = await self.learned.steps(_BACKEND, _CAPABILITIES)
        base = await Learned(TokenCounter(TokenSettings(), {}), None).steps(_BACKEND, _CAPABILITIES)
        expected_s = base.timing().step_time.decode_seconds(8, 8_000)
        for _ in range(count):
            steps.observe(StepSample("a", factor * expected_s, 8, 8_000))
            self.learned.lengths.observe("m", "chat", tokens, complete=True)
            self.counter.learn("m", 1_000, 500)

    async def factor(self) -> float:
        """What it makes of a step, relative to the profile."""
        base = await Learned(TokenCounter(TokenSettings(), {}), None).steps(_BACKEND, _CAPABILITIES)
        mine = (await self.learned.steps(_BACKEND, _CAPABILITIES)).timing()
        return mine.step_time.decode_seconds(8, 8_000) / base.timing().step_time.decode_seconds(8, 8_000)

    def answers(self) -> float:
        return self.learned.lengths.book.snapshot("m", "chat").answers


async def _replica(state: MemoryDocumentState, path: Path | None = None, *, owns_file: bool = True) -> Replica:
    return await asyncio.to_thread(lambda: Replica(state, path, owns_file=owns_file))


async def test_a_fresh_replica_starts_from_what_the_others_know() -> None:
    state = MemoryDocumentState()
    old = await _replica(state)
    await old.observe(2.0, 100)
    await old.sharing.once()
    fresh = await _replica(state)
    assert fresh.counter.estimate("m", 4_000) == 1_000
    await fresh.sharing.once()
    assert await fresh.factor() == pytest.approx(2.0, rel=0.01)
    assert fresh.answers() == pytest.approx(old.answers(), rel=0.001)
    assert fresh.counter.estimate("m", 4_000) == old.counter.estimate("m", 4_000) > 1_500
    [(model, tier, lengths)] = fresh.learned.lengths.changed({})  # the core is told of a class nobody asked for
    assert (model, tier) == ("m", "chat")
    assert lengths.remaining(0) == pytest.approx(50, rel=0.1)
    assert fresh.learned.lengths.changed({}) == []


async def test_a_backend_that_is_connected_already_follows() -> None:
    state = MemoryDocumentState()
    old, other = await _replica(state), await _replica(state)
    steps = await other.learned.steps(_BACKEND, _CAPABILITIES)
    before = steps.timing()
    await old.observe(2.0, 100)
    await old.sharing.once()
    await other.sharing.once()
    assert steps.timing().version > before.version
    ratio = steps.timing().step_time.decode_seconds(8, 8_000) / before.step_time.decode_seconds(8, 8_000)
    assert ratio == pytest.approx(2.0, rel=0.01)


async def test_nothing_counts_twice_however_often_it_is_told() -> None:
    state = MemoryDocumentState()
    replicas = [await _replica(state) for _ in range(3)]
    for replica in replicas:
        await replica.observe(1.5, 20)
    for _ in range(4):
        for replica in replicas:
            await replica.sharing.once()
    alone = await _replica(MemoryDocumentState())
    await alone.observe(1.5, 20)
    for replica in replicas:
        assert replica.answers() == pytest.approx(3 * alone.answers(), rel=0.001)
        assert (await replica.learned.evidence()).lengths == (await alone.learned.evidence()).lengths


async def test_a_restart_with_the_same_file_is_the_same_source(tmp_path: Path) -> None:
    state = MemoryDocumentState()
    path = tmp_path / "learned.json"
    first = await _replica(state, path)
    await first.observe(2.0, 50)
    await first.sharing.once()
    await first.learned.save()
    again = await _replica(state, path)
    assert again.learned.source == first.learned.source
    witness, sibling = await _replica(state), await _replica(state, path, owns_file=False)
    for replica in (again, witness, sibling):
        await replica.sharing.once()
        assert replica.answers() == pytest.approx(first.answers(), rel=0.001)
    before = path.read_bytes()
    await sibling.observe(1.0, 1)
    await sibling.learned.save()
    assert path.read_bytes() == before  # the file is another process's
    assert sibling.learned.source != again.learned.source


async def test_what_a_replica_that_is_gone_knew_fades() -> None:
    now_s = 0.0
    state = MemoryDocumentState(lambda: now_s)
    gone = await _replica(state)
    await gone.observe(2.0, 100)
    await gone.sharing.once()
    fresh = await _replica(state)
    for age_s, share in ((FRESH_S, 1.0), (FRESH_S + HALF_LIFE_S, 0.5), (FRESH_S + 10 * HALF_LIFE_S, 0.001)):
        now_s = age_s
        await fresh.sharing.once()
        assert fresh.answers() == pytest.approx(share * gone.answers(), rel=0.01, abs=0.05)
    # One that is idle does not make old evidence young by telling it again.
    await gone.sharing.once()
    assert (await MemoryDocuments(state).contributions())[gone.learned.source].age_s == now_s


async def test_what_cannot_be_read_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    state = MemoryDocumentState()
    documents = MemoryDocuments(state)
    await documents.contribute("newer", '{"format": 2, "curves": []}')
    await documents.contribute("broken", '{"steps": {"a": {"base": 1}}}')
    old = await _replica(state)
    await old.observe(2.0, 10)
    await old.sharing.once()
    fresh = await _replica(state)
    caplog.clear()
    for _ in range(3):
        await fresh.sharing.once()
    assert fresh.answers() == pytest.approx(old.answers(), rel=0.001)
    assert len(caplog.records) == 2  # each is told once


async def test_a_store_that_forgot_is_told_again() -> None:
    state = MemoryDocumentState()
    old = await _replica(state)
    await old.sharing.once()
    assert state.learned == {}  # nothing to tell
    await old.observe(2.0, 10)
    await old.sharing.once()
    told = state.learned.pop(old.learned.source)
    await old.sharing.once()
    assert state.learned[old.learned.source][1] == told[1]


async def test_a_gateway_tells_what_it_learned_when_it_ends() -> None:
    state = MemoryDocumentState()
    async with engine() as one:
        settings = settings_for(one)
        wiring = await asyncio.to_thread(wire, settings)
        assert isinstance(wiring.teachers, Learned)
        wiring = replace(wiring, sharing=Sharing(MemoryDocuments(state), wiring.teachers))
        async with running(settings, wiring) as made, client(made) as ask:
            await until(lambda: made.fleet.up == 1)
            assert state.learned == {}
            for _ in range(3):
                await ask.read_chat()
            await settled(made)
    fresh = await _replica(state)
    await fresh.sharing.once()
    assert fresh.counter.estimate("test-model", 4_000) > 1_000


class Silent(MemoryDocuments):
    """Does not answer, so many times."""

    def __init__(self, state: MemoryDocumentState, times: int) -> None:
        super().__init__(state)
        self.times = times

    async def contributions(self) -> dict[str, Contribution]:
        if self.times:
            self.times -= 1
            raise StoreUnavailable("silent, by the test")
        return dict(await super().contributions())


async def test_sharing_goes_on_after_an_outage() -> None:
    state = MemoryDocumentState()
    old = await _replica(state)
    await old.observe(2.0, 10)
    documents = Silent(state, 2)
    sharing = Sharing(documents, old.learned)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(sharing.run())
        await until(lambda: bool(state.learned))
        task.cancel()

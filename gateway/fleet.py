"""The backends' lives: found, probed, watched, drained, and what is learned about each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from adapters.contract import (
    Adapter,
    Capabilities,
    EngineLoad,
    Support,
    TellsPace,
    Unsupported,
    UpstreamError,
)
from gateway.ahead import ChunksAhead, chunks_ahead
from gateway.config import BackendSettings, HealthSettings, engine_limits
from gateway.dispatch import Shell
from gateway.pace import PrefillSample, StepSample
from gateway.teachers import BackendUnusable, StepLearner, Teachers
from scheduling.backends import Backend, BackendState, EngineLimits
from scheduling.events import BackendChanged, BackendRemoved, LengthsChanged, MembershipChanged
from scheduling.requests import Request
from state.contract import Mode, Store, StoreUnavailable

log = logging.getLogger("tiergate.fleet")

_ABORT_S = 2.0
_FIRST_RETRY_S = 0.2
_LAST_RETRY_S = 5.0
_LEARN_EVERY_S = 1.0
_ALONE_EVERY_S = 1.0  # while the store does not count for all, engines' own counts are all there is of others
_COUNT_S = 0.1  # an exact count that comes later than this is worth less than an estimate now


class Phase(Enum):
    """Where a backend is in its life."""

    CONNECTING = "connecting"
    UP = "up"
    DOWN = "down"
    DRAINING = "draining"


@dataclass(slots=True, eq=False)
class Member:
    """One configured backend."""

    settings: BackendSettings
    phase: Phase = Phase.CONNECTING
    adapter: Adapter | None = None
    capabilities: Capabilities | None = None
    learner: StepLearner | None = None
    published: Backend | None = None
    version: int = -1
    failures: int = 0
    problem: str | None = None
    engine: EngineLoad = field(default_factory=EngineLoad)
    driven: bool = False  # its steps are kept within its tier's pace
    tells_steps: bool = False  # itself, so that streams need not be asked
    takes_promises: bool = False
    most_seqs: int | None = None  # that the controller lets in
    chunk_tokens: int | None = None  # that it set
    ahead: ChunksAhead | None = None  # how long prompts are sent ahead to it, unless it is driven
    suspected: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def models(self) -> frozenset[str]:
        probed = () if self.capabilities is None else self.capabilities.models
        return frozenset(self.settings.models or probed)


class GatewayFleet:
    """All configured backends. Their tasks live in the group given to `start`."""

    def __init__(self, teachers: Teachers, store: Store, shell: Shell, health: HealthSettings) -> None:
        self._teachers = teachers
        self._store = store
        self._shell = shell
        self._health = health
        self._members: dict[str, Member] = {}
        self._lengths: list[tuple[str, str, int, bool]] = []  # answers since the last look
        self._tasks: asyncio.TaskGroup | None = None
        self._leaving: dict[str, asyncio.Task[None]] = {}  # by backend: being forgotten by the store

    # --- for requests --------------------------------------------------------------------------------------

    def adapter(self, backend: str) -> Adapter:
        adapter = self._members[backend].adapter
        assert adapter is not None
        return adapter

    def capabilities(self, backend: str) -> Capabilities:
        capabilities = self._members[backend].capabilities
        assert capabilities is not None
        return capabilities

    def takes_promises(self, backend: str) -> bool:
        return self._members[backend].takes_promises

    def chunks_ahead(self, backend: str) -> ChunksAhead | None:
        member = self._members[backend]
        return None if member.driven else member.ahead

    def longer_than(self, backend: str, model: str) -> bool:
        """Whether another backend of the model that is up takes longer prompts than this one."""
        mine = self._members.get(backend)
        if mine is None or mine.published is None or (shorter := mine.published.limits.longest_prompt) is None:
            return False
        others = [
            other.published.limits.longest_prompt
            for other in self._members.values()
            if other is not mine and other.phase is Phase.UP and other.published and other.published.serves(model)
        ]
        return any(longest is None or longest > shorter for longest in others)

    def suspect(self, backend: str) -> None:
        member = self._members.get(backend)
        if member is not None:
            member.suspected.set()

    def serves(self, model: str) -> bool:
        """Whether any backend, up or not, has this model; one that lists no models may have any."""
        for member in self._members.values():
            models = member.models
            if model in models or (not models and member.phase is not Phase.CONNECTING):
                return True
        # While nothing has answered yet, no model can be called unknown.
        return all(member.phase is Phase.CONNECTING for member in self._members.values())

    def names(self) -> list[str]:
        """Every model, sorted."""
        return sorted({model for member in self._members.values() for model in member.models})

    def max_model_tokens(self, model: str) -> int | None:
        longest = 0
        for member in self._members.values():
            backend = member.published
            if backend is None or not backend.serves(model):
                continue
            if backend.limits.max_model_tokens is None:
                return None
            longest = max(longest, backend.limits.max_model_tokens)
        return longest or None

    async def count_tokens(self, model: str, fields: Mapping[str, object]) -> int | None:
        """Exact prompt tokens by an engine that can tell quickly; None when none can."""
        member = self.any_up(model)
        if member is None or member.adapter is None:
            return None
        try:
            async with asyncio.timeout(_COUNT_S):
                return await member.adapter.count_tokens(fields)
        except (Unsupported, UpstreamError, TimeoutError):
            return None

    def any_up(self, model: str | None) -> Member | None:
        """A backend for a request that needs no place: the first that is up and serves the model."""
        for member in self._members.values():
            backend = member.published
            if member.phase is Phase.UP and backend is not None and (model is None or backend.serves(model)):
                return member
        return None

    def abandon(self, backend: str, request_id: str) -> None:
        """Abort a request by its id, where the engine would go on with it for a while without its client."""
        member = self._members.get(backend)
        if member is None or member.adapter is None or member.capabilities is None or self._tasks is None:
            return
        if member.capabilities.lingers and member.capabilities.abort_by_id is Support.YES:
            aborting = _abort(member.adapter, request_id)
            try:
                self._tasks.create_task(aborting, name="abandoned")
            except RuntimeError:  # the gateway is coming down, and takes no task any more
                aborting.close()

    def learn_length(self, request: Request, output_tokens: int, *, complete: bool) -> None:
        per_sequence = max(1, output_tokens // request.sequences)
        cut = request.max_output_tokens is not None and per_sequence >= request.max_output_tokens
        self._lengths.append((request.model, request.tier, per_sequence, complete and not cut))

    def learn_step(self, sample: StepSample) -> None:
        member = self._members.get(sample.backend)
        if member is not None and member.learner is not None and not member.tells_steps:
            member.learner.observe(sample)

    def learn_prefill(self, sample: PrefillSample) -> None:
        member = self._members.get(sample.backend)
        if member is not None and member.learner is not None and not member.tells_steps:
            member.learner.observe_prefill(sample)

    # --- for driving ---------------------------------------------------------------------------------------

    def keeps(
        self, member: Member, *, driven: bool, most_seqs: int | None = None, chunk_tokens: int | None = None
    ) -> None:
        """How a backend is kept to its tier's pace: the core is told when that is new."""
        kept = (driven, most_seqs, chunk_tokens)
        if kept != (member.driven, member.most_seqs, member.chunk_tokens):
            member.driven, member.most_seqs, member.chunk_tokens = kept
            if member.published is not None and self._members.get(member.name) is member:
                self._publish(member)

    # --- looking in ----------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        return list(self._members.values())

    @property
    def up(self) -> int:
        return sum(member.phase is Phase.UP for member in self._members.values())

    @property
    def store_mode(self) -> Mode:
        """How this replica stands with the shared state."""
        return self._store.mode

    @property
    def replicas(self) -> int:
        """Live replicas, this one included, as far as is known."""
        return self._store.replicas

    @property
    def asked(self) -> bool:
        """Whether every backend has answered once, or was found wanting."""
        return all(member.phase is not Phase.CONNECTING or member.problem for member in self._members.values())

    # --- life ----------------------------------------------------------------------------------------------

    def start(self, tasks: asyncio.TaskGroup, backends: tuple[BackendSettings, ...]) -> list[asyncio.Task[None]]:
        """Look after these backends until the tasks are cancelled."""
        self._tasks = tasks
        for settings in backends:
            self._add(settings)
        return [tasks.create_task(self._learn(), name="learning")]

    def stop(self) -> None:
        """End every backend's task."""
        for member in self._members.values():
            if member.task is not None:
                member.task.cancel()
        for task in self._leaving.values():
            task.cancel()

    async def close(self) -> None:
        """Close every connection."""
        for member in self._members.values():
            if member.adapter is not None:
                await member.adapter.close()

    async def configure(self, backends: tuple[BackendSettings, ...]) -> None:
        """Add what is new, drain what is gone, and replace what changed. Streams go on."""
        wanted = {settings.name: settings for settings in backends}
        for name, member in list(self._members.items()):
            settings = wanted.get(name)
            if settings is None:
                self._remove(member)
                self._forget(name)
            elif settings != member.settings:
                self._change(member, settings)
        for name, settings in wanted.items():
            if name not in self._members:
                self._add(settings)

    def _change(self, member: Member, settings: BackendSettings) -> None:
        """The same backend with other settings. In the store it stays: other replicas carry load on it."""
        placing = {"tier": settings.tier, "pinned": settings.pinned, "limits": settings.limits}
        placing["driving"] = settings.driving
        if member.settings.model_copy(update=placing) != settings:
            self._remove(member)
            self._add(settings)
            return
        member.settings = settings
        if member.published is not None:
            self._publish(member)

    def _add(self, settings: BackendSettings) -> None:
        assert self._tasks is not None
        member = Member(settings)
        self._members[settings.name] = member
        member.task = self._tasks.create_task(self._look_after(member), name=f"backend-{settings.name}")

    def _remove(self, member: Member) -> None:
        """Take no newcomers; open streams keep their own connection until they end."""
        assert self._tasks is not None
        if member.task is not None:
            member.task.cancel()
        del self._members[member.name]
        if member.published is not None:
            self._shell.feed(BackendRemoved(member.name))
        if member.adapter is not None:
            self._tasks.create_task(self._close_when_idle(member.name, member.adapter), name="draining")

    def _forget(self, name: str) -> None:
        assert self._tasks is not None
        self._leaving[name] = self._tasks.create_task(self._forget_in_store(name), name=f"forget-{name}")

    async def _forget_in_store(self, name: str) -> None:
        """Every replica says so, and the first one does it; a backend that came back meanwhile stays."""
        while name not in self._members:
            try:
                await self._store.remove_backend(name)
                break
            except StoreUnavailable:
                await asyncio.sleep(_FIRST_RETRY_S)
        self._leaving.pop(name, None)

    async def _close_when_idle(self, name: str, adapter: Adapter) -> None:
        await self._shell.wait_empty(name)
        await adapter.close()

    async def _look_after(self, member: Member) -> None:
        """Connect, then watch the backend's health for ever."""
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                await self._connect(member)
                break
            except (UpstreamError, StoreUnavailable, BackendUnusable) as error:
                if member.problem is None:
                    log.warning("backend %s cannot be used yet: %s", member.name, error)
                member.problem = str(error)
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, _LAST_RETRY_S)
        while True:
            try:
                async with asyncio.timeout(self._look_every_s()):
                    await member.suspected.wait()
            except TimeoutError:
                pass
            member.suspected.clear()
            await self._check(member)

    async def _connect(self, member: Member) -> None:
        leaving = self._leaving.pop(member.name, None)
        if leaving is not None:
            await asyncio.wait({leaving})  # or it would be forgotten after it was made known
        if member.adapter is None:
            member.adapter = await self._teachers.connect(member.settings)
        member.capabilities = await self._probe(member, member.adapter)
        member.learner = await self._teachers.steps(member.settings, member.capabilities)
        membership = await self._store.add_backend(member.name, member.settings.tier)
        member.phase = Phase.UP
        member.problem = None
        self._publish(member)
        self._shell.feed(MembershipChanged(member.name, membership.tier, membership.epoch))
        log.info(
            "backend %s is up: %s %s%s",
            member.name,
            member.capabilities.engine,
            member.capabilities.version or "",
            " (emulated)" if member.capabilities.emulated else "",
        )

    async def _probe(self, member: Member, adapter: Adapter) -> Capabilities:
        """Raises UpstreamError, or BackendUnusable when it cannot do what its settings ask of it."""
        capabilities = await adapter.probe()
        member.ahead = chunks_ahead(member.settings, adapter, capabilities)
        return capabilities

    async def _check(self, member: Member) -> None:
        assert member.adapter is not None
        if await member.adapter.healthy():
            member.failures = 0
            if member.phase is Phase.DOWN:
                await self._revive(member)
            try:
                member.engine = await member.adapter.read_load()
            except UpstreamError as error:
                log.debug("backend %s tells no load: %s", member.name, error)
            else:
                await self._note(member)
                await self._learn_pace(member)
            return
        member.failures += 1
        if member.failures >= self._health.failures:
            if member.phase is Phase.UP:
                member.phase = Phase.DOWN
                member.problem = "its health check fails"
                log.warning("backend %s is down", member.name)
                self._publish(member)
        else:
            member.suspected.set()
            await asyncio.sleep(_FIRST_RETRY_S)

    def _look_every_s(self) -> float:
        every_s = self._health.every_s
        return every_s if self._store.mode is Mode.SHARED else min(every_s, _ALONE_EVERY_S)

    async def _note(self, member: Member) -> None:
        """Tell the store what the engine itself counts, where it does."""
        load = member.engine
        if load.running is None:
            return
        try:
            await self._store.note_engine(member.name, load.running + (load.waiting or 0))
        except StoreUnavailable as error:
            log.debug("the store was not told what backend %s counts: %s", member.name, error)

    async def _learn_pace(self, member: Member) -> None:
        """What the engine itself says of its steps. Streams whose events carry several tokens show less."""
        adapter, learner = member.adapter, member.learner
        assert adapter is not None
        if not isinstance(adapter, TellsPace) or learner is None:
            return
        try:
            pace = await adapter.read_decode_pace()
        except UpstreamError as error:
            log.debug("backend %s tells no step times: %s", member.name, error)
            return
        if pace is not None and pace.seqs >= 1.0:
            seqs, kv_tokens = round(pace.seqs), round(pace.kv_tokens)
            learner.observe(StepSample(member.name, pace.step_s, seqs, kv_tokens, pace.steps))

    async def _revive(self, member: Member) -> None:
        """It answers again; it may be another engine by now, so ask everything anew."""
        assert member.adapter is not None
        try:
            member.capabilities = await self._probe(member, member.adapter)
        except (UpstreamError, BackendUnusable) as error:
            member.problem = str(error)
            return
        member.phase = Phase.UP
        member.problem = None
        self._publish(member)
        log.info("backend %s is up again", member.name)

    def _publish(self, member: Member) -> None:
        """Tell the core what this backend is now."""
        capabilities, learner = member.capabilities, member.learner
        assert capabilities is not None
        assert learner is not None
        timing = learner.timing()
        profile = learner.limits
        probed = EngineLimits(
            capabilities.max_running_seqs or profile.max_running_seqs,
            capabilities.max_batched_tokens or profile.max_batched_tokens,
            capabilities.kv_tokens or profile.kv_tokens,
            capabilities.max_model_tokens or profile.max_model_tokens,
            capabilities.block_tokens or profile.block_tokens,
            capabilities.max_prompt_tokens,
            capabilities.lease_tokens,
        )
        limits = engine_limits(member.settings.limits, probed)
        if member.most_seqs is not None:
            most = min(limits.max_running_seqs or member.most_seqs, member.most_seqs)
            limits = replace(limits, max_running_seqs=most)
        member.version = timing.version
        member.published = Backend(
            name=member.name,
            step_time=timing.step_time,
            models=member.models,
            limits=limits,
            state=BackendState.UP if member.phase is Phase.UP else BackendState.DOWN,
            margin=timing.margin,
            calibrated=timing.calibrated,
            dynamic_chunk=member.driven and timing.calibrated,
            chunk_tokens=member.chunk_tokens,
            prefill_interval=capabilities.interval_with(member.chunk_tokens),
            pinned=member.settings.pinned,
            ahead_chunk_tokens=member.ahead.chunk_tokens if member.ahead and not member.driven else None,
        )
        self._shell.feed(BackendChanged(member.published))

    async def _learn(self) -> None:
        """Tell the core at a slow cadence what was learned."""
        while True:
            await asyncio.sleep(_LEARN_EVERY_S)
            for member in self._members.values():
                learner = member.learner
                if member.published is not None and learner and learner.timing().version != member.version:
                    self._publish(member)
            answers, self._lengths = self._lengths, []
            for model, tier, tokens, complete in answers:
                self._teachers.lengths.observe(model, tier, tokens, complete=complete)
            for model, tier, lengths in self._teachers.lengths.changed(self._shell.running_lengths()):
                self._shell.feed(LengthsChanged(model, tier, lengths))


async def _abort(adapter: Adapter, request_id: str) -> None:
    """Tried once: without it the engine only notices later."""
    try:
        async with asyncio.timeout(_ABORT_S):
            await adapter.abort(request_id)
    except (UpstreamError, Unsupported, TimeoutError) as error:
        log.debug("a request that was given up could not be aborted by its id: %s", error)

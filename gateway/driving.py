"""Drives the engines: what the controller decides is carried to them by their adapters, off the way of requests.

Each backend is looked at by itself, so that one that is slow to answer holds up no other. What it is told is told
whole and again, so it converges: an engine that was started anew, or a gateway that was, finds its way back.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from adapters.contract import Adapter, Capabilities, Drivable, Support, Unsupported, UpstreamError
from gateway.dispatch import Shell
from gateway.fleet import GatewayFleet, Member, Phase
from gateway.live import Live
from gateway.telemetry import Telemetry
from scheduling.control import Controller, must_speak
from scheduling.dispatcher import Dispatcher
from scheduling.events import Claim
from scheduling.knobs import ControlOptions, Means, Rung, Setting
from scheduling.ledger import Ledger
from tiergate_engine.control import EngineState, Mode, Orders

log = logging.getLogger("tiergate.driving")

_ANSWER_S = 5.0  # what an engine says later than this is not waited for
_PATIENCE = 3  # failures in a row before a rung is left
_BARRED_S = 30.0  # how long
_STEPS_EVERY_S = 1.0
_WATCH_EVERY_S = 20.0  # an engine that nobody gave orders counts and keeps steps only for whom asks now and then
_STEPS_ASKED = 64  # the latest: each costs the gateway some microseconds
_CHANNEL = "plug-in"


@dataclass(slots=True, eq=False)
class _Engine:
    """What is remembered of one backend, as long as it is the engine that was probed."""

    capabilities: Capabilities
    given: str | None = None  # the digest of the orders that were given last
    carried: tuple[int | None, int | None] = (None, None)  # chunk budget and running cap that were set
    carried_s: float = -math.inf
    run_id: str | None = None
    cursor: int = 0
    asked_s: float = -math.inf
    failures: int = 0
    barred: dict[str, float] = field(default_factory=dict)  # rungs that do not work, and until when
    said: set[str] = field(default_factory=set)


class Driving:
    """One task, `run`, which asks the controller and has each engine told."""

    def __init__(
        self,
        fleet: GatewayFleet,
        dispatcher: Dispatcher,
        shell: Shell,
        live: Live,
        telemetry: Telemetry,
        clock: Callable[[], float],
    ) -> None:
        self.controller = Controller(ControlOptions.lapsing(live.now.settings.orders_lapse_s))
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._shell = shell
        self._live = live
        self._telemetry = telemetry
        self._clock = clock
        self._engines: dict[str, _Engine] = {}
        self._busy: set[str] = set()

    async def run(self) -> None:
        """Look at every backend that is up, twice a second, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(self.controller.options.every_s)
                members = {member.name: member for member in self._fleet.members()}
                for name in self._engines.keys() - members.keys():
                    self._forget(name)
                for name, member in members.items():
                    if member.phase is Phase.UP and name not in self._busy:
                        self._busy.add(name)
                        tasks.create_task(self._look(member), name=f"drive-{name}")

    def _forget(self, name: str) -> None:
        del self._engines[name]
        self.controller.forget(name)

    def is_on(self, member: Member) -> bool:
        """Whether a backend is to be driven at all."""
        driving = member.settings.driving
        return self._live.now.settings.driving if driving is None else driving

    async def _look(self, member: Member) -> None:
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._drive(member)
        except (UpstreamError, TimeoutError) as error:
            self._failed(member, error)
        except Exception:  # whatever is wrong here, requests are served without it
            log.exception("backend %s cannot be driven", member.name)
            self._fleet.keeps(member, driven=False)
        finally:
            self._busy.discard(member.name)

    async def _drive(self, member: Member) -> None:
        """One look at one backend. Raises UpstreamError."""
        ledger = self._dispatcher.fleet.get(member.name)
        adapter, engine = member.adapter, self._engine_of(member)
        if ledger is None or adapter is None:
            return
        if not self.is_on(member):
            await self._let_go(member, adapter, engine)
            return
        plugin = self._plugin_of(adapter, engine)
        member.takes_promises = plugin is not None
        state = None
        if plugin is not None:
            try:
                state = await plugin.read_state()
                await self._learn(member, engine, plugin, state)
            except Unsupported as error:
                self._bar(member, engine, _CHANNEL, error)
                plugin = None
        now_s = self._clock()
        host_s = self._dispatcher.fleet.host_tpot_s(ledger, now_s)
        means = self._means(engine, now_s, driven=plugin is not None)
        before = self.controller.decisions(member.name)
        setting = self.controller.decide(ledger, means, host_s, self._dispatcher.tiers, now_s)
        if not before or before[-1] is not setting:
            self._telemetry.control_changed(member.name, setting.rung.value)
            log.debug("backend %s: %s: %s", member.name, setting.rung.value, setting.reason)
        try:
            if plugin is not None and state is not None:
                driven = await self._order(plugin, engine, setting, state)
            else:
                driven = await self._set(member, adapter, engine, setting)
        except Unsupported as error:
            self._bar(member, engine, setting.rung.value, error)
            driven = False
        engine.failures = 0
        if setting.tier is not None:
            self._loosen(member, ledger, setting)
        chunk = setting.chunk_tokens if driven else None
        self._fleet.keeps(member, driven=driven, most_seqs=setting.concurrency, chunk_tokens=chunk)

    # --- what an engine can be told --------------------------------------------------------------------------

    def _engine_of(self, member: Member) -> _Engine:
        """What is remembered of it; nothing, when it was probed anew."""
        capabilities = member.capabilities
        assert capabilities is not None
        engine = self._engines.get(member.name)
        if engine is None or engine.capabilities is not capabilities:
            engine = self._engines[member.name] = _Engine(capabilities)
            member.tells_steps = False
        return engine

    def _plugin_of(self, adapter: Adapter, engine: _Engine) -> Drivable | None:
        if engine.capabilities.driven is not Support.YES or self._is_barred(engine, _CHANNEL):
            return None
        return adapter if isinstance(adapter, Drivable) else None

    def _means(self, engine: _Engine, now_s: float, *, driven: bool) -> Means:
        """`driven`: its plug-in answers. Without one that has to, nothing that goes through it works."""
        capabilities = engine.capabilities
        lost = capabilities.driven is Support.YES and not driven

        def has(support: Support, rung: Rung) -> bool:
            return support is Support.YES and not lost and engine.barred.get(rung.value, -math.inf) <= now_s

        return Means(
            orders=has(capabilities.driven, Rung.DRIVEN),
            chunk_budget=has(capabilities.chunk_budget, Rung.CHUNK_BUDGET),
            running_cap=has(capabilities.running_cap, Rung.RUNNING_CAP),
            admission=self._dispatcher.options.paces_prefill,
            chunk_alone=capabilities.prefill_interval is not None,
        )

    def _is_barred(self, engine: _Engine, what: str) -> bool:
        return engine.barred.get(what, -math.inf) > self._clock()

    def _bar(self, member: Member, engine: _Engine, what: str, error: Exception) -> None:
        """It does not work: do with less for a while. Said once as long as the engine is the same."""
        engine.barred[what] = self._clock() + _BARRED_S
        if what == _CHANNEL:
            member.tells_steps = member.takes_promises = False
        if what not in engine.said:
            engine.said.add(what)
            log.warning("backend %s is driven with less: %s does not work: %s", member.name, what, error)

    def _failed(self, member: Member, error: UpstreamError | TimeoutError) -> None:
        """It did not answer, or not well. The health check says whether it is down; here it is asked for less."""
        engine = self._engines.get(member.name)
        if engine is None:
            return
        engine.failures += 1
        if engine.failures < _PATIENCE:
            return
        told = self.controller.decisions(member.name)
        plugged = engine.capabilities.driven is Support.YES
        what = _CHANNEL if plugged else told[-1].rung.value if told else Rung.UNSET.value
        self._bar(member, engine, what, error)
        self._fleet.keeps(member, driven=False)

    # --- what it is told -------------------------------------------------------------------------------------

    async def _order(self, plugin: Drivable, engine: _Engine, setting: Setting, state: EngineState) -> bool:
        """Orders for an engine with the plug-in; whether it keeps its pace. Raises Unsupported, UpstreamError."""
        options = self.controller.options
        try:
            orders = setting.orders(options.lapse_s)
            digest = orders.digest
        except ValueError as error:
            raise Unsupported(f"the orders cannot be put into words: {error}") from error
        if orders == Orders() and engine.given is None:
            return False  # there is nothing to say to it, and nothing of ours to take back
        if must_speak(state, orders, engine.given, options):
            state = await plugin.give_orders(orders)
            engine.given = digest
        if setting.rung is not Rung.DRIVEN:
            return setting.rung is Rung.CHUNK_BUDGET
        if state.mode is Mode.DRIVEN:
            return True
        if state.orders_digest == digest:
            raise Unsupported(f"it has the orders and does not obey them ({state.note or 'it does not say why'})")
        return False

    async def _set(self, member: Member, adapter: Adapter, engine: _Engine, setting: Setting) -> bool:
        """Single knobs of an engine without the plug-in; whether it keeps its pace. They are set again once in a
        while: the engine may have been started anew. Raises UpstreamError."""
        wanted = (setting.chunk_tokens, setting.running_cap)
        now_s = self._clock()
        due = now_s - engine.carried_s >= self.controller.options.yield_s and wanted != (None, None)
        if wanted != engine.carried or due:
            knobs = ((Rung.CHUNK_BUDGET, adapter.set_chunk_budget), (Rung.RUNNING_CAP, adapter.set_running_cap))
            taken: list[int | None] = []
            for (rung, turn), value, before in zip(knobs, wanted, engine.carried, strict=True):
                try:
                    if value is not None or before is not None:
                        await turn(value)
                    taken.append(value)
                except Unsupported as error:
                    self._bar(member, engine, rung.value, error)
                    taken.append(None)
            engine.carried, engine.carried_s = (taken[0], taken[1]), now_s
        return setting.rung is Rung.CHUNK_BUDGET and not self._is_barred(engine, Rung.CHUNK_BUDGET.value)

    def _loosen(self, member: Member, ledger: Ledger, setting: Setting) -> None:
        """Give a backend that cannot keep its tier's pace at all to a tier whose pace it can keep."""
        tier = setting.tier
        free = not member.settings.pinned and ledger.claiming_for is None and self._dispatcher.policy.uses_tiers
        if free and tier is not None and ledger.tier not in {None, tier}:
            self._shell.move(Claim(member.name, tier, ledger.epoch, setting.reason))

    async def _let_go(self, member: Member, adapter: Adapter, engine: _Engine) -> None:
        """It is not to be driven (any more): what was set is taken back, once."""
        member.takes_promises = member.tells_steps = False
        self._fleet.keeps(member, driven=False)
        self.controller.forget(member.name)
        try:
            if engine.given is not None and isinstance(adapter, Drivable):
                await adapter.give_orders(Orders())
            if engine.carried[0] is not None:
                await adapter.set_chunk_budget(None)
            if engine.carried[1] is not None:
                await adapter.set_running_cap(None)
        except Unsupported as error:
            log.debug("backend %s cannot be let go: %s", member.name, error)
        engine.given, engine.carried = None, (None, None)

    # --- what it tells ---------------------------------------------------------------------------------------

    async def _learn(self, member: Member, engine: _Engine, plugin: Drivable, state: EngineState) -> None:
        """Its latest steps teach how long they take. Raises Unsupported, UpstreamError."""
        if state.run_id != engine.run_id:
            engine.run_id, engine.cursor = state.run_id, max(state.steps - _STEPS_ASKED, 0)
        now_s = self._clock()
        made = state.steps - engine.cursor
        if now_s - engine.asked_s < (_STEPS_EVERY_S if made > 0 else _WATCH_EVERY_S):
            return
        engine.asked_s = now_s
        told = await plugin.read_steps(max(engine.cursor, state.steps - _STEPS_ASKED))
        if told.run_id != engine.run_id or member.learner is None or not told.facts:
            return
        engine.cursor = told.next
        member.tells_steps = True
        member.learner.observe_told([(fact.step, fact.seconds) for fact in told.facts], made)

"""The controller on virtual time: what `scheduling.control` decides is carried to simulated engines, as
`gateway.driving` does it live.

Each gateway replica looks at every backend twice a second, has its `Controller` decide, and tells the engine what
is new, a moment later. While an engine obeys, the replica's own dispatcher counts on it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from scheduling import events as ev
from scheduling.backends import Backend, BackendState
from scheduling.control import Controller, must_speak
from scheduling.knobs import ControlOptions, Means, Rung, Setting
from scheduling.ledger import Ledger
from simulator.agenda import Agenda
from simulator.engines import SimEngine
from simulator.replica import Replica
from tiergate_engine.control import EngineState, Mode, Orders, SchedulerKind
from tiergate_engine.ordered import Ordered

CARRY_S = 0.01
"""From a decision to the engine that heard it: what is seen of the engine and what it is told go over HTTP, and
the engine takes it up between two steps."""
_NOTHING_KEPT = (False, None, None)


@dataclass(slots=True, eq=False)
class _Memory:
    """What a replica remembers of one engine, as long as it was not started anew."""

    ordered: Ordered
    setting: Setting | None = None
    orders: Orders | None = None  # of the setting, as is their digest
    digest: str = ""
    given: str | None = None  # the digest of what was given last
    carried: tuple[int | None, int | None] = (None, None)  # chunk budget and running cap that were set
    carried_s: float = -math.inf


class SimDriving:
    """One replica's controller. It looks at the engines from its first period on, until `stop`.

    Attributes:
        decisions: how many settings were decided, by rung.
    """

    def __init__(
        self,
        replica: Replica,
        engines: Mapping[str, SimEngine],
        agenda: Agenda,
        means: Means,
        options: ControlOptions | None = None,
    ) -> None:
        self.controller = Controller(options)
        self.decisions: Counter[str] = Counter()
        self._replica = replica
        self._engines = engines
        self._agenda = agenda
        self._means = means
        self._memories: dict[str, _Memory] = {}
        self._published: dict[str, Backend] = {}  # as it was before anything was decided of it
        self._kept: dict[str, tuple[bool, int | None, int | None]] = {}
        self._stopped = False
        self._again()

    def stop(self) -> None:
        """The gateway is gone: nothing more is decided, or told. What is on its way still arrives."""
        self._stopped = True

    def _again(self) -> None:
        self._agenda.at(self._agenda.now_s + self.controller.options.every_s, self._look)

    def _look(self) -> None:
        if self._stopped:
            return
        for name, engine in self._engines.items():
            ledger = self._replica.dispatcher.fleet.get(name)
            if ledger is not None and ledger.backend.state is BackendState.UP and engine.alive:
                self._drive(name, engine, ledger)
        self._again()

    def _drive(self, name: str, engine: SimEngine, ledger: Ledger) -> None:
        ordered = engine.ordered
        if ordered is None:
            raise ValueError(f"engine {name} takes no orders")
        memory = self._memories.get(name)
        if memory is None or memory.ordered is not ordered:
            memory = self._memories[name] = _Memory(ordered)
        now_s, dispatcher = self._agenda.now_s, self._replica.dispatcher
        host_s = dispatcher.fleet.host_tpot_s(ledger, now_s)
        before = self.controller.decisions(name)
        setting = self.controller.decide(ledger, self._means, host_s, dispatcher.tiers, now_s)
        if not before or before[-1] is not setting:
            self.decisions[setting.rung.value] += 1
        if self._means.orders:
            self._order(name, engine, memory, setting)
        else:
            self._set(name, engine, memory, setting)
        if setting.tier is not None:
            self._loosen(ledger, setting)

    # --- what an engine is told ------------------------------------------------------------------------------

    def _order(self, name: str, engine: SimEngine, memory: _Memory, setting: Setting) -> None:
        """Orders for an engine with the plug-in, said again before they lapse."""
        options = self.controller.options
        if memory.orders is None or memory.setting is not setting:
            memory.setting, memory.orders = setting, setting.orders(options.lapse_s)
            memory.digest = memory.orders.digest
        orders = memory.orders
        state = _state_of(engine, memory.ordered, self._agenda.now_s)
        if orders == Orders() and memory.given is None:
            self._keeps(name, setting, driven=False)
        elif must_speak(state, orders, memory.given, options):
            self._carry(lambda: self._give(name, engine, memory, setting, orders))
        else:
            self._keeps(name, setting, driven=state.mode is Mode.DRIVEN)

    def _give(self, name: str, engine: SimEngine, memory: _Memory, setting: Setting, orders: Orders) -> None:
        ordered = memory.ordered
        if not engine.alive or engine.ordered is not ordered:
            return  # it went down on the way, and another one is there by now
        ordered.give(orders, self._agenda.now_s)
        memory.given = ordered.digest
        self._keeps(name, setting, driven=ordered.holding(self._agenda.now_s).mode is Mode.DRIVEN)

    def _set(self, name: str, engine: SimEngine, memory: _Memory, setting: Setting) -> None:
        """Single knobs of an engine without the plug-in. They do not lapse, and are set again once in a while."""
        wanted, now_s = (setting.chunk_tokens, setting.running_cap), self._agenda.now_s
        due = now_s - memory.carried_s >= self.controller.options.yield_s and wanted != (None, None)
        if wanted == memory.carried and not due:
            self._keeps(name, setting, driven=setting.rung is Rung.CHUNK_BUDGET)
            return
        memory.carried, memory.carried_s = wanted, now_s
        self._carry(lambda: self._turn(name, engine, memory, setting))

    def _turn(self, name: str, engine: SimEngine, memory: _Memory, setting: Setting) -> None:
        if engine.alive and engine.ordered is memory.ordered:
            orders = Orders(chunk_tokens=setting.chunk_tokens, running_cap=setting.running_cap)
            memory.ordered.give(orders, self._agenda.now_s)
            self._keeps(name, setting, driven=setting.rung is Rung.CHUNK_BUDGET)

    def _carry(self, call: Callable[[], None]) -> None:
        self._agenda.at(self._agenda.now_s + CARRY_S, call)

    def _loosen(self, ledger: Ledger, setting: Setting) -> None:
        """Give a backend that cannot keep its tier's pace at all to a tier whose pace it can keep."""
        tier, backend = setting.tier, ledger.backend
        free = not backend.pinned and ledger.claiming_for is None and self._replica.dispatcher.policy.uses_tiers
        if free and tier is not None and ledger.tier not in {None, tier}:
            self._replica.move(ev.Claim(backend.name, tier, ledger.epoch, setting.reason))

    # --- what the core is told -------------------------------------------------------------------------------

    def _keeps(self, name: str, setting: Setting, *, driven: bool) -> None:
        """How a backend is kept to its pace: the core is told when that is new."""
        chunk = setting.chunk_tokens if driven else None
        kept = (driven, setting.concurrency, chunk)
        ledger = self._replica.dispatcher.fleet.get(name)
        if ledger is None or self._kept.get(name, _NOTHING_KEPT) == kept:
            return
        self._kept[name] = kept
        backend = ledger.backend
        limits = self._published.setdefault(name, backend).limits
        if setting.concurrency is not None:
            most = min(limits.max_running_seqs or setting.concurrency, setting.concurrency)
            limits = replace(limits, max_running_seqs=most)
        backend = replace(backend, dynamic_chunk=driven, limits=limits, chunk_tokens=chunk)
        self._replica.tell(ev.BackendChanged(backend))


def _state_of(engine: SimEngine, ordered: Ordered, now_s: float) -> EngineState:
    """What an engine with the plug-in would tell of itself."""
    model = engine.model
    config = model.config
    return EngineState(
        run_id="simulated",
        engine="vllm",
        engine_version="simulated",
        tested=True,
        scheduler=SchedulerKind.ASYNC if config.async_scheduling else SchedulerKind.SYNC,
        mode=ordered.holding(now_s).mode,
        orders_digest=ordered.digest,
        orders_age_s=ordered.age_s(now_s),
        steps=model.steps,
        running=model.running,
        waiting=model.waiting,
        kv_usage=model.kv_used_tokens / model.kv_capacity_tokens,
        budget_tokens=ordered.budget_tokens,
        max_batched_tokens=config.max_batched_tokens,
        max_running_seqs=config.max_running_seqs,
    )

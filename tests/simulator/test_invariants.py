"""What always holds in a simulated fleet, after every event, whatever goes wrong (docs/invariants.md).

Small fleets of small, uneven engines whose KV is short, so that sequences are preempted; answers longer than
anybody expected; backends that crash, slow down and return; slow starts; several replicas with old views.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling import events as ev
from scheduling.backends import Backend, EngineLimits
from scheduling.checks import KvGrowth
from scheduling.decisions import Decision, Outcome, Verdict
from scheduling.dispatcher import Dispatcher
from scheduling.ledger import Ledger
from scheduling.lengths import FixedLength
from scheduling.load import LoadVector
from scheduling.policies.protocol import Admission
from scheduling.requests import Request
from scheduling.scoring import RequestEnd
from scheduling.tiers import OnMiss, Slo, Tier, TierSet
from simulator.contenders import KNOBS, names, setup_for
from simulator.disagg import DisaggregatedFleet, Half, Link, prefill_tiers
from simulator.fleet import FleetOptions, SimFleet
from simulator.requests import SimRequest
from simulator.scenario import Contender, Fault, FaultKind, Form
from simulator.served import SimResult
from simulator.setup import Setup
from simulator.store import View
from state.contract import BackendLoad, Membership
from tiergate_engine.model import EngineConfig, EngineModel
from tiergate_engine.step import StepTime
from tiergate_engine.steptime import RooflineStepTime

TIERS = TierSet(
    (
        Tier("tight", Slo(0.4, 0.020), 0),
        Tier("middle", Slo(0.8, 0.040), 1, OnMiss.RELEGATE),
        Tier("loose", Slo(2.0, 0.100), 2),
        Tier("whenever", Slo(None, None), 3, OnMiss.RELEGATE),
    ),
    "middle",
)
FAST = RooflineStepTime(weights_s=0.008, per_token_s=4e-5, per_seq_s=8e-4, per_kv_s=1e-6, sharpness=2.0)
SLOW = RooflineStepTime(weights_s=0.014, per_token_s=8e-5, per_seq_s=1e-3, per_kv_s=2e-6, sharpness=2.0)
CONFIG = EngineConfig(2_000, 1_000, max_running_seqs=16, max_batched_tokens=256, prefix_caching=True)
LIMITS = EngineLimits(16, 256, 2_000, 1_000)
EXPECTED_TOKENS = 30
AFTER_S = 3.0  # a fleet that has nothing to do is watched on for so long
LONGEST_S = 120.0  # far longer than any scene takes


@dataclass(frozen=True)
class Scene:
    """One small run."""

    contender: Contender
    seed: int
    backends: int
    requests: int
    rate_rps: float
    replicas: int = 1
    view_age_s: float = 0.0
    startup_s: float = 0.0
    faults: tuple[Fault, ...] = ()


@dataclass
class Lease:
    reserved: bool = False
    refused: bool = False
    released: int = 0
    open_on: str | None = None


class Watched(Dispatcher):
    """A dispatcher whose events and actions are noted down, and whose placements are looked at."""

    def watch(self) -> None:
        self.said: list[str] = []
        self.leases: dict[str, Lease] = {}
        self.ended: Counter[str] = Counter()
        self.decisions: list[Decision] = []
        self.watching = True

    def handle(self, event: ev.Event, now_s: float) -> list[ev.Action]:
        if not getattr(self, "watching", False):
            return super().handle(event, now_s)
        self._note_event(event)
        actions = super().handle(event, now_s)
        for action in actions:
            self._note_action(action)
        self.said.append(f"{now_s!r} {event!r} {actions!r}")
        return actions

    def _note_event(self, event: ev.Event) -> None:
        match event:
            case ev.Reserved(_, lease_id, _):
                self.leases[lease_id].reserved = True
            case ev.ReserveRefused(_, lease_id, _):
                self.leases[lease_id].refused = True
            case ev.Ended(lease_id, _, _) | ev.OpenFailed(_, lease_id, _, _):
                assert self.leases[lease_id].open_on is not None
                self.leases[lease_id].open_on = None
                if isinstance(event, ev.Ended) or not event.retryable:
                    self.ended[lease_id.rsplit("#", 1)[0]] += 1
            case _:
                pass

    def _note_action(self, action: ev.Action) -> None:
        match action:
            case ev.Reserve(_, lease_id, _, decision):
                assert lease_id not in self.leases
                self.leases[lease_id] = Lease()
                self.decisions.append(decision)
                assert_placed_knowingly(self, lease_id, decision)
            case ev.Open(_, lease_id, backend, _, _):
                self.leases[lease_id].open_on = backend
            case ev.Release(lease_id, _):
                assert self.leases[lease_id].reserved
                self.leases[lease_id].released += 1
            case ev.Refuse(request_id, refusal, _):
                assert refusal.message
                self.ended[request_id] += 1
            case _:
                pass


def assert_placed_knowingly(dispatcher: Dispatcher, lease_id: str, decision: Decision) -> None:
    """No promise is broken knowingly: the prediction keeps everybody's, or the decision says whose is given up."""
    assert decision.reason
    assert decision.backend is not None
    chosen = next(one for one in reversed(decision.candidates) if one.backend == decision.backend)
    assert chosen.verdict is Verdict.FEASIBLE
    ledger = dispatcher.fleet[decision.backend]
    resident = ledger.residents.get(lease_id)
    if dispatcher.policy.admission is not Admission.EVERY_PROMISE:
        assert decision.outcome in (Outcome.ROUTED, Outcome.RELEGATED)
        return
    if resident is None or ledger.backend.name != decision.backend:
        return
    checks = dispatcher.policy.checks
    if checks.kv_growth is KvGrowth.PEAK:
        assert_paces_kept(ledger)
    slo = resident.request.slo
    if decision.outcome is Outcome.RELEGATED:
        assert resident.lost or slo.ttft_s is None
    elif slo.ttft_s is not None and not resident.lost and checks.first_token:
        assert chosen.ttft_s is not None
        assert chosen.ttft_s <= slo.ttft_s + 1e-9


def assert_paces_kept(ledger: Ledger) -> None:
    """A step of everybody on board, at the peak of their KV, keeps the tightest pace that was promised to one."""
    promised_s = [one.tpot_s for one in ledger.residents.values() if not one.lost]
    steady_s = ledger.backend.step_time.decode_seconds(ledger.seqs, ledger.peak_kv_tokens)
    assert steady_s <= min(promised_s, default=math.inf) * (1 + 1e-9)


def requests(scene: Scene) -> list[SimRequest]:
    rng = Random(scene.seed)
    made: list[SimRequest] = []
    now_s = 0.0
    for index in range(scene.requests):
        now_s += rng.expovariate(scene.rate_rps)
        tier = rng.choice(TIERS.tiers)
        prompt, output = rng.choice((rng.randint(1, 60), rng.randint(1, 500))), rng.choice((1, 2, 10, 30, 60, 120))
        # two families of prompts that begin alike, for the prefix cache
        family, alike = rng.randrange(2), rng.randrange(prompt // CONFIG.block_tokens + 1)
        prefix = tuple(1000 * family + block for block in range(alike))
        request = Request(f"r{index}", "m", tier.name, tier.slo, prompt, now_s)
        made.append(SimRequest(request, output, prefix, CONFIG.block_tokens))
    return made


@dataclass
class Part:
    """A fleet, or one half of a disaggregated one."""

    fleet: SimFleet
    dispatchers: list[Watched]


@dataclass
class Ran:
    result: SimResult
    parts: list[Part]
    events: int = 0
    said: list[str] = field(default_factory=list)

    @property
    def dispatchers(self) -> list[Watched]:
        return [dispatcher for part in self.parts for dispatcher in part.dispatchers]


def dispatchers_of(
    scene: Scene, setup: Setup, tiers: TierSet, kinds: Sequence[tuple[str, StepTime]]
) -> list[Watched]:
    made = []
    for replica in range(scene.replicas):
        dispatcher = Watched(tiers, setup.policy(Random(scene.seed + replica)), setup.options)
        for name, step_time in kinds:
            backend = Backend(name, step_time, limits=LIMITS, margin=setup.margin, dynamic_chunk=setup.driven)
            dispatcher.handle(ev.BackendChanged(backend), 0.0)
        for tier in tiers.tiers:
            dispatcher.handle(ev.LengthsChanged("m", tier.name, FixedLength(EXPECTED_TOKENS)), 0.0)
        dispatcher.watch()
        made.append(dispatcher)
    return made


def engines_of(kinds: Sequence[tuple[str, StepTime]]) -> dict[str, Callable[[], EngineModel]]:
    def maker(step_time: StepTime) -> Callable[[], EngineModel]:
        return lambda: EngineModel(CONFIG, step_time)

    return {name: maker(step_time) for name, step_time in kinds}


def build(scene: Scene) -> tuple[SimFleet | DisaggregatedFleet, list[Part]]:
    setup = setup_for(scene.contender)
    kinds = [
        (f"e{index}", step_time) for index, step_time in enumerate([FAST, SLOW, FAST, SLOW][: scene.backends])
    ]
    options = FleetOptions(
        driven=setup.driven, view_age_s=scene.view_age_s, startup_s=scene.startup_s, faults=scene.faults
    )
    tiers = setup.tiers(TIERS)
    if setup.form is Form.COLOCATED:
        made = dispatchers_of(scene, setup, tiers, kinds)
        fleet = SimFleet(made, engines_of(kinds), options)
        return fleet, [Part(fleet, made)]
    before, after = kinds[:1], kinds[1:]
    first, second = (
        dispatchers_of(scene, setup, prefill_tiers(tiers), before),
        dispatchers_of(scene, setup, tiers, after),
    )
    one = replace(options, faults=tuple(fault for fault in scene.faults if fault.backend == 0))
    other = replace(
        options, faults=tuple(replace(fault, backend=0) for fault in scene.faults if fault.backend == 1)
    )
    halves = Half(first, engines_of(before), one), Half(second, engines_of(after), other)
    both = DisaggregatedFleet(*halves, Link(1e9, 100_000))
    return both, [Part(both.prefill, first), Part(both.decode, second)]


def run(scene: Scene) -> Ran:
    """Serve a scene to its end, with everything looked at after every event."""
    fleet, parts = build(scene)
    ran = Ran(SimResult((), 0.0, 0.0, 0, 0.0), parts)

    def look() -> None:
        ran.events += 1
        assert fleet.agenda.now_s < LONGEST_S, "somebody waits for ever"
        for part in parts:
            assert_conserved(part)
            assert_engines_agree(part)
            for dispatcher in part.dispatchers:
                for ledger in dispatcher.fleet:
                    assert_load_true(ledger)

    asked = requests(scene)
    ran.result = fleet.run(asked, look)
    ended = [served.sim.request.request_id for served in ran.result.served]
    assert sorted(ended) == sorted(sim.request.request_id for sim in asked)
    for served in ran.result.served:
        if served.end is RequestEnd.FINISHED:
            assert served.times is not None
            assert served.times.tokens == served.sim.output_tokens
        else:
            assert served.reason
    until_s = fleet.agenda.now_s + AFTER_S
    while fleet.agenda.now_s < until_s and fleet.agenda.run_next():
        look()
    for part in parts:
        assert_nothing_is_left(part)
    ran.said = [line for dispatcher in ran.dispatchers for line in dispatcher.said]
    return ran


def assert_conserved(part: Part) -> None:
    counts = [dispatcher.counts for dispatcher in part.dispatchers]
    assert all(each.conserved for each in counts)
    ends = Counter(served.end for served in part.fleet.served)
    assert ends[RequestEnd.FINISHED] == sum(each.finished for each in counts)
    assert ends[RequestEnd.REFUSED] == sum(each.refused for each in counts)
    assert ends[RequestEnd.FAILED] == sum(each.failed for each in counts)
    for dispatcher in part.dispatchers:
        assert all(times == 1 for times in dispatcher.ended.values())
        opened = sum(lease.open_on is not None for lease in dispatcher.leases.values())
        assert opened == dispatcher.counts.open
        for lease in dispatcher.leases.values():
            assert lease.released <= 1
            assert not (lease.released and lease.open_on)


def assert_engines_agree(part: Part) -> None:
    """Every open stream is on its engine, and nobody else is; one that is down turns away those who are told of it
    only then."""
    on_board: dict[str, set[str]] = {name: set() for name in part.fleet.engines}
    for dispatcher in part.dispatchers:
        for lease_id, lease in dispatcher.leases.items():
            if lease.open_on is not None:
                on_board[lease.open_on].add(lease_id)
    for name, engine in part.fleet.engines.items():
        assert set(engine.streams) == on_board[name] or not engine.alive
        assert set(engine.streams) <= on_board[name]
        assert engine.model.running + engine.model.waiting == len(engine.streams)
        assert 0 <= engine.model.kv_used_tokens <= engine.model.kv_capacity_tokens


def assert_load_true(ledger: Ledger) -> None:
    """Never negative, and nothing where nobody is."""
    own = ledger.own_load()
    for load in (own, ledger.foreign):
        assert load.decodes >= 0
        assert load.peak_kv_tokens >= 0
        assert load.queued_prefill_tokens >= 0
        assert all(count >= 0 for count in load.residents.values())
    assert own.decodes == len(ledger.residents)
    if not ledger.residents:
        assert own.idle


def assert_nothing_is_left(part: Part) -> None:
    for dispatcher in part.dispatchers:
        counts = dispatcher.counts
        assert (counts.held, counts.reserving, counts.open) == (0, 0, 0)
        for lease in dispatcher.leases.values():
            assert lease.open_on is None
            assert lease.reserved != lease.refused
            assert lease.released == (1 if lease.reserved else 0)
        assert all(ledger.idle for ledger in dispatcher.fleet)
    for engine in part.fleet.engines.values():
        assert engine.model.idle
        assert engine.model.kv_used_tokens == 0


FAULTS = st.lists(
    st.builds(
        Fault,
        backend=st.integers(0, 1),
        kind=st.sampled_from(list(FaultKind)),
        from_s=st.floats(0.0, 1.5),
        for_s=st.floats(0.05, 1.0),
        factor=st.sampled_from([1.5, 4.0]),
    ),
    max_size=3,
).map(tuple)


def contenders(name: str) -> st.SearchStrategy[Contender]:
    """A contender with up to three of its switches turned."""
    switches = [
        (knob.name, value)
        for knob in KNOBS[name]
        for value in (knob.choices or ((True, False) if isinstance(knob.default, bool) else ()))
        if value != knob.default and knob.name != "lengths"
    ]
    turned = st.lists(st.sampled_from(switches), max_size=3, unique_by=lambda one: one[0])
    return turned.map(lambda knobs: Contender(name, tuple(sorted(knobs))))


def scenes(contender: str) -> st.SearchStrategy[Scene]:
    return st.builds(
        Scene,
        contender=contenders(contender),
        seed=st.integers(0, 10_000),
        backends=st.integers(2, 4),
        requests=st.integers(5, 40),
        rate_rps=st.sampled_from([10.0, 30.0, 90.0]),
        replicas=st.integers(1, 3),
        view_age_s=st.sampled_from([0.0, 0.1, 0.5]),
        startup_s=st.sampled_from([0.0, 0.3]),
        faults=FAULTS,
    )


@pytest.mark.parametrize("contender", names())
def test_a_fleet_keeps_its_invariants_whatever_goes_wrong(contender: str) -> None:
    @settings(max_examples=20, deadline=None)
    @given(scenes(contender))
    def keeps(scene: Scene) -> None:
        run(scene)

    keeps()


CROWDED = (
    Fault(0, FaultKind.DOWN, 0.3, 0.4),
    Fault(1, FaultKind.SLOW, 0.2, 1.0, 3.0),
    Fault(1, FaultKind.DOWN, 1.4, 0.2),
)


@pytest.mark.parametrize("contender", names())
def test_the_same_seed_gives_the_same_bytes(contender: str) -> None:
    scene = Scene(Contender(contender), 7, 3, 40, 60.0, replicas=2, view_age_s=0.1, startup_s=0.2, faults=CROWDED)
    once, again = run(scene), run(scene)
    assert once.said == again.said
    assert repr(once.result) == repr(again.result)
    assert once.events == again.events > 100


def test_the_scenes_are_as_rough_as_they_are_meant_to_be() -> None:
    """Preemption, lost streams, retries, refusals and relegation do occur in what is run above."""
    ran = [
        run(Scene(Contender(name), seed, 3, 60, 90.0, replicas=2, faults=CROWDED))
        for name in ("polyserve_co", "random")
        for seed in (1, 2)
    ]
    assert sum(each.result.preemptions for each in ran) > 0
    ends = Counter(served.end for each in ran for served in each.result.served)
    assert min(ends[RequestEnd.FINISHED], ends[RequestEnd.REFUSED], ends[RequestEnd.FAILED]) > 0
    attempts = Counter(lease for each in ran for one in each.dispatchers for lease in one.leases)
    assert any(lease.endswith("#2") for lease in attempts)
    outcomes = {decision.outcome for each in ran for one in each.dispatchers for decision in one.decisions}
    assert {Outcome.OWN_TIER, Outcome.RELEGATED, Outcome.ROUTED} <= outcomes


def test_nobody_waits_for_ever_for_the_backend_that_failed_it() -> None:
    """A silo offers a request without a deadline one backend; where that failed it, its wait has to end."""
    faults = (
        Fault(0, FaultKind.DOWN, 0.946, 0.7),
        Fault(0, FaultKind.DOWN, 0.947, 0.1),
        Fault(1, FaultKind.DOWN, 0.06, 0.44),
    )
    silo = Contender("qoserve_silo", (("queue", "scan"), ("refusal", False)))
    ran = run(Scene(silo, 2906, 2, 19, 30.0, faults=faults))
    assert "upstream_failed" in {served.reason for served in ran.result.served}


def test_what_a_refusal_told_of_others_is_told_again_when_it_changes() -> None:
    """A refused reservation says how backends stand; the next reading may say again what was told before it."""
    view = View()
    idle = {"e0": BackendLoad(Membership("tight", 1), LoadVector(), LoadVector())}
    assert len(view.changes(idle)) == 1  # the membership only: nobody is taken to be there at first
    assert view.changes(idle) == []
    view.forget(["e0"])
    assert view.changes(idle) == [ev.LoadPublished("e0", LoadVector())]
    assert view.changes(idle) == []

"""Random events in random order, with answers lost, late and doubled: what must hold at any moment, does."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduling import events as ev
from scheduling.backends import BackendState
from scheduling.checks import Checks, KvGrowth
from scheduling.dispatcher import Dispatcher
from scheduling.lengths import FixedLength
from scheduling.load import LoadVector
from scheduling.options import Options
from scheduling.policies import POLICIES, Policy, make
from scheduling.policies.polyserve import PolyServe, Promotion
from scheduling.tiers import Slo, Tier, TierSet
from tests.scheduling.play import TIERS, backend, request, told

OPTIONS = Options(handback_period_s=2.0, handback_checks=2, rebalance_period_s=3.0, demand_window_s=10.0)
OTHER_TIERS = TierSet(
    (Tier("voice", Slo(0.3, 0.015), 0), Tier("mid", Slo(1.0, 0.060), 1), Tier("slow", Slo(2.0, 0.1), 2)), "slow"
)
NAMES = ["a", "b", "c", "d"]


def backend_of(name: str, kind: int) -> Any:
    limits: dict[str, Any] = [{}, {"max_running_seqs": 2}, {"kv_tokens": 900}, {"max_model_tokens": 2000}][
        kind % 4
    ]
    models = frozenset({"n"}) if kind == 5 else frozenset[str]()
    return backend(
        name,
        calibrated=kind != 4,
        models=models,
        pinned=kind == 6,
        dynamic_chunk=kind == 7,
        margin=1.0 + kind / 50,
        **limits,
    )


class World:
    """A shell and a store around a dispatcher. Answers wait until they are given."""

    def __init__(self, policy: Policy, options: Options) -> None:
        self.dispatcher = Dispatcher(TIERS, policy, options)
        self.options = options
        self.now_s = 0.0
        self.log: list[tuple[ev.Event, float, list[str]]] = []
        self.asked: list[ev.Reserve] = []
        self.moves: list[ev.Claim | ev.HandBack] = []
        self.open: dict[str, str] = {}  # lease -> request
        self.alive: set[str] = set()
        self.ends: Counter[str] = Counter()
        self.leases: set[str] = set()  # in the store
        self.released: Counter[str] = Counter()
        self.ever: set[str] = set()  # leases the store granted
        self.strays: set[str] = set()  # leases answered for more than once
        self.homes: dict[str, tuple[str | None, int]] = {}
        self.epoch = 1

    def tell(self, event: ev.Event) -> list[ev.Action]:
        actions = self.dispatcher.handle(event, self.now_s)
        self.log.append((event, self.now_s, [told(action) for action in actions]))
        for action in actions:
            match action:
                case ev.Reserve(request_id):
                    assert request_id in self.alive
                    self.asked.append(action)
                case ev.Open(request_id, lease_id):
                    assert request_id in self.alive
                    assert lease_id in self.leases, "opened without a place"
                    assert lease_id not in self.open
                    self.open[lease_id] = request_id
                case ev.Refuse(request_id):
                    self.over(request_id)
                case ev.Release(lease_id):
                    self.released[lease_id] += 1
                    self.leases.discard(lease_id)
                case ev.Claim() | ev.HandBack():
                    self.moves.append(action)
                case ev.Hold(request_id):
                    assert request_id in self.alive
        return actions

    def over(self, request_id: str) -> None:
        assert request_id in self.alive, f"{request_id} ended before"
        self.alive.discard(request_id)
        self.ends[request_id] += 1

    def grant(self, order: ev.Reserve) -> None:
        """The store takes it in if the membership is as thought."""
        candidate = order.candidates[0]
        if candidate.backend in self.homes and self.homes[candidate.backend][1] == candidate.epoch:
            self.leases.add(order.lease_id)
            self.ever.add(order.lease_id)
            self.tell(ev.Reserved(order.request_id, order.lease_id, candidate.backend))
        else:
            self.deny(order, {})

    def deny(self, order: ev.Reserve, foreign: dict[str, LoadVector]) -> None:
        name = order.candidates[0].backend
        if name in self.homes:
            self.tell(ev.MembershipChanged(name, *self.homes[name]))
        self.tell(ev.ReserveRefused(order.request_id, order.lease_id, foreign))

    def move(self, move: ev.Claim | ev.HandBack) -> None:
        """Compare and set."""
        name = move.backend
        tier, epoch = self.homes.get(name, (None, 0))
        carries = any(
            entry.backend == name
            for entry in (self.dispatcher._desk.of_lease(lease) for lease in self.leases)
            if entry is not None
        )
        fits = name in self.homes and epoch == move.expected_epoch
        if isinstance(move, ev.Claim):
            if fits:
                self.epoch += 1
                self.homes[name] = (move.tier, self.epoch)
                self.tell(ev.Claimed(name, move.tier, self.epoch))
            else:
                self.tell(ev.ClaimRefused(name, tier, epoch))
        elif fits and not carries:
            self.epoch += 1
            self.homes[name] = (None, self.epoch)
            self.tell(ev.HandedBack(name, self.epoch))
        else:
            self.tell(ev.HandBackRefused(name, tier, epoch))

    def end(self, lease_id: str, kind: ev.EndKind) -> None:
        self.over(self.open.pop(lease_id))
        self.tell(ev.Ended(lease_id, kind, 5))

    def wake(self) -> None:
        """Time passes until the next wake. It must not ask for one at the same moment over and over."""
        for _ in range(5):
            wake_s = self.dispatcher.next_wake_s()
            if wake_s is None or wake_s > self.now_s:
                return
            self.tell(ev.TimePassed())
        raise AssertionError(f"woken at {self.now_s} it wants to be woken at {self.dispatcher.next_wake_s()}")

    def check(self) -> None:
        counts = self.dispatcher.counts
        assert counts.conserved
        assert counts.arrived - len(self.alive) == sum(self.ends.values())
        assert counts.held + counts.reserving + counts.open == len(self.alive) + self.leaving
        assert sum(self.dispatcher.held_by_tier().values()) <= counts.held
        assert len(self.dispatcher.held_requests()) == counts.held
        for ledger in self.dispatcher.fleet:
            foreign = ledger.foreign
            assert ledger.seqs >= foreign.decodes
            assert ledger.peak_kv_tokens >= foreign.peak_kv_tokens
            assert ledger.queued_prefill_tokens >= foreign.queued_prefill_tokens
            assert min(ledger.stored.decodes, ledger.stored.kv_tokens, ledger.stored.prefill_tokens) >= 0
            assert math.isfinite(ledger.load)
            assert ledger.seqs == foreign.decodes + sum(r.sequences for r in ledger.residents.values())
            assert not ledger.residents or min(ledger.own_load().residents.values()) > 0
        lists = [key[2] for order in self.dispatcher.fleet._order.values() for key in order]
        assert sorted(lists) == sorted(ledger.backend.name for ledger in self.dispatcher.fleet)

    @property
    def leaving(self) -> int:
        """Clients that went away while the store was asked: over for us, not yet for the dispatcher."""
        return sum(ticket.gone for ticket in self.dispatcher._desk.all())

    def settle(self) -> None:
        """Everything comes to its end: answers arrive, streams end, time passes."""
        for name in list(self.homes):
            known = self.dispatcher.fleet[name].backend
            if known.state is not BackendState.UP:
                self.tell(ev.BackendChanged(backend_of(name, 0)))
            self.tell(ev.LoadPublished(name, LoadVector()))
        for _ in range(400):
            while self.asked or self.moves or self.open:
                while self.asked:
                    self.grant(self.asked.pop(0))
                while self.moves:
                    self.move(self.moves.pop(0))
                for lease_id in list(self.open):
                    self.tell(ev.FirstToken(lease_id))
                    self.end(lease_id, ev.EndKind.FINISHED)
            self.check()
            if not self.dispatcher.counts.held:
                return
            self.now_s = max(self.dispatcher.next_wake_s() or self.now_s + 1.0, self.now_s)
            self.wake()

    def finish(self) -> None:
        self.settle()
        counts = self.dispatcher.counts
        serving = {name for name in self.homes if not self.dispatcher.fleet[name].backend.models}
        stuck = self.dispatcher.held_requests()
        if serving:
            assert not [ticket for ticket in stuck if ticket.request.prompt_tokens < 500], "waits for ever"
        for ticket in stuck:
            self.over(ticket.request.request_id)
            self.tell(ev.Cancelled(ticket.request.request_id))
        assert (counts.held, counts.reserving, counts.open) == (0, 0, 0)
        assert not self.alive
        assert set(self.ends.values()) <= {1}
        assert not self.leases
        for lease_id in self.ever - self.strays:
            assert self.released[lease_id] == 1, lease_id
        for ledger in self.dispatcher.fleet:
            assert ledger.own_load().idle
            assert (ledger.stored.decodes, ledger.stored.kv_tokens, ledger.stored.prefill_tokens) == (0, 0, 0)

    def replay(self, policy: Policy) -> None:
        """The same events at the same times ask for the same actions."""
        again = Dispatcher(TIERS, policy, self.options)
        for event, now_s, lines in self.log:
            assert [told(action) for action in again.handle(event, now_s)] == lines


class Chaos(RuleBasedStateMachine):
    options = OPTIONS

    def policy(self) -> Policy:
        return make("polyserve", Random(self.seed))

    @initialize(seed=st.integers(0, 1000), up=st.integers(0, 4))
    def begin(self, seed: int, up: int) -> None:
        self.seed = seed
        self.world = World(self.policy(), self.options)
        self.arrivals = 0
        for tier in TIERS.tiers:
            self.world.tell(ev.LengthsChanged("m", tier.name, FixedLength(20.0)))
        for index in range(up):
            self.backend_up(NAMES[index], (seed + index) % 8, [None, "mid", "slow", "fast"][(seed + index) % 4])

    # --- the fleet -----------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), kind=st.integers(0, 7), tier=st.sampled_from([None, None, "fast", "mid"]))
    def backend_up(self, name: str, kind: int, tier: str | None) -> None:
        world = self.world
        world.tell(ev.BackendChanged(backend_of(name, kind)))
        if name not in world.homes:
            world.epoch += 1
            world.homes[name] = (tier, world.epoch)
        world.tell(ev.MembershipChanged(name, *world.homes[name]))

    @rule(name=st.sampled_from(NAMES), state=st.sampled_from([BackendState.DOWN, BackendState.DRAINING]))
    def backend_closed(self, name: str, state: BackendState) -> None:
        ledger = self.world.dispatcher.fleet.get(name)
        if ledger is not None:
            known = ledger.backend
            self.world.tell(
                ev.BackendChanged(backend(name, models=known.models, state=state, calibrated=known.calibrated))
            )

    @rule(name=st.sampled_from(NAMES))
    def backend_removed(self, name: str) -> None:
        self.world.homes.pop(name, None)
        self.world.tell(ev.BackendRemoved(name))

    @rule(name=st.sampled_from(NAMES), tier=st.sampled_from([None, "fast", "mid", "slow", "best"]))
    def another_replica_moves_it(self, name: str, tier: str | None) -> None:
        world = self.world
        if name in world.homes:
            world.epoch += 1
            world.homes[name] = (tier, world.epoch)
            world.tell(ev.MembershipChanged(name, tier, world.epoch))

    @rule(name=st.sampled_from(NAMES), decodes=st.integers(0, 30), queued=st.sampled_from([0, 0, 700, 9000]))
    def another_replica_places(self, name: str, decodes: int, queued: int) -> None:
        self.world.tell(ev.LoadPublished(name, LoadVector(decodes, decodes * 50 + queued, queued)))

    @rule(tiers=st.sampled_from([TIERS, OTHER_TIERS]))
    def tiers_change(self, tiers: TierSet) -> None:
        self.world.tell(ev.TiersChanged(tiers))

    # --- requests ------------------------------------------------------------------------------------------

    @rule(
        tier=st.sampled_from(["fast", "mid", "slow", "best", "voice"]),
        prompt_tokens=st.sampled_from([1, 50, 300, 3000]),
        sequences=st.sampled_from([1, 1, 1, 3]),
        stated=st.booleans(),
        streamed=st.booleans(),
        model=st.sampled_from(["m", "m", "n"]),
    )
    def arrives(
        self, tier: str, prompt_tokens: int, sequences: int, stated: bool, streamed: bool, model: str
    ) -> None:
        self.arrivals += 1
        slo = TIERS[tier].slo if tier in TIERS else Slo(0.3, 0.015)
        asked = request(
            f"r{self.arrivals}",
            tier,
            prompt_tokens,
            slo=slo,
            model=model,
            sequences=sequences,
            slo_stated=stated,
            streamed=streamed,
            arrival_s=self.world.now_s,
        )
        self.world.alive.add(asked.request_id)
        self.world.tell(ev.Arrived(asked))

    @rule(pick=st.integers(0, 100))
    @precondition(lambda self: self.world.alive)
    def client_goes_away(self, pick: int) -> None:
        world = self.world
        request_id = sorted(world.alive)[pick % len(world.alive)]
        world.over(request_id)
        for lease_id in [lease for lease, name in world.open.items() if name == request_id]:
            del world.open[lease_id]
        world.tell(ev.Cancelled(request_id))

    # --- the store -----------------------------------------------------------------------------------------

    @rule(pick=st.integers(0, 100), yes=st.sampled_from([True, True, True, False]), busy=st.integers(0, 40))
    @precondition(lambda self: self.world.asked)
    def store_answers(self, pick: int, yes: bool, busy: int) -> None:
        world = self.world
        order = world.asked.pop(pick % len(world.asked))
        if yes:
            world.grant(order)
        else:
            world.deny(order, {order.candidates[0].backend: LoadVector(busy, busy * 60, 0)})

    @rule(pick=st.integers(0, 100))
    @precondition(lambda self: self.world.asked)
    def the_answer_is_lost_and_comes_late(self, pick: int) -> None:
        """The shell gave up asking; the store had granted it, and says so later."""
        world = self.world
        order = world.asked.pop(pick % len(world.asked))
        world.strays.add(order.lease_id)
        world.tell(ev.ReserveRefused(order.request_id, order.lease_id, {}))
        world.leases.add(order.lease_id)
        world.ever.add(order.lease_id)
        world.tell(ev.Reserved(order.request_id, order.lease_id, order.candidates[0].backend))
        assert order.lease_id not in world.leases, "given back at once"

    @rule(pick=st.integers(0, 100), yes=st.booleans())
    @precondition(lambda self: self.world.open)
    def an_answer_comes_again(self, pick: int, yes: bool) -> None:
        world = self.world
        lease_id = sorted(world.open)[pick % len(world.open)]
        request_id = world.open[lease_id]
        if yes:
            assert world.tell(ev.Reserved(request_id, lease_id, "a")) == []
        else:
            assert world.tell(ev.ReserveRefused(request_id, lease_id, {})) == []

    @rule(pick=st.integers(0, 100))
    @precondition(lambda self: self.world.moves)
    def store_moves(self, pick: int) -> None:
        self.world.move(self.world.moves.pop(pick % len(self.world.moves)))

    # --- engines -------------------------------------------------------------------------------------------

    @rule(pick=st.integers(0, 100), retryable=st.sampled_from([True, True, False]))
    @precondition(lambda self: self.world.open)
    def opening_fails(self, pick: int, retryable: bool) -> None:
        world = self.world
        lease_id = sorted(world.open)[pick % len(world.open)]
        request_id = world.open.pop(lease_id)
        if not retryable:
            world.over(request_id)
        world.tell(ev.OpenFailed(request_id, lease_id, retryable, "refused"))

    @rule(pick=st.integers(0, 100))
    @precondition(lambda self: self.world.open)
    def first_token(self, pick: int) -> None:
        self.world.tell(ev.FirstToken(sorted(self.world.open)[pick % len(self.world.open)]))

    @rule(name=st.sampled_from(NAMES), tokens=st.integers(1, 40), step_ms=st.sampled_from([None, 0, 12, 500]))
    def progress(self, name: str, tokens: int, step_ms: int | None) -> None:
        moved = tuple(ev.Progress(lease_id, tokens) for lease_id in sorted(self.world.open))
        step_s = None if step_ms is None else step_ms / 1000
        self.world.tell(ev.Progressed(name, moved, step_s, 0.005))

    @rule(pick=st.integers(0, 100), kind=st.sampled_from(list(ev.EndKind)))
    @precondition(lambda self: self.world.open)
    def stream_ends(self, pick: int, kind: ev.EndKind) -> None:
        self.world.end(sorted(self.world.open)[pick % len(self.world.open)], kind)

    @rule(pick=st.sampled_from(["r1#1", "r2#1", "nobody#1"]))
    def something_is_heard_of_a_lease_that_is_over(self, pick: str) -> None:
        world = self.world
        if pick in world.open or world.dispatcher._desk.of_lease(pick) is not None:
            return
        assert world.tell(ev.FirstToken(pick)) == []
        assert world.tell(ev.Ended(pick, ev.EndKind.FAILED, 0)) == []
        assert world.tell(ev.OpenFailed("r", pick, True, "late")) == []

    # --- time ----------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.05, 0.3, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.now_s += seconds
        self.world.wake()

    @invariant()
    def what_must_hold(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()
            self.world.replay(self.policy())


class BaselineChaos(Chaos):
    """Any of the routers without tiers."""

    def policy(self) -> Policy:
        names = [name for name in POLICIES if not make(name, Random(0)).uses_tiers]
        return make(names[self.seed % len(names)], Random(self.seed))


class SiloChaos(Chaos):
    """Tiers without a pool, and many moves a round."""

    options = replace(OPTIONS, moves_per_round=8, rebalance_period_s=0.3)

    def policy(self) -> Policy:
        return make("qoserve_silo", Random(self.seed))


class KnobChaos(Chaos):
    """Every knob turned away from its default, in some combination."""

    options = replace(OPTIONS, scan_held=4, overtaking=False, refuses=False, moves_per_round=4)

    def policy(self) -> Policy:
        seed = self.seed
        checks = Checks(
            first_token=seed % 2 == 0,
            second_token=seed % 3 == 0,
            resident_slack=seed % 5 == 0,
            chunk_kept=seed % 7 == 0,
            kv_growth=list(KvGrowth)[seed % 3],
        )
        return PolyServe(
            fullest_first=seed % 11 == 0,
            promotion=list(Promotion)[seed % 3],
            nearest_first=False,
            uses_pool=seed % 4 < 2,
            held_by_deadline=False,
            checks=checks,
        )


_SETTINGS = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestChaos = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")(Chaos.TestCase)
TestChaos.settings = _SETTINGS
TestBaselineChaos = BaselineChaos.TestCase
TestBaselineChaos.settings = settings(_SETTINGS, max_examples=30)
TestSiloChaos = SiloChaos.TestCase
TestSiloChaos.settings = settings(_SETTINGS, max_examples=30)
TestKnobChaos = KnobChaos.TestCase
TestKnobChaos.settings = settings(_SETTINGS, max_examples=40)

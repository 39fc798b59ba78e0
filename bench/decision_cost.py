"""What a decision costs: `python -m bench.decision_cost`.

A decision is `Dispatcher.handle(Arrived)` up to its Reserve, Hold or Refuse action; it is undone before the next,
so every one of them finds the same fleet. Backends carry 20 to 150 residents each, their step times are those of a
measured profile. Nothing is kept between decisions: each one predicts every backend it looks at anew, for its own
prompt length. What ledgers do keep are sums over their residents (counts, KV, the growth curve, slack per pace),
and they are brought up to date by events, one ledger an event; those events are timed too. The part of a decision
that is such an event, the newcomer's entry into its ledger, is in the figure and also told apart. Measured is the
thread's CPU time, so that neighbours on the machine count little.

Scenes: the first feasible backend is the third that is looked at, and the two before it fail the last and dearest
check; the fleet is saturated and nothing fits, because steps would become too slow, because memory would not last,
because residents have no slack left for another prompt, or because every queue is too long for the newcomer's own
first token (the dearest way to find that out: all of the prediction for every backend).
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace

from profiles.catalogue import load
from scheduling import events as ev
from scheduling.backends import Backend, EngineLimits
from scheduling.dispatcher import Dispatcher
from scheduling.ledger import Ledger
from scheduling.lengths import FixedLength
from scheduling.load import Cost
from scheduling.policies import make
from scheduling.requests import Request
from scheduling.residents import Resident
from scheduling.tiers import Slo, Tier, TierSet
from tiergate_engine.step import StepTime

FLEETS = (10, 100, 1000)
TIERS = TierSet(
    (
        Tier("t75", Slo(1.5, 0.075), 0),
        Tier("t100", Slo(2.0, 0.100), 1),
        Tier("t150", Slo(3.0, 0.150), 2),
        Tier("t300", Slo(5.0, 0.300), 3),
    ),
    "t300",
)
NOW_S = 100.0
OUTPUT_TOKENS = 250
LENGTHS = FixedLength(float(OUTPUT_TOKENS))
LIMITS = EngineLimits(max_running_seqs=512, max_batched_tokens=2048, kv_tokens=2_000_000, max_model_tokens=32_000)


@dataclass(frozen=True, slots=True)
class Scene:
    """How full a fleet is, and what is expected of every decision in it."""

    name: str
    slack_s: Callable[[int], float]  # of the residents, by the backend's place in its tier's order
    pace_factor: float  # on the tiers' paces: below 1 the residents there leave no room in a step
    kv_room_tokens: int | None = None  # beyond the residents' peak
    ttft_s: float = 5.0  # what the newcomer asks for
    placed: bool = True


def plenty(place: int) -> float:
    return 20.0


def none(place: int) -> float:
    return 0.0


SCENES = (
    Scene("third candidate fits", lambda place: 0.0 if place < 2 else 20.0, 10.0),
    Scene("saturated: step time", plenty, 0.05, placed=False),
    Scene("saturated: memory", plenty, 10.0, kv_room_tokens=99, placed=False),
    Scene("saturated: residents' slack", none, 10.0, placed=False),
    Scene("saturated: first token", plenty, 10.0, ttft_s=0.05, placed=False),
)


def fill(ledger: Ledger, count: int, tier: str, slo: Slo, slack_s: float, rng: random.Random) -> None:
    """Residents in the middle of their answers, each `slack_s` ahead of its next deadline."""
    for index in range(count):
        prompt, generated = rng.randint(100, 3000), rng.randint(5, 200)
        ttft_s, tpot_s = slo.ttft_s or 1.0, slo.tpot_s or 1.0
        arrival_s = NOW_S + slack_s - ttft_s - generated * tpot_s
        request = Request(f"{ledger.backend.name}-{index}", "m", tier, slo, prompt, arrival_s)
        cost = Cost(1, prompt + OUTPUT_TOKENS, prompt, tier, tpot_s * 1e3)
        resident = Resident(f"{request.request_id}#1", request, cost, LENGTHS, NOW_S, guest=False)
        resident.first_token = True
        resident.advance(generated, NOW_S)
        ledger.residents[resident.lease_id] = resident
    ledger.last_step_s = NOW_S - 0.01


def build(backends: int, scene: Scene, step_time: StepTime, seed: int = 1) -> Dispatcher:
    """A fleet in the scene's state, a quarter of it in each tier."""
    rng = random.Random(seed)
    tiers = TierSet(
        tuple(
            replace(tier, slo=Slo(tier.slo.ttft_s, (tier.slo.tpot_s or 1.0) * scene.pace_factor))
            for tier in TIERS.tiers
        ),
        TIERS.default,
    )
    dispatcher = Dispatcher(tiers, make("polyserve", random.Random(seed)))
    names = [tier.name for tier in tiers.tiers]
    for index in range(backends):
        name = f"b{index:04}"
        tier = tiers.tiers[index * len(names) // backends]
        dispatcher.handle(ev.BackendChanged(Backend(name, step_time, limits=LIMITS, margin=1.05)), NOW_S)
        dispatcher.handle(ev.MembershipChanged(name, tier.name, 1), NOW_S)
        ledger = dispatcher.fleet[name]
        fill(ledger, rng.randint(20, 150), tier.name, tier.slo, 20.0, rng)
        ledger.refresh(NOW_S)
        if scene.kv_room_tokens is not None:
            full = replace(LIMITS, kv_tokens=ledger.peak_kv_tokens + scene.kv_room_tokens)
            ledger.backend = replace(ledger.backend, limits=full)
        dispatcher.fleet.reorder(ledger)
    for tier in tiers.tiers:
        dispatcher.handle(ev.LengthsChanged("m", tier.name, LENGTHS), NOW_S)
        for place, ledger in enumerate(dispatcher.fleet.in_tier(tier.name)):
            less_s = 20.0 - scene.slack_s(place)
            for resident in ledger.residents.values():
                resident.request = replace(resident.request, arrival_s=resident.request.arrival_s - less_s)
                resident.first_due_s -= less_s
                resident.due_s -= less_s
            ledger.refresh(NOW_S)
    return dispatcher


@dataclass(frozen=True, slots=True)
class DecisionCost:
    """Median and 99th percentile, in microseconds, and how many backends were looked at."""

    median_us: float
    p99_us: float
    looked_at: float


def decisions(dispatcher: Dispatcher, scene: Scene, times: int, seed: int = 2) -> DecisionCost:
    """Time decisions about requests of the loosest tier, which may go anywhere."""
    rng = random.Random(seed)
    tier = dispatcher.tiers.tiers[-1]
    spent: list[float] = []
    looked: list[int] = []
    for index in range(times):
        slo = Slo(scene.ttft_s, tier.slo.tpot_s)
        request = Request(f"n{index}", "m", tier.name, slo, rng.randint(100, 3000), NOW_S)
        event = ev.Arrived(request)
        begin = time.thread_time()
        actions = dispatcher.handle(event, NOW_S)
        spent.append(time.thread_time() - begin)
        action = actions[0]
        if isinstance(action, ev.Release | ev.Claim | ev.HandBack):
            raise TypeError(f"{scene.name}: a decision began with {action}")
        if isinstance(action, ev.Reserve) is not scene.placed:
            raise RuntimeError(f"{scene.name}: {action.decision.outcome.value}: {action.decision.reason}")
        looked.append(action.decision.looked_at)
        dispatcher.handle(ev.Cancelled(request.request_id), NOW_S)
        if isinstance(action, ev.Reserve):
            dispatcher.handle(ev.ReserveRefused(request.request_id, action.lease_id, {}), NOW_S)
    ordered = sorted(spent)
    return DecisionCost(
        statistics.median(ordered) * 1e6, ordered[int(len(ordered) * 0.99)] * 1e6, statistics.fmean(looked)
    )


def best_us(call: Callable[[], object], times: int) -> float:
    """The median of single calls."""
    spent = []
    for _ in range(times):
        begin = time.thread_time()
        call()
        spent.append(time.thread_time() - begin)
    return statistics.median(spent) * 1e6


def event_costs(dispatcher: Dispatcher, residents: int, times: int) -> dict[str, float]:
    """Events that keep one ledger of `residents` up to date: placed, ended, progressed."""
    tier = dispatcher.tiers.tiers[-1]
    fleet = dispatcher.fleet
    ledger = fleet.in_tier(tier.name)[-1]
    ledger.residents.clear()
    fill(ledger, residents, tier.name, tier.slo, 20.0, random.Random(3))
    ledger.refresh(NOW_S)
    fleet.reorder(ledger)
    request = Request("one", "m", tier.name, tier.slo, 500, NOW_S)
    cost = Cost(1, 500 + OUTPUT_TOKENS, 500, tier.name, 300.0)
    newcomer = Resident("one#1", request, cost, LENGTHS, NOW_S, guest=False)
    newcomer.expected_first_s = NOW_S + 1.0
    progress = tuple(ev.Progress(one.lease_id, one.generated_tokens) for one in ledger.residents.values())
    progressed = ev.Progressed(ledger.backend.name, progress, 0.05, 0.01)

    def place() -> None:
        ledger.place(newcomer, NOW_S)
        fleet.reorder(ledger)

    def end() -> None:
        ledger.remove("one#1", NOW_S)
        fleet.reorder(ledger)

    placed: list[float] = []
    ended: list[float] = []
    for _ in range(times):
        for call, spent in ((place, placed), (end, ended)):
            begin = time.thread_time()
            call()
            spent.append(time.thread_time() - begin)
    return {
        "placed": statistics.median(placed) * 1e6,
        "ended": statistics.median(ended) * 1e6,
        "progressed": best_us(lambda: dispatcher.handle(progressed, NOW_S), times),
    }


def memory(step_time: StepTime, requests: int = 2000) -> tuple[float, float]:
    """Bytes of the dispatcher's own per held and per running request; the Request itself is inside."""

    def bytes_each(max_running: int) -> float:
        limits = replace(LIMITS, max_running_seqs=max_running)
        dispatcher = Dispatcher(TIERS, make("polyserve", random.Random(1)))
        for index in range(40):
            dispatcher.handle(ev.BackendChanged(Backend(f"b{index}", step_time, limits=limits)), NOW_S)
            dispatcher.handle(ev.MembershipChanged(f"b{index}", "t300", 1), NOW_S)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for index in range(requests):
            request = Request(f"request-{index}", "m", "t300", Slo(1000.0, 1000.0), 500, NOW_S)
            for action in dispatcher.handle(ev.Arrived(request), NOW_S):
                if isinstance(action, ev.Reserve):
                    backend = action.candidates[0].backend
                    dispatcher.handle(ev.Reserved(action.request_id, action.lease_id, backend), NOW_S)
                    dispatcher.handle(ev.FirstToken(action.lease_id), NOW_S)
            del request
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        counts = dispatcher.counts
        there = counts.open if max_running > 1 else counts.held
        if there < 0.95 * requests:
            raise RuntimeError(f"{there} of {requests} requests are where they should be: {counts}")
        return used / requests

    return bytes_each(1), bytes_each(100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Microseconds a decision.")
    parser.add_argument("--profile", default="rtxpro6000-qwen3-32b-bf16")
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--backends", type=int, nargs="*", default=FLEETS)
    args = parser.parse_args()
    step_time = load(args.profile).step_time
    print(f"Profile {args.profile}, 20 to 150 residents a backend, {args.times} decisions each.\n")
    print("| scene | backends | looked at | median us | p99 us |")
    print("|---|---|---|---|---|")
    events: dict[str, float] = {}
    for scene in SCENES:
        for backends in args.backends:
            dispatcher = build(backends, scene, step_time)
            gc.collect()
            gc.disable()
            cost = decisions(dispatcher, scene, args.times)
            gc.enable()
            row = f"{cost.looked_at:.0f} | {cost.median_us:.0f} | {cost.p99_us:.0f}"
            print(f"| {scene.name} | {backends} | {row} |", flush=True)
            if scene.placed:
                events = event_costs(dispatcher, 150, args.times)
    print("\n| event on a backend with 150 residents | median us |")
    print("|---|---|")
    for name, spent_us in events.items():
        print(f"| {name} | {spent_us:.0f} |")
    held, running = memory(step_time)
    print(f"\nMemory: {held:.0f} bytes per held request, {running:.0f} per running one.")


if __name__ == "__main__":
    main()

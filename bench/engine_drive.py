"""A real vLLM on CPU under mixed load: stock, every static chunk budget, and driven.

Short streams with a tight promise run beside prompts of 2,048 tokens with a loose one. One engine serves all arms,
one after the other, in turns: what changes is what it is told over HTTP. The same seed offers the same requests.
The profile that drives the engine is fitted to its own account of its steps, before the first arm. Rates and
promises are taken from that profile, so that another machine is loaded as much and promises as much.
Every repetition is another seed, offered to all arms in a shuffled order within minutes; the first one is not
counted where `--warm-up` says so. Arms are compared repetition by repetition, on the same requests.

What favours whom: a static chunk is prompt tokens on top of the decodes, in the order of arrival, and the best one
is only known afterwards. The driven engine is told promises `--reserve` paces tighter than what is counted, has a
profile with a margin, and bounds its steps by `--longest`; who tunes these judges them by another `--seed`.

Nothing is simulated or emulated, but the model is a random one of two layers and the machine has no accelerator:
this shows what driving does to a schedule, not how fast vLLM is. Few cores are noisy: look at the spread.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import orjson
import uvloop

from adapters import registry
from adapters.vllm import VllmAdapter
from bench.drive_report import Outcome, percentile, share_of, show
from deploy.server_process import free_port
from deploy.vllm_cpu import server as engines
from loadgen.http import HttpPool
from profiles.fit import Fit, Observation, fit
from tiergate_engine.control import Mode, Orders, Promise, StepFact
from tiergate_engine.drive import Rules
from tiergate_engine.step import Step

HERO = "driven"
STATIC = (64, 128, 256, 512, 1024)
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
SETTLED_S = 0.3
LONGEST_MARGIN = 1.6  # a noisy machine's errors are not all to be planned for


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request: its size, how many come a second, and what is promised."""

    prompt_tokens: int
    output_tokens: int
    per_s: float
    ttft_s: float
    tpot_s: float
    reserve_s: float = (
        0.0  # the engine is told an earlier time by so much: what it plans to the last millisecond fails
    )

    @property
    def promise(self) -> Promise:
        """What the engine is told."""
        return Promise(self.ttft_s - self.reserve_s, self.tpot_s)


@dataclass(frozen=True, slots=True)
class Load:
    """What is offered in one run: the same for the same seed."""

    tight: Kind
    loose: Kind
    seconds: float
    seed: int

    def arrivals(self) -> list[tuple[float, str]]:
        """Poisson arrivals of both kinds, in order of time."""
        chance = random.Random(self.seed)
        found: list[tuple[float, str]] = []
        for name, kind in (("tight", self.tight), ("loose", self.loose)):
            at_s = chance.expovariate(kind.per_s)
            while at_s < self.seconds:
                found.append((at_s, name))
                at_s += chance.expovariate(kind.per_s)
        return sorted(found)


@dataclass(slots=True)
class Stream:
    """The sink of one answer (`loadgen.http.Sink`)."""

    name: str
    sent_s: float = 0.0
    status: int = 0
    times_s: list[float] = field(default_factory=list)
    late_s: float = 0.0
    errors: tuple[type[Exception], ...] = ()
    _rest: bytes = b""

    def on_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status

    def on_body(self, data: bytes) -> None:
        """vLLM merges what it could not send in time: how many tokens came is what each event's usage says."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if told := _TOKENS.findall(event):
                self.times_s += [time.perf_counter()] * (int(told[-1]) - len(self.times_s))

    def attained(self, kind: Kind) -> bool:
        """Whether every token was on time."""
        due_s = self.sent_s + kind.ttft_s
        on_time = all(at_s <= due_s + index * kind.tpot_s for index, at_s in enumerate(self.times_s))
        return on_time and len(self.times_s) == kind.output_tokens

    def answered(self, kind: Kind) -> bool:
        """Whether its first token was on time."""
        return bool(self.times_s) and self.times_s[0] <= self.sent_s + kind.ttft_s

    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times_s, self.times_s[1:], strict=False)]


async def send(pool: HttpPool, kind: Kind, stream: Stream, chance: random.Random) -> None:
    """One request and its answer; the prompt is random token ids, so that no prefix is shared."""
    body = {
        "model": engines.MODEL_NAME,
        "prompt": [chance.randrange(50, 450) for _ in range(kind.prompt_tokens)],
        "max_tokens": kind.output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "vllm_xargs": kind.promise.to_xargs(),
    }
    text = orjson.dumps(body)
    stream.sent_s = time.perf_counter()
    await pool.post({"content-type": "application/json"}, text, stream)
    if stream.status != 200:
        raise RuntimeError(f"the engine answered {stream.status}")


async def offer(url: str, load: Load) -> list[Stream]:
    """Offer the load, open loop, and wait for all answers."""
    pool = HttpPool(f"{url}/v1/completions", 10.0)
    chance = random.Random(load.seed + 1)
    streams = []
    try:
        async with asyncio.TaskGroup() as tasks:
            start_s = time.perf_counter()
            for at_s, name in load.arrivals():
                await asyncio.sleep(max(start_s + at_s - time.perf_counter(), 0.0))
                streams.append(Stream(name, late_s=time.perf_counter() - start_s - at_s))
                tasks.create_task(send(pool, load.tight if name == "tight" else load.loose, streams[-1], chance))
    finally:
        await pool.close()
    return streams


async def run_arm(adapter: VllmAdapter, url: str, orders: Orders, load: Load) -> Outcome:
    """One run under the orders. Raises RuntimeError when the engine does not answer as it should."""
    await adapter.give_orders(orders)
    before = await adapter.read_state()
    streams = await offer(url, load)
    after = await adapter.read_state()
    facts = (await adapter.read_steps(before.steps)).facts
    tight = [stream for stream in streams if stream.name == "tight"]
    loose = [stream for stream in streams if stream.name == "loose"]
    begun_s = min(stream.sent_s for stream in streams)
    ended_s = max(stream.times_s[-1] for stream in streams)
    tokens = sum(
        len(stream.times_s) + (load.tight if stream.name == "tight" else load.loose).prompt_tokens
        for stream in streams
    )
    return Outcome(
        seed=load.seed,
        tight_attained=share_of([stream.attained(load.tight) for stream in tight]),
        loose_attained=share_of([stream.attained(load.loose) for stream in loose]),
        loose_ttft_attained=share_of([stream.answered(load.loose) for stream in loose]),
        tight_itl_p99_s=percentile([gap for stream in tight for gap in stream.gaps_s()], 0.99),
        tight_ttft_p99_s=percentile([stream.times_s[0] - stream.sent_s for stream in tight], 0.99),
        loose_ttft_p50_s=percentile([stream.times_s[0] - stream.sent_s for stream in loose], 0.5),
        tokens_per_s=tokens / (ended_s - begun_s),
        steps=after.steps - before.steps,
        step_mean_s=statistics.fmean(fact.seconds for fact in facts),
        skipped=sum(fact.skipped for fact in facts),
        plan_us=after.plan_us,
        failures=after.failures - before.failures,
        tight=len(tight),
        loose=len(loose),
        lateness_p99_s=percentile([stream.late_s for stream in streams], 0.99),
    )


async def measure_steps(adapter: VllmAdapter, url: str, load: Load) -> tuple[Fit, int]:
    """Fit a profile to the engine's own account of its steps under loads like the one to come."""
    facts: list[StepFact] = []
    for number, chunk in enumerate((None, 512, 128, 32)):
        await adapter.give_orders(Orders(chunk_tokens=chunk))
        since = (await adapter.read_state()).steps
        await offer(url, replace(load, seconds=load.seconds / 4, seed=load.seed + 1000 + number))
        facts += (await adapter.read_steps(since)).facts
    return fit([Observation(fact.step, fact.seconds) for fact in facts]), len(facts)


def arms_of(wanted: Sequence[str], profile: Fit, rules: Rules) -> dict[str, Orders]:
    """Orders by arm."""
    driven = Orders(Mode.DRIVEN, profile.step_time, rules)

    def without(**off: bool) -> Orders:
        return replace(driven, rules=replace(driven.rules, **off))

    known = {"stock": Orders(), **{f"static {tokens}": Orders(chunk_tokens=tokens) for tokens in STATIC}}
    known[HERO] = driven
    known["driven, chunk by pace"] = without(chunk_from_slack=False)
    known["driven, no deadline order"] = without(deadline_order=False)
    known["driven, no skipping"] = without(skip=False)
    known["driven, no relegation"] = without(relegate=False)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"unknown arms {', '.join(unknown)}: there are {'; '.join(known)}")
    return {name: orders for name, orders in known.items() if not wanted or name in wanted}


@contextlib.contextmanager
def serving(url: str | None) -> Iterator[str]:
    """The engine that is named, or one that is started for the run."""
    if url is not None:
        yield url
        return
    programs, model = engines.prepare()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "vllm.log"
        with engines.vllm_server(programs, model, port, log, driven=True):
            yield f"http://127.0.0.1:{port}"


def promised(profile: Fit, args: argparse.Namespace) -> Load:
    """Rates and promises in terms of what this engine's steps take."""
    prompt_s = profile.step_time.seconds(Step.chunk(2048))
    pace_s = args.pace * profile.step_time.decode_seconds(4, 4 * 100)
    tight = Kind(32, args.tight_tokens, args.tight_share / (args.tight_tokens * pace_s), 2 * prompt_s, pace_s)
    tight = replace(tight, reserve_s=args.reserve * pace_s)
    loose = Kind(2048, 16, args.loose_share / prompt_s, 20 * prompt_s, 10 * pace_s)
    return Load(tight, loose, args.seconds, args.seed)


async def bench(url: str, args: argparse.Namespace) -> dict[str, list[Outcome]]:
    """All arms in turns; each repetition is another seed and another order."""
    adapter = await registry.detect(url)
    if not isinstance(adapter, VllmAdapter):
        raise SystemExit(f"{url} is not vLLM")
    await adapter.probe()
    outcomes: dict[str, list[Outcome]] = {}
    try:
        watched = Load(Kind(32, 60, 3.0, 1.0, 0.1), Kind(2048, 16, 2.0, 10.0, 1.0), args.fit_seconds, args.seed)
        profile, observed = await measure_steps(adapter, url, watched)
        load = promised(profile, args)
        margin = introduce(profile, observed, load, args.margin)
        arms = arms_of(args.arm, profile, Rules(margin=margin, longest_s=args.longest * load.tight.ttft_s))
        began_s, repetition = time.monotonic(), -1 if args.warm_up else 0
        while another(repetition, time.monotonic() - began_s, args):
            order = list(arms.items())
            random.Random(repetition).shuffle(order)
            for name, orders in order:
                outcome = await run_arm(adapter, url, orders, replace(load, seed=load.seed + repetition))
                if repetition >= 0:
                    outcomes.setdefault(name, []).append(outcome)
                print(
                    f"run {repetition + 1}, {name}: tight {outcome.tight_attained:.1%} attained, ITL p99 "
                    f"{outcome.tight_itl_p99_s * 1e3:.0f} ms; loose {outcome.loose_attained:.1%}",
                    file=sys.stderr,
                )
                await asyncio.sleep(SETTLED_S)
            repetition += 1
            keep(args.json, outcomes)
        await adapter.give_orders(Orders())
    finally:
        await adapter.close()
    return {name: outcomes[name] for name in arms}


def another(repetition: int, passed_s: float, args: argparse.Namespace) -> bool:
    """Whether there is a further repetition: as many as asked for, or as fit into the minutes. One at least."""
    repetitions: int = args.repetitions
    if repetition <= 0 or args.minutes is None:
        return repetition < max(repetitions, 1)
    done = repetition + bool(args.warm_up)
    within: bool = passed_s * (done + 1) / done <= args.minutes * 60.0
    return within


def keep(path: Path | None, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    """Write all runs so far, so that a run that is cut short is not lost."""
    if path is not None:
        runs = {name: [asdict(run) for run in found] for name, found in outcomes.items()}
        path.write_text(json.dumps(runs, indent=1) + "\n")


def introduce(profile: Fit, observed: int, load: Load, margin: float) -> float:
    """Say what is offered, and how well the steps are known. Returns the margin on their times."""
    errors = [error.p90 for error in (profile.decode_error, profile.mixed_error) if error is not None]
    chosen = margin or min(1.0 + max(errors, default=0.2), LONGEST_MARGIN)
    said = ", ".join(f"{error:.0%}" for error in errors)
    print(f"fitted to {observed} steps, p90 errors {said}; margin {chosen:.2f}; {profile.step_time}")
    for name, kind in (("tight", load.tight), ("loose", load.loose)):
        print(
            f"{name}: {kind.per_s:.2f}/s of {kind.prompt_tokens}+{kind.output_tokens} tokens, "
            f"TTFT {kind.ttft_s * 1e3:.0f} ms, TPOT {kind.tpot_s * 1e3:.1f} ms"
        )
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine_drive",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", help="an engine that runs already (deploy/vllm_cpu/server.py --driven)")
    parser.add_argument("--arm", action="append", default=[], help="only this arm; may be given again")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--minutes", type=float, help="as many repetitions as fit, instead of a number of them")
    parser.add_argument("--warm-up", action="store_true", help="a repetition before, which is not counted")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long a run offers requests")
    parser.add_argument("--fit-seconds", type=float, default=40.0, help="how long steps are watched before")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--margin", type=float, default=0.0, help="on step times; 0: the fit's p90 error")
    parser.add_argument("--pace", type=float, default=4.0, help="tight pace, in steps of four decodes")
    parser.add_argument("--longest", type=float, default=0.4, help="longest driven step, in tight TTFTs")
    parser.add_argument("--reserve", type=float, default=2.0, help="tight paces that the engine keeps in hand")
    parser.add_argument("--tight-share", type=float, default=3.0, help="tight streams at a time, at their pace")
    parser.add_argument("--loose-share", type=float, default=0.3, help="of the engine's time for loose prompts")
    parser.add_argument("--tight-tokens", type=int, default=80)
    parser.add_argument("--json", type=Path, help="write every run here")
    args = parser.parse_args(argv)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, seed {args.seed}")
    with serving(args.url) as url:
        outcomes = uvloop.run(bench(url, args))
    show(outcomes, HERO)
    return 0


if __name__ == "__main__":
    sys.exit(main())

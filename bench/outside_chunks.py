"""A stock vLLM on CPU, with prompts sent ahead to its prefix cache in chunks: `python -m bench.outside_chunks`

Short streams run beside prompts of 2,048 tokens, offered to a gateway in front of a real vLLM without Tiergate's
plug-in. What is compared: engines started with several token budgets, to which prompts go whole, and the one with
the largest when the gateway sends them ahead in chunks (`chunks_outside_tokens`) of several sizes. An engine is
started once for its budget, and its arms take turns. The same seed offers the same requests to all, with a salt
that keeps a run from finding another's prompts in the cache. The gateway is there in every arm.

Nothing is simulated or emulated, but the model is a random one of two layers and the machine has no accelerator:
this shows what the chunks do to a schedule, not how fast vLLM is. Few cores are noisy: look at the spread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson
import uvloop

from adapters.exchange import ask
from adapters.exposition import Scanner, total
from adapters.http import HttpUpstream
from bench.drive_report import percentile, spread
from bench.engine_drive import Kind, Load, Stream
from deploy.server_process import ServerProcess, free_port
from deploy.vllm_cpu import server as engines
from loadgen.http import HttpPool

BUDGETS = (4096, 1024, 256)
CHUNKS = (128, 256, 512, 1024)
SETTLED_S = 0.3
_DONE = "vllm:request_success_total"
_SCANNER = Scanner((_DONE,))
_TIERS = {"tight": "fast", "loose": "batch"}


@dataclass(frozen=True, slots=True)
class Arm:
    """An engine's token budget at launch, and the chunk in which the gateway sends prompts ahead, if it does."""

    budget: int
    chunk: int | None = None

    @property
    def name(self) -> str:
        return f"budget {self.budget}" + ("" if self.chunk is None else f", chunks of {self.chunk}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one arm. Times in seconds.

    Attributes:
        tight_pace_p50_s: of the streams' mean times a token; the median of single gaps would be 0 where vLLM puts
            several tokens into an event.
        exchanges: requests that the engine had for each of a client.
    """

    tight_pace_p50_s: float
    tight_itl_p99_s: float
    tight_ttft_p99_s: float
    loose_ttft_p50_s: float
    loose_ttft_p99_s: float
    tokens_per_s: float
    exchanges: float


async def served(engine: str) -> int:
    """Requests that the engine has ended. Raises UpstreamError."""
    upstream = HttpUpstream(engine)
    try:
        answer = await ask(upstream, "GET", "/metrics", api_key=None, timeout_s=10.0)
        return total(tuple(_SCANNER.samples(answer.body.decode())), _DONE) or 0
    finally:
        await upstream.close()


async def send(pool: HttpPool, kind: Kind, stream: Stream, chance: random.Random, salt: str) -> None:
    """One request and its answer; the prompt is random token ids."""
    body = {
        "model": engines.MODEL_NAME,
        "prompt": [chance.randrange(50, 450) for _ in range(kind.prompt_tokens)],
        "max_tokens": kind.output_tokens,
        "ignore_eos": True,
        "cache_salt": salt,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    text = orjson.dumps(body)
    stream.sent_s = time.perf_counter()
    headers = {"content-type": "application/json", "x-slo-tier": _TIERS[stream.name]}
    await pool.post(headers, text, stream)
    if stream.status != 200:
        raise RuntimeError(f"the gateway answered {stream.status}")


async def offer(url: str, load: Load) -> list[Stream]:
    """Offer the load, open loop, and wait for all answers."""
    pool = HttpPool(f"{url}/v1/completions", 10.0)
    chance = random.Random(load.seed + 1)
    streams: list[Stream] = []
    salt = secrets.token_hex(8)
    try:
        async with asyncio.TaskGroup() as tasks:
            start_s = time.perf_counter()
            for at_s, name in load.arrivals():
                await asyncio.sleep(max(start_s + at_s - time.perf_counter(), 0.0))
                streams.append(Stream(name))
                kind = load.tight if name == "tight" else load.loose
                tasks.create_task(send(pool, kind, streams[-1], chance, salt))
    finally:
        await pool.close()
    return streams


async def run(engine: str, gateway: str, load: Load) -> Outcome:
    """One run. Raises RuntimeError when the gateway does not answer as it should."""
    # for connections, and for code that is loaded late
    await offer(gateway, replace(load, seconds=1.0, seed=load.seed + 1000))
    before = await served(engine)
    streams = await offer(gateway, load)
    tight = [stream for stream in streams if stream.name == "tight"]
    loose = [stream for stream in streams if stream.name == "loose"]
    gaps = [gap for stream in tight for gap in stream.gaps_s()]
    waits = [stream.times_s[0] - stream.sent_s for stream in loose]
    kinds = {"tight": load.tight, "loose": load.loose}
    tokens = sum(len(stream.times_s) + kinds[stream.name].prompt_tokens for stream in streams)
    lasted_s = max(stream.times_s[-1] for stream in streams) - min(stream.sent_s for stream in streams)
    return Outcome(
        percentile([(one.times_s[-1] - one.times_s[0]) / (len(one.times_s) - 1) for one in tight], 0.5),
        percentile(gaps, 0.99),
        percentile([stream.times_s[0] - stream.sent_s for stream in tight], 0.99),
        percentile(waits, 0.5),
        percentile(waits, 0.99),
        tokens / lasted_s,
        (await served(engine) - before) / len(streams),
    )


def gateway_of(engine: str, chunk: int | None, folder: Path) -> ServerProcess:
    """A gateway in front of the engine, with a policy that refuses and holds nobody."""
    port = free_port()
    backend = engine if chunk is None else f"{engine},chunks_outside_tokens={chunk}"
    command = [sys.executable, "-m", "tiergate", "serve", "--backend", backend, "--port", str(port)]
    command += ["--policy", "least_load", "--quiet"]
    log = folder / f"gateway-{port}.log"
    return ServerProcess(command, f"http://127.0.0.1:{port}/readyz", log)


async def bench_engine(
    engine: str, arms: Sequence[Arm], args: argparse.Namespace, folder: Path
) -> dict[Arm, list[Outcome]]:
    """All arms of one engine in turns; each repetition is another seed and another order."""
    tight = Kind(32, args.tight_tokens, args.tight_rate, 1.0, 1.0)
    loose = Kind(args.loose_prompt, 16, args.loose_rate, 1.0, 1.0)
    outcomes: dict[Arm, list[Outcome]] = {}
    for repetition in range(args.repetitions):
        order = list(arms)
        random.Random(repetition).shuffle(order)
        for arm in order:
            with gateway_of(engine, arm.chunk, folder) as front:
                url = front.ready_url.removesuffix("/readyz")
                outcome = await run(engine, url, Load(tight, loose, args.seconds, args.seed + repetition))
            outcomes.setdefault(arm, []).append(outcome)
            print(
                f"run {repetition + 1}, {arm.name}: tight pace p50 {outcome.tight_pace_p50_s * 1e3:.1f}, p99 "
                f"{outcome.tight_itl_p99_s * 1e3:.0f} ms; loose TTFT p50 {outcome.loose_ttft_p50_s * 1e3:.0f} ms",
                file=sys.stderr,
            )
            await asyncio.sleep(SETTLED_S)
    return outcomes


_COLUMNS: tuple[tuple[str, Callable[[Outcome], float], float, int], ...] = (
    ("tight pace p50 ms", lambda one: one.tight_pace_p50_s, 1e3, 1),
    ("tight ITL p99 ms", lambda one: one.tight_itl_p99_s, 1e3, 0),
    ("tight TTFT p99 ms", lambda one: one.tight_ttft_p99_s, 1e3, 0),
    ("loose TTFT p50 ms", lambda one: one.loose_ttft_p50_s, 1e3, 0),
    ("loose TTFT p99 ms", lambda one: one.loose_ttft_p99_s, 1e3, 0),
    ("tokens/s", lambda one: one.tokens_per_s, 1.0, 0),
    ("requests each", lambda one: one.exchanges, 1.0, 1),
)


def show(outcomes: Mapping[Arm, Sequence[Outcome]]) -> None:
    """The table: medians, and the least and the greatest of the repetitions."""
    print(f"\n{'':28}" + "".join(f"{title:>22}" for title, *_ in _COLUMNS))
    for arm, runs in outcomes.items():
        cells = [spread([value(one) for one in runs], scale, digits) for _, value, scale, digits in _COLUMNS]
        print(f"{arm.name:28}" + "".join(f"{cell:>22}" for cell in cells))


def conclude(outcomes: Mapping[Arm, Sequence[Outcome]]) -> None:
    """What each chunk size bought and cost against the same engine without."""

    def middle(arm: Arm, value: Callable[[Outcome], float]) -> float:
        return statistics.median([value(one) for one in outcomes[arm]])

    print()
    for arm in outcomes:
        whole = Arm(arm.budget)
        if arm.chunk is None or whole not in outcomes:
            continue
        gap = middle(arm, lambda one: one.tight_itl_p99_s) / middle(whole, lambda one: one.tight_itl_p99_s)
        wait = middle(arm, lambda one: one.loose_ttft_p50_s) / middle(whole, lambda one: one.loose_ttft_p50_s)
        print(f"{arm.name}: tight ITL p99 x {gap:.2f}, loose TTFT p50 x {wait:.2f} of what it is without")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.outside_chunks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=int, action="append", help="only this launch budget; may be given again")
    parser.add_argument("--chunk", type=int, action="append", help="only this chunk; may be given again")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long a run offers requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tight-rate", type=float, default=2.0, help="short streams a second")
    parser.add_argument("--tight-tokens", type=int, default=80)
    parser.add_argument("--loose-rate", type=float, default=0.7, help="long prompts a second")
    parser.add_argument("--loose-prompt", type=int, default=2048, help="their tokens")
    parser.add_argument("--json", type=Path, help="write every run here")
    args = parser.parse_args(argv)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, seed {args.seed}")
    programs, model = engines.prepare()
    budgets: Sequence[int] = args.budget or BUDGETS
    outcomes: dict[Arm, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for budget in budgets:
            arms = [Arm(budget)]
            if budget == max(budgets):
                arms += [Arm(budget, chunk) for chunk in args.chunk or CHUNKS]
            port = free_port()
            extra = ("--enable-prefix-caching", "--max-num-batched-tokens", str(budget))
            with engines.vllm_server(programs, model, port, folder / f"vllm-{budget}.log", extra=extra):
                found = uvloop.run(bench_engine(f"http://127.0.0.1:{port}", arms, args, folder))
            outcomes |= {arm: found[arm] for arm in arms}
    show(outcomes)
    conclude(outcomes)
    if args.json is not None:
        told = {arm.name: [asdict(one) for one in runs] for arm, runs in outcomes.items()}
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

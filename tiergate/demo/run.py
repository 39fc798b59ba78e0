"""The policies one after the other, the seeds of each side by side."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from tiergate.commands import CommandFailed
from tiergate.demo.fleet import MODEL, Gateway, emulated_engines, gateway
from tiergate.demo.outcome import BenchFile, RunOutcome
from tiergate.demo.processes import tail, tiergate
from tiergate.demo.sizes import Size

if TYPE_CHECKING:
    from tiergate.demo.show import LiveView

_WATCH_S = 0.5


@dataclass(frozen=True, slots=True)
class Engines:
    """Engines that stay up between runs (real ones), or None where each run gets fresh emulated ones."""

    urls: Sequence[str]
    model: str
    profile: str


async def run_demo(
    size: Size, policies: Sequence[str], engines: Engines | None, work: Path, view: LiveView
) -> list[RunOutcome]:
    """Every policy under every seed. Raises CommandFailed."""
    outcomes: list[RunOutcome] = []
    async with aiohttp.ClientSession() as http:
        for policy in policies:
            for first in range(0, len(size.seeds), size.side_by_side):
                seeds = size.seeds[first : first + size.side_by_side]
                ended = await _side_by_side(size, policy, seeds, engines, http, work, view)
                view.finished(ended)
                outcomes += ended
    return outcomes


async def _side_by_side(
    size: Size,
    policy: str,
    seeds: Sequence[int],
    engines: Engines | None,
    http: aiohttp.ClientSession,
    work: Path,
    view: LiveView,
) -> list[RunOutcome]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    _one(size, policy, seed, engines, http, work, view if seed == seeds[0] else None)
                )
                for seed in seeds
            ]
    except* CommandFailed as failed:
        raise _first(failed) from None
    return [task.result() for task in tasks]


async def _one(
    size: Size,
    policy: str,
    seed: int,
    engines: Engines | None,
    http: aiohttp.ClientSession,
    work: Path,
    view: LiveView | None,
) -> RunOutcome:
    name = f"{policy}-{seed}"
    async with contextlib.AsyncExitStack() as stack:
        if engines is None:
            urls: Sequence[str] = await stack.enter_async_context(emulated_engines(size, http, work, name))
            model, profile = MODEL, str(size.profile)
        else:
            urls, model, profile = engines.urls, engines.model, engines.profile
        front = await stack.enter_async_context(gateway(size, policy, urls, profile, http, work, name))
        result = work / f"bench-{name}.json"
        log = work / f"bench-{name}.log"
        before = await front.state()
        bench = await stack.enter_async_context(
            tiergate(bench_arguments(size, seed, model, front.url, result), log)
        )
        if view is not None:
            await stack.enter_async_context(_watching(front, view, policy, seed))
        if await bench.wait() != 0:
            raise CommandFailed(f"tiergate bench failed:\n{await asyncio.to_thread(tail, log)}")
        after = await front.state()
        read = await asyncio.to_thread(BenchFile.read, result)
        spent = _number(after, "backend_seconds") - _number(before, "backend_seconds")
        # a policy without tiers leaves every backend in the pool, and uses all of them
        backend_seconds = spent if spent > 0 else size.backends * read.wall_s
        return RunOutcome(policy, seed, read, backend_seconds, _number(after, "loop_lag_max_s"))


def bench_arguments(size: Size, seed: int, model: str, url: str, result: Path) -> list[str]:
    """The load of one run at the gateway at `url`, as arguments of `tiergate`; its results go to `result`."""
    load = size.load
    from_s = f"{load.slice_s * seed:g}"
    source = [argument.replace("{from_s}", from_s) for argument in load.source]
    return [
        *("bench", "--url", f"{url}/v1", "--model", model, "--lengths", load.lengths, *source),
        *("--rate-factor", f"{load.rate_factor:g}"),
        *("--tiers", size.mix, "--seed", str(seed), "--warmup", f"{load.warmup_s:g}"),
        *("--duration", f"{load.measured_s:g}", "--cooldown", f"{load.cooldown_s:g}", "--json", str(result)),
        "--quiet",
    ]


@contextlib.asynccontextmanager
async def _watching(front: Gateway, view: LiveView, policy: str, seed: int) -> AsyncIterator[None]:
    async def watch() -> None:
        while True:
            view.show(policy, seed, await front.state())
            await asyncio.sleep(_WATCH_S)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(watch())
        try:
            yield
        finally:
            task.cancel()


def _first(group: BaseExceptionGroup[CommandFailed]) -> CommandFailed:
    """One of the failures: the others are its echoes."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _number(state: dict[str, object], key: str) -> float:
    value = state.get(key)
    return float(value) if isinstance(value, int | float) else 0.0

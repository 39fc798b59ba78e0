"""One run: a stand, a load, faults, and then the checks. All follows from one seed but the machine's timing."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from loadgen.results import refusals
from scheduling.scoring import RequestEnd
from tests.chaos.checks import CHECKS, Peak, Rules, peaks
from tests.chaos.counters import Settled, wait_zero
from tests.chaos.evidence import Evidence, gather
from tests.chaos.faults import Fault, Harm, Menu, Window, do_faults, draw_faults
from tests.chaos.load import Client, Shape, offer, plan_crowds
from tests.chaos.process import left_over
from tests.chaos.stand import ADMIN_TOKEN, MIX, MODEL, Size, Stand, standing

_IDLE_S = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is. Faults come between `quiet_s` after the beginning and `calm_s` before the end of the load.

    Attributes:
        harshness: faults come so many times as often.
        longest_stop_leases: gateways are stopped for at most so many lease times.
        most_down: at most so many actors are in trouble at a time.
    """

    seed: int
    load_s: float = 40.0
    quiet_s: float = 2.0
    calm_s: float = 4.0
    size: Size = field(default_factory=Size)
    shape: Shape = field(default_factory=Shape)
    harshness: float = 1.0
    longest_stop_leases: float = 1.6
    most_down: int = 3


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run. `problems` is empty when everything held."""

    plan: Plan
    faults: Sequence[Fault]
    evidence: Evidence
    settled: Settled | None
    calm_peaks: dict[str, Peak]
    troubled_peaks: dict[str, Peak]
    problems: list[str] = field(default_factory=list)

    def ends(self) -> dict[str, int]:
        """How the requests ended."""
        counts: dict[str, int] = {}
        for client in self.evidence.clients:
            end = "vanished" if client.vanished else client.result.record.end.value
            counts[end] = counts.get(end, 0) + 1
        return counts

    def reasons(self) -> dict[str, int]:
        """Why requests were refused or failed, in their clients' words, the most frequent first."""
        return refusals([client.result for client in self.evidence.clients if not client.vanished])


def menus(plan: Plan) -> list[Menu]:
    """What may go wrong, how often and for how long."""
    size = plan.size
    gateways = tuple(f"gateway{number}" for number in range(size.gateways if size.shared else 1))
    engines = tuple(f"engine{number}" for number in range(size.engines))
    longest_stop_s = plan.longest_stop_leases * size.lease_s
    found = [
        Menu(Harm.KILL, gateways, 9.0, 0.2, 2.0),
        Menu(Harm.KILL, engines, 12.0, 0.2, 2.0),
        Menu(Harm.PAUSE, gateways, 11.0, 0.1, longest_stop_s),
        Menu(Harm.PAUSE, engines, 14.0, 0.1, 1.5),
    ]
    if size.shared:
        found.append(Menu(Harm.KILL, ("redis",), 13.0, 0.1, 1.5))
        found.append(Menu(Harm.PAUSE, ("redis",), 17.0, 0.1, 1.0))
    return [
        Menu(one.harm, one.targets, one.every_s / plan.harshness, one.shortest_s, one.longest_s) for one in found
    ]


def draw(plan: Plan) -> list[Fault]:
    """The faults of a plan."""
    until_s = plan.load_s - plan.calm_s
    if until_s <= plan.quiet_s:
        return []
    return draw_faults(plan.seed, plan.quiet_s, until_s, menus(plan), plan.most_down)


async def run(plan: Plan, folder: Path) -> Report:
    """Do it all. Raises StartFailed when a process does not start (again)."""
    faults = draw(plan)
    windows: list[Window] = []
    async with standing(plan.size, folder) as stand:
        await _all_up(stand)
        crowds = plan_crowds(stand.urls(), MIX, plan.shape, plan.load_s, plan.seed)
        async with asyncio.TaskGroup() as tasks:
            offered = tasks.create_task(offer(crowds, MODEL, plan.seed))
            tasks.create_task(do_faults(faults, stand.actors, time.monotonic(), windows))
        clients = offered.result()
        problems, settled = await _aftermath(stand, clients)
        mark = stand.mark
    evidence = await asyncio.to_thread(gather, stand, clients, windows)
    rules = Rules(frozenset(stand.gateways), plan.size.cap, plan.size.lease_s)
    problems += [f"{check.__name__}: {said}" for check in CHECKS for said in check(evidence, rules)]
    problems += [f"still running: {line}" for line in await asyncio.to_thread(left_over, mark)]
    problems += [
        f"{name} wrote a traceback: {process.log()[-1500:]}"
        for name, process in {**stand.engines, **stand.gateways}.items()
        if "Traceback" in process.log()
    ]
    return Report(plan, faults, evidence, settled, *peaks(evidence, rules), problems)


async def _aftermath(stand: Stand, clients: Sequence[Client]) -> tuple[list[str], Settled | None]:
    """What is to be looked at while everything still runs."""
    problems = [
        f"{name} ended by itself with {process.ended_by_itself}"
        for name, process in {**stand.engines, **stand.gateways}.items()
        if process.ended_by_itself is not None
    ]
    settled = None
    if stand.store is not None:
        settled = await wait_zero(stand, stand.size.lease_s)
        problems += [f"the store still counts {name} = {left:g}" for name, left in settled.left.items()]
        if not settled.fields:
            problems.append("the store knows no backend")
        problems += await _audit(stand)
    problems += await _gateways_idle(stand)
    return problems, settled


async def _audit(stand: Stand) -> list[str]:
    """What `tiergate state audit` says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tiergate", "state", "audit", "--config", str(stand.config)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return [] if process.returncode == 0 else [f"the audit ends with {process.returncode}: {said.decode()}"]


async def _states(stand: Stand) -> dict[str, dict[str, object]]:
    """What every gateway that answers says of itself."""
    headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
    found = {}
    async with aiohttp.ClientSession(headers=headers) as http:
        for name, port in stand.gateway_ports.items():
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(f"http://127.0.0.1:{port}/admin/v1/state") as answer:
                    found[name] = await answer.json()
    return found


async def _all_up(stand: Stand) -> None:
    """Wait until every gateway has met every engine. Raises TimeoutError."""
    async with asyncio.timeout(_IDLE_S):
        while True:
            states = await _states(stand)
            backends = [one for state in states.values() for one in _list(state["backends"])]
            if len(states) == len(stand.gateways) and all(one["phase"] == "up" for one in backends):
                return
            await asyncio.sleep(0.1)


def _list(value: object) -> list[dict[str, object]]:
    assert isinstance(value, list)
    return value


async def _gateways_idle(stand: Stand) -> list[str]:
    """Whether the gateways' own books balance, and nobody is left in them."""
    states = await _states(stand)
    problems = [f"{name} does not answer" for name in stand.gateways if name not in states]
    for name, state in states.items():
        requests = state["requests"]
        assert isinstance(requests, dict)
        if not requests["conserved"]:
            problems.append(f"{name} does not conserve requests: {requests}")
        if requests["held"] or requests["running"]:
            problems.append(f"{name} still has requests: {requests}")
        problems += [
            f"{name} still carries load on {one['name']}: {one}"
            for one in _list(state["backends"])
            if one["running"] or one["peak_kv_tokens"] or one["queued_prefill_tokens"]
        ]
    return problems


def tell(report: Report) -> str:
    """A run in words."""
    lines = [f"seed {report.plan.seed}: {len(report.evidence.clients)} requests, {len(report.faults)} faults"]
    lines += [str(fault) for fault in report.faults]
    lines.append("requests: " + ", ".join(f"{count} {end}" for end, count in sorted(report.ends().items())))
    lines.append("not served: " + ", ".join(f"{count} {why}" for why, count in report.reasons().items()))
    cap = report.plan.size.cap
    for name in sorted(report.evidence.journals):
        calm, troubled = report.calm_peaks.get(name), report.troubled_peaks.get(name)
        lines.append(
            f"{name}: peak {calm.sequences if calm else 0} of {cap} while the store lived, "
            f"{troubled.sequences if troubled else 0} in and after faults of its own or the store's"
        )
    if report.settled is not None:
        lines.append(f"all counters zero {report.settled.seconds:.2f} s after the last request")
    lines += [f"PROBLEM {problem}" for problem in report.problems]
    return "\n".join(lines)


def finished(clients: Sequence[Client]) -> int:
    """How many were served."""
    return sum(client.result.record.end is RequestEnd.FINISHED for client in clients)

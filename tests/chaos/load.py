"""The clients: mixed-tier load from the project's load generator, some of whom hang up in the middle.

Every request has an `x-request-id` of its own and a connection of its own, so it is sent exactly once: nothing of
what the engines count twice is the clients' doing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from loadgen.client import LoadOptions, run_load
from loadgen.prompts import WordPrompts
from loadgen.results import RequestResult
from loadgen.target import Target
from workloads.arrivals import poisson
from workloads.mix import TierMix
from workloads.plan import PlannedRequest

_DRAIN_S = 60.0
_UNSTREAMED = 0.2
PREFIX = "chaos-"
"""Of every client's request id."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is offered.

    Attributes:
        rate_rps: to all gateways together, bursts not included.
        burst: so many requests more come at one moment, every `burst_every_s`: only then do gateways decide before
            they have heard of each other.
        vanishing: share of the clients that hang up after `patience_s`.
    """

    rate_rps: float = 14.0
    burst: int = 16
    burst_every_s: float = 2.0
    prompt_tokens: tuple[int, int] = (20, 400)
    output_tokens: tuple[int, int] = (5, 60)
    vanishing: float = 0.15
    patience_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Client:
    """One request as its client saw it. Wall-clock times."""

    request_id: str
    gateway: str
    result: RequestResult
    sent_s: float
    ended_s: float
    vanished: bool  # it hung up by its own will


class _Named(Target):
    """A target whose requests are found again in every log."""

    def headers_of(self, request: PlannedRequest) -> dict[str, str]:
        headers = Target.headers_of(self, request)
        return {**headers, "x-request-id": request_id(request), "connection": "close"}


def request_id(request: PlannedRequest) -> str:
    return f"{PREFIX}{request.index}"


@dataclass(frozen=True, slots=True)
class _Crowd:
    """Clients of one gateway that behave alike."""

    gateway: str
    url: str
    requests: tuple[PlannedRequest, ...]
    patience_s: float | None


def plan_crowds(
    gateways: Sequence[tuple[str, str]], mix: TierMix, shape: Shape, duration_s: float, seed: int
) -> list[_Crowd]:
    """Who comes when, and to which gateway: all from the seed. `gateways` are names and base URLs."""
    rng = Random(f"{seed}:load")
    arrivals = poisson(shape.rate_rps, duration_s, rng)
    moments = poisson(1.0 / shape.burst_every_s, duration_s, rng)
    arrivals = sorted(arrivals + [at_s for at_s in moments for _ in range(shape.burst)])
    tiers = mix.draw(rng, len(arrivals))
    groups: dict[tuple[str, bool], list[PlannedRequest]] = {}
    for index, (at_s, tier) in enumerate(zip(arrivals, tiers, strict=True)):
        gateway, _ = rng.choice(gateways)
        vanishing = rng.random() < shape.vanishing
        one = PlannedRequest(
            index=index,
            at_s=at_s,
            tier=tier.name,
            slo=tier.slo,
            prompt_tokens=rng.randint(*shape.prompt_tokens),
            output_tokens=rng.randint(*shape.output_tokens),
            streamed=rng.random() >= _UNSTREAMED,
        )
        groups.setdefault((gateway, vanishing), []).append(one)
    urls = dict(gateways)
    return [
        _Crowd(name, urls[name], tuple(requests), shape.patience_s if vanishing else None)
        for (name, vanishing), requests in sorted(groups.items())
    ]


async def offer(crowds: Sequence[_Crowd], model: str, seed: int) -> list[Client]:
    """Send everything on schedule, and wait until every request has ended one way or the other."""
    answers = await asyncio.gather(*(_send(crowd, model, seed) for crowd in crowds))
    return [client for answered in answers for client in answered]


async def _send(crowd: _Crowd, model: str, seed: int) -> list[Client]:
    target = _Named(crowd.url, model, WordPrompts(seed), template_tokens=1)
    options = replace(LoadOptions(drain_s=_DRAIN_S), request_s=crowd.patience_s)
    began_s = time.time()
    result = await run_load(target, crowd.requests, crowd.requests[-1].at_s, options)
    clients = []
    for one in result.results:
        ended_s = one.record.ended_s
        clients.append(
            Client(
                request_id(one.planned),
                crowd.gateway,
                one,
                began_s + one.planned.at_s,
                began_s + (result.wall_s if ended_s is None else ended_s),
                vanished=crowd.patience_s is not None and one.record.reason == "timeout",
            )
        )
    return clients

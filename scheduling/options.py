"""The knobs of a dispatcher."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """The dispatcher's knobs.

    Attributes:
        handback_period_s: how often tails are looked at; a backend found empty in `handback_checks` of them in
            a row goes back to the pool (PolyServe §4.3; the period is not in the paper).
        rebalance_period_s: length of a round in which demand is measured for a fleet without a pool.
        moves_per_round: backends relabelled at most at the end of a round.
        demand_window_s: how long a tier counts as in demand after a request.
        max_attempts: backends tried for one request before its first byte.
        max_store_refusals: times a decision is made again after the store said no, before the request is held.
        look_again_s: how often those who wait are looked at though nothing was heard of any backend.
        scan_held: how many of each queue are tried on a backend that got better: 1 is head of line.
        overtaking: whether a newcomer is placed at once where it fits, though others of its tier wait before it.
        refuses: whether a request that cannot be on time any more is refused, or relegated where its tier says so;
            else it waits on and is served late, as in PolyServe.
        max_held: held requests at most; beyond it the newcomer is refused.
        yield_s: how long a request that found a place lets an earlier one of another replica go first; 0: not at
            all.
        paces_prefill: whether prompts are let into an engine whose chunk cannot be set only at the rate with which
            its decodes keep their pace on average.
        cooldown_s: a backend that failed before a first byte rests this long, doubling up to 32 times.
    """

    handback_period_s: float = 10.0
    handback_checks: int = 2
    rebalance_period_s: float = 10.0
    moves_per_round: int = 1
    demand_window_s: float = 30.0
    max_attempts: int = 3
    max_store_refusals: int = 2
    look_again_s: float = 1.0
    scan_held: int = 1
    overtaking: bool = True
    refuses: bool = True
    max_held: int = 10_000
    yield_s: float = 0.15
    paces_prefill: bool = False
    cooldown_s: float = 0.25

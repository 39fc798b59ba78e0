"""What is asked of a capacity plan, and what it tells."""

from __future__ import annotations

import math
from dataclasses import dataclass

from simulator.campaign.interval import Interval
from simulator.planning.costs import Saving
from simulator.planning.demand import Demand, Window
from simulator.planning.sizing import Runs
from simulator.scenario import Arrivals, Contender, FleetSpec

LEAST_MEASURED = 1_000
"""Requests that a run measures at least, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be planned.

    Attributes:
        fleet: one kind of engine, whose count is of no account.
        target: of all requests, and of each tier with a promise.
        window_s: None: `default_window_s`.
        rate_factor: so many times the trace's requests in the same time.
        measured: requests that a run measures at least.
        silos, costs: whether to size silos, and to price promises.
        default_profile: nobody chose the engine.
    """

    demand: Demand
    fleet: FleetSpec
    contender: Contender
    target: float
    seeds: tuple[int, ...] = (1, 2, 3)
    window_s: float | None = None
    rate_factor: float = 1.0
    arrivals: Arrivals = Arrivals.POISSON
    measured: int = LEAST_MEASURED
    silos: bool = True
    costs: bool = True
    default_profile: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """Backends by tier, mean over time; `pool`: of none. Empty where a policy has no tiers."""

    tiers: tuple[tuple[str, float], ...]
    pool: float


@dataclass(frozen=True, slots=True)
class Level:
    """What a number of backends serves.

    Attributes:
        rate_rps: the greatest rate of a window that keeps the target; where no fleet keeps it, the one tried.
        backends: None: no fleet that was tried keeps the target at that rate.
        attainments: there, by tier and for `all`, over all seeds; nothing is forgiven.
        worst: of the tier that fares worst, over seeds, without what is forgiven.
        seeds_reached: seeds that keep the target alone, without what is forgiven.
        over_rps: the least rate tried that misses the target; None: none was.
        over: the worst tier's attainment there, over seeds, without what is forgiven.
        tried: backends, rate and the worst tier's attainment over all seeds.
    """

    group: int
    rate_rps: float
    backends: int | None
    attainments: tuple[tuple[str, float], ...]
    worst: Interval
    seeds_reached: int
    held: Held
    over_rps: float | None
    over: Interval | None
    tried: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True, slots=True)
class PlannedWindow:
    """A window with its fleet. `level`: the fleet of its group that it was given.

    Attributes:
        backends: None where the target was not reached by any number that was tried.
        scaled: the load is beyond what was simulated, and the answer is in proportion.
        borderline: one backend fewer misses the target by less than the interval over seeds: it may do.
    """

    window: Window
    backends: int | None
    held: Held
    level: int | None
    scaled: bool
    borderline: bool


@dataclass(frozen=True, slots=True)
class Silos:
    """One pool a tier, at the greatest load of the day. `borderline` as for windows."""

    backends: int | None
    rate_rps: float
    scale: float
    worst: float
    borderline: bool


@dataclass(frozen=True, slots=True)
class Priced:
    """What promises cost, measured on a fleet of `backends`."""

    backends: int
    request_cost_s: Interval
    savings: tuple[Saving, ...]


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """Everything that was found.

    Attributes:
        unloaded: what a fleet without load attains, by tier and for `all`, where that is below the target.
        peak_rps: the greatest load, as a rate of its group's requests.
        cells: all runs behind it.
    """

    asked: Asked
    window_s: float
    windows: tuple[PlannedWindow, ...]
    levels: tuple[Level, ...]
    silos: Silos | None
    priced: Priced | None
    unloaded: tuple[tuple[str, float], ...]
    peak_rps: float
    runs: Runs
    cells: int
    requests: int

    @property
    def reached(self) -> bool:
        """Whether every window has a fleet that keeps the target, for every request that was asked for."""
        spare = 1 - self.asked.target
        possible = all(each.share <= spare for each in self.asked.demand.impossible) and not self.unloaded
        return possible and all(one.backends is not None for one in self.windows)

    @property
    def peak(self) -> int | None:
        """The largest fleet of the day; None when a window has none."""
        found = [one.backends for one in self.windows]
        return None if None in found else max((one or 0 for one in found), default=0)

    @property
    def hours(self) -> float:
        return math.fsum(one.window.duration_s for one in self.windows) / 3600

    @property
    def backend_hours(self) -> float | None:
        """Of a fleet that follows the plan; None when a window has none."""
        if self.peak is None:
            return None
        return math.fsum((one.backends or 0) * one.window.duration_s for one in self.windows) / 3600

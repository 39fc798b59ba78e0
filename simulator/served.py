"""One request as a simulation served it, and a whole run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scheduling.decisions import Outcome
from scheduling.scoring import RequestEnd
from simulator.engines import StreamTimes
from simulator.outcome import Sample
from simulator.requests import SimRequest


@dataclass(frozen=True, slots=True)
class Served:
    """One request's end.

    Attributes:
        reason: why it was refused or failed, in one word.
        rung: where on the ladder it was placed last; None when it never was.
        times: when its tokens came; None unless it finished.
    """

    sim: SimRequest
    end: RequestEnd
    ended_s: float
    reason: str | None = None
    rung: Outcome | None = None
    backend: str | None = None
    times: StreamTimes | None = None
    predicted_ttft_s: float | None = None
    predicted_tpot_s: float | None = None

    @property
    def slack_s(self) -> float | None:
        """The least time any token came before its deadline."""
        return None if self.times is None else self.times.slack_s

    @property
    def promised(self) -> bool:
        return self.sim.request.slo.ttft_s is not None

    @property
    def attained(self) -> bool:
        """Every token on time, counted from zero; never without a promise."""
        return self.slack_s is not None and self.slack_s >= 0.0

    @property
    def attained_one_based(self) -> bool:
        """Every token on time, counted from one: each is due one TPOT later."""
        grace_s = self.sim.request.slo.tpot_s or 0.0
        return self.slack_s is not None and self.slack_s + grace_s >= 0.0

    @property
    def ttft_s(self) -> float | None:
        if self.times is None or self.times.first_s is None:
            return None
        return self.times.first_s - self.sim.request.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first."""
        times = self.times
        if times is None or times.tokens < 2 or times.first_s is None or times.last_s is None:
            return None
        return (times.last_s - times.first_s) / (times.tokens - 1)


@dataclass(frozen=True, slots=True)
class SimResult:
    """What a run gave. Requests stand in the order in which they ended.

    `backend_seconds`: time backends spent in a tier; `busy_s`: time engines spent in steps;
    `control`: settings that the controllers decided, by rung.
    """

    served: tuple[Served, ...]
    backend_seconds: float
    busy_s: float
    preemptions: int
    ended_s: float
    samples: tuple[Sample, ...] = ()
    decision_s: tuple[float, ...] = ()
    control: Mapping[str, int] = field(default_factory=dict)

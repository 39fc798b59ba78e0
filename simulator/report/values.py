"""What a report is made of: runs, and what was found by comparing them.

Nothing here computes a result; `simulator.report.summary` brings runs of several seeds together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from simulator.campaign.goodput import Goodput, Judged, Ratio, Target
from simulator.outcome import CellOutcome
from simulator.scenario import Cell, Contender, FleetSpec, Workload


@dataclass(frozen=True, slots=True)
class Run:
    """A cell and what it gave."""

    cell: Cell
    outcome: CellOutcome


@dataclass(frozen=True, slots=True)
class Setting:
    """What cells share that differ only in contender, rate and seed: the conditions of one comparison."""

    workload: Workload
    fleet: FleetSpec
    warmup_requests: int
    measured_requests: int
    cooldown_requests: int

    @classmethod
    def of(cls, cell: Cell) -> Setting:
        return cls(cell.workload, cell.fleet, cell.warmup_requests, cell.measured_requests, cell.cooldown_requests)

    def cell(self, contender: Contender, rate_rps: float, seed: int) -> Cell:
        """A run under these conditions."""
        return Cell(
            self.workload,
            self.fleet,
            contender,
            rate_rps,
            seed,
            self.warmup_requests,
            self.measured_requests,
            self.cooldown_requests,
        )

    @property
    def title(self) -> str:
        """As a heading shows it: `azure2023_conv on 20 x h200-llama-3.1-8b-bf16`."""
        parts = [f"{self.workload.trace} on {engines_text(self.fleet)}"]
        if self.workload.invert_at is not None:
            parts.append(f"mix inverted at {100 * self.workload.invert_at:g} %")
        if self.workload.prefixes:
            parts.append("with prefixes")
        if self.fleet.replicas > 1:
            parts.append(f"{self.fleet.replicas} replicas")
        if self.fleet.view_age_s:
            parts.append(f"views {1e3 * self.fleet.view_age_s:g} ms old")
        if self.fleet.startup_s:
            parts.append(f"start-up {self.fleet.startup_s:g} s")
        if self.fleet.faults:
            parts.append("with failures")
        return ", ".join(parts)


def engines_text(fleet: FleetSpec) -> str:
    """The engines in words, such as `20 x h200-llama-3.1-8b-bf16 (t0 5 ms)`."""
    kinds = []
    for kind in fleet.engines:
        floor = "" if kind.step_floor_s is None else f" (t0 {1e3 * kind.step_floor_s:g} ms)"
        kinds.append(f"{kind.count} x {kind.profile}{floor}")
    return " + ".join(kinds)


class MarkKind(StrEnum):
    REFERENCE = "reference"  # the tier-packed fleet: what "of optimal" means
    UPPER = "upper bound"  # nothing serves more


@dataclass(frozen=True, slots=True)
class Mark:
    """A rate that the curves of a setting are to be read against. `judged`: only those of it; None: of both."""

    setting: Setting
    kind: MarkKind
    label: str
    rate_rps: float
    judged: Judged | None = None


@dataclass(frozen=True, slots=True)
class GoodputRow:
    """What a search found for a contender. `reference_rps`: the tier-packed rate it is compared with."""

    setting: Setting
    contender: str
    goodput: Goodput
    reference_rps: float | None = None


@dataclass(frozen=True, slots=True)
class GainRow:
    """How much more one contender serves than another: a ratio of goodputs, paired by seed.

    Attributes:
        group: what is compared inside one figure, such as a trace.
        step_floor_s: the fixed part of a step that this row is at; None: the profile's own, which is not on the
            figure against t0.
    """

    group: str
    contender: str
    against: str
    target: Target
    ratio: Ratio
    step_floor_s: float | None = None


@dataclass(frozen=True, slots=True)
class AblationRow:
    """What becomes of a policy with one mechanism taken out: its goodput over that of the whole policy."""

    group: str
    mechanism: str
    target: Target
    ratio: Ratio


@dataclass(frozen=True, slots=True)
class ProfileNote:
    """Where the step times of a profile come from."""

    name: str
    model: str
    hardware: str
    source: str
    origin: str
    licence: str
    conditions: str


@dataclass(frozen=True, slots=True)
class Study:
    """Everything one report tells.

    Attributes:
        findings: what was found, in sentences; shown first.
        rerun: the command that makes the same report.
    """

    title: str
    runs: tuple[Run, ...]
    findings: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = ()
    goodputs: tuple[GoodputRow, ...] = ()
    gains: tuple[GainRow, ...] = ()
    ablations: tuple[AblationRow, ...] = ()
    profiles: tuple[ProfileNote, ...] = ()
    rerun: str = ""

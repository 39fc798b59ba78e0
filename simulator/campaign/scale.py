"""The rates a row of the table is read against: the tier-packed reference and true upper bounds.

They are worked out from a sample of the workload's own requests, after the ones no idle engine can keep were left
out, on the fleet's own step times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from simulator.bounds import EngineKind, upper_bound
from simulator.build import BLOCK_TOKENS, Kind, idle_ttft, kinds_of, shortest_model_tokens
from simulator.reference import needs_of, reference
from simulator.requests import SimRequest
from simulator.scenario import Cell, Contender, FleetSpec, Form, Workload
from simulator.workload import offered

_SAMPLE = 6_000  # requests; a reference moves by less than a per cent between samples of this size
_SEED = 0


@dataclass(frozen=True, slots=True)
class Scale:
    """Rates in requests/s, and times of a workload on a fleet.

    Attributes:
        optimal_rps: of the tier-packed reference, co-located.
        optimal_pd_rps: the same, disaggregated.
        pool_rps: co-located, all tiers in one pool at the tightest pace.
        prefill_backends: how many of the disaggregated fleet prefill.
        residence_s: how long a request of the loosest tier stays at its full pace.
    """

    optimal_rps: float
    optimal_pd_rps: float
    pool_rps: float
    prefill_backends: int
    residence_s: float

    def optimal(self, form: Form) -> float:
        return self.optimal_rps if form is Form.COLOCATED else self.optimal_pd_rps


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates in requests/s that no policy can keep up for long: above them is a bug.

    Attributes:
        all_rps: with every request on time.
        most_rps: with 90 % on time, the dearest tenth dropped.
        every_tier_rps: with 90 % of every tier on time.
    """

    all_rps: float
    most_rps: float
    every_tier_rps: float


class UnevenFleet(ValueError):
    """The reference is of equal engines; the fleet has several kinds."""


@cache
def scale_of(workload: Workload, fleet: FleetSpec) -> Scale:
    """Work the reference out.

    Raises:
        UnevenFleet: the fleet has several kinds of engines.
        ProfileError, TraceError, WorkloadError: what the row names cannot be read or offered.
    """
    kind = _only_kind(fleet)
    needs = needs_of(_requests(workload, fleet), prefix_caching=fleet.prefix_caching)
    together, apart = (
        reference(
            kind.step_time,
            kind.limits,
            needs,
            form,
            host_step_s=fleet.host_step_s,
            host_seq_s=fleet.host_seq_s,
        )
        for form in (Form.COLOCATED, Form.DISAGGREGATED)
    )
    loosest = needs[-1]
    ttft_s = max([*workload.ttft_s, *(tier.slo.ttft_s or 0.0 for tier in workload.tiers)])
    return Scale(
        together.optimal_rate(fleet.backends),
        apart.optimal_rate(fleet.backends),
        together.pool_rate(fleet.backends),
        fleet.prefill_backends or apart.prefill_backends(fleet.backends),
        ttft_s + loosest.lengths.decode_steps * loosest.tpot_s,
    )


@cache
def ceilings_of(workload: Workload, fleet: FleetSpec, form: Form) -> Ceilings:
    """Work the upper bounds out; some seconds. Raises as `scale_of`."""
    kind = _only_kind(fleet)
    bound = upper_bound(
        _requests(workload, fleet),
        [EngineKind(kind.step_time, kind.limits, fleet.backends, fleet.host_step_s, fleet.host_seq_s)],
        prefix_caching=fleet.prefix_caching,
        prefill_backends=None if form is Form.COLOCATED else scale_of(workload, fleet).prefill_backends,
    )
    return Ceilings(
        bound.ceiling(1.0).long_run_rps,
        bound.ceiling(0.9).long_run_rps,
        bound.ceiling(0.9, every_tier=True).long_run_rps,
    )


@cache
def _requests(workload: Workload, fleet: FleetSpec) -> tuple[SimRequest, ...]:
    """A sample of what is offered. The mix is as it begins; an inversion comes later."""
    kinds = kinds_of(fleet)
    cell = Cell(replace(workload, invert_at=None), fleet, Contender("random"), 1.0, _SEED, 0, _SAMPLE, 0)
    return tuple(
        offered(
            cell,
            idle_ttft(kinds, fleet),
            block_tokens=BLOCK_TOKENS,
            max_tokens=shortest_model_tokens(kinds),
        )
    )


def _only_kind(fleet: FleetSpec) -> Kind:
    kinds = kinds_of(fleet)
    if len(fleet.engines) != 1:
        raise UnevenFleet(f"the reference needs one kind of engine, not {len(fleet.engines)}")
    return kinds[0]

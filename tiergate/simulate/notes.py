"""What a reader of a comparison must know beside its numbers: what was put right, and what is too short."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from simulator.contenders import knobs_of, setup_for
from simulator.report.summary import Comparison
from simulator.report.values import Run
from simulator.scenario import Contender, FleetSpec, Form, Workload
from tiergate.simulate.tuning import BEST, CHUNK, VALUES


def notes(comparison: Comparison, residence_s: float | None) -> tuple[str, ...]:
    """Sentences for the reader, most important first. `residence_s`: how long a request may stay."""
    work, fleet = comparison.setting.workload, comparison.setting.fleet
    contenders = dict.fromkeys(run.cell.contender for run in comparison.runs)
    return (
        *_window(comparison, residence_s),
        *_chunks(contenders),
        *_shares(work),
        *_faults(fleet, comparison.runs),
        *_idle_options(fleet, contenders),
        *_left_out(comparison.runs),
    )


def _window(comparison: Comparison, residence_s: float | None) -> Iterator[str]:
    window_s = min(run.outcome.window_s for run in comparison.runs)
    if residence_s and 0 < window_s < residence_s:
        measured = comparison.setting.measured_requests
        enough = _rounded_up(measured * residence_s / window_s)
        yield (
            f"{window_s:.0f} s are measured, and a request may stay for {residence_s:.0f} s. Work that is put off "
            f"past the window flatters a policy: take --requests {enough}."
        )


def _rounded_up(number: float) -> int:
    """To two leading digits."""
    unit: int = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit


def _chunks(contenders: Iterable[Contender]) -> Iterator[str]:
    names = [item.label for item in contenders if _has_default_chunk(item)]
    if names:
        yield (
            f"{', '.join(names)}: {CHUNK} is the engine's own default, and policies whose engines keep one token "
            f"budget hang on it. --policy {names[0].partition('(')[0]}:{CHUNK}={BEST} "
            f"tries {VALUES[0]} to {VALUES[-1]} first."
        )


def _has_default_chunk(contender: Contender) -> bool:
    """Whether its engines keep one token budget that nobody chose."""
    setup = setup_for(contender)
    known = any(knob.name == CHUNK for knob in knobs_of(contender.name))
    return known and setup.form is Form.COLOCATED and not setup.driven and setup.chunk_tokens is None


def _shares(work: Workload) -> Iterator[str]:
    total = math.fsum(tier.share for tier in work.tiers)
    if not work.own_tiers and not math.isclose(total, 1.0, rel_tol=1e-6):
        parts = ", ".join(f"{tier.name} {100 * tier.share / total:.3g} %" for tier in work.tiers)
        yield f"The shares of the tiers sum to {total:g} and were rescaled: {parts}."


def _faults(fleet: FleetSpec, runs: Iterable[Run]) -> Iterator[str]:
    ended_s = [run.outcome.ended_s for run in runs]
    for fault in fleet.faults:
        where = f"The fault of backend {fault.backend} begins {fault.from_s:g} s after the start"
        late = sum(end_s <= fault.from_s for end_s in ended_s)
        if late == len(ended_s):
            yield f"{where}, and no run lasted longer than {max(ended_s):.0f} s: it did nothing."
        elif late:
            yield f"{where}; {late} of {len(ended_s)} runs were over by then ({min(ended_s):.0f} s at least)."


def _idle_options(fleet: FleetSpec, contenders: Iterable[Contender]) -> Iterator[str]:
    if fleet.view_age_s and fleet.replicas == 1:
        yield "--view-age-ms does nothing with one gateway replica, which knows its own load: take --replicas 2."
    if fleet.prefill_backends is not None and all(setup_for(item).form is Form.COLOCATED for item in contenders):
        yield "--prefill-backends does nothing: none of these policies is disaggregated."


def _left_out(runs: Iterable[Run]) -> Iterator[str]:
    left_out = max(run.outcome.left_out for run in runs)
    if left_out:
        yield f"{100 * left_out:.2g} % of the trace was left out: no idle engine keeps its promise."

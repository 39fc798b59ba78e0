"""Gateways, engines and the store are killed and stopped under load, and clients vanish: nothing is left behind.

Other faults: CHAOS_SEED=N; `make bench-chaos` for longer and harsher.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.faults import Harm
from tests.chaos.run import Plan, draw, finished, run, tell

_SEED = 20


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_nothing_is_left_behind(tmp_path: Path) -> None:
    plan = Plan(int(os.environ.get("CHAOS_SEED", _SEED)), load_s=60.0)
    print(f"seed {plan.seed}", *draw(plan), sep="\n")  # before anything can hang
    report = await run(plan, tmp_path)
    told = tell(report)
    print(told)
    assert not report.problems, told
    # A run in which nothing went wrong, or in which the cap was never met, would prove nothing.
    harmed = {(fault.harm, fault.target.rstrip("0123456789")) for fault in report.faults}
    assert harmed == {(harm, kind) for harm in Harm for kind in ("gateway", "engine", "redis")}, told
    served, sent = finished(report.evidence.clients), len(report.evidence.clients)
    assert served > sent / 4, told
    assert max(peak.sequences for peak in report.calm_peaks.values()) == plan.size.cap, told

"""The trace through the simulated shell."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from scheduling import events as ev
from scheduling.policies import make
from simulator.fleet import FleetOptions, SimFleet
from simulator.requests import SimRequest
from simulator.scenario import Fault, FaultKind
from tests.twin.witness import Log, Witness
from tests.twin.world import ENGINE, HOMES, OPTIONS, PROFILE, SEED, TIERS, Asked, Outage, backend
from tiergate_engine.model import EngineModel


def simulated(policy: str, trace: Sequence[Asked], outage: Outage | None = None) -> Log:
    """What the simulator decides."""
    witness = Witness(TIERS, make(policy, Random(SEED)), OPTIONS)
    witness.handle(ev.TimePassed(), 0.0)
    for epoch, (name, tier) in enumerate(HOMES.items(), start=1):
        witness.handle(ev.BackendChanged(backend(name)), 0.0)
        witness.handle(ev.MembershipChanged(name, tier, epoch), 0.0)
    engines = {name: lambda: EngineModel(ENGINE, PROFILE.step_time) for name in HOMES}
    faults: tuple[Fault, ...] = ()
    if outage is not None:
        place = sorted(HOMES).index(outage.backend)
        faults = (Fault(place, FaultKind.DOWN, outage.from_s, outage.until_s - outage.from_s),)
    fleet = SimFleet([witness], engines, FleetOptions(faults=faults))
    fleet.run(SimRequest(asked.request(number), asked.output_tokens) for number, asked in enumerate(trace))
    return witness.log

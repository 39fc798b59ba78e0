"""What a contender is made of: a policy, and how its engines are run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from scheduling.knobs import Means
from scheduling.options import Options
from scheduling.policies.protocol import Policy
from scheduling.tiers import TierSet
from simulator.scenario import Form
from tiergate_engine.drive import Rules


def _same(tiers: TierSet) -> TierSet:
    return tiers


@dataclass(frozen=True, slots=True)
class Setup:
    """A contender, ready to run.

    Attributes:
        policy: makes the policy of one replica.
        prefill_policy: the same for the prefill half of a disaggregated fleet; None: as the decode half.
        form: co-located or disaggregated.
        driven: engines size every chunk so that the step keeps their pace (the host tier's, or the tightest
            resident's when that is tighter), and the policy counts on it; else their token budget is static.
        drive: engines keep the promises of the sequences they have, by these rules; None: they know of none. With
            chunks from slack no pace is set from outside, whatever `driven` says to the policy.
        chunk_tokens: the static token budget of a step; None: the engine's own default.
        lengths: how answer lengths are known: `mean` (of the trace, as in PolyServe §4.5), `learned` (online, as
            the gateway does) or `known` (a bound, not a policy).
        margin: factor on predicted times.
        options: the dispatcher's.
        tiers: the tiers as the policy is to see them.
        means: what the controller may set on the engines while they run; None: there is no controller, and engines
            stay as they were started.
    """

    policy: Callable[[Random], Policy]
    prefill_policy: Callable[[Random], Policy] | None = field(default=None, kw_only=True)
    form: Form = Form.COLOCATED
    driven: bool = False
    drive: Rules | None = None
    chunk_tokens: int | None = None
    lengths: str = "mean"
    margin: float = 1.0
    options: Options = field(default_factory=Options)
    tiers: Callable[[TierSet], TierSet] = _same
    means: Means | None = None

    @property
    def paced(self) -> bool:
        """Whether engines are told a pace from outside."""
        return self.driven and not (self.drive is not None and self.drive.chunk_from_slack)

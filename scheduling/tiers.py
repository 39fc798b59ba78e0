"""Tiers: bins of TPOT with a TTFT promise (PolyServe §4.2), and how a request finds its tier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Slo:
    """A pace that was promised. None means no promise.

    Token i (from zero) is due at ``arrival + ttft_s + i * tpot_s`` (DSLO, PolyServe §2.3).
    """

    ttft_s: float | None
    tpot_s: float | None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number of seconds or absent, not {value!r}")

    @property
    def promised(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def deadline_s(self, arrival_s: float, index: int) -> float:
        """When token `index` (from zero) is due; infinity without a promise."""
        if self.ttft_s is None:
            return math.inf
        if index == 0:
            return arrival_s + self.ttft_s
        return math.inf if self.tpot_s is None else arrival_s + self.ttft_s + index * self.tpot_s


class OnMiss(Enum):
    """What becomes of a request whose promise cannot be kept any more."""

    REFUSE = "refuse"  # 429 with a computed Retry-After
    RELEGATE = "relegate"  # served with what is left, never at a resident's cost


@dataclass(frozen=True, slots=True)
class Tier:
    """A class of service. `rank` orders tiers from tight (0) to loose; best effort has no promise."""

    name: str
    slo: Slo
    rank: int
    on_miss: OnMiss = OnMiss.REFUSE

    @property
    def host_tpot_s(self) -> float:
        """The pace a backend of this tier keeps for everyone on it; infinity for best effort."""
        return math.inf if self.slo.tpot_s is None else self.slo.tpot_s


@dataclass(frozen=True, slots=True)
class TierSet:
    """The tiers of a fleet, tight to loose, and the one that requests without a wish belong to."""

    tiers: tuple[Tier, ...]
    default: str

    def __post_init__(self) -> None:
        if not self.tiers:
            raise ValueError("tiers: at least one tier is needed")
        names = [tier.name for tier in self.tiers]
        if len(set(names)) != len(names):
            raise ValueError(f"tiers: names must differ, got {names}")
        if self.default not in names:
            raise ValueError(f"default tier {self.default!r} is not one of {names}")
        if [tier.rank for tier in self.tiers] != list(range(len(self.tiers))):
            raise ValueError("tiers: rank must be the position, tight to loose, from 0")
        paces = [tier.host_tpot_s for tier in self.tiers]
        if paces != sorted(paces):
            raise ValueError(f"tiers: tpot_s must not fall from tight to loose, got {paces}")

    def __getitem__(self, name: str) -> Tier:
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(tier.name == name for tier in self.tiers)

    @property
    def tightest(self) -> Tier:
        return self.tiers[0]

    @property
    def best_effort(self) -> Tier | None:
        """The tier without a TPOT promise, if there is one."""
        last = self.tiers[-1]
        return last if last.slo.tpot_s is None else None

    def for_tpot(self, tpot_s: float) -> Tier:
        """The bin of a TPOT: the loosest tier that is at least as tight; the tightest when none is."""
        fitting = [tier for tier in self.tiers if tier.host_tpot_s <= tpot_s]
        return fitting[-1] if fitting else self.tiers[0]


@dataclass(frozen=True, slots=True)
class AskedSlo:
    """What a client asked for, already range-checked by the shell; None where it said nothing."""

    tier: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def stated(self) -> bool:
        return self.tier is not None or self.ttft_s is not None or self.tpot_s is not None


@dataclass(frozen=True, slots=True)
class Granted:
    """The tier and the pace a request is served at."""

    tier: Tier
    slo: Slo


def classify(asked: AskedSlo, tiers: TierSet, default: str | None = None) -> Granted:
    """Bin a request by its TPOT (PolyServe §4.2): a named tier first, then a TPOT, then the default.

    A stated TTFT or TPOT replaces the tier's own value; a TPOT between two tiers is served in the tighter one,
    under its own promise. Raises KeyError for a tier that is not there.
    """
    if asked.tier is not None:
        tier = tiers[asked.tier]
        if asked.tpot_s is not None and asked.tpot_s < tier.host_tpot_s:
            tier = tiers.for_tpot(asked.tpot_s)
    elif asked.tpot_s is not None:
        tier = tiers.for_tpot(asked.tpot_s)
    else:
        tier = tiers[default or tiers.default]
    ttft_s = tier.slo.ttft_s if asked.ttft_s is None else asked.ttft_s
    tpot_s = tier.slo.tpot_s if asked.tpot_s is None else asked.tpot_s
    return Granted(tier, Slo(ttft_s, tpot_s))

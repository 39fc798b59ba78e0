"""Which share of the requests asks for which tier."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from scheduling.tiers import Slo


class WorkloadError(ValueError):
    """A workload cannot be planned; the message names what is wrong."""


@dataclass(frozen=True, slots=True)
class TierShare:
    """A tier and its share of the requests (any positive weight)."""

    name: str
    slo: Slo
    share: float


@dataclass(frozen=True, slots=True)
class TierMix:
    """Which share of the requests asks for which tier."""

    shares: tuple[TierShare, ...]

    def __post_init__(self) -> None:
        if not self.shares:
            raise WorkloadError("tiers: at least one tier is needed")
        names = [share.name for share in self.shares]
        if len(set(names)) != len(names):
            raise WorkloadError(f"tiers: names must differ, got {names}")
        for share in self.shares:
            if not share.name or not share.name.isascii() or not share.name.isprintable():
                raise WorkloadError(f"tiers: {share.name!r} cannot be sent in a header: use plain ASCII")
            if not (math.isfinite(share.share) and share.share > 0):
                raise WorkloadError(f"tiers: the share of {share.name} must be positive, not {share.share!r}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(share.name for share in self.shares)

    def draw(self, rng: random.Random, count: int) -> list[TierShare]:
        """A tier for each of `count` requests, independently."""
        return rng.choices(self.shares, weights=[share.share for share in self.shares], k=count)


def parse_mix(text: str, known: Mapping[str, Slo]) -> TierMix:
    """Read ``name=share[:ttft_ms/tpot_ms]`` separated by commas, e.g. ``chat=0.7:1000/50,batch=0.3:-/-``.

    Without the part after the colon, the SLO comes from `known`; ``-`` is no promise. A missing ``=share`` is 1.
    Raises WorkloadError naming the entry.
    """
    shares = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        head, colon, slo_text = entry.partition(":")
        name, equals, share_text = head.partition("=")
        name = name.strip()
        try:
            share = float(share_text) if equals else 1.0
            slo = _parse_slo(slo_text) if colon else known[name]
        except KeyError:
            raise WorkloadError(
                f"tiers: no SLO is known for {name!r}; write {name}={share_text or 1}:TTFT_MS/TPOT_MS, "
                f"or name one of {sorted(known)}"
            ) from None
        except ValueError as error:
            raise WorkloadError(f"tiers: {entry!r} must read name=share:ttft_ms/tpot_ms ({error})") from None
        shares.append(TierShare(name, slo, share))
    return TierMix(tuple(shares))


def _parse_slo(text: str) -> Slo:
    ttft_text, slash, tpot_text = (part.strip() for part in text.partition("/"))
    if not slash:
        raise ValueError("two numbers of milliseconds with a slash between them")
    ttft_s, tpot_s = (None if part in {"-", ""} else float(part) / 1e3 for part in (ttft_text, tpot_text))
    return Slo(ttft_s, tpot_s)

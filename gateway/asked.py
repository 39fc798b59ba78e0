"""What pace a request asks for: its headers, its `service_tier`, its key's tier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.errors import InvalidRequest
from gateway.words import cut, quoted, unknown
from scheduling.tiers import AskedSlo, TierSet, classify

_MAX_SLO_MS = 3_600_000.0
_TTFT_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
_TPOT_HEADERS = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
_SERVICE_TIERS = ("auto", "default", "flex", "scale", "priority", "fast", "ultrafast", "standard_only")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is, and what its key allows."""

    tenant: str = ""
    tier: str | None = None
    tightest_tier: str | None = None


def asked_slo(
    fields: Mapping[str, object], headers: Mapping[str, str], caller: Caller, tiers: TierSet
) -> tuple[AskedSlo, bool]:
    """What pace is asked for, and whether anybody asked: headers, then `service_tier`, then the key's tier.

    Clamped to the tightest tier the key may have. Raises InvalidRequest.
    """
    tier = headers.get("x-slo-tier")
    names = [known.name for known in tiers.tiers]
    if tier is not None and tier not in tiers:
        raise InvalidRequest(f"x-slo-tier: {unknown('tier', tier, names)}", param="x-slo-tier")
    ttft_s = _header_s(headers, _TTFT_HEADERS)
    tpot_s = _header_s(headers, _TPOT_HEADERS)
    stated = tier is not None or ttft_s is not None or tpot_s is not None
    wished = _service_tier(fields, tiers)
    if not stated:
        if wished is not None:
            tier, stated = wished, True
        elif caller.tier is not None and caller.tier in tiers:
            tier, stated = caller.tier, True
    asked = AskedSlo(tier, ttft_s, tpot_s)
    if caller.tightest_tier is not None and caller.tightest_tier in tiers:
        asked = _clamped(asked, tiers, caller.tightest_tier)
    return asked, stated


def _clamped(asked: AskedSlo, tiers: TierSet, tightest: str) -> AskedSlo:
    bound = tiers[tightest]
    tier, ttft_s, tpot_s = asked.tier, asked.ttft_s, asked.tpot_s
    if tpot_s is not None and bound.slo.tpot_s is not None:
        tpot_s = max(tpot_s, bound.slo.tpot_s)
    if ttft_s is not None and bound.slo.ttft_s is not None:
        ttft_s = max(ttft_s, bound.slo.ttft_s)
    if (tier is not None and tiers[tier].rank < bound.rank) or classify(asked, tiers).tier.rank < bound.rank:
        tier = tightest
    return AskedSlo(tier, ttft_s, tpot_s)


def _service_tier(fields: Mapping[str, object], tiers: TierSet) -> str | None:
    wish = fields.get("service_tier")
    if wish is None:
        return None
    if not isinstance(wish, str) or wish not in _SERVICE_TIERS:
        raise InvalidRequest(
            f"service_tier: must be one of {', '.join(_SERVICE_TIERS)}, not {quoted(wish)}", param="service_tier"
        )
    if wish in {"priority", "fast", "ultrafast"}:
        return tiers.tightest.name
    if wish == "flex":
        best_effort = tiers.best_effort
        return tiers.tiers[-1].name if best_effort is None else best_effort.name
    return None


def _header_s(headers: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    """The first of these that is there, in seconds; the others must be readable too. Raises InvalidRequest."""
    found: float | None = None
    for name in names:
        text = headers.get(name)
        if text is not None:
            value_s = _milliseconds(text, name) / 1e3
            found = value_s if found is None else found
    return found


def _milliseconds(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InvalidRequest(f"{name}: {quoted(text)} is not a number of milliseconds", param=name) from None
    if not math.isfinite(value) or not 0 < value <= _MAX_SLO_MS:
        raise InvalidRequest(
            f"{name}: must be more than 0 and at most {_MAX_SLO_MS:.0f} milliseconds, not {cut(text)}",
            param=name,
        )
    return value

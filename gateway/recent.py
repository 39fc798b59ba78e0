"""The last decisions, kept to be asked for by request id."""

from __future__ import annotations

from collections import OrderedDict

import orjson

from scheduling.decisions import Candidate, Decision


class Decisions:
    """The newest decisions by the id that the client was told. Keeping one is a dictionary entry; the JSON is
    made when somebody asks."""

    def __init__(self, keep: int = 2_000) -> None:
        self._keep = keep
        self._by_id: OrderedDict[str, tuple[Decision, bool]] = OrderedDict()

    def add(self, public_id: str, decision: Decision, *, merged: bool = False) -> None:
        """Keep a request's last decision, and whether its events carried several tokens."""
        self._by_id[public_id] = decision, merged
        if len(self._by_id) > self._keep:
            self._by_id.popitem(last=False)

    def get(self, public_id: str) -> bytes | None:
        """A decision as JSON; None when it is not known, or not any more."""
        found = self._by_id.get(public_id)
        if found is None:
            return None
        decision, merged = found
        return orjson.dumps(
            {
                "request_id": public_id,
                "outcome": decision.outcome.value,
                "reason": decision.reason,
                "backend": decision.backend,
                "merged_events": merged,
                "candidates": [_candidate(candidate) for candidate in decision.candidates],
            }
        )


def _candidate(candidate: Candidate) -> dict[str, str | int | float | None]:
    return {
        "backend": candidate.backend,
        "tier": candidate.tier,
        "verdict": candidate.verdict.value,
        "ttft_s": candidate.ttft_s,
        "tpot_s": candidate.tpot_s,
        "peak_kv_tokens": candidate.peak_kv_tokens,
        "load": candidate.load,
    }

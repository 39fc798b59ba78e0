"""What is worth telling other replicas of one backend, and what they were told last."""

from __future__ import annotations

from scheduling.load import Floor, LoadVector
from scheduling.stored import Stored

KV_NEWS = 0.02
"""Part of the KV by which a peak has to move to be told: it creeps with every token."""

_SLACK_FELL, _SLACK_ROSE = 0.25, 1.0  # paces by which a slack has to move: less of it hurts, more of it only helps


class Told:
    """What the store has of this replica's measurements on one backend."""

    __slots__ = ("_candidate", "_last")

    def __init__(self) -> None:
        self._last: LoadVector | None = None
        self._candidate: LoadVector | None = None

    def is_news(self, own: LoadVector, stored: Stored) -> bool:
        """Whether what is measured differs from what the store counts or shows."""
        if not stored.certain or not stored.leases:
            return not own.idle or bool(stored.decodes or stored.kv_tokens or stored.prefill_tokens)
        if own.decodes != stored.decodes or own.queued_prefill_tokens != stored.prefill_tokens:
            return True
        if abs(own.peak_kv_tokens - stored.kv_tokens) > KV_NEWS * own.peak_kv_tokens:
            return True
        last = self._last
        return last is None or _moved(last.slack, own.slack) or _moved(last.queued_slack, own.queued_slack)

    def begin(self, own: LoadVector) -> None:
        """This is on its way."""
        self._candidate = own

    def doubt(self) -> None:
        """What the store shows is not known."""
        self._last = None

    def settle(self, taken: bool | None) -> None:
        """It was taken, refused, or (None) nobody knows: then it is not known either what the store shows."""
        if taken:
            self._last = self._candidate
        elif taken is None:
            self._last = None
        self._candidate = None


def _moved(before: Floor, after: Floor) -> bool:
    if len(before) != len(after):
        return True
    known = dict(before)
    for tpot_s, slack_s in after:
        was_s = known.get(tpot_s)
        if was_s is None or not -_SLACK_FELL * tpot_s <= slack_s - was_s <= _SLACK_ROSE * tpot_s:
            return True
    return False

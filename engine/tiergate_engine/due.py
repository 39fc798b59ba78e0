"""When the decodes of one engine owe their next tokens, so that a step asks for them without looking at each.

All decodes of one pace get one token a step, so they owe the next one a pace later: their order never changes
while they decode, and a sorted list for each pace answers by bisection. One that is left out of a step moves back
by a pace.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort

from tiergate_engine.lockstep import LiveSequence

_Key = tuple[float, int]


class DueTimes:
    """The decodes by pace and due time. `now_s` is the clock of the sequences' `first_due_s`, `steps` the count of
    steps that `Lockstep` has."""

    def __init__(self) -> None:
        self._by_pace: dict[float, list[_Key]] = {}
        self._free = 0  # decodes without a promise

    def add(self, sequence: LiveSequence) -> None:
        """It decodes; its `generated` is short of the truth by the count of steps."""
        spec = sequence.spec
        if sequence.relegated or math.isinf(spec.first_due_s) or math.isinf(spec.pace_s):
            sequence.due_key_s = math.inf
            self._free += 1
            return
        sequence.due_key_s = spec.first_due_s + sequence.generated * spec.pace_s
        insort(self._by_pace.setdefault(spec.pace_s, []), (sequence.due_key_s, sequence.holder.number))

    def drop(self, sequence: LiveSequence) -> None:
        """It decodes no longer."""
        if sequence.due_key_s == math.inf:
            self._free -= 1
            return
        pace_s = sequence.spec.pace_s
        keys = self._by_pace[pace_s]
        del keys[bisect_left(keys, (sequence.due_key_s, sequence.holder.number))]
        if not keys:
            del self._by_pace[pace_s]

    def slack_s(self, sequence: LiveSequence, now_s: float, steps: int) -> float:
        """How long until its next token is due; infinite without a promise."""
        if sequence.due_key_s == math.inf:
            return math.inf
        return sequence.due_key_s + (steps * sequence.spec.pace_s - now_s)

    def pace_s(self, sequence: LiveSequence) -> float:
        """Its promised pace; infinite without a promise."""
        return math.inf if sequence.due_key_s == math.inf else sequence.spec.pace_s

    def within_s(self, now_s: float, steps: int, decode_s: float, from_slack: bool) -> float:
        """The least bound of any decode: its slack, or its pace if that is below `decode_s`; or paces only. A pace
        below `decode_s` is none."""
        least_s = math.inf
        for pace_s, keys in self._by_pace.items():
            bound_s = pace_s if pace_s >= decode_s else math.inf
            if not from_slack:
                least_s = min(least_s, bound_s)
                continue
            ahead_s = steps * pace_s - now_s
            if keys[0][0] + ahead_s >= decode_s:
                least_s = min(least_s, keys[0][0] + ahead_s)
                continue
            least_s = min(least_s, bound_s)
            first = _first(keys, ahead_s, decode_s)
            if first < len(keys):
                least_s = min(least_s, keys[first][0] + ahead_s)
        return least_s

    def least_slack_s(self, now_s: float, steps: int, low_s: float, high_s: float) -> float | None:
        """The least slack of at least `low_s` and below `high_s`; None when nobody has one."""
        found_s = high_s
        for pace_s, keys in self._by_pace.items():
            ahead_s = steps * pace_s - now_s
            if keys[0][0] + ahead_s >= found_s:
                continue
            first = _first(keys, ahead_s, low_s)
            if first < len(keys):
                found_s = min(found_s, keys[first][0] + ahead_s)
        return found_s if found_s < high_s else None

    def most_slack_s(self, now_s: float, steps: int) -> float:
        """The largest slack; infinite when somebody has no promise."""
        if self._free:
            return math.inf
        return max(
            [keys[-1][0] + (steps * pace_s - now_s) for pace_s, keys in self._by_pace.items()], default=-math.inf
        )


def _first(keys: list[_Key], ahead_s: float, least_s: float) -> int:
    """The place of the first with at least `least_s` of slack."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high) // 2
        # The very sum that is the slack, so that rounding cannot make the two differ.
        if keys[middle][0] + ahead_s < least_s:
            low = middle + 1
        else:
            high = middle
    return low

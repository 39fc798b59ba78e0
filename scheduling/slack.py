"""Slack floors: per pace, the least time any resident has left until its next token is due.

A pace stands in a floor as long as anybody on board still keeps it, with infinite slack where no first token was
promised; whose promise is lost is in none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from scheduling.load import Floor
from scheduling.residents import Resident


def lowered(floor: Floor, tpot_s: float, slack_s: float) -> Floor:
    """With one more, who has so much slack."""
    found = dict(floor)
    if tpot_s == math.inf or slack_s >= found.get(tpot_s, math.inf) < math.inf:
        return floor
    found[tpot_s] = slack_s
    return tuple(found.items())


def raised(floor: Floor, gone: Resident, residents: Iterable[Resident]) -> Floor:
    """Without one who was in it. Only those of the same pace and phase are looked at, and only if the one who left
    had the least slack."""
    pace_s = gone.tpot_s
    found = dict(floor)
    if pace_s not in found or gone.slack_s > found[pace_s]:
        return floor
    others = [
        one.slack_s
        for one in residents
        if one.tpot_s == pace_s and one.first_token is gone.first_token and not one.lost and one is not gone
    ]
    if others:
        found[pace_s] = min(others)
    else:
        del found[pace_s]
    return tuple(found.items())


def floor_of_queued(waiting: Iterable[Resident], now_s: float) -> tuple[Floor, float]:
    """The floor of those whose prompts are queued, and their tightest pace. Who is late by now has lost its
    promise."""
    found = dict[float, float]()
    tightest_s = math.inf
    for resident in waiting:
        if resident.lost:
            continue
        left_s = resident.due_s - max(resident.expected_first_s, now_s)
        if left_s < 0.0 and resident.request.streamed:
            resident.lost = True
            continue
        tightest_s = min(tightest_s, resident.tpot_s)
        if resident.tpot_s < math.inf and left_s <= found.get(resident.tpot_s, math.inf):
            found[resident.tpot_s] = left_s
    return tuple(found.items()), tightest_s


def finite(floor: Floor) -> Floor:
    """Without those whom nothing was promised, to whom nothing can be late."""
    return tuple([one for one in floor if math.isfinite(one[0]) and math.isfinite(one[1])])
